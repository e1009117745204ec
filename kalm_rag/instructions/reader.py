"""RAG prompts of any make to `Instructions`: LlamaIndex and LangChain prompts, engines, chains, messages, strings.

Imports neither framework: an object is told by the attributes it has. The template is parsed, never formatted; what
the app fills in per query (documents, question, history) goes, with labels, fences and tags. System messages' remains
become the system text, human messages' the task. A single-string prompt has no system message, so all of it is task.
Example turns (a human message that an assistant message answers), assistant messages and worked examples in a text
("For example: ...") are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from kalm_rag.errors import InputError
from kalm_rag.instructions.examples import drop_examples
from kalm_rag.instructions.jinja import jinja_messages
from kalm_rag.instructions.pieces import Piece, Slot, Values
from kalm_rag.instructions.strip import strip_slots
from kalm_rag.instructions.templates import format_of, parse

_ROLES = {
    "system": "system",
    "developer": "system",
    "human": "human",
    "user": "human",
    "ai": "ai",
    "assistant": "ai",
    "model": "ai",
    "chatbot": "ai",
}
_READ_ROLES = ("system", "human")
_INNER = ("_query_engine", "combine_documents_chain", "combine_docs_chain", "llm_chain", "prompt")
"""Where engines over engines and LangChain's older chains keep what has the prompt."""
_WANTED = (
    "a string, (role, text) pairs, a LangChain or LlamaIndex prompt template, an LCEL chain, a query engine, a chat "
    "engine or an agent"
)


@dataclass(frozen=True)
class _Message:
    """One message of a prompt: role (system, human, ai or other) and its pieces."""

    role: str
    pieces: list[Piece]


def read_prompt(prompt: object) -> tuple[str | None, str | None]:
    r"""Read the system and task text of an app out of its RAG prompt. Changes nothing of the prompt.

    Args:
        prompt: A string (in f-string, LlamaIndex, Jinja or mustache format), (role, text) pairs, messages, any prompt
            template of LangChain or LlamaIndex, or something that has one: LCEL chain, query engine, chat engine.
            Where several are found, the one that takes documents is read (``text_qa_template`` first).

    Returns:
        System and task text, None where nothing is left.

    Raises:
        InputError: If it is none of these, or holds no prompt.

    Example:
        >>> read_prompt([("system", "Only trust primary sources.\n\n{context}"), ("human", "{question}")])
        ('Only trust primary sources.', None)
    """
    try:
        messages = _messages(prompt, {})
    except RecursionError as err:
        raise InputError(
            f"prompt is {type(prompt).__name__} nested too deeply, or in itself; wanted {_WANTED}."
        ) from err
    answered = [m.role == "human" and n.role == "ai" for m, n in pairwise(messages)]
    texts: dict[str, list[str]] = {"system": [], "human": []}
    for message, is_example in zip(messages, [*answered, False][: len(messages)], strict=True):
        left = "" if is_example or message.role not in texts else strip_slots(drop_examples(message.pieces))
        if left:
            texts[message.role].append(left)
    return "\n".join(texts["system"]) or None, "\n".join(texts["human"]) or None


def _messages(prompt: object, values: Values, llm: object = None) -> list[_Message]:
    """Messages of whatever holds a prompt; partial variables of what is around it in `values`."""
    if isinstance(prompt, str):
        return [_Message("human", parse(prompt, "plain", values))]
    if isinstance(prompt, Mapping):
        return _mapping_messages(prompt, values, llm)
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        return _list_messages(prompt, values)
    for reader in (_llama_index_messages, _langchain_messages, _lone_message, _holder_messages):
        messages = reader(cast("Any", prompt), values, llm)
        if messages is not None:
            return messages
    raise InputError(f"prompt is {type(prompt).__name__}; wanted {_WANTED}.")


def _mapping_messages(prompt: Mapping[Any, Any], values: Values, llm: object) -> list[_Message]:
    """A message as a dict, or prompts by name (what ``get_prompts()`` of LlamaIndex gives)."""
    if "role" in prompt and "content" in prompt:
        return _list_messages([prompt], values)
    messages = _answering_messages(list(prompt.items()), values, llm)
    if messages is None:
        raise InputError(f"there is no prompt in it; wanted {_WANTED}.")
    return messages


def _list_messages(prompt: Sequence[object], values: Values) -> list[_Message]:
    if len(prompt) == 2 and isinstance(prompt, tuple) and _is_pair(prompt):
        prompt = [prompt]
    if not prompt:
        raise InputError(f"prompt is an empty {type(prompt).__name__}; wanted {_WANTED}.")
    plain = [_plain_message(item) for item in prompt]
    texts = [text for found in plain if found is not None and found[0] in _READ_ROLES for text in _texts(found[1])]
    template_format = format_of(texts, values)
    messages: list[_Message] = []
    for item, found in zip(prompt, plain, strict=True):
        if found is None:
            messages += _messages(item, values)
        else:
            role, content = found
            messages.append(
                _Message(role, _content(content, template_format if role in _READ_ROLES else "plain", values))
            )
    return messages


def _plain_message(item: object) -> tuple[str, object] | None:
    """Role and content of a message of unknown format: a string, a pair or a dict; None for anything else."""
    if isinstance(item, str):
        return "human", item
    if isinstance(item, tuple | list) and _is_pair(item):
        return _role(item[0]), item[1]
    if isinstance(item, Mapping) and "role" in item and "content" in item:
        return _role(item["role"]), item["content"]
    return None


def _is_pair(item: Sequence[object]) -> bool:
    return len(item) == 2 and isinstance(item[0], str) and item[0].lower() in {*_ROLES, "placeholder", "tool"}


def _llama_index_messages(prompt: Any, values: Values, llm: object) -> list[_Message] | None:  # noqa: ANN401
    """LlamaIndex's five kinds of template."""
    if hasattr(prompt, "default_template") and hasattr(prompt, "conditionals"):
        chosen = prompt.default_template
        if llm is not None:
            chosen = next((t for condition, t in prompt.conditionals or [] if condition(llm)), chosen)
        return _messages(chosen, values, llm)
    if not hasattr(prompt, "template_var_mappings"):
        return None
    mappings = prompt.template_var_mappings or {}
    filled = {**values, **{mappings.get(name, name): value for name, value in (prompt.kwargs or {}).items()}}
    if hasattr(prompt, "selector"):
        return _messages(prompt.selector.default_prompt, filled, llm)
    if hasattr(prompt, "message_templates"):
        return [
            _Message(_role(message.role), _content(_blocks(message), "braces", filled))
            for message in prompt.message_templates
        ]
    if hasattr(prompt, "template_str"):
        return [_Message(_role(role), pieces) for role, pieces in jinja_messages(prompt.template_str, filled)]
    return [_Message("human", parse(prompt.template, "braces", filled))]


def _langchain_messages(prompt: Any, values: Values, llm: object) -> list[_Message] | None:  # noqa: ANN401
    """LangChain's templates: chat, string, few-shot, and the message templates inside a chat prompt."""
    filled = {**values, **(getattr(prompt, "partial_variables", None) or {})}
    if isinstance(getattr(prompt, "messages", None), Sequence):
        return [message for item in prompt.messages for message in _messages(item, filled, llm)]
    if hasattr(prompt, "variable_name"):
        return [_Message("other", [Slot(prompt.variable_name)])]
    if hasattr(prompt, "example_prompt"):
        ends = (getattr(prompt, "prefix", ""), getattr(prompt, "suffix", ""))
        read = [["\n", *parse(end, prompt.template_format, filled)] for end in ends if end]
        return [_Message("human", [piece for pieces in read for piece in pieces])]
    if hasattr(prompt, "template_format") and isinstance(getattr(prompt, "template", None), str):
        return [_Message("human", parse(prompt.template, prompt.template_format, filled))]
    inner = getattr(prompt, "prompt", None)
    if inner is None or not hasattr(prompt, "format_messages"):
        return None
    own = getattr(prompt, "role", None) or type(prompt).__name__.split("MessagePromptTemplate")[0]
    pieces = inner if isinstance(inner, list) else [inner]
    texts = [p for p in pieces if isinstance(getattr(p, "template", None), str)]  # not images, not tool blocks
    return [_Message(_role(own), [piece for p in texts for m in _messages(p, filled, llm) for piece in m.pieces])]


def _lone_message(message: Any, values: Values, llm: object) -> list[_Message] | None:  # noqa: ANN401
    """A message of either framework outside a template; LangChain's are static, so their braces are literal."""
    del llm
    if hasattr(message, "role") and (hasattr(message, "blocks") or hasattr(message, "content")):
        static = hasattr(message, "type")  # LangChain's ChatMessage
        return [_Message(_role(message.role), _content(_blocks(message), "literal" if static else "braces", values))]
    if hasattr(message, "content") and isinstance(getattr(message, "type", None), str):
        return [_Message(_role(message.type), _content(message.content, "literal", values))]
    return None


def _holder_messages(holder: Any, values: Values, llm: object) -> list[_Message] | None:  # noqa: ANN401
    """Query engines, chat engines, chains, agents and workflows: whatever keeps its prompts for itself."""
    llm = getattr(holder, "_llm", None) or getattr(getattr(holder, "_response_synthesizer", None), "_llm", None) or llm
    system = getattr(llm, "system_prompt", None)  # LlamaIndex puts it before whatever an engine asks its LLM
    standing = [_Message("system", parse(system, "literal", values))] if isinstance(system, str) else []
    messages = _agent_messages(holder, values)
    if messages is not None:
        return messages
    messages = _chat_engine_messages(holder, values, llm)
    found = holder.get_prompts() if callable(getattr(holder, "get_prompts", None)) else None
    if messages is None and found is not None:
        messages = _found_messages(found, values, llm)
    if messages is not None:
        return standing + messages
    if found is not None or hasattr(holder, "_query_engine"):
        inner = next((i for name in _INNER if (i := getattr(holder, name, None)) is not None), None)
        if inner is not None:
            return _messages(inner, values, llm)
    if not found:  # an app's own engine or workflow
        fields = [(n, v) for n, v in getattr(holder, "__dict__", {}).items() if hasattr(v, "template_var_mappings")]
        messages = _answering_messages(fields, values, llm)
    if messages is not None:
        return standing + messages
    if found is None:
        return None
    reason = "none that get_prompts() gives takes documents" if found else "get_prompts() is empty"
    raise InputError(f"{type(holder).__name__} holds no prompt ({reason}); wanted {_WANTED}.")


def _found_messages(found: Any, values: Values, llm: object) -> list[_Message] | None:  # noqa: ANN401
    """Of what ``get_prompts()`` gives: an engine's by name, a chain's by place (later ones count more: they answer)."""
    if not isinstance(found, Mapping):
        return _answering_messages(list(enumerate(found)), values, llm)
    return _answering_messages(list(found.items()), values, llm, is_engine=True)


def _agent_messages(agent: Any, values: Values) -> list[_Message] | None:  # noqa: ANN401
    """LlamaIndex's agents, and workflows of them: the system text. Formats and hand-overs are the framework's."""
    if isinstance(getattr(agent, "agents", None), Mapping) and hasattr(agent, "root_agent"):
        members = list(agent.agents.values())
    elif hasattr(agent, "system_prompt") and hasattr(agent, "take_step"):
        members = [agent]
    else:
        return None
    texts = {member.system_prompt for member in members}
    if len(texts) > 1:
        raise InputError(f"{type(agent).__name__} has agents with several system texts. Pass the one that searches.")
    text = next(iter(texts), None)
    if not isinstance(text, str):
        raise InputError(f"{type(agent).__name__} holds no prompt: its system_prompt is {text!r}. Give it one.")
    return [_Message("system", parse(text, "literal", values))]


def _chat_engine_messages(engine: Any, values: Values, llm: object) -> list[_Message] | None:  # noqa: ANN401
    """LlamaIndex's chat engines: prefix messages and system prompt are static, the context template is a template."""
    names = ("_prefix_messages", "_system_prompt", "_context_prompt_template", "_context_template")
    if not any(hasattr(engine, name) for name in names):
        return None
    messages: list[_Message] = []
    if isinstance(getattr(engine, "_system_prompt", None), str):
        messages.append(_Message("system", parse(engine._system_prompt, "literal", values)))
    for message in getattr(engine, "_prefix_messages", None) or []:
        messages.append(_Message(_role(message.role), _content(_blocks(message), "literal", values)))
    for name in names[2:]:
        template = getattr(engine, name, None)
        if template is not None:  # these engines put it into the system message
            messages += [_Message("system", m.pieces) for m in _messages(template, values, llm)]
    return messages


def _answering_messages(
    prompts: Sequence[tuple[Any, Any]], values: Values, llm: object, *, is_engine: bool = False
) -> list[_Message] | None:
    """The prompt that answers from documents; among chain steps the last, among named ones the first. None if none is.

    Of an engine's prompts only those count that take documents, or are a synthesizer's (their names tell): others
    rewrite, route or hand over.
    """
    best: tuple[tuple[bool, bool, int], list[_Message]] | None = None
    for place, (name, prompt) in enumerate(prompts):
        messages = _messages(prompt, values, llm)
        takes = any(piece.takes_documents for m in messages for piece in m.pieces if isinstance(piece, Slot))
        if is_engine and not takes and not str(name).endswith("_template"):
            continue
        worth = (str(name).endswith("text_qa_template"), takes, place if isinstance(name, int) else -place)
        if best is None or worth > best[0]:
            best = (worth, messages)
    return best[1] if best is not None else None


def _role(role: object) -> str:
    name = str(getattr(role, "value", role)).lower()
    return _ROLES.get(name, "other")


def _blocks(message: Any) -> object:  # noqa: ANN401
    """Content of a message: LlamaIndex keeps it in blocks, of which only text ones have a text."""
    blocks = getattr(message, "blocks", None)
    return [block.text for block in blocks if hasattr(block, "text")] if blocks is not None else message.content


def _texts(content: object) -> list[str]:
    """Texts of a content: a string, or a list of strings and ``{"type": "text"}`` blocks; images are left out."""
    if isinstance(content, str):
        return [content]
    blocks = content if isinstance(content, Sequence) else []
    texts = [block.get("text") if isinstance(block, Mapping) else block for block in blocks]
    return [text for text in texts if isinstance(text, str)]


def _content(content: object, template_format: str, values: Values) -> list[Piece]:
    """Pieces of a content (see `_texts`), a line for each of its texts."""
    pieces: list[Piece] = []
    for text in _texts(content):
        pieces += [*(["\n"] if pieces else []), *parse(text, template_format, values)]
    return pieces
