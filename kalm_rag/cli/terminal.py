"""What all commands share: consoles that pass no control sequence on, options, errors as one message, JSON.

Passages, ids, file names and messages are somebody else's text. Whatever of it reaches the terminal goes through
`visible`: here in the consoles once for all, and through `shown` where it stands beside our own markup.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Annotated, Any, TypeVar

import typer
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.markup import escape
from rich.segment import Segment
from rich.status import Status
from typer.core import TyperGroup

from kalm_rag.errors import KalmRagError

Item = TypeVar("Item")

DAILY, MEASURING, TRAINING = "Daily", "Measuring", "Training"
"""Panels of the help."""
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 without tab and newline, DEL and C1; line separators and overrides of direction; lone surrogates."""

_PIPE_COLUMNS = 160
_WORDS = (
    (
        r"or pass change_model=True to ChromaIndex\.open and run backfill\(\), which",
        "or run kalm-rag backfill with it and --change-model, which",
    ),
    (r"Open it with what is stored \(stored_layout tells\), or", "Leave --ratio and --codec out to go on with it, or"),
    (r"\bLeave (model|revision|dtype|passage) out\b", r"Leave --\1 out"),
    (r"\bLeave max_passage_tokens out\b", "Leave --max-passage-tokens out"),
    (r"\b(?:pass|Pass) embedder=(?= with)", "Pass --embedder"),
    (r"\bdevice='(\w+)'", r"--device \1"),
    (r"\bwith ratio=(\d+)", r"with --ratio \1"),
    (r", or None for (?:all|no pooling)\b", ""),
    (r", or an object that embeds; None takes the bundled one", ", or no --embedder for the bundled one"),
    (r"\brefresh\(\), or open again\b", "Run the command again"),
)
"""The library's advice, which names arguments of Python, as a command line has it."""


def visible(text: str) -> str:
    r"""Spell out characters that would steer a terminal, turn the direction of text, or can't be written.

    Example:
        >>> visible("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    return _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


def shown(text: str) -> str:
    """Somebody else's text for a line of ours: control characters visible, markup inert."""
    return escape(visible(text))


def shorten(text: str, width: int) -> str:
    """A text on one line of at most `width` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."


def command_words(message: str) -> str:
    """An error of the library in the words of the command line.

    Example:
        >>> command_words("top_n is 0; wanted a whole number >= 1, or None for all.")
        'top_n is 0; wanted a whole number >= 1.'
    """
    for python, ours in _WORDS:
        message = re.sub(python, ours, message)
    return message


class SafeConsole(Console):
    """A console whose text holds no control sequence but its own; in a pipe it has room for wide tables."""

    @property  # type: ignore[misc]  # nobody sets it
    def size(self) -> ConsoleDimensions:
        """Columns and rows."""
        return super().size if self.is_terminal or "COLUMNS" in os.environ else ConsoleDimensions(_PIPE_COLUMNS, 25)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, with all text made visible."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


out = SafeConsole(highlight=False, soft_wrap=False)
err = SafeConsole(stderr=True, highlight=False)

Model = Annotated[
    str | None,
    typer.Option(
        help="pico, nano, small, large, a repository id or a checkpoint folder.",
        show_default="the collection's, or pico",
    ),
]
System = Annotated[str | None, typer.Option(help="System instruction of your app.", show_default="the model's")]
Task = Annotated[str | None, typer.Option(help="What kind of passage is wanted.", show_default="the model's")]
Threshold = Annotated[float | None, typer.Option(help="Keep only P(yes) >= this.", show_default="all")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class SafeGroup(TyperGroup):
    """The commands, with streams that can write any text and usage errors that pass no control sequence on."""

    def main(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - click's own signature
        """Run a command line."""
        for stream, policy in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, None)):
            _reconfigure(stream, policy)
        if not _is_terminal(sys.stderr):
            os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it when it is imported, which is later
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - click's own signature
        """Run a command; what is wrong with its arguments is told in visible characters."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(message := getattr(error, "message", None), str):  # a usage error, of click's or typer's own
                error.message = visible(message)  # type: ignore[attr-defined]
            raise


def _reconfigure(stream: IO[str] | None, policy: str | None) -> None:
    """Let a stream of a narrow encoding (cp1252, ascii) spell out what it can't hold, instead of failing."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None and policy is not None:
        reconfigure(errors=policy)


def _is_terminal(stream: IO[str] | None) -> bool:
    return stream is not None and stream.isatty()


@contextmanager
def errors(stopped: str = "") -> Iterator[None]:
    """Print what went wrong as one message and exit with 1; anything that is a bug keeps its traceback.

    Args:
        stopped: What Ctrl-C leaves behind, and what to do next; the exit code is then 130.
    """
    handler = RichHandler(console=err, show_path=False, show_time=False)
    handler.addFilter(_is_for_users)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        yield
    except (KalmRagError, OSError) as error:  # the latter: a folder that can't be written, a full disk
        if getattr(error, "errno", None) == errno.EPIPE:
            raise
        err.print(f"[red]error:[/red] {shown(command_words(str(error)))}", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        err.print(f"\nstopped. {stopped}".rstrip())
        raise typer.Exit(130) from error


def _is_for_users(record: logging.LogRecord) -> bool:
    """Our lines, and others' warnings; pypdf's name no file, and what it can't read is told with its name."""
    least = logging.ERROR if record.name.startswith("pypdf") else logging.WARNING
    return record.levelno >= least or record.name.startswith("kalm_rag")


def progress(items: Iterable[Item], description: str, unit: str) -> Iterable[Item]:
    """A bar on a terminal, nothing in a pipe."""
    from tqdm import tqdm

    return tqdm(items, desc=description, unit=unit, leave=False, file=sys.stderr, disable=not _is_terminal(sys.stderr))


def working(line: str) -> Status:
    """A spinner beside a line, on a terminal."""
    return err.status(line, spinner="dots" if not err.options.ascii_only else "line")


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


def command_line(*arguments: object) -> str:
    """A command as it can be pasted into this system's shell."""
    words = [str(argument) for argument in arguments]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def print_text(text: str) -> None:
    """Write text of ours and others as it is, control characters made visible, never wrapped."""
    out.file.write(visible(text) + "\n")


def print_json(value: Any) -> None:  # noqa: ANN401 - whatever JSON holds
    """Write a value as indented JSON, never wrapped; characters that steer a terminal stand as JSON escapes."""
    plain = not str(getattr(out.file, "encoding", "")).lower().startswith("utf")
    text = json.dumps(value, indent=2, ensure_ascii=plain)
    out.file.write(_CONTROL.sub(lambda m: f"\\u{ord(m[0]):04x}", text) + "\n")
