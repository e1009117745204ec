"""Recipes with other packages: vectors in FAISS, Qdrant or LanceDB and states in a store of ours; hybrid retrieval.

Each needs a package that only the extra 'dev' brings, and is skipped without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_core", reason="langchain-core is not installed (extra 'langchain')")

from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from langchain_documents import QUERY, TEXTS, VECTORS, documents

from kalm_rag import Reranker, open_store
from kalm_rag.langchain import KaLMDocumentCompressor, KaLMRetriever
from kalm_rag.store import Reference, StateStore

MANY = [*TEXTS, *(f"Fact {number} about rivers." for number in range(55))]


@pytest.fixture
def states(tiny: Reranker, tmp_path: Path) -> Iterator[StateStore]:
    """A store of ours that holds the states of `MANY`, written when they were indexed."""
    store = open_store(tmp_path / "states", tiny.layout())
    read = tiny.encode(MANY)
    store.put_many(
        read,
        [Reference(collection_id="elsewhere", record_id=f"id-{i}", key=one.key) for i, one in enumerate(read)],
    )
    yield store
    store.close()


def best(tiny: Reranker, texts: list[str], count: int) -> list[str]:
    return [texts[ranked.index] for ranked in tiny.rank(QUERY, texts, top_n=count)]


def texts_of(found: list[Document]) -> list[str]:
    return [document.page_content for document in found]


def check_a_store_elsewhere(vectors: VectorStore, tiny: Reranker, states: StateStore, one: Any) -> None:
    """Candidates of its search, and of its MMR, are scored by stored states; its own filter holds, and is lifted."""
    compressor = KaLMDocumentCompressor(reranker=tiny, store=states, missing="raise")  # nothing may be encoded now
    retriever = KaLMRetriever(vectorstore=vectors, compressor=compressor, k=3, fetch_k=60)
    found = retriever.invoke(QUERY)
    assert texts_of(found) == best(tiny, MANY, 3)
    assert texts_of(asyncio.run(retriever.ainvoke(QUERY))) == texts_of(found)
    assert all(isinstance(d.metadata["relevance_score"], float) for d in found)
    scored = retriever.model_copy(update={"keep_retrieval_score": True}).invoke(QUERY)
    assert all(isinstance(d.metadata["retrieval_score"], float) for d in scored)
    filtered = KaLMRetriever(vectorstore=vectors, compressor=compressor, k=3, fetch_k=60, filter=one)
    assert texts_of(filtered.invoke(QUERY)) == [TEXTS[3]]
    assert texts_of(filtered.invoke(QUERY, filter=None)) == texts_of(found)
    unlike = KaLMRetriever(vectorstore=vectors, compressor=compressor, k=3, fetch_k=5, search_type="mmr")
    assert len(unlike.invoke(QUERY)) == 3
    assert states.stats().states == len(MANY)


def test_vectors_in_faiss(tiny: Reranker, states: StateStore) -> None:
    pytest.importorskip("faiss", reason="faiss-cpu is not installed (extra 'dev')")
    stores = pytest.importorskip("langchain_community.vectorstores", reason="langchain-community is not installed")
    vectors = stores.FAISS.from_documents(documents(MANY), VECTORS)
    check_a_store_elsewhere(vectors, tiny, states, {"place": 3})


def test_vectors_in_qdrant(tiny: Reranker, states: StateStore) -> None:
    qdrant = pytest.importorskip("langchain_qdrant", reason="langchain-qdrant is not installed (extra 'dev')")
    models = pytest.importorskip("qdrant_client.models")
    vectors = qdrant.QdrantVectorStore.from_texts(
        MANY, VECTORS, [d.metadata for d in documents(MANY)], location=":memory:"
    )
    third = models.FieldCondition(key="metadata.place", match=models.MatchValue(value=3))
    check_a_store_elsewhere(vectors, tiny, states, models.Filter(must=[third]))


def test_vectors_in_lancedb(tiny: Reranker, states: StateStore, tmp_path: Path) -> None:
    pytest.importorskip("lancedb", reason="lancedb is not installed (extra 'dev')")
    stores = pytest.importorskip("langchain_community.vectorstores", reason="langchain-community is not installed")
    places = [d.metadata for d in documents(MANY)]
    vectors = stores.LanceDB.from_texts(MANY, VECTORS, places, uri=str(tmp_path / "vectors"))
    check_a_store_elsewhere(vectors, tiny, states, "metadata.place = 3")


def test_hybrid_retrieval(tiny: Reranker, states: StateStore) -> None:
    """BM25 and vectors, joined by LangChain's own rank fusion, under the reranker."""
    classic = pytest.importorskip("langchain_classic.retrievers", reason="langchain-classic is not installed")
    pytest.importorskip("rank_bm25", reason="rank-bm25 is not installed (extra 'dev')")
    lexical = pytest.importorskip("langchain_community.retrievers", reason="langchain-community is not installed")
    from langchain_core.vectorstores import InMemoryVectorStore

    given = documents(MANY)
    vectors = InMemoryVectorStore(DeterministicFakeEmbedding(size=6))
    vectors.add_documents(given)
    words: BaseRetriever = lexical.BM25Retriever.from_documents(given, k=5)
    near = vectors.as_retriever(search_kwargs={"k": 5})
    assert "Bees make honey." in texts_of(words.invoke("bees honey."))
    joined = classic.EnsembleRetriever(retrievers=[words, near], weights=[0.5, 0.5])
    compressor = KaLMDocumentCompressor(reranker=tiny, store=states, missing="raise", top_n=3)
    behind = classic.ContextualCompressionRetriever(base_compressor=compressor, base_retriever=joined)
    candidates = texts_of(joined.invoke(QUERY))
    assert set(candidates) == {*texts_of(words.invoke(QUERY)), *texts_of(near.invoke(QUERY))}
    found = behind.invoke(QUERY)
    assert texts_of(found) == best(tiny, candidates, 3)
    assert asyncio.run(behind.ainvoke(QUERY)) == found
