"""A model's own margins over candidate lists: for dev figures, for soft labels, and to mine hard negatives.

Letters: L lists, C candidates of a list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from kalm_rag.engine.reranker import Reranker
from kalm_rag.training.batches import Mined
from kalm_rag.training.lists import CandidateLists

HARDEST = 20
"""Most mined negatives kept of a list."""

ALIKE = 0.8
"""Share of common words (Jaccard) from which a passage counts as a copy of a relevant one."""

_WINDOW = 8


def margins_of(
    engine: Reranker, lists: CandidateLists, ratios: Sequence[int], *, what: str, rows: int | None = None
) -> dict[int, Tensor]:
    """Score lists as a user's query would be: encode (unless their states are at hand), pool, decode.

    The first `rows` lists are scored, None is all; `what` names the progress bar. Ratios are multiples of the smallest;
    gives float32 margins ``(rows, C)`` by ratio.
    """
    engine = engine.at(min(ratios)) if lists.states is None else engine
    total = len(lists.queries) if rows is None else rows
    out: dict[int, list[list[float]]] = {ratio: [] for ratio in ratios}
    with tqdm(total=total, desc=what, unit="query", mininterval=2.0) as bar:
        for at in range(0, total, _WINDOW):
            window = range(at, min(total, at + _WINDOW))
            wanted = torch.unique(lists.candidates[at : window.stop]).tolist()
            if lists.states is not None:
                read = [lists.states[i] for i in wanted]
            else:
                read = engine.encode([lists.passages[i] for i in wanted], show_progress=False)
            states = dict(zip(wanted, read, strict=True))
            for row in window:
                own = [states[int(i)] for i in lists.candidates[row]]
                for ratio in ratios:
                    scored = engine.score(lists.queries[row], own, instructions=lists.instructions[row], ratio=ratio)
                    out[ratio].append([relevance.margin for relevance in scored])
                bar.update()
    return {ratio: torch.tensor(rows) for ratio, rows in out.items()}


def mine(lists: CandidateLists, margins: Tensor, slack: float) -> list[Mined]:
    """Pick each list's hard negatives, without those that look like unlabelled positives.

    Dropped are retrieved candidates whose margin is above ``best relevant margin - slack`` and near-copies of a
    relevant passage. A random passage with such a margin is kept: it is the model's error, hardly a missing label.
    Margins are the model's, ``(L, C)``, of the first L lists; `slack` >= 0 is in their unit.
    """
    return [_mine_one(lists, row, margins[row], slack) for row in range(len(margins))]


def _mine_one(lists: CandidateLists, row: int, margins: Tensor, slack: float) -> Mined:
    gold = lists.gold[row] > 0
    ceiling = float(margins[gold].max()) - slack
    golden = [_words(text) for text in lists.texts(row, gold.nonzero().flatten().tolist())]
    hard: list[int] = []
    dropped: set[int] = set()
    for column in margins.argsort(descending=True, stable=True).tolist():
        if bool(gold[column]):
            continue
        if float(margins[column]) > ceiling and column < lists.depth:
            dropped.add(column)
        elif len(hard) < HARDEST:
            words = _words(lists.texts(row, [column])[0])
            copy = any(len(words & words_of) >= ALIKE * max(1, len(words | words_of)) for words_of in golden)
            dropped.add(column) if copy else hard.append(column)
    return Mined(hard=hard, dropped=dropped)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
