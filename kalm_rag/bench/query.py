"""One query over stored states, the way the index and the adapters ask it; its rows by stage and by candidates."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from kalm_rag.bench.measuring import measure, measure_stages, random_text, stretch_states
from kalm_rag.bench.report import CANDIDATES, Row, row_of
from kalm_rag.engine.reranker import Reranker
from kalm_rag.index.candidates import Ranking, rank_texts
from kalm_rag.index.results import Timings
from kalm_rag.instructions import Instructions
from kalm_rag.states import PassageStates
from kalm_rag.store import StateStore, open_store


class Query:
    """Candidates to be ranked for one prompt: states fetched by content, decoded, ordered."""

    def __init__(
        self, engine: Reranker, store: StateStore, texts: Sequence[str], prompt: tuple[str, Instructions]
    ) -> None:
        self.engine, self.store, self.texts, self.prompt = engine, store, list(texts), prompt
        self.ranking: Ranking | None = None

    def __call__(self) -> Mapping[str, float]:
        """Ask it; gives the seconds of its stages."""
        timings = Timings()
        query, told = self.prompt
        self.ranking = rank_texts(
            self.engine, self.store, query, self.texts, missing="raise", timings=timings, instructions=told
        )
        return timings.seconds

    def probabilities(self) -> torch.Tensor:
        """P(yes) of the last asking, in input order."""
        out = torch.zeros(len(self.texts), dtype=torch.float64)
        for placed in self.ranking.candidates if self.ranking is not None else ():
            if placed.probability is not None:
                out[placed.index] = placed.probability
        return out


def query_rows(key: str, group: str, what: str, query: Query, repeats: int, size: int, *, baseline: str) -> list[Row]:
    """Rows of one way to ask: fetch, score, end to end; `size` is bytes stored per passage."""
    row = partial(row_of, group=group, passages=len(query.texts))
    stages = measure_stages(query, repeats, query.engine.backbone.device)
    parts = [row(f"{key}.{name}", f"{what}: {name}", name, stages[name]) for name in ("fetch", "score")]
    more = {"bytes_per_passage": size, "baseline": baseline}
    return [*parts, row(f"{key}.total", f"{what}: all", "end to end", stages["total"], **more)]


def candidate_rows(
    engine: Reranker,
    few: Sequence[PassageStates],
    prompt: tuple[str, Instructions],
    counts: Sequence[int],
    repeats: int,
) -> list[Row]:
    """Time fetching and scoring by number of candidates, whose states are a few ones over and over."""
    texts = [random_text(8, 10**8 + seed) for seed in range(max(counts))]
    family, rows = engine.info.family, []
    group = f"{family}, {engine.info.dtype}: fetch and score, passages of {few[0].tokens} tokens, r={few[0].ratio}"
    with tempfile.TemporaryDirectory() as home, open_store(home, engine.layout()) as store:
        store.put_many(stretch_states(few, texts))
        for count in counts:
            spread = measure(Query(engine, store, texts[:count], prompt), repeats, engine.backbone.device)
            key, what = f"{family}.candidates.{count}", f"{count} candidates"
            rows.append(row_of(key, what, CANDIDATES, spread, group=group, passages=count))
    return rows
