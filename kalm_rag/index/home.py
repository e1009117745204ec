"""An open collection with its engine and states, as every door holds it: notes followed, upkeep in one place.

The doors (`ChromaIndex`, LangChain's and LlamaIndex's stores) translate their framework's words into this one's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import ClosedError, StateMismatchError
from kalm_rag.index import rebuilding, upkeep
from kalm_rag.index.clients import Database, _server
from kalm_rag.index.collection import (
    PAGE,
    CollectionNotes,
    chroma_errors,
    live_collections,
    note,
    pages,
    passage_rule,
    records,
    require_collection,
    with_notes,
)
from kalm_rag.index.embedders import Embedder
from kalm_rag.index.lazy_engine import EngineSpec, LazyEngine
from kalm_rag.index.passage_rule import PassageRule
from kalm_rag.index.place import CollectionPlace
from kalm_rag.index.results import BackfillReport, RebuildReport, VerifyReport
from kalm_rag.models.devices import parse_devices, parse_dtype
from kalm_rag.models.registry import passage_limit
from kalm_rag.states import Codec, Layout
from kalm_rag.store import GcReport, StateStore, collection_layouts, open_store, stored_layout
from kalm_rag.store.arguments import check_same_layout
from kalm_rag.store.base import GRACE_SECONDS
from kalm_rag.store.memory import MemoryStore
from kalm_rag.store.rows import chunked

if TYPE_CHECKING:
    from chromadb.api.models.Collection import Collection

_memory: weakref.WeakKeyDictionary[object, dict[str, dict[Layout, MemoryStore]]] = weakref.WeakKeyDictionary()
_memory_lock = threading.Lock()


class CollectionHome:
    """A collection, what made it, and its engine and store, loaded on first use.

    Args:
        database: Client and write lock.
        collection: An open collection of it.
        spec: Which engine; dtype, revision and cut left open are taken from the collection's notes.
        given: What the caller said of the collection; None where the notes may decide.
        reranker: A ready engine instead of `spec`, yours to close.
        store: Where states go; None: SQLite in the database's folder, in memory for an ephemeral client, a companion
            collection for a remote one. Yours to close.
        codec: ``exact``, ``bf16`` or ``int8``; None takes what is stored, or else exact.
        ratio: Tokens a state stands for when the store is made; None takes what is stored, or the engine's (4).
        default_passage: The rule of a collection that no door has made its own yet; None looks for LlamaIndex's nodes.
        change_model: Let a collection go over to another model, dtype or passage rule; its states are encoded again.
        own_engine: Load an engine of its own, that `close` closes.
        place: Where database and collection are opened again when they are used after `close`; None: that is an error.

    Raises:
        StateMismatchError: If the collection was made with another model, revision, dtype or passage rule.
    """

    def __init__(
        self,
        database: Database,
        collection: Collection,
        spec: EngineSpec,
        given: CollectionNotes,
        *,
        reranker: Reranker | None = None,
        store: StateStore | LazyEngine | str | None = None,
        codec: str | Codec | None = None,
        ratio: int | None = None,
        default_passage: str | None = None,
        change_model: bool = False,
        own_engine: bool = False,
        place: CollectionPlace | None = None,
    ) -> None:
        self._database, self._place, self._reopening = database, place, threading.RLock()
        self._collection: Collection | None = collection
        self._name = collection.name
        noted = CollectionNotes.read(collection.metadata)
        if reranker is not None:
            given = replace(given, dtype=reranker.info.dtype, max_passage_tokens=str(reranker.info.max_passage_tokens))
        elif not change_model or (given.model is None and noted.model is not None):
            spec = adopt(spec, noted, named=given.model is not None, moving=change_model)
            given = replace(
                given,
                dtype=_dtype_name(spec) if spec.dtype is not None else None,
                max_passage_tokens=None if spec.max_passage_tokens is None else str(spec.max_passage_tokens),
            )
        if noted.passage is None and noted.embedder is None and given.passage is None:
            given = replace(given, passage=default_passage)
        if change_model:
            given = replace(given, model=spec.model if reranker is None else reranker.info.name)
            made = replace(
                given,
                dtype=given.dtype or _dtype_name(spec),
                max_passage_tokens=given.max_passage_tokens or _limit_of(spec),
            )
            self._notes = with_notes(made, noted)
        else:
            noted.check(given, self._name)
            self._notes = with_notes(noted, given)
        self._seen, self._moving = noted, change_model
        self._rule: PassageRule | None = None
        self._given_store, self._codec, self._ratio, self._change_model = store, codec, ratio, change_model
        self._others: dict[str, StateStore] = {}
        self.lazy = LazyEngine(
            spec,
            reranker=reranker,
            store=store,
            opener=self._open_states if store is None else None,
            own_engine=own_engine,
            codec=codec,
            ratio=ratio,
        )
        if store is None:
            self._check_stored()
            if reranker is not None:
                self._check_same_model(reranker)
        database.watch(self.find_again)

    @property
    def database(self) -> Database:
        """Client and write lock."""
        self._open_again()
        return self._database

    @property
    def folder(self) -> Path | None:
        """The folder of a local database, whether it is open or not; None for others."""
        return self._database.folder

    @property
    def collection(self) -> Collection:
        """The Chroma collection.

        Raises:
            ClosedError: After `close`, where it can't be opened again.
        """
        self._open_again()
        if self._collection is None:
            raise ClosedError("this collection was closed. Open it again.")
        return self._collection

    @property
    def collection_id(self) -> str:
        """Chroma's id of the collection, which references bear."""
        return str(self.collection.id)

    @property
    def rule(self) -> PassageRule:
        """How the collection's records are read."""
        if self._rule is None:
            self._rule = passage_rule(self.collection, self._notes)
        return self._rule

    @property
    def scope(self) -> str:
        """Names the database to a store that other databases may share; "" for the store beside it."""
        return self.database.scope if self._given_store is not None else ""

    def notes(self) -> CollectionNotes:
        """What makes the collection and its states, as far as it is known without loading a model."""
        spec, reranker = self.lazy.spec, self.lazy.reranker
        dtype = reranker.info.dtype if reranker is not None else _dtype_name(spec)
        model = reranker.info.name if reranker is not None else spec.model
        limit = str(reranker.info.max_passage_tokens) if reranker is not None else _limit_of(spec)
        made = CollectionNotes(model=model, dtype=dtype, max_passage_tokens=limit, passage=str(self.rule))
        return with_notes(self._notes, made)

    def note(self) -> None:
        """Note what makes the collection, under the lock of writing."""
        note(self.collection, self.notes())
        self._notes, self._moving = self.notes(), False
        self._seen = CollectionNotes.read(self.collection.metadata)

    def parts(self) -> tuple[Reranker, StateStore]:
        """Engine and store at one ratio; see `LazyEngine.get`."""
        return self.lazy.get()

    def stores(self) -> list[StateStore]:
        """The stores that hold references of the collection, found without a model."""
        opened = self.lazy.opened()
        if self._given_store is not None:
            return [opened if opened is not None else self.parts()[1]]
        found = {} if opened is None else {opened.layout.fingerprint: opened}
        for layout in self._layouts():
            if layout.fingerprint not in found:
                found[layout.fingerprint] = self._other(layout)
        return list(found.values())

    def store(self) -> StateStore:
        """The store whose states queries read: without loading a model where only one model's states are there."""
        stores = self.stores()
        return stores[0] if len(stores) == 1 else self.parts()[1]

    def verify(self, *, search: bool = True) -> VerifyReport:
        """Compare every record with its states, and every state with its checksum. Changes nothing.

        Args:
            search: Also look for every record by its own vector, to tell those that no search finds.
        """
        return upkeep.verify(self.store(), self.collection, records(self.collection, self.rule), search=search)

    def backfill(self, *, show_progress: bool = False) -> BackfillReport:
        """Bring states up to the collection: encode what is missing or damaged, mend references."""
        with self.database.writing():
            self.find_again()
        parts = self.parts()
        pages = records(self.collection, self.rule)
        total = self.collection.count()
        report = upkeep.backfill(
            parts, self.collection_id, pages, scope=self.scope, total=total, show_progress=show_progress
        )
        with self.database.writing():
            self.find_again()
            self.note()
        return replace(report, dropped=self._forget_gone(parts[1]))

    def gc(self, *, younger_than: float = GRACE_SECONDS) -> GcReport:
        """Drop references of records and collections that are gone, then states that nothing refers to."""
        swept = GcReport()
        self._let_go_of_memory()
        for store in self.stores():
            self._forget_gone(store)
            live = live_collections(self.database, store)
            scopes = {self.database.scope} | ({""} if self._given_store is None else set())
            swept += store.gc(live, scopes=scopes, younger_than=younger_than)
        return swept

    def rebuild(self, embedder: Embedder | None, *, show_progress: bool = False) -> RebuildReport:
        """Make the collection again from its own records; see `rebuilding.rebuild`."""
        return rebuilding.rebuild(self, embedder, show_progress=show_progress)

    def close(self) -> None:
        """Close what was opened here: store, engine, and the client if it is ours. Closing twice is fine."""
        self._collection = None
        for store in self._others.values():
            store.close()
        self._others.clear()
        self.lazy.close()
        self._database.close()

    def find(self, ids: list[str]) -> list[str]:
        """Which of the ids there are."""
        with chroma_errors(f"collection {self._name!r}"):
            return list(self.collection.get(ids=ids, include=[])["ids"]) if ids else []

    def find_again(self) -> None:
        """Look the collection up again by name, as before each write: others may have made it again, or changed it.

        Raises:
            InputError: If it is gone.
            StateMismatchError: If another door let it go over to another model, dtype or cut.
        """
        if self._collection is None:
            return
        self._collection = require_collection(self.database.client, self._name)
        noted = CollectionNotes.read(self._collection.metadata)
        if noted == self._seen or self._moving:
            return
        noted.check(replace(self.notes(), passage=None), self._name, opened=True)
        self._notes, self._rule, self._seen = with_notes(noted, self._notes), None, noted

    def _open_again(self) -> None:
        if self._collection is not None or self._place is None:
            return
        with self._reopening:
            if self._collection is None:
                self._database, self._collection = self._place.open_again()
                self._database.watch(self.find_again)

    def _forget_gone(self, store: StateStore) -> int:
        """Drop references of records that are gone, looked at again while nobody writes."""
        gone = {r.record_id for r in store.references(self.collection_id)}
        for page in pages(self.collection, []):
            gone.difference_update(page["ids"])
        dropped = 0
        for ids in chunked(sorted(gone), PAGE):
            with self.database.writing():
                dropped += store.unreference(self.collection_id, set(ids) - set(self.find(ids)))
        return dropped

    def _where(self) -> Any:  # noqa: ANN401 - folder, client or ":memory:"
        if self.database.remote:
            return self.database.client
        return self.database.folder if self.database.folder is not None else ":memory:"

    def _layouts(self) -> Iterable[Layout]:
        if self._where() == ":memory:":
            return [layout for layout, store in self._in_memory().items() if store.collections()]
        return collection_layouts(self._where(), self.collection_id, name=self._name)

    def _other(self, layout: Layout) -> StateStore:
        if self._where() == ":memory:":
            return self._in_memory()[layout]
        if layout.fingerprint not in self._others:
            self._others[layout.fingerprint] = open_store(self._where(), layout, name=self._name)
        return self._others[layout.fingerprint]

    def _open_states(self, engine: Reranker) -> StateStore:
        """Open the states beside the collection, at the ratio and codec that are stored."""
        self._check_same_model(engine)
        where = self._where()
        base = engine.at(self._ratio) if self._ratio is not None else engine
        layout = base.layout(self._codec if self._codec is not None else Codec.EXACT)
        if where == ":memory:":
            kept = [stored for stored in self._in_memory() if stored.fingerprint == layout.fingerprint]
            there = kept[0] if kept else None
        else:
            there = stored_layout(where, layout.fingerprint, name=self._name)
        if there is not None:
            layout = replace(
                layout,
                ratio=there.ratio if self._ratio is None else layout.ratio,
                codec=there.codec if self._codec is None else layout.codec,
            )
        if where != ":memory:":
            return open_store(where, layout, name=self._name)
        with _memory_lock:
            return self._in_memory().setdefault(layout, SharedMemoryStore(layout))

    def _let_go_of_memory(self) -> None:
        """Drop the states of an ephemeral client's collections that are gone."""
        if self._where() == ":memory:":
            kept = _memory.setdefault(_server(self.database.client), {})
            for gone in kept.keys() - {str(collection.id) for collection in self.database.client.list_collections()}:
                del kept[gone]

    def _in_memory(self) -> dict[Layout, MemoryStore]:
        """States of an ephemeral client's collection, for all doors that open it."""
        return _memory.setdefault(_server(self.database.client), {}).setdefault(self.collection_id, {})

    def _check_stored(self) -> None:
        """Refuse another ratio or codec than the collection's states have, before anything is loaded."""
        codec = None if self._codec is None else Codec.parse(self._codec)
        if self._change_model or (codec is None and self._ratio is None):
            return
        for layout in self._layouts():
            wanted = replace(
                layout,
                ratio=self._ratio if self._ratio is not None else layout.ratio,
                codec=codec if codec is not None else layout.codec,
            )
            check_same_layout(layout, wanted, f"the store of collection {self._name!r}")

    def _check_same_model(self, engine: Reranker) -> None:
        """Refuse to encode a whole collection again without a word, under a model that differs from its states'."""
        layouts = list(self._layouts())
        if self._change_model or not layouts or any(s.fingerprint == engine.info.fingerprint for s in layouts):
            return
        info = engine.info
        former = replace(info, max_passage_tokens=passage_limit(info.name, former=True))
        cut = former.max_passage_tokens
        if any(layout.fingerprint == former.fingerprint for layout in layouts):
            raise StateMismatchError(
                f"the passages of collection {self._name!r} were cut at {cut} tokens; this engine cuts them at "
                f"{info.max_passage_tokens}. Make it with max_passage_tokens={cut} to go on; or pass change_model=True "
                f"to ChromaIndex.open and run backfill(), which encodes all its passages again."
            )
        raise StateMismatchError(
            f"the records of collection {self._name!r} have states of model {layouts[0].fingerprint}, made in "
            f"{layouts[0].state_dtype}; this engine is {info.name} {info.fingerprint}, which computes in {info.dtype}. "
            f"Open it with the model, revision and dtype it was made with; or pass change_model=True to "
            f"ChromaIndex.open and run backfill(), which encodes all its passages again."
        )


class SharedMemoryStore(MemoryStore):
    """States of an ephemeral Chroma client: they live as long as its collections, whichever door is closed."""

    def close(self) -> None:
        """Do nothing: other doors over the same client go on with it."""


def adopt(spec: EngineSpec, noted: CollectionNotes, *, named: bool, moving: bool) -> EngineSpec:
    """The spec with what it leaves open taken from a collection's notes.

    Args:
        spec: Which engine.
        noted: What made the collection: dtype and cut of its states, model, and its revision.
        named: Whether the caller named the model.
        moving: Whether its passages are to be encoded again; then nothing holds it to a cut that it doesn't note.
    """
    model = spec.model if named or noted.model is None else noted.model
    revision = noted.revision if model == noted.model else None
    return replace(
        spec,
        model=model,
        dtype=spec.dtype if spec.dtype is not None else noted.dtype,
        revision=spec.revision if spec.revision is not None else revision,
        max_passage_tokens=spec.max_passage_tokens
        if spec.max_passage_tokens is not None
        else _noted_limit(noted, moving=moving),
    )


def _noted_limit(noted: CollectionNotes, *, moving: bool) -> int | None:
    """Where a collection's passages are cut; one that notes a model and no cut was made before cuts were noted.

    Raises:
        StateMismatchError: If it notes what is no number.
    """
    limit = noted.max_passage_tokens
    if limit is not None and limit.isdecimal():
        return int(limit)
    if moving or noted.model is None:
        return None
    if limit is not None:
        raise StateMismatchError(
            f"the collection notes max_passage_tokens {limit!r}; wanted a number. Pass change_model=True to "
            f"ChromaIndex.open and run backfill(), which encodes all its passages again."
        )
    return passage_limit(noted.model, former=True)


def _limit_of(spec: EngineSpec) -> str:
    """Where the spec's engine cuts passages, as a note; loads nothing."""
    return str(spec.max_passage_tokens if spec.max_passage_tokens is not None else passage_limit(spec.model))


def _dtype_name(spec: EngineSpec) -> str:
    """Dtype that the spec's engine would compute in, as `BackboneInfo.dtype` names it; loads nothing."""
    return str(parse_dtype(spec.dtype, parse_devices(spec.device)[0])).removeprefix("torch.")
