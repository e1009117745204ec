"""The training curve: the loss of every batch, stage after stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kalm_rag.evaluation.plots import new_figure, save, tidy

WINDOW = 50
"""Batches that the line is a mean over: one batch's loss depends most on its ratio and source."""


def draw_losses(losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw each stage's losses one behind the other, as dots (without the highest 2%) and as a running mean.

    Stages have losses of their own (labels, fusion and soft labels weigh differently), so that only a stage's own fall
    says something. `losses` are those of ``train.json`` by stage; the path ends in svg, png or pdf.
    """
    figure = new_figure(8, 3.8)
    axes = figure.subplots()
    start = 0
    for (stage, values), colour in zip(losses.items(), ("#1f6fb4", "#d1622b", "#3b8f5a"), strict=False):
        steps = range(start + 1, start + len(values) + 1)
        means = [np.mean(values[max(0, end - WINDOW) : end]) for end in range(1, len(values) + 1)]
        axes.plot(steps, values, ".", color=colour, alpha=0.15, markersize=3, rasterized=True)
        axes.plot(steps, means, color=colour, label=f"{stage}, {len(values)} steps")
        start += len(values)
    every = np.concatenate([*losses.values()])
    if every.size:  # a few batches far above would flatten the rest
        axes.set_ylim(0, 1.1 * np.quantile(every, 0.98))
    axes.set(xlabel="step", ylabel=f"loss (dots) and its mean over {WINDOW} steps")
    tidy(axes)
    axes.legend(frameon=False)
    save(figure, path)
