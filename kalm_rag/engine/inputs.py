"""What the engine's methods take, checked and sorted out before anything runs. Knows states; knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np

from kalm_rag.checks import check_items, check_query, check_text
from kalm_rag.engine.prepared import PreparedQuery
from kalm_rag.errors import InputError
from kalm_rag.states import PassageStates

Pairs = Iterable[Sequence[str]] | Sequence[str]
"""(query, passage) pairs, or a single pair."""


def check_question(query: str | PreparedQuery) -> None:
    """Refuse what can't be asked; what `Reranker.prepare` gave was checked there.

    Raises:
        InputError: If it is not a valid string, or blank.
    """
    if not isinstance(query, PreparedQuery):
        check_query(query)


def check_states(states: Iterable[PassageStates]) -> list[PassageStates]:
    """Read states from any iterable, once.

    Raises:
        InputError: If it is no iterable, or an item is something else; which one is named.
    """
    items = check_items(states, "states", "what Reranker.encode or a store gave")
    for position, item in enumerate(items):
        if not isinstance(item, PassageStates):
            raise InputError(f"states {position} is {type(item).__name__}; wanted PassageStates, as encode(...) gives.")
    return items


def check_texts_or_states(given: Iterable[str] | Iterable[PassageStates]) -> tuple[list[str], list[PassageStates]]:
    """Read texts or states from any iterable, once; one of the two lists is empty.

    Raises:
        InputError: If it is no iterable, or mixes both. Texts are not looked at.
    """
    items = check_items(cast("Iterable[Any]", given), "passages_or_states", "a list of strings, or of states")
    is_states = [isinstance(item, PassageStates) for item in items]
    if all(is_states):
        return [], items
    if any(is_states):
        here, there = is_states.index(True), is_states.index(False)
        raise InputError(
            f"passages_or_states mixes states (item {here}) with {type(items[there]).__name__} (item {there}); wanted "
            f"one kind. Make states of the texts with encode(...)."
        )
    return items, []  # `encode` checks them


def check_pairs(sentences: Pairs) -> tuple[list[tuple[str, str]], bool]:
    """Read pairs from any iterable, once.

    Returns:
        The pairs, and whether a single pair was given instead of several.

    Raises:
        InputError: If an item is no pair of valid strings, or a query is blank; which one is named.

    Example:
        >>> check_pairs(("a?", "A passage."))
        ([('a?', 'A passage.')], True)
    """
    items: list[Any] = check_items(cast("Iterable[Any]", sentences), "sentences", "a list of (query, passage) pairs")
    single = len(items) == 2 and all(isinstance(item, str) for item in items)
    pairs = [items] if single else items
    for position, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple | np.ndarray) or len(pair) != 2:
            raise InputError(f"pair {position} is {pair!r:.80}; wanted (query, passage).")
        check_query(pair[0], f"query of pair {position}")
        check_text(pair[1], f"passage of pair {position}")
    return [(pair[0], pair[1]) for pair in pairs], single
