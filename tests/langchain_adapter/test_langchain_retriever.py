"""The retriever in two phases, over our vector store and others."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Any

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_documents import QUERY, TEXTS, VECTORS, documents
from pydantic import ValidationError

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.langchain import KaLMChroma, KaLMDocumentCompressor, KaLMRerank, KaLMRetriever


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
    assert compressor.top_n == 4, "the retriever's k is not the compressor's business"


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
    with pytest.raises(InputError, match="query is int; wanted a string"):
        asyncio.run(retriever.ainvoke(3))  # type: ignore[arg-type]


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


class AsyncOnly(InMemoryVectorStore):
    """As a store that was opened in async mode."""

    def similarity_search(self, *args: Any, **kwargs: Any) -> list[Document]:
        raise NotImplementedError("opened in async mode")

    def similarity_search_with_score(self, *args: Any, **kwargs: Any) -> list[tuple[Document, float]]:
        raise NotImplementedError("opened in async mode")


def test_a_store_in_async_mode(tiny: Reranker) -> None:
    """The store's sync search was run in a thread, which such a store does not have."""
    store = AsyncOnly(VECTORS)
    asyncio.run(store.aadd_documents(documents()))
    for keep in (False, True):
        retriever = KaLMRetriever(
            vectorstore=store, compressor=KaLMDocumentCompressor(reranker=tiny), k=2, keep_retrieval_score=keep
        )
        found = asyncio.run(retriever.ainvoke(QUERY))
        assert [d.page_content for d in found] == [TEXTS[r.index] for r in tiny.rank(QUERY, TEXTS, top_n=2)]
        assert all(("retrieval_score" in d.metadata) is keep for d in found)


class FiltersLate(InMemoryVectorStore):
    """As FAISS: looks at `fetch_k` records, then filters."""

    def similarity_search(
        self, query: str, k: int = 4, filter: Any = None, fetch_k: int = 20, **kwargs: Any
    ) -> list[Document]:
        return [d for d in super().similarity_search(query, k=fetch_k) if filter is None or filter(d)][:k]


def test_a_store_that_filters_late(tiny: Reranker, caplog: pytest.LogCaptureFixture) -> None:
    """It gave nothing, without a word, and its own fetch_k could not be set."""
    store = FiltersLate(VECTORS)
    store.add_documents(documents([f"Fact {i}." for i in range(60)]))
    far = store.similarity_search(QUERY, k=60, fetch_k=60)
    settings: dict[str, Any] = {
        "vectorstore": store,
        "compressor": KaLMDocumentCompressor(reranker=tiny),
        "filter": lambda d: d in far[30:33],
        "k": 2,
    }
    assert len(KaLMRetriever(**settings).invoke(QUERY)) == 2, "our 50 candidates, not its own 20"
    assert len(KaLMRetriever(**settings, fetch_k=2, search_kwargs={"fetch_k": 60}).invoke(QUERY)) == 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert KaLMRetriever(**settings, fetch_k=2).invoke(QUERY) == []
    assert "looked at 20 records and gave none that its filter lets through" in caplog.text


def test_top_n_of_a_compressor_is_the_retrievers_k(chroma: KaLMChroma) -> None:
    """It was overridden by `k`, without a word."""
    chroma.add_documents(documents())
    one = chroma.as_compressor(top_n=1)
    assert len(KaLMRetriever(vectorstore=chroma, compressor=one).invoke(QUERY)) == 1
    assert len(KaLMRetriever(vectorstore=chroma, compressor=one).invoke(QUERY, k=2)) == 2
    assert len(KaLMRetriever(vectorstore=chroma, compressor=chroma.as_compressor(), k=2).invoke(QUERY)) == 2
    every = KaLMRetriever(vectorstore=chroma, compressor=chroma.as_compressor(top_n=None))
    assert len(every.invoke(QUERY)) == len(TEXTS) == 5, "None is all, and was taken for nothing said"
    assert len(every.invoke(QUERY, k=2)) == 2
    assert len(every.invoke(QUERY, fetch_k=3)) == 3
    assert len(asyncio.run(KaLMRetriever(vectorstore=chroma).ainvoke(QUERY, k=None))) == 5
    with pytest.raises(ValidationError, match="k is 2 and the compressor's top_n 1; wanted one of them"):
        KaLMRetriever(vectorstore=chroma, compressor=one, k=2)
    assert len(chroma.rerank(QUERY, top_n=1)) == 1
    assert len(chroma.rerank(QUERY, 2, keep_margin=True)) == 2
    assert len(chroma.rerank(QUERY)) == 4
    with pytest.raises(InputError, match="k and top_n were both given"):
        chroma.rerank(QUERY, 2, top_n=2)
    with pytest.raises(InputError, match=r"rerank has no argument score_threshold\. Did you mean threshold\?"):
        chroma.rerank(QUERY, score_threshold=0.5)


def test_several_questions_at_once(chroma: KaLMChroma) -> None:
    """MultiQueryRetriever compares whole documents: each question's own score made one document look like three."""
    retrievers = pytest.importorskip("langchain_classic.retrievers", reason="langchain-classic is not installed")
    chroma.add_documents([Document(t, id=str(i)) for i, t in enumerate(TEXTS)])
    model = FakeListChatModel(responses=["what do bees eat?\nwho makes honey?\nhoney"])

    def asked(retriever: Any) -> list[str | None]:
        return [d.id for d in retriever.invoke(QUERY)]

    inside = KaLMRetriever(vectorstore=chroma, k=5, keep_score=False)
    found = asked(retrievers.MultiQueryRetriever.from_llm(retriever=inside, llm=model))
    assert sorted(found, key=str) == list("01234")
    outside = retrievers.ContextualCompressionRetriever(
        base_compressor=chroma.as_compressor(top_n=2),
        base_retriever=retrievers.MultiQueryRetriever.from_llm(retriever=chroma.as_retriever(), llm=model),
    )
    assert asked(outside) == asked(KaLMRetriever(vectorstore=chroma, k=2)), "ranked for the user's own question"


def test_blank_queries_of_agents(chroma: KaLMChroma) -> None:
    chroma.add_documents(documents())
    retriever = KaLMRetriever(vectorstore=chroma, k=2)
    wanted = [d.id for d in chroma.similarity_search(" ", k=2)]
    assert [d.id for d in retriever.invoke(" ")] == wanted
    assert [d.id for d in asyncio.run(retriever.ainvoke(" "))] == wanted


def test_what_people_write_instead_is_answered(chroma: KaLMChroma) -> None:
    retriever = KaLMRetriever(vectorstore=chroma)
    with pytest.raises(InputError, match=r"KaLMRetriever.invoke has no argument top_k\. Did you mean k\?"):
        retriever.invoke(QUERY, top_k=2)
    with pytest.raises(ValidationError, match=r"KaLMRetriever has no argument top_n\. Did you mean k\?"):
        KaLMRetriever(vectorstore=chroma, top_n=2)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="vectorstore is the retriever VectorStoreRetriever"):
        KaLMRetriever(vectorstore=chroma.as_retriever())  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="search_kwargs has fetch_k, which Chroma's search hasn't"):
        KaLMRetriever(vectorstore=chroma, search_kwargs={"fetch_k": 9})


def test_a_blank_query_of_the_bundled_vectors(pico: Reranker) -> None:
    store = KaLMChroma(f"blank-{uuid.uuid4()}", reranker=pico)
    store.add_texts(TEXTS)
    assert len(KaLMRetriever(vectorstore=store, k=2).invoke("")) == 2


def test_what_a_call_says_goes_before_its_chains_config(chroma: KaLMChroma) -> None:
    """The running chain's config was heard once more, in the compressor, and won."""
    chroma.add_documents(documents())
    retriever = KaLMRetriever(vectorstore=chroma)
    told = {"configurable": {"kalm_instructions": "Find animals."}}
    inside = RunnableLambda(lambda query: retriever.invoke(query, instructions="Find food."))
    assert inside.invoke(QUERY, config=told) == retriever.invoke(QUERY, instructions="Find food.")
    assert retriever.invoke(QUERY, instructions="Find food.") != retriever.invoke(QUERY, config=told)


def test_what_a_retriever_is_told_by_name_switches_off_its_compressors(chroma: KaLMChroma) -> None:
    """False and None were taken for nothing said, so that nothing could lift a compressor's settings."""
    chroma.add_documents(documents())
    chroma.add_texts([TEXTS[0]], ids=["again"])
    strict = chroma.as_compressor(top_n=None, drop_duplicates=True, max_tokens=30, threshold=1.0, keep_score=False)
    off: dict[str, Any] = {"drop_duplicates": False, "max_tokens": None, "threshold": None, "keep_score": True}

    def found(**named: Any) -> list[Document]:
        return KaLMRetriever(vectorstore=chroma, compressor=strict, **named).invoke(QUERY)

    assert found() == []
    every = found(**off)
    assert len(every) == 6
    assert all("relevance_score" in d.metadata for d in every)
    assert len({d.page_content for d in found(**{**off, "drop_duplicates": True})}) == 5
    assert "relevance_score" not in found(threshold=None, max_tokens=None)[0].metadata
    some = KaLMRetriever(vectorstore=chroma, compressor=strict, threshold=None)
    assert 0 < len(some.invoke(QUERY)) < 5, "the compressor's budget holds"
    copied = some.configurable_fields(k=ConfigurableField("how_many"))
    assert copied.invoke(QUERY, {"configurable": {"how_many": 5}}) == some.invoke(QUERY)
    again = KaLMRetriever(**{**some.model_dump(), "vectorstore": chroma, "compressor": some.compressor})
    assert again.invoke(QUERY) == some.invoke(QUERY)


def test_names_that_a_call_or_its_config_does_not_have(chroma: KaLMChroma) -> None:
    """They were ignored in a config, and in a call a private method was blamed."""
    retriever, step = KaLMRetriever(vectorstore=chroma), KaLMRerank(top_n=2)
    for key, meant in (
        ("kalm_topn", " Did you mean kalm_top_n"),
        ("kalm_k", " Did you mean kalm_top_n"),
        ("kalm_x", ""),
    ):
        for call in (retriever.invoke, lambda query, config: step.invoke({"query": query, "documents": []}, config)):
            with pytest.raises(InputError, match=rf"the config says {key}; wanted one of kalm_.*kalm_filter\.{meant}"):
                call(QUERY, {"configurable": {key: 2}})
    for wrong, told in (({"kalm_top_n": "2"}, "kalm_top_n is '2'"), ({"kalm_threshold": 3}, "kalm_threshold is 3")):
        with pytest.raises(InputError, match=rf"{told}; wanted .*, or None to leave it as it is"):
            retriever.invoke(QUERY, {"configurable": wrong})
    wanted = (
        "invoke got an unexpected keyword argument 'max_tokens'; wanted k, fetch_k, filter, instructions, threshold"
    )
    with pytest.raises(TypeError, match=rf"{wanted}\. It is an argument of the retriever itself"):
        retriever.invoke(QUERY, max_tokens=20)
    with pytest.raises(TypeError, match=wanted):
        asyncio.run(retriever.ainvoke(QUERY, max_tokens=20))
