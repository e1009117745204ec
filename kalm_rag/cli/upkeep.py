"""The commands that keep an index sound: backfill, verify, repair, gc. Thin; all work is done by the library."""

from __future__ import annotations

import sys
from dataclasses import asdict
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
    open_home,
    open_index,
    stored,
)
from kalm_rag.cli.terminal import DAILY, AsJson, Model, command_line, errors, out, print_json, shown, working

if TYPE_CHECKING:  # torch and Chroma take seconds to import; --help must not
    from kalm_rag.index.home import CollectionHome
    from kalm_rag.index.results import BackfillReport, VerifyReport

app = typer.Typer()

_FAULTS = {
    "missing": "records whose text has no states",
    "stale": "records whose states are of an older text",
    "unreferenced": "records whose states may be swept",
    "orphans": "states of records that are gone",
    "damaged": "states that fail their checksum",
    "unfindable": "records that no search finds",
}


@app.command(rich_help_panel=DAILY)
def backfill(
    db: Database,
    collection: Name = "passages",
    model: Model = None,
    passage: Passage = None,
    ratio: Ratio = None,
    codec: Codec = None,
    max_passage_tokens: Limit = None,
    change_model: Annotated[
        bool,
        typer.Option("--change-model", help="Go over to another model, limit or passage rule: all is encoded again."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make the states that a collection lacks, e.g. one that your app filled; its records are left as they are."""
    told: dict[str, Any] = {"model": model, "passage": passage, "ratio": ratio, "codec": codec}
    told["max_passage_tokens"] = max_passage_tokens
    with errors(stopped=GOES_ON), open_home(db, collection, change_model=change_model, **told) as home:
        mended = home.backfill(show_progress=sys.stderr.isatty())
        stats, records = home.store().stats(), home.collection.count()
        if as_json:
            print_json(asdict(mended) | {"records": records, "states": stats.states})
            return
        out.print(_mended(mended))
        out.print(f"{records} records, {stored(home.store())}")


@app.command(rich_help_panel=DAILY)
def verify(
    db: Database,
    collection: Name = "passages",
    model: Model = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Encode what is missing or damaged, mend references.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare every record with its states, and look for each; exit 1 if something is wrong."""
    with errors(stopped=GOES_ON), open_home(db, collection, model=model) as home:
        mended = home.backfill(show_progress=sys.stderr.isatty()) if repair else None
        report = _verify(home)
        if mended is not None and not as_json:
            out.print(f"repaired: {_mended(mended)}")
        _tell(report, db, collection, asdict(report) if as_json else None)


@app.command(rich_help_panel=DAILY)
def repair(
    db: Database, collection: Name = "passages", model: Model = None, embedder: Embedder = None, as_json: AsJson = False
) -> None:
    """Make a collection again whose search is broken, out of its own records; nothing is encoded that has states."""
    with (
        errors(stopped="The collection is as it was, or new; run the same command again."),
        open_index(db, collection, model=model, embedder=embedder, create=False) as index,
    ):
        rebuilt = index.rebuild(show_progress=sys.stderr.isatty())
        report = _verify(index.home)
        if not as_json:
            out.print(
                f"{rebuilt.records} records in the new collection: {rebuilt.kept} vectors kept, "
                f"{rebuilt.embedded} made again; {rebuilt.encoded} passages encoded"
            )
        _tell(report, db, collection, asdict(rebuilt) if as_json else None)


@app.command(rich_help_panel=DAILY)
def gc(
    db: Database,
    collection: Name = "passages",
    younger_than: Annotated[
        float, typer.Option(help="Seconds; what was written since stays, as its writer may not be done.")
    ] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Throw away states that no record uses any more."""
    with errors(), open_home(db, collection) as home:
        swept = home.gc(younger_than=younger_than)
        left = [store.stats() for store in home.stores()]
        states, payload = sum(s.states for s in left), sum(s.payload_bytes for s in left)
        if as_json:
            print_json(asdict(swept) | {"left": states})
        else:
            out.print(
                f"removed {swept.states} states ({swept.payload_bytes / 1e6:.1f} MB); {states} are left "
                f"({payload / 1e6:.1f} MB of payload, {sum(s.disk_bytes for s in left) / 1e6:.1f} MB on disk)"
            )


def _verify(home: CollectionHome) -> VerifyReport:
    with working("looking at every record ..."):
        return home.verify()


def _tell(report: VerifyReport, db: Path, collection: str, fields: dict[str, Any] | None) -> None:
    """Print the report, or for JSON the fields and whether it is clean; exit with 1 if it isn't."""
    if fields is not None:
        print_json(fields | {"clean": report.clean})
    else:
        _print_verify(report, command_line("kalm-rag", "repair", "--db", db, "--collection", collection))
    if not report.clean:
        raise typer.Exit(1)


def _print_verify(report: VerifyReport, remedy: str) -> None:
    out.print(f"{report.records} records, {len(report.without_text)} without text")
    for name, meaning in _FAULTS.items():
        ids = getattr(report, name)
        out.print(f"  {len(ids)} {meaning}" + (f"; first: {shown(ids[0])}" if ids else ""), soft_wrap=True)
    if report.clean:
        out.print("clean")
    elif report.unfindable:
        out.print(f"[red]not clean[/red]: make the collection again with: {shown(remedy)}", soft_wrap=True)
    else:
        out.print("[red]not clean[/red]: run kalm-rag verify with --repair")


def _mended(report: BackfillReport) -> str:
    return (
        f"{report.encoded} passages encoded, {report.referenced} references mended, {report.dropped} dropped, "
        f"{report.discarded} damaged states discarded"
    )
