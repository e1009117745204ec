"""Habits of apps on LlamaIndex: rewritten nodes, locked stores, query modes, tools."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from pathlib import Path

import chromadb
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.tools import RetrieverTool
from llama_index.core.vector_stores.types import VectorStoreQueryMode
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_nodes import EMBEDDING, QUERY, engine_of, got, make_nodes, same, scored, stored

from kalm_rag import Reranker
from kalm_rag.llama_index import KaLMChromaVectorStore


class TestWhatIsKept:
    def test_nodes_rewritten_for_a_query_are_cached_only(self, vectors: KaLMChromaVectorStore) -> None:
        """What replaces the text (a window in the metadata, say) filled the store, and nothing referred to it."""
        vectors.add(make_nodes())
        widen = MetadataReplacementPostProcessor(target_metadata_key="topic")
        index = VectorStoreIndex.from_vector_store(vectors, embed_model=EMBEDDING)
        app = engine_of(index, widen)
        app._node_postprocessors.append(vectors.as_postprocessor(top_n=None))
        seen = [app.query(QUERY).source_nodes for _ in range(2)]
        assert {n.text for n in seen[0]} == {"t0", "t1"}
        same(got(seen[0]), got(seen[1]))
        assert stored(vectors) == 4
        assert vectors.verify().clean
        again = vectors.as_postprocessor(top_n=None, missing="raise")
        assert len(again.postprocess_nodes(seen[0], query_str=QUERY)) == 4  # the cache has them

    def test_a_records_states_are_kept_with_its_reference(
        self, collection: chromadb.Collection, tiny: Reranker
    ) -> None:
        ChromaVectorStore(chroma_collection=collection).add(make_nodes())  # somebody else filled it
        vectors = KaLMChromaVectorStore(collection, reranker=tiny)
        assert vectors.verify().missing
        index = VectorStoreIndex.from_vector_store(vectors, embed_model=EMBEDDING)
        found = index.as_retriever(similarity_top_k=9).retrieve(QUERY)
        elsewhere = scored(make_nodes(["Of another store."]))
        vectors.as_postprocessor().postprocess_nodes([*found, *elsewhere], query_str=QUERY)
        assert vectors.verify().clean
        assert stored(vectors) == 4

    def test_records_that_cannot_be_read_take_no_answer_away(
        self, vectors: KaLMChromaVectorStore, client: chromadb.ClientAPI, caplog: pytest.LogCaptureFixture
    ) -> None:
        post = vectors.as_postprocessor(top_n=None)
        client.delete_collection(vectors.client.name)
        with caplog.at_level(logging.WARNING, "kalm_rag"):
            assert len(post.postprocess_nodes(scored(), query_str=QUERY)) == 4
        assert "cached only, because their records can't be read" in caplog.text

    def test_a_locked_store_holds_no_query_up(self, tmp_path: Path, tiny: Reranker) -> None:
        """Each query with an unseen text waited 30 s, only to keep its state."""
        vectors = KaLMChromaVectorStore.from_params("docs", persist_dir=str(tmp_path), reranker=tiny)
        ChromaVectorStore(chroma_collection=vectors.client).add(make_nodes())
        post, nodes = vectors.as_postprocessor(top_n=None), scored()
        vectors.parts.get()
        lock = sqlite3.connect(tmp_path / "kalm_states.sqlite3")
        lock.execute("BEGIN IMMEDIATE")
        for most in (5.0, 0.4):  # the second query finds them in the process's cache
            started = time.perf_counter()
            assert len(post.postprocess_nodes(nodes, query_str=QUERY)) == 4
            assert time.perf_counter() - started < most
        lock.close()
        assert stored(vectors) == 0
        vectors.close()


@pytest.mark.parametrize("mode", [m for m in VectorStoreQueryMode if m.value not in ("sparse", "text_search")])
def test_query_modes_are_the_parents(client: chromadb.ClientAPI, tiny: Reranker, mode: VectorStoreQueryMode) -> None:
    """Also MMR, with its arguments, in both ways of asking. Modes without a vector have no scores in either."""
    options = [{}, {"mmr_threshold": 0.2}, {"mmr_prefetch_k": 3}] if mode == VectorStoreQueryMode.MMR else [{}]
    for number, kwargs in enumerate(options):
        found = []
        for name, fields in (("theirs", {}), ("ours", {"reranker": tiny})):
            collection = client.create_collection(f"{name}-{mode.value}-{number}")
            kind = KaLMChromaVectorStore if fields else ChromaVectorStore
            store = kind(chroma_collection=collection, **fields)
            store.add(make_nodes())
            retriever = VectorStoreIndex.from_vector_store(store, embed_model=EMBEDDING).as_retriever(
                similarity_top_k=2, vector_store_query_mode=mode, vector_store_kwargs=kwargs
            )
            found += [retriever.retrieve(QUERY), asyncio.run(retriever.aretrieve(QUERY))]
            client.delete_collection(collection.name)
        assert len(found[0]) == 2
        assert [[(n.node_id, n.score) for n in one] for one in found] == [[(n.node_id, n.score) for n in found[0]]] * 4


def test_a_tools_line_ends_do_not_reach_the_decoder(vectors: KaLMChromaVectorStore) -> None:
    """RetrieverTool hands over the question with line ends before or behind it; they moved the scores."""
    vectors.add(make_nodes())
    retriever = VectorStoreIndex.from_vector_store(vectors, embed_model=EMBEDDING).as_retriever(similarity_top_k=9)
    post = vectors.as_postprocessor(top_n=None)
    truth = got(post.postprocess_nodes(scored(), query_str=QUERY))
    tool = RetrieverTool.from_defaults(retriever, [post])
    for output in (tool.call(QUERY), asyncio.run(tool.acall(QUERY))):
        assert str(output.raw_input["input"]) != QUERY
        same(got(output.raw_output), truth)
