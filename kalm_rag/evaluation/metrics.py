"""Numbers: metrics per query, paired comparisons with interval and p value, calibration. Knows no model and no file.

Rank metrics come from ir-measures, the paired test from scipy (both in the extra ``eval``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalm_rag.errors import require
from kalm_rag.evaluation.beir import Collection

RESAMPLES = 2000
"""Bootstrap draws behind an interval."""

BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017 (arXiv 1706.04599)."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one ranking has over another on the same queries."""

    mean: float  # mean difference (of several sets: the mean of theirs); positive is better
    low: float  # lower end of its 95% interval (paired bootstrap over queries, drawn within each set)
    high: float
    # two-sided p value of a paired t test, which agrees with randomisation tests on such data (Smucker, Allan and
    # Carterette, CIKM 2007); over several sets with Welch's degrees of freedom; None where a set is of one query
    p: float | None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How far P(yes) can be taken at its word, over all scored pairs of a query and a candidate.

    A candidate without a judgement counts as irrelevant.
    """

    # expected calibration error: mean distance between P(yes) and the share of relevant ones, over 15 bins of equal
    # mass (Nixon et al. 2019, arXiv 1904.01685: with equal width, nearly all irrelevant pairs share one)
    ece: float
    # the same with relevant and irrelevant pairs weighing half each: what a model means whose P(yes) doesn't count on
    # how rare relevant candidates are. None if one kind is missing.
    balanced_ece: float | None
    brier: float  # mean squared distance between P(yes) and 1 or 0; lower is better
    kept: float | None  # share of relevant candidates with P(yes) >= 0.5; None if there are none
    dropped: float | None  # share of irrelevant candidates with P(yes) < 0.5; None if there are none
    pairs: int


def compare(after: Sequence[float], before: Sequence[float]) -> Change:
    """Compare two rankings by their metric of each query.

    Example:
        >>> compare([1.0, 0.5], [0.5, 0.0])
        Change(mean=0.5, low=0.5, high=0.5, p=0.0)
    """
    return change_of(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64))


def change_of(*differences: Sequence[float] | np.ndarray) -> Change:
    """Sum up differences query by query, one argument per set; every set counts the same."""
    sets = [np.asarray(difference, dtype=np.float64) for difference in differences]
    low, high = paired_interval(*sets)
    return Change(mean=mean([float(values.mean()) for values in sets]), low=low, high=high, p=_paired_p(sets))


def paired_interval(*differences: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Lower and upper end of the 95% interval of a mean difference, by bootstrap over queries.

    Of several sets (one argument each, a difference per query): of the mean of their means, queries drawn within each.

    Example:
        >>> paired_interval([0.5, 0.5, 0.5])
        (0.5, 0.5)
    """
    draw = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for difference in differences:
        values = np.asarray(difference, dtype=np.float64)
        means += values[draw.integers(0, len(values), (RESAMPLES, len(values)))].mean(1) / len(differences)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def calibration(probabilities: Tensor, relevant: Tensor) -> Calibration:
    """Compare P(yes) of pairs, ``(P >= 1,)``, with whether they are relevant, 1 or 0.

    Example:
        >>> calibration(torch.tensor([0.9, 0.6, 0.2]), torch.tensor([1.0, 0.0, 0.0])).dropped
        0.5
    """
    order = probabilities.argsort(stable=True)
    guessed = probabilities.double().numpy()[order.numpy()]
    true = relevant.double().numpy()[order.numpy()]
    rows = np.arange(len(true))
    bins = [part for part in np.array_split(rows, BINS) if len(part)]
    yes, good = guessed >= 0.5, int((true > 0).sum())
    balanced = None
    if 0 < good < len(true):
        weights = np.where(true > 0, 0.5 / good, 0.5 / (len(true) - good))
        middles = np.minimum(BINS - 1, (BINS * (weights.cumsum() - weights / 2)).astype(int))
        balanced = _gap(guessed, true, weights, [rows[middles == place] for place in range(BINS)])
    return Calibration(
        ece=_gap(guessed, true, np.full(len(true), 1 / len(true)), bins),
        balanced_ece=balanced,
        brier=float(((guessed - true) ** 2).mean()),
        kept=float(yes[true > 0].mean()) if good else None,
        dropped=float(1 - yes[true == 0].mean()) if good < len(true) else None,
        pairs=len(true),
    )


def _gap(guessed: np.ndarray, true: np.ndarray, weights: np.ndarray, bins: Sequence[np.ndarray]) -> float:
    """Weighted mean over bins of the distance between what was guessed and what was true in each."""
    return math.fsum(abs(float((weights[rows] * (guessed[rows] - true[rows])).sum())) for rows in bins)


def load_measures() -> Any:  # noqa: ANN401 - a module
    """Import ir-measures, or raise a `MissingDependencyError`."""
    return require("ir_measures", "eval", "evaluating")


def query_metrics(found: Collection, orders: Sequence[Tensor], wanted: Sequence[Any]) -> list[list[float]]:
    """Work out measures of ir-measures: one list for each, one value per query, in the collection's order.

    `orders` has the passage rows of each query, best first.
    """
    ranked = {  # a rank is scored as minus itself, so that no tie is broken anew
        query_id: {found.doc_ids[row]: -float(rank) for rank, row in enumerate(rows.tolist())}
        for query_id, rows in zip(found.queries, orders, strict=True)
    }
    values: dict[str, dict[str, float]] = {str(measure): dict.fromkeys(found.queries, 0.0) for measure in wanted}
    for metric in load_measures().iter_calc(list(wanted), found.qrels, ranked):
        values[str(metric.measure)][metric.query_id] = metric.value
    return [list(values[str(measure)].values()) for measure in wanted]


def best_first(rows: Sequence[Tensor], scores: Sequence[Tensor]) -> list[Tensor]:
    """Order each query's candidates by falling score; ties keep the order they came in."""
    return [found[own.sort(descending=True, stable=True).indices] for found, own in zip(rows, scores, strict=True)]


def mean(values: Sequence[float]) -> float:
    """Mean, summed exactly."""
    return math.fsum(values) / len(values)


def is_relevant(found: Collection, rows: Sequence[Tensor]) -> Tensor:
    """1 for each candidate of each query with a positive grade, else 0, all in one row ``(P,)``."""
    flags = [
        float(found.qrels[query_id].get(found.doc_ids[row], 0) > 0)
        for query_id, own in zip(found.queries, rows, strict=True)
        for row in own.tolist()
    ]
    return torch.tensor(flags)


def _paired_p(sets: Sequence[np.ndarray]) -> float | None:
    """Paired t test of the mean over sets; None for a single query, which tells nothing of a deviation."""
    if any(len(values) < 2 for values in sets):
        return None
    centre = mean([float(values.mean()) for values in sets])
    if all(np.ptp(values) == 0 for values in sets):  # no deviation: either nothing moved, or all of a set moved alike
        return 1.0 if centre == 0 else 0.0
    parts = np.array([values.var(ddof=1) / len(values) for values in sets])  # squared standard error of each set's mean
    freedom = parts.sum() ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, sets, strict=True))
    stats = require("scipy.stats", "eval", "testing for significance")
    return float(2 * stats.t.sf(abs(centre) * len(sets) / parts.sum() ** 0.5, freedom))
