"""Finds the store that fits what the caller has: a folder, a file, a chromadb client, or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Union

from kalm_rag.errors import InputError, StoreError
from kalm_rag.states import Layout
from kalm_rag.store import sqlite
from kalm_rag.store.arguments import check_sweep
from kalm_rag.store.base import GRACE_SECONDS, GcReport, StateStore
from kalm_rag.store.memory import MemoryStore
from kalm_rag.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

FILE_NAME = "kalm_states.sqlite3"
"""Name of the store's file in a folder, beside Chroma's `chroma.sqlite3`."""

MEMORY = ":memory:"

Where = Union[str, "os.PathLike[str]", "ClientAPI"]


def open_store(
    where: Where, layout: Layout, *, name: str = "", read_only: bool = False, timeout: float = 30.0
) -> StateStore:
    """Open the state store of one model, making it if it isn't there.

    Args:
        where: ``":memory:"``; a folder (the store is its `FILE_NAME`, beside Chroma's files); the path of a file that
            ends in ``.sqlite3``; or a chromadb client (a companion collection: only where no folder can be reached).
        layout: How the model's states are kept; `stored_layout` gives what is there.
        name: For a client: the collection that the states belong to. Unused otherwise.
        read_only: Make and write nothing.
        timeout: For a file: seconds to wait while another process writes.

    Raises:
        StoreError: If it can't be opened or made.
        StoreFormatError: If what is there is foreign, damaged or newer than this release.
        StateMismatchError: If the model's states are there with another ratio, codec or width.
        InputError: If `where` is none of these.
    """
    if where == MEMORY:
        return MemoryStore(layout)
    if isinstance(where, (str, os.PathLike)):
        return SqliteStore.open(store_file(where), layout, read_only=read_only, timeout=timeout)
    from kalm_rag.store.chroma import ChromaStore  # here: chromadb takes a second to import

    return ChromaStore.open(_client(where), layout, name=name, read_only=read_only)


def stored_layout(where: Where, fingerprint: str, *, name: str = "", timeout: float = 30.0) -> Layout | None:
    """What layout a model's states have in a store, so that an index can adopt it; None when none are there.

    Takes what `open_store` takes, and raises what it raises. Nothing is made.
    """
    if where == MEMORY:
        return None
    if isinstance(where, (str, os.PathLike)):
        found = sqlite.read_layouts(store_file(where), timeout, "fingerprint=?", (fingerprint,))
        return found[0] if found else None
    from kalm_rag.store import chroma

    return chroma.read_layout(_client(where), fingerprint, name)


def collection_layouts(where: Where, collection_id: str, *, name: str = "", timeout: float = 30.0) -> list[Layout]:
    """Layouts of all models whose stored states a collection's records use, read without any model.

    Who deletes, verifies or sweeps opens each with `open_store` and needs no engine for it. Takes and raises what
    `open_store` does; `collection_id` is ``str(collection.id)`` of Chroma. Nothing is made, and nothing is known of
    ``":memory:"``: the list is empty.
    """
    if where == MEMORY:
        return []
    if isinstance(where, (str, os.PathLike)):
        uses = "id IN (SELECT namespace FROM uses WHERE collection_id=?)"
        return sqlite.read_layouts(store_file(where), timeout, uses, (collection_id,))
    from kalm_rag.store import chroma

    return chroma.collection_layouts(_client(where), collection_id, name)


def sweep_folder(
    where: str | os.PathLike[str],
    live_collections: Iterable[str] | None = None,
    *,
    scopes: Iterable[str] = ("",),
    younger_than: float = GRACE_SECONDS,
) -> GcReport:
    """Run `StateStore.gc` over the states of all models in a folder or ``.sqlite3`` file; needs no model.

    Takes what `StateStore.gc` takes; nothing is made where there is no file. Returns what went, all models together.

    Raises:
        StoreError: If it can't be opened or written; StoreFormatError if it is foreign, damaged or newer.
        InputError: If `where` is no folder or file, or an argument can't be meant.
    """
    file = store_file(where)
    live, known, _ = check_sweep(live_collections, scopes, younger_than)
    report = GcReport()
    for layout in sqlite.read_layouts(file):
        with SqliteStore.open(file, layout) as store:
            report += store.gc(live, scopes=known, younger_than=younger_than)
    return report


def store_file(where: str | os.PathLike[str]) -> Path:
    """Path of the store's file for a folder, or for the file itself. A leading ``~`` is the user's home."""
    text = os.fspath(where)
    if not isinstance(text, str) or not text or "\0" in text:
        raise InputError(f"store path is {text!r}; wanted a folder, a .sqlite3 file or ':memory:'.")
    try:
        path = Path(text).expanduser()
    except RuntimeError as err:
        raise InputError(f"store path is {text!r}: {err}. Write the folder out.") from err
    if path.suffix == ".sqlite3":
        return path
    if path.is_file():
        raise StoreError(f"{path} is a file, not a folder. Name a folder, or a file that ends in .sqlite3.")
    return path / FILE_NAME


def _client(where: object) -> ClientAPI:
    from chromadb.api import ClientAPI

    if isinstance(where, ClientAPI):
        return where
    raise InputError(
        f"store place is {type(where).__name__}; wanted ':memory:', a folder, a path ending in .sqlite3, or a chromadb "
        f"client."
    )
