"""Candidate lists: BEIR folders to queries with their candidates, labels and soft labels.

Owns which queries are held out and which candidates a query meets. Knows no model that is trained on them.
Letters: L lists, C candidates of a list.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, MissingDependencyError
from kalm_rag.evaluation.beir import Collection, load_collection, read_instructions
from kalm_rag.evaluation.fusion import Bm25, fuse
from kalm_rag.index.embedders import BundledEmbedder
from kalm_rag.instructions import Instructions
from kalm_rag.states import PassageStates
from kalm_rag.training.config import AdaptConfig

logger = logging.getLogger(__name__)

DEPTH = 100
"""Retrieval ranks that a candidate list is drawn from."""

RANDOMS = 20
"""Random passages kept beside them."""

DEV_DEPTH = 50
"""Candidates of a held-out list: what retrieval gives, relevant passages it missed left out."""

_WINDOW = 2048


@dataclass(frozen=True, kw_only=True)
class CandidateLists:
    """Queries of one collection with their candidates."""

    name: str  # the collection's folder
    passages: Sequence[str]  # texts of the whole collection
    queries: Sequence[str]
    instructions: Sequence[Instructions]  # what each query is asked under
    candidates: Tensor  # passage rows, int64 (L, C): `depth` of them in retrieval order, then random ones
    depth: int
    gold: Tensor  # 1 on relevant candidates, else 0, float32 (L, C); all 0 where a query has no label
    teacher: Tensor  # soft labels, standardised over each list's retrieved part, float32 (L, C)
    relevant: Sequence[int]  # how many passages of the whole collection are relevant to each query
    states: Sequence[PassageStates] | None = None  # of the passages, where an encoder that is not trained has read them

    def texts(self, row: int, columns: Sequence[int]) -> list[str]:
        """Passages at some columns of one list."""
        return [self.passages[int(self.candidates[row, column])] for column in columns]


class Asked(NamedTuple):
    """A query before it meets candidates: its relevant passages' rows, and a row that must not be a candidate."""

    query: str
    instructions: Instructions
    gold: set[int]
    skip: int = -1


class Retriever:
    """Scores of every passage of one collection: BM25, and cosines of all-MiniLM-L6-v2 where that is installed.

    `dense` is an engine over pico, or None for BM25 alone; `vectors` the passages' vectors, if they are at hand.
    """

    def __init__(self, texts: Sequence[str], dense: Reranker | None, vectors: Tensor | None = None) -> None:
        self._matcher, self._dense = Bm25(texts), dense
        self._vectors = embed(dense, texts) if vectors is None and dense is not None else vectors

    def scores(self, queries: Sequence[str]) -> Iterator[list[Tensor]]:
        """One float32 ``(passages,)`` per way of scoring, the better retriever first, for each query."""
        asked = embed(self._dense, queries) if self._dense is not None else None
        for row, query in enumerate(queries):
            words = self._matcher.scores(query)
            yield [words] if asked is None or self._vectors is None else [self._vectors @ asked[row], words]


def embed(engine: Reranker, texts: Sequence[str]) -> Tensor:
    """Vectors of pico's encoder, float32 ``(texts, 384)``."""
    embedder = BundledEmbedder(engine)
    starts = tqdm(range(0, len(texts), _WINDOW), desc="vectors", unit=f"{_WINDOW} texts", mininterval=2.0)
    return torch.cat([torch.from_numpy(embedder.passages(texts[at : at + _WINDOW])) for at in starts])


def load_lists(
    data: Path, config: AdaptConfig, dense: Reranker | None = None
) -> tuple[list[CandidateLists], list[CandidateLists]]:
    """Read one BEIR folder or a folder of them into lists to learn from, no more than are met, and held-out lists.

    Which queries are held out depends on their ids alone, so that it is the same for every seed and stage. `dense` is
    an engine over pico that retrieves beside BM25.

    Raises:
        InputError: If a folder, split or file is missing or empty, or too few labelled queries are left.
        MissingDependencyError: If bm25s is not installed.
    """
    learnt: list[CandidateLists] = []
    held: list[CandidateLists] = []
    folders = _find_folders(Path(data), config.split)
    share, steer = -(-config.steps * config.lists // len(folders)), config.instructions
    for folder in folders:
        used, dev = _read_folder(folder, config)
        rng = random.Random(f"{config.seed}-{folder.name}")
        chosen = sorted(used.queries)
        rng.shuffle(chosen)
        apart, retriever = read_instructions(folder), Retriever(used.passages, dense)
        for out, queries, learn in ((learnt, chosen[:share], True), (held, sorted(dev.queries), False)):
            asked = ask(used if learn else dev, queries, apart, steer)
            out.append(build_lists(used.name, used.passages, asked, retriever, rng, learn=learn))
    return learnt, held


def bundled_retriever(device: torch.device) -> Reranker | None:
    """An engine over pico, or None (and a warning) where the extra 'pico' is not installed."""
    try:
        return Reranker.from_pretrained("pico", device=device)
    except MissingDependencyError:
        logger.warning("candidates and soft labels come from BM25 alone: the extra 'pico' is not installed")
        return None


def ask(found: Collection, ids: Sequence[str], apart: dict[str, tuple[str, str]], default: Instructions) -> list[Asked]:
    """Queries by id with their labels; query and task apart where the folder's ``instructions.jsonl`` has them."""
    where = {doc: row for row, doc in enumerate(found.doc_ids)}
    asked = []
    for query_id in ids:
        task, query = apart.get(query_id, (default.task, found.queries[query_id]))
        steer = Instructions(system=default.system, task=task, system_mode=default.system_mode)
        gold = {where[doc] for doc, grade in found.qrels[query_id].items() if grade > 0 and doc in where}
        asked.append(Asked(query, steer, gold))
    return asked


def build_lists(
    name: str,
    passages: Sequence[str],
    asked: Sequence[Asked],
    retriever: Retriever,
    rng: random.Random,
    *,
    learn: bool,
    ways: int = 2,
    dense_share: float = 0.5,
    states: Sequence[PassageStates] | None = None,
) -> CandidateLists:
    """Give each query its candidates; in lists to `learn` from, with its relevant passages and random ones.

    Args:
        name: The collection's name.
        passages: Its texts, and of the retriever.
        asked: The queries.
        retriever: Finds candidates.
        rng: Draws random passages.
        learn: Whether they are learnt from, or held out.
        ways: Ways of retrieving that give candidates in turn: 1 is the first, 2 both.
        dense_share: Weight of the cosine in the soft labels; BM25 has the rest.
        states: The passages' states, where they are kept.

    Raises:
        InputError: If there are fewer than 3 passages.
    """
    size = len(passages)
    if size < 3:
        raise InputError(f"{name} has {size} passages; wanted at least 3 to draw candidates from.")
    depth = min(DEPTH, size - 1) if learn else min(DEV_DEPTH, size)
    picked, scores, gold = list[list[int]](), list[Tensor](), list[list[float]]()
    found = retriever.scores([question.query for question in asked])
    bar = tqdm(asked, desc=f"{name} lists", mininterval=2.0)
    for question, by_way in zip(bar, found, strict=True):
        if question.skip >= 0:
            for way in by_way:
                way[question.skip] = -1.0
        ranks = zip(*(way.topk(depth).indices.tolist() for way in by_way[:ways]), strict=True)
        rows = list(dict.fromkeys(row for rank in ranks for row in rank))[:depth]  # of the ways in turn, each row once
        if learn:
            rows = _with_gold(rows, question.gold)
            rest = [row for row in rng.sample(range(size), min(size, depth + RANDOMS)) if row not in set(rows)]
            rows += rest[: min(RANDOMS, size - depth)]
        picked.append(rows)
        scores.append(torch.stack([way[rows] for way in by_way]))
        gold.append([float(row in question.gold) for row in rows])
    every = torch.stack(scores, 1)  # (ways of scoring, L, C)
    return CandidateLists(
        name=name,
        passages=passages,
        queries=[question.query for question in asked],
        instructions=[question.instructions for question in asked],
        candidates=torch.tensor(picked),
        depth=depth,
        gold=torch.tensor(gold),
        teacher=fuse(every[0], every[-1], depth, dense_share),  # BM25 alone is both
        relevant=[len(question.gold) for question in asked],
        states=states,
    )


def _find_folders(data: Path, split: str) -> list[Path]:
    """BEIR folders that have a split: `data` itself, or those right below it."""
    if not data.is_dir():
        raise InputError(f"{data} is not a folder; wanted a BEIR folder or a folder of them.")
    if (data / "corpus.jsonl").is_file():
        return [data]
    folders = [folder for folder in sorted(data.iterdir()) if (folder / "corpus.jsonl").is_file()]
    if not folders:
        raise InputError(
            f"{data} is no BEIR folder and holds none; wanted corpus.jsonl, queries.jsonl and qrels/{split}.tsv in it "
            f"or in a folder right below it."
        )
    kept = [folder for folder in folders if (folder / "qrels" / f"{split}.tsv").is_file()]
    for folder in (folder for folder in folders if folder not in kept):
        logger.warning("%s has no split %r and is left out", folder.name, split)
    if not kept:
        raise InputError(
            f"none of the {len(folders)} BEIR folders in {data} has a split {split!r} (qrels/{split}.tsv)."
        )
    return kept


def _read_folder(folder: Path, config: AdaptConfig) -> tuple[Collection, Collection]:
    """The collection twice: with the queries to learn from, and with the held-out ones."""
    found = other = _labelled(load_collection(folder, config.split))
    if config.dev_split is not None:
        other = _labelled(load_collection(folder, config.dev_split))
    order = sorted(other.queries, key=lambda one: hashlib.sha256(one.encode()).hexdigest())
    tenth = max(1, len(order) // 10) if config.dev_split is None else len(order)
    dev = other.only(order[: min(config.dev_queries, tenth)])
    texts = set(dev.queries.values())
    left = [query_id for query_id, text in found.queries.items() if query_id not in dev.queries and text not in texts]
    if not left or not dev.queries:
        raise InputError(
            f"{folder} has {len(found.queries)} labelled queries in split {config.split!r}, of which {len(left)} are "
            f"left to learn from beside {len(dev.queries)} held out; wanted at least 1 each."
        )
    return found.only(left), dev


def _labelled(found: Collection) -> Collection:
    """Only the queries whose relevant passages are in the corpus."""
    ids = set(found.doc_ids)
    return found.only(q for q in found.queries if any(g > 0 and doc in ids for doc, g in found.qrels[q].items()))


def _with_gold(rows: list[int], gold: set[int]) -> list[int]:
    """Put relevant passages that retrieval missed in place of the last ranks that hold none."""
    missed = sorted(gold - set(rows))[: len(rows) // 2]
    drop = [row for row in reversed(rows) if row not in gold][: len(missed)]
    return [row for row in rows if row not in set(drop)] + missed[: len(drop)]
