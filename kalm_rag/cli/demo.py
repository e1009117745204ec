"""The demo's material: the Python language reference that every CPython carries, and questions about it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import import_module

from kalm_rag.index.folder import Source, text_digest
from kalm_rag.instructions import Instructions

SCOPE = "python/"


@dataclass(frozen=True)
class Question:
    """One query of the demo under its instructions."""

    query: str
    instructions: Instructions


QUESTIONS = (
    Question("How do I run cleanup code even when an exception is raised?", Instructions()),
    Question("What makes two objects equal?", Instructions()),
    Question(
        "What makes two objects equal?",
        Instructions(task="Find passages about special methods such as __eq__ and __hash__ that a class defines."),
    ),
    Question("How are names looked up inside a class body?", Instructions()),
    Question(
        "yield",
        Instructions(system="You help people who write asynchronous code.", task="Explain asynchronous generators."),
    ),
)


def reference_sources() -> list[Source]:
    """The topics of ``pydoc_data.topics`` (~465 kB of text), one document each."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return [
        Source(f"{SCOPE}{name}", text_digest(text.encode()), partial(str, text))
        for name, text in sorted(topics.items())
    ]
