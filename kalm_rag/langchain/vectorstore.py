"""A LangChain Chroma vector store that keeps passage states in step with what it holds.

Writing and upkeep are those of `kalm_rag.index`: states first, then Chroma; deleting the other way round. Searching is
LangChain's own, unchanged. `kalm_rag.langchain.connection` opens, closes and writes down.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, TypeVar, cast

from langchain_chroma import Chroma
from langchain_chroma.vectorstores import DEFAULT_K
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import run_in_executor

from kalm_rag.checks import check_count, check_items, check_passages
from kalm_rag.engine.prepared import PreparedQuery
from kalm_rag.errors import InputError, StoreError
from kalm_rag.index.candidates import Owners
from kalm_rag.index.collection import PAGE, all_collection_ids, chroma_errors
from kalm_rag.index.embedders import BundledEmbedder
from kalm_rag.index.owners import owners_in
from kalm_rag.index.results import BackfillReport, VerifyReport
from kalm_rag.index.writer import CollectionWriter
from kalm_rag.instructions import Instructions
from kalm_rag.langchain.compressor import KaLMDocumentCompressor
from kalm_rag.langchain.connection import ChromaWithStates
from kalm_rag.langchain.embeddings import KaLMEmbeddings
from kalm_rag.langchain.inputs import check_documents, check_names
from kalm_rag.langchain.retriever import KaLMRetriever
from kalm_rag.store import GcReport, sweep_folder
from kalm_rag.store.base import GRACE_SECONDS
from kalm_rag.store.chroma import drop_companions
from kalm_rag.store.rows import chunked

Method = TypeVar("Method", bound=Callable[..., Any])


def _named(method: Method) -> Method:
    """One of Chroma's own methods, whose errors come back as ours: what the caller got wrong as an `InputError`."""

    @wraps(method)
    def named(self: KaLMChroma, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with chroma_errors(f"collection {self._collection_name!r}"):
            return method(self, *args, **kwargs)

    return cast("Method", named)


class KaLMChroma(ChromaWithStates):
    """`langchain_chroma.Chroma` whose passages are encoded once, when they are added, for `KaLMRetriever`.

    Takes everything Chroma takes, and searches as Chroma does. What is different: writing keeps states; any number
    of texts can be added in one call; adding under a known id replaces text and metadata as a whole;
    `update_documents` refuses unknown ids; `get_by_ids` keeps the order and reads records without metadata.
    The engine is loaded when states are first needed. Safe to use from many threads. Of several processes over one
    folder one writes at a time, the others wait; a process sees what another one wrote after `refresh`, or after it
    wrote itself. `close` closes what was opened here; it is opened again when needed.

    Args:
        collection_name: Name of the collection.
        embedding_function: What makes the vectors. None takes the bundled all-MiniLM-L6-v2, which costs nothing
            extra with pico (a new collection is then made for cosine).
        persist_directory: Folder of a local Chroma database; states go into a SQLite file in it.
        host: Where a Chroma server is; states go into a companion collection there.
        port: The server's port; None is 8000.
        headers: HTTP headers for the server. Never written down.
        chroma_cloud_api_key: Key of Chroma Cloud, in place of `host`. Never written down.
        tenant: Tenant in the Chroma database; None is the default one.
        database: Database of the tenant; None is the default one.
        client_settings: Settings of the Chroma client; None takes Chroma's defaults.
        collection_metadata: Metadata of a new collection, beside our notes of what made it.
        collection_configuration: Configuration of a new collection, such as its distance.
        client: An open Chroma client, in place of all these. Stays yours to close.
        relevance_score_fn: Makes a score in [0, 1] of a distance, for ``similarity_search_with_relevance_scores``.
        create_collection_if_not_exists: Whether an absent collection is made, or an error.
        ssl: Whether the server is asked over HTTPS.
        model: ``pico`` (bundled), ``nano``, ``small``, ``large``, a repository id or a folder. None takes what the
            collection was made with, or else pico.
        revision: Commit, tag or branch of a repository; None takes the collection's, or else the pinned one.
        device: ``cpu``, ``cuda``, ``cuda:1``, or several as ``"cuda:0,cuda:1"``; None takes CUDA where there is one.
        dtype: ``bf16`` or ``fp32``; None takes what the collection's states were made in, or what fits the device.
        batch_size: Most passages in one pass.
        decoder_weights: ``int8`` scores KaLM checkpoints faster on the CPU, a little less exactly; None as they are.
        compiled: Whether a KaLM checkpoint's decoder is compiled, which takes a minute at the first query.
        prefix_cache_bytes: Most bytes of decoder work that a KaLM checkpoint keeps between queries; None leaves it.
        max_passage_tokens: Where passages are cut; None takes the collection's cut, or else the model's (2,048 for
            pico, 1,024 for KaLM checkpoints).
        reranker: A ready engine in place of these. Stays yours to close.
        store: Where states go: a `StateStore` (yours to close), a folder or a ``.sqlite3`` file. None: SQLite beside
            `persist_directory`, in memory for an ephemeral client, a companion collection for a remote one.
        ratio: Tokens a state stands for when the store is made; None takes what is stored, or the engine's (4).
        codec: How states are stored: ``exact``, ``bf16`` or ``int8``; None takes what is stored, or else exact.
        missing: What `rerank` and compressors do with documents without states: ``"encode"`` and keep them,
            ``"raise"``, or ``"skip"`` (unscored, behind the others).
        passage: How a document becomes the text that is read: ``"document"``, or a template over its text and
            metadata such as ``"{title}: {text}"`` (`kalm_rag.index.passage_rule.PassageRule`). None takes the
            collection's own rule, or else ``"document"``.

    Raises:
        InputError: If arguments don't go together, or vectors in the collection were made by another embedder than
            the bundled one that would be used.
        StateMismatchError: When states are first needed, if the collection was made with another model or rule.

    Example:
        >>> store = KaLMChroma("example")  # persist_directory="my-db" keeps it
        >>> texts = ["I like tea.", "Paris is the capital of France.", "France borders Spain."]
        >>> ids = store.add_texts(texts, ids=["tea", "paris", "spain"])
        >>> [document.id for document in store.rerank("What is the capital of France?", k=2)]
        ['paris', 'spain']
    """

    get = _named(Chroma.get)
    similarity_search_by_vector = _named(Chroma.similarity_search_by_vector)
    similarity_search_by_vector_with_relevance_scores = _named(Chroma.similarity_search_by_vector_with_relevance_scores)
    max_marginal_relevance_search_by_vector = _named(Chroma.max_marginal_relevance_search_by_vector)

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
            ids: One per text; None, or None among them, makes new ones, so that adding the same texts again doubles
                them.
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
        passages = check_passages(texts)
        given = check_items(ids, "ids") if ids is not None else [None] * len(passages)
        named = [i if i is not None else str(uuid.uuid4()) for i in given]
        metas: list[Mapping[str, Any] | None] = list(metadatas if metadatas is not None else [])
        metas += [None] * (len(passages) - len(metas))
        self._upsert(named, passages, metas)
        return named

    def add_documents(self, documents: Iterable[Document], **kwargs: Any) -> list[str]:  # noqa: ANN401
        """Add documents under their ids, or new ones; see `add_texts`. Reads an iterator once."""
        taken = check_documents(documents)
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
        wanted, taken = check_passages(ids, "ids"), check_documents(documents)
        known = {document.id for document in self.get_by_ids(wanted)} if wanted else set()
        unknown = [i for i in wanted if i not in known]
        if unknown:
            raise InputError(
                f"{len(unknown)} of {len(wanted)} ids are unknown (first: {unknown[0]!r}). Add them first."
            )
        self._upsert(wanted, [d.page_content for d in taken], [d.metadata for d in taken])

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
            InputError: If neither ids nor a filter is given, or the filter is none that Chroma reads.
        """
        _refuse(kwargs, "delete")
        if ids is None and where is None and where_document is None:
            raise InputError("delete got neither ids nor a filter. Use reset_collection() to delete everything.")
        wanted = [] if ids is None else check_passages(ids, "ids")
        if (where is not None or where_document is not None) and (ids is None or wanted):
            with chroma_errors(f"collection {self._collection_name!r}"):
                wanted = self._collection.get(
                    ids=wanted or None,
                    where=None if where is None else dict(where),
                    where_document=None if where_document is None else dict(where_document),
                    include=[],
                )["ids"]
        if wanted:
            CollectionWriter(self.home).delete(wanted)  # needs no model

    def delete_collection(self) -> None:
        """Delete the collection and its references; unused states go with the next `gc`, those on a server at once."""
        home, collection = self.home, self._collection
        gone, stores, database = home.collection_id, home.stores(), home.database
        with database.writing():
            # lists in the metadata of a collection that is dropped whole turn up in new records (Chroma 1.5)
            with contextlib.suppress(StoreError), chroma_errors("delete"):
                while ids := collection.get(limit=PAGE, include=[])["ids"]:
                    collection.delete(ids=ids)
            super().delete_collection()
        for store in stores:
            store.unreference(gone, [reference.record_id for reference in store.references(gone)])
        if home.folder is None and self._settings["store"] is None:  # its states are gone with it
            home.lazy.close()
            if database.remote:
                drop_companions(database.client, self._collection_name)

    def reset_collection(self) -> None:
        """Delete the collection with its references, and make it anew."""
        home, rule = self.home, str(self.home.rule)
        with home.database.writing():
            self.delete_collection()
            self._chroma_collection = self._place.find_or_make(home.database, rule)
            home.find_again()

    def add_images(
        self, uris: list[str], metadatas: list[dict[str, Any]] | None = None, ids: list[str] | None = None
    ) -> list[str]:
        """Add images, as `langchain_chroma.Chroma` does: without states, so that they come back unscored."""
        with self.home.database.writing():
            return super().add_images(uris, metadatas, ids)

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Get documents in the order asked for, each once; unknown ids and records without text are left out."""
        wanted = list(dict.fromkeys(check_passages(ids, "ids")))
        found: dict[str, Document] = {}
        for some in chunked(wanted, PAGE):
            with chroma_errors(f"collection {self._collection_name!r}"):
                page = self._collection.get(ids=some, include=["documents", "metadatas"])
            rows = zip(page["ids"], page["documents"] or [], page["metadatas"] or [], strict=True)
            found |= {i: Document(text, metadata=meta or {}, id=i) for i, text, meta in rows if text is not None}
        return [found[i] for i in wanted if i in found]

    def similarity_search_with_score(
        self,
        query: str,
        k: int = DEFAULT_K,
        filter: dict[str, Any] | None = None,
        where_document: dict[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> list[tuple[Document, float]]:
        """Search as `langchain_chroma.Chroma` does; a filter that Chroma doesn't read is refused by name.

        Args:
            query: The question.
            k: Documents wanted.
            filter: Chroma metadata filter.
            where_document: Chroma document filter.
            kwargs: Of Chroma's ``query``.

        Returns:
            Documents with their distances, nearest first: lower is nearer.

        Raises:
            InputError: If a filter is none that Chroma reads.
            StoreError: If Chroma fails.
        """
        vector = cast("Embeddings", self._embedding_function).embed_query(query)
        return self.similarity_search_by_vector_with_relevance_scores(vector, k, filter, where_document, **kwargs)

    def as_compressor(self, **settings: Any) -> KaLMDocumentCompressor:  # noqa: ANN401
        """Give a compressor over this store's states; `settings` are arguments of `KaLMDocumentCompressor`."""
        own = {"store": self, "missing": self._missing, "passage": str(self.home.rule)}
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
        check_count(k if k is not None else 1, "k")
        check_count(fetch_k, "fetch_k")
        wanted: dict[str, Any] = {} if k is None else {"k": k}
        return KaLMRetriever(
            vectorstore=self,
            fetch_k=fetch_k,
            filter=filter,
            search_kwargs={} if where_document is None else {"where_document": where_document},
            compressor=self.as_compressor(**settings) if settings else None,
            **wanted,
        )

    def search_prepared(
        self,
        instructions: Instructions | None,
        *,
        query: str,
        **search: Any,  # noqa: ANN401
    ) -> tuple[PreparedQuery, list[tuple[Document, float]]] | None:
        """Search by the bundled vectors with a query that the model reads once, for search and decoder.

        Args:
            instructions: What the decoder will be told.
            query: The question.
            **search: Arguments of ``similarity_search``.

        Returns:
            The query as the decoder takes it, and documents with their distances; None where the vectors are others, or
            the query is blank.
        """
        given = self._embedding_function
        own_way = type(self).similarity_search is not Chroma.similarity_search
        if own_way or not isinstance(given, KaLMEmbeddings) or not query.strip():
            return None
        engine = self.reranker
        if engine.info.family != "pico":
            return None
        asked = engine.prepare(query, instructions)
        vector = given.embedder(engine).query(asked)
        return asked, self.similarity_search_by_vector_with_relevance_scores(vector, **search)

    def owners(self, ids: Sequence[str | None], texts: Sequence[str | None]) -> Owners:
        """Records that texts of a query are of, if they still read so: states encoded for them are kept."""
        return owners_in(self.home, ids, texts)

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
        """Drop states that no record uses; see `ChromaIndex.gc`. Of a folder also after `delete_collection`."""
        folder = self._home.folder
        if self._chroma_collection is None and folder is not None and self._settings["store"] is None:
            scopes = ("", str(folder))
            return sweep_folder(folder, all_collection_ids(folder), scopes=scopes, younger_than=younger_than)
        return self.home.gc(younger_than=younger_than)

    async def agc(self, *, younger_than: float = GRACE_SECONDS) -> GcReport:
        """Drop states in a thread; see `gc`."""
        return await run_in_executor(None, partial(self.gc, younger_than=younger_than))

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


def _refuse(kwargs: Mapping[str, object], where: str, allowed: Sequence[str] = ()) -> None:
    unknown = sorted(set(kwargs) - set(allowed))
    if unknown:
        raise InputError(f"{where} got unknown arguments: {', '.join(unknown)}.")
