"""The SQLite file of a state store: its tables, how it is made, opened and recognised.

Knows SQLite and `Layout`; the work on rows is in `sqlite.py`.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from kalm_rag.errors import InputError, StoreError, StoreFormatError
from kalm_rag.states import DTYPES, FORMATS, Codec, Layout
from kalm_rag.store.connections import REBUILD, ConnectionPool, connect, translate, use_wal

LOGGER = logging.getLogger(__name__)
APPLICATION_ID = 0x6B616C6D
"""`kalm`: tells our files from other SQLite files, Chroma's for instance."""

SCHEMA_VERSION = 1
TYPICAL_TOKENS = 100
READ_MODES = ("ro", "immutable")

# `states` is a rowid table with the payload last: WITHOUT ROWID would put the blobs into the B-tree of the keys, and
# finding what is missing would read them. `uses` is small and always looked up by its key, so it is its own index.
TABLES = (
    "CREATE TABLE namespaces (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, hidden_size INTEGER NOT NULL, "
    "ratio INTEGER NOT NULL, codec TEXT NOT NULL, state_dtype TEXT NOT NULL, format INTEGER NOT NULL)",
    "CREATE TABLE states (id INTEGER PRIMARY KEY, namespace INTEGER NOT NULL, key BLOB NOT NULL, "
    "tokens INTEGER NOT NULL, found INTEGER NOT NULL, checksum INTEGER NOT NULL, payload BLOB NOT NULL)",
    "CREATE UNIQUE INDEX states_by_key ON states (namespace, key)",
    "CREATE TABLE uses (namespace INTEGER NOT NULL, collection_id TEXT NOT NULL, record_id TEXT NOT NULL, "
    "key BLOB NOT NULL, PRIMARY KEY (namespace, collection_id, record_id)) WITHOUT ROWID",
    "CREATE INDEX uses_by_key ON uses (namespace, key)",
    f"PRAGMA application_id={APPLICATION_ID}",
    f"PRAGMA user_version={SCHEMA_VERSION}",
)


def page_size(layout: Layout) -> int:
    """Bytes a page, so that disk stays within 1.2 times the payload: the power of two that half a typical state fills.

    SQLite wastes up to a page a row. Measured, payload of 100 tokens -> disk / payload at 16384, 8192, 4096:
    38 kB -> 1.08, 1.04, 1.02; 19 kB -> 1.15, 1.08, 1.04; 10 kB (int8) -> 1.42, 1.15, 1.09. Bigger pages read faster
    when cold only (13, 17, 23 ms for 100 states of 19 kB).
    """
    half = layout.payload_bytes(TYPICAL_TOKENS) // 2
    return min(16384, max(4096, 1 << max(0, half.bit_length() - 1)))


def open_pool(path: Path, layout: Layout, *, read_only: bool, timeout: float) -> tuple[ConnectionPool, bool]:
    """Open the file, making it if it is not there; give its pool and whether it can be written.

    Where folder or file can't be written, reading still works.

    Raises:
        StoreError: If it can't be opened, or isn't there and can't be made.
        StoreFormatError: If it is foreign, damaged or newer than this release.
    """
    if read_only and not path.exists():
        raise StoreError(f"state store {path} doesn't exist, and read_only=True makes none. Index first.")
    problem: sqlite3.Error = sqlite3.OperationalError("unable to open database file")
    for mode in READ_MODES if read_only else ("rwc", *READ_MODES):
        if mode == "immutable" and _has_log(path):
            break  # what is in the log would be passed over: an old state of the file, maybe half checkpointed
        try:
            _prepare(path, mode, layout, timeout)
        except sqlite3.Error as err:
            problem = err
            if not any(word in str(err) for word in ("unable to open", "readonly")):
                break
        else:
            return ConnectionPool(_opener(path, mode, timeout), path), mode == "rwc"
    raise translate(problem, path) from problem


def _prepare(path: Path, mode: str, layout: Layout, timeout: float) -> None:
    with contextlib.closing(connect(path, mode, timeout)) as connection:
        if not recognise(connection, path):
            _create(connection, path, mode, page_size(layout), timeout)


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


def _create(connection: sqlite3.Connection, path: Path, mode: str, page: int, timeout: float) -> None:
    if mode != "rwc":
        raise StoreFormatError(f"{path} holds no state store (it is empty). Index first, with read_only=False.")
    connection.execute(f"PRAGMA page_size={page}")  # before the first table, or it has no effect
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # gc gives space back in steps; a VACUUM locks everyone out
    use_wal(connection, timeout)
    with transaction(connection):
        if not recognise(connection, path):  # another process may have been first
            for statement in TABLES:
                connection.execute(statement)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """One write transaction, all or nothing. Do no computing inside: others wait for it."""
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
        StoreFormatError: If its row can't be read, or its states are in a byte format of a newer release.
    """
    row = connection.execute(
        "SELECT id, hidden_size, ratio, codec, state_dtype, format FROM namespaces WHERE fingerprint=?", (fingerprint,)
    ).fetchone()
    if row is None:
        return None
    number, hidden_size, ratio, codec, state_dtype, version = row
    if version not in FORMATS.values():
        raise StoreFormatError(
            f"{path} holds states in byte format {version}; this release reads {max(FORMATS.values())} at "
            f"most. Upgrade kalm_rag, or index again in another folder."
        )
    try:
        layout = Layout(
            fingerprint=fingerprint,
            hidden_size=int(hidden_size),
            ratio=int(ratio),
            codec=Codec.parse(codec),
            state_dtype=state_dtype,
            keeps_token_ids=version == FORMATS[True],
        )
    except (InputError, ValueError) as err:
        raise StoreFormatError(f"{path} is damaged: namespace row {row!r}. {REBUILD}") from err
    if state_dtype not in DTYPES or layout.ratio < 1 or layout.hidden_size < 1:
        raise StoreFormatError(f"{path} is damaged: namespace row {row!r}. {REBUILD}")
    return number, layout


def make_namespace(connection: sqlite3.Connection, layout: Layout) -> None:
    """Write a model's namespace, unless another process was first."""
    with transaction(connection):
        connection.execute(
            "INSERT OR IGNORE INTO namespaces (fingerprint, hidden_size, ratio, codec, state_dtype, format) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (layout.fingerprint, layout.hidden_size, layout.ratio, layout.codec.value, layout.state_dtype,
             layout.format),
        )  # fmt: skip
