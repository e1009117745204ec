"""The SQLite file of a state store: its tables, how it is made, opened and recognised.

Knows SQLite and `Layout`; the work on rows is in `sqlite.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kalm_rag.errors import InputError, StoreError, StoreFormatError
from kalm_rag.states import DTYPES, FORMATS, Codec, Layout
from kalm_rag.store.connections import REBUILD, ConnectionPool, SqliteErrors, connect, translate, use_wal

LOGGER = logging.getLogger(__name__)
APPLICATION_ID = 0x6B616C6D
"""`kalm`: tells our files from other SQLite files, Chroma's for instance."""

SCHEMA_VERSION = 1
"""Raised only by a change that older releases can't live with; tables and columns that they ignore are `ADDED`."""

TYPICAL_TOKENS = 100
KEY_BYTES = 32
READ_MODES = ("ro", "immutable")
NAMESPACE_COLUMNS = "id, fingerprint, hidden_size, ratio, codec, state_dtype, format"
"""What a namespace's checksum covers, in this order."""

# `states` is a rowid table with the payload last: WITHOUT ROWID would put the blobs into the B-tree of the keys, and
# finding what is missing would read them. `uses` is small and always looked up by its key, so it is its own index.
STATES_BY_KEY = "CREATE UNIQUE INDEX states_by_key ON states (namespace, key)"
USES_BY_KEY = "CREATE INDEX uses_by_key ON uses (namespace, key)"
COLLECTIONS = (
    "CREATE TABLE collections (namespace INTEGER NOT NULL, collection_id TEXT NOT NULL, scope TEXT NOT NULL, "
    "written INTEGER NOT NULL, PRIMARY KEY (namespace, collection_id)) WITHOUT ROWID"
)
TABLES = (
    "CREATE TABLE namespaces (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, hidden_size INTEGER NOT NULL, "
    "ratio INTEGER NOT NULL, codec TEXT NOT NULL, state_dtype TEXT NOT NULL, format INTEGER NOT NULL, "
    "checksum INTEGER)",
    "CREATE TABLE states (id INTEGER PRIMARY KEY, namespace INTEGER NOT NULL, key BLOB NOT NULL, "
    "tokens INTEGER NOT NULL, found INTEGER NOT NULL, checksum INTEGER NOT NULL, created INTEGER NOT NULL DEFAULT 0, "
    "payload BLOB NOT NULL)",
    STATES_BY_KEY,
    "CREATE TABLE uses (namespace INTEGER NOT NULL, collection_id TEXT NOT NULL, record_id TEXT NOT NULL, "
    "key BLOB NOT NULL, PRIMARY KEY (namespace, collection_id, record_id)) WITHOUT ROWID",
    USES_BY_KEY,
    COLLECTIONS,
    f"PRAGMA application_id={APPLICATION_ID}",
    f"PRAGMA user_version={SCHEMA_VERSION}",
)

# What files of earlier releases lack. They open these files too: every statement names its columns.
ADDED = (
    ("namespaces", "checksum", "ALTER TABLE namespaces ADD COLUMN checksum INTEGER"),
    ("states", "created", "ALTER TABLE states ADD COLUMN created INTEGER NOT NULL DEFAULT 0"),
    ("collections", "scope", COLLECTIONS),
)


def page_size(layout: Layout) -> int:
    """Bytes a page, so that disk stays within 1.2 times the payload: the power of two that half a typical state fills.

    SQLite wastes up to a page a row. Measured, payload of 100 tokens -> disk / payload at 16384, 8192, 4096:
    38 kB -> 1.08, 1.04, 1.02; 19 kB -> 1.15, 1.08, 1.04; 10 kB (int8) -> 1.42, 1.15, 1.09. Bigger pages read faster
    when cold only (13, 17, 23 ms for 100 states of 19 kB).
    """
    half = layout.payload_bytes(TYPICAL_TOKENS) // 2
    return min(16384, max(4096, 1 << max(0, half.bit_length() - 1)))


def open_pool(path: Path, layout: Layout | None, *, read_only: bool, timeout: float) -> tuple[ConnectionPool, bool]:
    """Open the file, making it if it is not there; give its pool and whether it can be written.

    Where folder or file can't be written, reading still works. `layout` decides the page size of a new file only.

    Raises:
        StoreError: If it can't be opened, or isn't there and can't be made.
        StoreFormatError: If it is foreign, damaged or newer than this release.
    """
    if read_only and not path.exists():
        raise StoreError(f"state store {path} doesn't exist, and read_only=True makes none. Index first.")
    problem: sqlite3.Error | UnicodeDecodeError = sqlite3.OperationalError("unable to open database file")
    for mode in READ_MODES if read_only else ("rwc", *READ_MODES):
        if mode == "immutable" and _has_log(path):
            break  # what is in the log would be passed over: an old state of the file, maybe half checkpointed
        try:
            _prepare(path, mode, layout, timeout)
        except SqliteErrors as err:
            problem = err
            if not any(word in str(err) for word in ("unable to open", "readonly")):
                break
        else:
            return ConnectionPool(_opener(path, mode, timeout), path), mode == "rwc"
    raise translate(problem, path) from problem


def _prepare(path: Path, mode: str, layout: Layout | None, timeout: float) -> None:
    with contextlib.closing(connect(path, mode, timeout)) as connection:
        if not recognise(connection, path):
            _create(connection, path, mode, layout, timeout)
        elif mode == "rwc":
            _upgrade(connection)


def _opener(path: Path, mode: str, timeout: float) -> Callable[[], sqlite3.Connection]:
    # "rw", not "rwc": a file deleted under an open store is an error, not a new, empty store without tables
    again = "rw" if mode == "rwc" else mode
    return lambda: connect(path, again, timeout)


def _has_log(path: Path) -> bool:
    log = path.with_name(path.name + "-wal")
    return log.exists() and log.stat().st_size > 0


def recognise(connection: sqlite3.Connection, path: Path) -> bool:
    """Tell whether the file is a state store (True) or empty (False).

    Raises:
        StoreFormatError: If it is another program's, or of a version this release doesn't read.
    """
    # one statement, so one snapshot: read apart, a store being made by another process looks like a foreign file
    application, version, tables = connection.execute(
        "SELECT (SELECT application_id FROM pragma_application_id), (SELECT user_version FROM pragma_user_version), "
        "(SELECT COUNT(*) FROM sqlite_master)"
    ).fetchone()
    if application == 0 and tables == 0:
        return False
    if application != APPLICATION_ID:
        raise StoreFormatError(
            f"{path} is an SQLite file of another program (application_id {application:#x}, wanted "
            f"{APPLICATION_ID:#x}). Nothing was changed. Store states in another folder or file."
        )
    if version > SCHEMA_VERSION:
        raise StoreFormatError(
            f"{path} was written by a newer kalm_rag (schema version {version}; this one reads up to "
            f"{SCHEMA_VERSION}). Upgrade kalm_rag, or store states in another folder."
        )
    if version < 1 or tables == 0:
        raise StoreFormatError(f"{path} is damaged: schema version {version}, {tables} tables. {REBUILD}")
    return True


def _create(connection: sqlite3.Connection, path: Path, mode: str, layout: Layout | None, timeout: float) -> None:
    if mode != "rwc" or layout is None:
        raise StoreFormatError(f"{path} holds no state store (it is empty). Index first, with read_only=False.")
    connection.execute(f"PRAGMA page_size={page_size(layout)}")  # before the first table, or it has no effect
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # gc gives space back in steps; a VACUUM locks everyone out
    use_wal(connection, timeout)
    with transaction(connection):
        if not recognise(connection, path):  # another process may have been first
            for statement in TABLES:
                connection.execute(statement)


@contextlib.contextmanager
def _busy_timeout(connection: sqlite3.Connection, wait: float | None) -> Iterator[None]:
    if wait is None:
        yield
        return
    own = connection.execute("PRAGMA busy_timeout").fetchone()[0]
    connection.execute(f"PRAGMA busy_timeout={int(1000 * wait)}")
    try:
        yield
    finally:
        connection.execute(f"PRAGMA busy_timeout={own}")


def _upgrade(connection: sqlite3.Connection) -> None:
    """Add what an earlier release's file lacks; takes the write lock only if something does."""
    if _lacks(connection) or _unsigned(connection):
        with transaction(connection):
            for statement in _lacks(connection):  # asked again: another process may have been first
                connection.execute(statement)
            _sign(connection)


def _sign(connection: sqlite3.Connection) -> None:
    for row in _unsigned(connection):
        connection.execute("UPDATE namespaces SET checksum=? WHERE id=?", (namespace_checksum(row), row[0]))


def _lacks(connection: sqlite3.Connection) -> list[str]:
    return [statement for table, column, statement in ADDED if not _has_column(connection, table, column)]


def _has_column(connection: sqlite3.Connection, table: str, column: str) -> bool:
    query = "SELECT 1 FROM pragma_table_info(?) WHERE name=?"
    return connection.execute(query, (table, column)).fetchone() is not None


def _unsigned(connection: sqlite3.Connection) -> list[tuple[object, ...]]:
    """Namespace rows without a checksum: earlier releases write none."""
    return connection.execute(f"SELECT {NAMESPACE_COLUMNS} FROM namespaces WHERE checksum IS NULL").fetchall()


def namespace_checksum(row: Sequence[object]) -> int:
    """CRC-32 over a namespace row (`NAMESPACE_COLUMNS`).

    Each state's own checksum covers the fingerprint, not ratio, codec and dtype: one changed byte there would make
    other states of the same payloads, and wrong scores, without an error.
    """
    return zlib.crc32(repr(tuple(row)).encode())


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, wait: float | None = None) -> Iterator[None]:
    """One write transaction, all or nothing. Do no computing inside: others wait for it.

    Args:
        connection: In autocommit.
        wait: Seconds to wait for another writer; None takes the connection's own timeout.
    """
    with _busy_timeout(connection, wait):
        connection.execute("BEGIN IMMEDIATE")  # a deferred one can fail at its first write without waiting
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk may have rolled back already
            connection.execute("ROLLBACK")
        raise


def read_namespace(connection: sqlite3.Connection, fingerprint: str, path: Path) -> tuple[int, Layout] | None:
    """Look up a model's namespace: its number and layout, or None.

    Raises:
        StoreFormatError: If its row is damaged, or its states are in a byte format of a newer release.
    """
    found = read_namespaces(connection, path, "fingerprint=?", (fingerprint,))
    return found[0] if found else None


def read_namespaces(
    connection: sqlite3.Connection, path: Path, where: str = "1", values: Sequence[object] = ()
) -> list[tuple[int, Layout]]:
    """Read namespaces, all or those of a condition: their numbers and layouts.

    Raises:
        StoreFormatError: If a row is damaged, or its states are in a byte format of a newer release.
    """
    checksum = "checksum" if _has_column(connection, "namespaces", "checksum") else "NULL"  # an old file, read-only
    query = f"SELECT {checksum}, {NAMESPACE_COLUMNS} FROM namespaces WHERE {where}"
    return [_read_row(row[1:], row[0], path) for row in connection.execute(query, values).fetchall()]


def _read_row(row: tuple[Any, ...], checksum: object, path: Path) -> tuple[int, Layout]:
    number, fingerprint, hidden_size, ratio, codec, state_dtype, version = row
    if version not in FORMATS.values():
        raise StoreFormatError(
            f"{path} holds states in byte format {version}; this release reads {max(FORMATS.values())} at "
            f"most. Upgrade kalm_rag, or index again in another folder."
        )
    if checksum is not None and checksum != namespace_checksum(row):
        raise StoreFormatError(f"{path} is damaged: namespace row {row!r} doesn't match its checksum. {REBUILD}")
    try:
        layout = Layout(
            fingerprint=fingerprint,
            hidden_size=int(hidden_size),
            ratio=int(ratio),
            codec=Codec.parse(codec),
            state_dtype=state_dtype,
            keeps_token_ids=version == FORMATS[True],
        )
    except (InputError, ValueError, TypeError) as err:
        raise StoreFormatError(f"{path} is damaged: namespace row {row!r}. {REBUILD}") from err
    if state_dtype not in DTYPES or layout.ratio < 1 or layout.hidden_size < 1:
        raise StoreFormatError(f"{path} is damaged: namespace row {row!r}. {REBUILD}")
    return number, layout


def make_namespace(connection: sqlite3.Connection, layout: Layout) -> None:
    """Write a model's namespace, unless another process was first."""
    values = (
        layout.fingerprint,
        layout.hidden_size,
        layout.ratio,
        layout.codec.value,
        layout.state_dtype,
        layout.format,
    )
    with transaction(connection):
        connection.execute(
            "INSERT OR IGNORE INTO namespaces (fingerprint, hidden_size, ratio, codec, state_dtype, format) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            values,
        )
        _sign(connection)


def check_ascending(values: Sequence[Any]) -> None:
    """Refuse a page of rows that is out of order: a damaged tree can give the same rows for ever.

    Raises:
        sqlite3.DatabaseError: As SQLite does for trees that it finds damaged.
    """
    if not all(isinstance(b, type(a)) and a < b for a, b in itertools.pairwise(values)):
        raise sqlite3.DatabaseError("rows are out of order: the file is malformed")


def marks(values: Sequence[object]) -> str:
    """Question marks of a statement for some values."""
    return ",".join("?" * len(values))
