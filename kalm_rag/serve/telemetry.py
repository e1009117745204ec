"""What is told of a server: counts for Prometheus, and log lines of JSON. Neither ever holds a text of a request."""

from __future__ import annotations

import json
import logging
import os
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

SHARED_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""The folder where the workers of one server add up their counts; prometheus-client reads it when it is imported."""
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_TELLING = {
    "name",
    "msg",
    "args",
    "levelname",
    "exc_info",
    "exc_text",
    "stack_info",
    "taskName",
    "message",
    "color_message",
}
_PLAIN = logging.makeLogRecord({}).__dict__.keys() | _TELLING


class Metrics:
    """What Prometheus is told.

    Args:
        queue_length: Gives how many requests are worked on and waiting.
    """

    def __init__(self, queue_length: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("kalm_rag_requests", "Requests answered.", ["route", "status"], registry=registry)
        self._seconds = Histogram(
            "kalm_rag_request_seconds", "Seconds of a request.", ["route"], buckets=_SECONDS, registry=registry
        )
        self._stages = Histogram(
            "kalm_rag_stage_seconds", "Seconds of a stage.", ["stage"], buckets=_SECONDS, registry=registry
        )
        self._states = Counter(
            "kalm_rag_states", "Passage states by where they came from: stored, or encoded now.", ["source"],
            registry=registry,
        )  # fmt: skip
        queue = Gauge(
            "kalm_rag_queue_length", "Requests worked on and waiting.", registry=registry,
            multiprocess_mode="livesum",
        )  # fmt: skip
        if SHARED_VARIABLE not in os.environ:  # a function's value can't be written to the shared folder
            queue.set_function(queue_length)
        self._queue, self._queue_length = queue, queue_length

    def count(self, route: str, status: int, seconds: float, facts: Mapping[str, Any]) -> None:
        """Count one answered request; `facts` may tell ``seconds`` by stage, ``stored`` and ``encoded`` states."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        for stage, spent in facts.get("seconds", {}).items():
            self._stages.labels(stage).observe(spent)
        for source in ("stored", "encoded"):
            self._states.labels(source).inc(facts.get(source, 0))
        if SHARED_VARIABLE in os.environ:
            self._queue.set(self._queue_length())

    def text(self) -> bytes:
        """All of it, as Prometheus reads it; of all workers together."""
        registry = self._registry
        if SHARED_VARIABLE in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


class JsonLines(logging.Formatter):
    """A log record as one line of JSON. Of an exception only its kind and place: its message may quote a request."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        line |= {key: value for key, value in record.__dict__.items() if key not in _PLAIN}
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            line["at"] = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(record.exc_info[2])[-3:]]
        return json.dumps(line, default=str)


def logging_settings() -> dict[str, Any]:
    """What ``logging.config.dictConfig`` takes: JSON lines on stderr, ours and uvicorn's."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": f"{__name__}.{JsonLines.__name__}"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            "kalm_rag": {"level": "INFO"},
            "uvicorn": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
        },
    }
