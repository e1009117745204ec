"""``kalm-rag serve``: the HTTP door as a command. Thin; all work is done by `kalm_rag.serve`."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_rag.checks import check_count
from kalm_rag.cli.opening import Device, Embedder, Host, Insecure, Name, Port, Served, Server
from kalm_rag.cli.terminal import DAILY, Model, errors, working
from kalm_rag.errors import require

if TYPE_CHECKING:  # its room needs an extra
    from kalm_rag.serve.settings import ServeSettings

app = typer.Typer()

KEEP_ALIVE = 65
"""Seconds that an idle connection stays open: longer than the 60 of common proxies, which would else meet a reset."""


@app.command(rich_help_panel=DAILY)
def serve(
    db: Served = None,
    chroma: Server = None,
    collection: Name = "passages",
    create: Annotated[bool, typer.Option("--create", help="Make the collection if it is absent.")] = False,
    model: Model = None,
    embedder: Embedder = None,
    device: Device = None,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    insecure: Insecure = False,
    workers: Annotated[int, typer.Option(help="Processes, each with the model in memory.")] = 1,
    threads: Annotated[int, typer.Option(help="Requests a worker works on at a time.")] = 8,
    queue: Annotated[int, typer.Option(help="Most requests of a worker, waiting ones too; then 429.")] = 64,
    timeout: Annotated[float, typer.Option(help="Most seconds of a request; then 504.")] = 30.0,
    max_documents: Annotated[int, typer.Option(help="Most documents ranked at once.")] = 1000,
    warmup: Annotated[bool, typer.Option("--warmup", help="Rank a question before saying that it is ready.")] = False,
) -> None:
    """Serve reranking and search over HTTP: Cohere's, Jina's, vLLM's and TEI's shapes, and ids of stored passages.

    With an API key in the environment variable KALM_RAG_API_KEY. Without --db and --chroma it reranks texts alone.
    """
    with errors():
        check_count(workers, "workers")
        for module in ("fastapi", "uvicorn", "prometheus_client"):
            require(module, "serve", "serving over HTTP")
        from kalm_rag.serve.settings import ServeSettings

        settings = ServeSettings(
            db=None if db is None else str(db.expanduser()),
            chroma=chroma,
            collection=collection,
            create=create,
            model=model,
            embedder=embedder,
            device=device,
            host=host,
            insecure=insecure,
            threads=threads,
            queue=queue,
            timeout=timeout,
            max_documents=max_documents,
            warmup=warmup,
        )
        _run(settings, port=port, workers=workers)


def _run(settings: ServeSettings, *, port: int, workers: int) -> None:
    from kalm_rag.serve.settings import KEY_VARIABLE

    key = os.environ.get(KEY_VARIABLE) or None
    settings.check_exposure(key)
    with working("opening the index ..."):
        import uvicorn

        from kalm_rag.serve.app import SETTINGS_VARIABLE, app_from_environment, make_app
        from kalm_rag.serve.door import Door
        from kalm_rag.serve.telemetry import SHARED_VARIABLE, logging_settings

        door = Door.open(settings)
    options: dict[str, Any] = {
        "host": settings.host,
        "port": port,
        "access_log": False,
        "server_header": False,
        "log_config": logging_settings(),
        "timeout_keep_alive": KEEP_ALIVE,
        "timeout_graceful_shutdown": int(settings.timeout) + 1,
    }
    if workers == 1:
        uvicorn.run(make_app(door, settings, key=key), **options)
        return
    door.close()  # it could be opened: each worker opens it again, for neither torch nor Chroma can be forked
    with tempfile.TemporaryDirectory(prefix="kalm-rag-metrics-") as folder:
        os.environ.setdefault(SHARED_VARIABLE, folder)
        os.environ[SETTINGS_VARIABLE] = settings.to_json()
        name = f"{app_from_environment.__module__}:{app_from_environment.__name__}"
        uvicorn.run(name, factory=True, workers=workers, **options)
