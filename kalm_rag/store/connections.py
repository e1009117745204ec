"""SQLite connections for the state store: a pool for threads, safe across forks, and SQLite's errors in our words.

Knows nothing of states or tables.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from kalm_rag.errors import ClosedError, KalmRagError, StoreError, StoreFormatError

LOGGER = logging.getLogger(__name__)
KEEP_IDLE = 8
FORK_WAIT = 5.0
WAL_LIMIT = 4 << 20

REBUILD = "Move the file away and run `kalm-rag verify --repair` or backfill(): states are rebuilt from the texts."


def connect(path: Path, mode: str, timeout: float) -> sqlite3.Connection:
    """Open one connection, in autocommit, usable from any thread (one at a time).

    `mode` is ``rwc``, ``rw``, ``ro``, or ``immutable``: reads a file that nobody writes, in a folder that can't be
    written, where WAL's helper files can't be made. `timeout`: seconds to wait for another process's write.
    """
    query = "mode=ro&immutable=1" if mode == "immutable" else f"mode={mode}"
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?{query}",
        uri=True,
        timeout=timeout,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        # NORMAL: a commit survives the death of the process, not always a power cut (SqliteStore says so).
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(f"PRAGMA journal_size_limit={WAL_LIMIT}")  # or the WAL keeps the size of the largest write
    except BaseException:
        connection.close()
        raise
    return connection


def use_wal(connection: sqlite3.Connection, timeout: float) -> None:
    """Switch to write-ahead logging; SQLite's own timeout doesn't cover this, so wait `timeout` seconds here."""
    end = time.monotonic() + timeout
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as err:
            if "locked" not in str(err) or time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, wait: float | None = None) -> Iterator[None]:
    """One write transaction, all or nothing. Do no computing inside: others wait for it.

    `wait`: seconds to wait for another writer; None takes the connection's own timeout.
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


SqliteErrors = (sqlite3.Error, UnicodeDecodeError)
"""What the driver raises; the second when it quotes a damaged table's text in an error of its own."""


def translate(err: sqlite3.Error | UnicodeDecodeError, path: Path) -> KalmRagError:
    """Say what an error of SQLite means to the store at `path`, and what to do. Raise the result ``from err``."""
    text = str(err)
    for needles, kind, advice in _MEANINGS:
        if any(needle in text for needle in needles):
            return kind(f"state store {path}: {text}. {advice}")
    if type(err) is sqlite3.DatabaseError or isinstance(err, sqlite3.IntegrityError):
        return StoreFormatError(f"state store {path} is damaged: {text}. {REBUILD}")
    return StoreError(f"state store {path}: {text}. Check the disk, then open the store again.")


_MEANINGS: tuple[tuple[tuple[str, ...], type[KalmRagError], str], ...] = (
    (("closed database",), ClosedError, "It was closed; open it again."),
    (("locked", "busy"), StoreError, "Another process is writing; try again, or open with a longer timeout."),
    (
        ("readonly", "read-only"),
        StoreError,
        "It is read-only here, so nothing was written; make file and folder writable or store states elsewhere.",
    ),
    (
        ("full",),
        StoreError,
        "No space is left; nothing of this call was kept. Free space on this disk and repeat (gc frees some, but needs "
        "some to work in).",
    ),
    (("unable to open",), StoreError, "Check that its folder exists and can be read and written."),
    (("not a database",), StoreFormatError, f"It isn't a kalm_rag state store, or its header is damaged. {REBUILD}"),
    (("malformed", "no such", "no column", "decode", "corrupt"), StoreFormatError, f"It is damaged. {REBUILD}"),
)


class ConnectionPool:
    """Connections to one file, one per borrower at a time.

    A fork must find none open: SQLite keeps a table of file locks per process, which the child inherits without the
    locks. Even a child that opens its own connection then skips locking; when the parent closes, the log file is
    deleted under the child and its commits are lost (seen: 3 of 5 rows). So idle connections are closed before
    each `os.fork`, and borrowed ones are waited for.
    """

    def __init__(self, opener: Callable[[], sqlite3.Connection], path: Path) -> None:
        self._opener, self._path = opener, path
        self._condition = threading.Condition()
        self._idle: list[sqlite3.Connection] = []
        self._busy = 0
        self._closed = False
        self._holding = False
        self._pid = os.getpid()
        with _FORKING:
            _POOLS.add(self)

    @contextlib.contextmanager
    def borrow(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection for one short piece of work; SQLite's errors come out as ours."""
        self._start()
        connection: sqlite3.Connection | None = None
        try:
            with self._condition:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = self._opener()
            yield connection
        except SqliteErrors as err:
            raise translate(err, self._path) from err
        finally:
            self._finish(connection)

    def close(self) -> None:
        """Close idle connections now and borrowed ones when they come back. Closing twice is fine."""
        with self._condition:
            self._closed = True
            self._close_idle()

    def _start(self) -> None:
        if os.getpid() != self._pid:  # a fork that ran no hooks
            self.renew()
        with self._condition:
            self._condition.wait_for(lambda: not self._holding)
            if self._closed:
                raise ClosedError(f"state store {self._path} is closed; open it again.")
            self._busy += 1

    def _finish(self, connection: sqlite3.Connection | None) -> None:
        with self._condition:
            self._busy -= 1
            if connection is not None:
                if self._closed or len(self._idle) >= KEEP_IDLE or connection.in_transaction:
                    _close(connection)
                else:
                    self._idle.append(connection)
            self._condition.notify_all()

    def _close_idle(self) -> None:
        while self._idle:
            _close(self._idle.pop())

    def hold(self) -> None:
        """Before a fork: keep borrowers out, wait for those under way, close what is idle."""
        self._condition.acquire()
        self._holding = True
        if not self._condition.wait_for(lambda: not self._busy, timeout=FORK_WAIT):
            LOGGER.warning("forking while %s is in use by another thread; don't use it in the child", self._path)
        self._close_idle()

    def release(self) -> None:
        """After a fork, in the parent: go on."""
        self._holding = False
        self._condition.notify_all()
        self._condition.release()

    def renew(self) -> None:
        """After a fork, in the child: start empty. Connections of the parent are neither used nor closed."""
        _ABANDONED.extend(self._idle)
        self._condition = threading.Condition()
        self._idle = []
        self._busy = 0
        self._holding = False
        self._pid = os.getpid()


def _close(connection: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.Error):
        connection.close()


_POOLS: weakref.WeakSet[ConnectionPool] = weakref.WeakSet()
_HELD: list[ConnectionPool] = []
_ABANDONED: list[sqlite3.Connection] = []  # kept alive for good: closing a parent's connection would drop its log
_FORKING = threading.Lock()


def _before_fork() -> None:
    _FORKING.acquire()
    _HELD.extend(_POOLS)
    for pool in _HELD:
        pool.hold()


def _after_fork_in_parent() -> None:
    for pool in _HELD:
        pool.release()
    _HELD.clear()
    _FORKING.release()


def _after_fork_in_child() -> None:
    global _FORKING
    for pool in _HELD:
        pool.renew()
    _HELD.clear()
    _FORKING = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
