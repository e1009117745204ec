"""Instructions out of RAG prompts: every kind of prompt of both frameworks, and what must survive in them."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kalm_rag import Instructions
from kalm_rag.errors import InputError
from kalm_rag.instructions import DEFAULT_TASK, JUDGE, as_instructions

LAWYER = "You are a lawyer. Only trust court decisions."
SHORT = "Answer in one sentence."


@pytest.mark.parametrize(
    ("template", "task"),
    [
        (f"{SHORT}\n\nContext:\n-----\n{{context}}\n-----\nQuestion: {{question}}\nAnswer:", SHORT),
        (f"{SHORT}\n<context>\n{{context}}\n</context>\nQuestion: {{question}}", SHORT),
        (
            f"{SHORT} Use the following context. {{context}} Question: {{question}} Answer:",
            f"{SHORT} Use the following context.",
        ),
        (
            f"{SHORT}\nContext information is below.\n=====\n{{context_str}}\n=====\nQuery: {{query_str}}\nAnswer: ",
            SHORT,
        ),
        (f"## Role\n{LAWYER}\n\n## Context\n{{context}}\n\n## Question\n{{question}}\n", f"## Role\n{LAWYER}"),
        (f'{SHORT}\n```\n{{docs}}\n```\nQ: "{{q}}"', SHORT),
        (f"{SHORT}\n[CONTEXT]{{context}}[/CONTEXT]\n**Question:** {{question}}", SHORT),
        (
            "Answer the question {question} from the context {context} in French.",
            "Answer the question from the context in French.",
        ),
        ("Answer only from the documents below:\n<doc>{context}</doc>", "Answer only from the documents below."),
        (
            f"{SHORT}\n\nHere are documents:\n{{context}}\n\nConversation:\n{{chat_history}}\nHuman: {{input}}\nAI:",
            SHORT,
        ),
        ("请用法语回答。\n上下文：{context}\n问题：{question}\n答案：", "请用法语回答。"),
        (f"{SHORT}\r\n\r\nContext: {{context}}\r\nQuestion: {{question}}", SHORT),
        (f"{SHORT}\nMood: {{mood}}\nContext: {{context}}", SHORT),  # unknown slots go like known ones
        (
            'Return JSON like {"answer": "...", "n": {"x": 1}}.\nContext: {context}',
            'Return JSON like {"answer": "...", "n": {"x": 1}}.',
        ),
        ('Return JSON like {{"answer": 1}}.\nContext: {context}', 'Return JSON like {"answer": 1}.'),
        ("{context}\n\n{question}", None),
        ("Context: {context}\nQuestion: {question}\nAnswer:", None),
        ("{question}", None),
        (f"{SHORT}\nList every case:\n- one\n- two", f"{SHORT}\nList every case:\n- one\n- two"),  # no slots: all of it
        ("Answer:", "Answer:"),
        ("", None),
        ("100% {sure}? a } b", "100%? a } b"),
        (f"{SHORT}\n{{{{ context }}}}\n{{% for m in history %}}{{{{ m }}}}{{% endfor %}}", SHORT),
        (f"{SHORT}\n{{{{#documents}}}}\n- {{{{text}}}}\n{{{{/documents}}}}\nQ: {{{{question}}}}", SHORT),
    ],
)
def test_strings(template: str, task: str | None) -> None:
    found = Instructions.from_prompt(template)
    assert found.task == task
    assert found.system is None, "a single string has no system message"


def test_pairs_and_messages() -> None:
    found = Instructions.from_prompt(
        [
            ("system", LAWYER + "\n\nContext: {context}"),
            ("placeholder", "{chat_history}"),
            ("human", "What is {{x}}?"),
            ("ai", "An example."),
            ("user", SHORT + "\n\nQuestion: {question}"),
        ]
    )
    assert (found.system, found.task) == (LAWYER, SHORT)
    assert Instructions.from_prompt(("system", LAWYER)).system == LAWYER
    assert Instructions.from_prompt([{"role": "developer", "content": LAWYER}]).system == LAWYER
    assert Instructions.from_prompt([SHORT, "{question}"]).task == SHORT


def test_judge_sentence_survives_and_defaults_stand() -> None:
    found = Instructions.from_prompt([("system", LAWYER), ("human", "{question}")])
    assert found.system_text == f"{JUDGE}\n{LAWYER}"
    assert found.task_text == DEFAULT_TASK
    assert Instructions.from_prompt([("system", LAWYER)], system_mode="ignore").system_text == JUDGE
    assert Instructions.from_prompt("{context}{question}") == Instructions()


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (3, "prompt is int; wanted a string"),
        (None, "prompt is NoneType; wanted a string"),
        (object(), "prompt is object; wanted"),
        (b"bytes", "prompt is bytes; wanted"),
        ([], "prompt is an empty list"),
        ({}, "there is no prompt in it"),
        ([("human", SHORT), 7], "prompt is int"),
    ],
)
def test_refused(thing: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Instructions.from_prompt(thing)


def test_lone_surrogate() -> None:
    with pytest.raises(InputError, match="lone surrogate"):
        Instructions.from_prompt("Answer \ud800.")


def test_as_instructions() -> None:
    given = Instructions(task=SHORT)
    assert as_instructions(None) is None
    assert as_instructions(given) is given
    assert as_instructions("Find {braces}.") == Instructions(task="Find {braces}."), "a string is a task, word for word"
    assert as_instructions({"system": None, "task": SHORT, "system_mode": "append"}) == given
    assert as_instructions([("system", LAWYER)]) == Instructions(system=LAWYER)
    with pytest.raises(InputError, match="'auto', which nothing here can follow"):
        as_instructions("auto")
    assert Instructions.from_prompt(given) is given


def test_jinja() -> None:
    template = (
        "{# note #}{% set tone = 'dry' %}"
        + LAWYER
        + "{% if strict %} Quote verbatim.{% else %} Be lenient.{% endif %}\n"
        "{% if not documents %}No documents.{% endif %}"
        "{% raw %}{{ kept }}{% endraw %}\n{% for d in documents %}\n<doc>{{ d.text }}</doc>\n{% endfor %}\n"
        "Question: {{ question | upper }}"
    )
    from kalm_rag.instructions.strip import strip_slots
    from kalm_rag.instructions.templates import parse

    assert strip_slots(parse(template, "jinja2", {})) == LAWYER + " Quote verbatim.\n{{ kept }}"
    lenient = strip_slots(parse(template, "jinja2", {"strict": False}))
    assert lenient.startswith(LAWYER + " Be lenient.")


@pytest.mark.parametrize(
    ("values", "kept"),
    [({}, "A"), ({"x": True}, "A"), ({"x": False}, "C"), ({"x": 0}, "C")],
)
def test_jinja_branches(values: dict[str, Any], kept: str) -> None:
    from kalm_rag.instructions.templates import parse

    parts = parse("{% if x %}A{% elif y %}B{% else %}C{% endif %}.{% if not x %}{% endif %}", "jinja2", values)
    assert "".join(map(str, parts)) == kept + "."


def test_nothing_a_user_writes_breaks_it() -> None:
    """Braces, tags and fences in any order give Instructions, never another error."""
    pieces = [
        "{",
        "}",
        "{{",
        "}}",
        "{%",
        "%}",
        "{# ",
        "{q}",
        "{{ q }}",
        "{% for a in b %}",
        "{% endfor %}",
        "{{#s}}",
        "\n",
    ]
    pieces += [
        "{{/s}}",
        "{% if a %}",
        "{% else %}",
        "{% chat role='system' %}",
        "<context>",
        "</context>",
        "---",
        ":",
        "\0",
    ]
    pieces += [
        "Question:",
        "Be brief.",
        '{"a": [1]}',
        "{0}",
        "{}",
        "{a!r:>{w}}",
        "{a[b]}",
        "``` ",
        "[/",
        "(",
        "\r\n",
        "：",
        "\u2028",
    ]
    for seed in range(1500):
        rng = random.Random(seed)
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
        Instructions.from_prompt(text)
        Instructions.from_prompt([("system", text), ("human", text)])


@pytest.mark.parametrize(
    ("condition", "values", "kept"),
    [
        ('mode == "strict"', {"mode": "strict"}, "A"),
        ('mode == "strict"', {"mode": "lenient"}, "B"),
        ('mode == "strict"', {"mode": lambda: "strict"}, "A"),
        ('mode|lower == "strict"', {"mode": "STRICT"}, "A"),
        ('mode != "strict"', {"mode": "strict"}, "B"),
        ('mode in ("strict", "exact")', {"mode": "exact"}, "A"),
        ('mode not in ["strict"]', {"mode": "strict"}, "B"),
        ("level >= 3", {"level": 2}, "B"),
        ("level >= 3", {"level": "x"}, "A"),  # what the app's own rendering would fail at is unknown
        ("mode is defined", {"mode": ""}, "A"),
        ("mode is not defined", {"mode": ""}, "B"),
        ("mode is none", {"mode": None}, "A"),
        ("mode and unknown", {"mode": ""}, "B"),
        ("mode or unknown", {"mode": "x"}, "A"),
        ("mode and unknown", {"mode": "x"}, "A"),  # not decided: the first branch
        ("not unknown", {}, "B"),
        ("false", {}, "B"),
        ("9 ** 9 ** 9 ** 9", {}, "A"),  # never computed
    ],
)
def test_jinja_conditions(condition: str, values: dict[str, Any], kept: str) -> None:
    """A comparison with a known partial variable took the first branch whatever its value was."""
    from kalm_rag.instructions.templates import parse

    shown = f"{{{{ 'A' if {condition} else 'B' }}}}"
    for template in (f"{{% if {condition} %}}A{{% else %}}B{{% endif %}}", shown):
        assert "".join(map(str, parse(template, "jinja2", values))) == kept


def test_jinja_expressions() -> None:
    from kalm_rag.instructions.pieces import Slot
    from kalm_rag.instructions.templates import parse

    def read(template: str, **values: object) -> list[object]:
        return [part.name if isinstance(part, Slot) else part for part in parse(template, "jinja2", values)]

    assert read("{{ a.b | join(', ') }}") == ["a.b"]
    assert read("{{ ', '.join(documents) }}{{ format(docs) }}") == ["documents", "docs"]  # what is shown, not how
    assert read("{% set tone = 'dry' %}Be {{ tone }} and {{ 'very ' ~ mood }}.") == [
        *("Be ", "dry", " and ", "very ", "mood", "."),
    ]
    assert read("{{ tone | upper }} {{ tone | wordwrap(3) }}", tone="dry") == ["DRY", " ", "dry"]
    assert read("{% macro m(x) %}no{% endmacro %}{% call m(1) %}no{% endcall %}{% set y %}no{% endset %}yes") == ["yes"]
    assert read("{% filter upper %}a{% endfilter %}{% with x = 1 %}b{% endwith %}{% do f() %}") == ["a", "b"]
    assert read("a\n{%- if x -%}\nb\n{%- endif %}\n") == ["a", "b", "\n"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "the template is no Jinja in line 1: Expected an expression"),
        ("a\n{% trans %}b{% endtrans %}", "the template is no Jinja in line 2: Encountered unknown tag 'trans'"),
        ("{{ " + "(" * 20_000, "the Jinja template is nested too deeply"),
        ("{{ " + "9" * 20_000 + " }}", "the template is no Jinja"),
    ],
)
def test_what_is_said_to_be_jinja_and_is_not(template: str, message: str) -> None:
    from kalm_rag.instructions.templates import parse

    with pytest.raises(InputError, match=message):
        parse(template, "jinja2", {})
    Instructions.from_prompt(template)  # nobody said that this one is


@pytest.mark.parametrize(
    ("template", "task"),
    [
        ("Reply as {{json}}.\nContext: {context}\nQuestion: {question}", "Reply as {json}."),
        ("Reply as {{json}}.\nStuff: {my_stuff}", "Reply as {json}."),
        ("Reply as {json}.\nContext: {{ context }}", "Reply as {json}."),
        ("Reply as {{#json}}.\nContext: {context}", "Reply as {#json}."),
        ("Reply briefly.\n{{context}}", "Reply briefly."),
        ("Reply briefly.\nContext: {{ my_stuff }}", "Reply briefly."),
        ("Cite {% if strict %}pages.{% else %}nothing.{% endif %}\nContext: {{ context }}", "Cite pages."),
        ("Never exceed {%}.\nContext: {context}", "Never exceed {%}."),
    ],
)
def test_reading_that_finds_the_slots(template: str, task: str) -> None:
    """``{{json}}`` made a plain string Jinja, and ``Context: {context}`` reached the decoder as text."""
    assert Instructions.from_prompt(template).task == task


def test_messages_of_one_prompt_have_one_format() -> None:
    """The slots that tell the format may stand in another message than the braces that are in doubt."""
    prompt = [("system", "Reply as {{json}}."), ("human", "{context}\n\n{question}")]
    assert Instructions.from_prompt(prompt).system == "Reply as {json}."
    prompt = [("system", "Reply as {json}. {{tone}}"), ("human", "{{ context }}\n\n{{ question }}")]
    assert Instructions.from_prompt(prompt).system == "Reply as {json}."
    assert Instructions.from_prompt([{"role": "system", "content": "Reply as {{json}}."}, "{context}"]).system == (
        "Reply as {json}."
    )


def test_instruction_above_two_slots() -> None:
    """The instruction above the documents was taken for the label of the question's slot below, and lost."""
    template = "Answer only from the documents below:\n{context}\n{question}"
    assert Instructions.from_prompt(template).task == "Answer only from the documents below."


@pytest.mark.parametrize(
    ("template", "task"),
    [
        (f"{SHORT} For example:\nQ: Wet?\nA: Yes [1].\nNow it's your turn.\nContext: {{context}}\nQ: {{q}}\nA:", SHORT),
        (
            f"Example 1:\nQuestion: a?\nAnswer: b\n\nExample 2:\nQuestion: c?\nAnswer:\nd\ne\n\n{SHORT}\n{{context}}",
            SHORT,
        ),
        (f"{SHORT}\n## Examples\n**Q:** a?\n**A:** b\n\n**Q:** c?\n**A:** d\n\n**Q:** {{question}}\n**A:**", SHORT),
        (f"{SHORT}\nHere is an example:\nSource 1:\n\nUse salt.\n\nQuery: c?\nAnswer: d [1].", SHORT),  # no slots
        (
            "Find laws. For example:\n- statutes\n- treaties\n{context}",
            "Find laws. For example:\n- statutes\n- treaties",
        ),
        ("Find laws, for example statutes.\n{context}", "Find laws, for example statutes."),
        ("Example:\nQuestion: {question}\n{context}", None),
    ],
)
def test_worked_examples_are_no_task(template: str, task: str | None) -> None:
    """An example of the answer's form (a red sky, wet water) became what to look for, and moved the top hit."""
    assert Instructions.from_prompt(template).task == task
    assert Instructions.from_prompt(("system", template)).system == task


HOSTILE: dict[str, Callable[[int], str]] = {
    "unclosed tag": lambda n: "{context}\n<" + "a" * n,
    "unclosed expressions": lambda n: "{{ x }}" + "{{" * (n // 2),
    "unclosed statements": lambda n: "{% if x %}" + "{%" * (n // 2),
    "unclosed sections": lambda n: "{{#d}}x{{/d}}" + "{{{" * (n // 3),
    "cue characters": lambda n: "{context}\n" + ".-:" * (n // 3) + "x",
    "nested brackets": lambda n: "(" * (n // 2) + "{context}" + ")" * (n // 2),
    "nested tags": lambda n: "<t>" * (n // 7) + "{context}" + "</t>" * (n // 7),
    "quotes and slots": lambda n: '" {a} ' * (n // 6),
    "slots and closers": lambda n: "{a} " * (n // 8) + "] " * (n // 4),
    "slots on lines": lambda n: "{a}\n" * (n // 4),
    "a fence below slots": lambda n: "{a}\n" * (n // 8) + "-" * (n // 2) + "x",
    "a text above slots": lambda n: "k" * (n // 2) + ":\n" + "{a}\n" * (n // 8),
    "spaces": lambda n: "{context}" + " " * n + "x",
    "examples without an answer": lambda n: "Example:\nQ: x\n" * (n // 14),
    "examples": lambda n: "Example:\nQ: x\nA: y\n" * (n // 19),
    "NULs": lambda n: "{context}" + "\0" * n,
    "filters": lambda n: ("{{ x" + "|lower" * 300 + " }}") * (n // 1806),
    "doubled text": lambda n: (
        "{% set a = '" + "k" * (n // 2) + "' %}" + "{% if a|lower == 'x' %}{% endif %}" * (n // 72)
    ),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_time_grows_with_the_length(make: Callable[[int], str]) -> None:
    """Templates of 32,000 characters took up to 29 seconds, four times as long for twice the length."""
    template = make(48_000)
    started = time.process_time()
    Instructions.from_prompt(template)
    assert time.process_time() - started < 4.0  # 0.5 s at most here; it was over 10 s for most of these


def test_bounds() -> None:
    """What is too long or holds itself is refused by name, also where only partial variables make it long."""
    from kalm_rag.instructions.templates import parse

    assert len(str(Instructions.from_prompt("a" * 100_000).task)) == 100_000
    with pytest.raises(InputError, match=r"has 100,001 characters or more; wanted at most 100,000"):
        Instructions.from_prompt("a" * 100_001)
    with pytest.raises(InputError, match="wanted at most 100,000"):
        parse("{a}{a}", "f-string", {"a": "k" * 60_000})
    with pytest.raises(InputError, match="wanted at most 100,000"):
        parse("{% set a = '" + "k" * 60_000 + "' %}{{ a }}{{ a|upper }}", "jinja2", {})
    itself: list[object] = []
    itself.append(itself)
    with pytest.raises(InputError, match="prompt is list nested too deeply, or in itself"):
        Instructions.from_prompt(itself)


def test_mustache_sections() -> None:
    from kalm_rag.instructions.pieces import Slot
    from kalm_rag.instructions.templates import parse

    template = "{{! note }}A{{#flag}} B{{/flag}}{{^docs}} none{{/docs}} {{{raw}}} {{&x}}"
    assert parse(template, "mustache", {"flag": True, "raw": "r"}) == [
        "A",
        " B",
        Slot("docs"),
        " ",
        "r",
        " ",
        Slot("x"),
    ]
    with pytest.raises(InputError, match="template format is 'erb'"):
        parse("", "erb", {})


def test_partial_that_fails() -> None:
    from kalm_rag.instructions.templates import parse

    with pytest.raises(InputError, match="partial variable 'day' could not be computed: division"):
        parse("{day}", "braces", {"day": lambda: 1 / 0})


def test_text_that_holds_the_marker() -> None:
    assert Instructions.from_prompt("A\0B {question}\n" + SHORT).task == "A\0B\n" + SHORT


class TestLangChain:
    @pytest.fixture(autouse=True)
    def _framework(self) -> None:
        self.prompts = pytest.importorskip("langchain_core.prompts", reason="langchain-core is not installed")

    def test_chat_prompt(self) -> None:
        from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

        prompt = self.prompts.ChatPromptTemplate(
            [
                SystemMessage(LAWYER + ' Say {"static": braces}.'),
                ("system", "Today is {day}.\n\n{context}"),
                self.prompts.MessagesPlaceholder("chat_history", optional=True),
                HumanMessage("Example?"),
                AIMessage("Yes."),
                ("human", [{"type": "text", "text": SHORT}, {"type": "image_url", "image_url": {"url": "{image}"}}]),
                ("human", "{question}"),
            ]
        ).partial(day=lambda: "Monday")
        before = prompt.model_dump_json(exclude={"partial_variables"})
        found = Instructions.from_prompt(prompt)
        assert found.system == LAWYER + ' Say {"static": braces}.\nToday is Monday.'
        assert found.task == SHORT
        assert prompt.model_dump_json(exclude={"partial_variables"}) == before

    @pytest.mark.parametrize(
        ("template", "template_format"),
        [
            ("Use {{json}} only.\nContext: {context}\nTone: {tone}", "f-string"),
            ("Use {json} only.\n{% for d in docs %}{{ d }}{% endfor %}\nTone: {{ tone }}", "jinja2"),
            ("Use {json} only.\n{{#docs}}{{text}}{{/docs}}\nTone: {{tone}}", "mustache"),
        ],
    )
    def test_formats(self, template: str, template_format: Any) -> None:
        pytest.importorskip("jinja2")
        prompt = self.prompts.PromptTemplate.from_template(template, template_format=template_format)
        assert Instructions.from_prompt(prompt).task == "Use {json} only."
        assert Instructions.from_prompt(prompt.partial(tone="dry")).task == "Use {json} only.\nTone: dry"

    def test_few_shot(self) -> None:
        example = self.prompts.PromptTemplate.from_template("{q} {a}")
        prompt = self.prompts.FewShotPromptTemplate(
            examples=[{"q": "1", "a": "2"}],
            example_prompt=example,
            prefix=SHORT,
            suffix="Q: {question}\nA:",
            input_variables=["question"],
        )
        assert Instructions.from_prompt(prompt).task == SHORT

    def test_chain(self) -> None:
        """A history-aware chain has two prompts: the one that takes the documents is read."""
        from langchain_core.language_models import FakeListChatModel
        from langchain_core.runnables import RunnablePassthrough

        rephrase = self.prompts.ChatPromptTemplate([("system", "Rephrase."), ("human", "{input}")])
        answer = self.prompts.ChatPromptTemplate([("system", LAWYER + "\n{context}"), ("human", "{question}")])
        model = FakeListChatModel(responses=["x"])
        chain = {"question": rephrase | model, "context": RunnablePassthrough()} | answer | model
        assert Instructions.from_prompt(chain).system == LAWYER
        assert Instructions.from_prompt(chain.with_config(tags=["x"])).system == LAWYER
        with pytest.raises(InputError, match=r"holds no prompt \(get_prompts\(\) is empty\)"):
            Instructions.from_prompt(model)

    def test_classic_chains(self) -> None:
        """The older chains have no graph to find prompts in; their parts are looked through."""
        chains = pytest.importorskip("langchain_classic.chains", reason="langchain-classic is not installed")
        from langchain_core.embeddings import DeterministicFakeEmbedding
        from langchain_core.language_models import FakeListChatModel
        from langchain_core.vectorstores import InMemoryVectorStore

        prompt = self.prompts.ChatPromptTemplate([("system", LAWYER + "\n{context}"), ("human", "{question}")])
        chain = chains.RetrievalQA.from_chain_type(
            FakeListChatModel(responses=["x"]),
            retriever=InMemoryVectorStore(DeterministicFakeEmbedding(size=4)).as_retriever(),
            chain_type_kwargs={"prompt": prompt},
        )
        assert Instructions.from_prompt(chain) == Instructions(system=LAWYER)


class TestLlamaIndex:
    @pytest.fixture(autouse=True)
    def _framework(self) -> None:
        self.prompts = pytest.importorskip("llama_index.core.prompts", reason="llama-index-core is not installed")

    def test_string_template(self) -> None:
        prompt = self.prompts.PromptTemplate(
            SHORT + ' JSON: {"a": 1}.\n{note}\nContext:\n---\n{my_context}\n---\nQuery: {query_str}',
            template_var_mappings={"context_str": "my_context", "remark": "note"},
            function_mappings={"context_str": lambda **kwargs: kwargs["context_str"].upper()},
            remark="Cite.",
        )
        before = copy.deepcopy(prompt.model_dump(exclude={"function_mappings"}))
        assert Instructions.from_prompt(prompt).task == SHORT + ' JSON: {"a": 1}.\nCite.'
        assert prompt.model_dump(exclude={"function_mappings"}) == before

    def test_chat_and_selector(self) -> None:
        chat = self.prompts.ChatPromptTemplate.from_messages(
            [("system", LAWYER + " Reply as {format}."), ("user", SHORT + "\n{context_str}\n{query_str}")]
        ).partial_format(format="prose")
        assert Instructions.from_prompt(chat) == Instructions(system=LAWYER + " Reply as prose.", task=SHORT)
        from llama_index.core.prompts import SelectorPromptTemplate

        selector = SelectorPromptTemplate(
            self.prompts.PromptTemplate(SHORT + "\n{context_str}"), [(lambda llm: True, chat)]
        )
        assert Instructions.from_prompt(selector) == Instructions(task=SHORT), "without an LLM: the default"

    def test_rich_template(self) -> None:
        rich = self.prompts.RichPromptTemplate(
            '{% chat role="system" %}' + LAWYER + '{% endchat %}{% chat role="user" %}{% for c in chunks %}{{ c }}'
            "{% endfor %}\n" + SHORT + "\nQuestion: {{ q }}{% endchat %}"
        )
        assert Instructions.from_prompt(rich) == Instructions(system=LAWYER, task=SHORT)

    def test_langchain_template(self) -> None:
        """LlamaIndex's wrapper needs langchain-community to be made, so its shape stands in for it."""
        core = pytest.importorskip("langchain_core.prompts")
        inner = core.PromptTemplate.from_template(SHORT + " {{x}} {note}\nContext: {context}")
        wrapper = SimpleNamespace(
            selector=SimpleNamespace(default_prompt=inner, conditionals=[]),
            template_var_mappings={"remark": "note"},
            kwargs={"remark": "Cite."},
        )
        assert Instructions.from_prompt(wrapper).task == SHORT + " {x} Cite."

    def test_engines(self) -> None:
        """Query engines by their synthesizer's prompt (chosen for their LLM), chat engines by their private parts."""
        from llama_index.core import Document, VectorStoreIndex
        from llama_index.core.chat_engine import CondenseQuestionChatEngine
        from llama_index.core.embeddings import MockEmbedding
        from llama_index.core.llms.mock import MockLLM
        from llama_index.core.query_engine import CitationQueryEngine

        index = VectorStoreIndex.from_documents([Document(text="x")], embed_model=MockEmbedding(embed_dim=4))
        engine = index.as_query_engine(
            llm=MockLLM(), text_qa_template=self.prompts.PromptTemplate(SHORT + "\n{context_str}")
        )
        assert Instructions.from_prompt(engine).task == SHORT
        assert Instructions.from_prompt(engine.get_prompts()).task == SHORT
        for mode in ("context", "condense_plus_context"):
            chat = index.as_chat_engine(chat_mode=mode, llm=MockLLM(), system_prompt=LAWYER + ' {"static": 1}')
            assert str(Instructions.from_prompt(chat).system).startswith(LAWYER + ' {"static": 1}')
        citing = CitationQueryEngine.from_args(index, llm=MockLLM())
        told = str(Instructions.from_prompt(citing).task)
        assert told.startswith("Please provide an answer based solely on the provided sources.")
        assert told.endswith("If none of the sources are helpful, you should indicate that.")
        condense = CondenseQuestionChatEngine.from_defaults(query_engine=engine, llm=MockLLM())
        assert Instructions.from_prompt(condense).task == SHORT

    def test_agents(self) -> None:
        """FunctionAgent was refused; the format of ReActAgent and the hand-over of a workflow were taken for a task."""
        from llama_index.core.agent.workflow import AgentWorkflow, CodeActAgent, ReActAgent
        from llama_index.core.llms.mock import MockLLM

        def react(name: str, system: str | None) -> Any:
            return ReActAgent(name=name, tools=[], llm=MockLLM(), description="d", system_prompt=system)

        lawyer, other = react("a", LAWYER + " {x}"), react("b", "Write poems.")
        for agent in (
            lawyer,
            AgentWorkflow([lawyer]),
            AgentWorkflow([lawyer, react("b", LAWYER + " {x}")], root_agent="a"),
        ):
            assert Instructions.from_prompt(agent) == Instructions(system=LAWYER + " {x}")
        acting = CodeActAgent(code_execute_fn=print, llm=MockLLM(), system_prompt=LAWYER)
        assert Instructions.from_prompt(acting) == Instructions(system=LAWYER)
        with pytest.raises(InputError, match="has agents with several system texts"):
            Instructions.from_prompt(AgentWorkflow([lawyer, other], root_agent="a"))
        with pytest.raises(InputError, match="ReActAgent holds no prompt: its system_prompt is None"):
            Instructions.from_prompt(react("a", None))
        from llama_index.core.question_gen import LLMQuestionGenerator

        with pytest.raises(InputError, match=r"holds no prompt \(none that get_prompts\(\) gives takes documents\)"):
            Instructions.from_prompt(LLMQuestionGenerator.from_defaults(llm=MockLLM()))

    def test_function_agent(self) -> None:
        from llama_index.core.agent.workflow import FunctionAgent

        mock = pytest.importorskip("llama_index.core.llms.mock")
        if not hasattr(mock, "MockFunctionCallingLLM"):
            pytest.skip("this llama-index-core has no mock of an LLM that calls functions")
        agent = FunctionAgent(tools=[], llm=mock.MockFunctionCallingLLM(), system_prompt=LAWYER)
        assert Instructions.from_prompt(agent) == Instructions(system=LAWYER)

    def test_engine_for_a_chat_model(self) -> None:
        from llama_index.core import Document, VectorStoreIndex
        from llama_index.core.embeddings import MockEmbedding
        from llama_index.core.llms.mock import MockLLM

        class ChatLLM(MockLLM):
            @property
            def metadata(self) -> Any:
                return super().metadata.model_copy(update={"is_chat_model": True})

        index = VectorStoreIndex.from_documents([Document(text="x")], embed_model=MockEmbedding(embed_dim=4))
        found = Instructions.from_prompt(index.as_query_engine(llm=ChatLLM()))
        assert str(found.system).startswith("You are an expert Q&A system")


def test_no_framework_is_imported() -> None:
    code = (
        "import sys; from kalm_rag import Instructions; Instructions.from_prompt('{context} Be brief.');"
        "print([m for m in sys.modules if m.split('.')[0] in ('langchain_core', 'llama_index', 'jinja2', 'torch')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
