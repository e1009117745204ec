"""A whole `ChromaIndex.query` by stage over a large index, and many clients at once against one by one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from kalm_rag.bench.measuring import Spread, Tell, measure_stages, random_text, stretch_states
from kalm_rag.bench.pico import WORDS
from kalm_rag.bench.report import Row, row_of
from kalm_rag.index import ChromaIndex
from kalm_rag.states import PassageStates
from kalm_rag.store import Reference

FETCH_K = 50
_PAGE = 500
_SEEDS = 32
"""Passages that are really encoded; the others get their states, and vectors near theirs."""


class Filled:
    """An index of made-up passages that can be asked and can grow.

    Vectors are those of a few encoded passages with noise on them (unit length, cosine about 0.86), so that a vector
    search has something near to find; texts and keys are all different.

    Args:
        folder: Where the database goes.
        device: As `ChromaIndex.open`.
        words: Words per passage.
    """

    def __init__(self, folder: Path, device: torch.device, *, words: int = WORDS) -> None:
        self.index = ChromaIndex.open(folder, model="pico", device=device)
        self.words = words
        few = [random_text(words, -1 - seed) for seed in range(_SEEDS)]
        self._states: list[PassageStates] = self.index.engine.encode(few, show_progress=False)
        self._vectors = self.index.embedder.passages(few)  # (seeds, width)
        self._draw = np.random.default_rng(0)

    def grow(self, passages: int, tell: Tell) -> None:
        """Add passages until there are so many; `tell` gets a line now and then."""
        for start in range(len(self.index), passages, _PAGE):
            tell(f"filling an index: {start:,} of {passages:,} passages")
            self._add(start, min(start + _PAGE, passages))

    def _add(self, start: int, end: int) -> None:
        texts = [random_text(self.words, seed) for seed in range(start, end)]
        ids = [f"p{row}" for row in range(start, end)]
        kept = stretch_states(self._states, texts)
        name = str(self.index.collection.id)
        references = [Reference(collection_id=name, record_id=i, key=s.key) for i, s in zip(ids, kept, strict=True)]
        self.index.store.put_many(kept, references)
        near = self._vectors[np.arange(start, end) % len(self._vectors)]
        near = near + self._draw.normal(0.0, 0.03, near.shape)
        near /= np.linalg.norm(near, axis=1, keepdims=True)
        self.index.collection.add(ids=ids, documents=texts, embeddings=near.astype(np.float32))

    def queries(self, count: int) -> list[str]:
        """Questions, all different."""
        return [random_text(8, 10**7 + seed) for seed in range(count)]

    def ask(self, queries: Sequence[str]) -> dict[str, Spread]:
        """Stages of asking each query once, after one to warm up."""
        left = iter([queries[0], *queries])
        return measure_stages(
            lambda: self.index.query(next(left), fetch_k=FETCH_K).seconds,
            len(queries),
            self.index.engine.backbone.device,
        )

    def close(self) -> None:
        """Close the index."""
        self.index.close()


def bench_serving(
    folder: Path, device: torch.device, *, passages: int, tell: Tell, queries: int = 40, clients: int = 8
) -> list[Row]:
    """Fill an index, ask it one query after another, then from many clients at once.

    Args:
        folder: Where the database goes.
        device: Where the model runs.
        passages: Passages in the index.
        tell: Gets a line about what is done now.
        queries: Asked one by one; as many from the clients.
        clients: Threads that ask at the same time.
    """
    filled = Filled(folder, device)
    try:
        filled.grow(passages, tell)
        tell(f"queries over {passages:,} passages")
        asked = filled.queries(queries)
        stages = filled.ask(asked)
        one = _serve(filled.index, asked, 1)
        many = _serve(filled.index, asked, clients)
    finally:
        filled.close()
    group = f"ChromaIndex.query over {passages:,} passages, pico, fetch_k={FETCH_K}"
    names = [*(name for name in stages if name != "total"), "total"]
    rows = [
        row_of(
            f"query.{name}",
            group,
            "end to end" if name == "total" else name,
            "end to end" if name == "total" else name,
            stages[name],
            passages=min(FETCH_K, passages),
        )
        for name in names
    ]
    group = f"the same, {len(asked)} queries"
    return [
        *rows,
        _served("serve.one", group, "one after another", one),
        _served("serve.many", group, f"from {clients} clients at once", many, baseline="serve.one"),
    ]


def _serve(index: ChromaIndex, queries: Sequence[str], clients: int) -> tuple[Spread, Spread]:
    """Seconds of answering all queries, and of each."""

    def ask(query: str) -> float:
        started = time.perf_counter()
        index.query(query, fetch_k=FETCH_K)
        return time.perf_counter() - started

    with ThreadPoolExecutor(clients) as pool:
        started, worked = time.perf_counter(), time.process_time()
        each = tuple(pool.map(ask, queries))
        whole = Spread(seconds=(time.perf_counter() - started,), cpu=(time.process_time() - worked,))
        return whole, Spread(seconds=each)


def _served(key: str, group: str, what: str, served: tuple[Spread, Spread], baseline: str | None = None) -> Row:
    whole, each = served
    waits = [1000 * each.quantile(share) for share in (0.5, 0.95)]
    return Row(
        key=key,
        group=group,
        what=what,
        stage="serve",
        passages=len(each.seconds),
        runs=1,
        p50=whole.p50,
        cpu=whole.cpu50,
        baseline=baseline,
        note=f"a query takes {waits[0]:.0f} ms, {waits[1]:.0f} ms at p95",
    )
