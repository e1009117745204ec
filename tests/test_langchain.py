"""The LangChain adapter through its public entries: documents, ids, traces, loops, threads, serialisation, upkeep."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib
import json
import pickle
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_chroma import Chroma
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import BaseDocumentTransformer, Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import ValidationError

from kalm_rag import Instructions
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, MissingDependencyError, MissingStateError, StateMismatchError, StoreFormatError
from kalm_rag.index.lazy_engine import CacheStore, EngineSpec, match_ratio, release_engines, spec_of
from kalm_rag.langchain import KaLMChroma, KaLMDocumentCompressor, KaLMEmbeddings, KaLMRetriever, StateByteStore
from kalm_rag.store import FILE_NAME, Fetched, Reference, open_store
from kalm_rag.store.memory import MemoryStore

TEXTS = ["Cats sleep a lot.", "Rain falls in May.", "Steel rusts.", "Bees make honey.", "Lisbon lies on the Tagus."]
QUERY = "what do bees make?"
VECTORS = DeterministicFakeEmbedding(size=6)


def documents(texts: Sequence[str] = TEXTS) -> list[Document]:
    return [Document(t, id=f"id-{i}", metadata={"place": i, "tags": ["a"]}) for i, t in enumerate(texts)]


@pytest.fixture
def compressor(tiny: Reranker) -> KaLMDocumentCompressor:
    return KaLMDocumentCompressor(reranker=tiny, store=MemoryStore(tiny.layout()), top_n=None)


@pytest.fixture
def chroma(tiny: Reranker) -> Iterator[KaLMChroma]:
    store = KaLMChroma(f"test-{uuid.uuid4()}", VECTORS, reranker=tiny)
    yield store
    if store._chroma_collection is not None:
        store.delete_collection()


class Trace(BaseCallbackHandler):
    """Counts what starts and what ends."""

    def __init__(self) -> None:
        self.started: dict[Any, tuple[str, Any, Any]] = {}
        self.ended: dict[Any, Any] = {}
        self.failed: dict[Any, BaseException] = {}

    def _start(self, serialized: Any, inputs: Any, *, run_id: Any, parent_run_id: Any = None, **kwargs: Any) -> None:
        self.started[run_id] = (kwargs.get("name") or "", inputs, parent_run_id)

    def _end(self, outputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.ended[run_id] = outputs

    def _error(self, error: BaseException, *, run_id: Any, **kwargs: Any) -> None:
        self.failed[run_id] = error

    on_chain_start = on_retriever_start = _start
    on_chain_end = on_retriever_end = _end
    on_chain_error = on_retriever_error = _error

    def of(self, name: str) -> list[Any]:
        return [run for run, (found, _, _) in self.started.items() if found == name]

    def paired(self) -> bool:
        return self.started.keys() == self.ended.keys() ^ self.failed.keys()


class Slow(MemoryStore):
    """A store that takes its time, as a large model would."""

    seconds = 0.3

    def get_many(self, keys: Sequence[str]) -> Fetched:
        time.sleep(self.seconds)
        return super().get_many(keys)


# --- compressor: documents


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
            compressor.store.gc()
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
    assert len(KaLMDocumentCompressor(reranker=compressor.reranker).compress_documents(documents(), QUERY)) == 3
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
        ({"threshold": 2}, "threshold is 2.0"),
        ({"ratio": 0}, "ratio"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"missing": "guess"}, "'encode', 'raise' or 'skip'"),
        ({"modle": "pico"}, "Extra inputs are not permitted"),
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
    with pytest.raises(InputError, match="query is blank"):
        compressor.compress_documents(documents(), "  ")
    with pytest.raises(InputError, match="query is NoneType; wanted a string"):
        compressor.compress_documents(documents(), None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="document 1 is str"):
        compressor.compress_documents([Document("x"), "y"], QUERY)  # type: ignore[list-item]
    with pytest.raises(InputError, match="documents is str"):
        compressor.compress_documents("text", QUERY)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="document 0 holds a lone surrogate"):
        compressor.compress_documents([Document("\ud800")], QUERY)
    with pytest.raises(ValidationError, match="reranker and model were both given"):
        KaLMDocumentCompressor(model="nano", reranker=tiny)
    with pytest.raises(StateMismatchError, match="ratio"):
        compressor.model_copy(update={"ratio": 3}).compress_documents(documents(), QUERY)


def test_ratio_is_asked_for_per_query(compressor: KaLMDocumentCompressor, tiny: Reranker) -> None:
    coarse = compressor.model_copy(update={"ratio": 8}).compress_documents(documents(), QUERY)
    expected = tiny.rank(QUERY, tiny.encode(TEXTS), ratio=8)
    assert [d.metadata["relevance_score"] for d in coarse] == [pytest.approx(r.probability, abs=1e-6) for r in expected]


# --- compressor: engines, memory, serialisation


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
    encode = tiny.encode
    monkeypatch.setattr(tiny, "encode", lambda texts, **k: encoded.append(len(texts)) or encode(texts, **k))
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


def test_round_trips(tiny: Reranker, tiny_folder: Path, tmp_path: Path) -> None:
    """Nothing is lost: device, instructions, a ready engine's settings, and where the states lie."""
    store = open_store(tmp_path, tiny.layout("int8"))
    made = KaLMDocumentCompressor(
        reranker=tiny,
        store=store,
        top_n=2,
        threshold=0.001,
        instructions=Instructions(system="S", task="T"),
        keep_margin=True,
        missing="skip",
        ratio=8,
    )
    store.put_many(tiny.encode(TEXTS))
    wanted = made.compress_documents(documents(), QUERY)
    copies = [
        pickle.loads(pickle.dumps(made)),
        KaLMDocumentCompressor.model_validate(made.model_dump()),
        KaLMDocumentCompressor.model_validate_json(made.model_dump_json()),
    ]
    for copied in copies:
        assert copied.reranker is None
        assert copied.model_dump() == made.model_dump()
        assert copied.compress_documents(documents(), QUERY) == wanted
    assert made.device == "cpu"
    assert made.store is store
    assert len(pickle.dumps(made)) < 5_000
    spec = EngineSpec(model=str(tiny_folder), device=tiny.backbone.device)  # type: ignore[arg-type]
    assert spec.device == "cpu"
    assert pickle.loads(pickle.dumps(spec)) == spec
    release_engines()
    store.close()


def test_how_a_model_runs_is_a_setting_like_others(tiny: Reranker, tiny_folder: Path) -> None:
    ways = {"decoder_weights": "int8", "prefix_cache_bytes": 12_345}
    try:
        made = KaLMDocumentCompressor(model=str(tiny_folder), device="cpu", **ways)
        copied = pickle.loads(pickle.dumps(made))
        assert copied.compress_documents(documents(), QUERY)
        assert copied.engine() is made.engine()
        assert {key: spec_of(made.engine())[key] for key in ways} == ways
        ready = KaLMDocumentCompressor(reranker=made.engine())
        assert ready.model_dump()["decoder_weights"] == "int8", "or a copy would run another way"
        with pytest.raises(ValidationError, match="both given"):
            KaLMDocumentCompressor(reranker=tiny, decoder_weights="int8")
        with pytest.raises(InputError, match="both given"):
            KaLMChroma("ways", reranker=tiny, compiled=True)
        store = KaLMChroma("ways", VECTORS, model=str(tiny_folder), device="cpu", **ways)
        assert store.as_compressor().engine() is made.engine()
    finally:
        release_engines()


# --- traces


def test_the_step_is_traced(compressor: KaLMDocumentCompressor) -> None:
    trace = Trace()
    ranked = compressor.compress_documents(documents(), QUERY, callbacks=[trace])
    (run,) = trace.of("KaLMDocumentCompressor")
    assert trace.started[run][1] == {"query": QUERY, "documents": documents()}, "the candidates, not yet reranked"
    assert trace.ended[run] == {"documents": ranked}
    assert trace.paired()
    asyncio.run(compressor.acompress_documents(documents(), QUERY, callbacks=[trace]))
    assert len(trace.of("KaLMDocumentCompressor")) == 2
    assert trace.paired()


def test_a_start_is_paired_on_errors_and_cancellation(tiny: Reranker, compressor: KaLMDocumentCompressor) -> None:
    trace = Trace()
    with pytest.raises(InputError, match="blank"):
        compressor.compress_documents(documents(), " ", callbacks=[trace])
    slow = compressor.model_copy(update={"store": Slow(tiny.layout())})

    async def cancelled() -> None:
        with pytest.raises(InputError, match="blank"):
            await compressor.acompress_documents(documents(), " ", callbacks=[trace])
        task = asyncio.create_task(slow.acompress_documents(documents(), QUERY, callbacks=[trace]))
        await asyncio.sleep(0.05)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()

    asyncio.run(cancelled())
    assert len(trace.failed) == 3
    assert trace.paired()


def test_traces_of_chains_and_retrievers_nest(chroma: KaLMChroma) -> None:
    trace = Trace()
    chroma.add_documents(documents())
    retriever = KaLMRetriever(vectorstore=chroma, k=2)
    retriever.invoke(QUERY, config={"callbacks": [trace]})
    (outer,) = trace.of("KaLMRetriever")
    (inner,) = trace.of("KaLMDocumentCompressor")
    assert trace.started[inner][2] == outer
    step = RunnableLambda(lambda query: chroma.as_compressor().compress_documents(documents(), query))
    step.invoke(QUERY, config={"callbacks": [trace]})  # no callbacks handed on: found in the running chain
    asyncio.run(retriever.ainvoke(QUERY, config={"callbacks": [trace]}))
    assert len(trace.of("KaLMDocumentCompressor")) == 3
    assert trace.paired()
    with pytest.raises(InputError, match="blank"):
        retriever.invoke("", config={"callbacks": [trace]})
    assert trace.paired()


# --- loops and threads


def test_the_event_loop_stays_free(tiny: Reranker) -> None:
    """A call that blocked the loop would delay the ticks by the store's 300 ms, every time."""
    compressor = KaLMDocumentCompressor(reranker=tiny, store=Slow(tiny.layout()))
    vectors = InMemoryVectorStore(VECTORS)
    vectors.add_documents(documents())
    retriever = KaLMRetriever(vectorstore=vectors, compressor=compressor)
    chain = compressor.as_runnable()

    async def latest(work: Callable[[], Any]) -> float:
        late, done = 0.0, asyncio.Event()

        async def tick() -> None:
            nonlocal late
            while not done.is_set():
                before = time.perf_counter()
                await asyncio.sleep(0.005)
                late = max(late, time.perf_counter() - before - 0.005)

        ticking = asyncio.create_task(tick())
        await work()
        done.set()
        await ticking
        return late

    for work in (
        lambda: compressor.acompress_documents(documents(), QUERY),
        lambda: retriever.ainvoke(QUERY),
        lambda: chain.ainvoke({"question": QUERY, "documents": documents()}),
    ):
        attempts = (asyncio.run(latest(work)) for _ in range(6))  # a busy machine may be late by itself
        assert any(late < 0.05 for late in attempts)


def test_threads_and_concurrent_queries_agree_with_one_by_one(chroma: KaLMChroma) -> None:
    chroma.add_documents(documents())
    retriever = KaLMRetriever(vectorstore=chroma, k=3)
    queries = [f"{QUERY} {i}" for i in range(50)]
    wanted = [retriever.invoke(q) for q in queries]

    def check(found: list[list[Document]]) -> None:
        """Queries that share a decoder pass differ from those asked alone by no more than rounding."""
        for ours, theirs in zip(found, wanted, strict=True):
            assert [d.page_content for d in ours] == [d.page_content for d in theirs]
            scores = [[d.metadata["relevance_score"] for d in one] for one in (ours, theirs)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-5)

    with ThreadPoolExecutor(8) as pool:
        check(list(pool.map(retriever.invoke, queries)))

    async def together() -> list[list[Document]]:
        return await asyncio.gather(*(retriever.ainvoke(q) for q in queries))

    check(asyncio.run(together()))


# --- instructions


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


def test_instructions_of_one_call(compressor: KaLMDocumentCompressor, chroma: KaLMChroma) -> None:
    chroma.add_documents(documents())
    told = {"configurable": {"kalm_instructions": "Find food."}}
    step = compressor.as_runnable()
    given = {"query": QUERY, "docs": documents()}
    wanted = compressor.with_instructions("Find food.").compress_documents(documents(), QUERY)
    assert step.invoke(given, config=told) == wanted
    assert step.invoke(given) != wanted
    retriever = KaLMRetriever(vectorstore=chroma)
    asked = retriever.invoke(QUERY, instructions="Find food.")
    assert retriever.invoke(QUERY, config=told) == asked
    assert retriever.invoke(QUERY) != asked
    assert (RunnablePassthrough() | retriever).invoke(QUERY, config=told) == asked
    inside = RunnableLambda(lambda q: compressor.compress_documents(documents(), q))
    assert inside.invoke(QUERY, config=told) == wanted


def test_runnable(compressor: KaLMDocumentCompressor) -> None:
    step = compressor.as_runnable()
    for query_key, documents_key in (("query", "documents"), ("question", "context"), ("input", "docs")):
        ranked = step.invoke({query_key: QUERY, documents_key: documents()})
        assert ranked == compressor.compress_documents(documents(), QUERY)
    chain = RunnablePassthrough.assign(context=step) | (lambda x: [d.id for d in x["context"]])
    assert chain.invoke({"question": QUERY, "documents": documents()}) == [d.id for d in ranked]
    assert asyncio.run(step.abatch([{"question": QUERY, "documents": documents()}])) == [ranked]
    with pytest.raises(InputError, match=r"keys \['text'\]; wanted one of query, question, input"):
        step.invoke({"text": QUERY})
    with pytest.raises(InputError, match="input is str; wanted a dict"):
        step.invoke(QUERY)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown arguments top_n"):
        step.invoke({"query": QUERY, "docs": []}, top_n=3)


# --- with langchain_classic and other retrievers


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
        expected = tiny.rank(QUERY, texts, top_n=3)
        assert [d.page_content for d in found] == [texts[r.index] for r in expected]
        assert [d.metadata["relevance_score"] for d in found] == [
            pytest.approx(r.probability, abs=1e-6) for r in expected
        ]
        assert asyncio.run(retriever.ainvoke(QUERY, config={"callbacks": [trace]})) == found
    assert len(trace.of("KaLMDocumentCompressor")) == 4
    assert trace.paired()
    assert not chroma.verify().stale, "rewritten texts must not move the references of their records"


def test_retriever_over_another_vector_store(tiny: Reranker) -> None:
    vectors = InMemoryVectorStore(VECTORS)
    vectors.add_documents(documents())
    compressor = KaLMDocumentCompressor(reranker=tiny)
    retriever = KaLMRetriever(
        vectorstore=vectors,
        compressor=compressor,
        k=2,
        keep_retrieval_score=True,
        threshold=0.0,
        ratio=4,
        search_kwargs={"filter": lambda d: d.metadata["place"] > 1},
    )
    found = retriever.invoke(QUERY)
    assert [d.page_content for d in found] == [TEXTS[2:][r.index] for r in tiny.rank(QUERY, TEXTS[2:], top_n=2)]
    assert all(isinstance(d.metadata["retrieval_score"], float) for d in found)
    assert compressor.top_n == 3, "the retriever's k is not the compressor's business"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k is 0; wanted a whole number >= 1"),
        ({"fetch_k": -1}, "fetch_k is -1"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"kk": 3}, "Extra inputs are not permitted"),
    ],
)
def test_bad_retriever_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        KaLMRetriever(vectorstore=InMemoryVectorStore(VECTORS), **settings)


def test_bad_retriever_calls(chroma: KaLMChroma) -> None:
    retriever = KaLMRetriever(vectorstore=chroma)
    assert retriever.invoke(QUERY) == [], "an empty collection has no documents"
    with pytest.raises(InputError, match="k is 0"):
        retriever.invoke(QUERY, k=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'top'"):
        retriever.invoke(QUERY, top=3)
    with pytest.raises(InputError, match="query is blank"):
        asyncio.run(retriever.ainvoke(" "))


# --- vector store


def test_writing_keeps_states_in_step(chroma: KaLMChroma) -> None:
    given = documents()
    before = copy.deepcopy(given)
    assert chroma.add_documents(given) == [d.id for d in given]
    assert given == before
    assert chroma.verify().clean
    assert chroma.store.stats().states == 5
    chroma.add_texts(["Steel rusts.", "New."], ids=["id-0", "z"], metadatas=[{"only": 1}])
    assert chroma.get_by_ids(["z", "nope", "id-0", "z"]) == [
        Document("New.", id="z"),
        Document(
            "Steel rusts.", id="id-0", metadata={"only": 1}
        ),  # Chroma's own upsert would merge the old metadata in
    ]
    chroma.update_documents(["id-1"], [Document("Changed.", metadata={"new": True})])
    assert chroma.get_by_ids(["id-1"])[0].metadata == {"new": True}
    assert chroma.verify().clean
    chroma.delete(["id-2", "unknown"])
    chroma.delete(where={"place": 3})
    chroma.delete([])
    assert len(chroma.get()["ids"]) == 4
    assert chroma.verify().clean
    assert chroma.gc().states == 3, "cats, rain and honey are used by no record any more"
    assert chroma.store.stats().states == 4


def test_writing_from_generators_and_without_ids(chroma: KaLMChroma) -> None:
    ids = chroma.add_texts(f"Text {i}." for i in range(5))
    assert len(set(ids)) == 5
    assert [d.page_content for d in chroma.get_by_ids(ids)] == [f"Text {i}." for i in range(5)]
    more = chroma.add_documents(d for d in [Document("a", id="mine"), Document("b")])
    assert more[0] == "mine"
    assert asyncio.run(chroma.aadd_documents(iter([Document("c", id="yours")]))) == ["yours"]
    assert chroma.add_texts([]) == []
    assert chroma.get_by_ids([]) == []
    assert chroma.verify().clean


def test_bad_writes(chroma: KaLMChroma) -> None:
    chroma.add_documents(documents())
    with pytest.raises(InputError, match=r"1 of 2 ids are unknown \(first: 'nope'\)"):
        chroma.update_documents(["id-0", "nope"], [Document("x"), Document("y")])
    assert chroma.get_by_ids(["id-0"])[0].page_content == TEXTS[0]
    with pytest.raises(InputError, match="id 'a' occurs twice"):
        chroma.add_texts(["x", "y"], ids=["a", "a"])
    with pytest.raises(InputError, match="got 1 ids, 2 texts"):
        chroma.add_texts(["x", "y"], ids=["a"])
    with pytest.raises(InputError, match="passages is one string"):
        chroma.add_texts("text")
    with pytest.raises(InputError, match="filter_complex_metadata"):
        chroma.add_texts(["x"], metadatas=[{"nested": {"a": 1}}])
    with pytest.raises(InputError, match="neither ids nor a filter"):
        chroma.delete()
    with pytest.raises(InputError, match="unknown arguments: force"):
        chroma.delete(["id-0"], force=True)
    with pytest.raises(InputError, match="unknown arguments: metadata"):
        chroma.add_texts(["x"], metadata=[{}])


def test_thousands_in_one_call(chroma: KaLMChroma) -> None:
    """Chroma takes 5,461 records a call; langchain-chroma's ``add_texts`` hands over all of them."""
    count = 6000
    ids = chroma.add_documents([Document(f"n{i % 4000}", id=str(i)) for i in range(count)])
    assert len(ids) == count
    assert chroma._collection.count() == count
    assert chroma.store.stats().states == 4000, "the same text under two ids is encoded and stored once"
    assert len(chroma.get_by_ids(ids)) == count


def test_records_of_others(chroma: KaLMChroma, tiny: Reranker) -> None:
    """Records that plain Chroma wrote: without states, without metadata, without text, edited behind our back."""
    plain = Chroma(chroma._collection_name, VECTORS, client=chroma._client)
    plain.add_texts(TEXTS, ids=list("abcde"))
    chroma._collection.add(ids=["bare"], embeddings=[[0.0] * 6])
    assert chroma.verify().missing == list("abcde")
    assert [d.id for d in chroma.get_by_ids(["e", "bare", "a"])] == ["e", "a"]
    found = KaLMRetriever(vectorstore=chroma, k=5).invoke(QUERY)
    assert [d.page_content for d in found] == [TEXTS[r.index] for r in tiny.rank(QUERY, TEXTS)]
    chroma.gc()
    assert not chroma.verify().missing, "states encoded at query time are kept with their records"
    chroma.backfill()
    assert chroma.verify().clean
    plain.update_document("a", Document("Edited.", metadata={"by": "another"}))
    assert chroma.verify().stale == ["a"]
    fresh = next(d for d in KaLMRetriever(vectorstore=chroma, k=5).invoke(QUERY) if d.id == "a")
    assert fresh.metadata["relevance_score"] == pytest.approx(tiny.rank(QUERY, ["Edited."])[0].probability, abs=1e-6)


@pytest.mark.parametrize("cleanup", ["incremental", "full"])
def test_indexing_api(chroma: KaLMChroma, cleanup: Any) -> None:
    manager = InMemoryRecordManager("test")
    manager.create_schema()

    def run(docs: list[Document]) -> Any:
        return index(docs, manager, chroma, cleanup=cleanup, source_id_key="source", key_encoder="sha256")

    def from_source(*texts: str) -> list[Document]:
        return [Document(t, metadata={"source": "s"}) for t in texts]

    assert run(from_source("one", "two", "three"))["num_added"] == 3
    assert run(from_source("one", "two", "three"))["num_skipped"] == 3
    changed = run(from_source("one", "four"))
    assert (changed["num_added"], changed["num_deleted"]) == (1, 2)
    assert chroma.verify().clean
    assert chroma.gc().states == 2
    assert chroma.store.stats().states == chroma.store.stats().references == 2


def test_searching_is_chromas_own(chroma: KaLMChroma) -> None:
    chroma.add_documents(documents())
    plain = Chroma(chroma._collection_name, VECTORS, client=chroma._client)
    assert chroma.similarity_search(QUERY, k=3) == plain.similarity_search(QUERY, k=3)
    assert chroma.as_retriever().invoke(QUERY) == plain.as_retriever().invoke(QUERY)
    reranked = chroma.rerank(QUERY, k=2, filter={"place": {"$gt": 1}}, instructions="Find food.", keep_margin=True)
    assert all(d.metadata["place"] > 1 and "relevance_margin" in d.metadata for d in reranked)
    assert len(chroma.rerank(QUERY, k=2, where_document={"$contains": "honey"})) == 1


def test_collections_come_and_go(chroma: KaLMChroma) -> None:
    chroma.add_documents(documents())
    chroma.reset_collection()
    assert chroma.store.stats().references == 0
    chroma.add_texts(["again"])
    assert chroma.verify().clean
    assert chroma.gc().states == 5


def test_constructors_and_persistence(tiny: Reranker, tiny_folder: Path, tmp_path: Path) -> None:
    made = KaLMChroma.from_documents(
        documents(),
        VECTORS,
        collection_name="kept",
        persist_directory=str(tmp_path),
        model=str(tiny_folder),
        device="cpu",
        codec="int8",
        ratio=2,
    )
    assert (tmp_path / FILE_NAME).exists()
    wanted = made.rerank(QUERY)
    made.close()
    again = KaLMChroma("kept", VECTORS, str(tmp_path))  # model, ratio and codec are those it was made with
    assert again.rerank(QUERY) == wanted
    assert (again.store.layout.ratio, again.store.layout.codec.value) == (2, "int8")
    retriever = KaLMRetriever(vectorstore=again, k=2, instructions="Find food.")
    copied = pickle.loads(pickle.dumps(retriever))
    assert copied.invoke(QUERY) == retriever.invoke(QUERY)
    assert len(pickle.dumps(retriever)) < 10_000
    assert (
        len(
            KaLMChroma.from_texts(
                iter(["a", "b"]), VECTORS, reranker=tiny, collection_name="ab" + uuid.uuid4().hex
            ).get()["ids"]
        )
        == 2
    )
    for store in (again, copied.vectorstore):
        store.close()


def test_bad_stores(chroma: KaLMChroma, tiny: Reranker) -> None:
    with pytest.raises(InputError, match="only a KaLMChroma made with persist_directory"):
        pickle.dumps(chroma)
    with pytest.raises(InputError, match="reranker and model settings were both given"):
        KaLMChroma(reranker=tiny, model="nano")
    with pytest.raises(InputError, match="missing is 'guess'"):
        KaLMChroma(missing="guess")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'modle'"):
        KaLMChroma(modle="nano")  # type: ignore[call-arg]


def test_bundled_vectors(pico: Reranker) -> None:
    """Without an embedding function one encoder pass gives vector and states; foreign vectors are refused."""
    store = KaLMChroma(f"bundled-{uuid.uuid4()}", reranker=pico)
    store.add_texts(TEXTS)
    assert [d.page_content for d in store.similarity_search(QUERY, k=1)] == ["Bees make honey."]
    assert [d.page_content for d in store.rerank(QUERY, k=1)] == ["Bees make honey."]
    vector = store._collection.get(limit=1, include=["embeddings", "documents"])
    same = KaLMEmbeddings(reranker=pico).embed_documents(vector["documents"])[0]
    assert same == pytest.approx(list(vector["embeddings"][0]), abs=1e-3)
    assert store.similarity_search_with_relevance_scores(QUERY, k=1)[0][1] > 0.5
    foreign = Chroma(f"foreign-{uuid.uuid4()}", VECTORS, client=store._client)
    foreign.add_texts(["x"])
    with pytest.raises(InputError, match="holds vectors of width 6 made by another embedder"):
        KaLMChroma(foreign._collection_name, client=store._client, reranker=pico)


def test_missing_framework_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.startswith("kalm_rag.langchain")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langchain_chroma", None)
    package = importlib.import_module("kalm_rag.langchain")
    with pytest.raises(MissingDependencyError, match=r"needs langchain-chroma.* pip install 'kalm-rag\[langchain\]'"):
        _ = package.KaLMChroma
    assert package.KaLMRetriever(vectorstore=InMemoryVectorStore(VECTORS)).k == 4, "the others need langchain-core only"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


# --- byte view


def test_bytes_travel_between_stores_and_damage_is_named(tiny: Reranker, tmp_path: Path) -> None:
    for codec in ("exact", "int8"):
        source, target = (open_store(tmp_path / f"{codec}-{i}", tiny.layout(codec)) for i in range(2))
        states = tiny.encode(TEXTS)
        source.put_many(
            states, [Reference(collection_id="c", record_id=t, key=s.key) for t, s in zip(TEXTS, states, strict=True)]
        )
        values = StateByteStore(source, "c").mget(TEXTS)
        StateByteStore(target, "c").mset([(t, v) for t, v in zip(TEXTS, values, strict=True) if v is not None])
        keys = [s.key for s in states]
        before, after = (tiny.score(QUERY, s.get_many(keys).batch or []) for s in (source, target))
        assert before == after
        view, whole = StateByteStore(target, "c"), values[0] or b""
        with pytest.raises(InputError, match=r"value of 'x' is not what StateByteStore gives \(4 bytes\)"):
            view.mset([("x", b"oops")])
        with pytest.raises(StoreFormatError, match="value of 'x' holds"):
            view.mset([("x", whole[:-4])])
        with pytest.raises(StateMismatchError, match="model fingerprint"):
            view.mset([("x", whole[:5] + b"\0" * 16 + whole[21:])])
        source.close()
        target.close()


class Constant(DeterministicFakeEmbedding):
    """One vector for everything: another embedding model, as far as a collection can tell."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [[1.0, *[0.0] * (self.size - 1)] for _ in texts]


def test_added_again_under_other_embeddings_vectors_are_theirs(chroma: KaLMChroma, tiny: Reranker) -> None:
    """As in Chroma itself; LangChain's ``index(force_update=True)`` counts on it."""
    given = [Document(TEXTS[0], id="x")]
    place = {"client": chroma._client, "reranker": tiny, "store": chroma.store}
    other = KaLMChroma(chroma._collection_name, Constant(size=6), **place)  # type: ignore[arg-type]
    for add in (other.add_documents, lambda documents: other.update_documents(["x"], documents)):
        chroma.add_documents(given)
        add(given)
        assert list(other.get(include=["embeddings"])["embeddings"][0]) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_engines_are_loaded_again_after_a_release(tiny_folder: Path, tmp_path: Path) -> None:
    store = KaLMChroma("docs", VECTORS, persist_directory=str(tmp_path), model=str(tiny_folder))
    store.add_documents(documents())
    first = store.rerank(QUERY, k=2)
    release_engines()
    assert store.rerank(QUERY, k=2) == first
    assert store.verify().clean
    store.close()
    release_engines()


def test_no_instructions_in_a_config_leaves_the_components_own(compressor: KaLMDocumentCompressor) -> None:
    told = compressor.with_instructions("Find animals.")
    step = told.as_runnable()
    given = {"query": QUERY, "documents": documents()}
    assert step.invoke(given, {"configurable": {"kalm_instructions": None}}) == step.invoke(given)
    assert step.invoke(given) != compressor.as_runnable().invoke(given)


def test_a_deep_copy_shares_the_engine(compressor: KaLMDocumentCompressor) -> None:
    twin = copy.deepcopy(compressor)
    assert twin.reranker is compressor.reranker
    assert twin.compress_documents(documents(), QUERY) == compressor.compress_documents(documents(), QUERY)


def test_a_filter_of_the_stores_own_kind(tiny: Reranker) -> None:
    vectors = InMemoryVectorStore(VECTORS)
    vectors.add_documents(documents())
    retriever = KaLMRetriever(
        vectorstore=vectors,
        compressor=KaLMDocumentCompressor(reranker=tiny),
        filter=lambda d: d.metadata["place"] == 3,
    )
    assert [d.id for d in retriever.invoke(QUERY)] == ["id-3"]
    with pytest.raises(ValidationError, match="search_kwargs has k; give k"):
        KaLMRetriever(vectorstore=vectors, search_kwargs={"k": 10})


def test_gc_leaves_states_that_were_brought_in_as_bytes(chroma: KaLMChroma, tiny: Reranker) -> None:
    chroma.add_documents(documents(TEXTS[:1]))
    kept, made = open_store(":memory:", tiny.layout()), tiny.encode(TEXTS[1:2])
    kept.put_many(made, [Reference(collection_id="kalm_rag:bytes", record_id="x", key=made[0].key)])
    source = StateByteStore(kept)
    ours = StateByteStore(chroma.store)
    ours.mset([("x", source.mget(["x"])[0])])  # type: ignore[list-item]
    chroma.gc()
    assert ours.mget(["x"]) == source.mget(["x"])
