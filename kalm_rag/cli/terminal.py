"""What all commands share: the two consoles, options that mean the same everywhere, errors as one message, JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.status import Status

from kalm_rag.errors import KalmRagError

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)

Model = Annotated[
    str | None,
    typer.Option(help="pico, nano, small, large, a repository id or a checkpoint folder.", show_default=False),
]
System = Annotated[str | None, typer.Option(help="System instruction of your app.", show_default=False)]
Task = Annotated[str | None, typer.Option(help="What kind of passage is wanted.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def errors() -> Iterator[None]:
    """Print our errors as one message and exit with 1; anything else is a bug and keeps its traceback."""
    logging.basicConfig(level=logging.WARNING, handlers=[RichHandler(console=err, show_path=False, show_time=False)])
    try:
        yield
    except KalmRagError as error:
        err.print(f"[red]error:[/red] {escape(str(error))}")
        raise typer.Exit(1) from error


def telling(spinner: Status) -> Callable[[str], None]:
    """What shows a line about the work going on: the spinner on a terminal; in a log, each kind of line once."""
    seen: set[str] = set()

    def tell(line: str) -> None:
        kind = line.partition(":")[0]
        if err.is_terminal:
            spinner.update(line)
        elif kind not in seen:
            seen.add(kind)
            err.print(line)

    return tell


def stages(seconds: dict[str, float]) -> str:
    """Seconds of each stage and their sum, on one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in seconds.items()) + f"; total {sum(seconds.values()):.3f}"


def print_json(value: Any) -> None:  # noqa: ANN401 - whatever JSON holds
    """Write a value as indented JSON, never wrapped."""
    out.file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
