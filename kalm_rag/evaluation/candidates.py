"""What is ranked: each query's candidates, found and scored as an app's would be, through an engine and a state store.

Retrieval is exact cosine over the vectors of the retriever's own states. Knows no framework and no Chroma.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kalm_rag.checks import check_count
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.evaluation.beir import Collection, EvalSet, load_collection
from kalm_rag.index.candidates import load_states, rank_texts
from kalm_rag.index.embedders import BundledEmbedder
from kalm_rag.index.results import Timings
from kalm_rag.instructions import Instructions
from kalm_rag.states import StateBatch
from kalm_rag.states.pooling import check_ratio
from kalm_rag.store import StateStore, open_store

_WINDOW = 256  # passages that are indexed at a time


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """One set's candidates."""

    what: EvalSet
    found: Collection  # with the queries measured
    rows: list[Tensor]  # passage rows of each query's candidates, nearest first; ties keep corpus order
    cosines: list[Tensor]  # cosine of each, in that order

    @property
    def queries(self) -> list[str]:
        """Texts of the queries."""
        return list(self.found.queries.values())

    @property
    def texts(self) -> list[list[str]]:
        """Texts of each query's candidates."""
        return [[self.found.passages[row] for row in rows.tolist()] for rows in self.rows]

    @property
    def top_k(self) -> int:
        """Most candidates of a query."""
        return max(len(rows) for rows in self.rows)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a model gave."""

    margins: list[Tensor]  # of each query's candidates, in their order
    milliseconds: float  # median time of a query, from stored states to an order
    encoding: float  # seconds that went into encoding passages that had no states yet


class StoredEngine:
    """An engine at its store's ratio; passages that have no states there are encoded when they are met."""

    def __init__(self, engine: Reranker, store: StateStore) -> None:
        self.engine, self.store = engine.at(store.layout.ratio), store

    def index(self, passages: Sequence[str]) -> Iterator[tuple[Sequence[str], StateBatch]]:
        """Keep the states of passages; gives some texts and their states at a time."""
        for start in tqdm(range(0, len(passages), _WINDOW), desc="index", unit=f"{_WINDOW} passages"):
            texts = passages[start : start + _WINDOW]
            states = load_states(self.engine, self.store, texts, missing="encode", timings=Timings()).states
            if states is not None:
                yield texts, states

    def margins(
        self,
        query: str,
        texts: Sequence[str],
        instructions: Instructions,
        *,
        ratio: int | None = None,
        timings: Timings | None = None,
    ) -> Tensor:
        """Score one query's candidates, float32 ``(candidates,)``; `timings` get the stages fetch, encode and score."""
        store, timings = self.store, timings if timings is not None else Timings()
        ranking = rank_texts(
            self.engine, store, query, texts, missing="encode", timings=timings, instructions=instructions, ratio=ratio
        )
        margins = torch.full((len(texts),), -torch.inf)
        for candidate in ranking.candidates:
            if candidate.margin is not None:
                margins[candidate.index] = candidate.margin
        return margins

    def score(
        self,
        candidates: Candidates,
        instructions: Instructions | Sequence[Instructions],
        *,
        ratio: int | None = None,
        queries: Sequence[str] | None = None,
    ) -> Scored:
        """Score each query's candidates.

        Args:
            candidates: The queries and their candidates.
            instructions: For all queries, or one per query.
            ratio: A multiple of the store's ratio; None takes that.
            queries: What is asked instead of the queries' own texts.

        Raises:
            KalmRagError: If a margin is not finite.
        """
        asked = candidates.queries if queries is None else queries
        steers = [instructions] * len(asked) if isinstance(instructions, Instructions) else instructions
        margins, spent, encoding = [], [], 0.0
        bar = tqdm(asked, desc=f"rerank r={ratio or self.engine.ratio}", unit="query")
        for query, texts, steer in zip(bar, candidates.texts, steers, strict=True):
            timings = Timings()
            margins.append(self.margins(query, texts, steer, ratio=ratio, timings=timings))
            encoding += timings.seconds.pop("encode", 0.0)
            spent.append(1000 * sum(timings.seconds.values()))
        return Scored(margins=margins, milliseconds=float(np.median(spent)), encoding=encoding)


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where sets are measured: who retrieves, how much, and the folder that keeps the states of one ratio."""

    retriever: Reranker  # its vectors retrieve
    ratio: int
    folder: Path
    top_k: int  # most candidates retrieved; a pooled set has all its judged passages
    max_queries: int | None  # only the first so many queries of a set; None is all

    @classmethod
    @contextmanager
    def open(
        cls,
        engine: Reranker,
        *,
        retriever: Reranker | None,
        ratio: int,
        top_k: int,
        max_queries: int | None,
        cache: Path | None,
    ) -> Iterator[Workplace]:
        """Make a temporary folder where there is no `cache`; without a retriever, the engine is it.

        Raises:
            InputError: If a number is out of range.
        """
        check_count(top_k, "top_k")
        if max_queries is not None:
            check_count(max_queries, "max_queries")
        searcher = engine if retriever is None else retriever
        with tempfile.TemporaryDirectory() as scratch:
            folder = cache if cache is not None else Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            yield cls(retriever=searcher, ratio=ratio, folder=folder, top_k=top_k, max_queries=max_queries)

    @contextmanager
    def stored(self, engine: Reranker) -> Iterator[StoredEngine]:
        """Open the store of an engine's states; models that make the same share them."""
        layout = engine.at(self.ratio).layout()
        with open_store(self.folder / f"states_r{self.ratio}.sqlite3", layout) as store:
            yield StoredEngine(engine, store)

    def find(self, what: EvalSet, texts: Mapping[str, str] | None = None) -> Candidates:
        """Read a set, index its passages and find each query's candidates.

        `texts` are what some queries ask instead of their own text, by query id.

        Raises:
            InputError: If the retriever's model gives no vectors, the folder or split is missing, or a pooled query has
                no judged passage in the corpus.
        """
        if not hasattr(self.retriever.backbone, "embed_query"):
            raise InputError(
                f"model {self.retriever.info.name!r} gives no retrieval vectors. Pass "
                f"retriever=Reranker.from_pretrained('pico') to retrieve with pico and rerank with it."
            )
        whole = load_collection(Path(what.folder), what.split)
        found = whole.only(list(whole.queries)[: self.max_queries], texts)
        pools = _pools(found) if what.pooled else None
        indexed = range(len(found.passages)) if pools is None else sorted({row for pool in pools for row in pool})
        place = {row: spot for spot, row in enumerate(indexed)}
        embedder, every = BundledEmbedder(self.retriever), torch.tensor(indexed)
        with self.stored(self.retriever) as reader:
            passages = [found.passages[row] for row in indexed]
            parts = [embedder.from_states(states) for _, states in reader.index(passages)]
        vectors, rows, cosines = torch.from_numpy(np.concatenate(parts)), [], []
        for number, query in enumerate(tqdm(found.queries.values(), desc="retrieve", unit="query")):
            near = vectors @ torch.tensor(embedder.query(query))
            own = torch.arange(len(near)) if pools is None else torch.tensor([place[row] for row in pools[number]])
            nearest = near[own].sort(descending=True, stable=True)
            cut = None if what.pooled else self.top_k
            rows.append(every[own[nearest.indices[:cut]]])
            cosines.append(nearest.values[:cut])
        return Candidates(what=what, found=found, rows=rows, cosines=cosines)


def check_ratios(ratios: Sequence[int]) -> list[int]:
    """Give ratios in rising order if all can be had from states of the smallest.

    Raises:
        InputError: If there are none, one is not a whole number >= 1, or one is no multiple of the smallest.
    """
    checked = sorted({check_ratio(ratio) for ratio in ratios})
    if not checked or any(ratio % checked[0] for ratio in checked):
        raise InputError(f"ratios are {list(ratios)}; wanted at least one, each a multiple of the smallest.")
    return checked


def _pools(found: Collection) -> list[list[int]]:
    """Corpus rows that each query's judgements name, in corpus order."""
    row_of = {doc_id: row for row, doc_id in enumerate(found.doc_ids)}
    pools = [sorted(row_of[doc] for doc in found.qrels[query_id] if doc in row_of) for query_id in found.queries]
    for query_id, pool in zip(found.queries, pools, strict=True):
        if not pool:
            raise InputError(
                f"{found.name} {found.split}: no passage judged for query {query_id!r} is in corpus.jsonl; nothing to "
                f"pool."
            )
    return pools
