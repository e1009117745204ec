"""The commands that keep an index sound: backfill, verify, gc. Thin; all work is done by the library."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kalm_rag.cli.opening import GOES_ON, Database, Name, open_index
from kalm_rag.cli.terminal import DAILY, AsJson, Model, errors, out, print_json, shown, working

if TYPE_CHECKING:  # torch and Chroma take seconds to import; --help must not
    from kalm_rag.index.results import BackfillReport

app = typer.Typer()


@app.command(rich_help_panel=DAILY)
def backfill(db: Database, collection: Name = "passages", model: Model = None, as_json: AsJson = False) -> None:
    """Make the states that a collection lacks, e.g. one that your app filled; its records are left as they are."""
    with errors(stopped=GOES_ON), open_index(db, collection, model=model, create=False) as opened:
        with working("encoding what has no states; Ctrl-C is safe ..."):
            mended = opened.backfill()
        stats = opened.store.stats()
        if as_json:
            print_json(asdict(mended) | {"records": len(opened), "states": stats.states})
            return
        out.print(_mended(mended))
        out.print(
            f"{len(opened)} records, {stats.states} states of ratio {opened.store.layout.ratio}, "
            f"{stats.payload_bytes / 1e6:.1f} MB ({stats.disk_bytes / 1e6:.1f} MB on disk)"
        )


def _mended(report: BackfillReport) -> str:
    return (
        f"{report.encoded} passages encoded, {report.referenced} references mended, {report.dropped} dropped, "
        f"{report.discarded} damaged states discarded"
    )


@app.command(rich_help_panel=DAILY)
def verify(
    db: Database,
    collection: Name = "passages",
    model: Model = None,
    repair: Annotated[bool, typer.Option(help="Encode what is missing or damaged, mend references.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare every record with its states; exit 1 if they don't agree."""
    with errors(stopped=GOES_ON), open_index(db, collection, model=model, create=False) as opened:
        mended = opened.backfill() if repair else None
        report = opened.verify()
        faults = {name: getattr(report, name) for name in ("missing", "stale", "unreferenced", "orphans", "damaged")}
        if as_json:
            print_json(
                {"records": report.records, "clean": report.clean, "without_text": report.without_text, **faults}
            )
        else:
            if mended is not None:
                out.print(f"repaired: {_mended(mended)}")
            out.print(f"{report.records} records, {len(report.without_text)} without text")
            for name, ids in faults.items():
                out.print(f"  {name:13} {len(ids)}" + (f"  first: {shown(ids[0])}" if ids else ""))
            out.print("clean" if report.clean else "[red]not clean[/red]: run again with --repair")
        if not report.clean:
            raise typer.Exit(1)


@app.command(rich_help_panel=DAILY)
def gc(db: Database, collection: Name = "passages", model: Model = None, as_json: AsJson = False) -> None:
    """Throw away states that no record uses any more."""
    with errors(), open_index(db, collection, model=model, create=False) as opened:
        swept = opened.gc()
        stats = opened.store.stats()
        if as_json:
            print_json({"states": swept.states, "payload_bytes": swept.payload_bytes, "left": stats.states})
        else:
            out.print(
                f"removed {swept.states} states ({swept.payload_bytes / 1e6:.1f} MB); {stats.states} are left "
                f"({stats.payload_bytes / 1e6:.1f} MB of payload, {stats.disk_bytes / 1e6:.1f} MB on disk)"
            )
