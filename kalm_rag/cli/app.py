"""The command line, put together: what each command does stands in the file of its kind."""

from __future__ import annotations

from typing import Annotated

import typer

from kalm_rag import __version__
from kalm_rag.cli import agents, bench, demo, evaluate, index, search, serve, train, upkeep
from kalm_rag.cli.terminal import SafeGroup

app = typer.Typer(
    cls=SafeGroup,
    help="Two-phase reranking over a Chroma database: passages are encoded once, only a decoder runs per query.",
    epilog="Exit codes: 0 done; 1 an error, files that could not be read, or a check that found something; "
    "2 wrong usage; 130 stopped with Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for part in (index, search, serve, agents, demo, upkeep, evaluate, bench, train):
    app.add_typer(part.app)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kalm-rag {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""
