"""OpenTelemetry spans of searches and rankings, with OpenInference's attributes; free where an app traces nothing.

An app that traces has imported OpenTelemetry and set its exporter up; nothing is imported or exported here. Where
OpenInference's instrumentor of a framework already has a span of the same ranking, that one gets our attributes; it
never comes twice, nor outside its run. What people asked and passages said is left out where OpenInference's own
settings say so: ``OPENINFERENCE_HIDE_INPUTS`` and ``OPENINFERENCE_HIDE_OUTPUTS``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from kalm_rag.engine.prepared import PreparedQuery
from kalm_rag.index.candidates import RankedCandidate, Ranking
from kalm_rag.index.results import QueryResult
from kalm_rag.index.select import Candidates, shown_text
from kalm_rag.instructions import Instructions

RankingEnded = Callable[[Ranking, Sequence[RankedCandidate], Mapping[str, Any]], None]
"""Takes all that was ranked, what is handed on of it, and the report of the outcome."""
KIND = "openinference.span.kind"
MINE = "kalm_rag."
"""Begin of the attributes that OpenInference has no name for: fingerprint, instructions, status, counts, seconds."""


@dataclass(frozen=True)
class _Host:
    """A framework's span around a ranking."""

    span: Any
    ranks: bool  # whether it stands for the ranking itself


_host: ContextVar[_Host | None] = ContextVar("kalm_rag_host_span", default=None)


@contextmanager
def inside_llama_index() -> Iterator[None]:
    """Around a ranking that LlamaIndex's events tell of: with OpenInference's instrumentor on, its span gets ours."""
    trace = sys.modules.get("opentelemetry.trace")
    instrumentor = _instrumentor("llama_index", "LlamaIndexInstrumentor")
    with _hosted(None if trace is None or instrumentor is None else _Host(trace.get_current_span(), ranks=True)):
        yield


@contextmanager
def inside_langchain(run_id: UUID | None) -> Iterator[None]:
    """Around a ranking within a run of LangChain: with OpenInference's instrumentor on, ours goes under its span."""
    instrumentor = _instrumentor("langchain", "LangChainInstrumentor")
    span = None if instrumentor is None or run_id is None else instrumentor.get_span(run_id)
    with _hosted(None if span is None else _Host(span, ranks=False)):
        yield


@contextmanager
def ranking_span(
    query: str | PreparedQuery,
    instructions: Instructions | None,
    given: Candidates,
    *,
    top_n: int | None,
    model: str,
) -> Iterator[RankingEnded]:
    """Trace one ranking.

    Args:
        query: The question.
        instructions: What the decoder is told; a prepared query's own go before them.
        given: The candidates.
        top_n: Most candidates handed on; None for all.
        model: What the model is called.

    Yields:
        Takes what came of it, before the block ends.
    """
    with _span("kalm_rag.rerank", "RERANKER") as span:
        if span is None:
            yield lambda ranking, candidates, report: None
            return
        told = query.instructions if isinstance(query, PreparedQuery) else instructions
        _note(span, {"reranker.model_name": model, "reranker.top_k": len(given.read) if top_n is None else top_n})
        if not _hidden("INPUTS"):
            _note(span, {"reranker.query": query.query if isinstance(query, PreparedQuery) else query})
            if told is not None:
                _note(span, {f"{MINE}instructions.system": told.system, f"{MINE}instructions.task": told.task})
            for place, name in enumerate(given.names):
                _document(span, f"reranker.input_documents.{place}", name, given.shown(place), None)

        def ended(ranking: Ranking, candidates: Sequence[RankedCandidate], report: Mapping[str, Any]) -> None:
            _note(span, {"reranker.model_name": report["model"], **_flat(MINE, report)})
            counts = {"from_store": ranking.from_store, "encoded": ranking.encoded, "unscored": ranking.unscored}
            _note(span, _flat(MINE, {**counts, "stage_seconds": ranking.seconds}))
            if not _hidden("OUTPUTS"):
                for place, one in enumerate(candidates):
                    name, text = given.names[one.index], shown_text(given, one)
                    _document(span, f"reranker.output_documents.{place}", name, text, one.probability)

        yield ended


@contextmanager
def search_span(query: str, name: str) -> Iterator[Callable[[QueryResult], None]]:
    """Trace one search with the ranking in it. Yields what takes its result, before the block ends."""
    with _span(name, "RETRIEVER") as span:
        if span is None:
            yield lambda result: None
            return
        if not _hidden("INPUTS"):
            _note(span, {"input.value": query})

        def ended(result: QueryResult) -> None:
            _note(span, {f"{MINE}candidates": result.candidates, **_flat(MINE, {"stage_seconds": result.seconds})})
            if not _hidden("OUTPUTS"):
                for place, hit in enumerate(result.hits):
                    start = f"retrieval.documents.{place}"
                    _document(span, start, hit.id, hit.text, hit.probability, dict(hit.metadata))

        yield ended


@contextmanager
def _span(name: str, kind: str) -> Iterator[Any]:
    """A span of ours or a framework's for this; None where nothing records it."""
    host, trace = _host.get(), sys.modules.get("opentelemetry.trace")
    if trace is None:
        yield None
    elif host is not None and host.ranks and kind == "RERANKER":
        yield host.span if host.span.is_recording() else None
    else:
        parent = None if host is None else trace.set_span_in_context(host.span)
        with trace.get_tracer("kalm_rag").start_as_current_span(name, context=parent, attributes={KIND: kind}) as span:
            yield span if span.is_recording() else None


@contextmanager
def _hosted(host: _Host | None) -> Iterator[None]:
    token = _host.set(host)
    try:
        yield
    finally:
        _host.reset(token)


def _instrumentor(framework: str, name: str) -> Any:  # noqa: ANN401 - of a package that need not be there
    """OpenInference's instrumentor of a framework, if the app has switched it on."""
    module = sys.modules.get(f"openinference.instrumentation.{framework}")
    found = None if module is None else getattr(module, name)()
    return found if found is not None and found.is_instrumented_by_opentelemetry else None


def _hidden(what: str) -> bool:
    return os.environ.get(f"OPENINFERENCE_HIDE_{what}", "").lower() == "true"


def _note(span: Any, attributes: Mapping[str, Any]) -> None:  # noqa: ANN401
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})


def _document(
    span: Any,  # noqa: ANN401
    start: str,
    name: str,
    text: str | None,
    score: float | None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    told = json.dumps(metadata, ensure_ascii=False, default=str) if metadata else None
    document = {"id": name, "content": text, "score": score, "metadata": told}
    _note(span, {f"{start}.document.{field}": value for field, value in document.items()})


def _flat(start: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of nested mappings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(f"{start}{name}.", value) if isinstance(value, Mapping) else {f"{start}{name}": value}
    return flat
