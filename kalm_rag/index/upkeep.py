"""Keeping a state store true to a collection: compare and mend.

Works on pages of (ids, texts) that `collection.records` reads by the collection's passage rule.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import StoreError
from kalm_rag.index.candidates import keep_states
from kalm_rag.index.collection import Pages, collection_errors, pages
from kalm_rag.index.results import BackfillReport, Timings, VerifyReport
from kalm_rag.index.writer import BATCH
from kalm_rag.states import passage_key
from kalm_rag.store import Reference, StateStore
from kalm_rag.store.rows import chunked

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

logger = logging.getLogger(__name__)


def verify(store: StateStore, collection: Collection, records: Pages, *, search: bool = True) -> VerifyReport:
    """Compare every record with its states, and every state with its checksum; see `ChromaIndex.verify`."""
    known = {r.record_id: r.key for r in store.references(str(collection.id))}
    count = 0
    without: list[str] = []
    missing: list[str] = []
    stale: list[str] = []
    unreferenced: list[str] = []
    for ids, texts in records:
        count += len(ids)
        keys = {i: passage_key(t) for i, t in zip(ids, texts, strict=True) if t is not None}
        absent = store.missing(list(keys.values()))
        without += [i for i in ids if i not in keys]
        missing += [i for i, key in keys.items() if key in absent]
        unreferenced += [i for i in keys if i not in known]
        stale += [i for i, key in keys.items() if known.get(i, key) != key]
        for i in ids:
            known.pop(i, None)
    return VerifyReport(
        records=count,
        without_text=without,
        missing=missing,
        stale=stale,
        unreferenced=unreferenced,
        orphans=sorted(known),
        damaged=store.verify(),
        unfindable=unfindable(collection) if search else [],
    )


def unfindable(collection: Collection) -> list[str]:
    """Ids of records that no vector search reaches: each record is looked for by its own vector.

    Chroma's index may leave records out after kills, after two writers at once, and, rarely, after many deletes. Its
    graph search is approximate, so a record that is not found among its nearest is looked for once more, wider.
    """
    with collection_errors(collection):
        total = collection.count()
    return [i for page in pages(collection, []) for i in _unfindable(collection, page["ids"], total)]


def _unfindable(collection: Collection, ids: list[str], total: int) -> list[str]:
    try:
        with collection_errors(collection):
            page = collection.get(ids=ids, include=["embeddings"])
            vectors = np.asarray(page["embeddings"], dtype=np.float32)
            left = _not_among(collection, page["ids"], vectors, min(_NEAR, total))
            rows = {i: row for row, i in enumerate(page["ids"])}
            return _not_among(collection, left, vectors[[rows[i] for i in left]], min(_FAR, total))
    except StoreError as err:
        if len(ids) == 1:
            logger.debug("the vector of record %r can't be read: %s", ids[0], err)
            return ids
    half = len(ids) // 2  # one record without a vector fails a whole page
    return _unfindable(collection, ids[:half], total) + _unfindable(collection, ids[half:], total)


_NEAR, _FAR = 10, 1000
_QUERIES = 100
_SAME = 1e-6


def _not_among(collection: Collection, ids: Sequence[str], vectors: np.ndarray, count: int) -> list[str]:
    lost = []
    for start in range(0, len(ids), _QUERIES):
        part = list(ids[start : start + _QUERIES])
        found = collection.query(
            query_embeddings=vectors[start : start + _QUERIES], n_results=count, include=["distances"]
        )
        for i, near, distances in zip(part, found["ids"], found["distances"], strict=True):
            crowded = len(near) == count and distances[-1] <= _SAME  # so many equals that each one can't be told
            if i not in near and not crowded:
                lost.append(i)
    return lost


def backfill(
    parts: tuple[Reranker, StateStore],
    collection_id: str,
    records: Pages,
    *,
    scope: str = "",
    total: int | None = None,
    show_progress: bool = False,
) -> BackfillReport:
    """Encode what is missing or damaged, mend references, in batches; `total` records are there, for the bar."""
    engine, store = parts
    discarded = store.discard(store.verify())
    known = {r.record_id: r.key for r in store.references(collection_id)}
    encoded = referenced = 0
    with tqdm(total=total, desc="backfill", unit="record", disable=not show_progress) as bar:
        for ids, texts in records:
            rows = [(i, text) for i, text in zip(ids, texts, strict=True) if text is not None]
            for part in chunked(rows, BATCH):
                kept = keep_states(engine, store, [text for _, text in part], Timings())
                changed = [
                    Reference(collection_id=collection_id, record_id=i, key=key)
                    for (i, _), key in zip(part, kept.keys, strict=True)
                    if known.get(i) != key
                ]
                if kept.fresh or changed:
                    store.put_many(list(kept.fresh.values()), changed, scope=scope)
                encoded, referenced = encoded + len(kept.fresh), referenced + len(changed)
            bar.update(len(ids))
    return BackfillReport(encoded=encoded, referenced=referenced, discarded=discarded)
