"""Where a collection is and how it is made: what every door opens it by, and opens it again by after it was closed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import chromadb
from chromadb.api import ClientAPI
from chromadb.config import Settings

from kalm_rag.checks import check_count, check_text
from kalm_rag.errors import InputError
from kalm_rag.index import rebuilding
from kalm_rag.index.clients import Database
from kalm_rag.index.collection import (
    CollectionNotes,
    chroma_errors,
    find_collection,
    make_collection,
    require_collection,
)
from kalm_rag.index.passage_rule import DOCUMENT
from kalm_rag.models.registry import check_name

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

_CHROMAS_HEADERS = ("Content-Type", "User-Agent")
"""What Chroma's client adds to the headers by itself."""


@dataclass(frozen=True, kw_only=True)
class CollectionPlace:
    """A collection by name, in a database by folder, by server, by an open client, or in memory.

    Attributes:
        name: The collection's.
        folder: Folder of a local database.
        host: Where a Chroma server is.
        port: The server's port; None is 8000.
        ssl: Whether the server is asked over HTTPS.
        headers: Sent with each request to the server. A secret, like the next two.
        api_key: Key of Chroma Cloud, in place of `host`.
        settings: Settings of the Chroma client; None takes those in use, or else Chroma's defaults.
        tenant: Tenant in the database; None is the default one.
        database: Database of the tenant; None is the default one.
        client: An open client of the app's, in place of all these.
        collection: An open collection of the app's, likewise.
        keep_memory: Whether what is in memory stays there after it was closed, to be opened again.
        create: Whether an absent collection is made.
        options: Further arguments of Chroma's ``create_collection``: ``metadata``, ``configuration``.
        embedder: Name of what will make its vectors, which is noted; None where this door doesn't know.

    Raises:
        InputError: If an argument is of another kind, or several places were given.
    """

    name: str
    folder: str | PathLike[str] | None = None
    host: str | None = None
    port: int | str | None = None
    ssl: bool = False
    headers: Mapping[str, str] | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)
    settings: Settings | None = field(default=None, repr=False)
    tenant: str | None = None
    database: str | None = None
    client: ClientAPI | None = None
    collection: Collection | None = None
    keep_memory: bool = False
    create: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    embedder: str | None = None

    def __post_init__(self) -> None:
        check_text(self.name, "collection_name")
        if self.client is not None and not isinstance(self.client, ClientAPI):
            wanted = "the folder of its database by name, or chromadb.PersistentClient(folder)"
            if hasattr(self.client, "get_or_create_collection"):  # the asynchronous one
                wanted = "chromadb.HttpClient: the async methods here run its calls in threads"
            raise InputError(f"client is {type(self.client).__name__}; wanted an open Chroma client. Give {wanted}.")
        given = [name for name in ("folder", "host", "api_key") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} were both given; wanted one place where the collection is.")
        if self.folder is not None and not isinstance(self.folder, str | PathLike):
            raise InputError(f"folder is {type(self.folder).__name__}; wanted the path of a Chroma database.")
        if self.port is not None:
            port = int(self.port) if isinstance(self.port, str) and self.port.isdecimal() else self.port
            object.__setattr__(self, "port", check_count(port, "port"))

    @property
    def lasting(self) -> bool:
        """Whether another process that is told the place finds the same collection."""
        return any(one is not None for one in (self.folder, self.host, self.api_key))

    @classmethod
    def of(cls, collection: Collection) -> CollectionPlace:
        """Where an open collection is, so that what is written down leads back to it."""
        source: Any = collection._client
        settings = source._system.settings
        found: dict[str, Any] = {"tenant": collection.tenant, "database": collection.database}
        if settings.chroma_server_host is not None:
            sent = settings.chroma_server_headers or {}
            given = {name: value for name, value in sent.items() if name not in _CHROMAS_HEADERS}
            found |= {"host": settings.chroma_server_host, "port": settings.chroma_server_http_port}
            found |= {"ssl": bool(settings.chroma_server_ssl_enabled), "headers": given or None}
        elif settings.is_persistent:
            found["folder"] = settings.persist_directory
        return cls(name=collection.name, **found)

    def connect(self) -> Database:
        """Open the database.

        Raises:
            InputError: If there is none and `create` is False, or no server answers.
            StoreError: If Chroma fails.
        """
        if self.client is not None:
            return Database(self.client)
        if self.collection is not None:
            return Database.of_collection(self.collection)
        within = {n: value for n in ("tenant", "database") if (value := getattr(self, n)) is not None}
        if self.folder is not None and self.settings is None:
            return Database.open(self.folder, create=self.create, **within)
        settings = Settings() if self.settings is None else copy.copy(self.settings)  # Chroma writes into them
        port = int(self.port) if self.port is not None else 8000
        with chroma_errors(f"Chroma server {self.host}:{port}" if self.host is not None else "Chroma client"):
            if self.folder is not None:
                client = chromadb.PersistentClient(str(self.folder), settings=settings, **within)
            elif self.host is not None:
                headers = None if self.headers is None else dict(self.headers)
                client = chromadb.HttpClient(self.host, port, self.ssl, headers, settings, **within)
            elif self.api_key is not None:
                client = chromadb.CloudClient(api_key=self.api_key, settings=settings, **within)
            else:
                client = Database.open(None).client if self.settings is None else chromadb.Client(settings)
                return Database(client, owned=not self.keep_memory)
        return Database(client, owned=True)

    def open(self, *, passage: str | None = None, model: str | None = None) -> tuple[Database, Collection]:
        """Open database and collection, which is made if it is absent. This is where every door makes one.

        A new collection notes its embedder and passage rule. The model is noted at the first write, when it was loaded:
        a name that loads nothing would keep every later door out.

        Args:
            passage: The rule that a new collection notes; None is ``"document"``.
            model: The model that the caller named, if it did: what can be no model is refused before anything is made.

        Raises:
            InputError: If it is absent and `create` is False; nothing is made then.
            ModelError: If `model` can be none.
            StoreError: If Chroma fails.
        """
        if model is not None:
            check_name(model)
        database = self.connect()
        try:
            return database, self.collection if self.collection is not None else self.find_or_make(database, passage)
        except BaseException:
            database.close()
            raise

    def open_again(self) -> tuple[Database, Collection]:
        """Open database and collection after they were closed; one that is gone isn't made again, empty.

        Raises:
            InputError: If the collection is gone.
            StoreError: If Chroma fails.
        """
        return replace(self, create=False).open()

    def find_or_make(self, database: Database, passage: str | None) -> Collection:
        """Get the collection in an open database, or make it; see `open`."""
        found = find_collection(database.client, self.name)
        if found is None and rebuilding.finish(database, self.name):
            found = find_collection(database.client, self.name)
        if found is not None or not self.create:
            return found if found is not None else require_collection(database.client, self.name)
        notes = CollectionNotes(embedder=self.embedder, passage=passage if passage is not None else DOCUMENT)
        with database.writing():
            return make_collection(database.client, self.name, notes, self.options)
