"""The two texts that steer a reranking decoder: the app's system text and its task.

Knows no framework and no model; what a model makes of them is the model's business (`Reranker.preview` shows it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from kalm_rag.checks import check_text
from kalm_rag.errors import InputError
from kalm_rag.instructions.reader import read_prompt

SystemMode = Literal["append", "replace", "ignore"]

JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
"""KaLM's own system sentence (model card of KaLM-Reranker-V1). Scores mean P(yes) because of it."""

DEFAULT_TASK = "Given a query, retrieve documents that answer the query."
"""KaLM's default task (model card of KaLM-Reranker-V1)."""


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """System and task text of one app, for every query it asks.

    Attributes:
        system: The app's system text, or None. Blank counts as None.
        task: What kind of passage is wanted, or None for the default task. Blank counts as None.
        system_mode: ``"append"`` (default) keeps the judge sentence and adds the app's text on a new line;
            ``"replace"`` puts the app's text in its place (then it must ask for yes or no itself);
            ``"ignore"`` keeps the judge sentence alone.

    Raises:
        InputError: If a text is not a string or holds a lone surrogate, or the mode is unknown.

    Example:
        >>> Instructions(task="Find recipes without meat.").task_text
        'Find recipes without meat.'
        >>> Instructions().task_text
        'Given a query, retrieve documents that answer the query.'
    """

    system: str | None = None
    task: str | None = None
    system_mode: SystemMode = "append"

    def __post_init__(self) -> None:
        for field in ("system", "task"):
            value = getattr(self, field)
            if value is None:
                continue
            check_text(value, field)
            if not value.strip():
                object.__setattr__(self, field, None)
        if self.system_mode not in get_args(SystemMode):
            raise InputError(f"system_mode is {self.system_mode!r}; wanted one of {', '.join(get_args(SystemMode))}.")

    @classmethod
    def from_prompt(cls, prompt: object, *, system_mode: SystemMode = "append") -> Instructions:
        r"""Read the instructions of an app out of its RAG prompt: see `kalm_rag.instructions.reader.read_prompt`.

        Args:
            prompt: A string, (role, text) pairs, a LangChain or LlamaIndex prompt template, an LCEL chain, a query
                engine or a chat engine. It is parsed, never formatted or changed.
            system_mode: As the attribute.

        Raises:
            InputError: If it is none of these, or holds no prompt.

        Example:
            >>> Instructions.from_prompt("Answer for a lawyer.\n\nContext: {context}\nQuestion: {question}").task
            'Answer for a lawyer.'
        """
        if isinstance(prompt, Instructions):
            return prompt
        system, task = read_prompt(prompt)
        return cls(system=system, task=task, system_mode=system_mode)

    @property
    def app_system(self) -> str | None:
        """The app's system text where the mode lets it through, else None."""
        return None if self.system_mode == "ignore" else self.system

    @property
    def system_text(self) -> str:
        """What stands where the protocol says ``{system}``."""
        if self.app_system is None:
            return JUDGE
        return self.app_system if self.system_mode == "replace" else f"{JUDGE}\n{self.app_system}"

    @property
    def task_text(self) -> str:
        """What stands where the protocol says ``{task}``."""
        return self.task if self.task is not None else DEFAULT_TASK


if TYPE_CHECKING:
    AnyInstructions = Any
else:
    AnyInstructions = Instructions | None
"""Type of a pydantic field that `as_instructions` fills: type checkers let a task, a prompt or a chain pass to the
constructor, the field itself holds Instructions or None."""


def as_instructions(value: object) -> Instructions | None:
    """Read what adapters take as ``instructions=``: Instructions, a task, a prompt, or None.

    A string is a task, word for word; give a template through `Instructions.from_prompt`. A mapping with the fields
    of `Instructions` is what serialisation writes.

    Raises:
        InputError: If it is none of these.
    """
    if value is None or isinstance(value, Instructions):
        return value
    if isinstance(value, str):
        if value == "auto":
            raise InputError("instructions is 'auto', which nothing here can follow. Pass the app's prompt or chain.")
        return Instructions(task=value)
    if isinstance(value, Mapping) and set(value) <= {"system", "task", "system_mode"}:
        return Instructions(**value)
    return Instructions.from_prompt(value)
