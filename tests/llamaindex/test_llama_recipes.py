"""Recipes with other packages: vectors in Qdrant or LanceDB and states in a store of ours; LlamaIndex's hybrid search.

Each needs a package that only the extra 'dev' brings, and is skipped without it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import MetadataMode
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from llama_nodes import EMBEDDING, QUERY, TEXTS, documents, engine_of, expected, got, make_nodes, same

from kalm_rag import Reranker, open_store
from kalm_rag.llama_index import KaLMChromaVectorStore, KaLMNodePostprocessor, KaLMStateTransform

MANY = [*TEXTS, *(f"Fact {number} about rivers and bees." for number in range(20)), "Honey is made by bees."]


def check_a_store_elsewhere(vectors: BasePydanticVectorStore, tiny: Reranker, path: Path) -> None:
    """Indexing keeps the states in a file of ours; queries over a second opening of it find all of them."""
    with open_store(path, tiny.layout()) as states:
        given = documents(MANY)
        for number, document in enumerate(given):
            document.metadata["place"] = number
        index = VectorStoreIndex.from_documents(
            given,
            storage_context=StorageContext.from_defaults(vector_store=vectors),
            transformations=[SentenceSplitter(), KaLMStateTransform(reranker=tiny, store=states)],
            embed_model=EMBEDDING,
        )
        assert states.stats().states == len(MANY)
    with open_store(path, tiny.layout()) as states:
        post = KaLMNodePostprocessor(reranker=tiny, store=states, missing="raise", top_n=3)  # nothing is encoded now
        nodes = index.as_retriever(similarity_top_k=10).retrieve(QUERY)
        answer = engine_of(index, post).query(QUERY)
        truth = expected(tiny, nodes)
        same(got(answer.source_nodes), {i: truth[i] for i in list(truth)[:3]})
        second = MetadataFilters(filters=[MetadataFilter(key="place", value=2)])
        assert [n.text for n in engine_of(index, post, filters=second).query(QUERY).source_nodes] == [TEXTS[2]]


def test_vectors_in_qdrant(tiny: Reranker, tmp_path: Path) -> None:
    qdrant = pytest.importorskip(
        "llama_index.vector_stores.qdrant", reason="llama-index-vector-stores-qdrant is not installed (extra 'dev')"
    )
    client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
    check_a_store_elsewhere(qdrant.QdrantVectorStore("facts", client=client), tiny, tmp_path / "states.sqlite3")
    client.close()


def test_vectors_in_lancedb(tiny: Reranker, tmp_path: Path) -> None:
    lance = pytest.importorskip(
        "llama_index.vector_stores.lancedb", reason="llama-index-vector-stores-lancedb is not installed (extra 'dev')"
    )
    check_a_store_elsewhere(lance.LanceDBVectorStore(uri=str(tmp_path / "vectors")), tiny, tmp_path / "states.sqlite3")


def test_hybrid_retrieval(vectors: KaLMChromaVectorStore) -> None:
    """BM25 and vectors, joined by LlamaIndex's own rank fusion, under the reranker: the same nodes, states for all."""
    bm25 = pytest.importorskip(
        "llama_index.retrievers.bm25", reason="llama-index-retrievers-bm25 is not installed (extra 'dev')"
    )
    nodes = make_nodes(MANY)
    vectors.add(nodes)
    near = VectorStoreIndex.from_vector_store(vectors, embed_model=EMBEDDING).as_retriever(similarity_top_k=5)
    words = bm25.BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=5)
    question = "Who makes honey?"
    joined = QueryFusionRetriever(
        [near, words], llm=MockLLM(), num_queries=1, mode="reciprocal_rerank", similarity_top_k=10, use_async=False
    )
    ids = {n.node_id for retriever in (near, words) for n in retriever.retrieve(question)}
    candidates = joined.retrieve(question)
    assert sorted(n.node_id for n in candidates) == sorted(ids)  # a node that both found is there once
    assert nodes[-1].node_id in ids
    post = vectors.as_postprocessor(missing="raise", top_n=3)  # nothing is encoded now
    app = RetrieverQueryEngine.from_args(joined, llm=MockLLM(max_tokens=4), node_postprocessors=[post])
    texts = [n.node.get_content(metadata_mode=MetadataMode.EMBED) for n in candidates]
    best = [candidates[r.index].node_id for r in vectors.parts.get()[0].rank(question, texts, top_n=3)]
    assert [n.node_id for n in app.query(question).source_nodes] == best
    assert [n.node_id for n in asyncio.run(app.aquery(question)).source_nodes] == best
