"""``kalm-rag demo`` and its material: the Python language reference that every CPython carries, questions about it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kalm_rag.cli.index import print_sync, sync_documents
from kalm_rag.cli.opening import GOES_ON, FetchK, TopN, open_index
from kalm_rag.cli.search import print_result
from kalm_rag.cli.terminal import DAILY, Model, command_line, errors, out, shown
from kalm_rag.instructions import Instructions

if TYPE_CHECKING:  # torch and Chroma take seconds to import; --help must not
    from kalm_rag.index.folder import Document

app = typer.Typer()

COLLECTION = "python-reference"
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


@app.command(rich_help_panel=DAILY)
def demo(
    db: Annotated[Path, typer.Option("--db", help="Where to keep the demo's database.")] = Path(".kalm-demo"),
    model: Model = None,
    top_n: TopN = 5,
    fetch_k: FetchK = 50,
) -> None:
    """Index the Python language reference and ask it questions, offline; run again, it encodes nothing."""
    with errors(stopped=GOES_ON):
        out.print("[bold]1. Index[/bold]: the Python language reference, encoded once, without any query")
        with open_index(db, COLLECTION, model=model) as opened:
            print_sync(sync_documents(opened, reference_documents(), SCOPE), opened)
            for number, question in enumerate(QUESTIONS, 1):
                out.print(f"\n[bold]2.{number} {shown(question.query)}[/bold]")
                for name in ("system", "task"):
                    if (value := getattr(question.instructions, name)) is not None:
                        out.print(f"    {name}: {shown(value)}")
                result = opened.query(question.query, top_n=None, fetch_k=fetch_k, instructions=question.instructions)
                print_result(result, top_n)
        ask = command_line(
            *("kalm-rag", "query", "How do I make a class callable?", "--db", db, "--collection", COLLECTION),
            *("--task", "Explain the special method."),
        )
        out.print(f"\nThe database is {shown(str(db))}. Ask it yourself:\n{shown(ask)}", soft_wrap=True)
        serve = command_line("kalm-rag", "serve", "--db", db, "--collection", COLLECTION)
        extra = shown("'kalm-rag[serve]'")
        out.print(f"Or serve it over HTTP (pip install {extra}): {shown(serve)}", soft_wrap=True)


def reference_documents() -> list[Document]:
    """The topics of ``pydoc_data.topics`` (~465 kB of text), one document each."""
    from kalm_rag.index.folder import Document, text_digest
    from kalm_rag.index.readers import DocumentText

    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return [
        Document(f"{SCOPE}{name}", text_digest(text.encode()), partial(DocumentText, text=text, title=name))
        for name, text in sorted(topics.items())
    ]
