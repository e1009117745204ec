"""Where blocking work is done: so many threads, so much waiting and no more, and a deadline for each piece.

The engine has a queue of its own before its decoder, which lets several threads share a pass.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from kalm_rag.engine.queue import cancel_on_error
from kalm_rag.errors import DeadlineError, KalmRagError

Result = TypeVar("Result")


class BusyError(KalmRagError):
    """More work waits than the server takes."""


class BoundedThreads:
    """Threads for requests.

    Args:
        threads: Pieces of work done at a time.
        queue: Most pieces that are done or wait.
        seconds: Most time for each, waiting included.
    """

    def __init__(self, threads: int, queue: int, seconds: float) -> None:
        self._pool = ThreadPoolExecutor(threads, "kalm-rag-serve")
        self._queue, self._seconds = queue, seconds
        self._lock = threading.Lock()
        self._held = 0

    @property
    def held(self) -> int:
        """Pieces of work that are done or wait now."""
        return self._held

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do some work, and give what it gives.

        Raises:
            BusyError: If too much is waiting; the work is not begun.
            DeadlineError: Over the deadline. Work that waits, here or before the decoder, is dropped; a pass that
                runs ends by itself, and counts as held until then.
        """
        with cancel_on_error():
            future = self._begin(work)
            try:
                return await asyncio.wait_for(asyncio.wrap_future(future), self._seconds)
            except asyncio.TimeoutError as err:  # another class before Python 3.11
                if isinstance(err, KalmRagError):
                    raise
                raise DeadlineError(
                    f"the request took longer than {self._seconds:g} seconds. Ask for fewer documents, or try later."
                ) from err

    def close(self) -> None:
        """Drop what waits, and let what runs end."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, work: Callable[[], Result]) -> Future[Result]:
        with self._lock:
            if self._held >= self._queue:
                raise BusyError(f"{self._held} requests are worked on or waiting, as many as this server takes.")
            self._held += 1
        try:
            future = self._pool.submit(copy_context().run, work)
        except BaseException:
            self._end()
            raise
        future.add_done_callback(lambda _: self._end())
        return future

    def _end(self) -> None:
        with self._lock:
            self._held -= 1
