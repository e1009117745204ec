"""What is handed on, and what happens when there is no ranking: through a query engine of LlamaIndex."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import time
from typing import Any

import pytest
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_nodes import recorded
from selecting import QUERY, TEXTS, held_decoder

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.errors import DeadlineError, InputError, KalmRagError
from kalm_rag.llama_index import KaLMNodePostprocessor


def nodes_of(texts: list[str] | None = None, **fields: Any) -> list[NodeWithScore]:
    """Nodes that differ in what nobody reads: LlamaIndex's first releases of 0.14 hand on one node per hash."""
    unread = {"excluded_embed_metadata_keys": ["n"], "excluded_llm_metadata_keys": ["n"]}
    return [
        NodeWithScore(
            node=TextNode(id_=f"r{n}", text=text, **{"metadata": {"n": n}, **unread, **fields}), score=1 - n / 10
        )
        for n, text in enumerate(texts if texts is not None else TEXTS)
    ]


class Fixed(BaseRetriever):
    """Gives the same nodes to every query."""

    def __init__(self, nodes: list[NodeWithScore]) -> None:
        self.nodes = nodes
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return list(self.nodes)


def words(text: str) -> int:
    return len(text.split())


def retrieve(pico: Reranker, given: list[NodeWithScore] | None = None, **settings: Any) -> list[NodeWithScore]:
    """Source nodes of an answer."""
    post = KaLMNodePostprocessor(reranker=pico, **{"top_n": None, **settings})
    engine = RetrieverQueryEngine.from_args(
        Fixed(given if given is not None else nodes_of()), llm=MockLLM(max_tokens=4), node_postprocessors=[post]
    )
    return engine.query(QUERY).source_nodes


@pytest.mark.parametrize("room", [1, 7, 12, 25, 40, 100])
def test_the_same_is_selected_as_by_the_index(pico: Reranker, room: int) -> None:
    options: dict[str, Any] = {"max_tokens": room, "count_tokens": words, "drop_duplicates": True, "diversity": 0.3}
    given = nodes_of()
    before = copy.deepcopy(given)
    got = retrieve(pico, given, **options)
    assert sum(words(node.get_content(metadata_mode=MetadataMode.LLM)) for node in got) <= room
    assert given == before, "the caller's nodes were changed"
    with ChromaIndex.open(model=pico, collection="llama-select") as index:
        index.upsert([node.node_id for node in given], TEXTS)
        expected = index.query(QUERY, top_n=None, **options)
    # of two equal texts the first in retrieval order stays, and that order differs between the doors
    assert [node.text for node in got] == [hit.text for hit in expected]


def test_the_budget_counts_what_the_llm_gets(pico: Reranker) -> None:
    """Metadata that is handed to the LLM takes room, too."""
    given = nodes_of(["I like tea."], metadata={"source": "a b c d e f g"})
    assert retrieve(pico, given, max_tokens=5, count_tokens=words) == []
    hidden = nodes_of(["I like tea."], metadata={"source": "a b"}, excluded_llm_metadata_keys=["source"])
    assert len(retrieve(pico, hidden, max_tokens=5, count_tokens=words)) == 1


@pytest.mark.parametrize("mode", list(MetadataMode))
def test_sentences_go_from_the_text_and_no_metadata_does(pico: Reranker, mode: MetadataMode) -> None:
    """Whatever of the metadata the model reads before the text: characters are those of the node's own text."""
    text = f"I like tea. Steel rusts. {TEXTS[2]} Berlin is large."
    given = nodes_of([text], metadata={"title": "Ünïcode. On tea.", "n": 1}, excluded_llm_metadata_keys=["n"])
    before = copy.deepcopy(given)
    (ranked,) = retrieve(pico, given, prune=0.5, metadata_mode=mode, details=True)
    assert given == before, "the caller's nodes were changed"
    assert ranked.node_id == "r0"
    assert ranked.text == f"… {TEXTS[2]} …"
    assert ranked.get_content(metadata_mode=MetadataMode.LLM) == f"title: Ünïcode. On tea.\n\n… {TEXTS[2]} …"
    assert ranked.node.metadata == given[0].node.metadata
    ((start, end),) = ranked.details["kept"]  # type: ignore[attr-defined]
    assert text[start:end] == TEXTS[2]
    room = words(ranked.get_content(metadata_mode=MetadataMode.LLM))
    options: dict[str, Any] = {"prune": 0.5, "metadata_mode": mode, "count_tokens": words}
    assert len(retrieve(pico, given, max_tokens=room, **options)) == 1
    assert retrieve(pico, given, max_tokens=room - 1, **options) == []


def test_details_are_on_request_and_leave_the_node_alone(pico: Reranker) -> None:
    given = nodes_of(["Paris is the capital of France. " * 1000, "I like tea."])
    assert all(type(item) is NodeWithScore for item in retrieve(pico, given))
    first, second = retrieve(pico, given, details=True, threshold=None)
    told: dict[str, Any] = first.details  # type: ignore[attr-defined]
    assert {**told, "seconds": 0} == {
        "status": "reranked",
        "model": "pico",
        "fingerprint": pico.info.fingerprint,
        "seconds": 0,
        "truncated": True,
        "left_out": {},
    }
    assert second.details["truncated"] is False  # type: ignore[attr-defined]
    for ranked, item in ((first, given[0]), (second, given[1])):
        assert ranked.node.hash == item.node.hash
        for mode in MetadataMode:
            assert ranked.get_content(metadata_mode=mode) == item.get_content(metadata_mode=mode)
    json.dumps(told)
    assert "details" in first.to_dict()


def test_the_event_and_one_warning_tell(pico: Reranker, caplog: pytest.LogCaptureFixture) -> None:
    given = nodes_of(["Paris is the capital of France. " * 1000, "Tea. " * 5000, "I like tea.", "I like tea."])
    with recorded() as (events, _), caplog.at_level(logging.WARNING):
        retrieve(pico, given, drop_duplicates=True)
    (told,) = [r.getMessage() for r in caplog.records if "longer than" in r.getMessage()]
    assert told.startswith("2 of 4 passages are longer than pico reads")
    tags = events[-1].tags
    assert (tags["status"], tags["truncated"], tags["left_out"]) == ("reranked", 2, {"duplicate": 1})


def test_a_broken_model_gives_the_retrieval_order(
    pico: Reranker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> Any:
        raise KalmRagError("the decoder is broken")

    monkeypatch.setattr(pico.backbone, "decode", broken)
    with pytest.raises(KalmRagError, match="the decoder is broken"):
        retrieve(pico)
    with recorded() as (events, _), caplog.at_level(logging.WARNING):
        got = retrieve(pico, on_error="retrieval_order", threshold=0.9, details=True, top_n=4)
    assert [node.node_id for node in got] == ["r0", "r1", "r2", "r3"]
    assert all(node.score is None for node in got)
    status = "skipped: KalmRagError: the decoder is broken"
    assert got[0].details["status"] == events[-1].tags["status"] == status  # type: ignore[attr-defined]
    assert len([r for r in caplog.records if "retrieval order" in r.getMessage()]) == 1


def test_a_model_that_is_not_there_takes_no_app_down() -> None:
    post = KaLMNodePostprocessor(model="no/such-model", on_error="retrieval_order", top_n=2, details=True)
    got = post.postprocess_nodes(nodes_of(), query_str=QUERY)
    assert [node.node_id for node in got] == ["r0", "r1"]
    assert got[0].details["status"].startswith("skipped: ModelError")  # type: ignore[attr-defined]


def test_a_timeout_holds(pico: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_decoder(pico, monkeypatch):
        started = time.monotonic()
        got = retrieve(pico, timeout=0.2, on_error="retrieval_order")
        assert time.monotonic() - started < 10
        assert [node.node_id for node in got] == [f"r{n}" for n in range(len(TEXTS))]
        with pytest.raises(DeadlineError, match="longer than timeout"):
            retrieve(pico, timeout=0.2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"count_tokens": 3},
        {"drop_duplicates": 2.0},
        {"diversity": 1.0},
        {"prune": -1.0},
        {"on_error": "ignore"},
        {"timeout": 0},
        {"timeout": True},
        {"timeout": "1"},
        {"diversity": "0.5"},
    ],
    ids=str,
)
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        KaLMNodePostprocessor(**wrong)


def test_settings_survive_being_written_down_but_a_function_does_not() -> None:
    options: dict[str, Any] = {
        "max_tokens": 9,
        "drop_duplicates": 0.9,
        "diversity": 0.2,
        "prune": 3.5,
        "on_error": "retrieval_order",
        "timeout": 3.0,
        "details": True,
    }
    plain = KaLMNodePostprocessor(**options)
    for again in (KaLMNodePostprocessor.from_dict(plain.to_dict()), pickle.loads(pickle.dumps(plain))):
        assert {name: getattr(again, name) for name in options} == options
    counted = KaLMNodePostprocessor(count_tokens=words)
    with pytest.raises(InputError, match="count_tokens, a function, which can't be written down"):
        pickle.dumps(counted)
    with pytest.raises(ValueError, match="count_tokens was the function words"):
        KaLMNodePostprocessor.from_dict(counted.to_dict())
    assert KaLMNodePostprocessor.from_dict(counted.to_dict(), count_tokens=words).count_tokens is words
