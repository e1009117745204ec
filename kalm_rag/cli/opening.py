"""How commands open a database: checked before a model is loaded, with options that mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_rag.cli.terminal import command_line, working
from kalm_rag.errors import InputError

if TYPE_CHECKING:  # torch and Chroma take seconds to import; --help must not
    from kalm_rag.index import ChromaIndex

Database = Annotated[Path, typer.Option("--db", help="Folder of the Chroma database.")]
Name = Annotated[str, typer.Option("--collection", help="Name of the collection.")]
TopN = Annotated[int, typer.Option("--top-n", help="Hits to show.")]
FetchK = Annotated[int, typer.Option("--fetch-k", help="Candidates the vector search gives.")]
GOES_ON = "What was finished is kept; run the same command again, and it goes on from there."


def has_index(db: Path) -> bool:
    """Whether a folder holds a Chroma database."""
    return (db / "chroma.sqlite3").is_file()


def open_index(db: Path, collection: str, *, create: bool = True, **options: Any) -> ChromaIndex:  # noqa: ANN401
    """Open a collection; `options` are `ChromaIndex.open`'s.

    Raises:
        InputError: If there is no database under ``create=False``; nothing is made then.
    """
    if not create and not has_index(db):
        made = f"Make one with: {command_line('kalm-rag', 'index', 'FOLDER', '--db', db)}"
        raise InputError(f"no database at {db}. {made}")
    with working("opening the index ..."):
        from transformers.utils import logging as transformers_logging

        from kalm_rag.index import ChromaIndex

        transformers_logging.disable_progress_bar()
        return ChromaIndex.open(db, collection=collection, create=create, **options)
