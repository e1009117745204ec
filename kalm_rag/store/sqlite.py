"""The default state store: one SQLite file, beside Chroma's. Standard library only; tables are in `schema.py`."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kalm_rag.errors import StoreError
from kalm_rag.states import Layout
from kalm_rag.store.arguments import check_same_layout, check_seconds
from kalm_rag.store.base import GcReport, StateStore, StoreStats
from kalm_rag.store.connections import ConnectionPool, transaction, translate
from kalm_rag.store.namespaces import make_namespace, read_namespace, read_namespaces
from kalm_rag.store.repair import drop_damaged, find_damage
from kalm_rag.store.rows import Reference, StoredRow, chunked
from kalm_rag.store.schema import EmptyStoreError, check_ascending, marks, open_pool
from kalm_rag.store.sweep import drop_unused, forget_collection, give_back_space

CHUNK = 500  # values in one statement; SQLite's older limit is 999


class SqliteStore(StateStore):
    """States of one model in one SQLite file; many threads and many processes may use it at once.

    A call that returned is kept, whatever happens to the process afterwards (``kill -9`` included). A power cut or a
    crash of the operating system may lose the last calls before it (never parts of a call, never the file): WAL
    with synchronous=NORMAL. Lost states are encoded again on demand.

    Make one with `SqliteStore.open` or `open_store`.
    """

    def __init__(self, pool: ConnectionPool, path: Path, layout: Layout, namespace: int, writable: bool) -> None:
        self.layout = layout
        self.path = path
        self.place = f"state store {path}"
        self.writable = writable
        self._pool = pool
        self._namespace = namespace

    @classmethod
    def open(cls, path: str | Path, layout: Layout, *, read_only: bool = False, timeout: float = 30.0) -> SqliteStore:
        """Open or make the file, its folder and the model's namespace in it, see `open_store`.

        Under `read_only` not even an empty file is written; without it a file that can't be written is read-only, too.
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

    def _read(self, keys: list[str]) -> dict[str, StoredRow]:
        rows: dict[str, StoredRow] = {}
        with self._pool.borrow() as connection:
            for chunk in chunked(keys, CHUNK):
                for key, *rest in connection.execute(
                    "SELECT key, tokens, found, checksum, payload FROM states "
                    f"WHERE namespace=? AND key IN ({marks(chunk)})",
                    (self._namespace, *map(bytes.fromhex, chunk)),
                ):
                    if not isinstance(key, bytes):
                        raise sqlite3.DatabaseError("a key is malformed")
                    rows[key.hex()] = StoredRow(key.hex(), *rest)
        return rows

    def _present(self, keys: list[str]) -> set[str]:
        present = set()
        with self._pool.borrow() as connection:
            for chunk in chunked(keys, CHUNK):  # reads the index of keys only
                query = f"SELECT HEX(key) FROM states WHERE namespace=? AND key IN ({marks(chunk)})"
                for (key,) in connection.execute(query, (self._namespace, *map(bytes.fromhex, chunk))):
                    present.add(key.lower())  # HEX: never None, whatever was damaged
        return present

    def _put(self, rows: list[StoredRow], references: list[Reference], scope: str, wait: float | None) -> None:
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

    def _unreference(self, collection_id: str, record_ids: list[str]) -> int:
        count = 0
        with self._writing() as connection:  # all in one transaction
            for chunk in chunked(record_ids, CHUNK):
                query = f"DELETE FROM uses WHERE namespace=? AND collection_id=? AND record_id IN ({marks(chunk)})"
                count += connection.execute(query, (self._namespace, collection_id, *chunk)).rowcount
        return count

    def _references(self, collection_id: str) -> Iterator[Reference]:
        """By record id, in pages, so that nothing is held while the caller works."""
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
        """Read every state and reference; name what is damaged."""
        return find_damage(self._pool.borrow, self._namespace, self.layout)

    def _discard(self, names: list[str]) -> int:
        return drop_damaged(self._writing, self._namespace, names)

    def _sweep(self, live: set[str] | None, scopes: set[str], before: float) -> GcReport:
        if live is not None:
            for collection in self.collections().keys() - live:
                forget_collection(self._writing, self._namespace, collection, scopes, before)
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
        """Close all connections; calls under way finish first."""
        self._pool.close()

    @contextlib.contextmanager
    def _writing(self, wait: float | None = None) -> Iterator[sqlite3.Connection]:
        if not self.writable:
            raise translate(sqlite3.OperationalError("opened read-only"), self.path)
        with self._pool.borrow() as connection, transaction(connection, wait):
            yield connection


def read_layouts(path: Path, timeout: float = 30.0, where: str = "1", values: Sequence[object] = ()) -> list[Layout]:
    """Layouts of the models that have a namespace in a file, all or those of a condition; writes nothing."""
    check_seconds(timeout, "timeout")
    if not path.exists() or path.stat().st_size == 0:
        return []
    try:
        pool, _ = open_pool(path, None, read_only=True, timeout=timeout)
    except EmptyStoreError:  # a process that makes it has not come to its tables yet
        return []
    with contextlib.closing(pool), pool.borrow() as connection:
        return [layout for _, layout in read_namespaces(connection, path, where, values)]
