"""The document compressor: documents, cuts, settings, engines, round trips."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_core.documents import BaseDocumentTransformer, Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_documents import QUERY, TEXTS, Trace, documents
from pydantic import ValidationError

from kalm_rag import Instructions
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, MissingStateError, StateMismatchError
from kalm_rag.index.lazy_engine import match_ratio, release_engines
from kalm_rag.index.state_cache import CacheStore
from kalm_rag.langchain import KaLMChroma, KaLMDocumentCompressor, KaLMEmbeddings


def test_scores_are_the_engines_and_nothing_of_the_callers_changes(
    tiny: Reranker, compressor: KaLMDocumentCompressor
) -> None:
    given = documents()
    before = copy.deepcopy(given)
    ranked = compressor.compress_documents(given, QUERY)
    expected = tiny.rank(QUERY, TEXTS)
    assert given == before
    assert [d.page_content for d in ranked] == [TEXTS[r.index] for r in expected]
    assert [d.metadata["relevance_score"] for d in ranked] == [r.probability for r in expected]
    assert [d.id for d in ranked] == [f"id-{r.index}" for r in expected]
    assert all(not any(d is g for g in given) for d in ranked)
    assert all(type(d.metadata["relevance_score"]) is float for d in ranked)
    json.dumps([d.metadata for d in ranked])


def test_scores_stay_with_their_documents_in_any_order(compressor: KaLMDocumentCompressor) -> None:
    texts = [f"Passage {i} about {word}." for i, word in enumerate("bees ants cats dogs rain honey".split() * 3)]
    wanted = {
        d.page_content: d.metadata["relevance_score"] for d in compressor.compress_documents(documents(texts), QUERY)
    }
    for seed in range(4):
        shuffled = documents(texts)
        random.Random(seed).shuffle(shuffled)
        if seed == 2:  # half of the states are gone, so stored and fresh ones are merged
            compressor.store.gc(younger_than=0)
            compressor.compress_documents(shuffled[::2], QUERY)
        for document in compressor.compress_documents(shuffled, QUERY):
            assert document.metadata["relevance_score"] == pytest.approx(wanted[document.page_content], abs=1e-6)
            assert document.page_content == texts[document.metadata["place"]]


def test_duplicates_and_edited_texts(compressor: KaLMDocumentCompressor) -> None:
    """An id says nothing about a text: what is scored is the text at hand, wherever it came from."""
    twins = [Document("Bees make honey.", id="x"), Document("Rain.", id="y"), Document("Bees make honey.", id="y")]
    ranked = compressor.compress_documents(twins, QUERY)
    same = [d.metadata["relevance_score"] for d in ranked if d.page_content == "Bees make honey."]
    assert len(same) == 2
    assert same[0] == same[1]
    edited = compressor.compress_documents([Document("Ants bite.", id="x")], QUERY)
    fresh = compressor.engine().rank(QUERY, ["Ants bite."])
    assert edited[0].metadata["relevance_score"] == pytest.approx(fresh[0].probability, abs=1e-6)


def test_cuts(compressor: KaLMDocumentCompressor) -> None:
    everything = compressor.compress_documents(documents(), QUERY)
    assert compressor.model_copy(update={"top_n": 2}).compress_documents(documents(), QUERY) == everything[:2]
    assert len(KaLMDocumentCompressor(reranker=compressor.reranker).compress_documents(documents(), QUERY)) == 4
    middle = everything[2].metadata["relevance_score"]
    kept = compressor.model_copy(update={"threshold": middle}).compress_documents(documents(), QUERY)
    assert kept == everything[:3]
    assert compressor.compress_documents([], QUERY) == []


def test_former_scores(compressor: KaLMDocumentCompressor) -> None:
    given = [Document(t, metadata={"relevance_score": 99.0}) for t in TEXTS]
    plain = compressor.compress_documents(given, QUERY)
    assert all(0 <= d.metadata["relevance_score"] <= 1 and "retrieval_score" not in d.metadata for d in plain)
    asked = compressor.model_copy(update={"keep_retrieval_score": True, "keep_margin": True})
    kept = asked.compress_documents(given, QUERY)
    assert {d.metadata["retrieval_score"] for d in kept} == {99.0}
    assert sorted(d.metadata["retrieval_rank"] for d in kept) == [1, 2, 3, 4, 5]
    margins = [d.metadata["relevance_margin"] for d in kept]
    assert margins == sorted(margins, reverse=True)


def test_missing_states(compressor: KaLMDocumentCompressor) -> None:
    compressor.compress_documents(documents()[:2], QUERY)
    skip = compressor.model_copy(update={"missing": "skip"}).compress_documents(documents(), QUERY)
    assert [d.id for d in skip[2:]] == ["id-2", "id-3", "id-4"], "unscored ones keep the retrieval order, behind"
    assert all("relevance_score" not in d.metadata for d in skip[2:])
    with pytest.raises(MissingStateError, match=r"3 of 5 candidates have no stored states \(first: 'Steel rusts.'"):
        compressor.model_copy(update={"missing": "raise"}).compress_documents(documents(), QUERY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_n": 0}, "top_n is 0; wanted a whole number >= 1"),
        ({"top_n": -1}, "top_n is -1"),
        ({"top_n": True}, "should be a valid integer"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": 2}, "threshold is 2;"),
        ({"ratio": 0}, "ratio"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"missing": "guess"}, "'encode', 'raise' or 'skip'"),
        ({"modle": "pico"}, r"has no argument modle\. Did you mean model\?"),
        ({"zzz": 1}, "Extra inputs are not permitted"),
        ({"instructions": 3}, "prompt is int; wanted a string"),
        ({"instructions": "auto"}, "'auto', which nothing here can follow"),
        ({"store": 3}, "store is int; wanted a StateStore"),
        ({"model": ""}, "model is ''"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        KaLMDocumentCompressor(**settings)


def test_bad_calls(compressor: KaLMDocumentCompressor, tiny: Reranker) -> None:
    with pytest.raises(InputError, match="query is NoneType; wanted a string"):
        compressor.compress_documents(documents(), None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="document 1 is str"):
        compressor.compress_documents([Document("x"), "y"], QUERY)  # type: ignore[list-item]
    with pytest.raises(InputError, match="documents is str"):
        compressor.compress_documents("text", QUERY)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="query holds a lone surrogate"):
        compressor.compress_documents(documents(), "\ud800")
    with pytest.raises(ValidationError, match="reranker and model were both given"):
        KaLMDocumentCompressor(model="nano", reranker=tiny)
    with pytest.raises(StateMismatchError, match="ratio"):
        compressor.model_copy(update={"ratio": 3}).compress_documents(documents(), QUERY)


def test_ratio_is_asked_for_per_query(compressor: KaLMDocumentCompressor, tiny: Reranker) -> None:
    coarse = compressor.model_copy(update={"ratio": 8}).compress_documents(documents(), QUERY)
    expected = tiny.rank(QUERY, tiny.encode(TEXTS), ratio=8)
    assert [d.metadata["relevance_score"] for d in coarse] == [pytest.approx(r.probability, abs=1e-6) for r in expected]


def test_instructions_of_the_apps_own_prompt(compressor: KaLMDocumentCompressor, tiny: Reranker) -> None:
    prompt = ChatPromptTemplate([("system", "You are a beekeeper.\n\n{context}"), ("human", "Cite.\n\nQ: {question}")])
    follows = KaLMDocumentCompressor(reranker=tiny, instructions=prompt)
    assert follows.instructions == Instructions(system="You are a beekeeper.", task="Cite.")
    assert "You are a beekeeper." in follows.preview(QUERY)
    assert KaLMDocumentCompressor(reranker=tiny, instructions="{Find} it.").instructions == Instructions(
        task="{Find} it."
    )
    copied = compressor.with_instructions(prompt)
    assert (copied.instructions, compressor.instructions) == (follows.instructions, None)
    assert copied.store is compressor.store
    scores = [c.compress_documents(documents(), QUERY)[0].metadata["relevance_score"] for c in (compressor, copied)]
    assert scores[0] != scores[1]


def test_nothing_is_loaded_at_construction_and_engines_are_shared(tiny_folder: Path) -> None:
    release_engines()
    one = KaLMDocumentCompressor(model=str(tiny_folder), device="cpu", top_n=1)
    two = KaLMDocumentCompressor(model=str(tiny_folder), device="cpu")
    KaLMDocumentCompressor(model="/no/such/folder")  # not looked at before the first call
    engines: list[Reranker] = []
    threads = [threading.Thread(target=lambda c=c: engines.append(c.engine())) for c in (one, two) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(e) for e in engines}) == 1
    release_engines()
    assert one.compress_documents(documents(), QUERY), "loaded again after it was given back"


def test_states_are_kept_in_memory_within_a_bound(tiny: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    release_engines()
    compressor = KaLMDocumentCompressor(reranker=tiny)
    encoded: list[int] = []
    encode = Reranker.encode

    def counted(self: Reranker, texts: Any, **settings: Any) -> Any:
        encoded.append(len(texts))
        return encode(self, texts, **settings)

    monkeypatch.setattr(Reranker, "encode", counted)
    compressor.compress_documents(documents(), QUERY)
    compressor.with_instructions("Find food.").compress_documents(documents(), "another query")
    assert encoded == [5], "documents seen before are not encoded again"
    states = tiny.encode(TEXTS)
    size = match_ratio(tiny, None)[1].stats().payload_bytes
    bounded = CacheStore(tiny.layout(), max_bytes=size - 1)
    bounded.put_many(states[:4])
    bounded.get_many([states[0].key])  # used just now, so the second goes first
    bounded.put_many(states[4:])
    assert bounded.missing([s.key for s in states]) == {states[1].key}
    assert bounded.stats().payload_bytes < size


class Upper(BaseDocumentTransformer):
    """Rewrites texts and keeps ids, as splitters and redactors do."""

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> list[Document]:
        return [d.model_copy(update={"page_content": d.page_content.upper()}) for d in documents]


def test_classic_retriever_and_pipeline(chroma: KaLMChroma, tiny: Reranker) -> None:
    classic = pytest.importorskip("langchain_classic.retrievers", reason="langchain-classic is not installed")
    compressors = pytest.importorskip("langchain_classic.retrievers.document_compressors")
    chroma.add_documents(documents())
    trace = Trace()
    pipeline = compressors.DocumentCompressorPipeline(transformers=[Upper(), chroma.as_compressor()])
    for compressor, texts in ((chroma.as_compressor(), TEXTS), (pipeline, [t.upper() for t in TEXTS])):
        retriever = classic.ContextualCompressionRetriever(
            base_compressor=compressor, base_retriever=chroma.as_retriever(search_kwargs={"k": 5})
        )
        found = retriever.invoke(QUERY, config={"callbacks": [trace]})
        expected = tiny.rank(QUERY, texts, top_n=4)
        assert [d.page_content for d in found] == [texts[r.index] for r in expected]
        assert [d.metadata["relevance_score"] for d in found] == [
            pytest.approx(r.probability, abs=1e-6) for r in expected
        ]
        assert asyncio.run(retriever.ainvoke(QUERY, config={"callbacks": [trace]})) == found
    assert len(trace.of("KaLMDocumentCompressor")) == 4
    assert trace.paired()
    assert not chroma.verify().stale, "rewritten texts must not move the references of their records"


def test_nothing_to_rank_or_embed(compressor: KaLMDocumentCompressor) -> None:
    """LangChain's contract for no texts is an empty list; a store's ``add_documents([])`` failed on our vectors."""
    assert compressor.compress_documents([], "") == []
    assert KaLMEmbeddings().embed_documents([]) == []
    assert InMemoryVectorStore(KaLMEmbeddings()).add_documents([]) == []


def test_a_blank_query_gives_the_retrieval_order(caplog: pytest.LogCaptureFixture) -> None:
    """An agent's blank query ended the app's run. It needs no model, so none is looked for."""
    compressor = KaLMDocumentCompressor(model="/no/such/folder", top_n=2)
    given = [Document(t, metadata={"relevance_score": 9.0}) for t in TEXTS]
    for query in ("", " \n"):
        found = compressor.compress_documents(given, query)
        assert [d.page_content for d in found] == TEXTS[:2]
        assert all("relevance_score" not in d.metadata for d in found), "a former score is not ours"
        assert asyncio.run(compressor.acompress_documents(given, query)) == found
    assert "query is blank, so 5 candidates are not scored: they come back in retrieval order" in caplog.text
    assert compressor.model_copy(update={"threshold": 0.0}).compress_documents(given, " ") == []
    assert "the threshold drops them" in caplog.text


def test_a_candidate_that_is_no_unicode_leaves_the_others_alone(
    compressor: KaLMDocumentCompressor, caplog: pytest.LogCaptureFixture
) -> None:
    """One lone surrogate, common in text out of PDFs, made the whole rerank fail."""
    given = documents([*TEXTS[:2], "equation \ud835", *TEXTS[2:]])
    found = compressor.compress_documents(given, QUERY)
    assert found[-1].id == "id-2"
    assert "relevance_score" not in found[-1].metadata
    alone = compressor.compress_documents(documents(), QUERY)
    assert [d.page_content for d in found[:-1]] == [d.page_content for d in alone]
    scores = [[d.metadata["relevance_score"] for d in some] for some in (found[:-1], alone)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert "document 2 holds a lone surrogate (U+D835 at position 9)" in caplog.text


def test_scores_can_be_left_out(compressor: KaLMDocumentCompressor) -> None:
    plain = KaLMDocumentCompressor(reranker=compressor.reranker, top_n=None, keep_score=False)
    found = plain.compress_documents(documents(), QUERY)
    assert [d.id for d in found] == [d.id for d in compressor.compress_documents(documents(), QUERY)]
    assert all(d in documents() for d in found), "nothing tells them from what was given"
    with pytest.raises(ValidationError, match="keep_margin=True needs keep_score=True"):
        KaLMDocumentCompressor(keep_score=False, keep_margin=True)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("score_threshold", "threshold"), ("top_k", "top_n"), ("k", "top_n"), ("instruction", "instructions")],
)
def test_names_of_other_rerankers_are_answered_with_ours(theirs: str, ours: str) -> None:
    with pytest.raises(ValidationError, match=rf"has no argument {theirs}\. Did you mean {ours}\?"):
        KaLMDocumentCompressor(**{theirs: 1})  # type: ignore[arg-type]
