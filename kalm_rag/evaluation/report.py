"""What an evaluation found: rows of one set, and means over sets. Plain values, JSON-able with stable keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kalm_rag.errors import InputError
from kalm_rag.evaluation.metrics import Calibration, Change, change_of, mean


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One ranking of one set: mean metrics over queries (all are better when higher), and what it gains."""

    ranking: str  # "retrieval" (cosine), "bm25", "fusion" (of both) or "reranked", all over the same candidates
    model: str | None = None  # name of the reranking model; None for the others
    ratio: int | None = None  # pooling ratio of its states; None for the others
    ndcg_10: float  # nDCG@10
    mrr_10: float  # reciprocal rank at 10
    recall_10: float  # recall at 10
    recall_k: float  # recall among all candidates, which no ranking of them can change
    over_retrieval: Change | None = None  # nDCG@10 above retrieval's; None for retrieval
    over_fusion: Change | None = None  # nDCG@10 above fusion's; None for fusion, and for what it is made of
    over_first: Change | None = None  # nDCG@10 above the first model's at the same ratio; None but for further models
    calibration: Calibration | None = None  # how good its probabilities are; None where there are none
    milliseconds: float = 0.0  # median time of a query's candidates, from stored states to an order; 0 but for models
    # nDCG@10 of each query, in the order of the judgements. Left out of `to_dict`.
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
    """What `evaluate` found on one set."""

    name: str  # the set's name in tables
    data: str  # its folder
    split: str  # its split
    pooled: bool  # whether only judged passages were ranked
    task: str | None  # the task text in force; None is the default one
    models: tuple[str, ...]  # names of the reranking models
    queries: int  # queries measured
    passages: int  # passages of the collection
    top_k: int  # most candidates of a query
    rows: tuple[EvalRow, ...]  # retrieval, BM25, fusion, then one row per model and ratio
    # wall-clock of each stage: retrieve (with indexing), bm25, rerank, and encode (what was met without states then)
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "rows"}
        return {**plain, "models": list(self.models), "rows": [row.to_dict() for row in self.rows]}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One ranking over several sets, each set counting the same."""

    ranking: str  # as in `EvalRow`
    model: str | None  # as in `EvalRow`
    ratio: int | None  # as in `EvalRow`
    sets: int  # how many sets
    ndcg_10: float  # mean of the sets' nDCG@10
    # mean gain over retrieval, with the interval and test of that mean; None for retrieval
    over_retrieval: Change | None
    over_fusion: Change | None  # likewise over fusion
    over_first: Change | None  # likewise over the first model
    worst_set: str | None  # the set with the smallest gain over retrieval; None for retrieval
    worst_gain: float | None  # that gain
    ece: float | None  # mean calibration error; None where there are no probabilities
    balanced_ece: float | None  # likewise, relevant and irrelevant pairs weighing half each

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
