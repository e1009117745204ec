"""A real uvicorn server on a free port of the loopback, in a thread of the tests' own process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import httpx
import uvicorn

from kalm_rag.serve.app import make_app
from kalm_rag.serve.door import Door
from kalm_rag.serve.settings import ServeSettings

QUERY = "What is the capital of France?"
TEXTS = ["I like tea.", "Paris is the capital of France.", "Berlin is in Germany.", "France borders Spain."]
PLAIN = httpx.Client(timeout=30, verify=False, trust_env=False)  # to make another reads all certificates each time
IDS = ["tea", "paris", "berlin", "spain"]


@contextlib.contextmanager
def running(door: Door, *, key: str | None = None, ready: int = 200, **settings: object) -> Iterator[str]:
    """The URL of a server, which is gone afterwards; its door is closed then. `ready` is what it says in the end."""
    app = make_app(door, ServeSettings(**settings), key=key)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    host, port = server.servers[0].sockets[0].getsockname()
    url = f"http://{host}:{port}"
    try:
        until(lambda: PLAIN.get(f"{url}/ready").status_code == ready)
        yield url
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def until(happened, seconds: float = 30.0, pause: float = 0.02) -> None:
    """Wait for what is to happen."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(pause)
