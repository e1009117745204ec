"""One query over stored states, the way the index and the adapters ask it; its rows by stage and by candidates."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence

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

    def after(self, prompt: tuple[str, Instructions]) -> None:
        """Ask another one first."""
        Query(self.engine, self.store, self.texts, prompt)()

    def probabilities(self) -> torch.Tensor:
        """P(yes) of the last asking, in input order."""
        out = torch.zeros(len(self.texts), dtype=torch.float64)
        for placed in self.ranking.candidates if self.ranking is not None else ():
            if placed.probability is not None:
                out[placed.index] = placed.probability
        return out


def query_rows(key: str, group: str, what: str, query: Query, repeats: int, size: int, *, baseline: str) -> list[Row]:
    """Rows of one way to ask: fetch, score, end to end.

    Args:
        key: Stable name, e.g. ``"nano.fp32"``.
        group: Title of the table.
        what: The way, for people.
        query: What is asked.
        repeats: Timed queries.
        size: Bytes stored per passage.
        baseline: Key that the whole is compared with.
    """
    device, count = query.engine.backbone.device, len(query.texts)
    stages = measure_stages(query, repeats, device)
    return [
        row_of(f"{key}.fetch", group, f"{what}: fetch", "fetch", stages["fetch"], passages=count),
        row_of(f"{key}.score", group, f"{what}: score", "score", stages["score"], passages=count),
        row_of(
            f"{key}.total",
            group,
            f"{what}: all",
            "end to end",
            stages["total"],
            passages=count,
            bytes_per_passage=size,
            baseline=baseline,
        ),
    ]


def candidate_rows(
    engine: Reranker,
    few: Sequence[PassageStates],
    prompt: tuple[str, Instructions],
    counts: Sequence[int],
    repeats: int,
) -> list[Row]:
    """Time fetching and scoring by number of candidates.

    Args:
        engine: The model.
        few: States that stand for all candidates.
        prompt: Query and instructions.
        counts: Numbers of candidates.
        repeats: Timed queries of each.
    """
    texts = [random_text(8, 10**8 + seed) for seed in range(max(counts))]
    family = engine.info.family
    group = f"{family}, {engine.info.dtype}: fetch and score, passages of {few[0].tokens} tokens, r={few[0].ratio}"
    with tempfile.TemporaryDirectory() as home, open_store(home, engine.layout()) as store:
        store.put_many(stretch_states(few, texts))
        rows = []
        for count in counts:
            spread = measure(Query(engine, store, texts[:count], prompt), repeats, engine.backbone.device)
            key, what = f"{family}.candidates.{count}", f"{count} candidates"
            rows.append(row_of(key, group, what, CANDIDATES, spread, passages=count))
    return rows
