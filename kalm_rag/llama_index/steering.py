"""Whose instructions hold for a query: an override for this request, the query engine around, or the component's own.

Overrides live in a context variable: a thread or task sees those it set, or that were set when it was started.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from kalm_rag.instructions import Instructions

_overrides: ContextVar[Mapping[int, Instructions] | None] = ContextVar("kalm_rag_overrides", default=None)


@contextmanager
def override(component: object, instructions: Instructions) -> Iterator[None]:
    """Let other instructions hold for a component, in this thread or task, until the block ends."""
    now = _overrides.get()
    token = _overrides.set({**(now if now is not None else {}), id(component): instructions})
    try:
        yield
    finally:
        _overrides.reset(token)


def overriding(component: object) -> Instructions | None:
    """Instructions that `override` set here for a component."""
    now = _overrides.get()
    return now.get(id(component)) if now is not None else None


def calling_engine(component: object) -> Any | None:  # noqa: ANN401 - a query or chat engine of any make
    """Find the query or chat engine that is running a postprocessor just now.

    LlamaIndex gives postprocessors no way back to their engine, and one may sit in several; the engine on the call
    stack that lists `component` among its postprocessors, or one that called it (an app's wrapper around it), is the
    right one in every case (sync, async, nested).
    """
    callers = [component]
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        held = getattr(owner, "__dict__", {}).get("_node_postprocessors") if owner is not None else None
        if isinstance(held, list | tuple) and any(post is caller for post in held for caller in callers):
            return owner
        if owner is not None and owner is not callers[-1]:
            callers.append(owner)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None
