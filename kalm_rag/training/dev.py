"""Measuring on held-out lists during training: nDCG@10 before and after, and the two things fitted there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kalm_rag.models.pico.backbone import PicoBackbone
from kalm_rag.training.data import Lists
from kalm_rag.training.losses import calibrate

TOP_K = 50


@dataclass(frozen=True, kw_only=True)
class DevScore:
    """nDCG@10 on one held-out set at one ratio, over the retriever's top 50.

    Attributes:
        name: Which set.
        ratio: Pooling ratio.
        retrieval: The retriever's own order.
        fusion: The teacher's order (BM25 + retriever).
        reranked: pico's order.
        queries: How many queries.
    """

    name: str
    ratio: int
    retrieval: float
    fusion: float
    reranked: float
    queries: int


def dev_margins(backbone: PicoBackbone, lists: Lists, ratio: int) -> Tensor:
    """Score each query's top candidates, ``(queries, TOP_K)``, without calibration."""
    decoder, table, out = backbone.decoder, backbone.codes.table, []
    depth = min(TOP_K, lists.depth)
    with torch.inference_mode():
        for row in range(len(lists.texts)):
            hidden, ids, counts = lists.queries.gather(torch.tensor([row]))
            query = decoder.prepare(hidden, ids, table[ids], counts > 0, 0)
            placed = lists.passages.pooled(lists.candidates[row, :depth], ratio, table)
            out.append(decoder(query.rows(torch.zeros(depth, dtype=torch.long)), *placed)[0])
    return torch.stack(out)


def score_dev(backbone: PicoBackbone, lists: Lists, ratios: Sequence[int] = (4, 32)) -> list[DevScore]:
    """Measure the model on held-out lists."""
    depth = min(TOP_K, lists.depth)
    gold = lists.gold[:, :depth]
    before = mean_ndcg(lists.dense[:, :depth], gold, lists.relevant)
    fused = mean_ndcg(lists.teacher()[:, :depth], gold, lists.relevant)
    return [
        DevScore(
            name=lists.name,
            ratio=ratio,
            retrieval=before,
            fusion=fused,
            reranked=mean_ndcg(dev_margins(backbone, lists, ratio), gold, lists.relevant),
            queries=len(lists.texts),
        )
        for ratio in ratios
    ]


LEXICAL_SCALES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Scales of the lexical score that `settle_lexical` chooses from."""

NO_WORSE = 0.002
"""Difference of mean nDCG@10 between two scales that says nothing."""


def settle_lexical(backbone: PicoBackbone, lists: Sequence[Lists], ratios: Sequence[int] = (4, 32)) -> None:
    """Set the lexical score's scale to the least that is as good as the best one.

    Good is the nDCG@10, meaned over held-out lists and ratios. The least, because not every text is like these lists.
    """
    margins = []
    for scale in (0.0, 1.0):  # it is added to the rest, so two passes tell all
        backbone.decoder.lexical_scale.fill_(scale)
        margins.append([dev_margins(backbone, one, ratio) for ratio in ratios for one in lists])
    golds = [(one.gold[:, : min(TOP_K, one.depth)], one.relevant) for _ in ratios for one in lists]

    def quality(scale: float) -> float:
        scored = [rest + scale * (more - rest) for rest, more in zip(*margins, strict=True)]
        return sum(mean_ndcg(own, *gold) for own, gold in zip(scored, golds, strict=True)) / len(golds)

    found = {scale: quality(scale) for scale in LEXICAL_SCALES}
    least = min(scale for scale, good in found.items() if good >= max(found.values()) - NO_WORSE)
    backbone.decoder.lexical_scale.fill_(least)


def calibrate_on(backbone: PicoBackbone, lists: Sequence[Lists], ratio: int = 4) -> None:
    """Fit the scale and shift that make ``sigmoid(margin)`` a probability, over all held-out pairs.

    In each set, relevant and irrelevant pairs weigh half each: of 50 candidates mostly one is relevant, and a P(yes)
    that counts on this is hardly ever above 0.5.
    """
    margins = [dev_margins(backbone, one, ratio).flatten() for one in lists]
    gold = [one.gold[:, : min(TOP_K, one.depth)].flatten() for one in lists]
    weights = [torch.where(own > 0, 0.5 / own.sum().clamp(min=1), 0.5 / (1 - own).sum().clamp(min=1)) for own in gold]
    scale, shift = calibrate(torch.cat(margins), torch.cat(gold), torch.cat(weights) * 1000)
    backbone.decoder.calibration.copy_(torch.tensor([scale, shift]))


def mean_ndcg(scores: Tensor, gold: Tensor, relevant: Sequence[int], k: int = 10) -> float:
    """Mean nDCG@k of binary labels; ties keep the given order. `relevant` counts those outside the list too."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    gains = gold.gather(1, order)
    discount = 1.0 / torch.arange(2, k + 2).float().log2()
    ideal = torch.stack([discount[: max(1, min(k, n))].sum() for n in relevant])
    return float(((gains * discount[: gains.shape[1]]).sum(1) / ideal).mean())
