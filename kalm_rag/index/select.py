"""The fourth verb: which passages of a ranking are handed on. No passage twice, no more tokens than there is room for.

One order for every door: threshold (the ranking's own), duplicates, pruning, budget, `top_n`; diversity says whose turn
it is. A passage is a duplicate of one that is handed on, so one that found no room takes no other with it. Knows no
framework and no Chroma.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from kalm_rag.checks import call_app, check_count
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.candidates import CandidateStates, RankedCandidate, Ranking
from kalm_rag.index.pruning import PRUNE_MARGINS, Pruner, pruned_text
from kalm_rag.index.results import LeftOut
from kalm_rag.states import StateBatch

# Measured with pico on passages of SciFact, MedQuAD, Cranfield and a COVID FAQ (30 to 160 words, 3,415 of them). Edited
# copies (no punctuation, a sentence out, a header before it, 5% of the words out or mistyped, the window moved by 20%)
# against the nearest passage that is another one (less than 80% of the words in common), share at or above the cosine:
#            0.90   0.92   0.94   0.95   0.96   0.98
#   copies   93.3   90.1   86.2   82.9   78.2   61.6 %
#   others   0.82   0.41   0.29   0.18   0.15   0.09 %    (from 0.95 on only MedQuAD's set phrases on other diseases)
DUPLICATE_COSINES = {"pico": 0.95}
"""Family of models to the least cosine of two passages' mean states at which ``drop_duplicates=True`` drops one."""

# Against pico's tokenizer, on 4,455 passages of five sets: never less, 1.4 times as much on average (by 5 letters: less
# for 0.6%). Tables, CSV, hexadecimal, Russian, Chinese: never less, 1.0 to 1.6 times (bytes / 3: less for all of them).
# Random letters may be more tokens: 29% of made-up addresses were.
_PIECE = re.compile(r"[A-Za-z]{1,4}|[^A-Za-z\s]")
"""What is taken for a token where no tokenizer is loaded: up to 4 letters of a word, each digit, sign, other letter."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is handed on of a ranking.

    Attributes:
        max_tokens: Most tokens of all passages together, >= 1; None for no budget. Filled in rank order: a passage that
            doesn't fit is left out, and a shorter one behind it may still fit.
        count_tokens: Counts the tokens of a text, as the app's LLM does. None takes the reranker's tokenizer (special
            tokens included), or where none is loaded an estimate that is rather above: a token per 4 letters of a word,
            and each digit and sign.
        drop_duplicates: Whether a passage that says the same as a better one is left out: equal texts always, others
            from this cosine of their mean states on, in (0, 1]. True takes what was measured for the model; that is
            pico, and for other models only equal texts are dropped then. Passages that differ in one name or number are
            the same to it.
        diversity: How much a passage loses for being like those that are handed on already, in [0, 1): maximal marginal
            relevance (Carbonell and Goldstein, SIGIR 1998), ``(1 - diversity) * P(yes) - diversity * cosine`` to the
            nearest of them, by mean states. It decides which passages are handed on, where `top_n` or the budget
            leaves some out; they come best first all the same. 0 goes by P(yes) alone.
        prune: Whether sentences go that don't answer the question: those whose margin lies further below that of the
            best sentence of their passage than this, > 0. True takes what was measured for the model; that is pico,
            and other models' passages stay whole then. No passage becomes empty; see `kalm_rag.index.pruning`.

    Raises:
        InputError: If one is of the wrong kind or out of range.
    """

    max_tokens: int | None = None
    count_tokens: Callable[[str], int] | None = None
    drop_duplicates: bool | float = False
    diversity: float = 0.0
    prune: bool | float = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_count(self.max_tokens, "max_tokens", hint=", or None for no budget")
        if self.count_tokens is not None and not callable(self.count_tokens):
            raise InputError(
                f"count_tokens is {type(self.count_tokens).__name__}; wanted a function from a text to its number of "
                f"tokens, or None for the model's own tokenizer."
            )
        cosine: object = self.drop_duplicates
        if not isinstance(cosine, bool) and not (isinstance(cosine, Real) and 0.0 < float(cosine) <= 1.0):
            raise InputError(f"drop_duplicates is {cosine!r}; wanted True, False, or a cosine above 0 and up to 1.")
        share: object = self.diversity
        if isinstance(share, bool) or not isinstance(share, Real) or not 0.0 <= float(share) < 1.0:
            raise InputError(f"diversity is {share!r}; wanted 0 (by P(yes) alone) or more, below 1.")
        below: object = self.prune
        if not isinstance(below, bool) and not (isinstance(below, Real) and 0.0 < float(below) < inf):
            raise InputError(f"prune is {below!r}; wanted True, False, or a difference of margins above 0.")


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What a search gave, in its order.

    Attributes:
        read: Their texts as the model reads them; None for one without text.
        shown: Gives the text of one, by its place, as the app will hand it to its LLM: what a budget counts.
        names: What each is called in reports: its id.
        body: Gives the part of a text, by its place, that may be pruned; None for one that stays whole.
    """

    read: Sequence[str | None]
    shown: Callable[[int], str]
    names: Sequence[str]
    body: Callable[[int], str | None] = lambda place: None


def select_candidates(
    ranking: Ranking,
    given: Candidates,
    *,
    selection: Selection,
    top_n: int | None,
    engine: Reranker | None,
) -> tuple[list[RankedCandidate], list[LeftOut]]:
    """Choose what is handed on.

    Args:
        ranking: Candidates, best first, and their states.
        given: All candidates.
        selection: Duplicates and budget.
        top_n: Most candidates; None for all.
        engine: Whose states and tokenizer; None where none is loaded.

    Returns:
        What is handed on, in rank order, and what was left out for threshold, duplicates, budget or diversity.
        Candidates behind the last one of `top_n` are in neither.

    Raises:
        InputError: If ``count_tokens`` gives anything but a whole number.
    """
    names = given.names
    ranks = {candidate.index: rank for rank, candidate in enumerate(ranking.candidates)}
    left = [LeftOut(id=name, reason="threshold") for place, name in enumerate(names) if place not in ranks]
    near = _Similarity(ranking.states if selection.drop_duplicates or selection.diversity else None)
    least = _least_cosine(selection, engine)
    pruner = _pruner(ranking, given, selection, engine, top_n)
    kept: list[RankedCandidate] = []
    considered: set[int] = set()
    room = selection.max_tokens
    for candidate in _by_turns(ranking.candidates, near, selection.diversity, kept):
        if len(kept) == top_n:
            break
        considered.add(candidate.index)
        name = names[candidate.index]
        twin = _twin(candidate.index, kept, given.read, near, least) if selection.drop_duplicates else None
        if twin is not None:
            left.append(LeftOut(id=name, reason="duplicate", duplicate_of=names[twin]))
            continue
        spans = None if pruner is None else pruner.kept(candidate.index)
        if spans is not None:
            candidate = replace(candidate, kept=tuple(spans))
        if room is not None:
            size = _count(shown_text(given, candidate), selection, engine)
            if size > room:
                left.append(LeftOut(id=name, reason="budget", tokens=size))
                continue
            room -= size
        kept.append(candidate)
    kept.sort(key=lambda candidate: ranks[candidate.index])
    last = ranks[kept[-1].index] if kept else 0
    passed_over = (names[c.index] for c in ranking.candidates[:last] if c.index not in considered)
    left += [LeftOut(id=name, reason="diversity") for name in passed_over]
    return kept, left


def shown_text(given: Candidates, candidate: RankedCandidate) -> str:
    """Text of a candidate as the app hands it to its LLM, without what was pruned."""
    shown, body = given.shown(candidate.index), given.body(candidate.index)
    if candidate.kept is None or body is None:
        return shown
    left = pruned_text(body, candidate.kept)
    return left if shown == body else shown.replace(body.strip(), left, 1)


def mean_states(states: StateBatch) -> Tensor:
    """Mean of each passage's token states, made unit length: float32 ``(B, H)`` on the CPU.

    ``sum_n counts_n * states_n``, normalised: the retrieval vector of a pico passage, and as good a fingerprint of what
    a passage says with any other model.
    """
    vectors, counts = states.on(torch.device("cpu"), torch.float32)
    return torch.nn.functional.normalize((vectors * counts[..., None]).sum(dim=1), dim=1)  # (B, H)


class _Similarity:
    """Cosines between the mean states of candidates, by their places."""

    def __init__(self, states: CandidateStates | None) -> None:
        self._rows: dict[int, int] = {}
        if states is not None and states.states is not None:
            self._means = mean_states(states.states)
            self._rows = {place: row for row, place in enumerate(states.rows)}

    def __contains__(self, place: int) -> bool:
        return place in self._rows

    def to(self, place: int, others: Sequence[int]) -> Tensor:
        """Of one to each of some others, all of which have states: ``(len(others),)``."""
        return self._means[[self._rows[other] for other in others]] @ self._means[self._rows[place]]


def _by_turns(
    ranked: Sequence[RankedCandidate], near: _Similarity, diversity: float, kept: Sequence[RankedCandidate]
) -> Iterator[RankedCandidate]:
    """Candidates in the order in which they are considered; `kept` is what was handed on when the next is asked for."""
    pool = [c for c in ranked if diversity and c.probability is not None and c.index in near]
    relevance = torch.tensor([c.probability for c in pool], dtype=torch.float32)
    nearest, seen = torch.zeros(len(pool)), 0  # to what was handed on; a cosine below 0 counts as 0
    places = [c.index for c in pool]
    waiting = torch.ones(len(pool), dtype=torch.bool)
    for _ in pool:
        for new in kept[seen:]:
            nearest = torch.maximum(nearest, near.to(new.index, places))
        seen = len(kept)
        marginal = (1.0 - diversity) * relevance - diversity * nearest
        best = int(marginal.masked_fill(~waiting, -torch.inf).argmax())
        waiting[best] = False
        yield pool[best]
    chosen = set(places)
    yield from (c for c in ranked if c.index not in chosen)


def _twin(
    place: int, kept: Sequence[RankedCandidate], read: Sequence[str | None], near: _Similarity, least: float | None
) -> int | None:
    """Place of the kept candidate that this one repeats."""
    for other in kept:
        if read[place] is not None and read[place] == read[other.index]:
            return other.index
    others = [other.index for other in kept if other.index in near]
    if least is None or place not in near or not others:
        return None
    cosines = near.to(place, others)
    best = int(cosines.argmax())
    return others[best] if float(cosines[best]) >= least else None


def _pruner(
    ranking: Ranking, given: Candidates, selection: Selection, engine: Reranker | None, top_n: int | None
) -> Pruner | None:
    """What prunes, if anything shall be."""
    if engine is None or selection.prune is False:
        return None
    margin = PRUNE_MARGINS.get(engine.info.family) if selection.prune is True else float(selection.prune)
    return None if margin is None else Pruner(engine, ranking, given.read, given.body, margin, top_n)


def _least_cosine(selection: Selection, engine: Reranker | None) -> float | None:
    """From which cosine on passages are duplicates; None: only equal texts are."""
    if selection.drop_duplicates is not True:
        return float(selection.drop_duplicates)
    return None if engine is None else DUPLICATE_COSINES.get(engine.info.family)


def _count(text: str, selection: Selection, engine: Reranker | None) -> int:
    if selection.count_tokens is not None:
        counted: Any = call_app("count_tokens", selection.count_tokens, text)
        return check_count(counted, "what count_tokens gave", least=0)
    if engine is None:
        return len(_PIECE.findall(text)) + 2  # at the beginning and the end
    raw = text.encode(errors="replace")  # a lone surrogate is no text that a tokenizer takes
    return engine.backbone.tokenize([raw.decode()])[0].total_tokens
