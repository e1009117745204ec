"""The rows of an SQLite state store that say which models' states are in it, and in what layout.

A namespace's layout turns its payloads into states, so its row is trusted only with its checksum.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kalm_rag.errors import StoreFormatError
from kalm_rag.states import FORMATS, Layout
from kalm_rag.store.connections import REBUILD, transaction

NAMESPACE_COLUMNS = "id, fingerprint, hidden_size, ratio, codec, state_dtype, format"
"""What a namespace's checksum covers, in this order."""


def read_namespace(connection: sqlite3.Connection, fingerprint: str, path: Path) -> tuple[int, Layout] | None:
    """Look up a model's namespace: its number and layout, or None."""
    found = read_namespaces(connection, path, "fingerprint=?", (fingerprint,))
    return found[0] if found else None


def read_namespaces(
    connection: sqlite3.Connection, path: Path, where: str = "1", values: Sequence[object] = ()
) -> list[tuple[int, Layout]]:
    """Read namespaces, all or those of a condition: numbers and layouts. StoreFormatError if damaged or newer."""
    checksum = "checksum" if has_column(connection, "namespaces", "checksum") else "NULL"  # an old file, read-only
    query = f"SELECT {checksum}, {NAMESPACE_COLUMNS} FROM namespaces WHERE {where}"
    return [_read_row(row[1:], row[0], path) for row in connection.execute(query, values).fetchall()]


def _read_row(row: tuple[Any, ...], checksum: object, path: Path) -> tuple[int, Layout]:
    number, *fields = row
    version = fields[-1]
    if version not in FORMATS.values():
        raise StoreFormatError(
            f"{path} holds states in byte format {version}; this release reads {max(FORMATS.values())} at "
            f"most. Upgrade kalm_rag, or index again in another folder."
        )
    if checksum is not None and checksum != namespace_checksum(row):
        raise StoreFormatError(f"{path} is damaged: namespace row {row!r} doesn't match its checksum. {REBUILD}")
    try:
        return number, Layout.of(fields)
    except (ValueError, TypeError) as err:
        raise StoreFormatError(f"{path} is damaged: namespace row {row!r}. {REBUILD}") from err


def make_namespace(connection: sqlite3.Connection, layout: Layout) -> None:
    """Write a model's namespace, unless another process was first."""
    with transaction(connection):
        connection.execute(
            "INSERT OR IGNORE INTO namespaces (fingerprint, hidden_size, ratio, codec, state_dtype, format) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            layout.fields,
        )
        sign_namespaces(connection)


def sign_namespaces(connection: sqlite3.Connection) -> None:
    """Write the checksums that are missing."""
    for row in unsigned_namespaces(connection):
        connection.execute("UPDATE namespaces SET checksum=? WHERE id=?", (namespace_checksum(row), row[0]))


def unsigned_namespaces(connection: sqlite3.Connection) -> list[tuple[object, ...]]:
    """Namespace rows without a checksum: earlier releases write none."""
    return connection.execute(f"SELECT {NAMESPACE_COLUMNS} FROM namespaces WHERE checksum IS NULL").fetchall()


def namespace_checksum(row: Sequence[object]) -> int:
    """CRC-32 over a namespace row (`NAMESPACE_COLUMNS`).

    Each state's own checksum covers the fingerprint, not ratio, codec and dtype: one changed byte there would make
    other states of the same payloads, and wrong scores, without an error.
    """
    return zlib.crc32(repr(tuple(row)).encode())


def has_column(connection: sqlite3.Connection, table: str, column: str) -> bool:
    """Whether a table is there and has a column."""
    query = "SELECT 1 FROM pragma_table_info(?) WHERE name=?"
    return connection.execute(query, (table, column)).fetchone() is not None
