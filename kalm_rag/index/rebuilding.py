"""Making a broken Chroma collection again out of its own records, without encoding what has stored states.

Chroma's vector index can break for good (a writer killed at the wrong moment, two writers at once), or leave out
records, while ids, texts and metadata stay sound in its file. The new collection is filled beside the old one, and
takes its name at the end: a rebuild that is broken off is begun again, or finished at the next opening.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from chromadb.utils.embedding_functions import known_embedding_functions
from tqdm.auto import tqdm

from kalm_rag.errors import InputError, KalmRagError
from kalm_rag.index.candidates import load_states
from kalm_rag.index.clients import Database
from kalm_rag.index.collection import NOTE, chroma_errors, collection_errors, find_collection, pages
from kalm_rag.index.embedders import BundledEmbedder, Embedder
from kalm_rag.index.results import RebuildReport, Timings
from kalm_rag.index.writer import Home
from kalm_rag.states import passage_key
from kalm_rag.store import Reference

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

logger = logging.getLogger(__name__)

SUFFIX = "-kalm-rebuild"
"""What the name of a collection ends in while it is being made again."""
_OURS, _COMPLETE = NOTE + "rebuilding", NOTE + "rebuilt"


def rebuild(home: Home, embedder: Embedder | None, *, show_progress: bool = False) -> RebuildReport:
    """Make the collection again: same records, notes and distance, a new vector index; see `ChromaIndex.rebuild`.

    Nobody else writes to its folder meanwhile. If vectors can't be read and `embedder` is None, it stays as it was
    (InputError).
    """
    with home.database.writing():
        old = _readable(home)
        client = home.database.client
        name = old.name
        left = find_collection(client, name + SUFFIX)
        if left is not None and _OURS not in (left.metadata or {}):
            raise InputError(
                f"a collection {name + SUFFIX!r} is there already, and is not of a rebuild. Rename it first."
            )
        if left is not None:  # of a rebuild that was broken off
            client.delete_collection(name + SUFFIX)
        with chroma_errors(f"collection {name!r}"):
            new = client.create_collection(
                name + SUFFIX,
                embedding_function=None,
                metadata={**(old.metadata or {}), _OURS: name},
                configuration=_same_index(old),
            )
        report, vectors_readable = RebuildReport(), True
        with tqdm(total=old.count(), desc="rebuild", unit="record", disable=not show_progress) as bar:
            for page in pages(old, ["documents", "metadatas"]):
                vectors = _vectors(old, page["ids"]) if vectors_readable else None
                vectors_readable = vectors is not None
                report += _copy(home, new, page, vectors if vectors is not None else {}, embedder)
                bar.update(len(page["ids"]))
        with chroma_errors(f"collection {name!r}"):
            metadata = {key: value for key, value in (new.metadata or {}).items() if not key.startswith("hnsw:")}
            new.modify(metadata={**metadata, _COMPLETE: name})
            client.delete_collection(name)
            _take_name(new, name)
        home.find_again()
    return report


def finish(database: Database, name: str) -> bool:
    """Give a rebuilt collection its name if the process died before it could; tell whether it did.

    Every door calls this before it makes a collection of that name.
    """
    made = find_collection(database.client, name + SUFFIX)
    if made is None or (made.metadata or {}).get(_COMPLETE) != name:
        return False
    if find_collection(database.client, name) is not None:
        return False
    with database.writing(), chroma_errors(f"collection {name!r}"):
        found = find_collection(database.client, name + SUFFIX)
        if found is not None:
            _take_name(found, name)
    return True


def _take_name(collection: Collection, name: str) -> None:
    metadata = {key: value for key, value in (collection.metadata or {}).items() if key not in (_OURS, _COMPLETE)}
    collection.modify(name=name, metadata=metadata or None)


_INDEX_SETTINGS = ("space", "ef_construction", "ef_search", "max_neighbors")


def _same_index(old: Collection) -> Any:  # noqa: ANN401 - chromadb's own type
    """Settings of the old vector index, and the embedding function that an app's Chroma client would use."""
    told: Any = old.configuration_json or {}
    index = {key: value for key, value in (told.get("hnsw") or {}).items() if key in _INDEX_SETTINGS}
    legacy = any(key.startswith("hnsw:") for key in old.metadata or {})
    made: dict[str, Any] = {"hnsw": index} if index and not legacy else {}
    embed = told.get("embedding_function") or {}
    if embed.get("type") == "known" and embed.get("name") in known_embedding_functions:
        kind = known_embedding_functions[embed["name"]]
        with suppress(Exception):  # its package or key may be missing here; the app can set it again
            made["embedding_function"] = kind.build_from_config(embed.get("config") or {})
    return made or None


def _readable(home: Home) -> Collection:
    """The collection, with its vector index put aside if not even texts can be read with it."""
    try:
        with collection_errors(home.collection):
            home.collection.get(limit=1, include=["documents"])
            home.collection.count()
    except KalmRagError:
        folder = home.database.folder
        if folder is None or not home.database.owned:
            raise
        with closing(sqlite3.connect(folder / "chroma.sqlite3", timeout=10)) as connection:
            where = "SELECT id FROM segments WHERE collection=? AND scope='VECTOR'"
            segments = [row[0] for row in connection.execute(where, (str(home.collection.id),))]
        for segment in segments:
            with suppress(FileNotFoundError):
                (folder / segment).rename(folder / f"{segment}.broken-{int(time.time())}")
        logger.warning("the vector index of collection %r was put aside: it can't be read.", home.collection.name)
        home.database.refresh()
    return home.collection


def _vectors(old: Collection, ids: Sequence[str]) -> dict[str, Any] | None:
    """Stored vectors by id, or None where the index can't give them."""
    try:
        with collection_errors(old):
            found: Any = old.get(ids=list(ids), include=["embeddings"])
    except KalmRagError as err:
        logger.info("vectors are made again: %s", err)
        return None
    return dict(zip(found["ids"], found["embeddings"], strict=True))


def _copy(
    home: Home, new: Collection, page: dict[str, Any], at_hand: dict[str, Any], embedder: Embedder | None
) -> RebuildReport:
    """Write one page of the old collection into the new one, and refer to its states under the new one's id."""
    ids = page["ids"]
    texts = [home.rule.text(d, m, i) for i, d, m in zip(ids, page["documents"], page["metadatas"], strict=True)]
    rows = [row for row, i in enumerate(ids) if i in at_hand or texts[row] is not None]
    left = [row for row in rows if ids[row] not in at_hand]
    embedded, encoded = _embed(home, [texts[row] or "" for row in left], embedder)
    made = dict(zip(left, embedded, strict=True))
    for has_text in (True, False):
        part = [row for row in rows if (page["documents"][row] is not None) is has_text]
        if not part:
            continue
        with collection_errors(new):
            new.add(
                ids=[ids[row] for row in part],
                embeddings=[made[row] if row in made else at_hand[ids[row]] for row in part],
                documents=[page["documents"][row] for row in part] if has_text else None,
                metadatas=[page["metadatas"][row] or None for row in part],
            )
    _, store = home.parts()
    references = [
        Reference(collection_id=str(new.id), record_id=ids[row], key=passage_key(text))
        for row in rows
        if (text := texts[row]) is not None
    ]
    store.put_many([], references, scope=home.scope)
    if len(rows) < len(ids):
        logger.warning("%d records have neither text nor a vector that can be read.", len(ids) - len(rows))
    return RebuildReport(records=len(rows), kept=len(rows) - len(left), embedded=len(left), encoded=encoded)


def _embed(home: Home, texts: list[str], embedder: Embedder | None) -> tuple[Sequence[Any] | np.ndarray, int]:
    """Vectors of texts, and how many passages were encoded for them."""
    if not texts:
        return [], 0
    if embedder is None:
        raise InputError(
            f"the vectors of {home.collection.name!r} can't be read, and this door has no embedder to make them again. "
            f"Open the collection with ChromaIndex.open(path, collection=..., embedder=...) and rebuild there."
        )
    engine, store = home.parts()
    if not isinstance(embedder, BundledEmbedder) or engine.info.family != "pico":
        return embedder.passages(texts), 0
    loaded = load_states(engine, store, texts, missing="encode", timings=Timings())
    return embedder.from_states(loaded.states) if loaded.states is not None else [], loaded.encoded
