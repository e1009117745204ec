"""The Chroma side of an index: clients, collections, their records, and where a database's states live.

With `index.py`, `store/chroma.py` and the framework adapters, the only place that imports Chroma.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chromadb
import numpy as np
from chromadb.api.client import Client
from chromadb.api.shared_system_client import SharedSystemClient
from chromadb.api.types import validate_metadata
from chromadb.config import Settings
from chromadb.errors import NotFoundError

from kalm_rag.checks import check_passages
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.embedders import BUNDLED, Embedder
from kalm_rag.states import Codec
from kalm_rag.store import StateStore, open_store, stored_layout

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

EMBEDDER_KEY = "kalm_rag:embedder"
"""Collection metadata key that names what made its vectors."""
MODEL_KEY = "kalm_rag:model"
"""Collection metadata key that names the model whose states lie beside it."""
PAGE = 1000
"""Records a call: far below Chroma's limits on batches and results."""
_SAME_VECTOR = 0.95
"""Cosine above which two vectors of one text count as made by the same embedder (other weights give far less)."""


def open_client(path: str | os.PathLike[str] | None) -> ClientAPI:
    """Open a persistent Chroma database, made if absent; one in memory for None.

    A database that this process has open already keeps the settings it was opened with.

    Raises:
        InputError: If the path is a file.
    """
    if path is None:
        return chromadb.EphemeralClient(settings=_settings("ephemeral"))
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; wanted the folder of a Chroma database.")
    return chromadb.PersistentClient(str(folder), settings=_settings(str(folder)))


def _settings(identifier: str) -> Settings:
    """Settings for a new client: those in use, or else Chroma's own defaults.

    Chroma refuses to open a database twice in one process with different settings; with the defaults, a plain client
    that the app opens later still can. (Chroma's product telemetry does nothing since 1.5.)
    """
    system = SharedSystemClient._identifier_to_system.get(identifier)
    return Settings() if system is None else system.settings


def open_states(
    client: ClientAPI, name: str, engine: Reranker, *, codec: str | Codec | None = None, ratio: int | None = None
) -> StateStore:
    """Open the states that belong to a client's database: a file beside it, in memory, or a companion collection.

    Args:
        client: Persistent, ephemeral or HTTP.
        name: The collection; a companion collection is named after it.
        engine: Whose states; its ratio is taken for a new store.
        codec: None takes what is stored, or else exact.
        ratio: None takes what is stored, or else the engine's.

    Raises:
        StateMismatchError: If states are stored at another ratio or codec than asked for.
        StoreError: If the store can't be opened; StoreFormatError if it is damaged.
    """
    settings = client.get_settings()
    remote = settings.chroma_server_host is not None
    where: Any = client if remote else Path(settings.persist_directory) if settings.is_persistent else ":memory:"
    layout = (engine.at(ratio) if ratio is not None else engine).layout(codec if codec is not None else Codec.EXACT)
    there = stored_layout(where, layout.fingerprint, name=name)
    if there is not None:
        layout = replace(
            layout,
            ratio=there.ratio if ratio is None else layout.ratio,
            codec=there.codec if codec is None else layout.codec,
        )
    return open_store(where, layout, name=name)


def collection_model(client: ClientAPI, name: str) -> str | None:
    """Name of the model that a collection was made with, where it says so."""
    try:
        metadata = client.get_collection(name, embedding_function=None).metadata
    except (NotFoundError, ValueError):
        return None
    return str(metadata[MODEL_KEY]) if metadata and MODEL_KEY in metadata else None


def open_collection(client: ClientAPI, name: str, embedder: Embedder, *, model: str, create: bool) -> Collection:
    """Get a collection as it is, or make one; its own embedding function is never run.

    Args:
        client: Where.
        name: Which.
        embedder: What makes, or made, its vectors.
        model: Name of the reranking model, noted in a new collection.
        create: Make it if it is absent.

    Raises:
        InputError: If it is absent under ``create=False`` (the message lists those there are), or its vectors were
            made by another embedder.
    """
    try:
        collection = client.get_collection(name, embedding_function=None)
    except (NotFoundError, ValueError) as err:
        if not create:
            names = ", ".join(sorted(c.name for c in client.list_collections())) or "none"
            raise InputError(
                f"no collection {name!r} in this database; it has: {names}. Index some text first."
            ) from err
    else:
        _check_vectors(collection, embedder)
        return collection
    return client.create_collection(
        name,
        embedding_function=None,
        metadata={EMBEDDER_KEY: embedder.name, MODEL_KEY: model},
        configuration={"hnsw": {"space": "cosine"}},
    )


def records(collection: Collection, *, texts: bool = True) -> Iterator[tuple[list[str], list[str | None]]]:
    """All records of a collection, page by page: ids, and texts if asked for (else None)."""
    offset = 0
    while True:
        page = collection.get(limit=PAGE, offset=offset, include=["documents"] if texts else [])
        if not page["ids"]:
            return
        yield page["ids"], page["documents"] if texts else [None] * len(page["ids"])
        offset += len(page["ids"])


def check_records(
    ids: Sequence[str], texts: Sequence[str], metadatas: Sequence[Mapping[str, Any] | None] | None
) -> tuple[list[str], list[str], list[dict[str, Any] | None]]:
    """Check one call's records before anything is written; copies, so that nothing of the caller's is kept.

    Raises:
        InputError: If an id occurs twice, lengths differ, a text is no valid string, or Chroma can't keep metadata.
    """
    checked_ids = check_passages(ids)
    checked = check_passages(texts)
    given = metadatas if metadatas is not None else [None] * len(checked_ids)
    metas = [dict(m) if m else None for m in given]  # Chroma refuses an empty mapping
    if not len(checked_ids) == len(checked) == len(metas):
        raise InputError(f"got {len(checked_ids)} ids, {len(checked)} texts, {len(metas)} metadatas; wanted one each.")
    seen: set[str] = set()
    for i in checked_ids:
        if i in seen:
            raise InputError(f"id {i!r} occurs twice in one call; wanted distinct ids.")
        seen.add(i)
    for i, meta in zip(checked_ids, metas, strict=True):
        if meta is not None:
            try:
                validate_metadata(meta)  # Chroma does, but when states and references are already written
            except (ValueError, TypeError) as err:
                raise InputError(f"metadata of {i!r}: {err}") from err
    return checked_ids, checked, metas


def typed(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as filters see it: 1, 1.0 and True are three values, and None is no value."""
    return {key: repr(value) for key, value in metadata.items() if value is not None}


def live_collections(client: ClientAPI, store: StateStore) -> list[str]:
    """Ids whose references `StateStore.gc` must keep: a folder's states serve the collections of all its databases.

    Ids that are no UUID aren't Chroma's, so they are somebody's who uses the store without it.
    """
    live = [str(collection.id) for collection in client.list_collections()]
    live += [name for name in store.collections() if not _is_uuid(name)]
    local: Any = client
    if local._system.settings.chroma_server_host is not None:
        return live
    for database in local._admin_client.list_databases(tenant=client.tenant):
        if database["name"] != client.database:
            with closing(Client.from_system(local._system, tenant=client.tenant, database=database["name"])) as other:
                live += [str(collection.id) for collection in other.list_collections()]
    return live


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def _check_vectors(collection: Collection, embedder: Embedder) -> None:
    """Refuse a collection whose vectors come from another embedder; a search would give nonsense silently."""
    told = (collection.metadata or {}).get(EMBEDDER_KEY)
    if told == embedder.name == BUNDLED:
        return  # one model has this name; an app's embedder goes by its class, which many models share
    sample = collection.get(limit=1, include=["documents", "embeddings"])
    if not sample["ids"] or sample["documents"] is None or sample["documents"][0] is None:
        return
    stored = np.asarray(sample["embeddings"][0], dtype=np.float32)
    ours = embedder.passages([sample["documents"][0]])[0]
    norm = float(np.linalg.norm(stored) * np.linalg.norm(ours))
    cosine = float(stored @ ours) / norm if stored.shape == ours.shape and norm else 0.0
    if cosine < _SAME_VECTOR:
        raise InputError(
            f"collection {collection.name!r} holds vectors of width {len(stored)} made by "
            f"{told or 'another embedder'}; {embedder.name} gives width {len(ours)} (cosine {cosine:.2f} for "
            f"record {sample['ids'][0]!r}). Pass embedder= with the one the collection was filled with."
        )
