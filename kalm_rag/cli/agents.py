"""``kalm-rag mcp``: the tools of an agent as a command. Thin; all work is done by `kalm_rag.serve.mcp`."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Annotated

import typer

from kalm_rag.cli.opening import Device, Embedder, Host, Insecure, Name, Port, Served, Server
from kalm_rag.cli.terminal import DAILY, Model, errors, working
from kalm_rag.errors import InputError, require

if TYPE_CHECKING:  # its room needs an extra
    from kalm_rag.serve.settings import ServeSettings

app = typer.Typer()


@app.command(rich_help_panel=DAILY)
def mcp(
    db: Served = None,
    chroma: Server = None,
    collection: Name = "passages",
    model: Model = None,
    embedder: Embedder = None,
    device: Device = None,
    http: Annotated[
        bool, typer.Option("--http", help="Streamable HTTP at /mcp, for many agents, in place of stdin and stdout.")
    ] = False,
    host: Host = "127.0.0.1",
    port: Port = 8081,
    insecure: Insecure = False,
    threads: Annotated[int, typer.Option(help="Calls worked on at a time.")] = 8,
    timeout: Annotated[float, typer.Option(help="Most seconds of a call.")] = 60.0,
) -> None:
    """Let agents search a collection, over the Model Context Protocol: tools search and read_passage.

    In the settings of an agent: command kalm-rag, arguments mcp --db /path/to/db. With --http behind an API key in the
    environment variable KALM_RAG_API_KEY.
    """
    with errors():
        for module in ("mcp", "prometheus_client"):
            require(module, "mcp", "serving agents over MCP")
        from kalm_rag.serve.settings import ServeSettings

        if db is None and chroma is None:
            raise InputError("no collection is named, and agents search one. Pass --db FOLDER or --chroma URL.")
        settings = ServeSettings(
            db=None if db is None else str(db.expanduser()),
            chroma=chroma,
            collection=collection,
            model=model,
            embedder=embedder,
            device=device,
            host=host,
            insecure=insecure,
            threads=threads,
            timeout=timeout,
            warmup=True,
        )
        _run(settings, http=http, port=port)


def _run(settings: ServeSettings, *, http: bool, port: int) -> None:
    from kalm_rag.serve.settings import KEY_VARIABLE

    key = os.environ.get(KEY_VARIABLE) or None
    if http:
        settings.check_exposure(key)
    with working("opening the index ..."):
        from kalm_rag.serve.door import Door
        from kalm_rag.serve.mcp import http_app, serving
        from kalm_rag.serve.threads import BoundedThreads

        door = Door.open(settings)
        threads = BoundedThreads(settings.threads, settings.queue, settings.timeout)
    with serving(door, settings, threads) as server:
        if not http:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the SDK's reader of stdin would wait for one more line
            server.run("stdio")
            return
        import uvicorn

        from kalm_rag.serve.telemetry import logging_settings

        signal.signal(signal.SIGTERM, _leave)  # uvicorn gives the signal on when it has drained
        uvicorn.run(
            http_app(server, settings, threads, key),
            host=settings.host,
            port=port,
            access_log=False,
            server_header=False,
            log_config=logging_settings(),
            timeout_graceful_shutdown=int(settings.timeout) + 1,
        )


def _leave(*_: object) -> None:
    """End as SIGTERM ends a process, but close the index before."""
    raise SystemExit(128 + signal.SIGTERM)
