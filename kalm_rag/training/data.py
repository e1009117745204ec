"""Training text: BEIR folders to passages read once, queries read once, and candidate lists with a teacher.

Owns what is trained on, what is held out, and which candidates a query meets. Knows the encoder, not the decoder.
Letters: B passages, T tokens, H width, C candidates of a list.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kalm_rag.errors import InputError
from kalm_rag.evaluation.beir import load_collection, read_instructions
from kalm_rag.evaluation.fusion import Bm25, fuse
from kalm_rag.models.pico.encoder import HIDDEN_SIZE, MiniLMEncoder
from kalm_rag.states.pooling import group_ids, mean_groups

logger = logging.getLogger(__name__)

DEPTH = 100
"""Retrieval ranks that a candidate list is drawn from."""

RANDOMS = 20
"""Random passages kept beside them."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """How one BEIR folder is used.

    Attributes:
        name: Folder name below the data folder.
        split: Split with the judgements.
        queries: Most labelled queries trained on.
        held_out: Queries set aside for dev (never trained on), drawn before anything else.
        spans: Unlabelled queries: sentences cut out of passages, learnt from the teacher alone.
        docs: Most passages kept (all gold ones are); None keeps all.
        judged_only: Keep only passages that the split judges, so that other splits' passages stay unseen.
    """

    name: str
    split: str
    queries: int = 10**9
    held_out: int = 0
    spans: int = 0
    docs: int | None = None
    judged_only: bool = False


SOURCES = (
    Source(name="scifact", split="train", held_out=100, spans=1500),
    Source(name="squad1-nqg-sent", split="dev", queries=3500, held_out=200, spans=300, judged_only=True),
    Source(name="squad1-nqg-sent", split="test", queries=3500, spans=300, judged_only=True),
    Source(name="selqa", split="dev", spans=600, judged_only=True),
    Source(name="pubmedqa-l", split="test", spans=600),
    Source(name="covid-faq", split="train", spans=150),
    Source(name="instructir-seed", split="test", queries=3000, spans=400),
    Source(name="medquad", split="train", queries=3000, held_out=300, spans=300, docs=6000),
    Source(name="debian-packages", split="train", queries=3000, held_out=150, spans=300),
    Source(name="debian-docs", split="train", queries=4000, held_out=150, spans=600),
)
"""What pico is trained on: sets marked "train" in the data folder's README, free documentation, and nothing else."""


@dataclass(kw_only=True)
class TokenStates:
    """Token states of many texts in one flat block, float16.

    Attributes:
        states: Shape ``(all tokens, 384)``.
        ids: Token ids, int32 ``(all tokens,)``.
        starts: First token of each text, and one past the last of all, int64 ``(texts + 1,)``.
    """

    states: Tensor
    ids: Tensor
    starts: Tensor

    def gather(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give some texts as a padded block.

        Args:
            rows: Which, int64 ``(B,)``.

        Returns:
            Float32 states ``(B, T, 384)``, ids ``(B, T)`` and float32 counts ``(B, T)``, 0 on padding.
        """
        starts = self.starts[rows]
        lengths = self.starts[rows + 1] - starts
        steps = torch.arange(int(lengths.max()))
        inside = steps[None] < lengths[:, None]  # (B, T)
        flat = torch.where(inside, starts[:, None] + steps[None], 0)
        return self.states[flat].float(), self.ids[flat].long(), inside.float()

    def pooled(self, rows: Tensor, ratio: int, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give some texts as a store would hand them out.

        Args:
            rows: Which, int64 ``(B,)``.
            ratio: Tokens a state stands for.
            table: Word codes of the vocabulary, ``(V, X)``, 0 for id 0.

        Returns:
            Pooled states ``(B, N, 384)``, counts ``(B, N)`` and word codes ``(B, N, ratio, X)``.
        """
        states, ids, counts = self.gather(rows)
        codes = torch.nn.functional.embedding(group_ids(torch.where(counts > 0, ids, 0), ratio), table)
        return *mean_groups(states, counts, ratio), codes

    def vectors(self) -> Tensor:
        """Mean of each text's states, unit length, float32 ``(texts, 384)``: the retrieval vectors."""
        lengths = self.starts.diff()
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        total = torch.zeros(len(lengths), self.states.shape[1])
        for part in torch.arange(len(owner)).split(100_000):
            total.index_add_(0, owner[part], self.states[part].float())
        return torch.nn.functional.normalize(total, dim=-1)


@dataclass(kw_only=True)
class Lists:
    """Queries of one source with their candidates and teacher scores.

    Attributes:
        name: Where they come from.
        passages: The passages' states.
        queries: The queries' states.
        texts: The queries' texts.
        instructions: Instruction of each query, or None.
        candidates: Passage rows, int64 ``(queries, C)``: DEPTH in retrieval order, then random ones.
        dense: Cosine of each, ``(queries, C)``.
        bm25: BM25 score of each, ``(queries, C)``.
        gold: Grade of each as 0 or 1, ``(queries, C)``; all 0 where the query has no label.
        relevant: Relevant passages of each query in the whole collection.
        randoms: How many of the candidates, at the end, are random passages.
        chances: How likely each retrieved candidate is drawn into a batch, ``(queries, depth)``; None falls with the
            retrieval rank as 1 / rank, so that ranks are drawn log-uniformly.
        soft: A model's margins for the candidates, ``(queries, C)``, to learn from besides `teacher`.
    """

    name: str
    passages: TokenStates
    queries: TokenStates
    texts: list[str]
    instructions: list[str | None]
    candidates: Tensor
    dense: Tensor
    bm25: Tensor
    gold: Tensor
    relevant: list[int] = field(default_factory=list)
    randoms: int = RANDOMS
    chances: Tensor | None = None
    soft: Tensor | None = None

    def teacher(self, share: float = 0.5) -> Tensor:
        """Retriever (of so much weight) and BM25, standardised over the retrieved part of a list, ``(queries, C)``."""
        return fuse(self.dense, self.bm25, self.depth, share)

    @property
    def depth(self) -> int:
        """How many of the candidates come from retrieval."""
        return self.candidates.shape[1] - self.randoms

    def narrow(self, rows: Tensor, columns: Tensor, randoms: int) -> Lists:
        """Give some queries with some of their candidates.

        Args:
            rows: Which queries, ``(R,)``.
            columns: Which candidates of each, ``(R, C')``, the random passages at the end.
            randoms: How many those are.
        """
        texts, lengths = self.queries, self.queries.starts.diff()
        picked = torch.cat([torch.arange(int(texts.starts[r]), int(texts.starts[r + 1])) for r in rows.tolist()])
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths[rows].cumsum(0)])
        return Lists(
            name=self.name,
            passages=self.passages,
            queries=TokenStates(states=texts.states[picked], ids=texts.ids[picked], starts=starts),
            texts=[self.texts[row] for row in rows.tolist()],
            instructions=[self.instructions[row] for row in rows.tolist()],
            candidates=self.candidates[rows].gather(1, columns),
            dense=self.dense[rows].gather(1, columns),
            bm25=self.bm25[rows].gather(1, columns),
            gold=self.gold[rows].gather(1, columns),
            relevant=[self.relevant[row] for row in rows.tolist()],
            randoms=randoms,
        )


def read_texts(encoder: MiniLMEncoder, texts: Sequence[str], *, limit: int, what: str, fast: bool) -> TokenStates:
    """Encode texts once, shortest first, into one flat block in input order.

    Args:
        encoder: The frozen encoder.
        texts: What to read.
        limit: Most tokens a text.
        what: Name on the progress bar.
        fast: Compute in bfloat16 where the CPU can.
    """
    rows = [ids for ids, _ in encoder.tokenize(texts, limit)]
    starts = torch.zeros(len(rows) + 1, dtype=torch.long)
    starts[1:] = torch.tensor([len(row) for row in rows]).cumsum(0)
    states = torch.empty(int(starts[-1]), HIDDEN_SIZE, dtype=torch.float16)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    with tqdm(total=len(rows), desc=what, unit="text", mininterval=2.0) as bar:
        at = 0
        while at < len(order):
            size = max(1, min(256, 8192 // len(rows[order[min(at + 63, len(order) - 1)]])))
            batch = order[at : at + size]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
                hidden, _, _ = encoder.hidden([rows[row] for row in batch])
            for row, one in zip(batch, hidden, strict=True):
                states[starts[row] : starts[row + 1]] = one[: len(rows[row])].half()
            at += size
            bar.update(len(batch))
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return TokenStates(states=states, ids=ids, starts=starts)


@dataclass(kw_only=True)
class _Asked:
    """Queries before they meet candidates."""

    texts: list[str] = field(default_factory=list)
    instructions: list[str | None] = field(default_factory=list)
    gold: list[set[int]] = field(default_factory=list)
    skip: list[int] = field(default_factory=list)

    def add(self, text: str, instruction: str | None, gold: set[int], skip: int = -1) -> None:
        self.texts.append(text)
        self.instructions.append(instruction)
        self.gold.append(gold)
        self.skip.append(skip)


def load_source(
    data: Path, source: Source, encoder: MiniLMEncoder, *, seed: int, fast: bool, query_tokens: int = 128
) -> tuple[Lists | None, Lists | None]:
    """Read one source: its training lists and its held-out lists, over the same passages.

    Args:
        data: Folder of BEIR folders.
        source: Which, and how much of it.
        encoder: The frozen encoder.
        seed: Fixes every draw.
        fast: Compute in bfloat16 where the CPU can.
        query_tokens: Most tokens of a query.

    Returns:
        Training lists and dev lists; None where there are none.
    """
    rng = random.Random(f"{seed}-{source.name}-{source.split}")
    found = load_collection(data / source.name, source.split)
    apart = read_instructions(data / source.name)
    query_ids = sorted(found.queries)
    rng.shuffle(query_ids)
    held, used = query_ids[: source.held_out], query_ids[source.held_out :][: source.queries]
    kept = _kept_docs(found.doc_ids, found.qrels, held + used, source, rng)
    where = {found.doc_ids[doc]: row for row, doc in enumerate(kept)}
    texts = [found.passages[doc] for doc in kept]
    passages = read_texts(encoder, texts, limit=256, what=f"{source.name} passages", fast=fast)
    matcher = Bm25(texts)
    out: list[Lists | None] = []
    for chosen, spans in ((used, source.spans), (held, 0)):
        asked = _Asked()
        for qid in chosen:
            instruction, text = apart.get(qid, (None, found.queries[qid]))
            asked.add(text, instruction, {where[d] for d, s in found.qrels[qid].items() if s > 0 and d in where})
        for row in rng.sample(range(len(texts)), min(spans, len(texts))):
            span = _span(texts[row], rng)
            if span is not None:
                asked.add(span, None, set(), skip=row)
        out.append(_lists(source.name, asked, passages, matcher, encoder, rng, fast, query_tokens))
    return out[0], out[1]


def _kept_docs(
    doc_ids: list[str], qrels: dict[str, dict[str, int]], query_ids: list[str], source: Source, rng: random.Random
) -> list[int]:
    """Rows of the passages to keep: the judged ones first, then random ones up to the limit."""
    if source.judged_only:
        judged = {doc for grades in qrels.values() for doc in grades}
        return [row for row, doc in enumerate(doc_ids) if doc in judged]
    if source.docs is None or source.docs >= len(doc_ids):
        return list(range(len(doc_ids)))
    gold = {doc for qid in query_ids for doc in qrels[qid]}
    keep = [row for row, doc in enumerate(doc_ids) if doc in gold]
    rest = [row for row, doc in enumerate(doc_ids) if doc not in gold]
    return sorted(keep + rng.sample(rest, max(0, min(len(rest), source.docs - len(keep)))))


def _span(text: str, rng: random.Random) -> str | None:
    """One sentence of a passage, or None if it has none of a query's length."""
    sentences = [s.strip() for s in re.split(r"(?<=[.!?;:])\s+", text) if 4 <= len(s.split()) <= 40]
    return rng.choice(sentences) if sentences else None


def _lists(
    name: str,
    asked: _Asked,
    passages: TokenStates,
    matcher: Bm25,
    encoder: MiniLMEncoder,
    rng: random.Random,
    fast: bool,
    query_tokens: int,
) -> Lists | None:
    """Give each query its candidates: the retriever's top ranks, then random passages."""
    if not asked.texts:
        return None
    queries = read_texts(encoder, asked.texts, limit=query_tokens, what=f"{name} queries", fast=fast)
    cosines = queries.vectors() @ passages.vectors().T  # (queries, passages)
    size = cosines.shape[1]
    if size < 3:
        raise InputError(f"{name} has {size} passages; wanted at least 3 to draw candidates from.")
    depth = min(DEPTH, size - 1)
    picked = np.empty((len(asked.texts), depth + RANDOMS), dtype=np.int64)
    bm25 = torch.empty(len(asked.texts), depth + RANDOMS)
    for row, text in enumerate(tqdm(asked.texts, desc=f"{name} lists", unit="query", mininterval=2.0)):
        if asked.skip[row] >= 0:
            cosines[row, asked.skip[row]] = -1.0
        top = cosines[row].topk(depth).indices.numpy()
        if asked.skip[row] < 0:
            top = _with_gold(top, asked.gold[row])
        picked[row] = np.concatenate([top, [rng.randrange(size) for _ in range(RANDOMS)]])
        bm25[row] = matcher.scores(text)[torch.from_numpy(picked[row])]
    candidates = torch.from_numpy(picked)
    gold = torch.tensor([[doc in own for doc in docs] for own, docs in zip(asked.gold, picked.tolist(), strict=True)])
    return Lists(
        name=name,
        passages=passages,
        queries=queries,
        texts=asked.texts,
        instructions=asked.instructions,
        candidates=candidates,
        dense=cosines.gather(1, candidates),
        bm25=bm25,
        gold=gold.float(),
        relevant=[len(own) for own in asked.gold],
    )


def _with_gold(top: np.ndarray, gold: set[int]) -> np.ndarray:
    """Put gold passages that retrieval missed in place of the last ranks."""
    missed = sorted(gold - set(top.tolist()))[: len(top) // 2]
    return np.concatenate([top[: len(top) - len(missed)], np.array(missed, dtype=np.int64)]) if missed else top
