"""Processes that tests kill: forked from a server that has imported everything and opened nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers.models.t5gemma2.modeling_t5gemma2  # noqa: F401 - takes seconds, once for all children
from toy import reopen  # noqa: F401 - likewise

import kalm_rag.index.rebuilding
import kalm_rag.models.t5gemma2.backbone  # noqa: F401 - likewise

DIED = (-signal.SIGKILL, -signal.SIGALRM)
"""Exit codes of a child that was killed. An alarm that nobody handles ends a process as kill -9 does: at once."""
SECONDS = 60.0


def start(target: Callable[..., None], *arguments: Any) -> Any:
    """Run a function in a child."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.children"])
    process = context.Process(target=_begin, args=(target, *arguments), daemon=True)
    process.start()
    return process


def end(process: Any, seconds: float = SECONDS) -> int | None:
    """Exit code of a child; None if it doesn't end, and is killed."""
    process.join(seconds)
    code: int | None = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code


def _begin(target: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    target(*arguments)


class Points:
    """Counts the points that an action passes, and dies at one of them.

    Args:
        at: Which point; None only counts.
        delay: Seconds after it, so that a call is cut off in its middle.
    """

    def __init__(self, at: int | None = None, delay: float = 0.0) -> None:
        self.at, self.delay = at, delay
        self.passed: list[tuple[str, float]] = []

    def reach(self, name: str) -> None:
        """Come by a point."""
        self.passed.append((name, time.perf_counter()))
        if len(self.passed) - 1 == self.at:
            if self.delay:
                signal.setitimer(signal.ITIMER_REAL, self.delay)
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, holder: Any, name: str) -> None:
        """Make a function or method a point: before, and after it."""
        inner = getattr(holder, name)

        def outer(*arguments: Any, **options: Any) -> Any:
            self.reach(f"before {name}")
            result = inner(*arguments, **options)
            self.reach(f"after {name}")
            return result

        setattr(holder, name, outer)
