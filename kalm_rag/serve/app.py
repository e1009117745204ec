"""The routes: each reads a body, has the `Door` do it in a thread, and words the answer. No scoring here."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from kalm_rag import __version__
from kalm_rag.errors import InputError
from kalm_rag.serve.door import Door, Ranked, RecordId
from kalm_rag.serve.guard import Guard
from kalm_rag.serve.page import page_response
from kalm_rag.serve.refusals import RESPONSES, add_handlers, error_answer
from kalm_rag.serve.settings import KEY_VARIABLE, ServeSettings
from kalm_rag.serve.shapes import (
    CohereV2Answer,
    CohereV2Request,
    DeleteRequest,
    ExplainRequest,
    PutRequest,
    RerankAnswer,
    RerankRequest,
    SearchRequest,
    Steered,
    TeiOrRerank,
    cohere_v2_answer,
    rerank_answer,
    tei_answer,
)
from kalm_rag.serve.telemetry import Metrics
from kalm_rag.serve.threads import BoundedThreads

logger = logging.getLogger(__name__)

SETTINGS_VARIABLE = "KALM_RAG_SERVE"
"""The environment variable in which workers find their settings."""

router = APIRouter(responses=RESPONSES)


@dataclass(kw_only=True)
class Served:
    """What the routes of one app share."""

    door: Door
    settings: ServeSettings
    threads: BoundedThreads
    metrics: Metrics
    loading: asyncio.Future[None] | None = field(default=None)


def make_app(door: Door, settings: ServeSettings, *, key: str | None = None) -> FastAPI:
    """Put a server together, for uvicorn or another ASGI server; when it ends, it closes the door.

    Args:
        door: What answers.
        settings: What is refused.
        key: The API key that requests must bring; None lets everybody in, by a name of this machine's.

    Raises:
        InputError: If others could reach it without a key.
    """
    settings.check_exposure(key)
    threads = BoundedThreads(settings.threads, settings.queue, settings.timeout)
    metrics = Metrics(lambda: threads.held)
    app = FastAPI(
        title="kalm-rag",
        version=__version__,
        lifespan=_lifespan,
        docs_url=None,  # its page fetches scripts from elsewhere
        redoc_url=None,
    )
    app.state.served = Served(door=door, settings=settings, threads=threads, metrics=metrics)
    app.include_router(router)
    app.add_middleware(cast("Any", Guard), settings=settings, key=key, metrics=metrics)
    add_handlers(app)
    return app


def app_from_environment() -> FastAPI:
    """Put a server together in a worker, which finds its settings and the key in its environment."""
    settings = ServeSettings.from_json(os.environ[SETTINGS_VARIABLE])
    return make_app(Door.open(settings), settings, key=os.environ.get(KEY_VARIABLE) or None)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    served: Served = app.state.served
    _load(served)
    try:
        yield
    finally:  # uvicorn has let the requests end, or gave them up
        await asyncio.to_thread(served.threads.close)
        if served.loading is not None:
            await asyncio.wait([served.loading])
        await asyncio.to_thread(served.door.close)


def _load(served: Served) -> None:
    """Begin to load the model, in a thread of its own."""
    work = asyncio.to_thread(served.door.load, warmup=served.settings.warmup)
    served.loading = asyncio.ensure_future(work)
    served.loading.add_done_callback(_tell_loaded)


def _tell_loaded(loading: asyncio.Future[None]) -> None:
    if not loading.cancelled() and (err := loading.exception()) is not None:
        logger.error("the model can't be loaded: %s", err, exc_info=err)


@router.post("/v2/rerank", response_model=CohereV2Answer)
async def rerank_v2(body: CohereV2Request, request: Request) -> JSONResponse:
    """Rerank, as Cohere's second version has it."""
    ranked = await _rank(request, body, body.documents, top_n=body.top_n, max_tokens=body.max_tokens_per_doc)
    return _answer(request, ranked, cohere_v2_answer(ranked, documents=body.return_documents))


@router.post("/v1/rerank", response_model=RerankAnswer)
async def rerank_v1(body: RerankRequest, request: Request) -> JSONResponse:
    """Rerank, as Jina, vLLM and Cohere's first version have it."""
    ranked = await _rank(request, body, body.documents, top_n=body.top_n, max_tokens=body.max_tokens_per_doc)
    return _answer(request, ranked, rerank_answer(ranked, documents=body.return_documents))


@router.post("/rerank", response_model=list[dict[str, Any]] | RerankAnswer)
async def rerank(body: TeiOrRerank, request: Request) -> JSONResponse:
    """Rerank, as TEI has it; a body with `documents` is answered as vLLM and Infinity do, which have this path, too."""
    if isinstance(body, RerankRequest):
        return await rerank_v1(body, request)
    ranked = await _rank(request, body, body.texts, field="texts")
    cut = [one.index for one in ranked.results if one.truncated]
    if body.truncate is False and cut:
        raise InputError(f"texts[{min(cut)}] is longer than {ranked.model} reads, and truncate is false.")
    return _answer(request, ranked, tei_answer(ranked, raw=body.raw_scores, texts=body.return_text))


@router.post("/v1/search")
async def search(body: SearchRequest, request: Request) -> JSONResponse:
    """Search the collection by vector and rerank what is found."""
    served = _served(request)
    most = served.settings.max_documents
    options = body.options() | {"fetch_k": body.fetch_k if body.fetch_k is not None else min(50, most)}
    _check_most(options["fetch_k"], most, "fetch_k")
    _check_texts(served, query=body.query, instruction=body.instruction, system=body.system)
    found = await served.threads.run(partial(served.door.search, body.query, **options))
    return _answer(request, found, found.to_dict())


@router.post("/v1/explain")
async def explain(body: ExplainRequest, request: Request) -> JSONResponse:
    """Where the decoder looks in each document: stretches of the text that it reads, and their shares of attention."""
    served = _served(request)
    _check_documents(served, body, body.documents, "documents")
    work = partial(served.door.explain, body.query, body.documents, instructions=body.instructions)
    results = [
        {"index": place, "text": one.passage, "margin": one.margin, "probability": one.probability}
        | {"spans": [asdict(span) for span in one.spans]}
        for place, one in enumerate(await served.threads.run(work))
    ]
    return JSONResponse({"results": results})


@router.put("/v1/passages")
async def put_passages(body: PutRequest, request: Request) -> JSONResponse:
    """Add passages, or replace those of the same ids; unchanged texts are not encoded again."""
    served, passages = _served(request), body.passages
    _check_most(len(passages), served.settings.max_passages, "passages")
    _check_texts(served, passages=[one.text for one in passages])
    columns = [one.id for one in passages], [one.text for one in passages], [one.metadata for one in passages]
    report = await served.threads.run(partial(served.door.upsert, *columns))
    request.state.facts.update(passages=report.records, encoded=report.encoded)
    return JSONResponse(asdict(report))


@router.delete("/v1/passages")
async def delete_passages(body: DeleteRequest, request: Request) -> JSONResponse:
    """Delete passages; unknown ids are ignored."""
    served = _served(request)
    _check_most(len(body.ids), served.settings.max_passages, "ids")
    deleted = await served.threads.run(partial(served.door.delete, body.ids))
    return JSONResponse({"deleted": deleted})


@router.get("/v1/collections")
async def collections(request: Request) -> JSONResponse:
    """The collections of the database, and which one is served."""
    served = _served(request)
    return JSONResponse({"collections": await served.threads.run(served.door.collections)})


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """A page to try it with."""
    return page_response()


@router.get("/health")
async def health() -> JSONResponse:
    """Whether the server runs."""
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Whether the model is loaded; what failed to load is tried again."""
    served = _served(request)
    if served.door.loaded:
        return JSONResponse({"status": "ready"})
    if served.loading is None or served.loading.done():
        _load(served)
    return error_answer(503, "loading", "the model is not loaded yet.")


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counts, as Prometheus reads them."""
    return Response(_served(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _served(request: Request) -> Served:
    return cast("Served", request.app.state.served)


async def _rank(
    request: Request,
    body: Steered,
    documents: list[str | RecordId],
    *,
    field: str = "documents",
    top_n: int | None = None,
    max_tokens: int | None = None,
) -> Ranked:
    served = _served(request)
    _check_documents(served, body, documents, field)
    if max_tokens is not None and any(isinstance(one, RecordId) for one in documents):
        raise InputError("max_tokens_per_doc can't be had with ids: stored states are those of the whole passage.")
    work = partial(served.door.rank, body.query, documents, instructions=body.instructions, top_n=top_n)
    return await served.threads.run(partial(work, max_tokens=max_tokens, what=field))


def _check_documents(served: Served, body: Steered, documents: list[str | RecordId], field: str) -> None:
    _check_most(len(documents), served.settings.max_documents, field)
    texts = [one if isinstance(one, str) else one.id for one in documents]
    _check_texts(served, query=body.query, instruction=body.instruction, system=body.system, **{field: texts})


def _check_most(count: int, most: int, field: str) -> None:
    if count > most:
        raise InputError(f"{field}: {count} were asked for; this server takes at most {most} at once.")


def _check_texts(served: Served, **texts: Sequence[str] | str | None) -> None:
    """Refuse texts that are too long; a list of them, or one, by the name of its field."""
    most = served.settings.max_characters
    for name, given in texts.items():
        rows = [(name, given)] if isinstance(given, str) else [(f"{name}[{n}]", t) for n, t in enumerate(given or [])]
        for where, text in rows:
            if len(text) > most:
                raise InputError(f"{where} has {len(text)} characters; this server takes at most {most}.")


def _answer(request: Request, done: Ranked | Any, body: Any) -> JSONResponse:  # noqa: ANN401 - or a QueryResult; JSON
    """An answer, with what it took in its headers and in the log."""
    seconds = {stage: round(spent, 4) for stage, spent in done.seconds.items()}
    request.state.facts.update(seconds=seconds, stored=done.from_store, encoded=done.encoded)
    timing = ", ".join(f"{stage};dur={1000 * spent:.1f}" for stage, spent in seconds.items())
    told = {"server-timing": timing, "x-states-stored": str(done.from_store), "x-states-encoded": str(done.encoded)}
    return JSONResponse(body, headers=told)
