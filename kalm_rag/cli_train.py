"""What ``kalm-rag train --base`` adds to the command line: its options, and its figures as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kalm_rag.instructions import Instructions

_NAMES = (
    *("stage", "split", "dev_split", "steps", "lists", "candidates", "learning_rate", "teacher", "lora", "accumulate"),
    *("checkpointing", "max_tokens", "system", "task", "device", "dtype"),
)


def option(text: str) -> Any:  # noqa: ANN401 - typer's own type is private
    """An option that only --base reads; None takes the recipe's default, named in brackets in its help."""
    return typer.Option(help=text, show_default=False, rich_help_panel="With --base")


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options above that the user gave."""
    return {name: values[name] for name in _NAMES if values[name] is not None}


def run_adapt(
    out: Console, base: str, data: Path, to: Path, settings: dict[str, Any], *, minutes: float | None
) -> None:
    """Adapt a checkpoint and show its figures on held-out queries."""
    from transformers.utils import logging as transformers_logging

    from kalm_rag.training.adapt import adapt
    from kalm_rag.training.stages import AdaptConfig

    transformers_logging.disable_progress_bar()
    steer = Instructions(system=settings.pop("system", None), task=settings.pop("task", None))
    device, dtype = settings.pop("device", None), settings.pop("dtype", None)
    config = AdaptConfig(**settings, instructions=steer)
    reports = adapt(base, data, to, config=config, minutes=minutes, device=device, dtype=dtype)
    table = Table("stage", "held out, nDCG@10", "ratio", "queries", "retrieval", "before", "after")
    for report in reports:
        for row in report.dev:
            figures = [f"{value:.4f}" for value in (row.retrieval, row.before, row.after)]
            table.add_row(report.stage, escape(row.name), str(row.ratio), str(row.queries), *figures)
    out.print(table)
    if fell := sum(len(report.fell) for report in reports):
        out.print(f"[yellow]{fell} of these figures fell[/yellow]: look at them before you use the checkpoint")
    for report in reports:
        out.print(f"{report.stage}: {report.steps} steps, {sum(report.seconds.values()):.0f} s; {report.folder}")
