"""What an evaluation found: rows of one set, and means over sets. Plain values, JSON-able with stable keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kalm_rag.errors import InputError
from kalm_rag.evaluation.metrics import Calibration, Change, change_of, mean


class Plain:
    """A report that can be printed as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field; what single queries had is left out."""
        return asdict(self, dict_factory=lambda fields: {k: v for k, v in fields if k != "values"})  # type: ignore[call-overload,no-any-return]


@dataclass(frozen=True, kw_only=True)
class EvalRow(Plain):
    """One ranking of one set: mean metrics over queries (all are better when higher), and what it gains."""

    ranking: str  # "retrieval" (cosine), "bm25", "fusion" (of both) or "reranked", all over the same candidates
    model: str | None = None  # name of the reranking model; None for the others
    ratio: int | None = None  # pooling ratio of its states; None for the others
    ndcg_10: float
    mrr_10: float
    recall_10: float
    recall_k: float  # recall among all candidates, which no ranking of them can change
    over_retrieval: Change | None = None  # nDCG@10 above retrieval's; None for retrieval
    over_fusion: Change | None = None  # nDCG@10 above fusion's; None for fusion, and for what it is made of
    over_first: Change | None = None  # nDCG@10 above the first model's at the same ratio; None but for further models
    calibration: Calibration | None = None  # how good its probabilities are; None where there are none
    milliseconds: float = 0.0  # median time of a query's candidates, from stored states to an order; 0 but for models
    values: tuple[float, ...] = field(default=(), repr=False)  # nDCG@10 of each query, in the judgements' order


@dataclass(frozen=True, kw_only=True)
class EvalReport(Plain):
    """What `evaluate` found on one set."""

    name: str  # as in tables
    data: str  # its folder
    split: str
    pooled: bool  # whether only judged passages were ranked
    task: str | None  # the task text in force; None is the default one
    models: tuple[str, ...]
    queries: int
    passages: int  # of the collection
    top_k: int  # most candidates of a query
    rows: tuple[EvalRow, ...]  # retrieval, BM25, fusion, then one row per model and ratio
    # wall-clock of each stage: retrieve (with indexing), bm25, rerank, and encode (what was met without states then)
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Summary(Plain):
    """One ranking over several sets, each set counting the same: means, of changes with interval and test."""

    ranking: str
    model: str | None
    ratio: int | None
    sets: int
    ndcg_10: float
    over_retrieval: Change | None
    over_fusion: Change | None
    over_first: Change | None
    worst_set: str | None  # the set with the smallest gain over retrieval; None for retrieval
    worst_gain: float | None
    ece: float | None  # None where there are no probabilities
    balanced_ece: float | None


def summarise(reports: Sequence[EvalReport]) -> list[Summary]:
    """Mean over sets, for each ranking: one summary per row of the reports, in their order.

    Raises:
        InputError: If there are no reports, or their rows are not of the same models and ratios.
    """
    if not reports:
        raise InputError("no reports to summarise; wanted at least one.")
    keys = [[(row.ranking, row.model, row.ratio) for row in report.rows] for report in reports]
    for report, own in zip(reports, keys, strict=True):
        if own != keys[0]:
            raise InputError(f"{report.name} has other rankings than {reports[0].name}; evaluate all alike.")
    return [_summary(reports, place) for place in range(len(keys[0]))]


def _summary(reports: Sequence[EvalReport], place: int) -> Summary:
    rows = [report.rows[place] for report in reports]
    gains = {
        report.name: row.over_retrieval.mean
        for report, row in zip(reports, rows, strict=True)
        if row.over_retrieval is not None
    }
    worst = min(gains, key=lambda name: gains[name]) if gains else None
    sure = [row.calibration for row in rows if row.calibration is not None]
    balanced = [found.balanced_ece for found in sure if found.balanced_ece is not None]
    first = rows[0]
    return Summary(
        ranking=first.ranking,
        model=first.model,
        ratio=first.ratio,
        sets=len(rows),
        ndcg_10=mean([row.ndcg_10 for row in rows]),
        over_retrieval=_mean_change(reports, place, "retrieval") if first.over_retrieval else None,
        over_fusion=_mean_change(reports, place, "fusion") if first.over_fusion else None,
        over_first=_mean_change(reports, place, "reranked") if first.over_first else None,
        worst_set=worst,
        worst_gain=gains[worst] if worst is not None else None,
        ece=mean([found.ece for found in sure]) if sure else None,
        balanced_ece=mean(balanced) if balanced else None,
    )


def _mean_change(reports: Sequence[EvalReport], place: int, ranking: str) -> Change:
    """Mean change against another ranking (for ``"reranked"``: the first model's at the same ratio)."""
    changes = []
    for report in reports:
        row = report.rows[place]
        ratio = row.ratio if ranking == "reranked" else None
        before = next(other for other in report.rows if other.ranking == ranking and other.ratio == ratio)
        changes.append([now - then for now, then in zip(row.values, before.values, strict=True)])
    return change_of(*changes)
