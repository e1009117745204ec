"""What a training run reports: figures on held-out queries, ``train.json``, and a picture of the losses."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalm_rag.engine.reranker import Reranker
from kalm_rag.evaluation.plots import new_figure, save, tidy
from kalm_rag.training.checkpoint import REPORT, whole_folder
from kalm_rag.training.lists import CandidateLists
from kalm_rag.training.losses import mean_ndcg
from kalm_rag.training.mining import margins_of

logger = logging.getLogger(__name__)

WINDOW = 50
"""Batches that the line is a mean over: one batch's loss depends most on its ratio and source."""


@dataclass(frozen=True, kw_only=True)
class DevRow:
    """nDCG@10 on one folder's held-out queries at one ratio, over the first 50 candidates of retrieval."""

    name: str  # the folder
    ratio: int
    queries: int
    retrieval: float  # the candidates' own order
    fusion: float  # the teacher's order: BM25 and retrieval
    before: float  # the model as it entered the stage
    after: float  # the model as it was saved


@dataclass(kw_only=True)
class TrainReport:
    """What one stage did; ``train.json`` in its folder."""

    folder: Path  # where the weights are
    base: str  # what it started from; "" is from scratch
    stage: str
    steps: int  # batches learnt from (fewer than asked if the time ran out)
    losses: list[float]  # of every batch
    dev: list[DevRow]
    # scale and shift that make P(yes) right on the held-out queries; 1 and 0 where it is
    calibration: tuple[float, float]
    seconds: dict[str, float]  # wall-clock of each part
    peak_bytes: int  # most memory used: the device's on CUDA, else the process's; 0 where it can't be told
    settings: dict[str, Any]
    # mean dev nDCG@10 at ratio 4 (or the smallest) after so many steps
    curve: dict[int, float] = field(default_factory=dict)
    # negatives mined and candidates dropped as likely relevant, in stage hard
    mined: dict[str, int] = field(default_factory=dict)

    @property
    def fell(self) -> list[DevRow]:
        """Held-out figures that are lower than before: reasons not to use the result."""
        return [row for row in self.dev if row.after < row.before]


def measure(
    engine: Reranker, held: Sequence[CandidateLists], ratios: Sequence[int]
) -> tuple[list[DevRow], list[dict[int, Tensor]]]:
    """Figures of a model (as `before` and `after`) at each ratio, and its margins by ratio for each of the lists."""
    rows, margins = [], []
    for lists in held:
        by_ratio = margins_of(engine, lists, ratios, what=f"measure {lists.name}")
        margins.append(by_ratio)
        same = torch.zeros_like(lists.gold)  # ties keep the given order
        retrieval, fusion = (mean_ndcg(scores, lists.gold, lists.relevant) for scores in (same, lists.teacher))
        row = DevRow(
            name=lists.name, ratio=0, queries=len(same), retrieval=retrieval, fusion=fusion, before=0.0, after=0.0
        )
        for ratio, found in by_ratio.items():
            score = mean_ndcg(found, lists.gold, lists.relevant)
            rows.append(replace(row, ratio=ratio, before=score, after=score))
    return rows, margins


def write_run(report: TrainReport, save: Callable[[Path], None]) -> None:
    """Make the report's folder with the weights that `save` writes, and ``train.json``: whole or not at all."""
    with whole_folder(report.folder) as scratch:
        save(scratch)
        text = json.dumps(asdict(report), indent=1, default=str)
        (scratch / REPORT).write_text(f"{text}\n", encoding="utf-8")
    logger.info("stage %s: %d steps; weights in %s", report.stage, report.steps, report.folder)


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


def peak_memory(device: torch.device) -> int:
    """Most bytes used so far: the device's on CUDA, else the process's; 0 where the system doesn't tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
