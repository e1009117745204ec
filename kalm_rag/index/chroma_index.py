"""One Chroma collection and its passage states, kept in step: add, query, delete, verify, backfill, gc.

States are addressed by the text they were made of, so a query can only ever score the text that is in the
collection now. Order of writing: states, then Chroma; of deleting: Chroma, then references. Whatever a crash cuts
off is a missing state, which is encoded again on demand.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kalm_rag.checks import check_cut, check_passages, check_query
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import ClosedError, InputError
from kalm_rag.index import upkeep
from kalm_rag.index.candidates import Missing, RankedCandidate, check_missing, find_states, rank_texts
from kalm_rag.index.collection import (
    PAGE,
    check_records,
    collection_model,
    live_collections,
    open_client,
    open_collection,
    open_states,
    records,
    typed,
)
from kalm_rag.index.embedders import BUNDLED, BundledEmbedder, Embedder, wrap_embedder
from kalm_rag.index.results import AddReport, BackfillReport, Hit, QueryResult, Timings, VerifyReport
from kalm_rag.instructions import Instructions, as_instructions
from kalm_rag.states import Codec, passage_key
from kalm_rag.store import GcReport, Reference, StateStore

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Candidate:
    """One row of a vector search."""

    id: str
    text: str | None
    metadata: Mapping[str, Any]
    distance: float


class ChromaIndex:
    """Passages in a Chroma collection, their states beside it, and two-phase queries over both.

    Make one with `ChromaIndex.open`. Safe to use from many threads; several processes may query at once, but only
    one may write to a persistent Chroma folder at a time (Chroma's own limit: it loses vectors silently).

    Args:
        client: The Chroma client, yours to close.
        collection: An open Chroma collection of it.
        engine: The reranker.
        store: A state store in the engine's layout.
        embedder: What makes this collection's vectors.
        missing: What to do with candidates without stored states: ``"encode"`` them and keep the states,
            ``"raise"``, or ``"skip"`` (unscored, behind the scored ones).
    """

    def __init__(
        self,
        client: ClientAPI,
        collection: Collection,
        engine: Reranker,
        store: StateStore,
        embedder: Embedder,
        *,
        missing: Missing = "encode",
    ) -> None:
        self._client = client
        self.engine = engine
        self.store = store
        self.embedder = embedder
        self.missing = check_missing(missing)
        self._collection: Collection | None = collection
        self._owned: list[Any] = []

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        client: ClientAPI | None = None,
        collection: str = "passages",
        model: str | Reranker | None = None,
        embedder: object = None,
        store: StateStore | None = None,
        codec: str | Codec | None = None,
        ratio: int | None = None,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        dtype: str | torch.dtype | None = None,
        missing: Missing = "encode",
        create: bool = True,
    ) -> ChromaIndex:
        """Open a collection with its states, or make both.

        Args:
            path: Folder of a persistent Chroma database; made if absent. Give this or `client`, or neither for an
                index in memory.
            client: A Chroma client of yours (persistent, ephemeral or HTTP).
            collection: Name of the collection.
            model: Name or folder for `Reranker.from_pretrained`, or a ready engine (which stays yours to close). None
                takes the one that the collection was made with, or else pico.
            embedder: What makes the vectors: see `kalm_rag.index.embedders.wrap_embedder`. None takes the bundled
                all-MiniLM-L6-v2, which costs nothing extra with pico.
            store: Where states go. None: SQLite in the database's folder; in memory for an ephemeral client; a
                companion collection for a remote one.
            codec: ``exact``, ``bf16`` or ``int8``; None takes what is stored, or else exact.
            ratio: Tokens a state stands for when the store is made; None takes what is stored, or the engine's (4).
            device: As `Reranker.from_pretrained`.
            dtype: As `Reranker.from_pretrained`.
            missing: Policy for candidates without states.
            create: Make the collection if it is absent.

        Raises:
            InputError: If arguments don't go together, the collection is absent under ``create=False``, or its
                vectors were not made by `embedder`.
            StateMismatchError: If states are stored at another ratio or codec than asked for.
            StoreError: If the store can't be opened; StoreFormatError if it is damaged.
            ModelError: If the model can't be loaded.
        """
        if path is not None and client is not None:
            raise InputError("both path and client were given; wanted one of them.")
        check_missing(missing)
        if client is None:
            client = open_client(path)
        owned: list[Any] = []
        try:
            if isinstance(model, Reranker):
                engine = model
            else:
                name = model if model is not None else collection_model(client, collection) or "pico"
                engine = Reranker.from_pretrained(name, device=device, dtype=dtype)
                owned.append(engine)
            if store is None:
                store = open_states(client, collection, engine, codec=codec, ratio=ratio)
                owned.append(store)
            if engine.ratio != store.layout.ratio:
                engine = engine.at(store.layout.ratio)
                owned.append(engine)
            wrapped = _embedder(embedder, engine, owned)
            opened = open_collection(client, collection, wrapped, model=engine.info.name, create=create)
            index = cls(client, opened, engine, store, wrapped, missing=missing)
        except BaseException:
            for thing in owned:
                thing.close()
            raise
        index._owned = owned
        return index

    @property
    def collection(self) -> Collection:
        """The Chroma collection.

        Raises:
            ClosedError: After `close`.
        """
        if self._collection is None:
            raise ClosedError("this ChromaIndex was closed. Open it again with ChromaIndex.open(...).")
        return self._collection

    def __len__(self) -> int:
        return int(self.collection.count())

    def add(
        self, ids: Sequence[str], texts: Sequence[str], metadatas: Sequence[Mapping[str, Any] | None] | None = None
    ) -> AddReport:
        """Add new records: states first, then text, metadata and vector. Texts stored before cost no encoding.

        Args:
            ids: Record ids, new and distinct.
            texts: Passages, one per id; blank ones are allowed.
            metadatas: One mapping per id, or None.

        Raises:
            InputError: If an id occurs twice or exists already, lengths differ, or a text is no valid string.
                Nothing is written then.
            StoreError: If the states can't be written. Batches finished before stay.
        """
        ids, texts, metadatas = check_records(ids, texts, metadatas)
        taken = [found for page in _pages(ids) for found in self.collection.get(ids=page, include=[])["ids"]]
        if taken:
            raise InputError(f"{len(taken)} of {len(ids)} ids exist already (first: {taken[0]!r}). Use upsert(...).")
        report = AddReport()
        for batch in _slices(len(ids)):
            report += self._write(ids[batch], texts[batch], metadatas[batch])
        return report

    def upsert(
        self,
        ids: Sequence[str],
        texts: Sequence[str],
        metadatas: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        refresh: bool = False,
    ) -> AddReport:
        """Add records, or replace those that exist; unchanged ones are left alone, unchanged texts not encoded.

        Metadata is replaced as a whole (Chroma's own upsert would merge it with the old).

        Args:
            ids: Record ids, distinct.
            texts: Passages, one per id.
            metadatas: One mapping per id, or None.
            refresh: Make the vectors of unchanged records again, too: the embedder has changed.

        Raises:
            InputError: If an id occurs twice, lengths differ, a text is no valid string, or Chroma can't keep metadata.
            StoreError: If the states can't be written. Batches finished before stay.
        """
        ids, texts, metadatas = check_records(ids, texts, metadatas)
        report = AddReport()
        for batch in _slices(len(ids)):
            report += self._replace(ids[batch], texts[batch], metadatas[batch], refresh)
        return report

    def delete(self, ids: Sequence[str]) -> int:
        """Delete records and their references; unused states go with the next `gc`. Unknown ids are ignored.

        Returns:
            How many records there were.

        Raises:
            InputError: If `ids` is a single string.
        """
        wanted = list(dict.fromkeys(check_passages(ids)))
        deleted = 0
        for page in _pages(wanted):
            deleted += len(self.collection.get(ids=page, include=[])["ids"])
            self.collection.delete(ids=page)
            self.store.unreference(str(self.collection.id), page)
        return deleted

    def query(
        self,
        text: str,
        *,
        top_n: int | None = 5,
        fetch_k: int = 50,
        instructions: Instructions | str | None = None,
        ratio: int | None = None,
        threshold: float | None = None,
        where: Mapping[str, Any] | None = None,
        where_document: Mapping[str, Any] | None = None,
        missing: Missing | None = None,
    ) -> QueryResult:
        """Search by vector, then rerank the candidates with the decoder over their stored states.

        Args:
            text: The question.
            top_n: Hits wanted, >= 1; None gives all candidates.
            fetch_k: Candidates the vector search gives, >= 1.
            instructions: System and task text, or a task alone; None takes the model's defaults.
            ratio: A multiple of the stored ratio, for speed; None takes the stored one.
            threshold: Keep only P(yes) >= this; unscored candidates are dropped too.
            where: Chroma metadata filter.
            where_document: Chroma document filter.
            missing: Policy for this query; None takes the index's.

        Raises:
            InputError: If the query is blank, or a number out of range.
            StateMismatchError: If `ratio` is no multiple of the stored one.
            MissingStateError: Under ``missing="raise"``, if candidates have no stored states.
            StoreFormatError: If a stored state is damaged; `backfill` mends that.
        """
        check_query(text)
        check_cut(top_n, threshold)
        if isinstance(fetch_k, bool) or not isinstance(fetch_k, int) or fetch_k < 1:
            raise InputError(f"fetch_k is {fetch_k!r}; wanted a whole number >= 1.")
        policy = check_missing(missing if missing is not None else self.missing)
        timings = Timings()
        with timings.stage("embed"):
            vector = self.embedder.query(text)
        with timings.stage("search"):
            candidates = self._search(vector, fetch_k, where, where_document)
        ranking = rank_texts(
            self.engine,
            self.store,
            text,
            [c.text for c in candidates],
            missing=policy,
            timings=timings,
            instructions=as_instructions(instructions),
            ratio=ratio,
            threshold=threshold,
            references=self._references(candidates),
        )
        return QueryResult(
            query=text,
            hits=[_hit(candidates, one) for one in ranking.placed[:top_n]],
            candidates=len(candidates),
            from_store=ranking.from_store,
            encoded=ranking.encoded,
            unscored=ranking.unscored,
            seconds=timings.seconds,
        )

    def verify(self) -> VerifyReport:
        """Compare every record with its states, and every state with its checksum. Changes nothing."""
        return upkeep.verify(self.store, str(self.collection.id), records(self.collection))

    def backfill(self) -> BackfillReport:
        """Bring states up to the collection: encode what is missing or damaged, mend references.

        This is how states are added to a collection that somebody else filled, or whose texts were edited behind
        the index's back. Works through the collection in batches; safe to break off and run again.

        Raises:
            StoreError: If the states can't be written. Batches finished before stay.
        """
        return upkeep.backfill(self.engine, self.store, str(self.collection.id), records(self.collection))

    def gc(self) -> GcReport:
        """Drop references of records and collections that are gone, then states that nothing refers to.

        States kept for passages that came from elsewhere (another retriever) have no reference and go too; they
        are encoded again when needed.
        """
        live = live_collections(self._client, self.store)
        return upkeep.sweep(self.store, str(self.collection.id), records(self.collection, texts=False), live)

    def close(self) -> None:
        """Release what `open` made: the store and the engine. The client stays open. Closing twice is fine."""
        self._collection = None
        while self._owned:
            self._owned.pop().close()

    def __enter__(self) -> ChromaIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(
        self, ids: list[str], texts: list[str], metadatas: list[dict[str, Any] | None], *, replace: bool = False
    ) -> AddReport:
        """One batch: states and references in one transaction, then vectors, texts and metadata."""
        timings = Timings()
        keys = [passage_key(text) for text in texts]
        with timings.stage("fetch"):
            absent = self.store.missing(keys)
        with timings.stage("encode"):
            todo = {key: text for key, text in zip(keys, texts, strict=True) if key in absent}
            states = self.engine.encode(list(todo.values()), show_progress=False)
        references = [
            Reference(collection_id=str(self.collection.id), record_id=i, key=key)
            for i, key in zip(ids, keys, strict=True)
        ]
        with timings.stage("store"):
            self.store.put_many(states, references)
        with timings.stage("embed"):
            vectors, cut = self._vectors(texts, references)
        with timings.stage("chroma"):
            write = self.collection.upsert if replace else self.collection.add
            write(ids=ids, embeddings=vectors, documents=texts, metadatas=metadatas)
        return AddReport(
            records=len(ids),
            encoded=len(todo),
            from_store=sum(key not in absent for key in keys),
            truncated=[i for i, is_cut in zip(ids, cut, strict=True) if is_cut],
            seconds=timings.seconds,
        )

    def _replace(
        self, ids: list[str], texts: list[str], metadatas: list[dict[str, Any] | None], refresh: bool
    ) -> AddReport:
        """One batch of an upsert: leave alone what is the same, write the rest with the old metadata keys removed."""
        there = self.collection.get(ids=ids, include=["documents", "metadatas"])
        old = {
            i: (text, dict(meta or {}))
            for i, text, meta in zip(there["ids"], there["documents"], there["metadatas"], strict=True)
        }
        keys = [passage_key(text) for text in texts]
        absent = self.store.missing(keys)
        same = {
            row
            for row, (i, text, meta) in enumerate(zip(ids, texts, metadatas, strict=True))
            if not refresh
            and i in old
            and (old[i][0], typed(old[i][1])) == (text, typed(meta or {}))
            and keys[row] not in absent
        }
        todo = [row for row in range(len(ids)) if row not in same]
        unchanged = AddReport(unchanged=len(same))
        if same:  # somebody else may have written them, without references
            at = str(self.collection.id)
            self.store.put_many([], [Reference(collection_id=at, record_id=ids[r], key=keys[r]) for r in sorted(same)])
        if not todo:
            return unchanged
        cleared = []
        for row in todo:
            gone = old.get(ids[row], ("", {}))[1].keys() - (metadatas[row] or {}).keys()
            cleared.append({**dict.fromkeys(gone), **(metadatas[row] or {})} or None)  # Chroma drops keys set to None
        return unchanged + self._write([ids[r] for r in todo], [texts[r] for r in todo], cleared, replace=True)

    def _vectors(self, texts: list[str], references: Sequence[Reference]) -> tuple[np.ndarray, list[bool]]:
        """Retrieval vectors, and which passages were cut; with pico, from the states just stored."""
        states = find_states(  # "encode": another process's gc may have swept what was stored a moment ago
            self.engine, self.store, texts, missing="encode", timings=Timings(), references=references
        ).states
        cut = [] if states is None else (states.total_tokens > states.tokens).tolist()
        if isinstance(self.embedder, BundledEmbedder) and self.engine.info.family == "pico" and states is not None:
            return self.embedder.from_states(states), cut
        return self.embedder.passages(texts), cut

    def _search(
        self, vector: list[float], fetch_k: int, where: Mapping[str, Any] | None, document: Mapping[str, Any] | None
    ) -> list[_Candidate]:
        found = self.collection.query(
            query_embeddings=[vector],
            n_results=fetch_k,
            where=where,
            where_document=document,
            include=["documents", "metadatas", "distances"],
        )
        return [
            _Candidate(i, text, dict(meta or {}), float(distance))
            for i, text, meta, distance in zip(
                found["ids"][0], found["documents"][0], found["metadatas"][0], found["distances"][0], strict=True
            )
        ]

    def _references(self, candidates: Sequence[_Candidate]) -> list[Reference]:
        collection_id = str(self.collection.id)
        return [
            Reference(collection_id=collection_id, record_id=c.id, key=passage_key(c.text))
            for c in candidates
            if c.text is not None
        ]


def _embedder(embedder: object, engine: Reranker, owned: list[Any]) -> Embedder:
    if embedder is not None and embedder != BUNDLED:
        return wrap_embedder(embedder)
    if engine.info.family == "pico":
        return BundledEmbedder(engine)
    own = Reranker.from_pretrained("pico", device=engine.devices)
    owned.append(own)
    return BundledEmbedder(own)


def _hit(candidates: Sequence[_Candidate], placed: RankedCandidate) -> Hit:
    one = candidates[placed.index]
    return Hit(
        id=one.id,
        text=one.text,
        metadata=one.metadata,
        retrieval_rank=placed.index + 1,
        distance=one.distance,
        margin=placed.margin,
        probability=placed.probability,
        truncated=placed.truncated,
    )


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, start + upkeep.BATCH) for start in range(0, count, upkeep.BATCH))


def _pages(ids: Sequence[str]) -> Iterator[list[str]]:
    return (list(ids[start : start + PAGE]) for start in range(0, len(ids), PAGE))
