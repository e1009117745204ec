"""OpenTelemetry spans through each door, with the SDK's own exporter and OpenInference's instrumentors."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed (chromadb brings it)")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from selecting import QUERY, TEXTS, held_decoder
from toy import toy_vectors

import kalm_rag
from kalm_rag import ChromaIndex, Instructions, Reranker
from kalm_rag.errors import KalmRagError
from kalm_rag.index import traces

KIND = "openinference.span.kind"


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """Of this process's tracer: it can be set once."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exporter.clear()
    yield exporter
    exporter.clear()


@pytest.fixture
def index(pico: Reranker) -> Iterator[ChromaIndex]:
    with ChromaIndex.open(model=pico, embedder=toy_vectors, collection="traced") as made:
        made.upsert([f"r{n}" for n in range(len(TEXTS))], TEXTS, [{"n": n} for n in range(len(TEXTS))])
        yield made


def of_kind(exporter: InMemorySpanExporter, kind: str) -> list[dict[str, Any]]:
    found = [span for span in exporter.get_finished_spans() if (span.attributes or {}).get(KIND) == kind]
    return [dict(span.attributes or {}) for span in found]


def check_no_orphans(finished: tuple[ReadableSpan, ...], roots: int = 1) -> None:
    """Every span hangs under another of the same trace, but for the root of each trace."""
    known = {(s.context.trace_id, s.context.span_id) for s in finished if s.context}
    parents = [(s.parent.trace_id, s.parent.span_id) if s.parent else None for s in finished]
    assert sum(parent is None for parent in parents) == roots
    assert {parent for parent in parents if parent} <= known


def test_names_are_openinferences() -> None:
    names = pytest.importorskip("openinference.semconv.trace", reason="openinference is not installed (extra 'dev')")
    reranker, document = names.RerankerAttributes, names.DocumentAttributes
    assert traces.KIND == names.SpanAttributes.OPENINFERENCE_SPAN_KIND == KIND
    assert {"RERANKER", "RETRIEVER"} <= {kind.value for kind in names.OpenInferenceSpanKindValues}
    written = {
        reranker.RERANKER_QUERY, reranker.RERANKER_MODEL_NAME, reranker.RERANKER_TOP_K,
        reranker.RERANKER_INPUT_DOCUMENTS, reranker.RERANKER_OUTPUT_DOCUMENTS,
        names.SpanAttributes.RETRIEVAL_DOCUMENTS, names.SpanAttributes.INPUT_VALUE,
    }  # fmt: skip
    assert written == {
        "reranker.query", "reranker.model_name", "reranker.top_k", "reranker.input_documents",
        "reranker.output_documents", "retrieval.documents", "input.value",
    }  # fmt: skip
    fields = document.DOCUMENT_ID, document.DOCUMENT_CONTENT, document.DOCUMENT_SCORE, document.DOCUMENT_METADATA
    assert fields == ("document.id", "document.content", "document.score", "document.metadata")


def test_a_query_is_a_search_with_a_ranking_in_it(index: ChromaIndex, spans: InMemorySpanExporter) -> None:
    told = Instructions(system="You are a guide.", task="Find the city.")
    result = index.query(QUERY, top_n=2, instructions=told, max_tokens=60)
    check_no_orphans(spans.get_finished_spans())
    (search,), (ranking,) = of_kind(spans, "RETRIEVER"), of_kind(spans, "RERANKER")
    assert search["input.value"] == ranking["reranker.query"] == QUERY
    for place, hit in enumerate(result):
        for start, found in (("retrieval.documents", search), ("reranker.output_documents", ranking)):
            assert found[f"{start}.{place}.document.id"] == hit.id
            assert found[f"{start}.{place}.document.content"] == hit.text
            assert found[f"{start}.{place}.document.score"] == hit.probability
        assert json.loads(search[f"retrieval.documents.{place}.document.metadata"]) == dict(hit.metadata)
    assert "reranker.output_documents.2.document.id" not in ranking
    given = {ranking[f"reranker.input_documents.{place}.document.content"] for place in range(len(TEXTS))}
    assert given == set(TEXTS)
    assert (ranking["reranker.model_name"], ranking["reranker.top_k"]) == ("pico", 2)
    assert ranking["kalm_rag.fingerprint"] == index.engine.info.fingerprint
    assert ranking["kalm_rag.instructions.system"] == "You are a guide."
    assert ranking["kalm_rag.instructions.task"] == "Find the city."
    assert ranking["kalm_rag.status"] == "reranked"
    assert ranking["kalm_rag.from_store"] == len(TEXTS)
    assert ranking["kalm_rag.encoded"] == 0
    assert ranking["kalm_rag.stage_seconds.score"] > 0
    assert search["kalm_rag.stage_seconds.search"] > 0


def test_what_people_say_can_be_left_out(
    index: ChromaIndex, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENINFERENCE_HIDE_INPUTS", "true")
    monkeypatch.setenv("OPENINFERENCE_HIDE_OUTPUTS", "true")
    index.query(QUERY, instructions="Find the city.")
    told = json.dumps([dict(span.attributes or {}) for span in spans.get_finished_spans()])
    assert "kalm_rag.fingerprint" in told
    assert not [text for text in (QUERY, "Find the city.", *TEXTS) if text in told]


def test_failures_are_told(index: ChromaIndex, pico: Reranker, spans: InMemorySpanExporter) -> None:
    with pytest.MonkeyPatch.context() as patch, held_decoder(pico, patch):
        index.query(QUERY, on_error="retrieval_order", timeout=0.05)
        with pytest.raises(KalmRagError, match="took longer"):
            index.query(QUERY, timeout=0.05)
    first, second = (span for span in spans.get_finished_spans() if span.name == "kalm_rag.rerank")
    assert str((first.attributes or {})["kalm_rag.status"]).startswith("skipped: DeadlineError")
    assert first.status.is_ok
    assert not second.status.is_ok
    assert [event.name for event in second.events] == ["exception"]
    check_no_orphans(spans.get_finished_spans(), roots=2)


class TestLangChain:
    @pytest.fixture
    def retriever(self, pico: Reranker) -> Any:
        pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")
        from kalm_rag.langchain import KaLMChroma, KaLMRetriever

        store = KaLMChroma("traced-chain", reranker=pico)
        store.add_texts(TEXTS, ids=[f"r{n}" for n in range(len(TEXTS))])
        return KaLMRetriever(vectorstore=store, k=2, instructions="Find the city.")

    @pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
    def test_without_instrumentor(self, retriever: Any, spans: InMemorySpanExporter, is_async: bool) -> None:
        with trace.get_tracer("app").start_as_current_span("request"):
            found = asyncio.run(retriever.ainvoke(QUERY)) if is_async else retriever.invoke(QUERY)
        check_no_orphans(spans.get_finished_spans())
        (ranking,) = of_kind(spans, "RERANKER")
        assert ranking["reranker.output_documents.0.document.content"] == found[0].page_content
        assert ranking["kalm_rag.instructions.task"] == "Find the city."

    @pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
    @pytest.mark.parametrize("step", ["retriever", "rerank"])
    def test_under_openinferences_instrumentor(
        self, retriever: Any, spans: InMemorySpanExporter, is_async: bool, step: str
    ) -> None:
        """One ranking, one span, inside the run that it belongs to, though callbacks attach no context."""
        package = pytest.importorskip("openinference.instrumentation.langchain", reason="not installed (extra 'dev')")
        from langchain_core.runnables import RunnableLambda

        chain = retriever | RunnableLambda(lambda documents: documents)
        given: Any = QUERY
        if step == "rerank":
            from kalm_rag.langchain import KaLMRerank

            documents = retriever.vectorstore.similarity_search(QUERY, k=9)
            chain = KaLMRerank(retriever.vectorstore.as_compressor()) | RunnableLambda(lambda documents: documents)
            given = {"query": QUERY, "documents": documents}
        package.LangChainInstrumentor().instrument()
        try:
            asyncio.run(chain.ainvoke(given)) if is_async else chain.invoke(given)
        finally:
            package.LangChainInstrumentor().uninstrument()
        check_no_orphans(spans.get_finished_spans())
        assert len(of_kind(spans, "RERANKER")) == 1
        assert len(of_kind(spans, "RETRIEVER")) == (step == "retriever")


class TestLlamaIndex:
    @pytest.fixture
    def app(self, pico: Reranker) -> Any:
        pytest.importorskip("llama_index.core", reason="llama-index-core is not installed (extra 'llama-index')")
        import chromadb
        from llama_index.core import StorageContext, VectorStoreIndex
        from llama_index.core.llms import MockLLM
        from llama_index.core.schema import TextNode

        from kalm_rag.llama_index import KaLMChromaVectorStore

        collection = chromadb.EphemeralClient().get_or_create_collection("traced-llama")
        store = KaLMChromaVectorStore(collection, reranker=pico)
        nodes = [TextNode(id_=f"r{n}", text=text) for n, text in enumerate(TEXTS[:5])]
        storage = StorageContext.from_defaults(vector_store=store)
        made = VectorStoreIndex(nodes, storage_context=storage, embed_model=store.as_embedding())
        reranker = store.as_postprocessor(top_n=2, instructions="Find the city.")
        return made.as_query_engine(similarity_top_k=5, llm=MockLLM(max_tokens=4), node_postprocessors=[reranker])

    @pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
    @pytest.mark.parametrize("instrumented", [False, True], ids=["plain", "instrumented"])
    def test_one_ranking_is_one_span(
        self, app: Any, spans: InMemorySpanExporter, instrumented: bool, is_async: bool
    ) -> None:
        package = pytest.importorskip("openinference.instrumentation.llama_index", reason="not installed (extra 'dev')")
        if instrumented:
            package.LlamaIndexInstrumentor().instrument()
        try:
            with trace.get_tracer("app").start_as_current_span("request"):
                answer = asyncio.run(app.aquery(QUERY)) if is_async else app.query(QUERY)
        finally:
            if instrumented:
                package.LlamaIndexInstrumentor().uninstrument()
        check_no_orphans(spans.get_finished_spans())
        (ranking,) = of_kind(spans, "RERANKER")
        assert ranking["kalm_rag.status"] == "reranked"
        assert ranking["kalm_rag.from_store"] == 5
        assert ranking["kalm_rag.instructions.task"] == "Find the city."
        assert ranking["reranker.output_documents.1.document.id"] == answer.source_nodes[1].node_id
        names = [span.name for span in spans.get_finished_spans() if span.name.startswith("kalm_rag")]
        assert names == ([] if instrumented else ["kalm_rag.rerank"]), "the instrumentor's own span has it"


def test_nothing_is_imported_for_it() -> None:
    """An app that doesn't trace needs no package for it."""
    sources = "\n".join(path.read_text() for path in Path(kalm_rag.__file__).parent.rglob("*.py"))
    assert not re.findall(r"^\s*(?:import|from) (?:opentelemetry|openinference)", sources, re.MULTILINE)
    assert "opentelemetry.trace" in sources
