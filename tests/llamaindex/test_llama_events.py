"""Events, callbacks, threads and tasks around a rerank."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_nodes import QUERY, documents, engine_of, got, index_of, recorded, same, scored

from kalm_rag import Reranker
from kalm_rag.errors import InputError, MissingStateError
from kalm_rag.llama_index import KaLMChromaVectorStore, KaLMNodePostprocessor
from kalm_rag.store.base import Fetched
from kalm_rag.store.memory import MemoryStore


class TestEvents:
    @pytest.mark.parametrize("top_n", [2, None])
    @pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
    def test_start_and_end_are_paired_and_spanned(self, tiny: Reranker, top_n: int | None, is_async: bool) -> None:
        post = KaLMNodePostprocessor(reranker=tiny, top_n=top_n)
        nodes = scored()
        with recorded() as (events, spans):
            if is_async:
                ranked = asyncio.run(post.apostprocess_nodes(nodes, query_str=QUERY))
            else:
                ranked = post.postprocess_nodes(nodes, query_str=QUERY)
        start, end = events
        assert (start.query.query_str, start.top_n, start.model_name) == (QUERY, top_n or 4, post.model)
        assert [n.score for n in start.nodes] == [n.score for n in nodes]  # still those of the retriever
        assert end.nodes == ranked
        assert [s.id_.split("-")[0] for s in spans.completed_spans] == [
            f"KaLMNodePostprocessor.{'_a' if is_async else '_'}postprocess_nodes"
        ]

    def test_they_are_paired_when_scoring_fails(self, tiny: Reranker) -> None:
        debug = LlamaDebugHandler(print_trace_on_end=False)
        post = KaLMNodePostprocessor(
            reranker=tiny,
            store=MemoryStore(tiny.layout()),
            missing="raise",
            callback_manager=CallbackManager([debug]),
        )
        with recorded() as (events, _), pytest.raises(MissingStateError, match="no stored states"):
            post.postprocess_nodes(scored(), query_str=QUERY)
        assert [type(e) for e in events] == [ReRankStartEvent, ReRankEndEvent]
        assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 1
        with recorded() as (events, _), pytest.raises(InputError, match="no query was given"):
            post.postprocess_nodes(scored())
        assert events == []  # refused before anything started

    def test_a_subclass_with_its_own_hook_is_heard_in_async_engines_too(self, tiny: Reranker) -> None:
        """An app overrides the hook that LlamaIndex documents; its async engines went past it."""

        class Boosted(KaLMNodePostprocessor):
            def _postprocess_nodes(
                self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
            ) -> list[NodeWithScore]:
                ranked = super()._postprocess_nodes(nodes, query_bundle)
                return [NodeWithScore(node=n.node, score=n.get_score() + 10) for n in ranked]

        post = Boosted(reranker=tiny, instructions="Find rivers.")
        sync = post.postprocess_nodes(scored(), query_str=QUERY)
        assert min(n.get_score() for n in sync) > 10
        assert got(asyncio.run(post.apostprocess_nodes(scored(), query_str=QUERY))) == got(sync)

    def test_query_engines_assign_their_callbacks(self, vectors: KaLMChromaVectorStore) -> None:
        debug = LlamaDebugHandler(print_trace_on_end=False)
        post = vectors.as_postprocessor()
        app = RetrieverQueryEngine.from_args(
            index_of(vectors, documents()).as_retriever(similarity_top_k=4),
            llm=MockLLM(max_tokens=4),
            node_postprocessors=[post],
            callback_manager=CallbackManager([debug]),
        )
        app.query(QUERY)
        ((start, end),) = debug.get_event_pairs(CBEventType.RERANKING)
        assert start.payload is not None
        assert start.payload["query_str"] == QUERY
        assert end.payload is not None
        assert len(end.payload["nodes"]) == 3


class TestConcurrency:
    def test_eight_threads_and_fifty_tasks_score_as_one(self, vectors: KaLMChromaVectorStore) -> None:
        index = index_of(vectors, documents())
        app = engine_of(index, vectors.as_postprocessor(top_n=None))
        queries = [f"River {i}?" for i in range(50)]
        alone = [got(app.query(q).source_nodes) for q in queries]

        async def all_at_once() -> list[Any]:
            return await asyncio.gather(*(app.aquery(q) for q in queries))

        with ThreadPoolExecutor(8) as pool:
            threaded = [got(r.source_nodes) for r in pool.map(app.query, queries)]
        together = [got(r.source_nodes) for r in asyncio.run(all_at_once())]
        for found, wanted in zip([*threaded, *together], alone * 2, strict=True):
            same(found, wanted)  # queries that share a decoder pass differ by no more than rounding

    def test_one_engine_and_one_store_for_all_threads(self, tiny_folder: Path, tmp_path: Path) -> None:
        posts = [KaLMNodePostprocessor(model=str(tiny_folder), device="cpu", store=tmp_path) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda p: p.postprocess_nodes(scored(), query_str=QUERY), posts))
            parts = list(pool.map(lambda p: p.parts.get(), posts))
        assert len({id(engine) for engine, _ in parts}) == 1
        assert len({id(store) for _, store in parts}) == 1

    def test_the_event_loop_stays_responsive(self, tiny: Reranker) -> None:
        """The rerank waits for the loop: held up by it, the loop could not let it go on."""
        ticked = threading.Event()

        class Waiting(MemoryStore):
            def get_many(self, keys: Sequence[str]) -> Fetched:
                assert ticked.wait(60), "the loop stood still while a rerank ran"
                return super().get_many(keys)

        post = KaLMNodePostprocessor(reranker=tiny, store=Waiting(tiny.layout()))

        async def rerank() -> list[NodeWithScore]:
            work = asyncio.create_task(post.apostprocess_nodes(scored(), query_str=QUERY))
            await asyncio.sleep(0.01)
            ticked.set()
            return await work

        assert len(asyncio.run(rerank())) == 3
