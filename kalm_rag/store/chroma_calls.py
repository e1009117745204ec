"""Calls to Chroma as the companion store makes them: pages of records, companions of a collection, errors in our words.

Knows no state and no layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from chromadb.errors import NotFoundError

from kalm_rag.errors import KalmRagError, StoreError
from kalm_rag.store.companion import companion_name

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

FoundRecord = tuple[str, dict[str, Any]]
"""Id and metadata of one record."""


def companions(client: ClientAPI, name: str) -> list[Collection]:
    """Companions of one collection, of every model."""
    start = companion_name(name, "")
    named = [c.name for c in client.list_collections() if c.name.startswith(start)]
    found = [client.get_collection(companion, embedding_function=None) for companion in named]
    return [c for c in found if "kalm_layout" in (c.metadata if c.metadata is not None else {})]


def find_collection(client: ClientAPI, companion: str) -> Collection | None:
    """Give a collection, its embedding function unused, or None."""
    try:
        return client.get_collection(companion, embedding_function=None)
    except NotFoundError:
        return None


def scan_records(
    collection: Collection, where: dict[str, Any], page: int, fields: bool = True
) -> Iterator[FoundRecord]:
    """All records that match, page by page; without their metadata if `fields` is False."""
    offset = 0
    while True:
        found = page_of_records(collection, where, page, offset, fields)
        yield from found
        if len(found) < page:
            return
        offset += page


def page_of_records(
    collection: Collection, where: dict[str, Any], limit: int, offset: int, fields: bool = True
) -> list[FoundRecord]:
    """One page of the records that match, in Chroma's order."""
    return pairs(collection.get(where=where, include=["metadatas"] if fields else [], limit=limit, offset=offset))


def pairs(answer: Any) -> list[FoundRecord]:  # noqa: ANN401 (GetResult, untyped in chromadb)
    """Ids with their metadata, out of an answer of ``get``."""
    ids, found = answer["ids"], answer["metadatas"]
    fields = found if found is not None else [None] * len(ids)
    return [(i, each if each is not None else {}) for i, each in zip(ids, fields, strict=True)]


@contextlib.contextmanager
def translated(name: str) -> Iterator[None]:
    """Raise what Chroma raises as `StoreError`, naming the companion."""
    try:
        yield
    except (KalmRagError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except NotFoundError as err:
        raise StoreError(f"companion collection {name} is gone ({err}). Open the store again to make it anew.") from err
    except BaseException as err:  # chromadb raises bare Exception for HTTP errors, BaseException for Rust panics
        raise StoreError(
            f"companion collection {name}: Chroma refused or can't be reached "
            f"({type(err).__name__}: {str(err)[:300]}). Check the server; if it limits metadata to a few kB (Chroma "
            f"Cloud), keep states in a folder instead."
        ) from err
