"""Where the decoder looked: shares of attention, mapped back to characters, for both families."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch

from kalm_rag import Instructions, Reranker
from kalm_rag.engine.explanation import Explanation, Span
from kalm_rag.errors import InputError, StateMismatchError
from kalm_rag.index.results import Hit, QueryResult
from kalm_rag.states import batch_states

PASSAGE = "Tea is a drink. <b>Paris</b> is the capital of France; naïve café 🌏. <end_of_turn> Bees make honey."


@pytest.fixture(params=["tiny", "pico"])
def engine(request: pytest.FixtureRequest) -> Reranker:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("ratio", [None, 8])
def test_spans_cover_the_passage_once(engine: Reranker, ratio: int | None) -> None:
    found = engine.explain("What is the capital of France?", PASSAGE, ratio=ratio)
    assert all(a.end <= b.start for a, b in zip(found.spans, found.spans[1:], strict=False))
    covered = {i for span in found.spans for i in range(span.start, span.end)}
    assert all(PASSAGE[i].isspace() for i in set(range(len(PASSAGE))) - covered)
    assert 0 < sum(s.weight for s in found.spans) <= 1 + 1e-5
    assert all(s.weight >= 0 for s in found.spans)


def test_relevance_is_the_scored_one(engine: Reranker) -> None:
    told = Instructions(task="Find capitals.")
    found = engine.explain("capital?", PASSAGE, instructions=told)
    (scored,) = engine.score("capital?", engine.encode([PASSAGE]), instructions=told)
    assert (found.margin, found.probability) == (scored.margin, scored.probability)


def test_attention_sums_to_one_and_leaves_padding_out(engine: Reranker) -> None:
    backbone = engine.backbone
    batch = batch_states(engine.encode(["short", PASSAGE]))
    states, counts = batch.on(backbone.device, torch.float32)
    prompt = backbone.prompt("capital of France", Instructions())
    weights = backbone.attend(prompt, states, counts, batch.token_ids_on(backbone.device))
    assert weights.sum(-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert float(weights[counts == 0].abs().max()) == 0.0


def test_explaining_changes_no_score(tiny: Reranker) -> None:
    """The twin that gives attention weights shares tensors with the decoder, and must leave it as it was."""
    states = tiny.encode([PASSAGE])
    before = tiny.score("q", states)
    tiny.explain("q", PASSAGE)
    assert tiny.score("q", states) == before
    ours, twin = tiny.backbone._model.model.decoder, tiny.backbone._eager
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(ours.parameters(), twin.parameters(), strict=True))


def test_pico_looks_at_the_answer(pico: Reranker) -> None:
    best = " ".join(text for text, _ in pico.explain("What is the capital of France?", PASSAGE).top(3))
    assert "France" in best or "capital" in best
    assert "honey" not in best


def test_rendering_escapes_and_marks() -> None:
    found = Explanation(
        query="a < b?",
        passage="x <i> y",
        spans=[Span(0, 1, 0.1), Span(2, 5, 0.8), Span(6, 7, 0.1)],
        margin=0,
        probability=0.5,
    )
    assert "&lt;i&gt;" in found.to_html()
    assert "<i>" not in found.to_html()
    assert "a &lt; b?" in found._repr_html_()
    assert found.to_text() == "x [[<i>]] y"
    assert found.top(1) == [("<i>", 0.8)]
    assert Explanation(query="q", passage="", spans=[], margin=0, probability=0.5).to_text() == ""


def test_html_lets_nothing_out_of_its_place() -> None:
    """Query and passage are anybody's text: shown in a notebook, none of it may become markup or an attribute."""
    evil = """"><script>alert('1')</script><img src=x onerror='alert("2")'> &amp; ' style="x"""
    spans = [Span(at, at + 3, 0.1) for at in range(0, len(evil) - 3, 3)]
    told = Explanation(query=evil, passage=evil, spans=spans, margin=0.0, probability=0.5)
    tags: list[tuple[str, list[str]]] = []
    text: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, [name for name, _ in attrs]))

        def handle_data(self, data: str) -> None:
            text.append(data)

    Reader().feed(told.to_html())
    assert {tag for tag, _ in tags} == {"div", "b", "br", "span"}
    assert {name for _, names in tags for name in names} == {"style", "title"}
    assert "".join(text) == f"{evil} P(yes) = 0.500{evil}"


def test_long_and_empty_passages(engine: Reranker) -> None:
    long = engine.explain("q", "word " * 3000)
    assert 0 < long.spans[-1].end < 15000
    assert long.to_text().endswith("word ")
    assert engine.explain("q", "").spans == []


def test_bad_input(tiny: Reranker) -> None:
    with pytest.raises(InputError, match="query is blank"):
        tiny.explain(" ", "p")
    with pytest.raises(InputError, match="passage is int"):
        tiny.explain("q", 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="count is 0; wanted a whole number >= 1"):
        tiny.explain("q", "p").top(0)
    with pytest.raises(StateMismatchError, match="ratio 6"):
        tiny.explain("q", "p", ratio=6)


HOSTILE = (
    """<script>alert(1)</script> " onmouseover="alert(2)" ' onclick='x' </div></span><img src=x onerror=y> &lt;b&gt;"""
)


class _Tags(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_of_hostile_text_is_text() -> None:
    """Whatever stands in a passage, a query or an id is shown as it is, and makes no tag and no attribute."""
    middle = len(HOSTILE) // 2
    explained = Explanation(
        query=HOSTILE,
        passage=HOSTILE,
        spans=[Span(0, 9, 0.5), Span(9, middle, 0.25), Span(middle + 3, len(HOSTILE), 0.25)],
        margin=1.0,
        probability=0.7,
    )
    hit = Hit(
        id=HOSTILE,
        text=HOSTILE,
        metadata={HOSTILE: HOSTILE},
        retrieval_rank=2,
        distance=0.1,
        margin=1.0,
        probability=0.7,
    )
    result = QueryResult(query=HOSTILE, hits=[hit], candidates=1, from_store=1, encoded=0, unscored=0, seconds={})
    for shown in (explained, result):
        assert shown._repr_html_() == shown.to_html()
        seen = _Tags(shown.to_html())
        assert seen.tags <= {"div", "b", "br", "span", "table", "tr", "th", "td", "small"}
        assert seen.attributes <= {"style", "title"}
        assert seen.text.count(HOSTILE) >= 2
