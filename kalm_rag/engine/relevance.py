"""Relevance of passages, and the order it gives. Plain Python: knows no tensor and no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relevance:
    """How relevant a passage is.

    Attributes:
        margin: logit(yes) - logit(no); higher is more relevant. Sort on this one.
        probability: P(yes) = sigmoid(margin), in [0, 1]; saturates near its ends.
    """

    margin: float
    probability: float

    def __repr__(self) -> str:
        return f"Relevance(margin={self.margin:.4f}, probability={self.probability:.4f})"


@dataclass(frozen=True, slots=True)
class Ranked:
    """One passage of a ranking.

    Attributes:
        index: Its position in the input.
        margin: logit(yes) - logit(no); higher is more relevant.
        probability: P(yes) = sigmoid(margin), in [0, 1].
    """

    index: int
    margin: float
    probability: float

    def __repr__(self) -> str:
        return f"Ranked(index={self.index}, margin={self.margin:.4f}, probability={self.probability:.4f})"


def probability_of(margin: float) -> float:
    """Sigmoid of a margin, without overflow at either end.

    Example:
        >>> probability_of(0.0), probability_of(-1000.0)
        (0.5, 0.0)
    """
    if margin >= 0:
        return 1.0 / (1.0 + math.exp(-margin))
    odds = math.exp(margin)
    return odds / (1.0 + odds)


def rank_relevances(
    relevances: Sequence[Relevance], *, top_n: int | None = None, threshold: float | None = None
) -> list[Ranked]:
    """Order relevances by falling margin, ties in input order, then cut by threshold and count.

    Example:
        >>> [r.index for r in rank_relevances([Relevance(0.0, 0.5), Relevance(2.0, 0.88), Relevance(0.0, 0.5)])]
        [1, 0, 2]
    """
    order = sorted(range(len(relevances)), key=lambda i: -relevances[i].margin)  # sorted() is stable
    kept = [i for i in order if threshold is None or relevances[i].probability >= threshold]
    return [Ranked(i, relevances[i].margin, relevances[i].probability) for i in kept[:top_n]]
