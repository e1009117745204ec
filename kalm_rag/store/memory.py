"""A state store that lives and dies with the process, for Chroma's ephemeral client and for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from kalm_rag.errors import ClosedError
from kalm_rag.states import Layout, PassageStates
from kalm_rag.store.arguments import check_ids, check_keys, check_names, check_put, check_sweep
from kalm_rag.store.base import GRACE_SECONDS, Closing, Fetched, GcReport, Reference, StoreStats
from kalm_rag.store.rows import StoredRow, assemble, damage, make_row


class MemoryStore(Closing):
    """States of one model in a dict, in the codec's bytes: what comes out is what the SQLite store would give.

    Args:
        layout: Model, width, ratio, codec and dtype.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._rows: dict[str, StoredRow] = {}
        self._uses: dict[str, dict[str, str]] = {}  # collection id -> record id -> key
        self._collections: dict[str, tuple[str, int]] = {}  # collection id -> scope, unix seconds of the last put
        self._lock = threading.Lock()
        self._closed = False

    def get_many(self, keys: Sequence[str]) -> Fetched:
        """Fetch states; see `StateStore.get_many`."""
        keys = check_keys(keys)
        with self._lock:
            self._check_open()
            rows = {key: self._rows[key] for key in keys if key in self._rows}
        return assemble(keys, rows, self.layout, "state store in memory")

    def missing(self, keys: Sequence[str]) -> set[str]:
        """Which keys have no states."""
        keys = check_keys(keys)
        with self._lock:
            self._check_open()
            return {key for key in keys if key not in self._rows}

    def put_many(
        self,
        states: Sequence[PassageStates],
        references: Sequence[Reference] = (),
        *,
        scope: str = "",
        wait: float | None = None,
    ) -> None:
        """Keep states and references; see `StateStore.put_many`. Never waits for longer than a moment."""
        rows = [make_row(passage, self.layout) for passage in states]
        references = check_put(references, scope, wait)
        with self._lock:
            self._check_open()
            now = int(time.time())
            for row in rows:
                self._rows[row.key] = self._rows.get(row.key, row)._replace(created=now)
            for reference in references:
                self._uses.setdefault(reference.collection_id, {})[reference.record_id] = reference.key
            for collection in {reference.collection_id for reference in references}:
                known = self._collections.get(collection, ("", now))[0]
                self._collections[collection] = (scope if scope else known, now)

    def unreference(self, collection_id: str, record_ids: Iterable[str]) -> int:
        """Forget records; their states stay until `gc`."""
        check_ids([collection_id])
        ids = check_ids(record_ids)
        with self._lock:
            self._check_open()
            records = self._uses.get(collection_id, {})
            gone = [records.pop(record_id) for record_id in ids if record_id in records]
            if not records:
                self._forget_collection(collection_id)
            return len(gone)

    def references(self, collection_id: str) -> Iterator[Reference]:
        """Known records of a collection, as they are now."""
        check_ids([collection_id])
        with self._lock:
            self._check_open()
            records = dict(self._uses.get(collection_id, {}))
        for record_id, key in records.items():
            yield Reference(collection_id=collection_id, record_id=record_id, key=key)

    def collections(self) -> dict[str, int]:
        """Collection ids that have references, with their counts."""
        with self._lock:
            self._check_open()
            return {collection: len(records) for collection, records in self._uses.items()}

    def verify(self) -> list[str]:
        """Check every state; give the keys of damaged ones."""
        with self._lock:
            self._check_open()
            rows = list(self._rows.values())
        return [row.key for row in rows if damage(row, self.layout)]

    def discard(self, names: Iterable[str]) -> int:
        """Drop states by key, leaving references."""
        unique = check_names(names)
        with self._lock:
            self._check_open()
            return sum(self._rows.pop(key, None) is not None for key in unique)

    def gc(
        self,
        live_collections: Iterable[str] | None = None,
        *,
        scopes: Iterable[str] = ("",),
        younger_than: float = GRACE_SECONDS,
    ) -> GcReport:
        """Drop references of collections that are gone, then unused states; see `StateStore.gc`."""
        live, known, before = check_sweep(live_collections, scopes, younger_than)
        with self._lock:
            self._check_open()
            for collection, (scope, written) in list(self._collections.items()):
                if live is not None and collection not in live and scope in known and written <= before:
                    self._forget_collection(collection)
            used = {key for records in self._uses.values() for key in records.values()}
            unused = [key for key in self._rows.keys() - used if self._rows[key].created <= before]
            gone = [self._rows.pop(key) for key in unused]
        return GcReport(states=len(gone), payload_bytes=sum(len(row.payload) for row in gone))

    def stats(self) -> StoreStats:
        """Count what is stored; nothing is on disk."""
        with self._lock:
            self._check_open()
            return StoreStats(
                states=len(self._rows),
                references=sum(map(len, self._uses.values())),
                payload_bytes=sum(len(row.payload) for row in self._rows.values()),
                disk_bytes=0,
                other_namespaces={},
            )

    def close(self) -> None:
        """Forget everything; later calls raise `ClosedError`."""
        with self._lock:
            self._closed = True
            self._rows, self._uses, self._collections = {}, {}, {}

    def _forget_collection(self, collection: str) -> None:
        self._uses.pop(collection, None)
        self._collections.pop(collection, None)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("state store in memory is closed; its states are gone. Make a new one.")
