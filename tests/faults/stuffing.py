"""Passages that repeat the query instead of answering it: what pico gives them. Measured only; nothing fails."""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import mean, median

from faults.table import Bench

from kalm_rag import Reranker
from kalm_rag.evaluation.beir import load_collection

MOST = 60
"""Questions that are measured."""
Make = Callable[[str, str, str], str]

PASSAGES: dict[str, Make] = {
    "the passage that answers": lambda query, gold, other: gold,
    "a random passage": lambda query, gold, other: other,
    "the query": lambda query, gold, other: query,
    "the query 3 times": lambda query, gold, other: " ".join([query] * 3),
    "the query 10 times": lambda query, gold, other: " ".join([query] * 10),
    "the query, a random passage": lambda query, gold, other: f"{query} {other}",
    "the query 3 times, a random passage": lambda query, gold, other: f"{' '.join([query] * 3)} {other}",
}


def stuffing(bench: Bench) -> None:
    """P(yes) of each kind of passage, over real questions; and how often it goes before the one that answers."""
    if bench.data is None or not (bench.data / "queries.jsonl").is_file():
        bench.row.notes.append("skipped: wants real questions, --data BEIR_FOLDER")
        return
    rng = random.Random(0)
    collection = load_collection(bench.data, "test")
    texts = dict(zip(collection.doc_ids, collection.passages, strict=True))
    asked = rng.sample(list(collection.queries), min(MOST, len(collection.queries)))
    found: dict[str, list[float]] = {kind: [] for kind in PASSAGES}
    with Reranker.from_pretrained("pico", device="cpu") as engine:
        for name in asked:
            query = collection.queries[name]
            gold = texts[max(collection.qrels[name], key=lambda i: collection.qrels[name][i])]
            other = rng.choice(collection.passages)
            passages = [make(query, gold, other) for make in PASSAGES.values()]
            for kind, score in zip(PASSAGES, engine.score(query, engine.encode(passages)), strict=True):
                found[kind].append(score.probability)
            bench.row.trials += 1
    answers = found["the passage that answers"]
    for kind, values in found.items():
        above = mean(value > answer for value, answer in zip(values, answers, strict=True))
        high = mean(value > 0.5 for value in values)
        bench.row.notes.append(
            f"{kind}: P(yes) median {median(values):.4f}, mean {mean(values):.3f}, over 0.5 in {high:.0%}"
            + ("" if values is answers else f", before the answer in {above:.0%}")
        )
        bench.tell(bench.row.notes[-1])
    bench.row.notes[:] = [f"{collection.name}, {len(asked)} questions", *bench.row.notes]
