"""The one writer of a collection, into which every door translates: make states and vectors, check, then write.

Order of writing: states and references in one transaction, then Chroma; of deleting:
Chroma, then references. Whatever a crash cuts off is a missing state, which is encoded again on demand, or a reference
too many, which `gc` takes. Knows no framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.candidates import KeptStates, as_stored, keep_states
from kalm_rag.index.clients import Database
from kalm_rag.index.collection import PAGE, collection_errors, comparable_metadata, vector_width
from kalm_rag.index.embedders import BundledEmbedder, Embedder
from kalm_rag.index.passage_rule import PassageRule
from kalm_rag.index.results import AddReport, Timings
from kalm_rag.states import passage_key
from kalm_rag.store import Reference, StateStore
from kalm_rag.store.rows import chunked

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

BATCH = 256
"""Records per transaction: enough to batch the encoder well, few enough to hold in memory and to lose on a crash."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """Records that were checked, ready to be written. All lists have one entry per record.

    Attributes:
        ids: Distinct.
        documents: Texts that Chroma keeps.
        metadatas: What Chroma keeps beside them; None or a mapping that is not empty.
        vectors: Retrieval vectors where the caller has them, else None: the writer's embedder makes them.
    """

    ids: list[str]
    documents: Sequence[str]
    metadatas: Sequence[dict[str, Any] | None]
    vectors: Sequence[Sequence[float]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, rows: Sequence[int]) -> Records:
        """Some of the records, in the order asked for."""
        return Records(
            ids=[self.ids[row] for row in rows],
            documents=[self.documents[row] for row in rows],
            metadatas=[self.metadatas[row] for row in rows],
            vectors=None if self.vectors is None else [self.vectors[row] for row in rows],
        )

    def batches(self, size: int) -> Iterator[Records]:
        """Cut into batches, in order."""
        for rows in chunked(range(len(self)), size):
            yield self if len(rows) == len(self) else self.rows(rows)


class Home(Protocol):
    """An open collection, with engine and store on demand: what a door gives its writer (`CollectionHome`)."""

    @property
    def database(self) -> Database:
        """Client and write lock."""

    @property
    def collection(self) -> Collection:
        """The collection as the database's client has it now."""

    @property
    def rule(self) -> PassageRule:
        """How its records are read."""

    @property
    def scope(self) -> str:
        """Names the database to a store that others share, see `StateStore.put_many`."""

    def parts(self) -> tuple[Reranker, StateStore]:
        """Engine and store at one ratio."""

    def stores(self) -> list[StateStore]:
        """The stores that hold references of the collection, without loading a model where possible."""

    def store(self) -> StateStore:
        """The store whose states queries read, likewise."""

    def note(self) -> None:
        """Note what makes the collection."""

    def find(self, ids: list[str]) -> list[str]:
        """Which of the ids there are."""

    def find_again(self) -> None:
        """Look the collection up again by name; StateMismatchError if it went over to another model meanwhile."""


class CollectionWriter:
    """Writes records of one collection and their states; `embedder` gives what makes vectors of those without.

    All calls raise InputError if vectors don't fit, and StoreError if Chroma or the store can't be written; batches
    finished before stay.
    """

    def __init__(self, home: Home, embedder: Callable[[], Embedder] | None = None) -> None:
        self._home, self._embedder = home, embedder

    def add(self, records: Records) -> AddReport:
        """Write new records; InputError if an id exists already, and nothing is written then."""
        report = AddReport()
        with self._home.database.writing():
            self._home.find_again()
            taken = [i for page in chunked(records.ids, PAGE) for i in self._home.find(page)]
            if taken:
                raise InputError(
                    f"{len(taken)} of {len(records)} ids exist already (first: {taken[0]!r}). Use upsert(...)."
                )
            for batch in records.batches(self._batch_size()):
                report += self._write(batch, {})
        return report

    def upsert(self, records: Records, *, refresh: bool = False, compare: bool = True) -> AddReport:
        """Write records, replacing those of the same ids as a whole (Chroma's own upsert merges metadata).

        Args:
            records: What to write.
            refresh: Make the vectors of unchanged records again, too.
            compare: Leave alone what is the same, text and metadata, and has its states.
        """
        report = AddReport()
        for batch in records.batches(self._batch_size()):
            with self._home.database.writing():
                self._home.find_again()
                report += self._replace(batch, compare=compare and not refresh)
        return report

    def delete(self, ids: Iterable[str]) -> int:
        """Delete records and their references, ignoring unknown ids; returns how many records there were."""
        deleted = 0
        for page in chunked(dict.fromkeys(ids), PAGE):
            with self._home.database.writing():
                known = self._home.find(page)
                if known:
                    with collection_errors(self._collection):
                        self._collection.delete(ids=known)
                for store in self._home.stores():
                    store.unreference(str(self._collection.id), page)
            deleted += len(known)
        return deleted

    @property
    def _collection(self) -> Collection:
        return self._home.collection

    def _batch_size(self) -> int:
        return min(BATCH, int(self._home.database.client.get_max_batch_size()))

    def _texts(self, records: Records) -> list[str | None]:
        rule = self._home.rule
        rows = zip(records.ids, records.documents, records.metadatas, strict=True)
        return [rule.text(document, metadata, record_id) for record_id, document, metadata in rows]

    def _replace(self, records: Records, *, compare: bool) -> AddReport:
        """One batch of an upsert: leave alone what is the same, write the rest with the old metadata keys removed."""
        with collection_errors(self._collection):
            there = self._collection.get(ids=records.ids, include=["documents", "metadatas"])
        found = zip(there["ids"], there["documents"], there["metadatas"], strict=True)
        old = {i: (document, dict(metadata or {})) for i, document, metadata in found}
        same = [
            row
            for row, i in enumerate(records.ids)
            if compare and i in old and old[i][0] == records.documents[row]
            and comparable_metadata(old[i][1]) == comparable_metadata(records.metadatas[row] or {})
        ]  # fmt: skip
        left = set(same) - self._unkept(records, same)
        todo = [row for row in range(len(records)) if row not in left]
        report = AddReport(unchanged=len(left))
        if not todo:
            return report
        return report + self._write(records.rows(todo), {i: metadata for i, (_, metadata) in old.items()})

    def _unkept(self, records: Records, rows: list[int]) -> set[int]:
        """Which of the unchanged records miss their states; those that have them are referenced, whoever wrote them."""
        if not rows:
            return set()
        texts = self._texts(records.rows(rows))
        keys = {row: passage_key(text) for row, text in zip(rows, texts, strict=True) if text is not None}
        store = self._home.store()
        absent = store.missing(list(keys.values()))
        kept = {records.ids[row]: key for row, key in keys.items() if key not in absent}
        store.put_many([], self._references(kept), scope=self._home.scope)
        return {row for row, key in keys.items() if key in absent}

    def _write(self, records: Records, old: dict[str, dict[str, Any]]) -> AddReport:
        """One batch: states and references in one transaction, then vectors, texts and metadata."""
        self._home.database.check_room()
        timings = Timings()
        engine, store = self._home.parts()
        texts = {i: text for i, text in zip(records.ids, self._texts(records), strict=True) if text is not None}
        kept = keep_states(engine, store, list(texts.values()), timings)
        with timings.stage("embed"):
            vectors = self._vectors(records, texts, kept)
        keys = dict(zip(texts, kept.keys, strict=True))
        with timings.stage("store"):
            store.put_many(list(kept.fresh.values()), self._references(keys), scope=self._home.scope)
        with timings.stage("chroma"):
            self._write_chroma(records, vectors, old)
        emptied = [i for i in old if i in set(records.ids) - texts.keys()]
        if emptied:
            store.unreference(str(self._collection.id), emptied)
        cut = {key for key, states in kept.fresh.items() if states.truncated}
        return AddReport(
            records=len(records),
            encoded=len(kept.fresh),
            from_store=kept.from_store,
            truncated=[i for i, key in keys.items() if key in cut],
            seconds=timings.seconds,
        )

    def _references(self, keys: dict[str, str]) -> list[Reference]:
        collection_id = str(self._collection.id)
        return [Reference(collection_id=collection_id, record_id=i, key=key) for i, key in keys.items()]

    def _write_chroma(self, records: Records, vectors: Any, old: dict[str, dict[str, Any]]) -> None:  # noqa: ANN401
        self._home.note()
        metadatas = []
        for i, metadata in zip(records.ids, records.metadatas, strict=True):
            gone = old.get(i, {}).keys() - (metadata or {}).keys()
            metadatas.append({**dict.fromkeys(gone), **(metadata or {})} or None)  # an upsert drops keys set to None
        write = self._collection.upsert if old else self._collection.add
        if not old:  # where add refuses them
            metadatas = [{k: v for k, v in (one or {}).items() if v is not None} or None for one in metadatas]
        with collection_errors(self._collection):
            write(ids=records.ids, embeddings=vectors, documents=list(records.documents), metadatas=metadatas)

    def _vectors(self, records: Records, texts: dict[str, str], kept: KeptStates) -> Any:  # noqa: ANN401 - array or lists
        """Retrieval vectors, checked before anything is written; pico's are made of the states."""
        if records.vectors is not None:
            vectors: Any = [list(map(float, vector)) for vector in records.vectors]
            widths = {len(vector) for vector in vectors}
        else:
            vectors = self._embedded(records, texts, kept)
            widths = {int(vectors.shape[1])} if len(vectors) else set()
        wanted = vector_width(self._collection)
        if len(widths) > 1 or (wanted is not None and widths - {wanted}):
            raise InputError(
                f"vectors have width {', '.join(map(str, sorted(widths)))}; collection {self._collection.name!r} holds "
                f"width {wanted if wanted is not None else 'one width'}. Use the embedder it was made with."
            )
        return vectors

    def _embedded(self, records: Records, texts: dict[str, str], kept: KeptStates) -> np.ndarray:
        if self._embedder is None:
            raise InputError("records have no vectors and this collection no embedder; wanted one of them.")
        embedder = self._embedder()
        read = [texts.get(i, "") for i in records.ids]
        engine, store = self._home.parts()
        if not isinstance(embedder, BundledEmbedder) or engine.info.family != "pico" or len(texts) < len(read):
            return embedder.passages(read)
        vectors: dict[str, np.ndarray] = {}
        if kept.fresh:
            states = as_stored(list(kept.fresh.values()), store)
            vectors |= dict(zip(kept.fresh, embedder.from_states(states), strict=True))
        stored = [key for key in dict.fromkeys(kept.keys) if key not in kept.fresh]
        if stored:
            fetched = store.get_many(stored)
            if fetched.batch is None or fetched.missing:  # another process swept what was there a moment ago
                return embedder.passages(read)
            vectors |= dict(zip(stored, embedder.from_states(fetched.batch), strict=True))
        return np.stack([vectors[key] for key in kept.keys])
