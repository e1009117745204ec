"""Whose instructions hold for a query: an override for this request, the query engine around, or the component's own.

Overrides live in a context variable: a thread or task sees those it set, or that were set when it was started.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.workflow import Workflow

from kalm_rag.errors import InputError
from kalm_rag.instructions import Instructions

logger = logging.getLogger(__name__)

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


def surrounding_instructions() -> Instructions | None:
    """Instructions of the engine, agent or workflow that is running a postprocessor just now; None if there are none.

    LlamaIndex gives postprocessors no way back to their engine, and one may sit in several; the innermost on the call
    stack that holds a prompt is the right one in every case (sync, async, nested, behind an app's own postprocessor,
    retriever or tool). One that lists postprocessors and holds none only retrieves: then nothing is followed.
    """
    asked: list[object] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        frame = frame.f_back
        if not isinstance(owner, BaseQueryEngine | BaseChatEngine | Workflow) or any(owner is one for one in asked):
            continue
        asked.append(owner)
        try:
            return Instructions.from_prompt(owner)
        except InputError as err:  # a RetrieverTool around, response_mode="no_text"
            logger.info("no prompt to follow in %s: %s", type(owner).__name__, err)
            if hasattr(owner, "_node_postprocessors"):
                return Instructions()
    return None
