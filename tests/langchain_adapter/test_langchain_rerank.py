"""The step of an LCEL chain."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_documents import QUERY, documents

from kalm_rag.errors import InputError
from kalm_rag.langchain import KaLMChroma, KaLMDocumentCompressor, KaLMRetriever


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


def test_no_instructions_in_a_config_leaves_the_components_own(compressor: KaLMDocumentCompressor) -> None:
    told = compressor.with_instructions("Find animals.")
    step = told.as_runnable()
    given = {"query": QUERY, "documents": documents()}
    assert step.invoke(given, {"configurable": {"kalm_instructions": None}}) == step.invoke(given)
    assert step.invoke(given) != compressor.as_runnable().invoke(given)
