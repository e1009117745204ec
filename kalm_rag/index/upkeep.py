"""Keeping a state store true to a collection: compare, mend, sweep.

Works on pages of (ids, texts), so it serves the index and the framework adapters alike. Knows no Chroma.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kalm_rag.engine.reranker import Reranker
from kalm_rag.index.results import BackfillReport, VerifyReport
from kalm_rag.states import passage_key
from kalm_rag.store import GcReport, Reference, StateStore

Pages = Iterable[tuple[Sequence[str], Sequence["str | None"]]]
"""A collection's records: ids and texts, page by page. None marks a record without text."""

BATCH = 256
"""Passages a transaction: enough to batch the encoder well, little enough to lose on a crash and to hold in memory."""


def verify(store: StateStore, collection_id: str, pages: Pages) -> VerifyReport:
    """Compare every record with its states, and every state with its checksum. Changes nothing."""
    known = {r.record_id: r.key for r in store.references(collection_id)}
    records = 0
    without: list[str] = []
    missing: list[str] = []
    stale: list[str] = []
    unreferenced: list[str] = []
    for ids, texts in pages:
        records += len(ids)
        keys = {i: passage_key(t) for i, t in zip(ids, texts, strict=True) if t is not None}
        absent = store.missing(list(keys.values()))
        without += [i for i in ids if i not in keys]
        missing += [i for i, key in keys.items() if key in absent]
        unreferenced += [i for i in keys if i not in known]
        stale += [i for i, key in keys.items() if known.get(i, key) != key]
        for i in ids:
            known.pop(i, None)
    return VerifyReport(
        records=records,
        without_text=without,
        missing=missing,
        stale=stale,
        unreferenced=unreferenced,
        orphans=sorted(known),
        damaged=store.verify(),
    )


def backfill(engine: Reranker, store: StateStore, collection_id: str, pages: Pages) -> BackfillReport:
    """Encode what is missing or damaged, mend references, drop those of records that are gone.

    Works in batches of `BATCH`; safe to break off and run again.

    Raises:
        StoreError: If the states can't be written. Batches finished before stay.
    """
    discarded = store.discard(store.verify())
    known = {r.record_id: r.key for r in store.references(collection_id)}
    encoded = referenced = 0
    for ids, texts in pages:
        keys = {i: passage_key(t) for i, t in zip(ids, texts, strict=True) if t is not None}
        absent = store.missing(list(keys.values()))
        todo = {keys[i]: t for i, t in zip(ids, texts, strict=True) if t is not None and keys[i] in absent}
        missing = list(todo.values())
        for start in range(0, len(missing), BATCH):
            store.put_many(engine.encode(missing[start : start + BATCH], show_progress=False))
        changed = [
            Reference(collection_id=collection_id, record_id=i, key=key)
            for i, key in keys.items()
            if known.get(i) != key
        ]
        if changed:
            store.put_many([], changed)
        encoded, referenced = encoded + len(todo), referenced + len(changed)
        for i in ids:
            known.pop(i, None)
    dropped = store.unreference(collection_id, list(known)) if known else 0
    return BackfillReport(encoded=encoded, referenced=referenced, dropped=dropped, discarded=discarded)


def sweep(store: StateStore, collection_id: str, pages: Pages, live_collections: Iterable[str]) -> GcReport:
    """Drop references of records and collections that are gone, then states that nothing refers to.

    The states of a record that is just being added elsewhere may go with them; they are encoded again on demand.
    """
    gone = {r.record_id for r in store.references(collection_id)}
    for ids, _ in pages:
        gone.difference_update(ids)
    if gone:
        store.unreference(collection_id, gone)
    return store.gc(live_collections, younger_than=0)
