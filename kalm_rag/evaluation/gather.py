"""What is ranked: a collection, each query's candidates in the retriever's order, and passages read once.

Retrieval is exact cosine over passage vectors. Knows backbones, no store and no framework.
Letters: B passages, N pooled states, H width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kalm_rag.errors import InputError
from kalm_rag.evaluation.beir import Collection, load_collection
from kalm_rag.models.backbone import Backbone, EmbeddingBackbone
from kalm_rag.states.pooling import check_ratio, group_counts, group_ids, mean_groups

POOLED = "pooled"

RankedCandidate: TypeAlias = "tuple[Tensor, Tensor, Tensor | None]"
"""States, counts and words of some passages, as `Backbone.decode` takes them."""


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """One set to measure on.

    Attributes:
        folder: BEIR folder: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/<split>.tsv``.
        split: Which judgements; queries without a relevant passage are left out.
        pooled: Rank only the passages that a query's judgements name, instead of what is retrieved.
    """

    folder: Path
    split: str = "test"
    pooled: bool = False

    @classmethod
    def parse(cls, text: str, *, split: str = "test", pooled: bool = False) -> EvalSet:
        """Read ``FOLDER``, ``FOLDER:SPLIT`` or ``FOLDER:SPLIT:pooled``.

        Args:
            text: What to read.
            split: Split where the text names none.
            pooled: Whether sets are pooled that don't say so.

        Raises:
            InputError: If there is more behind the folder than that.

        Example:
            >>> EvalSet.parse("data/selqa:test:pooled").pooled
            True
        """
        folder, *rest = [text] if Path(text).is_dir() else text.split(":")
        if not folder or len(rest) > 2 or rest[1:] not in ([], [POOLED]):
            raise InputError(f"data is {text!r}; wanted FOLDER, FOLDER:SPLIT or FOLDER:SPLIT:{POOLED}.")
        return cls(folder=Path(folder), split=rest[0] if rest and rest[0] else split, pooled=pooled or len(rest) > 1)

    @property
    def name(self) -> str:
        """Folder name and split, for tables."""
        return f"{self.folder.resolve().name} {self.split}" + (f" ({POOLED})" if self.pooled else "")


@dataclass(kw_only=True)
class Gathered:
    """One set's candidates.

    Attributes:
        what: Which set.
        found: The collection, with the queries measured.
        rows: Passage rows of each query's candidates, nearest first; ties keep corpus order.
        cosines: Cosine of each, in that order.
        library: Passages as the retriever read them: all, or only the judged ones of a pooled set.
    """

    what: EvalSet
    found: Collection
    rows: list[Tensor]
    cosines: list[Tensor]
    library: Library

    @property
    def queries(self) -> list[str]:
        """Texts of the queries."""
        return list(self.found.queries.values())

    @property
    def top_k(self) -> int:
        """Most candidates of a query."""
        return max(len(one) for one in self.rows)


@dataclass(kw_only=True)
class Library:
    """Passages read once: vectors, and pooled states in one flat file.

    Attributes:
        vectors: Retrieval vectors, ``(passages read, width)``.
        states: Pooled states of all passages, ``(all states, H)``; empty where only vectors were wanted.
        tokens: Tokens of each passage.
        ratio: Tokens a state stands for.
        place: Where each corpus row is, if not all were read.
        words: Ids of all passages' tokens, where the model keeps them.
    """

    vectors: Tensor
    states: Tensor
    tokens: Tensor
    ratio: int
    place: dict[int, int] | None = None
    words: Tensor | None = None

    def __post_init__(self) -> None:
        self.firsts = torch.cat([torch.zeros(1, dtype=torch.long), self.tokens.cumsum(0)])
        sizes = (self.tokens + self.ratio - 1) // self.ratio
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])

    def spots(self, rows: Sequence[int]) -> Tensor:
        """Where corpus rows are among the passages read."""
        return torch.tensor(rows if self.place is None else [self.place[row] for row in rows], dtype=torch.long)

    def batch(self, rows: Sequence[int], ratio: int, device: torch.device) -> RankedCandidate:
        """Give passages' states pooled to `ratio` as `Backbone.decode` takes them: states, counts and words."""
        spots = self.spots(rows)
        flat, _ = _padded(self.starts, spots)
        states = self.states[flat]  # (B, N, H)
        counts = group_counts(self.tokens[spots], self.ratio, flat.shape[1])
        pooled, counts = mean_groups(states.to(device), counts.to(device), ratio // self.ratio)
        return pooled, counts, self._words(spots, ratio, device)

    def _words(self, spots: Tensor, ratio: int, device: torch.device) -> Tensor | None:
        if self.words is None:
            return None
        flat, inside = _padded(self.firsts, spots)
        return group_ids(torch.where(inside, self.words[flat].long(), 0), ratio).to(device)


def _padded(starts: Tensor, spots: Tensor) -> tuple[Tensor, Tensor]:
    """Where the rows of some passages are in a flat block, ``(B, longest)``, 0 on padding; and what is no padding."""
    first, last = starts[spots], starts[spots + 1]
    steps = torch.arange(int((last - first).max()))
    inside = steps[None] < (last - first)[:, None]
    return torch.where(inside, first[:, None] + steps, 0), inside


def check_ratios(ratios: Sequence[int]) -> list[int]:
    """Give ratios in rising order if all can be had from states of the smallest.

    Raises:
        InputError: If there are none, one is not a whole number >= 1, or one is no multiple of the smallest.
    """
    checked = sorted({check_ratio(ratio) for ratio in ratios})
    if not checked or any(ratio % checked[0] for ratio in checked):
        raise InputError(f"ratios are {list(ratios)}; wanted at least one, each a multiple of the smallest.")
    return checked


def as_retriever(backbone: Backbone, retriever: EmbeddingBackbone | None) -> EmbeddingBackbone:
    """Give the retriever, or the reranking model itself if it embeds.

    Raises:
        InputError: If there is no retriever and the model gives no vectors.
    """
    if retriever is not None:
        return retriever
    if not hasattr(backbone, "embed_query"):
        raise InputError(
            f"model {backbone.info.name!r} gives no retrieval vectors. Pass retriever=PicoBackbone.load() to retrieve "
            f"with pico and rerank with it."
        )
    return cast("EmbeddingBackbone", backbone)


def gather(
    what: EvalSet,
    searcher: EmbeddingBackbone,
    *,
    top_k: int,
    max_queries: int | None,
    ratio: int,
    folder: Path,
    keep: bool,
    texts: Mapping[str, str] | None = None,
) -> Gathered:
    """Read a set and find each query's candidates.

    Args:
        what: Which set.
        searcher: The model whose vectors retrieve.
        top_k: Most candidates retrieved, >= 1; a pooled set has all its judged passages.
        max_queries: Only the first so many queries; None is all.
        ratio: Pooling ratio of the states kept.
        folder: Where vectors and states are kept, or found from an earlier run.
        keep: Keep states beside the vectors (the searcher reranks, too).
        texts: What some queries ask instead of their own text, by query id.

    Raises:
        InputError: If the folder or split is missing, an argument is out of range, or a pooled query has no judged
            passage in the corpus.
    """
    for name, value in (("top_k", top_k), ("max_queries", max_queries)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; wanted a whole number >= 1.")
    found = _first_queries(load_collection(Path(what.folder), what.split), max_queries, texts or {})
    pools = _pools(found) if what.pooled else None
    wanted = None if pools is None else sorted({row for pool in pools for row in pool})
    library = read_passages(searcher, found.passages, ratio, folder, keep=keep, rows=wanted)
    rows, cosines = [], []
    for place, query in enumerate(tqdm(list(found.queries.values()), desc="retrieve", unit="query")):
        near = library.vectors @ searcher.embed_query(query)
        own = torch.arange(len(near)) if pools is None else library.spots(pools[place])
        nearest = near[own].sort(descending=True, stable=True)
        cut = len(own) if what.pooled else min(top_k, len(own))
        best = own[nearest.indices[:cut]]
        rows.append(best if wanted is None else torch.tensor(wanted)[best])
        cosines.append(nearest.values[:cut])
    return Gathered(what=what, found=found, rows=rows, cosines=cosines, library=library)


def library_of(model: Backbone, gathered: Gathered, searcher: EmbeddingBackbone, ratio: int, folder: Path) -> Library:
    """Give the candidates' states as a model reads them: the retriever's own, if both make the same states."""
    own = gathered.library
    if model.info.fingerprint == searcher.info.fingerprint and len(own.states):
        return own
    wanted = sorted({row for rows in gathered.rows for row in rows.tolist()})
    return read_passages(model, gathered.found.passages, ratio, folder, keep=True, rows=wanted)


def read_passages(
    model: Backbone, passages: Sequence[str], ratio: int, folder: Path, *, keep: bool, rows: Sequence[int] | None = None
) -> Library:
    """Encode passages, or take them from the folder if the same model left the same passages there.

    Args:
        model: Reads them.
        passages: The corpus.
        ratio: Pooling ratio of the states.
        folder: Where they are kept; made if missing.
        keep: Keep states; else only vectors.
        rows: Which passages; None is all.
    """
    texts = passages if rows is None else [passages[row] for row in rows]
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
    words = torch.from_numpy(np.load(stem.with_suffix(".ids.npy"))) if meta.get("words") else None
    place = None if rows is None else {row: spot for spot, row in enumerate(rows)}
    return Library(
        vectors=vectors,
        states=states.view(-1, width),
        tokens=torch.tensor(meta["tokens"]),
        ratio=ratio,
        place=place,
        words=words,
    )


def _first_queries(found: Collection, limit: int | None, texts: Mapping[str, str]) -> Collection:
    kept = {query_id: texts.get(query_id, own) for query_id, own in list(found.queries.items())[:limit]}
    return Collection(
        name=found.name,
        split=found.split,
        doc_ids=found.doc_ids,
        passages=found.passages,
        queries=kept,
        qrels={query_id: found.qrels[query_id] for query_id in kept},
    )


def _pools(found: Collection) -> list[list[int]]:
    """Corpus rows that each query's judgements name, in corpus order."""
    row_of = {doc_id: row for row, doc_id in enumerate(found.doc_ids)}
    pools = [sorted(row_of[doc] for doc in found.qrels[query_id] if doc in row_of) for query_id in found.queries]
    if not all(pools):
        bad = list(found.queries)[[bool(pool) for pool in pools].index(False)]
        raise InputError(
            f"{found.name} {found.split}: no passage judged for query {bad!r} is in corpus.jsonl; nothing to pool."
        )
    return pools


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
    words = keep and model.info.keeps_token_ids
    if words:
        ids = np.concatenate([np.asarray(one.ids, dtype=np.int32) for one in tokenized])
        np.save(stem.with_suffix(".ids.npy"), ids)
    meta = {"rows": int(starts[-1]) if keep else 0, "tokens": [len(one.ids) for one in tokenized], "words": words}
    stem.with_suffix(".json").write_text(json.dumps(meta), encoding="utf-8")  # last: marks the rest as whole
