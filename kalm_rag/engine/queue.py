"""Decoder passes in turn: who finds the model free decodes at once; who finds it busy may share the next pass.

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

from kalm_rag.states import StateBatch, merge_batches

logger = logging.getLogger(__name__)

Decode = Callable[[Sequence[Any], StateBatch, "int | None"], "list[float]"]
"""Runs one pass: a prompt per row, states, ratio; gives one margin per row. May fail."""


class Request:
    """One query's passages on their way through the decoder.

    Args:
        decode: Runs a pass, of this request alone or together with others like it.
        prompt: What `decode` takes for each row.
        states: The passages, at least one.
        ratio: As `decode` takes it.
        share: Most rows of one pass, >= 1. A larger request is decoded in slices, between which others get their turn.
    """

    def __init__(self, decode: Decode, prompt: Any, states: StateBatch, ratio: int | None, *, share: int) -> None:  # noqa: ANN401
        self.decode, self.prompt, self.states, self.ratio, self.share = decode, prompt, states, ratio, share
        self.kind = (share, ratio, states.ratio, states.vectors.dtype)
        self.margins = [0.0] * len(states)
        self.error: BaseException | None = None
        self.turn = threading.Event()
        self.cancelled = _cancelled.get()
        lengths = states.lengths.tolist()
        rows = range(len(states))
        self.rest = list(rows) if len(rows) <= share else sorted(rows, key=lambda i: -lengths[i])  # like with like

    @property
    def done(self) -> bool:
        """Whether all rows are decoded, or never will be."""
        return self.error is not None or not self.rest

    def slice(self) -> StateBatch:
        """States of the rows that go next."""
        rows = self.rest[: self.share]
        return self.states if len(rows) == len(self.states) else self.states.select(rows)

    def take(self, margins: Sequence[float]) -> None:
        """Keep the margins of the rows that `slice` gave."""
        for row, margin in zip(self.rest[: self.share], margins, strict=True):
            self.margins[row] = margin
        self.rest = self.rest[self.share :]


class DecodeQueue:
    """The line before one loaded model: one pass at a time, first come first served.

    A pass takes the first in line, and with it those behind it that fit into the same pass whole. A request larger
    than a pass goes to the end of the line after each slice, so nobody waits for more than a slice of it at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line: deque[Request] = deque()
        self._busy = False

    def run(self, request: Request) -> list[float]:
        """Wait for the turn, decode, give the margins in the order of the states.

        Raises:
            CancelledError: (of `concurrent.futures`) if the caller gave up while the request waited; see
                `cancel_on_error`.
            BaseException: Whatever `decode` raises for this request; those of others never come out here.
        """
        with self._lock:
            first, self._busy = not self._busy, True
            self._line.append(request)
        if not first:
            self._wait(request)
        while not request.done:  # woken with work left: the next pass is ours to run
            request.turn.clear()
            self._pass(request)
            if not request.done:
                self._wait(request)
        if request.error is not None:
            raise request.error
        return request.margins

    def _wait(self, request: Request) -> None:
        try:
            request.turn.wait()
        except BaseException as err:  # Ctrl-C in the waiting thread: nobody behind it must wait for it
            with self._lock:
                leads = request.turn.is_set() and not request.done
                request.error = err
                if request in self._line:
                    self._line.remove(request)
                if leads:
                    self._hand_over()
            raise

    def _pass(self, leader: Request) -> None:
        """Decode what is next in line, then hand over."""
        with self._lock:
            group = self._gather()
        try:
            _decode(group)
        except BaseException as err:  # Ctrl-C: ours ends here, the others go on
            leader.error = err
            raise
        finally:
            with self._lock:
                for request in group:
                    if not request.done:
                        self._line.append(request)
                    elif request is not leader:
                        request.turn.set()
                self._hand_over()

    def _gather(self) -> list[Request]:
        """Take from the line what shares the next pass; those whose callers gave up leave it undecoded."""
        group: list[Request] = []
        rest: deque[Request] = deque()
        room = 0
        for request in self._line:
            size = len(request.rest)
            if request.cancelled is not None and request.cancelled.is_set():
                request.error = CancelledError("the caller gave up before the request was decoded")
                request.turn.set()
            elif not group:
                group.append(request)
                room = request.share - size
            elif size <= room and request.kind == group[0].kind:
                group.append(request)
                room -= size
            else:
                rest.append(request)
        self._line = rest
        return group

    def _hand_over(self) -> None:
        """Wake the first in line to run the next pass; without one, the model is free. Needs the lock."""
        self._busy = bool(self._line)
        if self._line:
            self._line[0].turn.set()


def _decode(group: Sequence[Request]) -> None:
    """Run one pass; if a shared one fails, each runs alone, so that an error hits only whose it is."""
    if len(group) > 1:
        slices = [request.slice() for request in group]
        ends = [sum(map(len, slices[: i + 1])) for i in range(len(slices))]
        spans = [range(end - len(one), end) for end, one in zip(ends, slices, strict=True)]
        prompts = [request.prompt for request, one in zip(group, slices, strict=True) for _ in range(len(one))]
        try:
            merged = merge_batches(ends[-1], list(zip(spans, slices, strict=True)))
            margins = group[0].decode(prompts, merged, group[0].ratio)
        except Exception as err:  # told below, to the one that it belongs to
            logger.debug("a pass shared by %d queries failed (%r); running them one by one.", len(group), err)
        else:
            for request, span in zip(group, spans, strict=True):
                request.take(margins[span.start : span.stop])
            return
    for request in group:
        try:
            one = request.slice()
            request.take(request.decode([request.prompt] * len(one), one, request.ratio))
        except Exception as err:
            request.error = err


_cancelled: ContextVar[threading.Event | None] = ContextVar("kalm_rag_given_up", default=None)
_turns: weakref.WeakKeyDictionary[object, DecodeQueue] = weakref.WeakKeyDictionary()
_turns_lock = threading.Lock()


@contextmanager
def cancel_on_error() -> Iterator[None]:
    """Wrap an ``await`` on a thread: if it ends by an exception, requests made in there and still waiting are dropped.

    The thread must run in a copy of this context, as ``asyncio.to_thread`` and LangChain's ``run_in_executor`` see to.
    """
    flag = threading.Event()
    token = _cancelled.set(flag)
    try:
        yield
    except BaseException:
        flag.set()
        raise
    finally:
        _cancelled.reset(token)


def queue_of(model: object) -> DecodeQueue:
    """The line before a model: the same for all engines that share it, gone when it is."""
    with _turns_lock:
        return _turns.setdefault(model, DecodeQueue())


def _start_anew() -> None:
    """After a fork, in the child: those who held locks or ran a pass are not there."""
    global _turns, _turns_lock
    _turns, _turns_lock = weakref.WeakKeyDictionary(), threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_start_anew)
