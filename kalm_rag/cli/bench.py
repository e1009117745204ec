"""``kalm-rag bench``. Thin; all work is done by `kalm_rag.bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kalm_rag.cli.terminal import MEASURING, AsJson, errors, out, print_json, telling, visible, working
from kalm_rag.errors import InputError

app = typer.Typer()


@app.command(rich_help_panel=MEASURING)
def bench(
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default="cuda where there is")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16.", show_default="both")] = None,
    candidates: Annotated[int, typer.Option(help="Passages per query, Nano shape.")] = 100,
    passages: Annotated[int, typer.Option(help="Passages in the index that is asked.")] = 20_000,
    repeats: Annotated[int, typer.Option(help="Timed runs.")] = 5,
    clients: Annotated[int, typer.Option(help="Clients that ask at once.")] = 8,
    nano: Annotated[bool, typer.Option(help="Measure KaLM-Nano's shape too (random weights, 5 GB).")] = True,
    full: Annotated[bool, typer.Option(help="Published protocol over all candidates, not one batch of 32.")] = False,
    clock: Annotated[str, typer.Option(help="What ratios go by: wall, or cpu on a busy machine.")] = "wall",
    growth: Annotated[bool, typer.Option(hidden=True)] = False,
    plot: Annotated[Path | None, typer.Option(help="Folder for pictures.", show_default="none")] = None,
    as_json: AsJson = False,
) -> None:
    """Time stored states against what a user would pick instead; ratios within one run."""
    with errors():
        from transformers.utils import logging as transformers_logging

        from kalm_rag.bench import plots, suite
        from kalm_rag.bench.report import tables

        transformers_logging.disable_progress_bar()
        if growth:
            raise InputError("how cost grows is measured by a script: python notebooks/growth.py in the repository.")
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
            curves=plot is not None,
        )
        with working("starting ...") as status:
            report = suite.run(settings, telling(status))
        drawn = plots.draw(plot, report.rows) if plot is not None else []
        if as_json:
            print_json(report.to_dict())
            return
        for part in tables(report):
            out.print(part)
        for path in drawn:
            out.print(f"drawn: {visible(str(path))}", markup=False)
