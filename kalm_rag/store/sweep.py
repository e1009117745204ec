"""Garbage of an SQLite store: references of collections that are gone, and states that nothing refers to.

Works in short transactions, each of which asks again: readers are not held up, other writers only for moments.
"""

from __future__ import annotations

import sqlite3

from kalm_rag.store.base import GcReport
from kalm_rag.store.repair import DROP_ROWS, Lender
from kalm_rag.store.rows import chunked
from kalm_rag.store.schema import marks

FORGET_ROWS = 5000  # references dropped in one transaction
_UNUSED = "NOT EXISTS (SELECT 1 FROM uses u WHERE u.namespace=s.namespace AND u.key=s.key)"


def forget_collection(writing: Lender, namespace: int, collection: str, scopes: set[str], before: float) -> None:
    """Drop a collection's references, unless it is of another database or was written to since `before`."""
    here = (namespace, collection)
    known = "SELECT scope, written FROM collections WHERE namespace=? AND collection_id=?"
    some = (
        "DELETE FROM uses WHERE namespace=? AND collection_id=? AND record_id IN "
        f"(SELECT record_id FROM uses WHERE namespace=? AND collection_id=? LIMIT {FORGET_ROWS})"
    )
    while True:
        with writing() as connection:
            row = connection.execute(known, here).fetchone()
            scope, written = row if row is not None else ("", 0)  # of an earlier release
            if scope not in scopes or written > before:
                return
            if not connection.execute(some, here * 2).rowcount:
                connection.execute("DELETE FROM collections WHERE namespace=? AND collection_id=?", here)
                return


def drop_unused(reading: Lender, writing: Lender, namespace: int, before: float) -> GcReport:
    """Drop states that nothing refers to and that were stored, or put again, up to `before` (unix seconds)."""
    with reading() as connection:
        query = f"SELECT id FROM states s WHERE namespace=? AND {_UNUSED}"
        candidates = [row[0] for row in connection.execute(query, (namespace,))]
    report = GcReport()
    for chunk in chunked(candidates, DROP_ROWS):
        # Asked again: a writer may have come between. Age is asked here only: in files of earlier releases it stands
        # behind the payload, and reading it for every state would read the whole file.
        chosen = f"id IN ({marks(chunk)}) AND {_UNUSED} AND created<={before!r}"
        with writing() as connection:
            query = f"SELECT COUNT(*), COALESCE(SUM(LENGTH(payload)), 0) FROM states s WHERE {chosen}"
            count, size = connection.execute(query, chunk).fetchone()
            connection.execute(f"DELETE FROM states AS s WHERE {chosen}", chunk)
        report += GcReport(states=count, payload_bytes=size)
    with writing() as connection:  # what is known of collections that have no records any more
        here = "namespace=c.namespace AND collection_id=c.collection_id"
        connection.execute(f"DELETE FROM collections AS c WHERE NOT EXISTS (SELECT 1 FROM uses WHERE {here})")
    return report


def give_back_space(connection: sqlite3.Connection) -> None:
    """Give free pages back to the disk, in steps."""
    before = -1
    while (free := connection.execute("PRAGMA freelist_count").fetchone()[0]) not in (0, before):
        before = free
        connection.executescript("PRAGMA incremental_vacuum(256)")  # execute() would free one page only
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()  # waits for nobody
