"""One decoder pass at a time: who finds the model free decodes at once; who finds it busy may share the next pass.

No thread and no timer: the waiting caller that is next in line runs the pass for all that it takes along. So a lone
query pays one free lock, and closing an engine leaves nothing behind. Knows states; knows no model and no store.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from kalm_rag.engine.decoder_pass import order_rows
from kalm_rag.states import StateBatch, merge_batches

logger = logging.getLogger(__name__)

Decode = Callable[[Sequence[Any], StateBatch, "int | None"], "list[float]"]
"""Runs one pass: a prompt per row, states, ratio; gives one margin per row. May fail."""


class Request:
    """Passages on their way through the decoder, each under its prompt.

    Args:
        decode: Runs a pass, of this request alone or together with others like it.
        prompts: What `decode` takes for each row; the same object may stand in many rows.
        states: The passages, at least one.
        ratio: As `decode` takes it.
        share: Most rows of one pass, >= 1. A larger request is decoded in slices, between which others get their turn.
        alone: Whether it shares its passes with no other, because its `decode` does more than margins.
    """

    def __init__(
        self,
        decode: Decode,
        prompts: Sequence[Any],
        states: StateBatch,
        ratio: int | None,
        *,
        share: int,
        alone: bool = False,
    ) -> None:
        self.decode, self.prompts, self.states, self.ratio, self.share = decode, prompts, states, ratio, share
        self.kind = object() if alone else (share, ratio, states.ratio, states.vectors.dtype)
        self.margins = [0.0] * len(states)
        self.error: BaseException | None = None
        self.woken = threading.Event()
        """Set when it is done, or first in line of a free model: its caller runs the next pass then."""
        self.cancelled = _cancelled.get()
        rows = range(len(states))
        self.pending = list(rows) if len(rows) <= share else order_rows(prompts, states.lengths.tolist())

    @property
    def done(self) -> bool:
        """Whether all rows are decoded, or never will be."""
        return self.error is not None or not self.pending

    def next_rows(self) -> tuple[list[Any], StateBatch]:
        """Prompts and states of the rows that go next."""
        rows = self.pending[: self.share]
        whole = len(rows) == len(self.states)
        return [self.prompts[row] for row in rows], self.states if whole else self.states.select(rows)

    def finish_rows(self, margins: Sequence[float]) -> None:
        """Keep the margins of the rows that `next_rows` gave."""
        for row, margin in zip(self.pending[: self.share], margins, strict=True):
            self.margins[row] = margin
        self.pending = self.pending[self.share :]


class DecodeQueue:
    """The line before one loaded model: one pass at a time, first come first served.

    A pass takes the first in line, and with it those behind it that fit into the same pass whole. A request larger
    than a pass goes to the end of the line after each slice, so nobody waits for more than a slice of it at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line: deque[Request] = deque()
        self._leader: Request | None = None  # whose caller runs a pass now, or was woken to; None: the model is free
        self._group: list[Request] = []  # what that pass decodes

    def run(self, request: Request) -> list[float]:
        """Wait for the turn, decode, give the margins in the order of the states.

        Raises:
            CancelledError: (of `concurrent.futures`) if the caller gave up while the request waited; see
                `cancel_on_error`.
            BaseException: Whatever `decode` raises for this request; those of others never come out here.
        """
        try:
            with self._lock:
                self._line.append(request)
                if self._leader is None:
                    self._wake_first()
            while True:
                request.woken.wait()
                request.woken.clear()
                if request.done:
                    break
                if self._leader is request:
                    self._run_pass()
        except BaseException as err:  # Ctrl-C, at any line: nobody behind must wait for who is gone
            with self._lock:
                request.error = err
                if request in self._line:
                    self._line.remove(request)
                if self._leader is request:
                    self._end_pass()
                elif self._leader is not None:  # it may have been chosen and not woken yet; waking it twice is fine
                    self._leader.woken.set()
            raise
        if request.error is not None:
            raise request.error
        return request.margins

    def _run_pass(self) -> None:
        """Decode what is next in line, then hand over."""
        with self._lock:
            self._take_group()
        try:
            _decode(self._group)
        finally:
            with self._lock:
                self._end_pass()

    def _take_group(self) -> None:
        """Take from the line what shares the next pass; those whose callers gave up leave it undecoded.

        Needs the lock. An interrupt at any line leaves each request in the group, in the line or in both, never lost.
        """
        group: list[Request] = []
        line: deque[Request] = deque()
        room = 0
        for request in self._line:
            size = len(request.pending)
            if request.cancelled is not None and request.cancelled.is_set():
                request.error = CancelledError("the caller gave up before the request was decoded")
                request.woken.set()
            elif not group:
                group.append(request)
                room = request.share - size
            elif size <= room and request.kind == group[0].kind:
                group.append(request)
                room -= size
            else:
                line.append(request)
        self._group = group
        self._line = line

    def _end_pass(self) -> None:
        """Wake the callers of what is done, put the rest back in line, let the first one lead. Needs the lock."""
        for request in self._group:
            if request.done:
                request.woken.set()
            elif request not in self._line:
                self._line.append(request)
        self._group = []
        self._wake_first()

    def _wake_first(self) -> None:
        """Let the first in line run the next pass; without one, the model is free. Needs the lock."""
        self._leader = self._line[0] if self._line else None
        if self._leader is not None:
            self._leader.woken.set()


def _decode(group: Sequence[Request]) -> None:
    """Run one pass; if a shared one fails, each runs alone, so that an error hits only whose it is."""
    if len(group) > 1:
        parts = [request.next_rows() for request in group]
        ends = [sum(len(states) for _, states in parts[: i + 1]) for i in range(len(parts))]
        spans = [range(end - len(states), end) for end, (_, states) in zip(ends, parts, strict=True)]
        try:
            merged = merge_batches(ends[-1], [(span, states) for span, (_, states) in zip(spans, parts, strict=True)])
            margins = group[0].decode([prompt for prompts, _ in parts for prompt in prompts], merged, group[0].ratio)
        except Exception as err:  # told below, to the one that it belongs to
            logger.debug("a pass shared by %d queries failed (%r); running them one by one.", len(group), err)
        else:
            for request, span in zip(group, spans, strict=True):
                request.finish_rows(margins[span.start : span.stop])
            return
    for request in group:
        try:
            request.finish_rows(request.decode(*request.next_rows(), request.ratio))
        except Exception as err:
            request.error = err


class _GivenUp(threading.Event):
    """Set when a caller gives up, or one around it does."""

    def __init__(self, around: threading.Event | None) -> None:
        super().__init__()
        self._around = around

    def is_set(self) -> bool:
        return super().is_set() or (self._around is not None and self._around.is_set())


_cancelled: ContextVar[threading.Event | None] = ContextVar("kalm_rag_cancelled", default=None)
_queues: weakref.WeakKeyDictionary[object, DecodeQueue] = weakref.WeakKeyDictionary()
_queues_lock = threading.Lock()


@contextmanager
def cancel_on_error() -> Iterator[None]:
    """Wrap an ``await`` on a thread: if it ends by an exception, what the thread still waits for is dropped.

    The thread must run in a copy of this context, as ``asyncio.to_thread`` and LangChain's ``run_in_executor`` see to.
    """
    flag = _GivenUp(_cancelled.get())
    token = _cancelled.set(flag)
    try:
        yield
    except BaseException:
        flag.set()
        raise
    finally:
        _cancelled.reset(token)


def check_cancelled() -> None:
    """End long work whose caller gave up.

    Raises:
        CancelledError: (of `concurrent.futures`) in a thread whose `cancel_on_error` ended by an exception.
    """
    flag = _cancelled.get()
    if flag is not None and flag.is_set():
        raise CancelledError("the caller gave up before the work was done")


def queue_of(model: object) -> DecodeQueue:
    """The line before a model: the same for all engines that share it, gone when it is."""
    with _queues_lock:
        return _queues.setdefault(model, DecodeQueue())


def _start_anew() -> None:
    """After a fork, in the child: those who held locks or ran a pass are not there."""
    global _queues, _queues_lock
    _queues, _queues_lock = weakref.WeakKeyDictionary(), threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_start_anew)
