"""What an evaluation found: rows of one set, and means over sets. Plain values, JSON-able with stable keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kalm_rag.errors import InputError
from kalm_rag.evaluation.metrics import Calibration, Change, change_of, mean


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One ranking of one set: mean metrics over queries (all are better when higher), and what it gains.

    Attributes:
        ranking: ``"retrieval"`` (cosine), ``"bm25"``, ``"fusion"`` (of both) or ``"reranked"``, all over the same
            candidates.
        model: Name of the reranking model; None for the others.
        ratio: Pooling ratio of its states; None for the others.
        ndcg_10: nDCG@10.
        mrr_10: Reciprocal rank at 10.
        recall_10: Recall at 10.
        recall_k: Recall among all candidates, which no ranking of them can change.
        over_retrieval: nDCG@10 above retrieval's; None for retrieval.
        over_fusion: nDCG@10 above fusion's; None for fusion, and for what it is made of.
        over_first: nDCG@10 above the first model's at the same ratio; None but for further models.
        calibration: How good its probabilities are; None where there are none.
        milliseconds: Median time of a query's candidates, from stored states to an order; 0 but for models.
        values: nDCG@10 of each query, in the order of the judgements. Left out of `to_dict`.
    """

    ranking: str
    model: str | None = None
    ratio: int | None = None
    ndcg_10: float
    mrr_10: float
    recall_10: float
    recall_k: float
    over_retrieval: Change | None = None
    over_fusion: Change | None = None
    over_first: Change | None = None
    calibration: Calibration | None = None
    milliseconds: float = 0.0
    values: tuple[float, ...] = field(default=(), repr=False)

    @property
    def key(self) -> tuple[str, str | None, int | None]:
        """What the same ranking of another set has in common with it."""
        return self.ranking, self.model, self.ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able."""
        return {name: value for name, value in asdict(self).items() if name != "values"}


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """What `evaluate` found on one set.

    Attributes:
        name: The set's name in tables.
        data: Its folder.
        split: Its split.
        pooled: Whether only judged passages were ranked.
        task: The task text in force; None is the default one.
        models: Names of the reranking models.
        queries: Queries measured.
        passages: Passages of the collection.
        top_k: Most candidates of a query.
        rows: Retrieval, BM25, fusion, then one row per model and ratio.
        seconds: Wall-clock of each stage: retrieve (with indexing), bm25, rerank, and encode (what was met without
            states then).
    """

    name: str
    data: str
    split: str
    pooled: bool
    task: str | None
    models: tuple[str, ...]
    queries: int
    passages: int
    top_k: int
    rows: tuple[EvalRow, ...]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "rows"}
        return {**plain, "models": list(self.models), "rows": [row.to_dict() for row in self.rows]}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One ranking over several sets, each set counting the same.

    Attributes:
        ranking: As in `EvalRow`.
        model: As in `EvalRow`.
        ratio: As in `EvalRow`.
        sets: How many sets.
        ndcg_10: Mean of the sets' nDCG@10.
        over_retrieval: Mean gain over retrieval, with the interval and test of that mean; None for retrieval.
        over_fusion: Likewise over fusion.
        over_first: Likewise over the first model.
        worst_set: The set with the smallest gain over retrieval; None for retrieval.
        worst_gain: That gain.
        ece: Mean calibration error; None where there are no probabilities.
        balanced_ece: Likewise, relevant and irrelevant pairs weighing half each.
    """

    ranking: str
    model: str | None
    ratio: int | None
    sets: int
    ndcg_10: float
    over_retrieval: Change | None
    over_fusion: Change | None
    over_first: Change | None
    worst_set: str | None
    worst_gain: float | None
    ece: float | None
    balanced_ece: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able."""
        return asdict(self)


def summarise(reports: Sequence[EvalReport]) -> list[Summary]:
    """Mean over sets, for each ranking.

    Args:
        reports: Reports of the same models and ratios, at least one.

    Returns:
        One summary per row of the reports, in their order.

    Raises:
        InputError: If there are none, or their rows are not of the same rankings.
    """
    if not reports:
        raise InputError("no reports to summarise; wanted at least one.")
    keys = [row.key for row in reports[0].rows]
    for report in reports:
        if [row.key for row in report.rows] != keys:
            raise InputError(f"{report.name} has other rankings than {reports[0].name}; evaluate all alike.")
    return [
        _summary([report.rows for report in reports], place, [report.name for report in reports])
        for place in range(len(keys))
    ]


def _summary(sets: Sequence[tuple[EvalRow, ...]], place: int, names: Sequence[str]) -> Summary:
    rows = [own[place] for own in sets]
    gains = [row.over_retrieval.mean for row in rows if row.over_retrieval is not None]
    sure = [row.calibration for row in rows if row.calibration is not None]
    balanced = [found.balanced_ece for found in sure if found.balanced_ece is not None]
    first = rows[0]
    return Summary(
        ranking=first.ranking,
        model=first.model,
        ratio=first.ratio,
        sets=len(rows),
        ndcg_10=mean([row.ndcg_10 for row in rows]),
        over_retrieval=_mean_change(sets, place, "retrieval") if first.over_retrieval else None,
        over_fusion=_mean_change(sets, place, "fusion") if first.over_fusion else None,
        over_first=_mean_change(sets, place, "reranked") if first.over_first else None,
        worst_set=names[gains.index(min(gains))] if gains else None,
        worst_gain=min(gains) if gains else None,
        ece=mean([found.ece for found in sure]) if sure else None,
        balanced_ece=mean(balanced) if balanced else None,
    )


def _mean_change(sets: Sequence[tuple[EvalRow, ...]], place: int, ranking: str) -> Change:
    """Mean change against another ranking (for ``"reranked"``: the first model's at the same ratio)."""
    changes = []
    for rows in sets:
        ratio = rows[place].ratio if ranking == "reranked" else None
        before = next(row for row in rows if row.ranking == ranking and row.ratio == ratio)
        changes.append([now - then for now, then in zip(rows[place].values, before.values, strict=True)])
    return change_of(*changes)
