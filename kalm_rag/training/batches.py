"""Batches drawn of candidate lists: which queries, and which of their candidates, one step learns from.

Letters: L lists, C candidates of a list.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kalm_rag.training.lists import CandidateLists


@dataclass(frozen=True, kw_only=True)
class Mined:
    """What a model makes of one list."""

    hard: list[int]  # columns of negatives, the one it takes for most relevant first
    dropped: set[int]  # columns that may be relevant without a label: never drawn as negatives


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Lists of one collection, with C columns of each: what one step learns from."""

    lists: CandidateLists
    rows: list[int]
    picks: list[list[int]]

    @property
    def gold(self) -> Tensor:
        """Labels, ``(L, C)``."""
        return self.lists.gold[self.rows].gather(1, torch.tensor(self.picks))

    @property
    def teacher(self) -> Tensor:
        """Soft labels, ``(L, C)``."""
        return self.lists.teacher[self.rows].gather(1, torch.tensor(self.picks))

    def part(self, rows: slice) -> Batch:
        """Some of the lists."""
        return replace(self, rows=self.rows[rows], picks=self.picks[rows])


class Batches:
    """Draws batches; a collection is met as often as the root of its size.

    Of C candidates, `randoms` are random passages, if there are so many. `mined` has hard negatives of the first lists
    of each collection, and only these are met then; without it, negatives come from the retrieval ranks alone.
    """

    def __init__(
        self,
        lists: Sequence[CandidateLists],
        draws: random.Random,
        *,
        candidates: int,
        randoms: int,
        mined: Sequence[Sequence[Mined]] | None = None,
    ) -> None:
        self._lists, self._random, self._candidates, self._randoms = lists, draws, candidates, randoms
        self._mined = mined
        self._sizes = [len(source.queries) for source in lists] if mined is None else [len(source) for source in mined]

    def draw(self, size: int, *, alike: bool = False) -> Batch:
        """Draw L lists; `alike` ones have queries of like length, so that little of a batch is padding."""
        which = self._random.choices(range(len(self._lists)), [size**0.5 for size in self._sizes])[0]
        rows = [self._random.randrange(self._sizes[which]) for _ in range(4 * size if alike else size)]
        if alike:
            start = self._random.randrange(4) * size
            rows = sorted(rows, key=lambda row: len(self._lists[which].queries[row]))[start : start + size]
        return Batch(lists=self._lists[which], rows=rows, picks=[self.columns(which, row) for row in rows])

    def columns(self, which: int, row: int) -> list[int]:
        """Columns of one list: up to two relevant ones, mined negatives if there are, the rest over the ranks."""
        lists, size = self._lists[which], min(self._candidates, self._lists[which].candidates.shape[1])
        golden = lists.gold[row].nonzero().flatten().tolist()
        chosen = self._random.sample(golden, min(2, len(golden), size - 1))
        barred = set(golden)
        if self._mined is not None:
            mined = self._mined[which][row]
            barred |= mined.dropped
            chosen += self._random.sample(mined.hard, min(2 * (size - len(chosen)) // 3, len(mined.hard)))
        randoms = [c for c in range(lists.depth, lists.candidates.shape[1]) if c not in barred and c not in chosen]
        chosen += self._random.sample(randoms, min(self._randoms, len(randoms), size - len(chosen)))
        left = [c for c in range(lists.candidates.shape[1]) if c not in barred and c not in chosen]
        while len(chosen) < size and left:  # rank log-uniform: near misses often, far ones too
            chosen.append(left.pop(int((len(left) + 1) ** self._random.random()) - 1))
        again = [c for c in chosen if c not in golden] or chosen  # a small collection: some negatives twice
        return chosen + [self._random.choice(again) for _ in range(size - len(chosen))]
