"""``kalm-rag index``: a folder in, an index out. Thin; all work is done by the library."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_rag.cli.opening import GOES_ON, Database, Name, open_index
from kalm_rag.cli.terminal import DAILY, AsJson, Model, err, errors, out, print_json, progress, shown, stages

if TYPE_CHECKING:  # torch and Chroma take seconds to import; --help must not
    from kalm_rag.index import ChromaIndex
    from kalm_rag.index.folder import Source, SyncReport

app = typer.Typer()


@app.command(rich_help_panel=DAILY)
def index(
    folder: Annotated[Path, typer.Argument(help="Folder with .txt, .md, .rst, .html and .pdf files.")],
    db: Database,
    collection: Name = "passages",
    model: Model = None,
    ratio: Annotated[int | None, typer.Option(help="Tokens per state.", show_default="as stored, or 4")] = None,
    codec: Annotated[
        str | None, typer.Option(help="How states are kept: exact, bf16 or int8.", show_default="as stored, or exact")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Index a folder; run again, it touches only what changed and removes what is gone."""
    with errors(stopped=GOES_ON):
        from kalm_rag.index.folder import folder_sources

        sources = folder_sources(folder)
        with open_index(db, collection, model=model, ratio=ratio, codec=codec) as opened:
            scope = f"{folder.resolve().name}/"
            report = sync_documents(opened, sources, scope, str(folder.resolve()))
            if as_json:
                print_json(_sync_dict(report))
            else:
                print_sync(report, opened)
            if report.unreadable:
                raise typer.Exit(1)


def sync_documents(opened: ChromaIndex, sources: list[Source], scope: str, origin: str = "") -> SyncReport:
    """Bring an index up to the documents there are, with a bar on a terminal."""
    from kalm_rag.index.folder import sync

    wrap = partial(progress, description="indexing", unit="document")
    return sync(opened, sources, scope=scope, origin=origin, progress=wrap)


def print_sync(report: SyncReport, opened: ChromaIndex) -> None:
    """Tell what indexing did, in numbers that add up."""
    added, stats = report.added, opened.store.stats()
    total = sum(added.seconds.values())
    rate = f", {added.records / total:.0f} passages/s" if added.records and total else ""
    out.print(
        f"{report.sources} documents: {len(report.changed)} new or changed, {len(report.removed)} removed; "
        f"{added.records} passages written{rate}, {report.deleted} deleted"
    )
    repeats = added.records - added.encoded - added.from_store
    out.print(
        f"encoded {added.encoded}, already in the store {added.from_store}, "
        + (f"repeated here {repeats}, " if repeats else "")
        + f"left alone {added.unchanged}"
        + (f"; {len(added.truncated)} longer than the model reads" if added.truncated else "")
    )
    if added.records:
        out.print("seconds: " + stages(added.seconds))
    out.print(
        f"index: {len(opened)} passages, {stats.states} states of ratio {opened.store.layout.ratio}, "
        f"{stats.payload_bytes / 1e6:.1f} MB ({stats.disk_bytes / 1e6:.1f} MB on disk)"
    )
    for name, reason in report.unreadable.items():
        err.print(f"[yellow]could not read[/yellow] {shown(name)}: {shown(reason)}", soft_wrap=True)


def _sync_dict(report: SyncReport) -> dict[str, Any]:
    return {
        "documents": report.sources,
        "changed": report.changed,
        "removed": report.removed,
        "unreadable": report.unreadable,
        "deleted": report.deleted,
        "written": report.added.records,
        "unchanged": report.added.unchanged,
        "encoded": report.added.encoded,
        "from_store": report.added.from_store,
        "repeats": report.added.records - report.added.encoded - report.added.from_store,
        "truncated": report.added.truncated,
        "seconds": report.added.seconds,
    }
