"""Measuring retrieval and reranking on a collection in BEIR format: what ``kalm-rag eval`` calls.

Retrieval is exact cosine over passage vectors; reranking scores the retriever's top k at each ratio. Every passage is
encoded at most once. Metrics come from ir-measures (extra ``eval``). Knows backbones, no store and no framework.
Letters: B passages, N pooled states, H width.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kalm_rag.beir import Collection, load_collection
from kalm_rag.errors import InputError, MissingDependencyError
from kalm_rag.instructions import Instructions
from kalm_rag.models.backbone import Backbone, EmbeddingBackbone
from kalm_rag.pooling import check_ratio, group_counts, mean_groups

logger = logging.getLogger(__name__)

RESAMPLES = 2000
"""Bootstrap draws behind an interval."""


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One ranking's metrics, meaned over queries. All are better when higher.

    Attributes:
        ranking: ``"retrieval"`` or ``"reranked"``.
        ratio: Pooling ratio of the reranked states; None for retrieval.
        ndcg_10: nDCG@10.
        mrr_10: Reciprocal rank at 10.
        recall_10: Recall at 10.
        recall_k: Recall at top_k, which reranking can't change.
        gain: nDCG@10 above retrieval's; 0 for retrieval.
        low: Lower end of the gain's 95% interval (paired bootstrap over queries).
        high: Upper end.
        milliseconds: Median time a query's candidates take to be scored from stored states; 0 for retrieval.
    """

    ranking: str
    ratio: int | None
    ndcg_10: float
    mrr_10: float
    recall_10: float
    recall_k: float
    gain: float = 0.0
    low: float = 0.0
    high: float = 0.0
    milliseconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """What `evaluate` found.

    Attributes:
        data: The collection's folder.
        split: Its split.
        model: Name of the reranking model.
        queries: Queries measured.
        passages: Passages searched.
        top_k: Candidates reranked.
        rows: Retrieval first, then one row a ratio.
        seconds: Wall-clock of each stage: encode, retrieve, rerank.
    """

    data: str
    split: str
    model: str
    queries: int
    passages: int
    top_k: int
    rows: tuple[EvalRow, ...]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able."""
        return asdict(self)


def evaluate(
    data: Path,
    split: str,
    backbone: Backbone,
    *,
    retriever: EmbeddingBackbone | None = None,
    ratios: Sequence[int] = (1, 4, 16, 32),
    top_k: int = 50,
    max_queries: int | None = None,
    instructions: Instructions | None = None,
    cache: Path | None = None,
) -> EvalReport:
    """Measure retrieval alone, and reranked at each ratio, on one collection.

    Args:
        data: BEIR folder: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/<split>.tsv``.
        split: Which judgements; queries without a relevant passage are left out.
        backbone: The model that reranks.
        retriever: The model whose vectors retrieve; None takes `backbone`, which must then embed (pico does).
        ratios: Pooling ratios, each a multiple of the smallest.
        top_k: Candidates reranked, >= 1.
        max_queries: Measure only the first so many queries; None is all.
        instructions: Instructions for every query; None is the default ones.
        cache: Folder for passage states, so that a second run with the same model and corpus encodes nothing; None
            keeps them in a temporary file.

    Returns:
        Metrics, gains with intervals and times.

    Raises:
        InputError: If the folder or split is missing, an argument is out of range, or no retriever is at hand.
        MissingDependencyError: If ir-measures is not installed.
    """
    ratios = _check_ratios(ratios)
    for name, value in (("top_k", top_k), ("max_queries", max_queries)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; wanted a whole number >= 1.")
    searcher = _retriever(backbone, retriever)
    measures = _measures()
    found = _first_queries(load_collection(Path(data), split), max_queries)
    top_k = min(top_k, len(found.passages))
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        library = _read_passages(searcher, found.passages, ratios[0], cache or Path(scratch), searcher is backbone)
        encoded = time.perf_counter()
        candidates = _retrieve(searcher, list(found.queries.values()), library.vectors, top_k)
        retrieved = time.perf_counter()
        if searcher is not backbone:
            wanted = sorted({row for rows in candidates for row in rows.tolist()})
            texts = [found.passages[row] for row in wanted]
            library = _read_passages(backbone, texts, ratios[0], cache or Path(scratch), True)
            library.place = {row: spot for spot, row in enumerate(wanted)}
        reread = time.perf_counter()
        runs: dict[int | None, Sequence[Tensor]] = {None: candidates}
        times: dict[int | None, float] = {None: 0.0}
        steer = instructions if instructions is not None else Instructions()
        for ratio in ratios:
            runs[ratio], times[ratio] = _rerank(backbone, found, library, candidates, ratio, steer)
        ended = time.perf_counter()
    seconds = {
        "encode": encoded - began + reread - retrieved,
        "retrieve": retrieved - encoded,
        "rerank": ended - reread,
    }
    return EvalReport(
        data=str(data),
        split=split,
        model=backbone.info.name,
        queries=len(found.queries),
        passages=len(found.passages),
        top_k=top_k,
        rows=_rows(found, runs, times, measures, top_k),
        seconds=seconds,
    )


def paired_interval(differences: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95% interval of a mean, by bootstrap over queries.

    Args:
        differences: One number a query: metric after minus metric before.
        seed: Fixes the draws.

    Returns:
        Lower and upper end.

    Example:
        >>> paired_interval([0.5, 0.5, 0.5])
        (0.5, 0.5)
    """
    values = np.asarray(differences, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


@dataclass(kw_only=True)
class _Library:
    """Passages read once: vectors, and pooled states in one flat file."""

    vectors: Tensor
    states: Tensor
    tokens: Tensor
    ratio: int
    place: dict[int, int] | None = None

    def __post_init__(self) -> None:
        sizes = (self.tokens + self.ratio - 1) // self.ratio
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])

    def batch(self, rows: Sequence[int], ratio: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Give passages' states pooled to `ratio`: ``(B, N, H)`` float32 and counts ``(B, N)``."""
        spots = torch.tensor(rows if self.place is None else [self.place[row] for row in rows])
        starts, ends = self.starts[spots], self.starts[spots + 1]
        steps = torch.arange(int((ends - starts).max()))
        inside = steps[None] < (ends - starts)[:, None]
        states = self.states[torch.where(inside, starts[:, None] + steps, 0)]  # (B, N, H)
        counts = group_counts(self.tokens[spots], self.ratio, len(steps))
        return mean_groups(states.to(device), counts.to(device), ratio // self.ratio)


def _check_ratios(ratios: Sequence[int]) -> list[int]:
    checked = sorted({check_ratio(ratio) for ratio in ratios})
    if not checked or any(ratio % checked[0] for ratio in checked):
        raise InputError(f"ratios are {list(ratios)}; wanted at least one, each a multiple of the smallest.")
    return checked


def _retriever(backbone: Backbone, retriever: EmbeddingBackbone | None) -> EmbeddingBackbone:
    if retriever is not None:
        return retriever
    if not hasattr(backbone, "embed_query"):
        raise InputError(
            f"model {backbone.info.name!r} gives no retrieval vectors. Pass retriever=PicoBackbone.load() to retrieve "
            f"with pico and rerank with it."
        )
    return cast("EmbeddingBackbone", backbone)


def _measures() -> ModuleType:
    try:
        return importlib.import_module("ir_measures")
    except ImportError as err:
        raise MissingDependencyError(
            "evaluating needs the module ir_measures, which is not installed. Install the extra 'eval': "
            "pip install 'kalm-rag[eval]' (or pip install ir-measures)."
        ) from err


def _first_queries(found: Collection, limit: int | None) -> Collection:
    kept = dict(list(found.queries.items())[:limit])
    return Collection(
        name=found.name,
        split=found.split,
        doc_ids=found.doc_ids,
        passages=found.passages,
        queries=kept,
        qrels={query_id: found.qrels[query_id] for query_id in kept},
    )


def _read_passages(model: Backbone, texts: Sequence[str], ratio: int, folder: Path, keep: bool) -> _Library:
    """Encode passages, or take them from the folder if the same model left the same passages there."""
    key = hashlib.sha256(f"{model.info.fingerprint} {ratio} {keep}".encode())
    for text in texts:
        key.update(hashlib.sha256(text.encode(errors="surrogatepass")).digest())
    stem = folder / key.hexdigest()[:24]
    if not stem.with_suffix(".json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write_passages(model, texts, ratio, stem, keep)
    meta = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    vectors = torch.from_numpy(np.load(stem.with_suffix(".npy")))
    width = model.info.hidden_size
    elements = meta["rows"] * width
    path = str(stem.with_suffix(".states"))
    states = torch.from_file(path, size=elements, dtype=model.state_dtype) if elements else torch.empty(0)
    return _Library(vectors=vectors, states=states.view(-1, width), tokens=torch.tensor(meta["tokens"]), ratio=ratio)


def _write_passages(model: Backbone, texts: Sequence[str], ratio: int, stem: Path, keep: bool) -> None:
    """Encode passages of like length together; write vectors, and pooled states in input order of the batches."""
    tokenized = model.tokenize(texts)
    sizes = [-(-len(one.ids) // ratio) for one in tokenized]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    width, item = model.info.hidden_size, model.state_dtype.itemsize
    vectors = np.zeros((len(texts), getattr(model, "embedding_size", 0)), dtype=np.float32)
    order = sorted(range(len(texts)), key=lambda row: len(tokenized[row].ids))
    with stem.with_suffix(".states").open("wb") as file, tqdm(total=len(texts), desc="encode", unit="passage") as bar:
        for at in range(0, len(order), 32):
            rows = order[at : at + 32]
            states, mask = model.encode([tokenized[row].ids for row in rows])
            if vectors.shape[1]:
                vectors[rows] = cast("EmbeddingBackbone", model).embed_states(states, mask.float()).cpu().numpy()
            if keep:
                pooled = mean_groups(states, mask.float(), ratio)[0].to(model.state_dtype).cpu()
                for row, one in zip(rows, pooled, strict=True):
                    file.seek(int(starts[row]) * width * item)
                    file.write(one[: sizes[row]].contiguous().view(torch.uint8).numpy().tobytes())
            bar.update(len(rows))
    np.save(stem.with_suffix(".npy"), vectors)
    meta = {"rows": int(starts[-1]) if keep else 0, "tokens": [len(one.ids) for one in tokenized]}
    stem.with_suffix(".json").write_text(json.dumps(meta), encoding="utf-8")  # last: marks the rest as whole


def _retrieve(model: EmbeddingBackbone, queries: Sequence[str], vectors: Tensor, top_k: int) -> list[Tensor]:
    """Rows of each query's nearest passages, nearest first; ties keep corpus order."""
    out = []
    for query in tqdm(queries, desc="retrieve", unit="query"):
        cosines = vectors @ model.embed_query(query)
        out.append(cosines.sort(descending=True, stable=True).indices[:top_k])
    return out


def _rerank(
    model: Backbone,
    found: Collection,
    library: _Library,
    candidates: Sequence[Tensor],
    ratio: int,
    instructions: Instructions,
) -> tuple[list[Tensor], float]:
    """Order each query's candidates by margin (ties keep retrieval order); give the median milliseconds too."""
    out, spent = [], []
    pairs = zip(found.queries.values(), candidates, strict=True)
    for query, rows in tqdm(pairs, desc=f"rerank r={ratio}", unit="query", total=len(candidates)):
        states, counts = library.batch(rows.tolist(), ratio, model.device)
        began = time.perf_counter()
        prompt = model.prompt(query, instructions)
        margins = model.decode([prompt] * len(rows), states, counts).cpu()
        spent.append(1000 * (time.perf_counter() - began))
        if not bool(margins.isfinite().all()):
            raise InputError(f"model {model.info.name!r} gave a margin that is not finite for query {query[:60]!r}.")
        out.append(rows[margins.sort(descending=True, stable=True).indices])
    return out, float(np.median(spent))


def _rows(
    found: Collection,
    runs: dict[int | None, Sequence[Tensor]],
    times: dict[int | None, float],
    measures: ModuleType,
    top_k: int,
) -> tuple[EvalRow, ...]:
    wanted = [measures.nDCG @ 10, measures.RR @ 10, measures.R @ 10, measures.R @ top_k]
    rows: list[EvalRow] = []
    before: dict[str, float] = {}
    for ratio, run in runs.items():
        scores = _per_query(found, run, measures, wanted)
        mean = [math.fsum(values.values()) / len(found.queries) for values in (scores[str(m)] for m in wanted)]
        ndcg = scores[str(wanted[0])]
        before = before or ndcg
        change = [ndcg[query_id] - before[query_id] for query_id in found.queries]
        low, high = paired_interval(change)
        rows.append(
            EvalRow(
                ranking="retrieval" if ratio is None else "reranked",
                ratio=ratio,
                ndcg_10=mean[0],
                mrr_10=mean[1],
                recall_10=mean[2],
                recall_k=mean[3],
                gain=math.fsum(change) / len(change),
                low=low,
                high=high,
                milliseconds=times[ratio],
            )
        )
    return tuple(rows)


def _per_query(
    found: Collection, run: Sequence[Tensor], measures: ModuleType, wanted: Sequence[Any]
) -> dict[str, dict[str, float]]:
    """Value of each metric for each query. A rank is scored as minus itself, so that no tie is broken anew."""
    ranked = {
        query_id: {found.doc_ids[row]: -float(rank) for rank, row in enumerate(rows.tolist())}
        for query_id, rows in zip(found.queries, run, strict=True)
    }
    scores: dict[str, dict[str, float]] = {str(measure): dict.fromkeys(found.queries, 0.0) for measure in wanted}
    for metric in measures.iter_calc(list(wanted), found.qrels, ranked):
        scores[str(metric.measure)][metric.query_id] = metric.value
    return scores
