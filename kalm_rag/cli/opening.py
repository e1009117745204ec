"""How commands open a database: checked before a model is loaded, with options that mean the same everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_rag.cli.terminal import command_line, working
from kalm_rag.errors import InputError

if TYPE_CHECKING:  # torch and Chroma take seconds to import; --help must not
    from kalm_rag.index import ChromaIndex
    from kalm_rag.index.home import CollectionHome
    from kalm_rag.store import StateStore

Database = Annotated[Path, typer.Option("--db", help="Folder of the Chroma database.")]
Name = Annotated[str, typer.Option("--collection", help="Name of the collection.")]
TopN = Annotated[int, typer.Option("--top-n", help="Hits to show.")]
FetchK = Annotated[int, typer.Option("--fetch-k", help="Candidates the vector search gives.")]
Ratio = Annotated[int | None, typer.Option(help="Tokens per state.", show_default="as stored, or 4")]
Codec = Annotated[
    str | None, typer.Option(help="How states are kept: exact, bf16 or int8.", show_default="as stored, or exact")
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--max-passage-tokens",
        help="Where passages are cut; a collection made with another limit goes over by backfill --change-model.",
        show_default="the collection's, or the model's",
    ),
]
Passage = Annotated[
    str | None,
    typer.Option(
        help=r"What is read of a record: document, or a template over its text and metadata such as '{title}\n{text}'.",
        show_default="the collection's, or document",
    ),
]
Embedder = Annotated[
    str | None,
    typer.Option(
        help="Sentence-transformers model that makes the vectors.", show_default="the bundled all-MiniLM-L6-v2"
    ),
]
Served = Annotated[Path | None, typer.Option("--db", help="Folder of the Chroma database.")]
Server = Annotated[
    str | None, typer.Option("--chroma", help="URL of a Chroma server instead, such as http://localhost:8000.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.", show_default="CUDA if there is one")]
Host = Annotated[str, typer.Option(help="Where to listen; beyond this machine with an API key only.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Answer whoever comes, without an API key.")]
GOES_ON = "What was finished is kept; run the same command again, and it goes on from there."


def has_index(db: Path) -> bool:
    """Whether a folder holds a Chroma database."""
    return (db.expanduser() / "chroma.sqlite3").is_file()


def open_index(db: Path, collection: str, *, create: bool = True, **options: Any) -> ChromaIndex:  # noqa: ANN401
    """Open a collection to search or fill it; `options` are `ChromaIndex.open`'s.

    Nothing is made where there is no database under ``create=False`` (InputError), or no such model (ModelError).
    """
    if not create:
        _require_index(db)
    with working("opening the index ..."):
        _quiet()
        from kalm_rag.index import ChromaIndex
        from kalm_rag.models.registry import find_checkpoint

        if create and options.get("model") not in (None, "pico"):
            find_checkpoint(options["model"])  # before a new collection notes it as what made it
        return ChromaIndex.open(db, collection=collection, create=create, **options)


@contextmanager
def open_home(
    db: Path,
    collection: str,
    *,
    model: str | None = None,
    passage: str | None = None,
    ratio: int | None = None,
    codec: str | None = None,
    max_passage_tokens: int | None = None,
    change_model: bool = False,
) -> Iterator[CollectionHome]:
    """Open a collection to look after its states: whatever made its vectors, and without a model until one is needed.

    Nothing is made where there is no such collection (InputError). Under `change_model` passages are cut where the
    model cuts them today, if no limit is named.
    """
    _require_index(db)
    with working("opening the index ..."):
        _quiet()
        from kalm_rag.index.collection import CollectionNotes
        from kalm_rag.index.home import CollectionHome
        from kalm_rag.index.lazy_engine import EngineSpec
        from kalm_rag.index.place import CollectionPlace
        from kalm_rag.models.registry import passage_limit

        given = CollectionNotes(model=model, passage=plain_passage(passage))
        named = model if model is not None else "pico"  # else the collection's
        spec = EngineSpec(model=named, ratio=ratio, max_passage_tokens=max_passage_tokens)
        database, found = CollectionPlace(name=collection, folder=db, create=False).open()
        try:
            if change_model and max_passage_tokens is None:
                made = CollectionNotes.read(found.metadata).model
                reads = named if model is not None or made is None else made
                spec = replace(spec, max_passage_tokens=passage_limit(reads))
            home = CollectionHome(
                database, found, spec, given, ratio=ratio, codec=codec, change_model=change_model, own_engine=True
            )
        except BaseException:
            database.close()
            raise
    try:
        yield home
    finally:
        home.close()


def stored(store: StateStore) -> str:
    """What a store holds of its model, in a few words."""
    stats = store.stats()
    sizes = f"{stats.payload_bytes / 1e6:.1f} MB ({stats.disk_bytes / 1e6:.1f} MB on disk)"
    return f"{stats.states} states of ratio {store.layout.ratio}, {sizes}"


def plain_passage(passage: str | None) -> str | None:
    r"""A passage rule as it is typed in a shell: ``\n`` is a new line."""
    from kalm_rag.index.passage_rule import PassageRule

    return None if passage is None else str(PassageRule(passage.replace("\\n", "\n")))


def _require_index(db: Path) -> None:
    if not has_index(db):
        made = f"Make one with: {command_line('kalm-rag', 'index', 'FOLDER', '--db', db)}"
        raise InputError(f"no database at {db}. {made}")


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
