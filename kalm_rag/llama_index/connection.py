"""Where a vector store's Chroma collection is: fields that lead back to it, written down without secrets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chromadb
from llama_index.core.bridge.pydantic import BaseModel, Field, field_serializer, field_validator

from kalm_rag.errors import InputError
from kalm_rag.index.place import CollectionPlace

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

_PLACE_FIELDS = ("host", "port", "ssl", "headers", "tenant", "database")


class CollectionFields(BaseModel):
    """Fields that name a collection and its database."""

    collection_name: str | None = Field(default=None, description="Name of the Chroma collection.")
    persist_dir: str | None = Field(default=None, description="Folder of a local Chroma database.")
    host: str | None = Field(default=None, description="Where a Chroma server is.")
    port: str | int | None = Field(default=None, description="Its port; None: 8000.")
    ssl: bool = Field(default=False, description="Whether it is asked over HTTPS.")
    headers: dict[str, str] | None = Field(
        default=None, repr=False, description="Sent with each request to the server. Their values are never written."
    )
    tenant: str | None = Field(default=None, description="Tenant in the Chroma database; None: the default one.")
    database: str | None = Field(default=None, description="Database of the tenant; None: the default one.")

    @field_serializer("headers")
    def _write_headers(self, value: dict[str, str] | None) -> dict[str, None] | None:
        return None if value is None else dict.fromkeys(value)

    @field_validator("headers", mode="before")
    @classmethod
    def _check_headers(cls, value: object) -> object:
        if isinstance(value, dict) and None in value.values():
            raise InputError(
                f"headers had {', '.join(value)} when this was written down; their values are secrets and were not "
                f"written. Pass them again: from_dict(data, headers=...)."
            )
        return value

    def place(self, client: ClientAPI | None, **how: Any) -> CollectionPlace:  # noqa: ANN401
        """Where the fields say that the collection is, for `CollectionPlace.open`.

        Args:
            client: An open client, in place of the fields.
            **how: How the collection is made; see `CollectionPlace`.

        Raises:
            InputError: If the fields name no place.
        """
        if not self.collection_name or (client is None and self.persist_dir is None and self.host is None):
            raise InputError(
                "no collection was given; wanted chroma_collection=, or collection_name= with persist_dir= or host= "
                "and port=."
            )
        return CollectionPlace(
            name=self.collection_name,
            folder=self.persist_dir,
            client=client,
            **{name: getattr(self, name) for name in _PLACE_FIELDS},
            **how,
        )

    def note_place(self, collection: chromadb.Collection) -> None:
        """Fill the fields that lead back to a collection, so that serialisation doesn't lose it."""
        found = CollectionPlace.of(collection)
        self.__dict__.update(collection_name=found.name, persist_dir=found.folder)
        self.__dict__.update({name: getattr(found, name) for name in _PLACE_FIELDS})

    def check_written(self) -> None:
        """Refuse to pickle what can't be found again from the fields.

        Raises:
            InputError: If the collection is in memory, or needs headers, which are secrets.
        """
        if self.persist_dir is None and self.host is None:
            raise InputError("an ephemeral Chroma collection can't be pickled. Use a persistent or HTTP client.")
        if self.headers:
            raise InputError(
                f"the headers of the Chroma server ({', '.join(self.headers)}) are secrets, which are not pickled. "
                f"Make the store where it is used, or from_dict(store.to_dict(), headers=...)."
            )


def check_collection(value: object) -> chromadb.Collection:
    """Refuse what people pass in a collection's place.

    Raises:
        InputError: Naming what to pass instead.
    """
    if isinstance(value, chromadb.Collection):
        return value
    advice = ""
    if isinstance(value, str):
        advice = f" Give a name and its place: KaLMChromaVectorStore.from_params({value!r}, persist_dir=...)."
    elif hasattr(value, "get_or_create_collection"):
        advice = " Pass client.get_or_create_collection(name)."
    elif type(value).__name__ == "AsyncCollection":
        advice = " Open it with chromadb.HttpClient: the async methods here run its calls in threads."
    raise InputError(f"chroma_collection is {type(value).__name__}; wanted an open chromadb Collection.{advice}")
