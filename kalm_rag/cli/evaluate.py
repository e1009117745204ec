"""The commands that measure: eval, eval-instructions, curve. Thin; all work is done by `kalm_rag.evaluation`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kalm_rag.cli.terminal import (
    MEASURING,
    AsJson,
    System,
    Task,
    err,
    errors,
    out,
    print_json,
    print_text,
    shown,
    stages,
    working,
)
from kalm_rag.errors import InputError
from kalm_rag.instructions import Instructions

if TYPE_CHECKING:  # torch takes seconds to import; --help must not
    from kalm_rag.engine.reranker import Reranker
    from kalm_rag.evaluation import EvalSet
    from kalm_rag.evaluation.instructed import InstructionReport
    from kalm_rag.evaluation.metrics import Change
    from kalm_rag.evaluation.report import EvalReport, EvalRow, Summary

app = typer.Typer()

Data = Annotated[
    list[str], typer.Option(help="BEIR folder: FOLDER, FOLDER:SPLIT or FOLDER:SPLIT:pooled. Give it once per set.")
]
Split = Annotated[str, typer.Option(help="Judgements of sets that name no split.")]
Pooled = Annotated[bool, typer.Option(help="Rank only the passages that a query's judgements name, in every set.")]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="pico, nano, small, large, a repository id, a checkpoint folder, or a folder of pico's weights. "
        "Give it again to compare others with the first.",
        show_default="pico",
    ),
]
Ratios = Annotated[str, typer.Option(help="Pooling ratios, each a multiple of the first.")]
TopK = Annotated[int, typer.Option("--top-k", help="Candidates retrieved (a pooled set has its own).")]
MaxQueries = Annotated[int | None, typer.Option(help="Only the first so many queries of a set.", show_default="all")]
Cache = Annotated[Path | None, typer.Option(help="Folder that keeps states for another run.", show_default="none")]


@app.command("eval", rich_help_panel=MEASURING)
def evaluate(
    data: Data,
    split: Split = "test",
    pooled: Pooled = False,
    model: Models = None,
    ratios: Ratios = "1,4,16,32",
    top_k: TopK = 50,
    max_queries: MaxQueries = None,
    system: System = None,
    task: Task = None,
    own_instruction: Annotated[
        bool, typer.Option("--own-instruction", help="A folder's instruction.txt, where it has one, is the task.")
    ] = False,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Measure retrieval, BM25, their fusion and reranking on BEIR sets: nDCG@10, gains with p values, calibration."""
    with errors():
        wanted = _ratios(ratios)
        sets = _sets(data, split, pooled)
        tasks = _tasks(sets, task, own_instruction)
        with _loaded(model) as (pico, models):
            from kalm_rag.evaluation import evaluate as measure
            from kalm_rag.evaluation import summarise

            rank = partial(measure, others=models[1:], retriever=pico, ratios=wanted)
            rank = partial(rank, top_k=top_k, max_queries=max_queries, cache=cache)
            reports = []
            for what, own in zip(sets, tasks, strict=True):
                err.print(f"[bold]{shown(what.name)}[/bold]")
                reports.append(rank(what, models[0], instructions=Instructions(system=system, task=own)))
                if not as_json:
                    _print_report(reports[-1])
        summary = summarise(reports)
        if as_json:
            print_json({"sets": [one.to_dict() for one in reports], "summary": [row.to_dict() for row in summary]})
        elif len(reports) > 1:
            _print_summary(summary)


@app.command("eval-instructions", rich_help_panel=MEASURING)
def evaluate_instructions(
    data: Annotated[
        list[str] | None, typer.Option(help="BEIR folder as in eval.", show_default="the bundled contrast set alone")
    ] = None,
    split: Split = "test",
    pooled: Pooled = False,
    model: Models = None,
    ratio: Annotated[int, typer.Option(help="Pooling ratio.")] = 4,
    top_k: TopK = 50,
    max_queries: MaxQueries = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Measure what instructions do: generic ones must change nothing, specific ones must bring up what they ask for."""
    with errors():
        sets = _sets(data or [], split, pooled)
        with _loaded(model) as (pico, models):
            from kalm_rag.evaluation.instructed import evaluate_instructions as measure

            reports = [
                measure(sets, model, retriever=pico, ratio=ratio, top_k=top_k, max_queries=max_queries, cache=cache)
                for model in models
            ]
        if as_json:
            print_json({"models": [report.to_dict() for report in reports]})
        for report in reports if not as_json else ():
            _print_instructions(report)


@app.command(rich_help_panel=MEASURING)
def curve(
    data: Data,
    split: Split = "test",
    pooled: Pooled = False,
    model: Annotated[str, typer.Option(help="As in eval.")] = "pico",
    ratios: Ratios = "1,2,4,8,16,32,64",
    codecs: Annotated[str, typer.Option(help="How states are kept, with commas between.")] = "bf16,int8,exact",
    top_k: TopK = 50,
    max_queries: MaxQueries = None,
    table: Annotated[Path, typer.Option(help="Where the markdown table goes.")] = Path("curve.md"),
    plot: Annotated[Path, typer.Option(help="Where the plot goes: svg, png or pdf.")] = Path("curve.svg"),
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Measure nDCG@10, bytes per passage and ms per query at each ratio and codec; write a table and a plot."""
    with errors():
        from kalm_rag.evaluation.curve import curve_table, draw_curve, measure_curve
        from kalm_rag.evaluation.plots import check_plot
        from kalm_rag.states import Codec

        check_plot(plot)
        kept = [Codec.parse(name) for name in codecs.split(",")]
        sets, wanted = _sets(data, split, pooled), _ratios(ratios)
        with _loaded([model]) as (pico, (engine,)):
            measure = partial(measure_curve, retriever=pico, ratios=wanted, codecs=kept)
            found = measure(sets, engine, top_k=top_k, max_queries=max_queries, cache=cache)
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(curve_table(found), encoding="utf-8")
        draw_curve(found, plot)
        if as_json:
            print_json(found.to_dict())
        else:
            print_text(curve_table(found))
            out.print(f"table in {shown(str(table))}, plot in {shown(str(plot))}", soft_wrap=True)


@contextmanager
def _loaded(names: Sequence[str] | None) -> Iterator[tuple[Reranker, list[Reranker]]]:
    """The retriever (pico's encoder) and the models to measure."""
    from kalm_rag.engine.reranker import Reranker

    with ExitStack() as stack:
        with working("loading models ..."):
            pico = stack.enter_context(Reranker.from_pretrained("pico"))
            models = [stack.enter_context(Reranker.from_pretrained(name)) for name in names or ["pico"]]
        yield pico, models


def _sets(data: Sequence[str], split: str, pooled: bool) -> list[EvalSet]:
    from kalm_rag.evaluation import EvalSet
    from kalm_rag.evaluation.beir import check_collection

    sets = [EvalSet.parse(text, split=split, pooled=pooled) for text in data]
    names = [what.name for what in sets]
    if len(set(names)) < len(names):
        raise InputError(f"sets are {', '.join(names)}; wanted each name once.")
    for one in sets:
        check_collection(one.folder, one.split)
    return sets


def _tasks(sets: Sequence[EvalSet], task: str | None, own: bool) -> list[str | None]:
    """The task of each set."""
    if not own:
        return [task] * len(sets)
    found = [what.own_task for what in sets]
    if not any(found):
        raise InputError(
            f"none of {', '.join(what.name for what in sets)} has an instruction.txt for --own-instruction."
        )
    return [text if text is not None else task for text in found]


def _ratios(text: str) -> list[int]:
    from kalm_rag.evaluation.candidates import check_ratios

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"ratios is {text!r}; wanted whole numbers with commas between, e.g. 1,4,16.") from error
    return check_ratios(numbers)


def _print_report(report: EvalReport) -> None:
    out.print(
        f"[bold]{shown(report.name)}[/bold]: {report.queries} queries, {report.passages} passages, "
        f"{'at most' if report.pooled else 'top'} {report.top_k} candidates "
        f"{'judged' if report.pooled else 'by all-MiniLM-L6-v2'}, recall among them {report.rows[0].recall_k:.4f}"
        + (f"; task: {shown(report.task[:60])} ..." if report.task else "")
    )
    rows = []
    for row in report.rows:
        rows.append([*_who(row), *_figures(row.ndcg_10, row.mrr_10, row.recall_10)])
        if (sure := row.calibration) is not None:
            shares = ["-" if share is None else f"{share:.1%}" for share in (sure.kept, sure.dropped)]
            rows[-1] += [*_figures(sure.ece, sure.balanced_ece, sure.brier), *shares, f"{row.milliseconds:.0f}"]
    _print_table("ranking, r, nDCG@10, MRR@10, R@10, ECE, ECE 1:1, Brier, kept, dropped, ms", rows)
    _print_changes(report.rows)
    out.print("seconds: " + stages(report.seconds) + "\n")


def _print_summary(rows: Sequence[Summary]) -> None:
    out.print(f"[bold]mean of {rows[0].sets} sets[/bold]")
    cells = []
    for row in rows:
        worst = "" if row.worst_gain is None else f"{row.worst_gain:+.4f}"
        cells.append([*_who(row), *_figures(row.ndcg_10, row.ece, row.balanced_ece), worst, shown(row.worst_set or "")])
    _print_table("ranking, r, nDCG@10, ECE, ECE 1:1, worst gain, where", cells)
    _print_changes(rows)


def _print_changes(rows: Sequence[EvalRow] | Sequence[Summary]) -> None:
    """Gains of nDCG@10 with 95% intervals and p values, where there are any."""
    names = "ranking, r, over retrieval (95%) p, over fusion (95%) p"
    extra = ", over first model" if any(row.over_first for row in rows) else ""
    changes = [(row, (row.over_retrieval, row.over_fusion, row.over_first)[: 3 if extra else 2]) for row in rows]
    _print_table(names + extra, [[*_who(row), *map(_change, own)] for row, own in changes if any(own)])


def _print_instructions(report: InstructionReport) -> None:
    out.print(
        f"[bold]{shown(Path(report.model).name)}[/bold], r={report.ratio}: is the kind asked for above the other kind?"
    )
    rows = []
    for contrast in report.contrast:
        weak, low = min(contrast.kinds.items(), key=lambda kind: kind[1])
        accuracy = f"{contrast.accuracy:.3f} ({contrast.low:.3f} {contrast.high:.3f})"
        rows.append([contrast.where, accuracy, f"{contrast.both:.3f}", f"{low:.2f} {weak}"])
    _print_table("instruction, accuracy (95%), both ways, weakest contrast", rows)
    if report.drift:
        out.print("generic instructions must change nothing: change of nDCG@10")
        rows = []
        for drift in report.drift:
            figures = [*_figures(drift.ndcg_10, drift.mean), f"{drift.worst:+.4f}"]
            rows.append([shown(drift.name), str(drift.queries), *figures, _change(drift.own_task)])
        _print_table("set, queries, nDCG@10, mean |change|, worst, own task (95%) p", rows)
    if report.following:
        out.print("one query under many users' instructions, over the query's candidates")
        rows = []
        for row in report.following:
            figures = _figures(row.ndcg_10, row.mrr_10, row.robustness_10)
            rows.append([shown(row.name), row.asked, str(row.instructions), *figures, _change(row.over_query)])
        _print_table("set, asked, pairs, nDCG@10, MRR@10, robustness@10, over query (95%) p", rows)


def _print_table(columns: str, rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns.split(", "), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _who(row: EvalRow | Summary) -> tuple[str, str]:
    """Name and ratio of a ranking."""
    name = row.ranking if row.model is None else shown(Path(row.model).name)
    return name, "" if row.ratio is None else str(row.ratio)


def _figures(*values: float | None) -> list[str]:
    return ["" if value is None else f"{value:.4f}" for value in values]


def _change(change: Change | None) -> str:
    if change is None:
        return ""
    test = "" if change.p is None else " <.001" if change.p < 0.001 else f" {change.p:.3f}"
    return f"{change.mean:+.4f} ({change.low:+.3f} {change.high:+.3f}){test}"
