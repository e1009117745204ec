"""Do instructions steer? Generic ones must change nothing, specific ones must bring up what they ask for.

Three measurements: drift under generic instructions on any set; one query under many users' instructions, on sets with
``instructions.jsonl``; and a bundled contrast set, one query over two kinds of passages. What is here is for testing
only: nothing of it is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.evaluation.beir import EvalSet, read_instructions
from kalm_rag.evaluation.candidates import Candidates, StoredEngine, Workplace
from kalm_rag.evaluation.metrics import Change, best_first, compare, load_measures, mean, paired_interval, query_metrics
from kalm_rag.evaluation.report import Plain
from kalm_rag.instructions import Instructions
from kalm_rag.store import open_store

DATA = resources.files("kalm_rag.evaluation")

GENERIC = tuple(Instructions(**row) for row in json.loads((DATA / "generic.json").read_text(encoding="utf-8")))
"""Held-out texts that say nothing about what a passage must be about; none is among those trained on."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What generic instructions do to one set."""

    name: str
    queries: int
    ndcg_10: float  # without instructions
    mean: float  # mean change of nDCG@10 under the generic instructions, in absolute value
    worst: float  # the change that is largest in absolute value, with its sign
    worst_instruction: str
    # nDCG@10 under the task the folder brings along (instruction.txt) above that without; None where it brings none
    own_task: Change | None


@dataclass(frozen=True, kw_only=True)
class Following:
    """One query under many users' instructions, over the candidates of the query alone."""

    name: str
    # "query" (without the instruction), "instruction" (as task), or "joined" (instruction and query as one query)
    asked: str
    queries: int  # distinct ones
    instructions: int  # pairs of a query and an instruction
    ndcg_10: float
    mrr_10: float
    # mean over queries of the lowest nDCG@10 that any of its instructions has (InstructIR, arXiv 2402.14334)
    robustness_10: float
    over_query: Change | None  # nDCG@10 above that of the query alone; None for it


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """How often the asked-for kind of passage stands above the other, on the bundled contrast set."""

    where: str  # "none" (no instruction: 0.5 by construction), "task" or "system"
    accuracy: float  # share of the 80 pairs in the right order; a tie counts half
    low: float  # lower end of its 95% interval (bootstrap over queries)
    high: float
    both: float  # share of queries where both orders are right, which no fixed preference reaches
    kinds: dict[str, float]  # accuracy of each contrast


@dataclass(frozen=True, kw_only=True)
class InstructionReport(Plain):
    """What `evaluate_instructions` found."""

    model: str
    ratio: int
    contrast: tuple[Contrast, ...]  # without instruction, as task, as system; empty if it was left out
    drift: tuple[Drift, ...]  # one entry per set without instructions of its own for each query
    following: tuple[Following, ...]  # three entries per set with instructions.jsonl


def evaluate_instructions(
    sets: Sequence[EvalSet],
    engine: Reranker,
    *,
    retriever: Reranker | None = None,
    ratio: int = 4,
    top_k: int = 50,
    max_queries: int | None = None,
    cache: Path | None = None,
    contrast: bool = True,
) -> InstructionReport:
    """Measure what instructions do.

    Args:
        sets: BEIR sets; none measures on the bundled contrast set alone.
        engine: The model.
        retriever: The model whose vectors retrieve; None takes `engine`.
        ratio: Pooling ratio.
        top_k: Candidates reranked.
        max_queries: Only the first so many queries (of ``instructions.jsonl``: pairs) of a set; None is all.
        cache: Folder for passage states.
        contrast: Measure on the bundled contrast set, too.

    Raises:
        InputError: If a folder or split is missing, or an argument is out of range.
        MissingDependencyError: If ir-measures is not installed.
    """
    load_measures()
    contrasts = measure_contrast(engine, ratio=ratio) if contrast else ()
    drift: list[Drift] = []
    following: list[Following] = []
    with Workplace.open(
        engine, retriever=retriever, ratio=ratio, top_k=top_k, max_queries=max_queries, cache=cache
    ) as place:
        for what in sets:
            apart = read_instructions(what.folder)
            candidates = place.find(what, {query_id: query for query_id, (_, query) in apart.items()})
            with place.stored(engine) as reader:
                if apart:
                    following += _following(reader, candidates, apart)
                else:
                    drift.append(_drift(reader, candidates))
    return InstructionReport(
        model=engine.info.name, ratio=ratio, contrast=contrasts, drift=tuple(drift), following=tuple(following)
    )


def load_contrast() -> list[dict[str, Any]]:
    """The bundled contrast set: 40 rows with ``contrast``, ``query`` and ``asked``, two instructions and passages."""
    return [json.loads(line) for line in (DATA / "contrast.jsonl").read_text(encoding="utf-8").splitlines()]


def measure_contrast(engine: Reranker, *, ratio: int = 4) -> tuple[Contrast, ...]:
    """Measure on the bundled contrast set: without instructions, with them as task, and as system text."""
    rows = load_contrast()
    found = []
    with open_store(":memory:", engine.at(ratio).layout()) as store:
        reader = StoredEngine(engine, store)
        list(reader.index([asked["passage"] for row in rows for asked in row["asked"]]))
        for where in ("none", "task", "system"):
            right = [_in_order(reader, row, where) for row in tqdm(rows, desc=f"contrast, {where}", unit="query")]
            found.append(_contrast(where, right, [row["contrast"] for row in rows]))
    return tuple(found)


def _in_order(reader: StoredEngine, row: dict[str, Any], where: str) -> list[float]:
    """Whether the passage that each of a row's two instructions asks for is ahead: 1, 0, or half a point for a tie."""
    passages = [asked["passage"] for asked in row["asked"]]
    ahead = []
    for place, asked in enumerate(row["asked"]):
        steer = Instructions() if where == "none" else Instructions(**{where: asked["instruction"]})
        margins = reader.margins(row["query"], passages, steer)
        lead = float(margins[place] - margins[1 - place])
        ahead.append(0.5 if lead == 0 else float(lead > 0))
    return ahead


def _contrast(where: str, right: Sequence[Sequence[float]], kinds: Sequence[str]) -> Contrast:
    shares = [mean(query) for query in right]
    low, high = paired_interval(shares)
    by_kind = {kind: [share for share, own in zip(shares, kinds, strict=True) if own == kind] for kind in kinds}
    return Contrast(
        where=where,
        accuracy=mean(shares),
        low=low,
        high=high,
        both=mean([float(min(query) == 1.0) for query in right]),
        kinds={kind: mean(own) for kind, own in by_kind.items()},
    )


def _drift(reader: StoredEngine, candidates: Candidates) -> Drift:
    def ndcg(steer: Instructions) -> list[float]:
        return _metrics(reader, candidates, steer)[0]

    before = ndcg(Instructions())
    changes = [mean(ndcg(steer)) - mean(before) for steer in GENERIC]
    worst = max(range(len(changes)), key=lambda place: abs(changes[place]))
    task = candidates.what.own_task
    return Drift(
        name=candidates.what.name,
        queries=len(before),
        ndcg_10=mean(before),
        mean=mean([abs(change) for change in changes]),
        worst=changes[worst],
        worst_instruction=str(GENERIC[worst].system or GENERIC[worst].task),
        own_task=None if task is None else compare(ndcg(Instructions(task=task)), before),
    )


def _following(reader: StoredEngine, candidates: Candidates, apart: dict[str, tuple[str, str]]) -> list[Following]:
    name, query_ids, queries = candidates.what.name, list(candidates.found.queries), candidates.queries
    if missing := [query_id for query_id in query_ids if query_id not in apart]:
        raise InputError(f"{name}: query {missing[0]!r} is not in instructions.jsonl; wanted all there.")
    told, plain = [apart[query_id][0] for query_id in query_ids], Instructions()
    joined = [f"{text} {query}" for text, query in zip(told, queries, strict=True)]
    ways = {
        "query": _metrics(reader, candidates, plain),
        "instruction": _metrics(reader, candidates, [Instructions(task=text) for text in told]),
        "joined": _metrics(reader, candidates, plain, joined),
    }
    rows = []
    for asked, (ndcg, mrr) in ways.items():
        lowest: dict[str, float] = {}
        for query, value in zip(queries, ndcg, strict=True):
            lowest[query] = min(value, lowest.get(query, value))
        rows.append(
            Following(
                name=name,
                asked=asked,
                queries=len(lowest),
                instructions=len(told),
                ndcg_10=mean(ndcg),
                mrr_10=mean(mrr),
                robustness_10=mean(list(lowest.values())),
                over_query=compare(ndcg, ways["query"][0]) if asked != "query" else None,
            )
        )
    return rows


def _metrics(
    reader: StoredEngine,
    candidates: Candidates,
    steer: Instructions | Sequence[Instructions],
    queries: Sequence[str] | None = None,
) -> tuple[list[float], list[float]]:
    """nDCG@10 and reciprocal rank at 10 of each query."""
    measures = load_measures()
    orders = best_first(candidates.rows, reader.score(candidates, steer, queries=queries).margins)
    ndcg, mrr = query_metrics(candidates.found, orders, [measures.nDCG @ 10, measures.RR @ 10])
    return ndcg, mrr
