"""The step of an LCEL chain."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import Any

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_core.documents import Document
from langchain_core.load import dumpd
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_documents import QUERY, Trace, documents
from pydantic import BaseModel

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.langchain import KaLMChroma, KaLMDocumentCompressor, KaLMRerank, KaLMRetriever


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
    with pytest.raises(InputError, match="unknown arguments model; the step takes its input, a config and"):
        step.invoke({"query": QUERY, "docs": []}, model="pico")


def test_no_instructions_in_a_config_leaves_the_components_own(compressor: KaLMDocumentCompressor) -> None:
    told = compressor.with_instructions("Find animals.")
    step = told.as_runnable()
    given = {"query": QUERY, "documents": documents()}
    assert step.invoke(given, {"configurable": {"kalm_instructions": None}}) == step.invoke(given)
    assert step.invoke(given) != compressor.as_runnable().invoke(given)


class Question(BaseModel):
    question: str
    documents: list[Document]


@dataclass
class Asked:
    query: str
    context: list[Document]


def test_states_of_a_graph_are_read(compressor: KaLMDocumentCompressor) -> None:
    """LangGraph hands a node its state: a dict, a pydantic model or a dataclass. Only dicts were read."""
    wanted = compressor.compress_documents(documents(), QUERY)
    step = compressor.as_runnable()
    assert step.invoke(Question(question=QUERY, documents=documents())) == wanted
    assert step.invoke(Asked(QUERY, documents())) == wanted
    assert step.invoke({"query": None, "question": QUERY, "documents": documents()}) == wanted
    with pytest.raises(InputError, match=r"keys \['context'\]; wanted one of query"):
        step.invoke({"context": documents()})
    with pytest.raises(InputError, match="input is type; wanted a dict"):
        step.invoke(Asked)


def test_documents_that_went_through_json(compressor: KaLMDocumentCompressor) -> None:
    """Behind LangServe, documents arrive as dicts."""
    wanted = compressor.compress_documents(documents(), QUERY)
    step = compressor.as_runnable()
    plain = [d.model_dump() for d in documents()]
    assert step.invoke({"query": QUERY, "documents": plain}) == wanted
    assert step.invoke({"query": QUERY, "documents": [dumpd(d) for d in documents()]}) == wanted
    with pytest.raises(InputError, match=r"a document is a dict with the keys \['text'\]; wanted page_content"):
        step.invoke({"query": QUERY, "documents": [{"text": "x"}]})
    with pytest.raises(InputError, match="document 0 is int"):
        step.invoke({"query": QUERY, "documents": [3]})


def test_a_server_sees_input_and_configuration(compressor: KaLMDocumentCompressor, chroma: KaLMChroma) -> None:
    """LangServe drops from a config what no component names, and shows the schema to callers."""
    step = compressor.as_runnable()
    schema = step.get_input_jsonschema()
    assert {"query", "question", "documents", "context"} <= schema["properties"].keys()
    read = step.get_input_schema().model_validate({"query": QUERY, "documents": [d.model_dump() for d in documents()]})
    assert step.invoke(read) == compressor.compress_documents(documents(), QUERY)
    chain = RunnablePassthrough.assign(context=step) | (lambda x: x["context"])
    for component in (step, chain, KaLMRetriever(vectorstore=chroma)):
        wanted = ["kalm_instructions", "kalm_threshold", "kalm_top_n"]
        assert sorted(spec.id for spec in component.config_specs) == wanted
    assert "kalm_instructions" in str(chain.config_schema().model_json_schema())


def test_runs_go_by_the_steps_own_name_and_id(compressor: KaLMDocumentCompressor) -> None:
    """The step traced itself as its compressor, under an id of its own choosing."""
    given = {"query": QUERY, "documents": documents()}
    for step, name in (
        (compressor.as_runnable(), "KaLMRerank"),
        (KaLMRerank(compressor, name="my step"), "my step"),
        (KaLMRerank(compressor).with_config(run_name="its name"), "its name"),
    ):
        for call in (step.invoke, lambda *a, step=step: asyncio.run(step.ainvoke(*a))):
            trace, wanted = Trace(), uuid.uuid4()
            call(given, {"run_id": wanted, "callbacks": [trace]})
            assert [(run, found[0]) for run, found in trace.started.items()] == [(wanted, name)]
            assert trace.paired()

    async def events() -> list[Any]:
        step = compressor.as_runnable()
        return [e["event"] async for e in step.astream_events(given, version="v2", include_names=["KaLMRerank"])]

    assert asyncio.run(events())[0] == "on_chain_start"


def test_a_step_takes_the_settings_of_its_compressor(tiny: Reranker, compressor: KaLMDocumentCompressor) -> None:
    """As ``CohereRerank(top_n=3)`` and others are written."""
    step = KaLMRerank(top_n=2, reranker=tiny)
    found = step.invoke({"query": QUERY, "docs": documents()})
    assert [d.id for d in found] == [d.id for d in compressor.compress_documents(documents(), QUERY)[:2]]
    assert KaLMRerank().compressor == KaLMDocumentCompressor()
    assert KaLMRerank(compressor, top_n=2).invoke({"query": QUERY, "docs": documents()}) == found
    with pytest.raises(InputError, match="compressor and missing were both given"):
        KaLMRerank(compressor, top_n=2, missing="skip")
    with pytest.raises(InputError, match=r"KaLMRerank has no argument top_k\. Did you mean top_n\?"):
        KaLMRerank(top_k=2)
