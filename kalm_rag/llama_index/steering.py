"""Whose instructions hold for a query: an override for this request, the query engine around, or the component's own.

Overrides live in a context variable: a thread or task sees those it set, or that were set when it was started. So do
the engines that run, which LlamaIndex's instrumentation tells of: tasks and ``asyncio.to_thread`` take them along.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.instrumentation.span import BaseSpan
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.workflow import Workflow
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.dispatcher import DISPATCHER_SPAN_DECORATED_ATTR

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


class _Running:
    """An engine that is answering, and the one around it; what a context that outlives the answer still holds."""

    def __init__(self, engine: object, around: _Running | None) -> None:
        self.engine: object | None = engine
        self.around = around


_innermost: ContextVar[_Running | None] = ContextVar("kalm_rag_running_engine", default=None)


class RunningEngines(BaseSpanHandler[BaseSpan]):
    """Notes in a context variable which engines, chat engines, agents and workflows are running, from their spans."""

    @classmethod
    def class_name(cls) -> str:
        """Name among the span handlers."""
        return "KaLMRunningEngines"

    def span_enter(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: object = None,
        parent_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Note an engine that begins."""
        if isinstance(instance, _ENGINES) and not _only_starts(instance, id_):
            _running[id_] = node = _Running(instance, _open(_innermost.get()))
            _innermost.set(node)

    def span_exit(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: object = None,
        result: object = None,
        **kwargs: object,
    ) -> None:
        """Forget an engine that has answered, also where tasks that it started still run."""
        ended = _running.pop(id_, None)
        if ended is not None:
            ended.engine = None
            if _innermost.get() is ended:
                _innermost.set(ended.around)

    def span_drop(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: object = None,
        err: BaseException | None = None,
        **kwargs: object,
    ) -> None:
        """Forget an engine that has failed."""
        self.span_exit(id_, bound_args)

    def new_span(self, *args: object, **kwargs: object) -> None:
        """Keep no spans."""

    def prepare_to_exit_span(self, *args: object, **kwargs: object) -> None:
        """Keep no spans."""

    def prepare_to_drop_span(self, *args: object, **kwargs: object) -> None:
        """Keep no spans."""


_ENGINES = (BaseQueryEngine, BaseChatEngine, Workflow)
_running: dict[str, _Running] = {}
_watcher = RunningEngines()


def watch_engines() -> None:
    """Be told of engines that run from now on, as each tracer is; once in a process."""
    root = get_dispatcher()
    if not any(handler is _watcher for handler in root.span_handlers):
        root.add_span_handler(_watcher)


def surrounding_instructions() -> Instructions | None:
    """Instructions of the engine, agent or workflow that is running a postprocessor just now; None if there are none.

    LlamaIndex gives postprocessors no way back to their engine, and one may sit in several; the innermost that holds a
    prompt is the right one in every case (sync, async, nested, behind an app's own postprocessor, retriever or tool,
    in a task or thread that inherits its context). One that lists postprocessors and holds none only retrieves: then
    nothing is followed.
    """
    asked: list[object] = []
    for owner in _surrounding():
        if any(owner is one for one in asked):
            continue
        asked.append(owner)
        try:
            return Instructions.from_prompt(owner)
        except InputError as err:  # a RetrieverTool around, response_mode="no_text"
            logger.info("no prompt to follow in %s: %s", type(owner).__name__, err)
            if hasattr(owner, "_node_postprocessors"):
                return Instructions()
    return None


def _surrounding() -> Iterator[object]:
    """Engines around, the innermost first: those of the call stack, and those whose tasks or threads this is in."""
    noted, node = list[object](), _open(_innermost.get())
    while node is not None:
        noted.append(node.engine)
        node = _open(node.around)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        frame = frame.f_back
        if isinstance(owner, _ENGINES):
            inner = next((place for place, engine in enumerate(noted) if engine is owner), 0)
            yield from noted[:inner]  # running in a task of an event loop that `owner` started
            noted = noted[inner:]
            yield owner
    yield from noted


def _open(node: _Running | None) -> _Running | None:
    """The first of a node and those around it whose engine is still answering."""
    while node is not None and node.engine is None:
        node = node.around
    return node


def _only_starts(engine: object, span: str) -> bool:
    """Whether a span is of a workflow's ``run``, which gives a future at once: its caller isn't inside."""
    if not isinstance(engine, Workflow) or not span.startswith(f"{type(engine).__name__}.run-"):
        return False
    runs = (vars(kind).get("run") for kind in type(engine).__mro__)
    return any(hasattr(run, DISPATCHER_SPAN_DECORATED_ATTR) for run in runs)
