"""A Chroma collection as an index sees it: what made it (its notes), its records, and what it can keep.

With `clients.py`, `store/chroma.py` and the framework adapters, the only place that imports Chroma.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from chromadb.api.client import Client
from chromadb.api.types import validate_metadata
from chromadb.errors import InvalidArgumentError, NotFoundError, UniqueConstraintError

from kalm_rag.checks import check_items, check_passages, check_text
from kalm_rag.errors import InputError, KalmRagError, StateMismatchError, StoreError
from kalm_rag.index.clients import Database
from kalm_rag.index.embedders import BUNDLED, Embedder
from kalm_rag.index.passage_rule import DOCUMENT, PassageRule

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

    from kalm_rag.store import StateStore

logger = logging.getLogger(__name__)

NOTE = "kalm_rag:"
"""What the keys of our notes in a collection's metadata begin with."""
PAGE = 1000
"""Records a call: far below Chroma's limits on batches and results."""
MOST_CANDIDATES = 32_000
"""Most candidates of one search: Chroma fails above SQLite's 32,766 variables."""
SAME_VECTOR = 0.95
"""Cosine above which two vectors of one text count as made by the same embedder (other weights give far less)."""
COSINE: dict[str, Any] = {"hnsw": {"space": "cosine"}}
"""Configuration of a collection for the bundled vectors."""
_LLAMA_NODE = "_node_content"
"""Metadata key of every record that LlamaIndex writes."""

Metadata = Mapping[str, Any]
Pages = Iterator[tuple[list[str], list[str | None]]]
"""A collection's records, page by page: ids, and the texts that are read; None marks a record without text."""


@dataclass(frozen=True, kw_only=True)
class CollectionNotes:
    """What made a collection and its states, as its metadata says; None where it doesn't.

    Attributes:
        model: Name, repository id or folder of the reranking model.
        revision: Its commit, where one was asked for.
        dtype: Dtype its states are made in, such as ``"float32"``.
        max_passage_tokens: Where its passages are cut, a number.
        embedder: Name of what makes the vectors.
        passage: The passage rule, see `PassageRule`.
    """

    model: str | None = None
    revision: str | None = None
    dtype: str | None = None
    max_passage_tokens: str | None = None
    embedder: str | None = None
    passage: str | None = None

    @classmethod
    def read(cls, metadata: Metadata | None) -> CollectionNotes:
        """Read the notes in a collection's metadata."""
        told = metadata if metadata is not None else {}
        return cls(**{f.name: str(told[NOTE + f.name]) for f in fields(cls) if told.get(NOTE + f.name) is not None})

    def metadata(self) -> dict[str, str]:
        """The notes as metadata of a collection."""
        named = {NOTE + f.name: getattr(self, f.name) for f in fields(self)}
        return {key: value for key, value in named.items() if value is not None}

    def check(self, wanted: CollectionNotes, name: str, *, opened: bool = False) -> None:
        """Refuse to open the collection `name` under other terms than it was made with; None leaves it to decide.

        Under `opened` the terms are those that it was opened with, which somebody has changed since.

        Raises:
            StateMismatchError: If model, revision, dtype, cut or passage rule differ: its states would be made again.
        """
        for what in ("model", "revision", "dtype", "max_passage_tokens", "passage"):
            noted, asked = getattr(self, what), getattr(wanted, what)
            if what == "model" and (_is_folder(noted) or _is_folder(asked)):
                continue  # the same weights may lie elsewhere now; their fingerprint tells, once they are loaded
            if noted is None or asked is None or noted == asked:
                continue
            if opened:
                raise StateMismatchError(
                    f"collection {name!r} was made with {what} {noted!r} since this opened it with {asked!r}: another "
                    f"process, or another handle, let it go over. Open it again."
                )
            raise StateMismatchError(
                f"collection {name!r} was made with {what} {noted!r}; asked for {asked!r}. Leave {what} out to go "
                f"on with it, or pass change_model=True to ChromaIndex.open and run backfill(), which encodes all "
                f"its passages again."
            )


def _is_folder(model: str | None) -> bool:
    return model is not None and (model.startswith((".", "~")) or Path(model).is_absolute() or Path(model).exists())


@contextlib.contextmanager
def chroma_errors(what: str) -> Iterator[None]:
    """Give Chroma's errors ours by name: what the caller got wrong is an `InputError`, the rest a `StoreError`."""
    try:
        yield
    except (KalmRagError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except (InvalidArgumentError, NotFoundError, UniqueConstraintError, ValueError, TypeError) as err:
        gone = isinstance(err, NotFoundError) and "does not exist" in str(err)
        advice = " It was deleted or made again by another door: refresh(), or open again." if gone else ""
        raise InputError(f"{what}: {str(err)[:300]}{advice}") from err
    except BaseException as err:  # its Rust part raises panics as BaseException, its HTTP client bare Exception
        told = str(err)
        raise StoreError(f"{what}: Chroma failed ({type(err).__name__}: {told[:300]}). {_advice(told)}") from err


def collection_errors(collection: Collection) -> AbstractContextManager[None]:
    """`chroma_errors` about one collection."""
    return chroma_errors(f"collection {collection.name!r}")


_BROKEN = ("hnsw", "segment writer", "error finding id", "error getting embedding")


def _advice(message: str) -> str:
    if "too many sql variables" in message.lower():
        return "A filter names too many values: ask with fewer."
    if any(sign in message.lower() for sign in _BROKEN):
        return (
            "Its vector index is broken (a writer was killed, or two wrote at once). The texts are still there: "
            "ChromaIndex.rebuild() or `kalm-rag repair` makes the collection again."
        )
    return "Check the database and its disk, or the server."


def find_collection(client: ClientAPI, name: str) -> Collection | None:
    """Get a collection by name, or None; its own embedding function is never run."""
    check_text(name, "collection")
    try:
        with chroma_errors(f"collection {name!r}"):
            return client.get_collection(name, embedding_function=None)
    except InputError as err:
        if isinstance(err.__cause__, NotFoundError) or "does not exist" in str(err):
            return None
        raise


def require_collection(client: ClientAPI, name: str) -> Collection:
    """Get a collection that must be there; the InputError lists those there are."""
    found = find_collection(client, name)
    if found is None:
        names = ", ".join(sorted(c.name for c in client.list_collections())) or "none"
        raise InputError(f"no collection {name!r} in this database; it has: {names}. Index some text first.")
    return found


def make_collection(client: ClientAPI, name: str, notes: CollectionNotes, options: Mapping[str, Any]) -> Collection:
    """Make a collection with its notes; one that another door made a moment ago is given as it is.

    `options` are further arguments of Chroma's ``create_collection``, ``metadata`` of the app's among them.
    """
    metadata = {**(options.get("metadata") or {}), **notes.metadata()}
    with chroma_errors(f"collection {name!r}"):
        return client.get_or_create_collection(name, **{"embedding_function": None, **options, "metadata": metadata})


def note(collection: Collection, notes: CollectionNotes) -> None:
    """Add notes to a collection that somebody else made; one that says nothing can't be kept in step.

    A collection whose distance stands in its metadata (Chroma before 1.0) can't be changed, and stays as it is.
    """
    old = dict(collection.metadata or {})
    new = {**old, **notes.metadata()}
    if new != old and not any(key.startswith("hnsw:") for key in old):
        with collection_errors(collection):
            collection.modify(metadata=new)


def passage_rule(collection: Collection, notes: CollectionNotes | None = None) -> PassageRule:
    """The rule by which a collection's records are read: as noted, LlamaIndex's for its nodes, else the document."""
    noted = (notes if notes is not None else CollectionNotes.read(collection.metadata)).passage
    if noted is not None:
        return PassageRule(noted)
    with collection_errors(collection):
        sample = collection.get(limit=1, include=["metadatas"])["metadatas"]
    nodes = bool(sample) and _LLAMA_NODE in (sample[0] or {})
    return PassageRule("llama_index:embed" if nodes else DOCUMENT)


def records(collection: Collection, rule: PassageRule) -> Pages:
    """All records of a collection, page by page: ids, and the texts that are read."""
    for page in pages(collection, ["documents", "metadatas"] if rule.needs_metadata else ["documents"]):
        ids = page["ids"]
        metadatas = page["metadatas"] if rule.needs_metadata else [None] * len(ids)
        rows = zip(ids, page["documents"], metadatas, strict=True)
        yield ids, [rule.text(document, metadata, i) for i, document, metadata in rows]


def pages(collection: Collection, include: list[str]) -> Iterator[dict[str, Any]]:
    """All that a collection holds, as Chroma gives it, up to `PAGE` records at a time."""
    offset = 0
    while True:
        with collection_errors(collection):
            page: Any = collection.get(limit=PAGE, offset=offset, include=include)
        if not page["ids"]:
            return
        yield page
        offset += len(page["ids"])


def check_records(
    ids: Iterable[str], texts: Iterable[str], metadatas: Iterable[Metadata | None] | None
) -> tuple[list[str], list[str], list[dict[str, Any] | None]]:
    """Check one call's records before anything is written; copies, so that nothing of the caller's is kept."""
    checked_ids = check_ids(ids)
    checked = check_passages(texts, "texts")
    metas = (
        check_items(metadatas, "metadatas", "a list with a mapping, or None, for each record")
        if metadatas is not None
        else [None] * len(checked_ids)
    )
    if not len(checked_ids) == len(checked) == len(metas):
        raise InputError(f"got {len(checked_ids)} ids, {len(checked)} texts, {len(metas)} metadatas; wanted one each.")
    return checked_ids, checked, [check_metadata(m, i) for i, m in zip(checked_ids, metas, strict=True)]


def check_ids(ids: Iterable[str]) -> list[str]:
    """Check record ids: valid strings, not empty, each once in the call."""
    checked = check_passages(ids, "ids")
    seen: set[str] = set()
    for place, i in enumerate(checked):
        if not i:
            raise InputError(f"ids[{place}] is empty; wanted a name for each record.")
        if i in seen:
            raise InputError(f"id {i!r} occurs twice in one call; wanted distinct ids.")
        seen.add(i)
    return checked


def check_metadata(metadata: Metadata | None, record_id: str) -> dict[str, Any] | None:
    """Copy one record's metadata if Chroma can keep it whole; an empty mapping is None, which Chroma wants.

    Chroma's own check comes when states are written already, and lets through what it can't keep: a NaN comes back
    as nothing, and in a list it makes the collection unreadable for good. An InputError names record and key.
    """
    if metadata is None:
        return None
    if not isinstance(metadata, Mapping):
        raise InputError(f"metadata of {record_id!r} is {type(metadata).__name__}; wanted a mapping or None.")
    copied = {key: list(value) if isinstance(value, list | tuple) else value for key, value in metadata.items()}
    for key, value in copied.items():
        if not isinstance(key, str) or not key or key.startswith(("$", "#", "chroma:")):
            raise InputError(
                f"metadata of {record_id!r} has the key {key!r}; wanted a name that doesn't begin with $, # or chroma:."
            )
        check_text(key, f"metadata key {key!r} of {record_id!r}")
        for item in value if isinstance(value, list) else [value]:
            _check_value(item, f"metadata {key!r} of {record_id!r}")
    if not copied:
        return None
    try:
        validate_metadata(copied)
    except (ValueError, TypeError) as err:
        raise InputError(f"metadata of {record_id!r}: {err}") from err
    return copied


def _check_value(value: object, what: str) -> None:
    if isinstance(value, str):
        check_text(value, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{what} is {value}, which Chroma can't keep. Leave it out, or write it as text.")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"{what} is {value}, which doesn't fit 64 bits. Write it as text.")


def comparable_metadata(metadata: Metadata) -> dict[str, str]:
    """Metadata as filters see it: 1, 1.0 and True are three values, and None is no value.

    Floats are compared to 12 digits: Chroma may give one back that differs in its last bits, and -0.0 as 0.0.
    """
    return {key: _comparable(value) for key, value in metadata.items() if value is not None}


def _comparable(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_comparable, value))}]"
    return f"float {value + 0.0:.12g}" if isinstance(value, float) else repr(value)


def live_collections(database: Database, store: StateStore) -> list[str]:
    """Ids whose references `StateStore.gc` must keep: a folder's states serve all its tenants and databases.

    Ids that are no UUID aren't Chroma's, so they are somebody's who uses the store without it.
    """
    live = [name for name in store.collections() if not _is_uuid(name)]
    if database.folder is not None:  # Chroma lists the collections of one database only
        return live + all_collection_ids(database.folder)
    client: Any = database.client
    with chroma_errors("collections"):
        live += [str(collection.id) for collection in client.list_collections()]
        if database.remote:
            return live
        for other in client._admin_client.list_databases(tenant=client.tenant):
            if other["name"] != client.database:
                with closing(
                    Client.from_system(client._system, tenant=client.tenant, database=other["name"])
                ) as theirs:
                    live += [str(collection.id) for collection in theirs.list_collections()]
    return live


def all_collection_ids(folder: Path) -> list[str]:
    """Ids of a local database's collections, over all tenants and databases."""
    file = folder / "chroma.sqlite3"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=10)) as connection:
            return [str(row[0]) for row in connection.execute("SELECT id FROM collections")]
    except sqlite3.Error as err:
        raise StoreError(f"{file} can't be read ({err}). Check that it is a Chroma database.") from err


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def vector_width(collection: Collection) -> int | None:
    """Width of a collection's vectors; None while it has none."""
    with collection_errors(collection):
        sample = collection.get(limit=1, include=["embeddings"])
    return len(sample["embeddings"][0]) if sample["ids"] and sample["embeddings"] is not None else None


def check_vectors(collection: Collection, embedder: Embedder, rule: PassageRule, argument: str = "embedder=") -> None:
    """Refuse a collection whose vectors come from another embedder; a search would give nonsense silently.

    An InputError says that a stored vector is not what `embedder` makes of the record's text, as `rule` reads it, and
    to pass `argument`.
    """
    told = CollectionNotes.read(collection.metadata).embedder
    if told == embedder.name == BUNDLED:
        return  # one model has this name; an app's embedder goes by its class, which many models share
    try:
        with collection_errors(collection):
            sample = collection.get(limit=1, include=["documents", "metadatas", "embeddings"])
    except StoreError as err:  # it must be opened to be made again
        logger.warning("vectors can't be read, so they are not compared with the embedder's: %s", err)
        return
    if not sample["ids"] and told is not None and BUNDLED in (told, embedder.name):
        raise InputError(
            f"collection {collection.name!r} was made for vectors of {told}; asked for {embedder.name}. Pass "
            f"{argument} with the one it was made for, or make another collection."
        )
    if not sample["ids"] or sample["documents"] is None or sample["embeddings"] is None:
        return
    document, metadata, record_id = sample["documents"][0], sample["metadatas"][0], sample["ids"][0]
    text = rule.text(document, metadata, record_id)
    if text is None:
        return
    stored = np.asarray(sample["embeddings"][0], dtype=np.float32)
    readings = dict.fromkeys([text, document] if document is not None else [text])  # apps may embed the bare document
    best = max((cosine(stored, vector) for vector in embedder.passages(list(readings))), default=0.0)
    if best < SAME_VECTOR:
        raise InputError(
            f"collection {collection.name!r} holds vectors of width {len(stored)} made by "
            f"{told or 'another embedder'}; {embedder.name} gives width {embedder.passages([text]).shape[1]} (cosine "
            f"{best:.2f} for record {record_id!r}). Pass {argument} with the one the collection was filled with."
        )


def cosine(stored: np.ndarray, ours: np.ndarray) -> float:
    """Cosine of two vectors; 0 where their widths differ or one is null."""
    norm = float(np.linalg.norm(stored) * np.linalg.norm(ours))
    return float(stored @ ours) / norm if stored.shape == ours.shape and norm else 0.0


def with_notes(notes: CollectionNotes, given: CollectionNotes) -> CollectionNotes:
    """The collection's notes where it has them, else what the caller gave."""
    return replace(given, **{f.name: value for f in fields(notes) if (value := getattr(notes, f.name)) is not None})
