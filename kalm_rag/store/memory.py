"""A state store that lives and dies with the process, for Chroma's ephemeral client and for tests."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from kalm_rag.errors import ClosedError
from kalm_rag.states import Layout
from kalm_rag.store.base import GcReport, StateStore, StoreStats
from kalm_rag.store.rows import Reference, StoredRow, damage


class MemoryStore(StateStore):
    """States of one model in a dict, in the codec's bytes: what comes out is what the SQLite store would give."""

    place = "state store in memory"

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._rows: dict[str, StoredRow] = {}
        self._uses: dict[str, dict[str, str]] = {}  # collection id -> record id -> key
        self._collections: dict[str, tuple[str, int]] = {}  # collection id -> scope, unix seconds of the last put
        self._lock = threading.Lock()
        self._closed = False

    def collections(self) -> dict[str, int]:
        """Collection ids that have references, with their counts."""
        with self._open():
            return {collection: len(records) for collection, records in self._uses.items()}

    def verify(self) -> list[str]:
        """Check every state; give the keys of damaged ones."""
        with self._open():
            rows = list(self._rows.values())
        return [row.key for row in rows if damage(row, self.layout)]

    def stats(self) -> StoreStats:
        """Count what is stored."""
        with self._open():
            return StoreStats(
                states=len(self._rows),
                references=sum(map(len, self._uses.values())),
                payload_bytes=sum(len(row.payload) for row in self._rows.values()),
                other_namespaces={},
            )

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._closed = True
            self._rows, self._uses, self._collections = {}, {}, {}

    def _read(self, keys: list[str]) -> dict[str, StoredRow]:
        with self._open():
            return {key: self._rows[key] for key in keys if key in self._rows}

    def _present(self, keys: list[str]) -> set[str]:
        return set(self._read(keys))

    def _put(self, rows: list[StoredRow], references: list[Reference], scope: str, wait: float | None) -> None:
        with self._open():
            now = int(time.time())
            for row in rows:
                self._rows[row.key] = self._rows.get(row.key, row)._replace(created=now)
            for reference in references:
                self._uses.setdefault(reference.collection_id, {})[reference.record_id] = reference.key
            for collection in {reference.collection_id for reference in references}:
                known = self._collections.get(collection, ("", now))[0]
                self._collections[collection] = (scope if scope else known, now)

    def _unreference(self, collection_id: str, record_ids: list[str]) -> int:
        with self._open():
            records = self._uses.get(collection_id, {})
            gone = [records.pop(record_id) for record_id in record_ids if record_id in records]
            if not records:
                self._forget_collection(collection_id)
            return len(gone)

    def _references(self, collection_id: str) -> Iterator[Reference]:
        with self._open():
            records = dict(self._uses.get(collection_id, {}))
        for record_id, key in records.items():
            yield Reference(collection_id=collection_id, record_id=record_id, key=key)

    def _discard(self, names: list[str]) -> int:
        with self._open():
            return sum(self._rows.pop(key, None) is not None for key in names)

    def _sweep(self, live: set[str] | None, scopes: set[str], before: float) -> GcReport:
        with self._open():
            for collection, (scope, written) in list(self._collections.items()):
                if live is not None and collection not in live and scope in scopes and written <= before:
                    self._forget_collection(collection)
            used = {key for records in self._uses.values() for key in records.values()}
            unused = [key for key in self._rows.keys() - used if self._rows[key].created <= before]
            gone = [self._rows.pop(key) for key in unused]
        return GcReport(states=len(gone), payload_bytes=sum(len(row.payload) for row in gone))

    def _forget_collection(self, collection: str) -> None:
        self._uses.pop(collection, None)
        self._collections.pop(collection, None)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise ClosedError("state store in memory is closed; its states are gone. Make a new one.")
            yield
