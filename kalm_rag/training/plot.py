"""The training curve: the loss of every batch, stage after stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from kalm_rag.evaluation.plots import new_figure, save, tidy

WINDOW = 50
"""Batches that the line is a mean over: one batch's loss depends most on its ratio and source."""


def smooth(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """Mean of each value and those before it, `window` at most.

    Example:
        >>> smooth([4.0, 2.0, 0.0], 2)
        [4.0, 3.0, 1.0]
    """
    sums = [0.0, *accumulate(losses)]
    starts = [max(0, end - window) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]


def draw_losses(losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw each stage's losses one behind the other, as dots (without the highest 2%) and as a running mean.

    Stages have losses of their own (labels, fusion and soft labels weigh differently), so that only a stage's own fall
    says something.

    Args:
        losses: Loss of every batch by stage, as ``train.json`` has them.
        path: Where to; svg, png or pdf.
    """
    figure = new_figure(8, 3.8)
    axes = figure.subplots()
    start = 0
    for (stage, values), colour in zip(losses.items(), ("#1f6fb4", "#d1622b", "#3b8f5a"), strict=False):
        steps = range(start + 1, start + len(values) + 1)
        axes.plot(steps, values, ".", color=colour, alpha=0.15, markersize=3, rasterized=True)
        axes.plot(steps, smooth(values), color=colour, label=f"{stage}, {len(values)} steps")
        start += len(values)
    every = sorted(value for values in losses.values() for value in values)
    axes.set_ylim(0, 1.1 * every[int(0.98 * (len(every) - 1))])  # a few batches far above would flatten the rest
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (dots) and its mean over {WINDOW} steps")
    tidy(axes)
    axes.legend(frameon=False)
    save(figure, path)
