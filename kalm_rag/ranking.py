"""Relevance, the order it gives, and the checks at the public door. Plain Python: knows no tensor and no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kalm_rag.errors import InputError
from kalm_rag.instructions import check_text


@dataclass(frozen=True, slots=True)
class Relevance:
    """How relevant a passage is.

    Attributes:
        margin: logit(yes) - logit(no); higher is more relevant. Sort on this one.
        probability: P(yes) = sigmoid(margin), in [0, 1]; saturates near its ends.
    """

    margin: float
    probability: float


@dataclass(frozen=True, slots=True)
class Ranked:
    """One passage of a ranking: its position in the input, and its relevance."""

    index: int
    margin: float
    probability: float


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


def check_passages(passages: Sequence[str]) -> list[str]:
    """Give the passages as a list if each is a valid string.

    Raises:
        InputError: If `passages` is one string, or an item is no valid string; the item's position is named.
    """
    if isinstance(passages, str):
        raise InputError("passages is one string; wanted a list of strings. Put it in brackets.")
    return [check_text(text, f"passage {position}") for position, text in enumerate(passages)]


def check_query(query: object, what: str = "query") -> None:
    """Refuse what can't be asked.

    Raises:
        InputError: If it is not a valid string, or blank.
    """
    if not check_text(query, what).strip():
        raise InputError(f"{what} is blank; wanted the text to search for.")


def check_cut(top_n: int | None, threshold: float | None) -> None:
    """Refuse a cut that means nothing.

    Raises:
        InputError: If `top_n` is not a whole number >= 1, or `threshold` is outside [0, 1].
    """
    if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int) or top_n < 1):
        raise InputError(f"top_n is {top_n!r}; wanted a whole number >= 1, or None for all.")
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise InputError(f"threshold is {threshold!r}; wanted P(yes) in [0, 1], or None for all.")


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
