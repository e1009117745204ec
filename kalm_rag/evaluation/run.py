"""Evaluating one set: the rankings side by side, over the same candidates. What ``kalm-rag eval`` calls per set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.evaluation.beir import EvalSet
from kalm_rag.evaluation.candidates import Candidates, StoredEngine, Workplace, check_ratios
from kalm_rag.evaluation.fusion import Bm25, fuse
from kalm_rag.evaluation.metrics import (
    Change,
    best_first,
    calibration,
    compare,
    is_relevant,
    load_measures,
    mean,
    query_metrics,
)
from kalm_rag.evaluation.report import EvalReport, EvalRow
from kalm_rag.index.results import Timings
from kalm_rag.instructions import Instructions


@dataclass(frozen=True, kw_only=True)
class RankedSet:
    """Scores of each query's candidates, and whose they are."""

    ranking: str
    scores: Sequence[Tensor]
    model: str | None = None
    ratio: int | None = None
    milliseconds: float = 0.0


def evaluate(
    what: EvalSet,
    engine: Reranker,
    *,
    others: Sequence[Reranker] = (),
    retriever: Reranker | None = None,
    ratios: Sequence[int] = (1, 4, 16, 32),
    top_k: int = 50,
    max_queries: int | None = None,
    instructions: Instructions | None = None,
    cache: Path | None = None,
) -> EvalReport:
    """Measure retrieval, BM25, their fusion, and models that rerank at each ratio, on one collection.

    Args:
        what: The set: a BEIR folder, a split, and whether only judged passages are ranked.
        engine: The model that reranks.
        others: Further models, compared with the first.
        retriever: The model whose vectors retrieve; None takes `engine`, which must then embed (pico does).
        ratios: Pooling ratios, each a multiple of the smallest, at which states are kept.
        top_k: Candidates reranked, >= 1.
        max_queries: Measure only the first so many queries; None is all.
        instructions: Instructions for every query; None is the default ones.
        cache: Folder for passage states, so that a second run with the same model and corpus encodes nothing; None
            keeps them in a temporary folder.

    Raises:
        InputError: If the folder or split is missing, an argument is out of range, two models have one name, or no
            retriever is at hand.
        MissingDependencyError: If ir-measures or bm25s is not installed.
    """
    ratios = check_ratios(ratios)
    engines = {model.info.name: model for model in (engine, *others)}
    if len(engines) < 1 + len(others):
        raise InputError(f"models are {', '.join(m.info.name for m in (engine, *others))}; wanted each name once.")
    load_measures()
    steer = instructions if instructions is not None else Instructions()
    timings = Timings()
    with Workplace.open(
        engine, retriever=retriever, ratio=ratios[0], top_k=top_k, max_queries=max_queries, cache=cache
    ) as place:
        with timings.stage("retrieve"):
            candidates = place.find(what)
        with timings.stage("bm25"):
            rankings = baselines(candidates)
        for model in engines.values():
            with place.stored(model) as reader:
                rankings += _rerank(reader, candidates, ratios, steer, timings)
    return EvalReport(
        name=what.name,
        data=str(what.folder),
        split=what.split,
        pooled=what.pooled,
        task=steer.task,
        models=tuple(engines),
        queries=len(candidates.rows),
        passages=len(candidates.found.passages),
        top_k=candidates.top_k,
        rows=_rows(candidates, rankings),
        seconds=timings.seconds,
    )


def baselines(candidates: Candidates) -> list[RankedSet]:
    """Retrieval, BM25 (words counted over the whole corpus) and their fusion, over the same candidates."""
    matcher = Bm25(candidates.found.passages)
    bm25 = [matcher.scores(query)[rows] for query, rows in zip(candidates.queries, candidates.rows, strict=True)]
    fused = [fuse(dense[None], own[None])[0] for dense, own in zip(candidates.cosines, bm25, strict=True)]
    named = {"retrieval": candidates.cosines, "bm25": bm25, "fusion": fused}
    return [RankedSet(ranking=name, scores=scores) for name, scores in named.items()]


def _rerank(
    reader: StoredEngine, candidates: Candidates, ratios: Sequence[int], steer: Instructions, timings: Timings
) -> Iterator[RankedSet]:
    """What one model makes of the candidates at each ratio."""
    seconds = timings.seconds
    for ratio in ratios:
        with timings.stage("rerank"):
            scored = reader.score(candidates, steer, ratio=ratio)
        seconds["rerank"] -= scored.encoding  # what was met without states is a stage of its own
        seconds["encode"] = seconds.get("encode", 0.0) + scored.encoding
        yield RankedSet(
            ranking="reranked",
            scores=scored.margins,
            model=reader.engine.info.name,
            ratio=ratio,
            milliseconds=scored.milliseconds,
        )


def _rows(candidates: Candidates, rankings: Sequence[RankedSet]) -> tuple[EvalRow, ...]:
    measures = load_measures()
    wanted = [measures.nDCG @ 10, measures.RR @ 10, measures.R @ 10, measures.R @ candidates.top_k]
    relevant = is_relevant(candidates.found, candidates.rows)
    rows: list[EvalRow] = []
    for ranked in rankings:
        metrics = query_metrics(candidates.found, best_first(candidates.rows, ranked.scores), wanted)
        sure = calibration(torch.cat(list(ranked.scores)).sigmoid(), relevant) if ranked.model is not None else None
        ndcg, mrr, recall, recall_k = (mean(values) for values in metrics)
        row = EvalRow(
            ranking=ranked.ranking,
            model=ranked.model,
            ratio=ranked.ratio,
            ndcg_10=ndcg,
            mrr_10=mrr,
            recall_10=recall,
            recall_k=recall_k,
            calibration=sure,
            milliseconds=ranked.milliseconds,
            values=tuple(metrics[0]),
        )
        rows.append(_compared(row, rows))
    return tuple(rows)


def _compared(row: EvalRow, earlier: Sequence[EvalRow]) -> EvalRow:
    """The row with its changes against retrieval, fusion and the first model."""

    def over(ranking: str, ratio: int | None = None) -> Change | None:
        before = next((other for other in earlier if (other.ranking, other.ratio) == (ranking, ratio)), None)
        return compare(row.values, before.values) if before is not None else None

    first = over("reranked", row.ratio)
    return replace(row, over_retrieval=over("retrieval"), over_fusion=over("fusion"), over_first=first)
