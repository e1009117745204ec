"""Between the stages: what the model itself says of its candidates, to draw harder ones and to learn softer labels.

Owns which candidates are kept, which of them look like unlabelled positives, and the soft labels. Letters: R queries,
C candidates of a list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from kalm_rag.models.pico.backbone import PicoBackbone
from kalm_rag.training.data import Lists

RANDOMS = 4
"""Random passages kept in a narrowed list."""

DOUBT = 0.5
"""A candidate without a label whose margin is above its query's best labelled one less this is left out: most such
are right answers that nobody judged."""


def narrow_lists(lists: Sequence[Lists], *, queries: int, candidates: int, generator: torch.Generator) -> list[Lists]:
    """Keep a sample of queries, and of each list the labelled ones, a few random ones and a log-uniform rest.

    Args:
        lists: Sources.
        queries: Queries kept in all, shared out as the square root of a source's size.
        candidates: C, candidates kept of each list.
        generator: Fixes the draws.
    """
    roots = [len(one.texts) ** 0.5 for one in lists]
    out = []
    for one, root in zip(lists, roots, strict=True):
        count = min(len(one.texts), max(1, round(queries * root / sum(roots))))
        rows = torch.randperm(len(one.texts), generator=generator)[:count]
        size = min(candidates, one.candidates.shape[1])
        randoms = min(RANDOMS, size // 2)
        chances = (1.0 / torch.arange(1, one.depth + 1)).expand(count, -1) + 1e6 * one.gold[rows, : one.depth]
        kept = torch.multinomial(chances, min(size - randoms, one.depth), generator=generator).sort(1).values
        ends = one.depth + torch.stack(
            [torch.randperm(one.randoms, generator=generator)[:randoms] for _ in range(count)]
        )
        out.append(one.narrow(rows, torch.cat([kept, ends], 1), randoms))
    return out


@torch.inference_mode()
def margins_of(backbone: PicoBackbone, lists: Lists, ratio: int) -> Tensor:
    """Score every candidate of every list, without instructions and calibration, ``(queries, C)``."""
    decoder, table, out = backbone.decoder, backbone.codes.table, []
    width = lists.candidates.shape[1]
    for row in tqdm(range(len(lists.texts)), desc=f"{lists.name} margins", unit="query", mininterval=2.0):
        hidden, ids, counts = lists.queries.gather(torch.tensor([row]))
        query = decoder.prepare(hidden, ids, table[ids], counts > 0, 0)
        placed = lists.passages.pooled(lists.candidates[row], ratio, table)
        out.append(decoder(query.rows(torch.zeros(width, dtype=torch.long)), *placed)[0].float())
    return torch.stack(out).clone()


def set_hard_negatives(lists: Lists, margins: Tensor) -> None:
    """Draw candidates by the model's own ranks from now on, and leave out those that look like unlabelled positives.

    Args:
        lists: Changed in place: gets `chances`.
        margins: The model's, ``(queries, C)``.
    """
    depth = lists.depth
    ranks = margins[:, :depth].argsort(1, descending=True).argsort(1)
    chances = 1.0 / (ranks + 1.0)
    labelled = lists.gold.sum(1, keepdim=True) > 0
    best = margins.masked_fill(lists.gold == 0, -torch.inf).amax(1, keepdim=True)
    doubtful = labelled & (lists.gold[:, :depth] == 0) & (margins[:, :depth] > best - DOUBT)
    lists.chances = chances.masked_fill(doubtful, 0.0)


def mine(backbone: PicoBackbone, lists: Sequence[Lists], margins: list[list[Tensor]]) -> None:
    """Score narrowed lists with unpooled states; they get harder draws, and soft labels: the mean of all scores so far.

    Args:
        backbone: The model as it is now.
        lists: Changed in place.
        margins: What earlier models gave, a list a source; this model's are added.
    """
    for one, scores in zip(lists, margins, strict=True):
        scores.append(margins_of(backbone, one, 1))
        set_hard_negatives(one, scores[-1])
        one.soft = torch.stack(scores).mean(0)
