"""``kalm-rag index``: a folder in, an index out. Thin; all work is done by the library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sized
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_rag.cli.opening import (
    GOES_ON,
    Codec,
    Database,
    Embedder,
    Limit,
    Name,
    Passage,
    Ratio,
    has_index,
    open_index,
    plain_passage,
    stored,
)
from kalm_rag.cli.terminal import DAILY, AsJson, Model, err, errors, out, print_json, progress, shown, stages, working
from kalm_rag.errors import InputError

if TYPE_CHECKING:  # torch and Chroma take seconds to import; --help must not
    from kalm_rag.index import ChromaIndex
    from kalm_rag.index.folder import Document, SyncReport
    from kalm_rag.index.results import AddReport

app = typer.Typer()

_NAMES = 20
"""Names listed of each kind of document that was not indexed."""
_NOTHING = "{} holds no document; wanted .txt, .md, .rst, .html or .pdf files in it or below."


@app.command(rich_help_panel=DAILY)
def index(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder with .txt, .md, .rst, .html and .pdf files.")
    ],
    db: Database,
    collection: Name = "passages",
    model: Model = None,
    embedder: Embedder = None,
    passage: Passage = None,
    ratio: Ratio = None,
    codec: Codec = None,
    max_passage_tokens: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Index a folder; run again, it touches only what changed and removes what is gone."""
    with errors(stopped=GOES_ON):
        from kalm_rag.index.folder import folder_documents

        with working("reading the folder ..."):
            listing = folder_documents(folder)
        found = bool(listing.documents or listing.unreadable)
        if not found and not has_index(db):
            raise InputError(_NOTHING.format(folder))
        options = {"model": model, "embedder": embedder, "ratio": ratio, "codec": codec}
        options["max_passage_tokens"] = max_passage_tokens
        with open_index(db, collection, create=found, passage=plain_passage(passage), **options) as opened:
            report = sync_documents(
                opened, listing.documents, listing.scope, origin=listing.origin, unreadable=listing.unreadable
            )
            if not found and not report.removed:
                raise InputError(_NOTHING.format(folder))
            if as_json:
                print_json(_sync_dict(report))
            else:
                print_sync(report, opened)
            if report.unreadable:
                raise typer.Exit(1)


def sync_documents(
    opened: ChromaIndex,
    documents: list[Document],
    scope: str,
    *,
    origin: str = "",
    unreadable: Mapping[str, str] | None = None,
) -> SyncReport:
    """Bring an index up to the documents there are, with a bar on a terminal."""
    from kalm_rag.index.folder import sync

    wrap = partial(progress, description="indexing", unit="document")
    return sync(opened, documents, scope=scope, origin=origin, unreadable=unreadable, progress=wrap)


def print_sync(report: SyncReport, opened: ChromaIndex) -> None:
    """Tell what indexing did, in numbers that add up."""
    added = report.added
    kinds = _counts(
        *((report.new, "new"), (report.changed, "changed"), (report.unchanged, "unchanged")),
        *((report.empty, "without text"), (report.binary, "binary, left out")),
        (report.unreadable, "not readable, kept as indexed before"),
    )
    out.print(f"{report.documents} documents{kinds}; {len(report.removed)} removed, {report.deleted} passages deleted")
    if report.encodings:
        found = Counter(report.encodings.values()).most_common()
        out.print("decoded from " + ", ".join(f"{encoding} ({count})" for encoding, count in found))
    if added.records:
        total = sum(added.seconds.values())
        ways = _counts(
            *((range(added.encoded), "encoded"), (range(added.from_store), "already in the store")),
            (range(repeats_of(added)), "of a text beside it"),
        )
        out.print(f"{added.records} passages written in {total:.1f} s{ways}; {added.unchanged} left alone")
        out.print(f"seconds: {stages(added.seconds)}")
    if added.truncated:
        out.print(f"{len(added.truncated)} passages are longer than the model reads; it reads their beginnings")
    out.print(f"index: {len(opened)} passages, {stored(opened.store)}")
    _list_names("no text in", dict.fromkeys(report.empty, ""))
    _list_names("binary", dict.fromkeys(report.binary, ""))
    _list_names("could not read", report.unreadable)


def _counts(*groups: tuple[Sized, str]) -> str:
    parts = [f"{len(group)} {name}" for group, name in groups if len(group)]
    return ": " + ", ".join(parts) if parts else ""


def _list_names(what: str, names: Mapping[str, str]) -> None:
    for name in list(names)[:_NAMES]:
        reason = f": {shown(names[name])}" if names[name] else ""
        err.print(f"[yellow]{what}[/yellow] {shown(name)}{reason}", soft_wrap=True)
    if len(names) > _NAMES:
        err.print(f"[yellow]{what}[/yellow] {len(names) - _NAMES} more; --json lists all")


def repeats_of(added: AddReport) -> int:
    """Records whose text another record of the same batch brought to the encoder."""
    return added.records - added.encoded - added.from_store


def _sync_dict(report: SyncReport) -> dict[str, Any]:
    return {
        "documents": report.documents,
        "new": report.new,
        "changed": report.changed,
        "unchanged": len(report.unchanged),
        "empty": report.empty,
        "binary": report.binary,
        "unreadable": report.unreadable,
        "removed": report.removed,
        "encodings": report.encodings,
        "deleted": report.deleted,
        "written": report.added.records,
        "encoded": report.added.encoded,
        "from_store": report.added.from_store,
        "repeats": repeats_of(report.added),
        "left_alone": report.added.unchanged,
        "truncated": report.added.truncated,
        "seconds": report.added.seconds,
    }
