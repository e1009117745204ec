"""A door's hold on one Chroma database: its client, its write lock, and when what it sees is old.

Chroma keeps a collection's vector index in memory, per process. A process that has it open doesn't see what another
one adds, and when it writes, what the other wrote is lost or the collection is dead. So every door writes inside
`Database.writing`: one writer at a time per folder, and a door whose view is old opens its client again first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import chromadb
from chromadb.api.client import Client
from chromadb.api.shared_system_client import SharedSystemClient
from chromadb.config import Settings
from filelock import FileLock, Timeout

from kalm_rag.errors import ClosedError, InputError, StoreError

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

logger = logging.getLogger(__name__)

LOCK_FILE = ".kalm_rag_write.lock"
"""In the folder of a persistent Chroma database; held while a door writes. The system frees it when a process dies."""
NEXT_FILE = ".kalm_rag_next.lock"
"""Beside it; held by who waits for the other one, so that a busy writer lets the next in line in before it goes on."""
WRITER_FILE = ".kalm_rag_writer"
"""Beside it: the last write, begun or done. Whoever opened the database before sees an old state of it."""
LOCK_SECONDS = 60.0
"""How long a door waits for another process's write."""

LOCKED_SECONDS = 10.0
"""How long opening waits while another process has Chroma's file locked (Chroma itself waits for minutes)."""

POLL_SECONDS = 0.01

_folder_locks: dict[str, _FolderLocks] = {}
_folder_locks_guard = threading.Lock()
_last_seen: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()


class Database:
    """A Chroma client, whose it is, and where it keeps its data.

    Args:
        client: The client.
        owned: Whether `close` closes it and `refresh` may open it again. A client of the app's stays as it is.
        last_write: The write that was the last one when the client was opened; None takes that of now.
    """

    def __init__(self, client: ClientAPI, *, owned: bool = False, last_write: str | None = None) -> None:
        settings: Any = client.get_settings()
        self.owned = self._closes = owned
        self.remote = settings.chroma_server_host is not None
        persistent = not self.remote and bool(settings.is_persistent)
        self.folder = Path(settings.persist_directory).resolve() if persistent else None
        self.lock_seconds = LOCK_SECONDS
        self._client: ClientAPI | None = client
        self._watchers: list[weakref.WeakMethod[Callable[[], None]]] = []
        if self.folder is not None:
            _last_seen.setdefault(_server(client), last_write if last_write is not None else _last_write(self.folder))

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, *, create: bool = True, **client_fields: str) -> Database:
        """Open a persistent Chroma database; one in memory for None. A ``~`` is the home folder.

        Args:
            path: Its folder.
            create: Make the folder if there is no database in it.
            **client_fields: ``tenant`` and ``database`` of the client.

        Raises:
            InputError: If the path is a file, or no database under ``create=False``; nothing is made then.
            StoreError: If Chroma can't open it.
        """
        folder = None if path is None else read_folder(path)
        if folder is not None and not create and not (folder / "chroma.sqlite3").exists():
            raise InputError(f"no Chroma database in {path}. Index some text first, or name another folder.")
        before = None if folder is None else _last_write(folder)  # or a write meanwhile would be missed
        return cls(_open_client(folder, **client_fields), owned=True, last_write=before)

    @classmethod
    def of_collection(cls, collection: Collection) -> Database:
        """The database that an open collection of the app's is from, over the same connection."""
        system = cast("Any", collection._client)._system
        made = cls(Client.from_system(system, tenant=collection.tenant, database=collection.database))
        made._closes = True
        return made

    @property
    def client(self) -> ClientAPI:
        """The client; ClosedError after `close`."""
        if self._client is None:
            raise ClosedError("this Chroma database was closed. Open it again.")
        return self._client

    @property
    def scope(self) -> str:
        """Names the database to a state store that several databases share; "" in memory.

        A folder is one database here, whatever tenants are in it: they can all be listed.
        """
        if not self.remote:
            return "" if self.folder is None else str(self.folder)
        client: Any = self.client
        settings = client.get_settings()
        place = f"{settings.chroma_server_host}:{settings.chroma_server_http_port}"
        return f"{place}|{client.tenant}|{client.database}"

    @property
    def outdated(self) -> bool:
        """Whether another process has written since the client was opened, and is done; then `refresh` shows it."""
        if self.folder is None:
            return False
        last = _last_write(self.folder)
        return last != _last_seen.get(_server(self.client), "") and not last.endswith(_BEGUN)

    def watch(self, callback: Callable[[], None]) -> None:
        """Call a method whenever the client was opened again, so that its owner gets its collection anew."""
        self._watchers.append(cast("Any", weakref.WeakMethod(cast("Any", callback))))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer of the folder for the length of the block; wait for another one before.

        Raises:
            StoreError: If another process keeps writing for `lock_seconds`; or if one has written since a client of
                the app's was opened: its view is old, and writing with it would lose vectors.
        """
        if self.folder is None:
            yield
            return
        locks = _folder_lock(self.folder)
        with locks.threads:
            try:
                locks.acquire(self.lock_seconds)
            except Timeout as err:
                raise StoreError(
                    f"another process has been writing to the Chroma database {self.folder} for "
                    f"{self.lock_seconds:.0f} s. Wait until it is done, or stop it; nothing of this call was written."
                ) from err
            except OSError as err:
                raise StoreError(
                    f"the Chroma database {self.folder} can't be locked for writing ({err}). Make the folder writable."
                ) from err
            try:
                if locks.depth() > 1:  # inside another block of this thread, which says what is written
                    yield
                    return
                last = _last_write(self.folder)
                if _last_seen.get(_server(self.client), "") != last or last.endswith(_BEGUN):
                    self._catch_up()
                self._sign(_BEGUN)
                try:
                    yield
                finally:
                    self._sign(_DONE)
            finally:
                locks.write.release()

    def check_room(self) -> None:
        """Refuse to write where hardly any room is left: Chroma's add may wait for ever on a full disk.

        Raises:
            StoreError: If less than `LEAST_FREE` bytes are free on the folder's disk.
        """
        if self.folder is None:
            return
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError:  # the folder is gone, say: writing tells why
            return
        if free < LEAST_FREE:
            raise StoreError(
                f"the disk of {self.folder} has {free >> 20} MB left; wanted {LEAST_FREE >> 20} MB: on a full disk "
                f"Chroma may wait for ever. Free space; nothing of this batch was written."
            )

    def refresh(self) -> None:
        """Open the client again, to see what other processes wrote since.

        Raises:
            InputError: If the client is the app's own: open another one, and the door over it.
        """
        client: Any = self.client
        if self.folder is None:  # one memory, or one server: always up to date
            return
        if not self.owned:
            raise InputError(
                "this door was given its Chroma client, which can't be opened again from here. Make a new client "
                "(after client.close()) and open the door over it, or open by path."
            )
        fields = {"tenant": client.tenant, "database": client.database}
        identifier = client._identifier
        current = SharedSystemClient._identifier_to_system.get(identifier)
        if current is _system(client):  # who still uses it, other threads too, goes on with it; new clients get another
            SharedSystemClient._identifier_to_system.pop(identifier, None)
        for _ in range(_HANDLES):
            SharedSystemClient._decrement_refcount(identifier)
        client._closed = True
        before = _last_write(self.folder)
        self._client = _open_client(self.folder, **fields)
        _last_seen.setdefault(_server(self._client), before)
        for watcher in self._watchers:
            callback = watcher()
            if callback is not None:
                callback()

    def close(self) -> None:
        """Close the client if it is ours. Closing twice is fine."""
        client, self._client = self._client, None
        if client is not None and self._closes:
            with contextlib.suppress(Exception):  # Chroma may have been shut down before
                client.close()

    def _catch_up(self) -> None:
        if not self.owned:
            raise StoreError(
                f"another process has written to the Chroma database {self.folder} since this client was opened; "
                f"writing now would lose vectors. Close the client, open a new one, and open this door again."
            )
        logger.info("another process wrote to %s: opening it again", self.folder)
        self.refresh()

    def _sign(self, state: str) -> None:
        """Note that a write begins, or is done: who opened the database before or meanwhile sees an old state of it."""
        if self.folder is not None:
            name = f"{uuid.uuid4().hex} {state}"
            try:
                (self.folder / WRITER_FILE).write_text(name, encoding="ascii")
            except OSError as err:
                raise StoreError(
                    f"{self.folder / WRITER_FILE} can't be written ({err}). Free space, or make the folder writable."
                ) from err
            _last_seen[_server(self.client)] = name


LEAST_FREE = 64 * 2**20
"""Bytes that must be free on a folder's disk before records are written: some ten batches' worth."""
_BEGUN, _DONE = "begun", "done"
_HANDLES = 2
"""References that one client holds on Chroma's system: its own and its admin client's."""


def _open_client(folder: Path | None, **fields: str) -> ClientAPI:
    if folder is None:
        return chromadb.EphemeralClient(settings=_settings("ephemeral"), **fields)
    _check_unlocked(folder)
    try:
        return chromadb.PersistentClient(str(folder), settings=_settings(str(folder)), **fields)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as err:  # Chroma's Rust part raises panics as BaseException
        if str(folder) not in SharedSystemClient._identifier_to_refcount:  # half made, it would be the next one's
            SharedSystemClient._identifier_to_system.pop(str(folder), None)
        raise StoreError(
            f"Chroma can't open the database {folder} ({type(err).__name__}: {str(err)[:200]}). Check that the folder "
            f"can be read and written, and that tenant and database exist."
        ) from err


def read_folder(path: str | os.PathLike[str]) -> Path:
    """The folder that a path names: one folder, one client, however it is spelled."""
    if path == "":  # a variable that was never set, not the working folder
        raise InputError("path is empty, which is no folder here. Name the folder of a Chroma database, or '.'.")
    try:
        folder = Path(path).expanduser().resolve()
        is_file = folder.exists() and not folder.is_dir()
    except (TypeError, ValueError, RuntimeError, OSError) as err:  # bytes; a NUL; no such user's home; too long
        raise InputError(
            f"path is {path!r:.200}, which is no folder here ({type(err).__name__}: {str(err)[:80]}). "
            f"Name the folder of a Chroma database."
        ) from err
    if is_file:
        raise InputError(f"{folder} is a file; wanted the folder of a Chroma database.")
    return folder


def _settings(identifier: str) -> Settings:
    """Settings for a new client: those in use, or else Chroma's own defaults.

    Chroma refuses to open a database twice in one process with different settings; with the defaults, a plain client
    that the app opens later still can. (Chroma's product telemetry does nothing since 1.5.)
    """
    system = SharedSystemClient._identifier_to_system.get(identifier)
    return Settings() if system is None else system.settings


def _server(client: ClientAPI) -> object:
    """What holds the vector index in memory; all clients over one Chroma system share it."""
    return cast("Any", client)._server


def _system(client: ClientAPI) -> object:
    return cast("Any", _server(client))._system


def _last_write(folder: Path) -> str:
    try:
        return (folder / WRITER_FILE).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


class _FolderLocks:
    """A lock among threads, and two among processes (a `FileLock` alone lets all threads of a process in).

    Who wants to write takes the lock of the next in line first and gives it up once it writes: so two processes that
    write without a pause take turns, though neither is told when the other is done.
    """

    def __init__(self, folder: Path) -> None:
        self.threads = threading.RLock()
        self.write = FileLock(str(folder / LOCK_FILE), thread_local=False)
        self._next = FileLock(str(folder / NEXT_FILE), thread_local=False)

    def depth(self) -> int:
        """How many blocks of the thread that has `threads` are inside each other."""
        return self.write.lock_counter

    def acquire(self, seconds: float) -> None:
        """Take the write lock; reentrant within a thread that has `threads`."""
        if self.write.is_locked:
            self.write.acquire()
            return
        with self._next.acquire(timeout=seconds, poll_interval=POLL_SECONDS):
            self.write.acquire(timeout=seconds, poll_interval=POLL_SECONDS)


def _folder_lock(folder: Path) -> _FolderLocks:
    with _folder_locks_guard:
        return _folder_locks.setdefault(str(folder), _FolderLocks(folder))


def _check_unlocked(folder: Path) -> None:
    """Refuse by name what Chroma would wait for without a word and without an end."""
    file = folder / "chroma.sqlite3"
    if not file.exists():
        return
    with contextlib.closing(sqlite3.connect(file, timeout=LOCKED_SECONDS, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError as err:
            if "locked" in str(err):
                raise StoreError(
                    f"the Chroma database {folder} has been locked by another process for {LOCKED_SECONDS:.0f} s. "
                    f"Wait until it is done, or stop it, then open again."
                ) from err
        except sqlite3.DatabaseError as err:
            raise StoreError(f"{file} is no Chroma database, or is damaged ({err}). Name another folder.") from err
