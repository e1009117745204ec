"""What pico is trained on: BEIR folders to lists with states, read once by its frozen encoder."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.evaluation.beir import Collection, load_collection, read_instructions
from kalm_rag.index.embedders import BundledEmbedder
from kalm_rag.instructions import Instructions
from kalm_rag.states import batch_states
from kalm_rag.training.lists import Asked, CandidateLists, Retriever, ask, build_lists

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """How one BEIR folder is used."""

    name: str  # folder name below the data folder
    split: str  # split with the judgements
    queries: int = 10**9  # most labelled queries trained on
    held_out: int = 0  # queries set aside for dev (never trained on), drawn before anything else
    spans: int = 0  # unlabelled queries: sentences cut out of passages, learnt from the teacher alone
    docs: int | None = None  # most passages kept (all gold ones are); None keeps all
    judged_only: bool = False  # keep only passages that the split judges, so that other splits' passages stay unseen


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
"""What pico is trained on: sets that may be trained on, free documentation, and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How sources are read."""

    seed: int = 0
    dense_share: float = 0.5  # weight of the cosine in the soft labels of lists to learn from; BM25 has the rest
    fast: bool = False  # encode passages in bfloat16


def load_sources(
    sources: Sequence[Source], folders: Sequence[Path], engine: Reranker, how: Reading
) -> tuple[list[CandidateLists], list[CandidateLists]]:
    """Read sources: lists to learn from, and held-out lists over the same passages.

    Each source is below the first folder that has it. The engine is over pico's encoder, at ratio 1; its states come
    with the lists.

    Raises:
        InputError: If a folder or split is missing, or there is no query to learn from.
    """
    learnt, held = [], []
    for source, home in zip(sources, find_sources(sources, folders), strict=True):
        used, dev = load_source(home, source, engine, how)
        learnt += [used] if used is not None else []
        held += [dev] if dev is not None else []
    if not learnt:
        raise InputError("no source gives a query to train on; wanted at least one with queries or spans.")
    return learnt, held


def load_source(
    home: Path, source: Source, engine: Reranker, how: Reading
) -> tuple[CandidateLists | None, CandidateLists | None]:
    """Read one source: its training lists and its held-out lists; None where there are none."""
    rng = random.Random(f"{how.seed}-{source.name}-{source.split}")
    found = load_collection(home, source.split)
    query_ids = sorted(found.queries)
    rng.shuffle(query_ids)
    held, used = query_ids[: source.held_out], query_ids[source.held_out :][: source.queries]
    kept = _kept_passages(found, held + used, source, rng)
    passages = [found.passages[row] for row in kept]
    found = replace(found, doc_ids=[found.doc_ids[row] for row in kept], passages=passages)
    logger.info("%s %s: reading %d passages", source.name, source.split, len(kept))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.fast):
        states = engine.encode(found.passages)
    embedder = BundledEmbedder(engine)
    parts = [embedder.from_states(batch_states(states[at : at + 256])) for at in range(0, len(states), 256)]
    retriever = Retriever(found.passages, engine, torch.cat([torch.from_numpy(part) for part in parts]))
    apart = read_instructions(home)
    asked = ask(found, used, apart, Instructions())
    for row in rng.sample(range(len(states)), min(source.spans, len(states))):
        if (span := _span(found.passages[row], rng)) is not None:
            asked.append(Asked(span, Instructions(), set(), row))
    build = partial(build_lists, found.name, found.passages, retriever=retriever, rng=rng, ways=1, states=states)
    lists = build(asked, learn=True, dense_share=how.dense_share) if asked else None
    dev = ask(found, held, apart, Instructions())
    return lists, build(dev, learn=False) if dev else None


def find_sources(sources: Sequence[Source], folders: Sequence[Path]) -> list[Path]:
    """The folder of each source, in the first of some folders that has it.

    Raises:
        InputError: If one is missing.
    """
    below = {source.name: [Path(folder) / source.name for folder in folders] for source in sources}
    homes = {name: next((home for home in every if home.is_dir()), None) for name, every in below.items()}
    if missing := [name for name, home in homes.items() if home is None]:  # said before minutes of reading
        raise InputError(
            f"{', '.join(missing)} is not a folder below {', '.join(map(str, folders))}; wanted all collections of the "
            f"recipe. Those named debian-* come from notebooks/collect_text.py: give its --out as another --data."
        )
    return [home for source in sources if (home := homes[source.name]) is not None]


def _kept_passages(found: Collection, query_ids: Sequence[str], source: Source, rng: random.Random) -> list[int]:
    """Rows of the passages to keep: the judged ones first, then random ones up to the limit."""
    if source.judged_only:
        judged = {doc for grades in found.qrels.values() for doc in grades}
        return [row for row, doc in enumerate(found.doc_ids) if doc in judged]
    if source.docs is None or source.docs >= len(found.doc_ids):
        return list(range(len(found.doc_ids)))
    gold = {doc for qid in query_ids for doc in found.qrels[qid]}
    keep = [row for row, doc in enumerate(found.doc_ids) if doc in gold]
    rest = [row for row, doc in enumerate(found.doc_ids) if doc not in gold]
    return sorted(keep + rng.sample(rest, max(0, min(len(rest), source.docs - len(keep)))))


def _span(text: str, rng: random.Random) -> str | None:
    """One sentence of a passage, or None if it has none of a query's length."""
    sentences = [s.strip() for s in re.split(r"(?<=[.!?;:])\s+", text) if 4 <= len(s.split()) <= 40]
    return rng.choice(sentences) if sentences else None
