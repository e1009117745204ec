"""The default state store: one SQLite file, beside Chroma's. Standard library only; tables are in `schema.py`."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kalm_rag.errors import StoreError
from kalm_rag.states import Layout, PassageStates
from kalm_rag.store.arguments import (
    check_ids,
    check_keys,
    check_names,
    check_put,
    check_same_layout,
    check_seconds,
    check_sweep,
)
from kalm_rag.store.base import GRACE_SECONDS, Closing, Fetched, GcReport, Reference, StoreStats
from kalm_rag.store.connections import ConnectionPool, transaction, translate
from kalm_rag.store.namespaces import make_namespace, read_namespace, read_namespaces
from kalm_rag.store.repair import drop_damaged, find_damage
from kalm_rag.store.rows import StoredRow, assemble, chunked, make_row
from kalm_rag.store.schema import EmptyStoreError, check_ascending, marks, open_pool
from kalm_rag.store.sweep import drop_unused, forget_collection, give_back_space

CHUNK = 500  # values in one statement; SQLite's older limit is 999


class SqliteStore(Closing):
    """States of one model in one SQLite file; many threads and many processes may use it at once.

    A call that returned is kept, whatever happens to the process afterwards (``kill -9`` included). A power cut or a
    crash of the operating system may lose the last calls before it (never parts of a call, never the file): WAL
    with synchronous=NORMAL. Lost states are encoded again on demand.

    Make one with `SqliteStore.open` or `open_store`.
    """

    def __init__(self, pool: ConnectionPool, path: Path, layout: Layout, namespace: int, writable: bool) -> None:
        self.layout = layout
        self.path = path
        self.writable = writable
        self._pool = pool
        self._namespace = namespace

    @classmethod
    def open(cls, path: str | Path, layout: Layout, *, read_only: bool = False, timeout: float = 30.0) -> SqliteStore:
        """Open or make the file and the model's namespace in it.

        Args:
            path: The file. Its folder is made when it isn't there.
            layout: Model, width, ratio, codec and dtype. Must be what is stored, when the model's states are there.
            read_only: Write nothing, not even an empty file. Without it a file that can't be written is read-only, too.
            timeout: Seconds to wait while another process writes.

        Raises:
            StoreError: If it can't be opened or made.
            StoreFormatError: If it is foreign, damaged or newer than this release.
            StateMismatchError: If the model's states are there with another ratio, codec or width.
            InputError: If `timeout` is negative or no number.
        """
        path = Path(path)
        check_seconds(timeout, "timeout")
        if not read_only:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as err:
                raise StoreError(f"state store {path}: its folder can't be made ({err}). Name another place.") from err
        pool, writable = open_pool(path, layout, read_only=read_only, timeout=timeout)
        try:
            with pool.borrow() as connection:
                known = read_namespace(connection, layout.fingerprint, path)
                if known is None and writable:
                    try:
                        make_namespace(connection, layout)
                    except sqlite3.OperationalError as err:
                        if "readonly" not in str(err):
                            raise
                        writable = False  # SQLite opens a file that it may not write without a word
                    known = read_namespace(connection, layout.fingerprint, path)
            if known is not None:
                check_same_layout(known[1], layout, str(path))
        except BaseException:
            pool.close()
            raise
        return cls(pool, path, layout, known[0] if known is not None else 0, writable)

    def get_many(self, keys: Sequence[str]) -> Fetched:
        """Fetch states; see `StateStore.get_many`."""
        keys = check_keys(keys)
        rows: dict[str, StoredRow] = {}
        with self._pool.borrow() as connection:
            for chunk in chunked(dict.fromkeys(keys), CHUNK):
                for key, *rest in connection.execute(
                    "SELECT key, tokens, found, checksum, payload FROM states "
                    f"WHERE namespace=? AND key IN ({marks(chunk)})",
                    (self._namespace, *map(bytes.fromhex, chunk)),
                ):
                    if not isinstance(key, bytes):
                        raise sqlite3.DatabaseError("a key is malformed")
                    rows[key.hex()] = StoredRow(key.hex(), *rest)
        return assemble(keys, rows, self.layout, f"state store {self.path}")

    def missing(self, keys: Sequence[str]) -> set[str]:
        """Which keys have no states; reads the index of keys only."""
        keys = check_keys(keys)
        absent = set(keys)
        with self._pool.borrow() as connection:
            for chunk in chunked(dict.fromkeys(keys), CHUNK):
                query = f"SELECT HEX(key) FROM states WHERE namespace=? AND key IN ({marks(chunk)})"
                for (key,) in connection.execute(query, (self._namespace, *map(bytes.fromhex, chunk))):
                    absent.discard(key.lower())  # HEX: never None, whatever was damaged
        return absent

    def put_many(
        self,
        states: Sequence[PassageStates],
        references: Sequence[Reference] = (),
        *,
        scope: str = "",
        wait: float | None = None,
    ) -> None:
        """Keep states and references; see `StateStore.put_many`.

        A key that is there is left alone even if its row is damaged: finding out would mean reading all of it on each
        write. `verify` and `discard` are for that.
        """
        rows = [make_row(passage, self.layout) for passage in states]
        references = check_put(references, scope, wait)
        here = self._namespace
        values = [(here, bytes.fromhex(r.key), r.tokens, r.total_tokens, r.checksum, r.payload) for r in rows]
        uses = [(here, r.collection_id, r.record_id, bytes.fromhex(r.key)) for r in references]
        collections = [(here, collection_id, scope) for collection_id in {r.collection_id for r in references}]
        with self._writing(wait) as connection:
            now = int(time.time())  # here, not before: waiting for another writer may have taken long
            connection.executemany(
                "INSERT INTO states (namespace, key, tokens, found, checksum, payload, created) "
                f"VALUES (?, ?, ?, ?, ?, ?, {now}) ON CONFLICT (namespace, key) DO UPDATE SET created=excluded.created",
                values,
            )
            connection.executemany(
                f"INSERT INTO collections (namespace, collection_id, scope, written) VALUES (?, ?, ?, {now}) "
                "ON CONFLICT (namespace, collection_id) DO UPDATE SET written=excluded.written, "
                "scope=CASE excluded.scope WHEN '' THEN scope ELSE excluded.scope END",
                collections,
            )
            connection.executemany(
                "INSERT INTO uses (namespace, collection_id, record_id, key) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (namespace, collection_id, record_id) DO UPDATE SET key=excluded.key",
                uses,
            )

    def unreference(self, collection_id: str, record_ids: Iterable[str]) -> int:
        """Forget records, all in one transaction; their states stay until `gc`."""
        check_ids([collection_id])
        ids = check_ids(record_ids)
        count = 0
        with self._writing() as connection:
            for chunk in chunked(ids, CHUNK):
                query = f"DELETE FROM uses WHERE namespace=? AND collection_id=? AND record_id IN ({marks(chunk)})"
                count += connection.execute(query, (self._namespace, collection_id, *chunk)).rowcount
        return count

    def references(self, collection_id: str) -> Iterator[Reference]:
        """Known records of a collection, by id. Read in pages, so that nothing is held while the caller works."""
        check_ids([collection_id])
        last: str | None = None
        while True:
            with self._pool.borrow() as connection:
                page = connection.execute(
                    "SELECT record_id, key FROM uses WHERE namespace=? AND collection_id=? "
                    f"{'' if last is None else 'AND record_id>?'} ORDER BY record_id LIMIT {CHUNK}",
                    (self._namespace, collection_id) if last is None else (self._namespace, collection_id, last),
                ).fetchall()
                check_ascending([*([] if last is None else [last]), *(row[0] for row in page)])
            for record_id, key in page:
                known = key.hex() if isinstance(key, bytes) else ""  # damaged: the record then counts as stale
                yield Reference(collection_id=collection_id, record_id=record_id, key=known)
            if len(page) < CHUNK:
                return
            last = page[-1][0]

    def collections(self) -> dict[str, int]:
        """Collection ids that have references, with their counts."""
        query = "SELECT collection_id, COUNT(*) FROM uses WHERE namespace=? GROUP BY collection_id"
        with self._pool.borrow() as connection:
            return dict(connection.execute(query, (self._namespace,)).fetchall())

    def verify(self) -> list[str]:
        """Read every state and reference; name what is damaged. See `StateStore.verify`."""
        return find_damage(self._pool.borrow, self._namespace, self.layout)

    def discard(self, names: Iterable[str]) -> int:
        """Drop states by key, and what `verify` named; see `StateStore.discard`."""
        return drop_damaged(self._writing, self._namespace, check_names(names))

    def gc(
        self,
        live_collections: Iterable[str] | None = None,
        *,
        scopes: Iterable[str] = ("",),
        younger_than: float = GRACE_SECONDS,
    ) -> GcReport:
        """Drop references of collections that are gone, then unused states, then give the space back to the disk.

        Readers are not held up, other writers only for moments. See `StateStore.gc`.
        """
        live, known, before = check_sweep(live_collections, scopes, younger_than)
        if live is not None:
            for collection in self.collections().keys() - live:
                forget_collection(self._writing, self._namespace, collection, known, before)
        report = drop_unused(self._pool.borrow, self._writing, self._namespace, before)
        with self._pool.borrow() as connection:
            give_back_space(connection)
        return report

    def stats(self) -> StoreStats:
        """Count what is stored; disk bytes are the file's and its log's, all models together."""
        with self._pool.borrow() as connection:
            here = (self._namespace,)
            query = "SELECT COUNT(*), COALESCE(SUM(LENGTH(payload)), 0) FROM states WHERE namespace=?"
            states, payload = connection.execute(query, here).fetchone()
            uses = connection.execute("SELECT COUNT(*) FROM uses WHERE namespace=?", here).fetchone()[0]
            others = connection.execute(
                "SELECT fingerprint, (SELECT COUNT(*) FROM states s WHERE s.namespace=n.id) FROM namespaces n "
                "WHERE fingerprint<>?",
                (self.layout.fingerprint,),
            ).fetchall()
        files = [self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal", "-shm")]
        disk = sum(file.stat().st_size for file in files if file.exists())
        return StoreStats(
            states=states, references=uses, payload_bytes=payload, disk_bytes=disk, other_namespaces=dict(others)
        )

    def close(self) -> None:
        """Close all connections; calls under way finish first. Later calls raise `ClosedError`."""
        self._pool.close()

    @contextlib.contextmanager
    def _writing(self, wait: float | None = None) -> Iterator[sqlite3.Connection]:
        if not self.writable:
            raise translate(sqlite3.OperationalError("opened read-only"), self.path)
        with self._pool.borrow() as connection, transaction(connection, wait):
            yield connection


def read_layout(path: Path, fingerprint: str, timeout: float = 30.0) -> Layout | None:
    """What layout a model's states have in a file, or None when there are none; writes nothing.

    Raises:
        StoreError: If it can't be opened; StoreFormatError if it is foreign or damaged.
    """
    found = _read_layouts(path, timeout, "fingerprint=?", (fingerprint,))
    return found[0] if found else None


def collection_layouts(path: Path, collection_id: str, timeout: float = 30.0) -> list[Layout]:
    """Layouts of all models whose states records of a collection use; writes nothing.

    Raises:
        StoreError: If it can't be opened; StoreFormatError if it is foreign or damaged.
    """
    chosen = "id IN (SELECT namespace FROM uses WHERE collection_id=?)"
    return _read_layouts(path, timeout, chosen, (collection_id,))


def all_layouts(path: Path, timeout: float = 30.0) -> list[Layout]:
    """Layouts of all models that have a namespace in a file; writes nothing.

    Raises:
        StoreError: If it can't be opened; StoreFormatError if it is foreign or damaged.
    """
    return _read_layouts(path, timeout)


def _read_layouts(path: Path, timeout: float, where: str = "1", values: Sequence[object] = ()) -> list[Layout]:
    check_seconds(timeout, "timeout")
    if not path.exists() or path.stat().st_size == 0:
        return []
    try:
        pool, _ = open_pool(path, None, read_only=True, timeout=timeout)
    except EmptyStoreError:  # a process that makes it has not come to its tables yet
        return []
    with contextlib.closing(pool), pool.borrow() as connection:
        return [layout for _, layout in read_namespaces(connection, path, where, values)]
