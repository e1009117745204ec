"""The command that makes weights: ``kalm-rag train``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kalm_rag.cli.terminal import TRAINING, errors, out, shown
from kalm_rag.errors import InputError
from kalm_rag.instructions import Instructions

if TYPE_CHECKING:  # torch takes seconds to import; --help must not
    from kalm_rag.training.report import TrainReport

app = typer.Typer()

_COMMON = ("data", "to", "seed", "minutes", "base", "plot")
"""Arguments that pico's recipe takes, too."""
_BASE = "Checkpoint to adapt: a folder (of an earlier stage too), a repository id or a name (nano)."


def _option(text: str, default: str) -> Any:  # noqa: ANN401 - typer's own type is private
    """An option that only a checkpoint as --base reads; None takes the recipe's default."""
    return typer.Option(help=text, show_default=default, rich_help_panel="With a checkpoint as --base")


@app.command(rich_help_panel=TRAINING)
def train(
    data: Annotated[list[Path], typer.Option(help="Folder of BEIR folders (pico: its card says which); may repeat.")],
    to: Annotated[Path, typer.Option("--out", help="Where the weights go.")],
    seed: Annotated[int, typer.Option(help="Fixes every draw.")] = 0,
    minutes: Annotated[float | None, typer.Option(help="Stop learning after so many.", show_default="no limit")] = None,
    base: Annotated[str | None, typer.Option(help=_BASE, show_default="none: from scratch")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the losses here (svg, png, pdf).", show_default="none")
    ] = None,
    stage: Annotated[str | None, _option("general, hard, distil, or all of them one after another.", "all")] = None,
    split: Annotated[str | None, _option("Labelled queries to learn from.", "train")] = None,
    dev_split: Annotated[
        str | None, _option("Labelled queries to measure on.", "a held-out tenth of the split")
    ] = None,
    steps: Annotated[int | None, _option("Batches per stage.", "1000")] = None,
    lists: Annotated[int | None, _option("Queries per batch.", "8")] = None,
    candidates: Annotated[int | None, _option("Passages per query.", "8")] = None,
    learning_rate: Annotated[float | None, _option("Peak.", "1e-5; 1e-4 with --lora")] = None,
    teacher: Annotated[str | None, _option("Soft labels of stage distil: fusion, self, or a model.", "fusion")] = None,
    lora: Annotated[int | None, _option("Rank of low-rank updates; 0 learns all weights.", "0")] = None,
    accumulate: Annotated[int | None, _option("Parts a batch is computed in: less memory, same result.", "1")] = None,
    checkpointing: Annotated[bool | None, _option("Compute layers twice instead of keeping them.", "no")] = None,
    max_tokens: Annotated[int | None, _option("Where passages are cut while learning.", "1024")] = None,
    system: Annotated[str | None, _option("System instruction that queries are asked under.", "none")] = None,
    task: Annotated[str | None, _option("Task that queries are asked under.", "none")] = None,
    device: Annotated[str | None, _option("cpu, cuda or cuda:N.", "cuda where there is one")] = None,
    dtype: Annotated[str | None, _option("bf16 or fp32.", "bf16 on cuda")] = None,
) -> None:
    """Train pico's decoder from scratch (half an hour on 2 cores, 9 GB), or adapt a T5Gemma 2 with --base.

    A checkpoint as --base (KaLM-Reranker-V1-Nano, say) learns from your own labelled queries in stages. Each gives a
    whole checkpoint, which the next one takes as --base:

    general: labels over candidates of all retrieval ranks.

    hard: negatives the model finds itself, without those that are likely relevant.

    distil: soft labels.
    """
    settings = {name: value for name, value in locals().items() if name not in _COMMON and value is not None}
    with errors():
        logging.getLogger("kalm_rag").setLevel(logging.INFO)
        if plot is not None:
            from kalm_rag.evaluation.plots import check_plot

            check_plot(plot)  # before the work, not after it
        if base is None and settings:
            raise InputError(f"{', '.join(settings)} given for pico, whose recipe has its own.")
        if base is not None and len(data) > 1:
            raise InputError(f"--data was given {len(data)} times; with a checkpoint as --base, wanted one folder.")
        if base is None:
            from kalm_rag.training.pico import train as train_pico

            reports = [train_pico(data, to, seed=seed, minutes=minutes)]
        else:
            reports = _adapt(base, data[0], to, settings | {"seed": seed}, minutes=minutes)
        _print_reports(reports)
        if plot is not None:
            from kalm_rag.training.report import draw_losses

            draw_losses({report.stage: report.losses for report in reports}, plot)
            out.print(f"losses drawn in {shown(str(plot))}", soft_wrap=True)


def _adapt(base: str, data: Path, to: Path, settings: dict[str, Any], *, minutes: float | None) -> list[TrainReport]:
    from transformers.utils import logging as transformers_logging

    from kalm_rag.training.adapt import adapt
    from kalm_rag.training.config import AdaptConfig

    transformers_logging.disable_progress_bar()
    steer = Instructions(system=settings.pop("system", None), task=settings.pop("task", None))
    device, dtype = settings.pop("device", None), settings.pop("dtype", None)
    config = AdaptConfig(**settings, instructions=steer)
    return adapt(base, data, to, config=config, minutes=minutes, device=device, dtype=dtype)


def _print_reports(reports: Sequence[TrainReport]) -> None:
    table = Table("stage", "held out, nDCG@10", "ratio", "queries", "retrieval", "BM25 + retrieval", "before", "after")
    for report in reports:
        for row in report.dev:
            figures = [f"{value:.4f}" for value in (row.retrieval, row.fusion, row.before, row.after)]
            table.add_row(report.stage, shown(row.name), str(row.ratio), str(row.queries), *figures)
    out.print(table)
    if fell := sum(len(report.fell) for report in reports):
        out.print(f"[yellow]{fell} of these figures fell[/yellow]: look at them before you use the weights")
    for report in reports:
        out.print(
            f"{report.stage}: {report.steps} steps, {sum(report.seconds.values()):.0f} s; {shown(str(report.folder))}",
            soft_wrap=True,
        )
