"""The retriever in two phases, over our vector store and others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_core.vectorstores import InMemoryVectorStore
from langchain_documents import QUERY, TEXTS, VECTORS, documents
from pydantic import ValidationError

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.langchain import KaLMChroma, KaLMDocumentCompressor, KaLMRetriever


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
