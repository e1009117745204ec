"""One Chroma collection and its passage states, kept in step: add, query, delete, verify, backfill, gc, rebuild.

States are addressed by the text they were made of, so a query can only ever score the text that is in the
collection now.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from kalm_rag.checks import check_count, check_cut, check_passages, check_query
from kalm_rag.engine.prepared import PreparedQuery
from kalm_rag.engine.queue import cancel_on_error
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import ClosedError, InputError
from kalm_rag.index.candidates import Missing, Owners, RankedCandidate, Ranking, check_missing, rank_texts
from kalm_rag.index.clients import read_folder
from kalm_rag.index.collection import (
    COSINE,
    MOST_CANDIDATES,
    CollectionNotes,
    check_records,
    check_vectors,
    chroma_errors,
)
from kalm_rag.index.embedders import BUNDLED, BundledEmbedder, Embedder, wrap_embedder
from kalm_rag.index.home import CollectionHome
from kalm_rag.index.lazy_engine import EngineSpec
from kalm_rag.index.outcome import FailurePolicy, OnError, rank_and_select
from kalm_rag.index.passage_rule import PassageRule
from kalm_rag.index.place import CollectionPlace
from kalm_rag.index.pruning import pruned_text
from kalm_rag.index.results import AddReport, BackfillReport, Hit, QueryResult, RebuildReport, Timings, VerifyReport
from kalm_rag.index.select import Candidates, Selection
from kalm_rag.index.traces import ranking_span, search_span
from kalm_rag.index.writer import CollectionWriter, Records
from kalm_rag.instructions import Instructions, as_instructions
from kalm_rag.states import Codec
from kalm_rag.store import GRACE_SECONDS, GcReport, StateStore
from kalm_rag.store.arguments import check_store

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

Metadatas = Sequence["Mapping[str, Any] | None"]


class ChromaIndex:
    """Passages in a Chroma collection, their states beside it, and two-phase queries over both.

    Make one with `ChromaIndex.open`. Safe to use from many threads. Several processes may query one folder at once; of
    those that write, one at a time does, and the others wait. A process sees what another one wrote after `refresh`, or
    after it wrote itself.

    Example:
        >>> index = ChromaIndex.open()  # in memory; give a folder to keep it
        >>> report = index.add(["tea", "paris"], ["I like tea.", "Paris is the capital of France."])
        >>> index.query("What is the capital of France?", top_n=1).hits[0].id
        'paris'
        >>> index.close()
    """

    def __init__(self, home: CollectionHome, embedder: Embedder | None = None, *, missing: Missing = "encode") -> None:
        self.home = home
        self.missing = check_missing(missing)
        self._embedder = embedder
        self._own_pico: Reranker | None = None
        self._writer = CollectionWriter(home, lambda: self.embedder)
        self._closed = False

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
        revision: str | None = None,
        max_passage_tokens: int | None = None,
        passage: str | None = None,
        missing: Missing = "encode",
        create: bool = True,
        change_model: bool = False,
    ) -> ChromaIndex:
        r"""Open a collection with its states, or make both. The model is loaded when it is first needed.

        Args:
            path: Folder of a persistent Chroma database. Give this or `client`, or neither for an index in memory.
            client: A Chroma client of yours (persistent, ephemeral or HTTP).
            collection: Name of the collection.
            model: What `Reranker.from_pretrained` takes, or an engine (yours to close). None: the collection's or pico.
            embedder: What makes the vectors, see `kalm_rag.index.embedders.wrap_embedder`. None takes the bundled
                all-MiniLM-L6-v2, which costs nothing extra with pico.
            store: Where states go. None: SQLite in the database's folder, in memory, or a companion on the server.
            codec: ``exact``, ``bf16`` or ``int8``; None takes what is stored, or else exact.
            ratio: Tokens a state stands for when the store is made; None takes what is stored, or the engine's (4).
            device: ``cpu``, ``cuda``, ``cuda:1``; None takes CUDA where there is one.
            dtype: ``bf16`` or ``fp32``; None takes that of the collection's states, or bf16 on CUDA, fp32 on the CPU.
            revision: Commit, tag or branch of a repository; None takes the collection's, or the pinned one.
            max_passage_tokens: Where passages are cut, see `Reranker.from_pretrained`. None takes the collection's cut,
                or else the model's.
            passage: How a record becomes the text that is read, see `PassageRule`: ``"document"``, or a template such
                as ``"{title}\n{text}"``. None takes the collection's own rule, or else ``"document"``.
            missing: What to do with candidates without stored states: ``"encode"`` them and keep the states,
                ``"raise"``, or ``"skip"`` (unscored, behind the scored ones).
            create: Make the collection if it is absent.
            change_model: Let a collection that was made with another model, dtype or passage rule go over to this one.
                Its passages are then encoded again: run `backfill`, or leave it to the queries.

        Raises:
            InputError: If arguments don't go together, the collection is absent under ``create=False`` (nothing is made
                then), or its vectors were not made by `embedder`.
            StateMismatchError: If it was made with another model, dtype, passage rule, ratio or codec.
            ModelError: If `model` is no name, no folder and no repository id.
            StoreError: If Chroma or the store can't be opened; StoreFormatError if the store is damaged.
        """
        if path is not None and client is not None:
            raise InputError("both path and client were given; wanted one of them.")
        check_missing(missing)
        check_store(store)
        wrapped = None if embedder is None or embedder == BUNDLED else wrap_embedder(embedder)
        given = CollectionNotes(
            model=model.info.name if isinstance(model, Reranker) else model,
            revision=revision,
            passage=None if passage is None else str(PassageRule(passage)),
        )
        spec = EngineSpec(
            model=given.model if given.model is not None else "pico",
            revision=revision,
            device=device,  # type: ignore[arg-type] # becomes a name
            dtype=dtype,  # type: ignore[arg-type] # becomes a name
            ratio=ratio,
            max_passage_tokens=max_passage_tokens,
        )
        codec = None if codec is None else Codec.parse(codec)
        place = CollectionPlace(
            name=collection,
            folder=None if path is None else read_folder(path),
            client=client,
            create=create,
            options={"configuration": COSINE},
            embedder=BUNDLED if wrapped is None else wrapped.name,
        )
        database, opened = place.open(passage=given.passage, model=model if isinstance(model, str) else None)
        try:
            home = CollectionHome(
                database,
                opened,
                spec,
                given,
                reranker=model if isinstance(model, Reranker) else None,
                store=store,
                codec=codec,
                ratio=ratio,
                change_model=change_model,
                own_engine=True,
            )
            index = cls(home, wrapped, missing=missing)
            index._check_vectors()
        except BaseException:
            database.close()
            raise
        return index

    @property
    def collection(self) -> Collection:
        """The Chroma collection; ClosedError after `close`, as everything else."""
        return self._open().collection

    @property
    def engine(self) -> Reranker:
        """The engine at the store's ratio, loaded on first use."""
        return self.home.parts()[0]

    @property
    def store(self) -> StateStore:
        """The states; opened without loading the model where possible."""
        return self.home.store()

    @property
    def embedder(self) -> Embedder:
        """What makes the vectors."""
        if self._embedder is None:
            engine = self.home.lazy.engine()
            if engine.info.family != "pico":
                self._own_pico = engine = Reranker.from_pretrained("pico", device=engine.devices)
            self._embedder = BundledEmbedder(engine)
        return self._embedder

    def __len__(self) -> int:
        with chroma_errors("count"):
            return int(self.collection.count())

    def __repr__(self) -> str:
        if self._closed:
            return "ChromaIndex(closed)"
        notes, database = self.home.notes(), self.home.database
        place = database.folder if database.folder is not None else "remote" if database.remote else "in memory"
        return f"ChromaIndex({self.collection.name!r}, {place}, {len(self)} records, model {notes.model})"

    def add(self, ids: Iterable[str], texts: Iterable[str], metadatas: Metadatas | None = None) -> AddReport:
        """Add new records: states first, then text, metadata and vector. Texts stored before cost no encoding.

        Args:
            ids: Record ids, new and distinct.
            texts: Passages, one per id; blank ones are allowed.
            metadatas: One mapping per id, or None.

        Raises:
            InputError: If an id occurs twice or is there, lengths differ, a text is no valid string, or Chroma can't
                keep metadata. Nothing is written then.
            StoreError: If the states can't be written. Batches finished before stay.
        """
        return self._writer.add(self._records(ids, texts, metadatas))

    def upsert(
        self, ids: Iterable[str], texts: Iterable[str], metadatas: Metadatas | None = None, *, refresh: bool = False
    ) -> AddReport:
        """Add records, or replace those that exist; unchanged ones are left alone, unchanged texts not encoded.

        Takes and raises what `add` does, except for ids that exist. Metadata is replaced as a whole (Chroma's own
        merges it). `refresh` makes the vectors of unchanged records again, too: the embedder has changed.
        """
        return self._writer.upsert(self._records(ids, texts, metadatas), refresh=refresh)

    def delete(self, ids: Iterable[str]) -> int:
        """Delete records; unused states go with a later `gc`. Unknown ids are ignored; returns how many there were."""
        self._open()
        return self._writer.delete(check_passages(ids, "ids"))

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
        max_tokens: int | None = None,
        count_tokens: Callable[[str], int] | None = None,
        drop_duplicates: bool | float = False,
        diversity: float = 0.0,
        prune: bool | float = False,
        on_error: OnError = "raise",
        timeout: float | None = None,
    ) -> QueryResult:
        """Search by vector, then rerank the candidates with the decoder over their stored states.

        Args:
            text: The question.
            top_n: Hits wanted, >= 1; None gives all candidates.
            fetch_k: Candidates the vector search gives, 1 to 32,000.
            instructions: System and task text, or a task alone; None takes the model's defaults.
            ratio: A multiple of the stored ratio, for speed; None takes the stored one.
            threshold: Keep only P(yes) >= this; unscored candidates are dropped too, unless the ranking failed and
                `on_error` gives all in the order of the search.
            where: Chroma metadata filter.
            where_document: Chroma document filter.
            missing: Policy for this query; None takes the index's.
            max_tokens: Most tokens of all hits together, see `kalm_rag.index.select.Selection`, as for the next four.
            count_tokens: Counts the tokens of a text; None takes the model's tokenizer.
            drop_duplicates: Leave out hits that repeat a better one: True, or from which cosine on.
            diversity: How much a hit loses for being like others, in [0, 1), when it is decided which are handed on.
            prune: Leave out sentences that don't answer: True, or how far below the passage's best one; `Hit.kept`.
            on_error: ``"raise"``, or ``"retrieval_order"``: if the ranking fails, hits come in the order of the search,
                and `QueryResult.status` says so. Without an embedder of the app's own a model that can't be loaded is
                an error either way: the search needs it.
            timeout: Most seconds for the ranking behind the search; None for no limit.

        Raises:
            InputError: If the query is blank, a number out of range, or a filter none that Chroma reads.
            StateMismatchError: If `ratio` is no multiple of the stored one.
            MissingStateError: Under ``missing="raise"``, if candidates have no stored states.
            DeadlineError: Over `timeout`.
            StoreError: If Chroma fails; StoreFormatError if a stored state is damaged (`backfill` mends that).
        """
        check_query(text)
        check_cut(top_n, threshold)
        selection = Selection(
            max_tokens=max_tokens,
            count_tokens=count_tokens,
            drop_duplicates=drop_duplicates,
            diversity=diversity,
            prune=prune,
        )
        failure = FailurePolicy(on_error=on_error, timeout=timeout)
        if check_count(fetch_k, "fetch_k") > MOST_CANDIDATES:
            raise InputError(f"fetch_k is {fetch_k}; wanted at most {MOST_CANDIDATES:,}: Chroma can't give more.")
        policy = check_missing(missing if missing is not None else self.missing)
        told = as_instructions(instructions)
        with search_span(text, "kalm_rag.query") as ended:
            filters = {"where": where, "where_document": where_document}
            scoring: dict[str, Any] = {"missing": policy, "ratio": ratio, "threshold": threshold}
            result = self._query(text, told, fetch_k, filters, scoring, top_n, selection, failure)
            ended(result)
        return result

    def _query(
        self,
        text: str,
        told: Instructions | None,
        fetch_k: int,
        filters: Mapping[str, Mapping[str, Any] | None],
        scoring: Mapping[str, Any],
        top_n: int | None,
        selection: Selection,
        failure: FailurePolicy,
    ) -> QueryResult:
        """Answer what `query` has checked; `scoring` has arguments of `rank_texts`."""
        home = self._open()
        timings = Timings()
        own = self._embedder is not None and not isinstance(self._embedder, BundledEmbedder)
        with timings.stage("embed"):  # the bundled embedder takes its vector of what the decoder is given
            asked: str | PreparedQuery = text if own else home.parts()[0].prepare(text, told)
            vector = self.embedder.query(asked)
        with timings.stage("search"):
            found = self._search(vector, fetch_k, filters["where"], filters["where_document"])
        read = [home.rule.text(hit.text, hit.metadata, hit.id) for hit in found]
        owners = Owners(collection_id=home.collection_id, record_ids=[hit.id for hit in found], scope=home.scope)

        def rank(engine: Reranker, store: StateStore) -> Ranking:
            return rank_texts(
                engine,
                store,
                asked,
                read,
                timings=timings,
                instructions=told if own else None,  # a prepared query has its own
                owners=owners,
                **scoring,
            )

        given = Candidates(
            read=read,
            shown=lambda place: found[place].text or "",
            names=[hit.id for hit in found],
            body=lambda place: found[place].text,
        )
        with ranking_span(asked, told, given, top_n=top_n, model=home.lazy.spec.model) as ended:
            outcome = rank_and_select(home.lazy, rank, given=given, top_n=top_n, selection=selection, policy=failure)
            ended(outcome.ranking, outcome.candidates, outcome.report())
        return QueryResult(
            query=text,
            hits=[_ranked(found[r.index], r) for r in outcome.candidates],
            candidates=len(found),
            from_store=outcome.ranking.from_store,
            encoded=outcome.ranking.encoded,
            unscored=outcome.ranking.unscored,
            seconds=dict(timings.seconds),  # after a timeout the ranking may still add to its own
            status=outcome.status,
            model=outcome.model,
            fingerprint=outcome.fingerprint,
            left_out=outcome.left_out,
        )

    async def aquery(self, text: str, **options: Any) -> QueryResult:  # noqa: ANN401
        """As `query`, in a thread; if the task is cancelled, what waits for the decoder is dropped."""
        with cancel_on_error():
            return await asyncio.to_thread(self.query, text, **options)

    async def aupsert(
        self, ids: Iterable[str], texts: Iterable[str], metadatas: Metadatas | None = None, *, refresh: bool = False
    ) -> AddReport:
        """As `upsert`, in a thread."""
        return await asyncio.to_thread(self.upsert, ids, texts, metadatas, refresh=refresh)

    async def adelete(self, ids: Iterable[str]) -> int:
        """As `delete`, in a thread."""
        return await asyncio.to_thread(self.delete, ids)

    def refresh(self) -> None:
        """See what other processes wrote since this was opened; InputError if the client is the app's own."""
        self._open().database.refresh()

    def verify(self, *, search: bool = True) -> VerifyReport:
        """Compare records with their states, and states with checksums; under `search` look for each by its vector."""
        return self._open().verify(search=search)

    def backfill(self, *, show_progress: bool = False) -> BackfillReport:
        """Bring states up to the collection: encode what is missing or damaged, mend references.

        For a collection that somebody else filled, or whose texts were edited behind the index's back. Works in
        batches; safe to break off (StoreError, say) and run again.
        """
        return self._open().backfill(show_progress=show_progress)

    def gc(self, *, younger_than: float = GRACE_SECONDS) -> GcReport:
        """Drop references of records and collections that are gone, then states that nothing refers to.

        What was written less than `younger_than` seconds ago stays, so that another process may add meanwhile.
        """
        return self._open().gc(younger_than=younger_than)

    def rebuild(self, *, show_progress: bool = False) -> RebuildReport:
        """Make the collection again out of its own records, when its vector index is broken or leaves records out.

        Vectors that can be read are kept; others are made of stored states, or by the embedder. The collection keeps
        its name and gets a new id. StoreError if records can't be read at all.
        """
        return self._open().rebuild(self.embedder, show_progress=show_progress)

    def close(self) -> None:
        """Release what `open` made: store, engine, and the client unless it is yours. Closing twice is fine."""
        self._closed = True
        if self._own_pico is not None:
            self._own_pico.close()
        self.home.close()

    def __enter__(self) -> ChromaIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> CollectionHome:
        if self._closed:
            raise ClosedError("this ChromaIndex was closed. Open it again with ChromaIndex.open(...).")
        return self.home

    def _records(self, ids: Iterable[str], texts: Iterable[str], metadatas: Metadatas | None) -> Records:
        self._open()
        names, documents, checked = check_records(ids, texts, metadatas)
        return Records(ids=names, documents=documents, metadatas=checked)

    def _check_vectors(self) -> None:
        """Refuse another embedder than the collection's; the bundled one is only loaded if its notes don't name it."""
        if self._embedder is None and CollectionNotes.read(self.collection.metadata).embedder == BUNDLED:
            return
        if self._embedder is not None or self.collection.count():
            check_vectors(self.collection, self.embedder, self.home.rule)

    def _search(
        self, vector: list[float], fetch_k: int, where: Mapping[str, Any] | None, document: Mapping[str, Any] | None
    ) -> list[Hit]:
        """What a vector search gives, nearest first, not scored yet."""
        columns: Any = ["documents", "metadatas", "distances"]
        with chroma_errors("search"):
            found = self.collection.query(
                query_embeddings=[vector], n_results=fetch_k, where=where, where_document=document, include=columns
            )
        rows = zip(*(found[name][0] for name in ("ids", *columns)), strict=True)
        return [
            Hit(id=i, text=text, metadata=dict(metadata or {}), retrieval_rank=rank, distance=float(distance))
            for rank, (i, text, metadata, distance) in enumerate(rows, 1)
        ]


def _ranked(hit: Hit, found: RankedCandidate) -> Hit:
    """A hit of the search with what the ranking found."""
    return replace(
        hit,
        text=None if hit.text is None else pruned_text(hit.text, found.kept),
        margin=found.margin,
        probability=found.probability,
        truncated=found.truncated,
        kept=found.kept,
    )
