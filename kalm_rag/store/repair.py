"""Damage in an SQLite store: found by reading every row, and dropped, so that backfill can encode anew.

A changed byte in a key is worse than one in a payload: the row and its index then disagree, and SQLite refuses
whatever has to change both. Such rows are named by number, and dropped with the index rebuilt around them.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from kalm_rag.errors import InputError
from kalm_rag.states import Layout
from kalm_rag.store.arguments import DAMAGED_INDEX, DAMAGED_ROW, is_row_name
from kalm_rag.store.rows import StoredRow, chunked, damage
from kalm_rag.store.schema import KEY_BYTES, STATES_BY_KEY, USES_BY_KEY, check_ascending, marks

PAGE_ROWS = 64  # rows read at a time where all are read: memory stays flat
DROP_ROWS = 200  # rows deleted in one transaction: other writers wait only so long

Lender = Callable[[], AbstractContextManager[sqlite3.Connection]]
"""Lends a connection, for reading or within a write transaction."""


def find_damage(reading: Lender, namespace: int, layout: Layout) -> list[str]:
    """Read every state and reference of a namespace; give names of what is damaged, for `drop_damaged`.

    Rows of no namespace at all are told too: theirs was changed, and nobody else would find them.
    """
    wrong: list[str] = []
    last = -1
    while True:
        with reading() as connection, _snapshot(connection):
            page = connection.execute(  # NOT INDEXED: in the order of the file, not of the keys
                "SELECT id, namespace, key, tokens, found, checksum, payload FROM states NOT INDEXED "
                "WHERE id>? AND (namespace=? OR namespace IS NULL OR namespace NOT IN (SELECT id FROM namespaces)) "
                f"ORDER BY id LIMIT {PAGE_ROWS}",
                (last, namespace),
            ).fetchall()
            check_ascending([last, *(row[0] for row in page)])
            indexed = _indexed(connection, namespace, [row[2] for row in page])
        for number, own, key, *rest in page:
            if own != namespace or indexed.get(key) != number:
                wrong.append(f"{DAMAGED_ROW}{number}")
            elif damage(StoredRow(key.hex(), *rest), layout):
                wrong.append(key.hex())
        if len(page) < PAGE_ROWS:
            break
        last = page[-1][0]
    with reading() as connection:
        return wrong + ([DAMAGED_INDEX] if _index_damaged(connection) else [])


def drop_damaged(writing: Lender, namespace: int, names: list[str]) -> int:
    """Drop states by key, or what `find_damage` named (each name once); returns how many states went."""
    rows = [_row_number(name) for name in names if is_row_name(name)]
    keys = [bytes.fromhex(name) for name in names if not is_row_name(name) and name != DAMAGED_INDEX]
    count = 0
    if rows or DAMAGED_INDEX in names:
        with writing() as connection:
            count += _drop_rows(connection, rows)
            _drop_damaged_references(connection)
    for chunk in chunked(keys, DROP_ROWS):
        with writing() as connection:
            query = f"DELETE FROM states WHERE namespace=? AND key IN ({marks(chunk)})"
            count += connection.execute(query, (namespace, *chunk)).rowcount
    return count


@contextlib.contextmanager
def _snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """One state of the file for several reads: a row that goes in between would look damaged."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        if connection.in_transaction:
            connection.execute("COMMIT")


def _indexed(connection: sqlite3.Connection, namespace: int, keys: list[Any]) -> dict[bytes, int]:
    """Row numbers by key as the index has them, of those keys that can be keys."""
    sound = [key for key in keys if isinstance(key, bytes) and len(key) == KEY_BYTES]
    query = f"SELECT key, id FROM states INDEXED BY states_by_key WHERE namespace=? AND key IN ({marks(sound)})"
    return dict(connection.execute(query, (namespace, *sound)).fetchall())


def _row_number(name: str) -> int:
    number = name.removeprefix(DAMAGED_ROW)
    if not (number.isascii() and number.isdigit() and len(number) < 19):
        raise InputError(f"name is {name!r}; wanted a row number behind {DAMAGED_ROW!r}, as verify() gives it.")
    return int(number)


def _drop_rows(connection: sqlite3.Connection, rows: list[int]) -> int:
    """Drop rows whatever the index says of them, and make the index anew."""
    connection.execute("DROP INDEX states_by_key")
    count = 0
    for chunk in chunked(rows, DROP_ROWS):
        count += connection.execute(f"DELETE FROM states WHERE id IN ({marks(chunk)})", chunk).rowcount
    # a row that lost its place in the index may have been stored again
    newest = "SELECT MAX(id) FROM states GROUP BY namespace, key"
    count += connection.execute(f"DELETE FROM states WHERE id NOT IN ({newest})").rowcount
    connection.execute(STATES_BY_KEY)
    return count


_SOUND_REFERENCE = (
    f"typeof(u.key)='blob' AND length(u.key)={KEY_BYTES} AND EXISTS (SELECT 1 FROM uses v INDEXED BY uses_by_key WHERE "
    "v.namespace=u.namespace AND v.key=u.key AND v.collection_id=u.collection_id AND v.record_id=u.record_id)"
)
"""Table and index are two copies of a reference: a changed byte in either makes them differ."""

USES_TABLE = "sqlite_autoindex_uses_1"
"""The table itself, as an index's name: NOT INDEXED would read the index, which covers every column."""


def _index_damaged(connection: sqlite3.Connection) -> bool:
    last: tuple[Any, ...] = (0, b"")
    query = "SELECT namespace, key FROM states INDEXED BY states_by_key ORDER BY namespace, key"
    for entry in connection.execute(query):
        if not (isinstance(entry[0], int) and isinstance(entry[1], bytes) and last < entry):
            return True
        last = entry
    query = f"SELECT EXISTS (SELECT 1 FROM uses u INDEXED BY {USES_TABLE} WHERE NOT ({_SOUND_REFERENCE}))"
    return bool(connection.execute(query).fetchone()[0])


def _drop_damaged_references(connection: sqlite3.Connection) -> None:
    """Keep what table and index agree on; backfill writes the others again."""
    sound = (
        f"SELECT namespace, collection_id, record_id, key FROM uses u INDEXED BY {USES_TABLE} WHERE {_SOUND_REFERENCE}"
    )
    connection.execute(f"CREATE TEMP TABLE sound AS {sound}")
    connection.execute("DROP INDEX uses_by_key")
    connection.execute("DELETE FROM uses")
    connection.execute("INSERT OR IGNORE INTO uses (namespace, collection_id, record_id, key) SELECT * FROM temp.sound")
    connection.execute("DROP TABLE temp.sound")
    connection.execute(USES_BY_KEY)
