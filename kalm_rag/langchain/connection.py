"""A LangChain Chroma store with an engine and states: opened, closed, opened again, written down.

The Chroma side of `kalm_rag.langchain.vectorstore`, which writes and searches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import chromadb
import chromadb.config
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index import ChromaIndex
from kalm_rag.index.candidates import Missing, check_missing
from kalm_rag.index.collection import COSINE, CollectionNotes, check_vectors
from kalm_rag.index.embedders import BUNDLED, Embedder, wrap_embedder
from kalm_rag.index.home import CollectionHome
from kalm_rag.index.lazy_engine import EngineSpec, LazyEngine, spec_of
from kalm_rag.index.passage_rule import PassageRule
from kalm_rag.index.place import CollectionPlace
from kalm_rag.index.results import RebuildReport
from kalm_rag.index.settings import (
    ENGINE_FIELDS,
    HasStates,
    Place,
    check_reranker,
    lasting_place,
    place_of,
    read_store,
)
from kalm_rag.langchain.embeddings import KaLMEmbeddings
from kalm_rag.langchain.inputs import check_documents
from kalm_rag.states import Codec
from kalm_rag.store import StateStore

if TYPE_CHECKING:
    from chromadb.api import CreateCollectionConfiguration
    from typing_extensions import Self

_CONNECTION = {
    *("collection_name", "persist_directory", "host", "port", "headers", "chroma_cloud_api_key", "tenant", "database"),
    *("client_settings", "client", "collection_metadata", "collection_configuration"),
}
"""Arguments of a store's connection, which ``from_texts`` and ``from_documents`` hand on."""


class ChromaWithStates(Chroma, HasStates):
    """`langchain_chroma.Chroma` over a collection whose states are at hand; see `KaLMChroma` for the arguments."""

    def __init__(
        self,
        collection_name: str = Chroma._LANGCHAIN_DEFAULT_COLLECTION_NAME,
        embedding_function: Embeddings | None = None,
        persist_directory: str | None = None,
        host: str | None = None,
        port: int | None = None,
        headers: dict[str, str] | None = None,
        chroma_cloud_api_key: str | None = None,
        tenant: str | None = None,
        database: str | None = None,
        client_settings: chromadb.config.Settings | None = None,
        collection_metadata: dict[str, Any] | None = None,
        collection_configuration: CreateCollectionConfiguration | None = None,
        client: chromadb.ClientAPI | None = None,
        relevance_score_fn: Callable[[float], float] | None = None,
        create_collection_if_not_exists: bool | None = True,
        *,
        ssl: bool = False,
        model: str | None = None,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = 64,
        decoder_weights: str | None = None,
        compiled: bool = False,
        prefix_cache_bytes: int | None = None,
        max_passage_tokens: int | None = None,
        reranker: Reranker | None = None,
        store: StateStore | str | None = None,
        ratio: int | None = None,
        codec: str | Codec | None = None,
        missing: Missing = "encode",
        passage: str | None = None,
    ) -> None:
        self._settings = held = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        held["store"] = read_store(store)
        named = [held[field] for field in ENGINE_FIELDS - {"batch_size", "compiled"}]
        if check_reranker(reranker) is not None and (compiled or any(value is not None for value in named)):
            raise InputError("reranker and model settings were both given; wanted one of them.")
        self._missing = check_missing(missing)
        spec = EngineSpec(
            model=model if model is not None else "pico",
            ratio=ratio,
            **{field: held[field] for field in ENGINE_FIELDS - {"model"}},
        )
        given = CollectionNotes(
            model=reranker.info.name if reranker is not None else model,
            revision=revision,
            passage=None if passage is None else str(PassageRule(passage)),
        )
        codec = None if codec is None else Codec.parse(codec)
        embeddings, self._place = self._embeddings_and_place()
        self._checked_embedder = False
        opened, collection = self._place.open(passage=given.passage, model=model)
        try:
            self._home = CollectionHome(
                opened,
                collection,
                spec,
                given,
                reranker=reranker,
                store=held["store"],
                codec=codec,
                ratio=ratio,
                place=self._place,
            )
            super().__init__(collection_name, embeddings, client=opened.client, relevance_score_fn=relevance_score_fn)
            if embedding_function is None:
                self.check_embedder()
        except BaseException:
            opened.close()
            raise

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict[str, Any]] | None = None,
        ids: list[str] | None = None,
        collection_name: str = Chroma._LANGCHAIN_DEFAULT_COLLECTION_NAME,
        persist_directory: str | None = None,
        host: str | None = None,
        port: int | None = None,
        headers: dict[str, str] | None = None,
        chroma_cloud_api_key: str | None = None,
        tenant: str | None = None,
        database: str | None = None,
        client_settings: chromadb.config.Settings | None = None,
        client: chromadb.ClientAPI | None = None,
        collection_metadata: dict[str, Any] | None = None,
        collection_configuration: CreateCollectionConfiguration | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> Self:
        """Make a store and add texts. Arguments in the order of ``Chroma.from_texts``, so that both are called alike.

        Args:
            texts: Passages; read once.
            embedding: What makes the vectors; None takes the bundled ones.
            metadatas: One per text, or None.
            ids: One per text; None makes new ones, so that adding the same texts again doubles them.
            collection_name: Name of the collection.
            persist_directory: As all that follow, an argument of the class.
            host: Where a Chroma server is.
            port: Its port.
            headers: HTTP headers for it.
            chroma_cloud_api_key: Key of Chroma Cloud.
            tenant: Tenant in the database.
            database: Database of the tenant.
            client_settings: Settings of the client.
            client: An open client.
            collection_metadata: Metadata of a new collection.
            collection_configuration: Configuration of a new collection.
            **settings: The other arguments of the class: ``model``, ``store``, ``passage``, ...
        """
        given = {name: value for name, value in locals().items() if name in _CONNECTION}
        made = cls(embedding_function=embedding, **given, **settings)
        made.add_texts(texts, metadatas, ids)
        return made

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Document],
        embedding: Embeddings | None = None,
        ids: list[str] | None = None,
        collection_name: str = Chroma._LANGCHAIN_DEFAULT_COLLECTION_NAME,
        persist_directory: str | None = None,
        host: str | None = None,
        port: int | None = None,
        headers: dict[str, str] | None = None,
        chroma_cloud_api_key: str | None = None,
        tenant: str | None = None,
        database: str | None = None,
        client_settings: chromadb.config.Settings | None = None,
        client: chromadb.ClientAPI | None = None,
        collection_metadata: dict[str, Any] | None = None,
        collection_configuration: CreateCollectionConfiguration | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> Self:
        """Make a store and add documents, under their ids or new ones. Arguments as ``Chroma.from_documents`` has them.

        Args:
            documents: Read once.
            embedding: What makes the vectors; None takes the bundled ones.
            ids: One per document, in place of their own.
            collection_name: Name of the collection; this and all that follow as in `from_texts`.
            persist_directory: Folder of a local database.
            host: Where a Chroma server is.
            port: Its port.
            headers: HTTP headers for it.
            chroma_cloud_api_key: Key of Chroma Cloud.
            tenant: Tenant in the database.
            database: Database of the tenant.
            client_settings: Settings of the client.
            client: An open client.
            collection_metadata: Metadata of a new collection.
            collection_configuration: Configuration of a new collection.
            **settings: The other arguments of the class.
        """
        given = {name: value for name, value in locals().items() if name in _CONNECTION}
        made = cls(embedding_function=embedding, **given, **settings)
        made.add_documents(check_documents(documents), **({} if ids is None else {"ids": ids}))
        return made

    def _embeddings_and_place(self) -> tuple[Embeddings, CollectionPlace]:
        """What makes the vectors, and the collection that is for them."""
        held = self._settings
        embeddings, metadata = held["embedding_function"], held["collection_metadata"] or {}
        configuration = held["collection_configuration"]
        if embeddings is None:
            reranker = held["reranker"]
            ready = reranker if reranker is not None and reranker.info.family == "pico" else None
            embeddings = KaLMEmbeddings(held["device"], ready)
            if configuration is None and "hnsw:space" not in metadata:
                configuration = COSINE
        elif not hasattr(embeddings, "embed_documents"):
            raise InputError(
                f"embedding_function is {type(embeddings).__name__}; wanted LangChain Embeddings, or None for the "
                f"bundled ones."
            )
        place = CollectionPlace(
            name=held["collection_name"],
            folder=held["persist_directory"],
            api_key=held["chroma_cloud_api_key"],
            settings=held["client_settings"],
            **{name: held[name] for name in ("host", "port", "ssl", "headers", "tenant", "database", "client")},
            keep_memory=True,
            create=bool(held["create_collection_if_not_exists"]),
            options={"metadata": metadata, "configuration": configuration},
            embedder=BUNDLED if isinstance(embeddings, KaLMEmbeddings) else type(embeddings).__name__,
        )
        return embeddings, place

    @property
    def reranker(self) -> Reranker:
        """The engine at the store's ratio; loaded on first use."""
        return self.home.parts()[0]

    @property
    def store(self) -> StateStore:
        """The states that belong to this collection; opened on first use."""
        return self.home.parts()[1]

    @property
    def lazy(self) -> LazyEngine:
        """Engine and states, made on first use, for compressors over them."""
        return self.home.lazy

    def states_place(self) -> Place:
        """Where the states are: the given store's file, the database's folder, or what kind of live store."""
        if self._settings["store"] is not None:
            return place_of(self._settings["store"])
        folder = self._home.folder
        return str(folder) if folder is not None else {"live": "KaLMChroma in memory or on a server"}

    @property
    def home(self) -> CollectionHome:
        """The collection with its engine and states, both made on first use.

        Raises:
            InputError: After `delete_collection`.
        """
        if self._chroma_collection is None:
            raise InputError(f"collection {self._collection_name!r} was deleted. Make another store for a new one.")
        return self._home

    @property
    def index(self) -> ChromaIndex:
        """The same collection and states as a `ChromaIndex`."""
        self.check_embedder()
        given = self._embedding_function
        embedder: Embedder | None = None
        if isinstance(given, KaLMEmbeddings):
            engine = self.home.lazy.engine()
            embedder = given.embedder(engine) if engine.info.family != "pico" else None
        else:
            embedder = wrap_embedder(given)
        return ChromaIndex(self.home, embedder, missing=self._missing)

    def close(self) -> None:
        """Close states, engine and Chroma client, as far as this object opened them. They are opened again when needed.

        What is in memory only stays, and so does a client, store or engine of the app's.
        """
        self._home.close()

    @property
    def _collection(self) -> chromadb.Collection:
        """The Chroma collection of now, for LangChain's own methods, too; opened again after `close`."""
        return self.home.collection

    @property
    def _client(self) -> chromadb.ClientAPI:
        """The Chroma client of now, likewise."""
        return self._home.database.client

    @_client.setter
    def _client(self, client: chromadb.ClientAPI) -> None:
        """Chroma's own constructor notes the client that it was given, which is this one."""

    def refresh(self) -> None:
        """See what other processes wrote to the folder since this was opened, or last wrote.

        Raises:
            InputError: If the client is the app's own: open another one, and the store over it.
        """
        self.home.database.refresh()

    def rebuild(self) -> RebuildReport:
        """Make the collection again out of its own records, when its vector index is broken; see `ChromaIndex.rebuild`.

        Raises:
            StoreError: If Chroma fails, or records can't be read at all.
        """
        return self.index.rebuild()

    def check_embedder(self) -> None:
        """Refuse another embedder than made the collection's vectors, once: a search would give nonsense silently.

        An embedder of the app's may be a hosted one, so it is not asked when this is made. One app's embedder after
        another is Chroma's own affair: adding again under the new one replaces the vectors.
        """
        if self._checked_embedder:
            return
        given = self._embedding_function
        embedder = given if isinstance(given, KaLMEmbeddings) else wrap_embedder(given)
        if BUNDLED in (embedder.name, CollectionNotes.read(self._collection.metadata).embedder):
            check_vectors(self._collection, embedder, self.home.rule, "embedding_function=")
        self._checked_embedder = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of a chain or a retriever is over the same collection, engine and states."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as settings: the copy opens the same collection and the same states, with the same engine.

        Raises:
            InputError: If only this process has them, or the settings hold secrets.
        """
        held = self._settings
        if not self._place.lasting or held["client"] is not None:
            raise InputError("only a KaLMChroma made with persist_directory or host can be pickled.")
        signed = held["client_settings"] is not None and held["client_settings"].chroma_client_auth_credentials
        secrets = [name for name in ("headers", "chroma_cloud_api_key") if held[name]]
        if secrets or signed:
            raise InputError(
                f"{', '.join(secrets) or 'client_settings'} may hold secrets, which are not written down. Make the "
                f"KaLMChroma where it is used."
            )
        written = {**held, "store": lasting_place(held["store"], "KaLMChroma"), "reranker": None}
        if held["reranker"] is not None:
            layout = self.store.layout
            written |= {**spec_of(held["reranker"]), "ratio": layout.ratio, "codec": layout.codec}
        return _reopen, (type(self), written)


def _reopen(kind: type[ChromaWithStates], settings: dict[str, Any]) -> ChromaWithStates:
    return kind(**settings)
