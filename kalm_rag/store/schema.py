"""The SQLite file of a state store: its tables, how it is made, opened, recognised and brought up to date.

Knows SQLite and `Layout`; the work on rows is in `sqlite.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kalm_rag.errors import StoreError, StoreFormatError
from kalm_rag.states import Layout
from kalm_rag.store.connections import REBUILD, ConnectionPool, SqliteErrors, connect, transaction, translate, use_wal
from kalm_rag.store.namespaces import has_column, sign_namespaces, unsigned_namespaces

LOGGER = logging.getLogger(__name__)
APPLICATION_ID = 0x6B616C6D
"""`kalm`: tells our files from other SQLite files, Chroma's for instance."""

SCHEMA_VERSION = 1
"""Raised only by a change that older releases can't live with; tables and columns that they ignore are `ADDED`."""

TYPICAL_TOKENS = 100
KEY_BYTES = 32
READ_MODES = ("ro", "immutable")

STATES_BY_KEY = "CREATE UNIQUE INDEX states_by_key ON states (namespace, key)"
USES_BY_KEY = "CREATE INDEX uses_by_key ON uses (namespace, key)"
COLLECTIONS = (
    "CREATE TABLE collections (namespace INTEGER NOT NULL, collection_id TEXT NOT NULL, scope TEXT NOT NULL, "
    "written INTEGER NOT NULL, PRIMARY KEY (namespace, collection_id)) WITHOUT ROWID"
)

# `states` is a rowid table with the payload last: WITHOUT ROWID would put the blobs into the B-tree of the keys, and
# finding what is missing would read them. `uses` (the references) is small and always looked up by its key, so it is
# its own index. In `states`, `found` is `total_tokens`. `created` and `written` are unix seconds of the last put.
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


class EmptyStoreError(StoreFormatError):
    """The file has no tables: it was opened to be read, and nobody wrote, or another process is making it now."""


def page_size(layout: Layout) -> int:
    """Bytes per page: the power of two that half a typical passage fills.

    SQLite wastes up to a page per row; so the file stays within 1.2 times the payload. Measured, payload of 100 tokens
    -> disk / payload at 16384, 8192, 4096: 38 kB -> 1.08, 1.04, 1.02; 19 kB -> 1.15, 1.08, 1.04; 10 kB (int8) -> 1.42,
    1.15, 1.09. Bigger pages read faster when cold only (13, 17, 23 ms for 100 passages of 19 kB).
    """
    half = layout.payload_bytes(TYPICAL_TOKENS) // 2
    return min(16384, max(4096, 1 << max(0, half.bit_length() - 1)))


def open_pool(path: Path, layout: Layout | None, *, read_only: bool, timeout: float) -> tuple[ConnectionPool, bool]:
    """Open the file, making it if it is not there; give its pool and whether it can be written.

    Where folder or file can't be written, reading still works. `layout` decides the page size of a new file only.
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
    """Tell whether the file is a state store (True) or empty (False); anything else is a StoreFormatError."""
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
        raise EmptyStoreError(f"{path} holds no state store (it is empty). Index first, with read_only=False.")
    connection.execute(f"PRAGMA page_size={page_size(layout)}")  # before the first table, or it has no effect
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # gc gives space back in steps; a VACUUM locks everyone out
    use_wal(connection, timeout)
    with transaction(connection):
        if not recognise(connection, path):  # another process may have been first
            for statement in TABLES:
                connection.execute(statement)


def _upgrade(connection: sqlite3.Connection) -> None:
    """Add what an earlier release's file lacks; takes the write lock only if something does."""
    if _lacks(connection) or unsigned_namespaces(connection):
        with transaction(connection):
            for statement in _lacks(connection):  # asked again: another process may have been first
                connection.execute(statement)
            sign_namespaces(connection)


def _lacks(connection: sqlite3.Connection) -> list[str]:
    return [statement for table, column, statement in ADDED if not has_column(connection, table, column)]


def check_ascending(values: Sequence[Any]) -> None:
    """Refuse, as SQLite does, rows that are out of order: a damaged tree can give the same ones for ever."""
    if not all(isinstance(b, type(a)) and a < b for a, b in itertools.pairwise(values)):
        raise sqlite3.DatabaseError("rows are out of order: the file is malformed")


def marks(values: Sequence[object]) -> str:
    """Question marks of a statement for some values."""
    return ",".join("?" * len(values))
