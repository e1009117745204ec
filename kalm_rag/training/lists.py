"""Candidate lists of text: any BEIR folders to queries with their candidates, labels and soft labels.

Owns which queries are held out and which candidates a query meets. Knows no model that is trained on them.
Letters: L lists, C candidates of a list.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, MissingDependencyError
from kalm_rag.evaluation.beir import Collection, load_collection, read_instructions
from kalm_rag.evaluation.fusion import Bm25, fuse
from kalm_rag.index.embedders import BundledEmbedder
from kalm_rag.instructions import Instructions
from kalm_rag.training.data import DEPTH, RANDOMS

logger = logging.getLogger(__name__)

DEV_DEPTH = 50
"""Candidates of a held-out list: what retrieval gives, relevant passages it missed left out."""

_WINDOW = 2048


@dataclass(frozen=True, kw_only=True)
class TextLists:
    """Queries of one collection with their candidates.

    Attributes:
        name: The collection's folder.
        passages: Texts of the whole collection.
        queries: Texts.
        instructions: What each query is asked under.
        candidates: Passage rows, int64 ``(L, C)``: `depth` of them in retrieval order, then random ones.
        depth: How many come from retrieval.
        gold: 1 on relevant candidates, else 0, float32 ``(L, C)``.
        teacher: Soft labels, standardised over each list's retrieved part, float32 ``(L, C)``.
        relevant: Relevant passages of each query in the whole collection.
    """

    name: str
    passages: Sequence[str]
    queries: Sequence[str]
    instructions: Sequence[Instructions]
    candidates: Tensor
    depth: int
    gold: Tensor
    teacher: Tensor
    relevant: Sequence[int]

    def texts(self, row: int, columns: Sequence[int]) -> list[str]:
        """Passages at some columns of one list."""
        return [self.passages[int(self.candidates[row, column])] for column in columns]


class Retriever:
    """Scores of every passage of one collection: BM25, and cosines of all-MiniLM-L6-v2 where that is installed.

    Args:
        texts: The passages.
        dense: An engine over pico, or None for BM25 alone.
    """

    def __init__(self, texts: Sequence[str], dense: Reranker | None) -> None:
        self._matcher = Bm25(list(texts))
        self._embedder = BundledEmbedder(dense) if dense is not None else None
        if self._embedder is not None:
            starts = tqdm(range(0, len(texts), _WINDOW), desc="vectors", unit=f"{_WINDOW} passages", mininterval=2.0)
            parts = [torch.from_numpy(self._embedder.passages(texts[at : at + _WINDOW])) for at in starts]
            self._vectors = torch.cat(parts)

    def scores(self, query: str) -> list[Tensor]:
        """One float32 ``(passages,)`` per way of scoring, the better retriever first."""
        found = [self._matcher.scores(query)]
        if self._embedder is not None:
            found.insert(0, self._vectors @ torch.tensor(self._embedder.query(query)))
        return found


def find_folders(data: Path, split: str) -> list[Path]:
    """BEIR folders that have a split: `data` itself, or those right below it.

    Raises:
        InputError: If there is none.
    """
    data = Path(data)
    if not data.is_dir():
        raise InputError(f"{data} is not a folder; wanted a BEIR folder or a folder of them.")
    if (data / "corpus.jsonl").is_file():
        return [data]
    folders = [one for one in sorted(data.iterdir()) if (one / "corpus.jsonl").is_file()]
    if not folders:
        raise InputError(
            f"{data} is no BEIR folder and holds none; wanted corpus.jsonl, queries.jsonl and qrels/{split}.tsv in it "
            f"or in a folder right below it."
        )
    kept = [one for one in folders if (one / "qrels" / f"{split}.tsv").is_file()]
    for one in folders:
        if one not in kept:
            logger.warning("%s has no split %r and is left out", one.name, split)
    if not kept:
        raise InputError(
            f"none of the {len(folders)} BEIR folders in {data} has a split {split!r} (qrels/{split}.tsv)."
        )
    return kept


def load_lists(
    data: Path,
    *,
    split: str = "train",
    dev_split: str | None = None,
    dev_queries: int = 100,
    queries: int | None = None,
    instructions: Instructions | None = None,
    dense: Reranker | None = None,
    seed: int = 0,
) -> tuple[list[TextLists], list[TextLists]]:
    """Read folders into lists to learn from and held-out lists.

    Which queries are held out depends on their ids alone, so that it is the same for every seed and stage.

    Args:
        data: One BEIR folder, or a folder of them.
        split: Labelled queries to learn from.
        dev_split: Labelled queries to measure on; None holds out a tenth of `split`.
        dev_queries: Most held-out queries a folder, >= 1.
        queries: Most queries to learn from in all, spread over the folders; None is all.
        instructions: What queries are asked under where a folder has no ``instructions.jsonl``; None is the default.
        dense: An engine over pico that retrieves beside BM25; None is BM25 alone.
        seed: Fixes the draws.

    Raises:
        InputError: If a folder, split or file is missing or empty, or too few labelled queries are left.
        MissingDependencyError: If bm25s is not installed.
    """
    learnt: list[TextLists] = []
    held: list[TextLists] = []
    folders = find_folders(data, split)
    share = None if queries is None else -(-queries // len(folders))
    for folder in folders:
        used, dev = _read_folder(folder, split, dev_split, dev_queries)
        rng = random.Random(f"{seed}-{folder.name}")
        chosen = sorted(used.queries)
        rng.shuffle(chosen)
        steer = _instructions(folder, instructions if instructions is not None else Instructions())
        retriever = Retriever(used.passages, dense)
        learnt.append(_lists(used, chosen[:share], retriever, steer, rng, learn=True))
        held.append(_lists(dev, sorted(dev.queries), retriever, steer, rng, learn=False))
    return learnt, held


def bundled_retriever(device: torch.device) -> Reranker | None:
    """An engine over pico, or None (and a warning) where the extra 'pico' is not installed."""
    try:
        return Reranker.from_pretrained("pico", device=device)
    except MissingDependencyError:
        logger.warning("candidates and soft labels come from BM25 alone: the extra 'pico' is not installed")
        return None


def _read_folder(folder: Path, split: str, dev_split: str | None, dev_queries: int) -> tuple[Collection, Collection]:
    """The collection twice: with the queries to learn from, and with the held-out ones."""
    found = _labelled(load_collection(folder, split))
    if dev_split is None:
        order = sorted(found.queries, key=lambda one: hashlib.sha256(one.encode()).hexdigest())
        held = order[: min(dev_queries, max(1, len(order) // 10))]
        dev = _only(found, held)
    else:
        other = _labelled(load_collection(folder, dev_split))
        dev = _only(
            other, sorted(other.queries, key=lambda one: hashlib.sha256(one.encode()).hexdigest())[:dev_queries]
        )
    texts = set(dev.queries.values())
    left = [one for one, text in found.queries.items() if one not in dev.queries and text not in texts]
    if not left or not dev.queries:
        raise InputError(
            f"{folder} has {len(found.queries)} labelled queries in split {split!r}, of which {len(left)} are left to "
            f"learn from beside {len(dev.queries)} held out; wanted at least 1 each."
        )
    if len(found.passages) < 3:
        raise InputError(f"{folder} has {len(found.passages)} passages; wanted at least 3 to draw candidates from.")
    return _only(found, left), dev


def _labelled(found: Collection) -> Collection:
    """Only the queries whose relevant passages are in the corpus."""
    ids = set(found.doc_ids)
    return _only(
        found, [one for one in found.queries if any(g > 0 and doc in ids for doc, g in found.qrels[one].items())]
    )


def _only(found: Collection, ids: Sequence[str]) -> Collection:
    return Collection(
        name=found.name,
        split=found.split,
        doc_ids=found.doc_ids,
        passages=found.passages,
        queries={one: found.queries[one] for one in ids},
        qrels={one: found.qrels[one] for one in ids},
    )


def _instructions(folder: Path, default: Instructions) -> Callable[[str, str], tuple[str, Instructions]]:
    """Query and instructions of a query id: those of ``instructions.jsonl`` where the folder has it."""
    apart = read_instructions(folder)

    def of(query_id: str, text: str) -> tuple[str, Instructions]:
        if query_id not in apart:
            return text, default
        task, query = apart[query_id]
        return query, Instructions(system=default.system, task=task, system_mode=default.system_mode)

    return of


def _lists(
    found: Collection,
    ids: Sequence[str],
    retriever: Retriever,
    steer: Callable[[str, str], tuple[str, Instructions]],
    rng: random.Random,
    *,
    learn: bool,
) -> TextLists:
    """Give each query its candidates; in lists to learn from, with its relevant passages and random ones."""
    size = len(found.passages)
    depth = min(DEPTH if learn else DEV_DEPTH, size)
    where = {doc: row for row, doc in enumerate(found.doc_ids)}
    asked = [steer(one, found.queries[one]) for one in ids]
    picked: list[list[int]] = []
    gold: list[list[float]] = []
    scores: list[Tensor] = []
    relevant: list[int] = []
    for query_id, (query, _) in zip(
        ids, tqdm(asked, desc=f"{found.name} lists", unit="query", mininterval=2.0), strict=True
    ):
        own = {where[doc] for doc, grade in found.qrels[query_id].items() if grade > 0 and doc in where}
        by_way = retriever.scores(query)
        rows = _interleave([one.topk(depth).indices.tolist() for one in by_way], depth)
        if learn:
            rows = _with_gold(rows, own)
            rest = [row for row in rng.sample(range(size), min(size, depth + RANDOMS)) if row not in set(rows)]
            rows += rest[: min(RANDOMS, size - depth)]
        picked.append(rows)
        gold.append([float(row in own) for row in rows])
        scores.append(torch.stack([one[rows] for one in by_way]))
        relevant.append(len(own))
    every = torch.stack(scores, 1)  # (ways of scoring, L, C)
    return TextLists(
        name=found.name,
        passages=found.passages,
        queries=[query for query, _ in asked],
        instructions=[one for _, one in asked],
        candidates=torch.tensor(picked),
        depth=depth,
        gold=torch.tensor(gold),
        teacher=fuse(every[0], every[-1], depth),  # BM25 alone is both
        relevant=relevant,
    )


def _interleave(rankings: Sequence[Sequence[int]], size: int) -> list[int]:
    """First rows of several rankings in turn, each once."""
    return list(dict.fromkeys(row for rows in zip(*rankings, strict=True) for row in rows))[:size]


def _with_gold(rows: list[int], gold: set[int]) -> list[int]:
    """Put relevant passages that retrieval missed in place of the last ranks that hold none."""
    missed = sorted(gold - set(rows))[: len(rows) // 2]
    drop = [row for row in reversed(rows) if row not in gold][: len(missed)]
    return [row for row in rows if row not in set(drop)] + missed[: len(drop)]
