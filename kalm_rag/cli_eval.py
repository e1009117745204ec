"""The commands that measure: eval, eval-instructions, curve. Thin; all work is done by `kalm_rag.evaluation`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.markup import escape
from rich.table import Table

from kalm_rag.errors import InputError
from kalm_rag.instructions import Instructions
from kalm_rag.terminal import AsJson, System, Task, err, errors, out, print_json, stages

if TYPE_CHECKING:  # torch takes seconds to import; --help must not
    from kalm_rag.evaluation.gather import EvalSet
    from kalm_rag.evaluation.metrics import Change
    from kalm_rag.evaluation.report import EvalReport, EvalRow, Summary
    from kalm_rag.models.backbone import Backbone, EmbeddingBackbone

app = typer.Typer()

Data = Annotated[
    list[str],
    typer.Option(help="BEIR folder: FOLDER, FOLDER:SPLIT or FOLDER:SPLIT:pooled. Give it once a set."),
]
Split = Annotated[str, typer.Option(help="Judgements of sets that name no split.")]
Pooled = Annotated[bool, typer.Option(help="Rank only the passages that a query's judgements name, in every set.")]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="pico, nano, small, large, a repository id, a checkpoint folder, or a folder of pico's weights. "
        "Give it again to compare others with the first.",
        show_default=False,
    ),
]
Ratios = Annotated[str, typer.Option(help="Pooling ratios, each a multiple of the first.")]
TopK = Annotated[int, typer.Option("--top-k", help="Candidates retrieved (a pooled set has its own).")]
MaxQueries = Annotated[int | None, typer.Option(help="Only the first so many queries of a set.", show_default=False)]
Cache = Annotated[Path | None, typer.Option(help="Folder that keeps states for another run.", show_default=False)]


@app.command("eval")
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
        sets = _sets(data, split, pooled)
        tasks = _tasks(sets, task, own_instruction)
        wanted = _numbers(ratios, "ratios")
        with _loaded(model) as (pico, models):
            from kalm_rag.evaluation import evaluate as measure
            from kalm_rag.evaluation import summarise

            reports = []
            for one, own in zip(sets, tasks, strict=True):
                err.print(f"[bold]{escape(one.name)}[/bold]")
                report = measure(
                    one.folder,
                    one.split,
                    models[0],
                    others=models[1:],
                    pooled=one.pooled,
                    retriever=pico,
                    ratios=wanted,
                    top_k=top_k,
                    max_queries=max_queries,
                    instructions=Instructions(system=system, task=own),
                    cache=cache,
                )
                reports.append(report)
                if not as_json:
                    _print_report(report)
        summary = summarise(reports)
        if as_json:
            print_json({"sets": [one.to_dict() for one in reports], "summary": [one.to_dict() for one in summary]})
        elif len(reports) > 1:
            _print_summary(summary)


@contextmanager
def _loaded(names: Sequence[str] | None) -> Iterator[tuple[EmbeddingBackbone, list[Backbone]]]:
    """The retriever (pico's encoder) and the models to measure."""
    from kalm_rag.reranker import Reranker

    with ExitStack() as stack:
        with err.status("loading models ..."):
            pico = stack.enter_context(Reranker.from_pretrained("pico"))
            engines = [stack.enter_context(Reranker.from_pretrained(name)) for name in names or ["pico"]]
        yield cast("EmbeddingBackbone", pico.backbone), [one.backbone for one in engines]


def _sets(data: Sequence[str], split: str, pooled: bool) -> list[EvalSet]:
    from kalm_rag.evaluation.gather import EvalSet

    sets = [EvalSet.parse(text, split=split, pooled=pooled) for text in data]
    names = [one.name for one in sets]
    if len(set(names)) < len(names):
        raise InputError(f"sets are {', '.join(names)}; wanted each name once.")
    return sets


def _tasks(sets: Sequence[EvalSet], task: str | None, own: bool) -> list[str | None]:
    """The task of each set."""
    from kalm_rag.evaluation.run import own_task

    if not own:
        return [task] * len(sets)
    found = [own_task(one.folder) for one in sets]
    if not any(found):
        raise InputError(f"none of {', '.join(one.name for one in sets)} has an instruction.txt for --own-instruction.")
    return [text if text is not None else task for text in found]


def _numbers(text: str, what: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{what} is {text!r}; wanted whole numbers with commas between, e.g. 1,4,16.") from error


def _print_report(report: EvalReport) -> None:
    out.print(
        f"[bold]{escape(report.name)}[/bold]: {report.queries} queries, {report.passages} passages, "
        f"{'at most' if report.pooled else 'top'} {report.top_k} candidates "
        f"{'judged' if report.pooled else 'by all-MiniLM-L6-v2'}, recall among them {report.rows[0].recall_k:.4f}"
        + (f"; task: {escape(report.task[:60])} ..." if report.task else "")
    )
    extra = ["over first model"] if len(report.models) > 1 else []
    table = Table("ranking", "r", "nDCG@10", "MRR@10", "R@10", "over retrieval (95%), p", "over fusion", *extra, "ms")
    for row in report.rows:
        figures = [f"{value:.4f}" for value in (row.ndcg_10, row.mrr_10, row.recall_10)]
        changes = [row.over_retrieval, row.over_fusion] + ([row.over_first] if extra else [])
        spent = f"{row.milliseconds:.0f}" if row.model is not None else ""
        table.add_row(_label(row), _ratio(row), *figures, *[_change(one) for one in changes], spent)
    out.print(table)
    sure = Table("P(yes) of", "r", "ECE", "Brier", "relevant kept at 0.5", "irrelevant dropped")
    for row in report.rows:
        if (one := row.calibration) is not None:
            shares = ["-" if share is None else f"{share:.1%}" for share in (one.kept, one.dropped)]
            sure.add_row(_label(row), _ratio(row), f"{one.ece:.4f}", f"{one.brier:.4f}", *shares)
    out.print(sure)
    out.print("seconds: " + stages(report.seconds) + "\n")


def _print_summary(rows: Sequence[Summary]) -> None:
    out.print(f"[bold]mean of {rows[0].sets} sets[/bold]")
    extra = ["over first model"] if any(row.over_first for row in rows) else []
    table = Table("ranking", "r", "nDCG@10", "over retrieval (95%)", "over fusion", *extra, "worst set", "ECE")
    for row in rows:
        changes = [row.over_retrieval, row.over_fusion] + ([row.over_first] if extra else [])
        worst = "" if row.worst_gain is None else f"{row.worst_gain:+.4f} {escape(str(row.worst_set))}"
        error = "" if row.ece is None else f"{row.ece:.4f}"
        shown = [_change(one) for one in changes]
        table.add_row(_label(row), _ratio(row), f"{row.ndcg_10:.4f}", *shown, worst, error)
    out.print(table)


def _label(row: EvalRow | Summary) -> str:
    return row.ranking if row.model is None else escape(Path(row.model).name)


def _ratio(row: EvalRow | Summary) -> str:
    return "" if row.ratio is None else str(row.ratio)


def _change(change: Change | None) -> str:
    if change is None:
        return ""
    test = "" if change.p is None else " p<.001" if change.p < 0.001 else f" p={change.p:.3f}"
    return f"{change.mean:+.4f} ({change.low:+.3f} {change.high:+.3f}){test}"
