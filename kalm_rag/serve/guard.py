"""The gate before every route: who may come in, how much may be sent, and one log line and count for each answer.

Plain ASGI. Bodies are read here, whole, within a bound and a deadline, so that no route waits for a slow sender.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from kalm_rag.serve.settings import KEY_VARIABLE, ServeSettings
from kalm_rag.serve.telemetry import Metrics

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_ROUTES = {"/", "/health", "/ready"}
"""What is answered without a key: the page, which asks for it, and what those ask who start and stop servers."""
GONE = 499
"""What log and counts call a request whose client went away; nobody gets it."""
_LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}


class Refusal(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, error: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": error, "message": message, "field": None}


class Guard:
    """The gate.

    Args:
        app: What is behind it.
        settings: What is refused.
        key: The API key; None lets everybody in.
        metrics: Counts the answers.
    """

    def __init__(self, app: App, *, settings: ServeSettings, key: str | None, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, name = time.perf_counter(), uuid.uuid4().hex
        facts: dict[str, Any] = {}
        scope.setdefault("state", {})["facts"] = facts
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode())]
            await send(message)

        try:
            try:
                self._check(scope)
                body = await self._read(scope, receive)
            except Refusal as refusal:
                await _refuse(answer, refusal)
            else:
                if not await self._run(scope, body, receive, answer):
                    status = GONE
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")  # a bounded number of names
            self._metrics.count(route, status, seconds, facts)
            told = {"request": name, "method": scope["method"], "route": route, "status": status}
            logger.info("request", extra=told | {"total": round(seconds, 4)} | facts)

    async def _run(self, scope: MutableMapping[str, Any], body: bytes, receive: Receive, send: Send) -> bool:
        """Let the app answer; whether it did, before the client went away. Then its work is dropped where it waits."""
        gone = asyncio.ensure_future(receive())  # behind the body only comes that the client is gone
        left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return left.pop() if left else await asyncio.shield(gone)

        work = asyncio.ensure_future(self._app(scope, replay, send))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:  # also when the server gives up on the request
            answered = work.done()
            for task in (work, gone):
                task.cancel()
        with contextlib.suppress(*([] if answered else [asyncio.CancelledError])):
            await work
        return answered

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers = dict(scope["headers"])
        if self._key is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scope["path"] not in OPEN_ROUTES and not (
                hmac.compare_digest(given.strip(), self._key) and scheme.lower() == b"bearer"
            ):
                raise Refusal(
                    401, "unauthorized", "wanted the header 'Authorization: Bearer KEY' with this server's key."
                )
        elif not self._settings.insecure:  # a page of a stranger may call this machine by a name of its own
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in _LOCAL_NAMES | {self._settings.host}:
                raise Refusal(
                    421, "misdirected",
                    f"this server answers to localhost only. Set {KEY_VARIABLE}, or say --insecure, to serve others.",
                )  # fmt: skip

    async def _read(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        most = self._settings.max_body_bytes
        too_long = Refusal(413, "too_large", f"the body is longer than {most} bytes. Send fewer documents at once.")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > most:
            raise too_long
        parts: list[bytes] = []

        async def read() -> bytes:
            size, more = 0, True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(400, "disconnected", "the client went away.")
                parts.append(message.get("body", b""))
                size, more = size + len(parts[-1]), message.get("more_body", False)
                if size > most:
                    raise too_long
            return b"".join(parts)

        try:
            return await asyncio.wait_for(read(), self._settings.timeout)
        except asyncio.TimeoutError as err:
            raise Refusal(408, "too_slow", f"the body took longer than {self._settings.timeout:g} seconds.") from err


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = json.dumps(refusal.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
