"""A whole `ChromaIndex.query` by stage over a large index, and many clients at once against one by one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kalm_rag.bench.measuring import Spread, Tell, measure_stages, random_text, stretch_states
from kalm_rag.bench.pico import WORDS
from kalm_rag.bench.report import Row, row_of
from kalm_rag.index import ChromaIndex
from kalm_rag.store import Reference

FETCH_K = 50
_PAGE = 500
_SEEDS = 32
"""Passages that are really encoded; the others get their states, and vectors near theirs."""


class Filled:
    """An index of made-up passages of so many words, that can be asked and can grow.

    Vectors are those of a few encoded passages with noise on them (unit length, cosine about 0.86), so that a vector
    search has something near to find; texts and keys are all different.
    """

    def __init__(self, folder: Path, device: torch.device, *, words: int = WORDS) -> None:
        self.index, self.words = ChromaIndex.open(folder, model="pico", device=device), words
        few = [random_text(words, -1 - seed) for seed in range(_SEEDS)]
        self._states = self.index.engine.encode(few, show_progress=False)
        self._vectors = self.index.embedder.passages(few)  # (seeds, width)
        self._draw = np.random.default_rng(0)

    def grow(self, passages: int, tell: Tell) -> None:
        """Add passages until there are so many; `tell` gets a line now and then."""
        for start in range(len(self.index), passages, _PAGE):
            tell(f"filling an index: {start:,} of {passages:,} passages")
            self._add(range(start, min(start + _PAGE, passages)))

    def _add(self, rows: range) -> None:
        texts, ids = [random_text(self.words, seed) for seed in rows], [f"p{row}" for row in rows]
        kept, name = stretch_states(self._states, texts), str(self.index.collection.id)
        references = [Reference(collection_id=name, record_id=i, key=s.key) for i, s in zip(ids, kept, strict=True)]
        self.index.store.put_many(kept, references)
        near = self._vectors[np.asarray(rows) % len(self._vectors)]
        near = near + self._draw.normal(0.0, 0.03, near.shape)
        near /= np.linalg.norm(near, axis=1, keepdims=True)
        self.index.collection.add(ids=ids, documents=texts, embeddings=near.astype(np.float32))

    def queries(self, count: int) -> list[str]:
        """Questions, all different."""
        return [random_text(8, 10**7 + seed) for seed in range(count)]

    def close(self) -> None:
        """Close the index."""
        self.index.close()


def bench_serving(
    folder: Path, device: torch.device, *, passages: int, tell: Tell, queries: int = 40, clients: int = 8
) -> list[Row]:
    """Fill an index, ask it so many queries one after another, then as many from so many clients at once."""
    filled = Filled(folder, device)
    try:
        filled.grow(passages, tell)
        tell(f"queries over {passages:,} passages")
        asked, index = filled.queries(queries), filled.index
        left = iter([asked[0], *asked])  # the first one warms up
        stages = measure_stages(lambda: index.query(next(left), fetch_k=FETCH_K).seconds, queries, device)
        one, many = _serve(index, asked, 1), _serve(index, asked, clients)
    finally:
        filled.close()
    group = f"ChromaIndex.query over {passages:,} passages, pico, fetch_k={FETCH_K}"
    names = {name: name for name in stages if name != "total"} | {"total": "end to end"}
    rows = [
        row_of(f"query.{name}", shown, shown, stages[name], group=group, passages=min(FETCH_K, passages))
        for name, shown in names.items()
    ]
    group = f"the same, {queries} queries"
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
    note = f"a query takes {waits[0]:.0f} ms, {waits[1]:.0f} ms at p95"
    row = row_of(key, what, "serve", whole, group=group, passages=len(each.seconds), baseline=baseline, note=note)
    return replace(row, p95=None)  # of a single run
