"""What is handed on, and what happens when there is no ranking: through LangChain's own retriever and ours."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import time
from typing import Any

import pytest

pytest.importorskip("langchain_classic", reason="langchain-classic is not installed (extra 'langchain')")

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.load import dumpd
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_documents import VECTORS, Trace
from selecting import QUERY, TEXTS, held_decoder

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.errors import DeadlineError, InputError, KalmRagError
from kalm_rag.langchain import KaLMDocumentCompressor, KaLMRerank, KaLMRetriever


class Fixed(BaseRetriever):
    """Gives the same documents to every query."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, **kwargs: Any) -> list[Document]:
        return self.documents


def candidates(texts: list[str] | None = None) -> list[Document]:
    return [Document(t, id=f"r{n}", metadata={"n": n, "tags": ["a"]}) for n, t in enumerate(texts if texts else TEXTS)]


def words(text: str) -> int:
    return len(text.split())


def retrieve(pico: Reranker, given: list[Document] | None = None, **settings: Any) -> list[Document]:
    compressor = KaLMDocumentCompressor(reranker=pico, top_n=None, **settings)
    base = Fixed(documents=given if given is not None else candidates())
    return ContextualCompressionRetriever(base_compressor=compressor, base_retriever=base).invoke(QUERY)


@pytest.mark.parametrize("room", [1, 7, 12, 25, 40, 100])
def test_the_same_is_selected_as_by_the_index(pico: Reranker, room: int) -> None:
    options: dict[str, Any] = {"max_tokens": room, "count_tokens": words, "drop_duplicates": True, "diversity": 0.3}
    given = candidates()
    before = copy.deepcopy(given)
    got = retrieve(pico, given, **options)
    assert sum(words(d.page_content) for d in got) <= room
    assert given == before, "the caller's documents were changed"
    with ChromaIndex.open(model=pico, collection="langchain-select") as index:
        index.upsert([d.id or "" for d in given], TEXTS)
        expected = index.query(QUERY, top_n=None, **options)
    # of two equal texts the first in retrieval order stays, and that order differs between the doors
    assert [d.page_content for d in got] == [hit.text for hit in expected]


def test_our_retriever_takes_the_same_arguments(pico: Reranker) -> None:
    vectors = InMemoryVectorStore(VECTORS)
    vectors.add_documents(candidates())
    compressor = KaLMDocumentCompressor(reranker=pico, drop_duplicates=True, on_error="retrieval_order")
    retriever = KaLMRetriever(
        vectorstore=vectors, compressor=compressor, k=6, max_tokens=12, count_tokens=words, details=True
    )
    got = retriever.invoke(QUERY)
    assert 0 < sum(words(d.page_content) for d in got) <= 12
    assert len({d.page_content for d in got}) == len(got), "the compressor's drop_duplicates holds"
    left = got[0].metadata["rerank_details"]["left_out"]
    assert left["duplicate"] >= 1
    assert left["budget"] >= 1
    assert asyncio.run(retriever.ainvoke(QUERY)) != []


def test_sentences_go_behind_our_retriever_too(pico: Reranker) -> None:
    """What the compressor says holds, unless the retriever says otherwise; the store's documents stay whole."""
    vectors = InMemoryVectorStore(VECTORS)
    text = f"I like tea. Steel rusts. {TEXTS[2]} Berlin is large."
    vectors.add_documents([Document(text, id="a", metadata={"n": 1})])

    def ask(compressor: dict[str, Any], **settings: Any) -> Document:
        made = KaLMDocumentCompressor(reranker=pico, **compressor)
        (got,) = KaLMRetriever(vectorstore=vectors, compressor=made, **settings).invoke(QUERY)
        return got

    assert ask({}).page_content == text
    pruned = ask({"prune": 0.5, "details": True})
    assert (pruned.id, pruned.page_content) == ("a", f"… {TEXTS[2]} …")
    ((start, end),) = pruned.metadata["rerank_details"]["kept"]
    assert text[start:end] == TEXTS[2]
    for smallest in (0.5, 1e-9):
        assert ask({}, prune=smallest).page_content == f"… {TEXTS[2]} …"
    again = KaLMDocumentCompressor(reranker=pico, prune=True).compress_documents([pruned], QUERY)
    assert TEXTS[2] in again[0].page_content
    assert "rerank_details" not in again[0].metadata
    assert vectors.get_by_ids(["a"])[0].page_content == text


def test_details_are_on_request_only_and_plain(pico: Reranker) -> None:
    assert all("rerank_details" not in d.metadata for d in retrieve(pico))
    long = candidates(["Paris is the capital of France. " * 1000, "I like tea."])
    first, second = retrieve(pico, long, details=True)
    told = first.metadata["rerank_details"]
    assert {**told, "seconds": 0} == {
        "status": "reranked",
        "model": "pico",
        "fingerprint": pico.info.fingerprint,
        "seconds": 0,
        "truncated": True,
        "left_out": {},
    }
    assert told["seconds"] > 0
    assert second.metadata["rerank_details"]["truncated"] is False
    json.dumps(told)
    again = retrieve(pico, [first, second])
    assert all("rerank_details" not in d.metadata for d in again), "an earlier ranking's"


def test_what_is_cut_is_said_once_and_traced(pico: Reranker, caplog: pytest.LogCaptureFixture) -> None:
    long = candidates(["Paris is the capital of France. " * 1000, "Tea. " * 5000, "I like tea."])
    trace = Trace()
    compressor = KaLMDocumentCompressor(reranker=pico)
    with caplog.at_level(logging.WARNING):
        compressor.compress_documents(long, QUERY, callbacks=[trace])
    (told,) = [r.getMessage() for r in caplog.records if "longer than" in r.getMessage()]
    assert told.startswith("2 of 3 passages are longer than pico reads")
    (run,) = trace.of("KaLMDocumentCompressor")
    assert trace.ended[run]["rerank_details"]["truncated"] == 2


def test_a_broken_model_gives_the_retrieval_order(
    pico: Reranker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> Any:
        raise KalmRagError("the decoder is broken")

    monkeypatch.setattr(pico.backbone, "decode", broken)
    with pytest.raises(KalmRagError, match="the decoder is broken"):
        retrieve(pico)
    with caplog.at_level(logging.WARNING):
        got = retrieve(pico, on_error="retrieval_order", threshold=0.9, details=True)
    assert [d.id for d in got] == [f"r{n}" for n in range(len(TEXTS))]
    assert all("relevance_score" not in d.metadata for d in got)
    assert got[0].metadata["rerank_details"]["status"] == "skipped: KalmRagError: the decoder is broken"
    assert len([r for r in caplog.records if "retrieval order" in r.getMessage()]) == 1
    trace = Trace()
    compressor = KaLMDocumentCompressor(reranker=pico, on_error="retrieval_order")
    compressor.compress_documents(candidates(), QUERY, callbacks=[trace])
    (run,) = trace.of("KaLMDocumentCompressor")
    assert trace.ended[run]["rerank_details"]["status"].startswith("skipped: KalmRagError")


def test_a_model_that_is_not_there_takes_no_app_down() -> None:
    compressor = KaLMDocumentCompressor(model="no/such-model", on_error="retrieval_order", top_n=2, details=True)
    got = compressor.compress_documents(candidates(), QUERY)
    assert [d.id for d in got] == ["r0", "r1"]
    told = got[0].metadata["rerank_details"]
    assert told["status"].startswith("skipped: ModelError")
    assert (told["model"], told["fingerprint"]) == ("no/such-model", None)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_timeout_holds(pico: Reranker, monkeypatch: pytest.MonkeyPatch, is_async: bool) -> None:
    compressor = KaLMDocumentCompressor(reranker=pico, timeout=0.2, on_error="retrieval_order", top_n=None)
    with held_decoder(pico, monkeypatch):
        started = time.monotonic()
        if is_async:
            got = asyncio.run(compressor.acompress_documents(candidates(), QUERY))
        else:
            got = list(compressor.compress_documents(candidates(), QUERY))
        assert time.monotonic() - started < 10
        assert [d.id for d in got] == [f"r{n}" for n in range(len(TEXTS))]
        with pytest.raises(DeadlineError, match="longer than timeout"):
            compressor.model_copy(update={"on_error": "raise"}).compress_documents(candidates(), QUERY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": True},
        {"count_tokens": 3},
        {"drop_duplicates": 2.0},
        {"drop_duplicates": "yes"},
        {"prune": -1.0},
        {"prune": "yes"},
        {"on_error": "ignore"},
        {"timeout": 0},
        {"timeout": True},
        {"timeout": "1"},
        {"diversity": "0.5"},
        {"diversity": True},
        {"threshold": True},
        {"threshold": "0.5"},
        {"details": "yes"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [KaLMDocumentCompressor, KaLMRetriever])
def test_wrong_settings_are_named(kind: type, wrong: dict[str, Any]) -> None:
    more = {"vectorstore": InMemoryVectorStore(VECTORS)} if kind is KaLMRetriever else {}
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        kind(**more, **wrong)


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
    plain = KaLMDocumentCompressor(**options)
    assert KaLMDocumentCompressor(**plain.model_dump()) == plain
    assert pickle.loads(pickle.dumps(plain)) == plain
    written = dumpd(KaLMRerank(plain))["kwargs"]
    assert {key: written[key] for key in options} == options
    retriever = KaLMRetriever(vectorstore=InMemoryVectorStore(VECTORS), count_tokens=words)
    with pytest.raises(InputError, match="KaLMRetriever has count_tokens"):
        pickle.dumps(retriever)
    counted = KaLMDocumentCompressor(count_tokens=words)
    with pytest.raises(InputError, match="count_tokens, a function, which can't be written down"):
        pickle.dumps(counted)
    with pytest.raises(ValueError, match="count_tokens was the function words"):
        KaLMDocumentCompressor(**counted.model_dump())
    assert dumpd(KaLMRerank(counted))["type"] == "not_implemented"
    assert copy.deepcopy(counted).count_tokens is words
