"""Pictures of a benchmark: latency against candidates, and bytes against ratio. matplotlib is in the extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kalm_rag.bench.report import CANDIDATES, Row
from kalm_rag.errors import InputError, require
from kalm_rag.states import Codec, Layout

RATIOS = (1, 2, 4, 8, 16, 32, 64)
SIZES = (("pico", 384, "float16", 145, True), ("Nano", 640, "bfloat16", 200, False))
"""Models whose bytes are drawn: name, width and dtype of the states, tokens of a typical passage, words kept or not."""


def check_plots(folder: Path) -> None:
    """Refuse what can't be drawn, before anything is measured.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        InputError: If `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; wanted a folder for the pictures.")
    _figures()


def draw(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw all pictures there is data for.

    Args:
        folder: Where they go; made if absent.
        rows: Those by number of candidates make the latency picture.

    Returns:
        The files written.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out = [_draw_bytes(folder / "bytes_by_ratio.png")]
    by_candidates = [row for row in rows if row.stage == CANDIDATES]
    if by_candidates:
        out.append(_draw_latency(folder / "latency_by_candidates.png", by_candidates))
    return out


def _draw_latency(path: Path, rows: Sequence[Row]) -> Path:
    figure = _figures()(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for group in dict.fromkeys(row.group for row in rows):
        points = [(row.passages, 1000 * row.p50) for row in rows if row.group == group and row.p50 is not None]
        axes.plot(*zip(*points, strict=True), "o-", label=group)
    _finish(axes, "Latency of a query over stored states", "candidates", "ms")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    return path


def _draw_bytes(path: Path) -> Path:
    figure = _figures()(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, width, dtype, tokens, words in SIZES:
        for codec, style in ((Codec.BF16, "o-"), (Codec.INT8, "s--")):
            layouts = [
                Layout(
                    fingerprint="",
                    hidden_size=width,
                    ratio=ratio,
                    codec=codec,
                    state_dtype=dtype,
                    keeps_token_ids=words,
                )
                for ratio in RATIOS
            ]
            sizes = [layout.payload_bytes(tokens) / 1000 for layout in layouts]
            axes.plot(RATIOS, sizes, style, label=f"{name}, {codec.value}, {tokens} tokens")
    _finish(axes, "Stored bytes of a passage", "ratio (tokens a state stands for)", "kB a passage")
    axes.set_xticks(RATIOS, [str(ratio) for ratio in RATIOS])
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    return path


def _finish(axes: Any, title: str, across: str, up: str) -> None:  # noqa: ANN401
    axes.set(title=title, xlabel=across, ylabel=up, xscale="log", yscale="log")
    axes.title.set_fontsize("medium")
    axes.grid(visible=True, which="both", alpha=0.25)


def _figures() -> Any:  # noqa: ANN401
    """Matplotlib's figure class: without pyplot there is no display, and no state shared with the app."""
    return require("matplotlib.figure", "plot", "drawing").Figure
