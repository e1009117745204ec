"""Evaluating one set: the rankings side by side, over the same candidates. What ``kalm-rag eval`` calls per set.

Knows backbones, no store and no framework; candidates and metrics are its neighbours'.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kalm_rag.errors import InputError
from kalm_rag.evaluation.fusion import Bm25, fuse
from kalm_rag.evaluation.gather import EvalSet, Gathered, Library, as_retriever, check_ratios, gather, library_of
from kalm_rag.evaluation.metrics import (
    best_first,
    calibration,
    compare,
    is_relevant,
    load_measures,
    mean,
    query_metrics,
)
from kalm_rag.evaluation.report import EvalReport, EvalRow
from kalm_rag.instructions import Instructions
from kalm_rag.models.backbone import Backbone, EmbeddingBackbone

logger = logging.getLogger(__name__)

OWN_TASK = "instruction.txt"
"""File in a BEIR folder with the task its queries are meant under (BIRCO's sets have one)."""


@dataclass(frozen=True)
class Ranking:
    """Scores of each query's candidates, and whose they are."""

    ranking: str
    scores: Sequence[Tensor]
    model: str | None = None
    ratio: int | None = None
    milliseconds: float = 0.0


def evaluate(
    data: Path | str,
    split: str,
    backbone: Backbone,
    *,
    others: Sequence[Backbone] = (),
    pooled: bool = False,
    retriever: EmbeddingBackbone | None = None,
    ratios: Sequence[int] = (1, 4, 16, 32),
    top_k: int = 50,
    max_queries: int | None = None,
    instructions: Instructions | None = None,
    cache: Path | None = None,
) -> EvalReport:
    """Measure retrieval, BM25, their fusion, and models that rerank at each ratio, on one collection.

    Args:
        data: BEIR folder: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/<split>.tsv``.
        split: Which judgements; queries without a relevant passage are left out.
        backbone: The model that reranks.
        others: Further models, compared with the first.
        pooled: Rank only the passages that a query's judgements name, all of them.
        retriever: The model whose vectors retrieve; None takes `backbone`, which must then embed (pico does).
        ratios: Pooling ratios, each a multiple of the smallest.
        top_k: Candidates reranked, >= 1.
        max_queries: Measure only the first so many queries; None is all.
        instructions: Instructions for every query; None is the default ones.
        cache: Folder for passage states, so that a second run with the same model and corpus encodes nothing; None
            keeps them in a temporary file.

    Returns:
        Metrics, gains with intervals and p values, calibration and times.

    Raises:
        InputError: If the folder or split is missing, an argument is out of range, two models have one name, or no
            retriever is at hand.
        MissingDependencyError: If ir-measures or bm25s is not installed.
    """
    ratios = check_ratios(ratios)
    models = _by_name([backbone, *others])
    searcher = as_retriever(backbone, retriever)
    load_measures()
    what = EvalSet(folder=Path(data), split=split, pooled=pooled)
    steer = instructions if instructions is not None else Instructions()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = cache if cache is not None else Path(scratch)
        clock = _Clock(seconds)
        gathered = gather(
            what,
            searcher,
            top_k=top_k,
            max_queries=max_queries,
            ratio=ratios[0],
            folder=folder,
            keep=any(one.info.fingerprint == searcher.info.fingerprint for one in models.values()),
        )
        clock.lap("retrieve")
        rankings = baselines(gathered)
        clock.lap("bm25")
        for name, model in models.items():
            library = library_of(model, gathered, searcher, ratios[0], folder)
            clock.lap("encode")
            for ratio in ratios:
                scores, spent = score_candidates(model, gathered, library, ratio, steer)
                rankings.append(Ranking("reranked", scores, name, ratio, spent))
            clock.lap("rerank")
    return EvalReport(
        name=what.name,
        data=str(data),
        split=split,
        pooled=pooled,
        task=steer.task,
        models=tuple(models),
        queries=len(gathered.queries),
        passages=len(gathered.found.passages),
        top_k=gathered.top_k,
        rows=_rows(gathered, rankings),
        seconds=seconds,
    )


def own_task(folder: Path) -> str | None:
    """The task that a BEIR folder brings along in ``instruction.txt``, or None."""
    path = Path(folder) / OWN_TASK
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def score_candidates(
    model: Backbone,
    gathered: Gathered,
    library: Library,
    ratio: int,
    instructions: Instructions | Sequence[Instructions],
    queries: Sequence[str] | None = None,
) -> tuple[list[Tensor], float]:
    """Score each query's candidates from their states.

    Args:
        model: The reranking model.
        gathered: The queries and their candidates.
        library: The candidates' states.
        ratio: Pooling ratio, a multiple of the library's.
        instructions: For all queries, or one a query.
        queries: What is asked instead of the queries' own texts; None asks those.

    Returns:
        Margins of each query's candidates, on the CPU, and the median milliseconds a query.

    Raises:
        InputError: If a margin is not finite.
    """
    steers = [instructions] * len(gathered.rows) if isinstance(instructions, Instructions) else instructions
    out, spent = [], []
    asked = zip(queries if queries is not None else gathered.queries, gathered.rows, steers, strict=True)
    for query, rows, steer in tqdm(asked, desc=f"rerank r={ratio}", unit="query", total=len(gathered.rows)):
        placed = library.batch(rows.tolist(), ratio, model.device)
        began = time.perf_counter()
        prompt = model.prompt(query, steer)
        margins = model.decode([prompt] * len(rows), *placed).float().cpu()
        spent.append(1000 * (time.perf_counter() - began))
        if not bool(margins.isfinite().all()):
            raise InputError(f"model {model.info.name!r} gave a margin that is not finite for query {query[:60]!r}.")
        out.append(margins)
    return out, float(np.median(spent))


def baselines(gathered: Gathered) -> list[Ranking]:
    """Retrieval, BM25 (words counted over the whole corpus) and their fusion, over the same candidates."""
    matcher = Bm25(gathered.found.passages)
    bm25 = [
        matcher.scores(query)[rows]
        for query, rows in zip(gathered.queries, tqdm(gathered.rows, desc="BM25", unit="query"), strict=True)
    ]
    fused = [fuse(dense[None], own[None])[0] for dense, own in zip(gathered.cosines, bm25, strict=True)]
    return [Ranking("retrieval", gathered.cosines), Ranking("bm25", bm25), Ranking("fusion", fused)]


class _Clock:
    """Adds the time since the last lap to a stage."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.began = seconds, time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.began
        self.began = now


def _by_name(models: Sequence[Backbone]) -> dict[str, Backbone]:
    named = {one.info.name: one for one in models}
    if len(named) < len(models):
        raise InputError(f"models are {', '.join(one.info.name for one in models)}; wanted each name once.")
    return named


def _rows(gathered: Gathered, rankings: Sequence[Ranking]) -> tuple[EvalRow, ...]:
    measures = load_measures()
    wanted = [measures.nDCG @ 10, measures.RR @ 10, measures.R @ 10, measures.R @ gathered.top_k]
    relevant = is_relevant(gathered.found, gathered.rows)
    rows: list[EvalRow] = []
    for one in rankings:
        metrics = query_metrics(gathered.found, best_first(gathered.rows, one.scores), wanted)
        sure = calibration(torch.cat(list(one.scores)).sigmoid(), relevant) if one.model is not None else None
        ndcg, mrr, recall, recall_k = (mean(values) for values in metrics)
        row = EvalRow(
            ranking=one.ranking,
            model=one.model,
            ratio=one.ratio,
            ndcg_10=ndcg,
            mrr_10=mrr,
            recall_10=recall,
            recall_k=recall_k,
            calibration=sure,
            milliseconds=one.milliseconds,
            values=tuple(metrics[0]),
        )
        rows.append(_compared(row, rows))
    return tuple(rows)


def _compared(row: EvalRow, earlier: Sequence[EvalRow]) -> EvalRow:
    """The row with its changes against retrieval, fusion and the first model."""
    by_ranking = {one.ranking: one for one in earlier}
    retrieval, fusion = by_ranking.get("retrieval"), by_ranking.get("fusion")
    first = next((one for one in earlier if one.ranking == "reranked" and one.ratio == row.ratio), None)
    return replace(
        row,
        over_retrieval=compare(row.values, retrieval.values) if retrieval else None,
        over_fusion=compare(row.values, fusion.values) if fusion else None,
        over_first=compare(row.values, first.values) if first else None,
    )
