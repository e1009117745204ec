"""A LangChain Chroma store with an engine and states: opened, closed, opened again, written down.

The Chroma side of `kalm_rag.langchain.vectorstore`, which writes and searches.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import chromadb
import chromadb.config
from langchain_chroma import Chroma
from langchain_core.embeddings import Embeddings

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index import ChromaIndex
from kalm_rag.index.candidates import Missing, check_missing
from kalm_rag.index.clients import Database
from kalm_rag.index.collection import CollectionNotes, check_vectors, find_collection, require_collection
from kalm_rag.index.embedders import BUNDLED, Embedder, wrap_embedder
from kalm_rag.index.home import CollectionHome
from kalm_rag.index.lazy_engine import EngineSpec, LazyEngine, spec_of
from kalm_rag.index.passage_rule import DOCUMENT, PassageRule
from kalm_rag.index.rebuilding import finish
from kalm_rag.index.results import RebuildReport
from kalm_rag.langchain.embeddings import KaLMEmbeddings
from kalm_rag.langchain.settings import HasStates, Place, place_of, read_store
from kalm_rag.states import Codec
from kalm_rag.store import StateStore

if TYPE_CHECKING:
    from chromadb.api import CreateCollectionConfiguration
    from typing_extensions import Self

_CHROMAS = [name for name in signature(Chroma.__init__).parameters if name != "self"]
"""Arguments that Chroma's own class takes."""
_REMOTE_OR_FOLDER = ("persist_directory", "host", "chroma_cloud_api_key")


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
        reranker: Reranker | None = None,
        store: StateStore | str | None = None,
        ratio: int | None = None,
        codec: str | Codec | None = None,
        missing: Missing = "encode",
        passage: str | None = None,
    ) -> None:
        store = read_store(store)
        self._settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        named = model, revision, device, dtype, decoder_weights, compiled or None, prefix_cache_bytes
        if reranker is not None and any(value is not None for value in named):
            raise InputError("reranker and model settings were both given; wanted one of them.")
        self._missing = check_missing(missing)
        self._spec = EngineSpec(
            model=model if model is not None else "pico",
            revision=revision,
            device=device,
            dtype=dtype,
            ratio=ratio,
            batch_size=batch_size,
            decoder_weights=decoder_weights,
            compiled=compiled,
            prefix_cache_bytes=prefix_cache_bytes,
        )
        self._codec = None if codec is None else Codec.parse(codec)
        self._given = CollectionNotes(
            model=reranker.info.name if reranker is not None else model,
            revision=revision,
            passage=None if passage is None else str(PassageRule(passage)),
        )
        self._lock = threading.RLock()
        self._home: CollectionHome | None = None
        self._checked_embedder = False
        self._connect()
        try:
            if embedding_function is None and self._chroma_collection is not None:
                self._check_embedder()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        """Open the database and the collection; again, after `close`."""
        held, given, client = self._settings, self._given, self._settings["client"]
        self._closed = False
        opened = None
        if client is None and held["client_settings"] is None and held["persist_directory"] is not None:
            within = {name: held[name] for name in ("tenant", "database") if held[name] is not None}
            create = bool(held["create_collection_if_not_exists"])
            opened = Database.open(held["persist_directory"], create=create, **within)
            finish(opened, held["collection_name"])
            client = opened.client
        embeddings, metadata = held["embedding_function"], held["collection_metadata"] or {}
        configuration = held["collection_configuration"]
        if embeddings is None:
            embeddings = _bundled(held["device"], held["reranker"])
            if configuration is None and "hnsw:space" not in metadata:
                configuration = {"hnsw": {"space": "cosine"}}
        notes = CollectionNotes(
            model=given.model if given.model is not None else self._spec.model,
            revision=given.revision,
            embedder=BUNDLED if isinstance(embeddings, KaLMEmbeddings) else type(embeddings).__name__,
            passage=given.passage if given.passage is not None else DOCUMENT,
        )
        as_chroma = {name: held[name] for name in _CHROMAS}
        copied = {name: copy.copy(held[name]) for name in ("headers", "client_settings")}  # Chroma writes into them
        changed = {"embedding_function": embeddings, "collection_configuration": configuration, "client": client}
        noted = {"collection_metadata": {**notes.metadata(), **metadata}}
        try:
            with contextlib.nullcontext() if opened is None or self._is_there(client) else opened.writing():
                if opened is not None:  # it may have been opened again, to see what others wrote
                    changed["client"] = opened.client
                super().__init__(**{**as_chroma, **copied, **changed, **noted})
        except BaseException:
            if opened is not None:
                opened.close()
            raise
        if opened is None:  # a client in memory stays, and one of the app's
            owned = held["client"] is None and any(held[name] is not None for name in _REMOTE_OR_FOLDER)
            opened = Database(self._client, owned=owned)
        self._database = opened
        self._database.watch(self._follow)

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
        folder = self._database.folder
        return str(folder) if folder is not None else {"live": "KaLMChroma in memory or on a server"}

    @property
    def home(self) -> CollectionHome:
        """The collection with its engine and states, both made on first use."""
        with self._lock:
            if self._home is None or self._home.collection_id != str(self._collection.id):  # reset_collection
                noted = CollectionNotes.read(self._collection.metadata)
                reranker = self._settings["reranker"]
                spec = self._spec
                if self._given.model is None and noted.model is not None:
                    spec = replace(spec, model=noted.model)
                self._home = CollectionHome(
                    self._database,
                    self._collection,
                    spec,
                    self._given,
                    reranker=reranker,
                    store=self._settings["store"],
                    codec=self._codec,
                    ratio=self._spec.ratio,
                )
            return self._home

    @property
    def index(self) -> ChromaIndex:
        """The same collection and states as a `ChromaIndex`."""
        self._check_embedder()
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
        with self._lock:
            home, self._home = self._home, None
            if home is not None:
                home.close()
            self._database.close()
            self._closed = True

    @property
    def _collection(self) -> chromadb.Collection:
        """The Chroma collection, for LangChain's own methods, too; opened again after `close`."""
        with self._lock:
            if self._closed:
                self._connect()
        return super()._collection

    def refresh(self) -> None:
        """See what other processes wrote to the folder since this was opened, or last wrote.

        Raises:
            InputError: If the client is the app's own: open another one, and the store over it.
        """
        self._collection  # noqa: B018 - opened again, if it was closed
        self._database.refresh()

    def rebuild(self) -> RebuildReport:
        """Make the collection again out of its own records, when its vector index is broken; see `ChromaIndex.rebuild`.

        Raises:
            StoreError: If Chroma fails, or records can't be read at all.
        """
        report = self.index.rebuild()
        self._follow()
        return report

    def _is_there(self, client: chromadb.ClientAPI) -> bool:
        return find_collection(client, self._settings["collection_name"]) is not None

    def _check_embedder(self) -> None:
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

    def _follow(self) -> None:
        """After the client was opened again: its collection, for LangChain's own methods."""
        self._client = self._database.client
        self._chroma_collection = require_collection(self._client, self._collection_name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of a chain or a retriever is over the same collection, engine and states."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as settings: the copy opens the same collection and the same states, with the same engine.

        Raises:
            InputError: If only this process has them, or the settings hold secrets.
        """
        held = self._settings
        if all(held[name] is None for name in _REMOTE_OR_FOLDER) or held["client"] is not None:
            raise InputError("only a KaLMChroma made with persist_directory or host can be pickled.")
        signed = held["client_settings"] is not None and held["client_settings"].chroma_client_auth_credentials
        secrets = [name for name in ("headers", "chroma_cloud_api_key") if held[name]]
        if secrets or signed:
            raise InputError(
                f"{', '.join(secrets) or 'client_settings'} may hold secrets, which are not written down. Make the "
                f"KaLMChroma where it is used."
            )
        place = None if held["store"] is None else place_of(held["store"])
        if isinstance(place, dict):
            raise InputError(
                f"KaLMChroma uses a live {place['live']}, which can't be pickled. Give store= a folder or a .sqlite3 "
                f"file, which every process can open."
            )
        written = {**held, "store": place, "reranker": None}
        if held["reranker"] is not None:
            layout = self.store.layout
            written |= {**spec_of(held["reranker"]), "ratio": layout.ratio, "codec": layout.codec}
        return _reopen, (type(self), written)


def _bundled(device: str | None, reranker: Reranker | None) -> KaLMEmbeddings:
    """The default vectors, from the engine at hand if it is pico."""
    return KaLMEmbeddings(device, reranker if reranker is not None and reranker.info.family == "pico" else None)


def _reopen(kind: type[ChromaWithStates], settings: dict[str, Any]) -> ChromaWithStates:
    return kind(**settings)
