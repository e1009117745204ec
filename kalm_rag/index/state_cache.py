"""States that no record refers to: kept in memory up to a bound, beside each store and for whoever has none.

Knows no collection.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

from kalm_rag.states import Layout, PassageStates, split_batch
from kalm_rag.store import Fetched, Reference, StateStore
from kalm_rag.store.memory import MemoryStore
from kalm_rag.store.rows import StoredRow

CACHE_BYTES = 256 * 1024 * 1024
"""Most bytes of states kept in memory per model and ratio, for adapters without a store (2,700 full-length passages
of pico at ratio 4). The least recently used go first."""

BESIDE_BYTES = 64 * 1024 * 1024
"""The same for the cache beside one store: texts of no record, and states that the store could not take."""

_caches: dict[Layout, CacheStore] = {}
_beside: weakref.WeakKeyDictionary[StateStore, CacheStore] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class CacheStore(MemoryStore):
    """A memory store with a bound on its bytes of payload: the least recently used states make room."""

    def __init__(self, layout: Layout, max_bytes: int = CACHE_BYTES) -> None:
        super().__init__(layout)
        self.max_bytes = max_bytes

    def get_many(self, keys: Sequence[str]) -> Fetched:
        """Fetch states and count them as used just now; see `StateStore.get_many`."""
        fetched = super().get_many(keys)
        with self._lock:
            for position in fetched.found:
                row = self._rows.pop(keys[position], None)  # a dict keeps the order of insertion: oldest use first
                if row is not None:
                    self._rows[keys[position]] = row
        return fetched

    def states(self, keys: Sequence[str]) -> dict[str, PassageStates]:
        """States by key, of those of the keys that are here."""
        fetched = self.get_many(keys)
        found = [keys[position] for position in fetched.found]
        return {} if fetched.batch is None else dict(zip(found, split_batch(fetched.batch, found), strict=True))

    def _put(self, rows: list[StoredRow], references: list[Reference], scope: str, wait: float | None) -> None:
        """Keep states, then drop the least recently used until the bound holds; references are not kept."""
        super()._put(rows, [], scope, wait)
        with self._lock:
            held = sum(len(row.payload) for row in self._rows.values())
            while held > self.max_bytes:
                oldest = next(iter(self._rows))
                held -= len(self._rows.pop(oldest).payload)


def shared_cache(layout: Layout) -> CacheStore:
    """This process's cache of states of one layout."""
    with _lock:
        if layout not in _caches:
            _caches[layout] = CacheStore(layout)
        return _caches[layout]


def cache_beside(store: StateStore) -> CacheStore | None:
    """The cache that goes with a store, for as long as the store is in use; None for a cache."""
    if isinstance(store, CacheStore):
        return None
    with _lock:
        return _beside.setdefault(store, CacheStore(store.layout, BESIDE_BYTES))


def release_caches() -> None:
    """Forget all states kept in memory; stores that hold a cache go on with an empty one."""
    with _lock:
        caches = list(_caches.values())
        _caches.clear()
    for cache in caches:
        cache.close()
