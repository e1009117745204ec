"""Passages to select from, two of them near copies and two equal, and a decoder that is held up: for every door."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kalm_rag import Reranker

QUERY = "What is the capital of France?"
TEXTS = [
    "Paris is the capital of France, and it has been so for most of the country's long and eventful history by now.",
    "Paris is the capital of France and it has been so for most of the country's long and eventful history by now",
    "The capital of France is Paris.",
    "I like tea.",
    "Berlin is the capital of Germany.",
    "The capital of France is Paris.",
]


@contextmanager
def held_decoder(engine: Reranker, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every pass of the decoder waits until the block ends; then no thread is left that ranks."""
    go_on, real = threading.Event(), engine.backbone.decode

    def held(*args: Any) -> Any:
        assert go_on.wait(60)
        return real(*args)

    monkeypatch.setattr(engine.backbone, "decode", held)
    try:
        yield
    finally:
        go_on.set()
    for thread in threading.enumerate():
        if thread.name == "kalm-rag-rank":
            thread.join(60)
            assert not thread.is_alive()
