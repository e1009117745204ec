"""A Chroma vector store for LlamaIndex that keeps the states of its nodes in step.

Order of writing: states, then Chroma; of deleting: Chroma, then references. Whatever a crash cuts off is a missing
state, which is encoded again on demand.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union, cast

import chromadb
import numpy as np
from llama_index.core.bridge.pydantic import Field, PrivateAttr, field_validator
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.vector_stores.types import MetadataFilters, VectorStoreQuery, VectorStoreQueryResult
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_index.vector_stores.chroma.base import _to_chroma_filter
from typing_extensions import Self

from kalm_rag.checks import check_passages, check_text
from kalm_rag.errors import InputError
from kalm_rag.index.candidates import Owners
from kalm_rag.index.collection import (
    SAME_VECTOR,
    CollectionNotes,
    check_vectors,
    chroma_errors,
    cosine,
)
from kalm_rag.index.embedders import BUNDLED, BundledEmbedder
from kalm_rag.index.home import CollectionHome
from kalm_rag.index.lazy_engine import LazyEngine
from kalm_rag.index.owners import owners_in
from kalm_rag.index.place import CollectionPlace
from kalm_rag.index.settings import HasStates, Place, place_of
from kalm_rag.index.writer import CollectionWriter
from kalm_rag.llama_index.connection import CollectionFields, check_collection
from kalm_rag.llama_index.embedding import KaLMEmbedding
from kalm_rag.llama_index.fields import PassageFields
from kalm_rag.llama_index.nodes import check_nodes, read_node, records_of
from kalm_rag.llama_index.postprocessor import KaLMNodePostprocessor
from kalm_rag.llama_index.upkeep import CollectionUpkeep
from kalm_rag.states import Codec
from kalm_rag.store.opening import store_file

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

logger = logging.getLogger(__name__)

Filters = Union[MetadataFilters, "list[MetadataFilters]", None]


class KaLMChromaVectorStore(PassageFields, CollectionFields, CollectionUpkeep, ChromaVectorStore):
    """LlamaIndex's `ChromaVectorStore`, with the states of each node's text kept beside it.

    Adding encodes what is new and replaces nodes of the same id; of an id given twice in one call the last counts.
    Deleting takes the references along, and `gc` the states that nothing refers to any more. Async methods run in
    threads. Nothing of the model is loaded before the first write, query of states, or upkeep. Of several processes
    that write to one folder, one at a time does, and the others wait.

    Args:
        chroma_collection: An open Chroma collection; or give `collection_name` with `persist_dir`, with `host` and
            `port`, or with `client`.
        client: The Chroma client the collection is from; None takes the collection's own.
        collection_name: Name of the collection; made if it is absent.
        persist_dir: Folder of a local Chroma database; made if it is absent.
        host: Host of a Chroma server.
        port: Its port; None is 8000.
        ssl: Whether it is asked over HTTPS.
        headers: Sent with each request. Their values are secrets: neither printed, written down nor pickled.
        tenant: Tenant in the database; None takes the default one.
        database: Database of the tenant; None takes the default one.
        collection_kwargs: For Chroma when the collection is made: ``configuration``, ``metadata``.
        store: Where states are, in place of SQLite in the database's folder (in memory for an ephemeral client, a
            companion collection for a remote one): a `StateStore`, a folder or a ``.sqlite3`` file.
        metadata_mode: Which metadata the text of a node holds when it is read. Left out: as the collection notes, or
            ``MetadataMode.EMBED`` for a new one.
        passage: How nodes are read, in place of `metadata_mode`: ``"document"`` (their text alone) or a template over
            text and metadata such as ``"{title}: {text}"``. Left out: as the collection notes.
        ratio: Tokens a state stands for in a new store; None is 4. One that is there keeps its own.
        codec: ``exact``, ``bf16`` or ``int8`` in a new store; None is exact. One that is there keeps its own.
        model: ``pico`` (bundled), ``nano``, ``small``, ``large``, a repository id or a folder: see
            `kalm_rag.Reranker.from_pretrained`. Left out: the one that the collection was made with, or pico.
        revision: Commit, tag or branch of a repository; None takes the collection's, or the pinned one.
        device: ``cpu``, ``cuda``, ``cuda:1``, or several with commas to encode on all; None takes CUDA if there is one.
        dtype: ``bf16`` or ``fp32``; None takes the collection's, or what fits the device.
        batch_size: Most passages in one pass.
        decoder_weights: ``int8`` scores KaLM checkpoints faster on the CPU.
        compiled: Compile a KaLM checkpoint's decoder at the first query (for GPUs).
        prefix_cache_bytes: Most bytes of decoder work kept between queries; None leaves the model's bound.
        max_passage_tokens: Where passages are cut; None takes the collection's cut, or else the model's (2,048 for
            pico, 1,024 for KaLM checkpoints).
        reranker: A ready engine instead of `model`, yours to close.

    Raises:
        InputError: (inside pydantic's ValidationError where it is a field's) if neither collection nor place is given,
            or an argument is unknown or out of range.
        StateMismatchError: If the collection was made with another model, revision or dtype than asked for, or its
            records are read in another way.

    Example:
        >>> from llama_index.core import Document, StorageContext, VectorStoreIndex
        >>> store = KaLMChromaVectorStore(chromadb.EphemeralClient().get_or_create_collection("facts"))
        >>> index = VectorStoreIndex.from_documents(
        ...     [Document(text="I like tea."), Document(text="Paris is the capital of France.")],
        ...     storage_context=StorageContext.from_defaults(vector_store=store),
        ...     embed_model=store.as_embedding(),
        ... )
        >>> query = "What is the capital of France?"
        >>> nodes = index.as_retriever(similarity_top_k=2).retrieve(query)
        >>> store.as_postprocessor(top_n=1).postprocess_nodes(nodes, query_str=query)[0].text
        'Paris is the capital of France.'
    """

    codec: str | None = Field(default=None, frozen=True, description="exact, bf16 or int8; None: as stored, or exact.")
    _writer: CollectionWriter = PrivateAttr()
    _embeddings_checked: bool = PrivateAttr(default=False)
    _bundled_checked: bool = PrivateAttr(default=False)

    def __init__(
        self,
        chroma_collection: Any = None,  # noqa: ANN401 - chromadb is untyped
        *,
        client: ClientAPI | None = None,
        **fields: Any,  # noqa: ANN401 - pydantic checks each
    ) -> None:
        super(ChromaVectorStore, self).__init__(**fields)  # ChromaVectorStore's own drops what it doesn't know
        if chroma_collection is not None:
            given = check_collection(chroma_collection)
            place = CollectionPlace(name=given.name, client=client, collection=given)
        else:
            place = self.place(client, options=self.collection_kwargs)
        model, rule = (self.model if "model" in fields else None), str(self.rule)
        database, self._collection = place.open(passage=rule, model=None if self.reranker is not None else model)
        try:
            self.note_place(self._collection)
            self._home = CollectionHome(
                database,
                self._collection,
                self._spec(),
                CollectionNotes(model=model, revision=self.revision),
                reranker=self.reranker,
                store=self.store.lazy if isinstance(self.store, HasStates) else self.store,
                codec=self.codec,
                ratio=self.ratio,
                default_passage=rule,
                place=place,
            )
            if self.reranker is None:
                self.__dict__["model"] = self._home.lazy.spec.model  # the collection says whose states lie beside it
            self._follow_rule(self._home.rule, f"collection {self._collection.name!r}")
        except BaseException:
            database.close()
            raise
        self._writer = CollectionWriter(self._home)

    @property
    def lazy(self) -> LazyEngine:
        """Engine and store, made on first use."""
        return self._home.lazy

    def _live(self) -> chromadb.Collection:
        """The collection as the client of now has it; `ChromaVectorStore`'s own methods read `_collection`."""
        self._collection = self._home.collection
        return self._collection

    @field_validator("codec", mode="before")
    @classmethod
    def _check_codec(cls, value: object) -> str | None:
        return None if value is None else Codec.parse(cast("str", value)).value

    @classmethod
    def from_collection(cls, collection: Any, **fields: object) -> Self:  # noqa: ANN401 - chromadb is untyped
        """Make it over an open collection.

        Raises:
            InputError: If it is not a Chroma collection.
        """
        return cls(check_collection(collection), **fields)

    @classmethod
    def from_params(cls, collection_name: str, **fields: object) -> Self:  # type: ignore[override] # one by one there
        """Make it by name and place: `persist_dir`, or `host` and `port`; the collection is made if absent."""
        return cls(collection_name=collection_name, **fields)

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "KaLMChromaVectorStore"

    def as_postprocessor(self, **fields: object) -> KaLMNodePostprocessor:
        """Give a postprocessor over the same engine and states, which reads nodes as the collection does.

        Args:
            **fields: Arguments of `KaLMNodePostprocessor`: top_n, threshold, instructions, ...
        """
        given: dict[str, Any] = {"store": self, **fields}
        return KaLMNodePostprocessor(**given)

    def as_embedding(self) -> KaLMEmbedding:
        """Give pico's embedding over the same engine and states: indexing then encodes each text once for both.

        Raises:
            InputError: If the collection holds vectors of another embedder.
        """
        if not self._bundled_checked and CollectionNotes.read(self._live().metadata).embedder != BUNDLED:
            check_vectors(self._live(), BundledEmbedder(self.lazy.engine()), self.rule, "embed_model=")
        self._bundled_checked = True
        return KaLMEmbedding(store=self)

    def add(self, nodes: Sequence[BaseNode], **add_kwargs: object) -> list[str]:
        """Add nodes, or replace those of the same id: states first, then text, metadata and vector.

        Args:
            nodes: Nodes with embeddings.
            **add_kwargs: Of LlamaIndex; unused.

        Returns:
            Their ids, in input order.

        Raises:
            InputError: If a node has no id or embedding, or text or metadata that Chroma can't hold, or embeddings are
                as wide as neither each other nor the collection's. Nothing is written then.
            StoreError: If the states can't be written, or another process keeps writing to the same folder. Batches
                finished before stay.
        """
        given = check_nodes(nodes, BaseNode)
        distinct = list({node.node_id: node for node in given}.values())
        records = records_of(distinct, flat_metadata=self.flat_metadata)
        self._check_embeddings(distinct)
        report = self._writer.upsert(records, compare=False)
        if report.truncated:
            logger.warning(
                "%d of %d passages are longer than the model reads, which has cut them (first: node %s). "
                "Split documents into smaller chunks.",
                len(report.truncated),
                len(distinct),
                report.truncated[0],
            )
        return [node.node_id for node in given]

    def delete(self, ref_doc_id: str, **delete_kwargs: object) -> None:
        """Delete the nodes of a document, and their references."""
        self._writer.delete(self._matching({"document_id": check_text(ref_doc_id, "ref_doc_id")}))

    def delete_nodes(self, node_ids: list[str] | None = None, filters: Filters = None, **delete_kwargs: object) -> None:
        """Delete nodes by id, by filter, or those of the ids that the filter lets through; neither deletes nothing."""
        wanted = None if node_ids is None else check_passages(node_ids, "node_ids")
        if isinstance(filters, list):
            filters = MetadataFilters(filters=[*filters])
        if filters is None or (isinstance(filters, MetadataFilters) and not filters.filters):
            self._writer.delete(wanted if wanted is not None else [])
            return
        found = self._matching(filters)
        self._writer.delete(found if wanted is None else [i for i in found if i in set(wanted)])

    def clear(self) -> None:
        """Delete all nodes, and all references of the collection."""
        self._writer.delete(self._matching(None))
        for store in self._home.stores():
            at = self._home.collection_id
            store.unreference(at, [reference.record_id for reference in store.references(at)])

    def get_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: Any = None,  # noqa: ANN401 - MetadataFilters, or a list of them
    ) -> list[BaseNode]:
        """Read nodes by id, by filter, or all of them.

        Raises:
            InputError: If the filter is none that Chroma reads.
            StoreError: If Chroma fails.
        """
        wanted = None if node_ids is None else check_passages(node_ids, "node_ids")
        with chroma_errors(f"collection {self._live().name!r}"):
            return super().get_nodes(wanted, filters)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:  # noqa: ANN401 - LlamaIndex's
        """Search by vector; see LlamaIndex's `ChromaVectorStore.query`.

        Raises:
            InputError: If the filter is none that Chroma reads, or the vector has another width.
            StoreError: If Chroma fails.
        """
        with chroma_errors(f"collection {self._live().name!r}"):
            return super().query(query, **kwargs)

    @property
    def client(self) -> chromadb.Collection:
        """The Chroma collection, as LlamaIndex's `ChromaVectorStore` gives it."""
        return self._live()

    async def async_add(self, nodes: Sequence[BaseNode], **add_kwargs: object) -> list[str]:
        """Run `add` in a thread."""
        return await asyncio.to_thread(self.add, nodes, **add_kwargs)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: object) -> None:
        """Run `delete` in a thread."""
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: Filters = None, **delete_kwargs: object
    ) -> None:
        """Run `delete_nodes` in a thread."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters, **delete_kwargs)

    async def aclear(self) -> None:
        """Run `clear` in a thread."""
        await asyncio.to_thread(self.clear)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Run `get_nodes` in a thread."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def aquery(self, query: VectorStoreQuery, **kwargs: object) -> VectorStoreQueryResult:
        """Run `query` in a thread."""
        return await asyncio.to_thread(self.query, query, **kwargs)

    def owners(self, ids: Sequence[str | None], texts: Sequence[str | None]) -> Owners:
        """Records that texts of a query are of, if they still read so: states encoded for them are kept."""
        return owners_in(self._home, ids, texts)

    def _check_embeddings(self, nodes: Sequence[BaseNode]) -> None:
        """Refuse to mix vectors: where a collection notes the bundled embedder, look at one of the new ones, once."""
        if self._embeddings_checked or not nodes or self._home.notes().embedder != BUNDLED:
            return
        if self.lazy.engine().info.family == "pico":
            node = nodes[0]
            modes = (MetadataMode.EMBED, MetadataMode.NONE)
            readings = {read_node(node, self.rule), *(node.get_content(metadata_mode=mode) for mode in modes)}
            theirs = np.asarray(node.get_embedding(), dtype=np.float32)
            ours = np.asarray(self.as_embedding().get_text_embedding_batch([text for text in readings if text]))
            best = max((cosine(theirs, vector) for vector in ours), default=1.0)
            if best < SAME_VECTOR:
                raise InputError(
                    f"collection {self._live().name!r} holds vectors of {BUNDLED}; the embedding of node "
                    f"{node.node_id!r} is not of that model (cosine {best:.2f}). Pass embed_model=store.as_embedding() "
                    f"to the index, or make another collection."
                )
        self._embeddings_checked = True

    def _matching(self, which: MetadataFilters | dict[str, Any] | None) -> list[str]:
        """Ids of the records that LlamaIndex's filters, or Chroma's own, let through."""
        if which is not None and not isinstance(which, MetadataFilters | dict):
            raise InputError(f"filters is {type(which).__name__}; wanted MetadataFilters, or a list of them.")
        collection = self._live()
        with chroma_errors(f"collection {collection.name!r}"):
            where = _to_chroma_filter(which) if isinstance(which, MetadataFilters) else which
            return list(collection.get(where=where, include=[])["ids"])

    def states_place(self) -> Place:
        """Where the states are, for the components that share them."""
        if self.store is not None:
            return place_of(self.store)
        if self.persist_dir is not None:
            return str(store_file(self.persist_dir))
        return {"live": "ChromaStore" if self.host is not None else "MemoryStore"}

    def __reduce__(self) -> tuple[Any, ...]:
        self.check_written()
        return super().__reduce__()
