"""A LangChain Chroma vector store that keeps passage states in step with what it holds.

Writing and upkeep go through `kalm_rag.index.ChromaIndex` (states first, then Chroma; deleting the other way round);
searching is LangChain's own, unchanged.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import chromadb
import chromadb.config
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import run_in_executor

from kalm_rag.checks import check_passages
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index import ChromaIndex
from kalm_rag.index.candidates import Missing, Owners, check_missing
from kalm_rag.index.clients import Database
from kalm_rag.index.collection import PAGE, CollectionNotes, check_vectors, require_collection
from kalm_rag.index.embedders import BUNDLED, BundledEmbedder, Embedder, wrap_embedder
from kalm_rag.index.home import CollectionHome
from kalm_rag.index.lazy_engine import EngineSpec
from kalm_rag.index.passage_rule import DOCUMENT, PassageRule
from kalm_rag.index.results import BackfillReport, VerifyReport
from kalm_rag.langchain.compressor import KaLMDocumentCompressor
from kalm_rag.langchain.embeddings import KaLMEmbeddings
from kalm_rag.langchain.inputs import check_names
from kalm_rag.langchain.retriever import KaLMRetriever
from kalm_rag.states import Codec
from kalm_rag.store import GcReport, StateStore
from kalm_rag.store.base import GRACE_SECONDS

if TYPE_CHECKING:
    from chromadb.api import CreateCollectionConfiguration
    from typing_extensions import Self

_REMOTE_OR_FOLDER = ("persist_directory", "host", "chroma_cloud_api_key")


class KaLMChroma(Chroma):
    """`langchain_chroma.Chroma` whose passages are encoded once, when they are added, for `KaLMRetriever`.

    Takes everything Chroma takes, and searches as Chroma does. What is different: writing keeps states; any number
    of texts can be added in one call; adding under a known id replaces text and metadata as a whole;
    `update_documents` refuses unknown ids; `get_by_ids` keeps the order and reads records without metadata.
    The engine is loaded when states are first needed. Safe to use from many threads.

    Args:
        collection_name: As Chroma; the other arguments up to `ssl`, too.
        embedding_function: What makes the vectors. None takes the bundled all-MiniLM-L6-v2, which costs nothing
            extra with pico (a new collection is then made for cosine).
        persist_directory: As Chroma; states go into a SQLite file in the same folder.
        host: As Chroma; for a remote server states go into a companion collection.
        port: As Chroma.
        headers: As Chroma.
        chroma_cloud_api_key: As Chroma.
        tenant: As Chroma.
        database: As Chroma.
        client_settings: As Chroma.
        collection_metadata: As Chroma.
        collection_configuration: As Chroma.
        client: As Chroma.
        relevance_score_fn: As Chroma.
        create_collection_if_not_exists: As Chroma.
        ssl: As Chroma.
        model: Name or folder for `Reranker.from_pretrained`. None takes what the collection was made with, or pico.
        revision: As `Reranker.from_pretrained`.
        device: As `Reranker.from_pretrained`.
        dtype: As `Reranker.from_pretrained`.
        batch_size: Most passages in one pass.
        decoder_weights: As `Reranker.from_pretrained`: ``int8`` scores KaLM checkpoints faster on the CPU.
        compiled: As `Reranker.from_pretrained`.
        prefix_cache_bytes: As `Reranker.from_pretrained`.
        reranker: A ready engine in place of these; stays yours to close.
        store: Where states go. None: SQLite beside `persist_directory`, in memory for an ephemeral client, a companion
            collection for a remote one.
        ratio: Tokens a state stands for when the store is made; None takes what is stored, or the engine's (4).
        codec: ``exact``, ``bf16`` or ``int8``; None takes what is stored, or exact.
        missing: Policy of `rerank` and `as_compressor` for documents without states.
        passage: How a document becomes the text that is read, see `kalm_rag.index.passage_rule.PassageRule`:
            ``"document"``, or a template such as ``"{title}: {text}"``. None takes the collection's own rule, or else
            ``"document"``.

    Raises:
        InputError: If arguments don't go together, or vectors in the collection were made by another embedder than
            the bundled one that would be used.
    """

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
        store: StateStore | None = None,
        ratio: int | None = None,
        codec: str | Codec | None = None,
        missing: Missing = "encode",
        passage: str | None = None,
    ) -> None:
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
        self._lock = threading.RLock()
        self._given = CollectionNotes(
            model=reranker.info.name if reranker is not None else model,
            revision=revision,
            passage=None if passage is None else str(PassageRule(passage)),
        )
        bundled = _bundled(device, reranker) if embedding_function is None else None
        if bundled is not None and collection_configuration is None and "hnsw:space" not in (collection_metadata or {}):
            collection_configuration = {"hnsw": {"space": "cosine"}}
        notes = CollectionNotes(
            model=self._given.model if self._given.model is not None else self._spec.model,
            revision=revision,
            embedder=BUNDLED if bundled is not None else type(embedding_function).__name__,
            passage=self._given.passage if self._given.passage is not None else DOCUMENT,
        )
        if client is None and client_settings is None and persist_directory is not None:
            within: dict[str, Any] = {
                name: value for name, value in (("tenant", tenant), ("database", database)) if value is not None
            }
            self._database = Database.open(persist_directory, **within)
            client = self._database.client
        super().__init__(
            collection_name,
            bundled if bundled is not None else embedding_function,
            persist_directory,
            host,
            port,
            headers,
            chroma_cloud_api_key,
            tenant,
            database,
            client_settings,
            {**notes.metadata(), **(collection_metadata or {})},
            collection_configuration,
            client,
            relevance_score_fn,
            create_collection_if_not_exists,
            ssl=ssl,
        )
        if not hasattr(self, "_database"):
            self._database = Database(self._client, owned=self._settings["client"] is None)
        self._home: CollectionHome | None = None
        self._database.watch(self._follow)
        self._checked_embedder = False
        if bundled is not None and self._chroma_collection is not None:
            self._check_embedder()

    @classmethod
    def from_texts(  # type: ignore[override]
        cls,
        texts: Iterable[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict[str, Any]] | None = None,
        ids: list[str] | None = None,
        collection_name: str = Chroma._LANGCHAIN_DEFAULT_COLLECTION_NAME,
        **settings: Any,  # noqa: ANN401
    ) -> Self:
        """Make a store and add texts; `settings` are arguments of the class."""
        made = cls(collection_name, embedding, **settings)
        made.add_texts(texts, metadatas, ids)
        return made

    @classmethod
    def from_documents(  # type: ignore[override]
        cls,
        documents: Iterable[Document],
        embedding: Embeddings | None = None,
        ids: list[str] | None = None,
        collection_name: str = Chroma._LANGCHAIN_DEFAULT_COLLECTION_NAME,
        **settings: Any,  # noqa: ANN401
    ) -> Self:
        """Make a store and add documents; `settings` are arguments of the class."""
        made = cls(collection_name, embedding, **settings)
        made.add_documents(documents, **({} if ids is None else {"ids": ids}))
        return made

    @property
    def reranker(self) -> Reranker:
        """The engine at the store's ratio; loaded on first use."""
        return self.home.parts()[0]

    @property
    def store(self) -> StateStore:
        """The states that belong to this collection; opened on first use."""
        return self.home.parts()[1]

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

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        ids: list[str] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> list[str]:
        """Add texts, or replace those whose ids are known: states first, then Chroma, in batches.

        Args:
            texts: Passages; read once, so a generator does.
            metadatas: One per text; fewer leave the rest without. A known id's old metadata is gone afterwards.
            ids: One per text; None, or None among them, makes new ones.
            kwargs: ``batch_size``, which LangChain's ``index()`` passes, is ignored; others are refused.

        Returns:
            The ids, in order.

        Raises:
            InputError: If an id occurs twice, lengths differ, or a metadata value is of a kind Chroma can't keep.
            StoreError: If the states can't be written. Batches finished before stay.
        """
        _refuse(kwargs, "add_texts", allowed=("batch_size",))
        if isinstance(metadatas, Mapping):
            raise InputError("metadatas is one dict; wanted a list with one per text. Put it in brackets.")
        passages = check_passages(list(texts) if not isinstance(texts, str) else texts)
        given = ids if ids is not None else [None] * len(passages)
        named = [i if i is not None else str(uuid.uuid4()) for i in given]
        metas: list[Mapping[str, Any] | None] = list(metadatas if metadatas is not None else [])
        metas += [None] * (len(passages) - len(metas))
        self._upsert(named, passages, metas)
        return named

    def add_documents(self, documents: Iterable[Document], **kwargs: Any) -> list[str]:  # noqa: ANN401
        """Add documents under their ids, or new ones; see `add_texts`. Reads an iterator once."""
        taken = list(documents)
        kwargs.setdefault("ids", [document.id for document in taken])
        return self.add_texts(
            [document.page_content for document in taken], [document.metadata for document in taken], **kwargs
        )

    async def aadd_documents(self, documents: Iterable[Document], **kwargs: Any) -> list[str]:  # noqa: ANN401
        """Add documents in a thread; see `add_documents`."""
        return await run_in_executor(None, partial(self.add_documents, documents, **kwargs))

    def update_documents(self, ids: list[str], documents: list[Document]) -> None:
        """Replace records that exist: text, metadata, vector and states.

        Raises:
            InputError: If an id is unknown (nothing is written then), or occurs twice, or lengths differ.
        """
        wanted = check_passages(ids)
        known = {document.id for document in self.get_by_ids(wanted)} if wanted else set()
        unknown = [i for i in wanted if i not in known]
        if unknown:
            raise InputError(
                f"{len(unknown)} of {len(wanted)} ids are unknown (first: {unknown[0]!r}). Add them first."
            )
        self._upsert(wanted, [d.page_content for d in documents], [d.metadata for d in documents])

    def delete(
        self,
        ids: list[str] | None = None,
        *,
        where: Mapping[str, Any] | None = None,
        where_document: Mapping[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Delete records, then their references; unused states go with `gc`. Unknown ids are ignored.

        Args:
            ids: Which; an empty list deletes nothing.
            where: Chroma metadata filter, within `ids` if both are given.
            where_document: Chroma document filter, likewise.
            kwargs: Refused.

        Raises:
            InputError: If neither ids nor a filter is given.
        """
        _refuse(kwargs, "delete")
        if ids is None and where is None and where_document is None:
            raise InputError("delete got neither ids nor a filter. Use reset_collection() to delete everything.")
        wanted = [] if ids is None else check_passages(ids)
        if (where is not None or where_document is not None) and (ids is None or wanted):
            found = self._collection.get(
                ids=wanted or None,
                where=None if where is None else dict(where),
                where_document=None if where_document is None else dict(where_document),
                include=[],
            )
            wanted = found["ids"]
        if wanted:
            self.index.delete(wanted)

    def delete_collection(self) -> None:
        """Delete the collection and its references; unused states go with the `gc` of a sibling."""
        home = self.home
        gone, stores = home.collection_id, home.stores()
        with self._database.writing():
            super().delete_collection()
        for store in stores:
            store.unreference(gone, [reference.record_id for reference in store.references(gone)])
        self._home = None

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Get documents in the order asked for, each once; unknown ids and records without text are left out."""
        wanted = list(dict.fromkeys(ids))
        found: dict[str, Document] = {}
        for start in range(0, len(wanted), PAGE):
            page = self._collection.get(ids=wanted[start : start + PAGE], include=["documents", "metadatas"])
            rows = zip(page["ids"], page["documents"] or [], page["metadatas"] or [], strict=True)
            found |= {i: Document(text, metadata=meta or {}, id=i) for i, text, meta in rows if text is not None}
        return [found[i] for i in wanted if i in found]

    def as_compressor(self, **settings: Any) -> KaLMDocumentCompressor:  # noqa: ANN401
        """Give a compressor over this store's states; `settings` are arguments of `KaLMDocumentCompressor`."""
        engine, store = self.home.parts()
        own = {"reranker": engine, "store": store, "missing": self._missing, "passage": str(self.home.rule)}
        return KaLMDocumentCompressor(**{**own, **settings})

    def rerank(
        self,
        query: str,
        k: int | None = None,
        fetch_k: int = 50,
        filter: dict[str, Any] | None = None,
        where_document: dict[str, Any] | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> list[Document]:
        """Search `fetch_k` candidates, let the decoder read their states, give the best `k`.

        Args:
            query: The question.
            k: Documents wanted; None is 4. ``top_n`` says the same.
            fetch_k: Candidates that the vector search gives.
            filter: Chroma metadata filter.
            where_document: Chroma document filter.
            **settings: Arguments of `KaLMDocumentCompressor`: instructions, threshold, ratio, missing, keep_margin.

        Raises:
            InputError: If both `k` and ``top_n`` are given.
        """
        return self._retriever(k, fetch_k, filter, where_document, settings).invoke(query)

    async def arerank(
        self,
        query: str,
        k: int | None = None,
        fetch_k: int = 50,
        filter: dict[str, Any] | None = None,
        where_document: dict[str, Any] | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> list[Document]:
        """Search and rerank without holding up the event loop; see `rerank`."""
        make = partial(self._retriever, k, fetch_k, filter, where_document, settings)
        return await (await run_in_executor(None, make)).ainvoke(query)

    def _retriever(
        self,
        k: int | None,
        fetch_k: int,
        filter: dict[str, Any] | None,
        where_document: dict[str, Any] | None,
        settings: dict[str, Any],
    ) -> KaLMRetriever:
        if k is not None and "top_n" in settings:
            raise InputError("k and top_n were both given; wanted one of them.")
        check_names(settings, (*KaLMDocumentCompressor.model_fields, "k"), "rerank")
        wanted: dict[str, Any] = {} if k is None else {"k": k}
        return KaLMRetriever(
            vectorstore=self,
            fetch_k=fetch_k,
            filter=filter,
            search_kwargs={} if where_document is None else {"where_document": where_document},
            compressor=self.as_compressor(**settings) if settings else None,
            **wanted,
        )

    def owners(self, documents: Sequence[Document]) -> Owners:
        """Records behind documents just read from this collection, so that states encoded for them are kept."""
        home = self.home
        self._check_embedder()
        return Owners(collection_id=home.collection_id, record_ids=[d.id for d in documents], scope=home.scope)

    def verify(self) -> VerifyReport:
        """Compare every record with its states; see `ChromaIndex.verify`."""
        return self.home.verify()

    async def averify(self) -> VerifyReport:
        """Compare in a thread; see `verify`."""
        return await run_in_executor(None, self.verify)

    def backfill(self) -> BackfillReport:
        """Encode what is missing, e.g. for a collection that somebody else filled; see `ChromaIndex.backfill`."""
        return self.home.backfill()

    async def abackfill(self) -> BackfillReport:
        """Encode in a thread; see `backfill`."""
        return await run_in_executor(None, self.backfill)

    def gc(self, *, younger_than: float = GRACE_SECONDS) -> GcReport:
        """Drop states that no record uses; see `ChromaIndex.gc`."""
        return self.home.gc(younger_than=younger_than)

    async def agc(self, *, younger_than: float = GRACE_SECONDS) -> GcReport:
        """Drop states in a thread; see `gc`."""
        return await run_in_executor(None, partial(self.gc, younger_than=younger_than))

    def close(self) -> None:
        """Close the state store if this object opened it. It is opened again when needed."""
        with self._lock:
            if self._home is not None:
                self._home.lazy.close()

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

    def _upsert(self, ids: list[str], texts: list[str], metadatas: Sequence[Mapping[str, Any] | None]) -> None:
        try:
            index = self.index
            # as Chroma does: embeddings of the app's own may be others than last time (`index(force_update=True)`)
            index.upsert(ids, texts, metadatas, refresh=not isinstance(index.embedder, BundledEmbedder))
        except (ValueError, TypeError) as err:
            if "metadata value" not in str(err):
                raise
            raise InputError(
                f"{err}\nFilter such values with langchain_community.vectorstores.utils.filter_complex_metadata."
            ) from err

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Share client, engine and states: a copy of a chain or a retriever is over the same collection."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as settings: the copy opens the same database. Only what lies on disk or a server can be copied."""
        if all(self._settings[name] is None for name in _REMOTE_OR_FOLDER) or self._settings["client"] is not None:
            raise InputError("only a KaLMChroma made with persist_directory, host or an API key can be pickled.")
        return _reopen, (type(self), {**self._settings, "reranker": None, "store": None})


def _bundled(device: str | None, reranker: Reranker | None) -> KaLMEmbeddings:
    """The default vectors, from the engine at hand if it is pico."""
    return KaLMEmbeddings(device, reranker if reranker is not None and reranker.info.family == "pico" else None)


def _reopen(kind: type[KaLMChroma], settings: dict[str, Any]) -> KaLMChroma:
    return kind(**settings)


def _refuse(kwargs: Mapping[str, object], where: str, allowed: Sequence[str] = ()) -> None:
    unknown = sorted(set(kwargs) - set(allowed))
    if unknown:
        raise InputError(f"{where} got unknown arguments: {', '.join(unknown)}.")
