"""Traces, event loops and threads: what is started ends, nobody waits, scores stay with their queries."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_documents import QUERY, VECTORS, Trace, Waiting, documents

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.langchain import KaLMChroma, KaLMDocumentCompressor, KaLMRetriever


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
    with pytest.raises(InputError, match="lone surrogate"):
        compressor.compress_documents(documents(), "\ud800", callbacks=[trace])
    slow = compressor.model_copy(update={"store": Waiting(tiny.layout())})

    async def cancelled() -> None:
        with pytest.raises(InputError, match="lone surrogate"):
            await compressor.acompress_documents(documents(), "\ud800", callbacks=[trace])
        task = asyncio.create_task(slow.acompress_documents(documents(), QUERY, callbacks=[trace]))
        await asyncio.to_thread(slow.store.asked.wait, 60)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        slow.store.answer.set()
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
    with pytest.raises(InputError, match="lone surrogate"):
        retriever.invoke("\ud800", config={"callbacks": [trace]})
    assert trace.paired()


def test_the_event_loop_stays_free(tiny: Reranker) -> None:
    """The rerank waits for the loop: held up by it, the loop could not let it go on."""
    vectors = InMemoryVectorStore(VECTORS)
    vectors.add_documents(documents())

    async def reranked(work: Callable[[KaLMDocumentCompressor], Any]) -> Any:
        store = Waiting(tiny.layout())
        task = asyncio.create_task(work(KaLMDocumentCompressor(reranker=tiny, store=store)))
        await asyncio.to_thread(store.asked.wait, 60)
        store.answer.set()
        return await task

    for work in (
        lambda compressor: compressor.acompress_documents(documents(), QUERY),
        lambda compressor: KaLMRetriever(vectorstore=vectors, compressor=compressor).ainvoke(QUERY),
        lambda compressor: compressor.as_runnable().ainvoke({"question": QUERY, "documents": documents()}),
    ):
        assert len(asyncio.run(reranked(work))) in (3, 4)


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
