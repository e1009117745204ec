"""The command line: index, query, rank, verify, gc, train, eval, demo. Thin; all work is done by the library."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from tqdm.auto import tqdm

from kalm_rag.cli import evaluate, train
from kalm_rag.cli.terminal import AsJson, Model, System, Task, err, out, telling
from kalm_rag.cli.terminal import errors as _errors
from kalm_rag.cli.terminal import print_json as _print_json
from kalm_rag.cli.terminal import stages as _stages
from kalm_rag.errors import InputError
from kalm_rag.instructions import Instructions

if TYPE_CHECKING:  # torch and Chroma take seconds to import; --help must not
    from kalm_rag.index import ChromaIndex
    from kalm_rag.index.folder import Source, SyncReport
    from kalm_rag.index.results import QueryResult

app = typer.Typer(
    help="Two-phase reranking over a Chroma database: passages are encoded once, only a decoder runs per query.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.add_typer(evaluate.app)
app.add_typer(train.app)

Database = Annotated[Path, typer.Option("--db", help="Folder of the Chroma database.")]
Name = Annotated[str, typer.Option("--collection", help="Name of the collection.")]
TopN = Annotated[int, typer.Option("--top-n", help="Hits to show.")]
FetchK = Annotated[int, typer.Option("--fetch-k", help="Candidates the vector search gives.")]
Ratio = Annotated[int | None, typer.Option(help="Tokens a state stands for.", show_default=False)]
Threshold = Annotated[float | None, typer.Option(help="Keep only P(yes) >= this.", show_default=False)]


def _progress(items: Any, description: str, unit: str) -> Any:  # noqa: ANN401 - any iterable
    return tqdm(items, desc=description, unit=unit, leave=False, file=sys.stderr, disable=not sys.stderr.isatty())


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(help="Folder with .txt, .md, .rst, .html and .pdf files.")],
    db: Database,
    collection: Name = "passages",
    model: Model = None,
    ratio: Ratio = None,
    codec: Annotated[str | None, typer.Option(help="exact, bf16 or int8; as stored, or exact.")] = None,
    as_json: AsJson = False,
) -> None:
    """Index a folder; run again, it touches only what changed and removes what is gone."""
    with _errors():
        from kalm_rag.index.folder import folder_sources

        sources = folder_sources(folder)
        with _open(db, collection, model=model, ratio=ratio, codec=codec) as opened:
            scope = f"{folder.resolve().name}/"
            report = _sync(opened, sources, scope, str(folder.resolve()))
            if as_json:
                _print_json(_sync_dict(report))
            else:
                _print_sync(report, opened)
            if report.unreadable:
                raise typer.Exit(1)


@app.command()
def query(
    text: Annotated[str, typer.Argument(help="The question.")],
    db: Database,
    collection: Name = "passages",
    model: Model = None,
    system: System = None,
    task: Task = None,
    top_n: TopN = 5,
    fetch_k: FetchK = 50,
    ratio: Ratio = None,
    threshold: Threshold = None,
    as_json: AsJson = False,
) -> None:
    """Search by vector, rerank with the decoder, show where each hit came from."""
    with _errors(), _open(db, collection, model=model, create=False) as opened:
        result = opened.query(
            text,
            top_n=top_n,
            fetch_k=fetch_k,
            instructions=Instructions(system=system, task=task),
            ratio=ratio,
            threshold=threshold,
        )
        if as_json:
            _print_json(result.to_dict())
        else:
            _print_result(result)


@app.command()
def rank(
    text: Annotated[str, typer.Argument(help="The question.")],
    passages: Annotated[list[str] | None, typer.Argument(help="Passages; none reads one a line from stdin.")] = None,
    model: Model = None,
    system: System = None,
    task: Task = None,
    top_n: Annotated[int | None, typer.Option("--top-n", help="Passages to show.", show_default=False)] = None,
    threshold: Threshold = None,
    as_json: AsJson = False,
) -> None:
    """Order passages by relevance, without any database."""
    with _errors():
        from kalm_rag.engine.reranker import Reranker

        texts = passages if passages else [line.rstrip("\n") for line in sys.stdin if line.strip()]
        with Reranker.from_pretrained(model if model is not None else "pico") as engine:
            ranking = engine.rank(
                text, texts, top_n=top_n, threshold=threshold, instructions=Instructions(system=system, task=task)
            )
        if as_json:
            _print_json(
                [
                    {"index": r.index, "margin": r.margin, "probability": r.probability, "text": texts[r.index]}
                    for r in ranking
                ]
            )
            return
        table = Table("P(yes)", "margin", "passage")
        for one in ranking:
            table.add_row(f"{one.probability:.3f}", f"{one.margin:+.2f}", escape(_shorten(texts[one.index], 200)))
        out.print(table)


@app.command()
def verify(
    db: Database,
    collection: Name = "passages",
    model: Model = None,
    repair: Annotated[bool, typer.Option(help="Encode what is missing or damaged, mend references.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare every record with its states; exit 1 if they don't agree."""
    with _errors(), _open(db, collection, model=model, create=False) as opened:
        mended = opened.backfill() if repair else None
        report = opened.verify()
        faults = {name: getattr(report, name) for name in ("missing", "stale", "unreferenced", "orphans", "damaged")}
        if as_json:
            _print_json(
                {"records": report.records, "clean": report.clean, "without_text": report.without_text, **faults}
            )
        else:
            if mended is not None:
                out.print(
                    f"repaired: {mended.encoded} passages encoded, {mended.referenced} references mended, "
                    f"{mended.dropped} dropped, {mended.discarded} damaged states discarded"
                )
            out.print(f"{report.records} records, {len(report.without_text)} without text")
            for name, ids in faults.items():
                out.print(f"  {name:13} {len(ids)}" + (f"  first: {ids[0]}" if ids else ""))
            out.print("clean" if report.clean else "[red]not clean[/red]: run again with --repair")
        if not report.clean:
            raise typer.Exit(1)


@app.command()
def gc(db: Database, collection: Name = "passages", model: Model = None, as_json: AsJson = False) -> None:
    """Throw away states that no record uses any more."""
    with _errors(), _open(db, collection, model=model, create=False) as opened:
        swept = opened.gc()
        stats = opened.store.stats()
        if as_json:
            _print_json({"states": swept.states, "payload_bytes": swept.payload_bytes, "left": stats.states})
        else:
            out.print(
                f"removed {swept.states} states ({swept.payload_bytes / 1e6:.1f} MB); {stats.states} are left "
                f"({stats.payload_bytes / 1e6:.1f} MB of payload, {stats.disk_bytes / 1e6:.1f} MB on disk)"
            )


@app.command()
def bench(
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16; both.", show_default=False)] = None,
    candidates: Annotated[int, typer.Option(help="Passages of a query, Nano shape.")] = 100,
    passages: Annotated[int, typer.Option(help="Passages in the index that is asked.")] = 20_000,
    repeats: Annotated[int, typer.Option(help="Timed runs.")] = 5,
    clients: Annotated[int, typer.Option(help="Clients that ask at once.")] = 8,
    nano: Annotated[bool, typer.Option(help="Measure KaLM-Nano's shape too (random weights, 5 GB).")] = True,
    full: Annotated[bool, typer.Option(help="Published protocol over all candidates, not one batch of 32.")] = False,
    clock: Annotated[str, typer.Option(help="What ratios go by: wall, or cpu on a busy machine.")] = "wall",
    growth: Annotated[bool, typer.Option(help="How cost grows instead (up to a quarter of an hour).")] = False,
    plot: Annotated[Path | None, typer.Option(help="Folder for pictures.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Time stored states against what a user would pick instead; ratios within one run."""
    with _errors():
        from transformers.utils import logging as transformers_logging

        from kalm_rag.bench import plots, suite
        from kalm_rag.bench.report import tables

        transformers_logging.disable_progress_bar()

        if plot is not None:
            plots.check_plots(plot)
        settings = suite.Settings(
            device=device,
            dtype=dtype,
            candidates=candidates,
            passages=passages,
            repeats=repeats,
            clients=clients,
            nano=nano,
            full=full,
            clock=clock,
            growth=growth,
            curves=plot is not None,
        )
        with err.status("starting ...") as status:
            report = suite.run(settings, telling(status))
        drawn = plots.draw(plot, report.laws) if plot is not None else []
        if as_json:
            _print_json(report.to_dict())
            return
        for part in tables(report):
            out.print(part)
        for path in drawn:
            out.print(f"drawn: {path}")


@app.command()
def demo(
    db: Annotated[Path, typer.Option("--db", help="Where to keep the demo's database.")] = Path(".kalm-demo"),
    model: Model = None,
    top_n: TopN = 5,
    fetch_k: FetchK = 50,
) -> None:
    """Index the Python language reference and ask it questions, offline; run again, it encodes nothing."""
    with _errors():
        from kalm_rag.cli.demo import QUESTIONS, SCOPE, reference_sources

        out.print("[bold]1. Index[/bold]: the Python language reference, encoded once, without any query")
        with _open(db, "python-reference", model=model) as opened:
            _print_sync(_sync(opened, reference_sources(), SCOPE), opened)
            for number, one in enumerate(QUESTIONS, 1):
                out.print(f"\n[bold]2.{number} {escape(one.query)}[/bold]")
                for name in ("system", "task"):
                    if (value := getattr(one.instructions, name)) is not None:
                        out.print(f"    {name}: {escape(value)}")
                _print_result(opened.query(one.query, top_n=top_n, fetch_k=fetch_k, instructions=one.instructions))
        out.print(
            f"\nThe database is {db}. Ask it yourself:\n"
            f'  kalm-rag query --db {db} --collection python-reference "your question" --task "what you are after"'
        )


def _open(db: Path, collection: str, *, create: bool = True, **options: Any) -> ChromaIndex:  # noqa: ANN401
    if not create and not db.is_dir():
        raise InputError(f"no database at {db}. Make one with: kalm-rag index FOLDER --db {db}")
    with err.status("loading the model ..."):
        from transformers.utils import logging as transformers_logging

        from kalm_rag.index import ChromaIndex

        transformers_logging.disable_progress_bar()
        return ChromaIndex.open(db, collection=collection, create=create, **options)


def _sync(opened: ChromaIndex, sources: list[Source], scope: str, origin: str = "") -> SyncReport:
    from kalm_rag.index.folder import sync

    wrap = partial(_progress, description="indexing", unit="document")
    return sync(opened, sources, scope=scope, origin=origin, progress=wrap)


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
        "truncated": report.added.truncated,
        "seconds": report.added.seconds,
    }


def _print_sync(report: SyncReport, opened: ChromaIndex) -> None:
    added, stats = report.added, opened.store.stats()
    total = sum(added.seconds.values())
    rate = f", {added.records / total:.0f} passages/s" if added.records and total else ""
    out.print(
        f"{report.sources} documents: {len(report.changed)} new or changed, {len(report.removed)} removed; "
        f"{added.records} passages written{rate}, {report.deleted} deleted"
    )
    out.print(
        f"encoded {added.encoded}, already in the store {added.from_store}, left alone {added.unchanged}"
        + (f"; {len(added.truncated)} longer than the model reads" if added.truncated else "")
    )
    if added.records:
        out.print("seconds: " + _stages(added.seconds))
    out.print(
        f"index: {len(opened)} passages, {stats.states} states of ratio {opened.store.layout.ratio}, "
        f"{stats.payload_bytes / 1e6:.1f} MB ({stats.disk_bytes / 1e6:.1f} MB on disk)"
    )
    for name, reason in report.unreadable.items():
        err.print(f"[yellow]could not read[/yellow] {escape(name)}: {escape(reason)}")


def _print_result(result: QueryResult) -> None:
    table = Table("now", "was", "", "P(yes)", "where", "passage")
    for place, hit in enumerate(result, 1):
        move = hit.retrieval_rank - place
        arrow = f"[green]↑{move}[/green]" if move > 0 else f"[red]↓{-move}[/red]" if move < 0 else "="
        probability = "-" if hit.probability is None else f"{hit.probability:.3f}"
        where = str(hit.metadata.get("source", hit.id))
        table.add_row(
            str(place),
            str(hit.retrieval_rank),
            arrow,
            probability,
            escape(where),
            escape(_shorten(hit.text or "", 110)),
        )
    out.print(table)
    out.print(
        f"{result.candidates} candidates: {result.from_store} from the store, {result.encoded} encoded now"
        + (f", {result.unscored} unscored" if result.unscored else "")
        + f"; seconds: {_stages(result.seconds)}"
    )


def _shorten(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."
