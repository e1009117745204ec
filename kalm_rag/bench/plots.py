"""Pictures of a benchmark: latency against candidates, and bytes against ratio. matplotlib is in the extra ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kalm_rag.bench.report import CANDIDATES, Row
from kalm_rag.errors import InputError
from kalm_rag.evaluation.plots import new_figure, save, tidy
from kalm_rag.states import Codec, Layout

RATIOS = (1, 2, 4, 8, 16, 32, 64)
SIZES = (("pico", 384, "float16", 145, True), ("Nano", 640, "bfloat16", 200, False))
"""Models whose bytes are drawn: name, width and dtype of the states, tokens of a typical passage, ids kept or not."""

_Series = dict[str, list[tuple[float, float]]]


def check_plots(folder: Path) -> None:
    """Refuse what can't be drawn, before anything is measured.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        InputError: If `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; wanted a folder for the pictures.")
    new_figure(1, 1)


def draw(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw all pictures there is data for (rows by number of candidates make the latency picture); gives the files."""
    sizes: _Series = {}
    for name, width, dtype, tokens, ids in SIZES:
        for codec in (Codec.BF16, Codec.INT8):
            base = Layout(
                fingerprint="", hidden_size=width, ratio=1, codec=codec, state_dtype=dtype, keeps_token_ids=ids
            )
            kilobytes = [replace(base, ratio=ratio).payload_bytes(tokens) / 1000 for ratio in RATIOS]
            sizes[f"{name}, {codec.value}, {tokens} tokens"] = list(zip(RATIOS, kilobytes, strict=True))
    path = folder / "bytes_by_ratio.png"
    out = [_draw(path, sizes, "Stored bytes of a passage", "ratio (tokens per state)", "kB per passage", RATIOS)]
    latency: _Series = {}
    for row in rows:
        if row.stage == CANDIDATES and row.p50 is not None:
            latency.setdefault(row.group, []).append((row.passages, 1000 * row.p50))
    if latency:
        path = folder / "latency_by_candidates.png"
        out.append(_draw(path, latency, "Latency of a query over stored states", "candidates", "ms"))
    return out


def _draw(path: Path, series: _Series, title: str, across: str, up: str, ticks: Sequence[int] = ()) -> Path:
    """Draw lines on logarithmic axes."""
    figure = new_figure(7, 4.5)
    axes: Any = figure.subplots()
    for label, points in series.items():
        axes.plot(*zip(*points, strict=True), "s--" if "int8" in label else "o-", label=label)
    axes.set(title=title, xlabel=across, ylabel=up, xscale="log", yscale="log")
    if ticks:
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    tidy(axes)
    axes.legend(fontsize="small")
    save(figure, path)
    return path
