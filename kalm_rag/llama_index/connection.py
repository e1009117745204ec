"""Where a vector store's Chroma collection is: fields that lead back to it, written down without secrets."""

from __future__ import annotations

from typing import Any

import chromadb
from llama_index.core.bridge.pydantic import BaseModel, Field, field_serializer, field_validator

from kalm_rag.errors import InputError
from kalm_rag.index.clients import Database
from kalm_rag.index.collection import chroma_errors

_CHROMAS_HEADERS = ("Content-Type", "User-Agent")
"""What Chroma's client adds to the headers by itself."""


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

    def connect(self) -> Database:
        """Open the database.

        Raises:
            InputError: If the fields name no place, or no server answers there.
            StoreError: If Chroma fails.
        """
        within = {name: value for name in ("tenant", "database") if (value := getattr(self, name)) is not None}
        if self.collection_name and self.persist_dir is not None:
            return Database.open(self.persist_dir, **within)
        if self.collection_name and self.host is not None:
            port = int(self.port) if self.port is not None else 8000
            headers = None if self.headers is None else dict(self.headers)  # Chroma adds its own to it
            with chroma_errors(f"Chroma server {self.host}:{port}"):
                client = chromadb.HttpClient(host=self.host, port=port, ssl=self.ssl, headers=headers, **within)
            return Database(client, owned=True)
        raise InputError(
            "no collection was given; wanted chroma_collection=, or collection_name= with persist_dir= or host= and "
            "port=."
        )

    def note_connection(self, collection: chromadb.Collection) -> None:
        """Fill the fields that lead back to a collection, so that serialisation doesn't lose it."""
        source: Any = collection._client
        settings = source._system.settings
        found: dict[str, Any] = {"collection_name": collection.name}
        found |= {"tenant": collection.tenant, "database": collection.database}
        if settings.chroma_server_host is not None:
            found |= {"host": settings.chroma_server_host, "port": settings.chroma_server_http_port}
            found["ssl"] = bool(settings.chroma_server_ssl_enabled)
            sent = settings.chroma_server_headers or {}
            given = {name: value for name, value in sent.items() if name not in _CHROMAS_HEADERS}
            found["headers"] = given or None
        elif settings.is_persistent:
            found["persist_dir"] = settings.persist_directory
        self.__dict__.update(found)

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
