"""What can be asked of a server, in Python: rank, search, write, list. Translates into the index; knows no HTTP.

States are looked up, made and scored by `kalm_rag.index.candidates`, records written by the index's one writer. Every
method blocks, and is safe to call from many threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kalm_rag.errors import InputError
from kalm_rag.index.candidates import Owners, RankedCandidate, rank_texts
from kalm_rag.index.chroma_index import ChromaIndex, Metadatas
from kalm_rag.index.collection import CollectionNotes, chroma_errors
from kalm_rag.index.lazy_engine import EngineSpec, LazyEngine
from kalm_rag.index.place import CollectionPlace
from kalm_rag.index.results import AddReport, QueryResult, Timings
from kalm_rag.instructions import Instructions
from kalm_rag.serve.settings import ServeSettings
from kalm_rag.store.companion import is_companion

if TYPE_CHECKING:
    from kalm_rag.engine.explanation import Explanation
    from kalm_rag.engine.reranker import Reranker
    from kalm_rag.index.clients import Database
    from kalm_rag.store import StateStore


LOOK_SECONDS = 1.0
"""How often is looked whether another process has written."""


class NoCollectionError(InputError):
    """A collection is asked for on a server that serves none."""


@dataclass(frozen=True)
class RecordId:
    """A document that is in the served collection: its id stands for its text and its stored states."""

    id: str


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Documents in their new order.

    Attributes:
        results: Best first; all are scored.
        texts: Of each document that was given, in the order given.
        tokens: Tokens that were read of all documents together.
        from_store: How many had states already.
        encoded: How many distinct texts were encoded now.
        model: Name of the model.
        seconds: Stage to seconds.
    """

    results: list[RankedCandidate]
    texts: list[str]
    tokens: int
    from_store: int
    encoded: int
    model: str
    seconds: dict[str, float]

    def rows(self) -> list[tuple[RankedCandidate, str]]:
        """Results with their texts."""
        return [(one, self.texts[one.index]) for one in self.results]


class Door:
    """An engine, and a collection where one is served.

    Args:
        index: The collection; `close` closes it. None ranks texts alone.
        spec: Which engine then; its states are kept in the process's bounded cache.
        database: A connection that was opened for the index, and is closed with it.
    """

    def __init__(
        self, index: ChromaIndex | None = None, *, spec: EngineSpec | None = None, database: Database | None = None
    ) -> None:
        self._index, self._database = index, database
        self._lazy = LazyEngine(spec if spec is not None else EngineSpec())
        self.loaded = False
        """Whether the model was loaded."""
        self._refreshing, self._looked = threading.Lock(), 0.0

    @classmethod
    def open(cls, settings: ServeSettings) -> Door:
        """Open what the settings say; the model is loaded by `load`, or when it is first needed.

        Raises:
            InputError: If there is no such database or collection.
            StateMismatchError: If the collection was made with another model.
            StoreError: If it can't be opened; ModelError if there is no such model.
        """
        if settings.db is None and settings.chroma is None:
            return cls(spec=EngineSpec(model=settings.model or "pico", device=settings.device))
        database = None
        if settings.chroma is not None:
            host, port, secure = settings.chroma_address()
            database = CollectionPlace(name=settings.collection, host=host, port=port, ssl=secure).connect()
        try:
            index = ChromaIndex.open(
                settings.db,
                client=None if database is None else database.client,
                collection=settings.collection,
                model=settings.model,
                embedder=settings.embedder,
                device=settings.device,
                create=settings.create,
            )
        except BaseException:
            if database is not None:
                database.close()
            raise
        return cls(index, database=database)

    @property
    def index(self) -> ChromaIndex:
        """The collection that is served, with what other processes wrote up to a second ago.

        Raises:
            NoCollectionError: If there is none.
        """
        if self._index is None:
            raise NoCollectionError("this server serves no collection, only reranking of texts. Start it with --db.")
        with self._refreshing:  # another worker, or somebody else, may have written
            if time.monotonic() - self._looked > LOOK_SECONDS:
                self._looked = time.monotonic()
                if self._index.home.database.outdated:
                    self._index.refresh()
        return self._index

    def load(self, *, warmup: bool = False) -> None:
        """Load the model; under `warmup` rank a question, too, so that the first client doesn't wait.

        Raises:
            ModelError: If it can't be loaded.
        """
        self._parts()
        if warmup:
            self.rank("Is it warm?", ["It is warm."])
            if self._index is not None and len(self._index):
                self._index.query("Is it warm?")
        self.loaded = True

    def rank(
        self,
        query: str,
        documents: Sequence[str | RecordId],
        *,
        instructions: Instructions | None = None,
        top_n: int | None = None,
        max_tokens: int | None = None,
        what: str = "documents",
    ) -> Ranked:
        """Order documents by relevance.

        Args:
            query: The question, not blank.
            documents: Texts, or ids of records, whose states are stored.
            instructions: System and task text; None takes the model's defaults.
            top_n: Most results; None gives all.
            max_tokens: Read no more than the first tokens of each text, special ones not counted; not with ids, whose
                states are those of the whole text.
            what: How messages call the documents.

        Raises:
            InputError: If an id is no record's, or the record holds no text. Else as `rank_texts`.
        """
        timings = Timings()
        engine, store = self._parts()
        with timings.stage("read"):
            shown, read, owners = self._texts(documents, what)
        if max_tokens is not None:
            read = [_cut(engine, text, max_tokens) for text in read]
        ranking = rank_texts(
            engine, store, query, read, missing="encode", timings=timings, instructions=instructions, owners=owners
        )
        states = None if ranking.states is None else ranking.states.states
        return Ranked(
            results=ranking.candidates[:top_n],
            texts=shown,
            tokens=0 if states is None else int(states.tokens.sum()),
            from_store=ranking.from_store,
            encoded=ranking.encoded,
            model=engine.info.name,
            seconds=timings.seconds,
        )

    def explain(
        self, query: str, documents: Sequence[str | RecordId], *, instructions: Instructions | None = None
    ) -> list[Explanation]:
        """Tell where the decoder looked in each document, in the order given; takes and raises what `rank` does."""
        engine, _ = self._parts()
        _, read, _ = self._texts(documents, "documents")
        asked = engine.prepare(query, instructions)
        return [engine.explain(asked, text) for text in read]

    def search(self, query: str, **options: Any) -> QueryResult:  # noqa: ANN401
        """Search the collection; see `ChromaIndex.query` for the options and what it raises."""
        return self.index.query(query, **options)

    def read(self, record_id: str) -> tuple[str, dict[str, Any]]:
        """Text and metadata of one passage of the collection.

        Raises:
            InputError: If there is none of this id, or it holds no text.
        """
        collection = self.index.home.collection
        with chroma_errors("id"):
            page: Any = collection.get(ids=[record_id], include=["documents", "metadatas"])
        text = page["documents"][0] if page["ids"] else None
        if text is None:
            what = "holds no text" if page["ids"] else f"is no passage of the collection {collection.name!r}"
            raise InputError(f"id {record_id!r:.200} {what}. Take an id that a search gave.")
        return text, dict(page["metadatas"][0] or {})

    def upsert(self, ids: Sequence[str], texts: Sequence[str], metadatas: Metadatas) -> AddReport:
        """Write passages; see `ChromaIndex.upsert`."""
        return self.index.upsert(ids, texts, metadatas)

    def delete(self, ids: list[str]) -> int:
        """Delete passages; see `ChromaIndex.delete`."""
        return self.index.delete(ids)

    def collections(self) -> list[dict[str, Any]]:
        """The collections of the database, as their notes tell, and which one is served. Plain data."""
        home = self.index.home
        with chroma_errors("collections"):
            there = [one for one in home.database.client.list_collections() if not is_companion(one.metadata)]
            found = [(one.name, one.metadata, int(one.count())) for one in there]
        listed = []
        for name, metadata, records in sorted(found, key=lambda one: one[0]):
            notes = CollectionNotes.read(metadata)
            made = {"model": notes.model, "embedder": notes.embedder, "passage": notes.passage}
            listed.append({"name": name, "records": records, "served": name == home.collection.name, **made})
        return listed

    def close(self) -> None:
        """Close the index, and the engine unless others in the process use it."""
        if self._index is not None:
            self._index.close()
        if self._database is not None:
            self._database.close()
        self._lazy.close()

    def _parts(self) -> tuple[Reranker, StateStore]:
        return self._lazy.get() if self._index is None else self._index.home.parts()

    def _texts(self, documents: Sequence[str | RecordId], what: str) -> tuple[list[str], list[str], Owners]:
        """Texts to show and to read of each document, and whose they are: states of records are kept with them."""
        wanted = list(dict.fromkeys(one.id for one in documents if isinstance(one, RecordId)))
        if not wanted:
            texts = [one for one in documents if isinstance(one, str)]
            return texts, texts, Owners.nobody(len(texts))
        home = self.index.home
        with chroma_errors("documents"):
            page: Any = home.collection.get(ids=wanted, include=["documents", "metadatas"])
        rows = zip(page["ids"], page["documents"], page["metadatas"], strict=True)
        records = {i: (text, home.rule.text(text, metadata, i)) for i, text, metadata in rows}
        shown: list[str] = []
        read: list[str] = []
        for place, one in enumerate(documents):
            text, reads = (one, one) if isinstance(one, str) else records.get(one.id, (None, None))
            if reads is None:
                known = isinstance(one, RecordId) and one.id in records
                lacks = "holds no text" if known else f"is not in the collection {home.collection.name!r}"
                raise InputError(f"{what}[{place}] is a record that {lacks}.")
            shown.append(text if text is not None else reads)
            read.append(reads)
        ids = [one.id if isinstance(one, RecordId) else None for one in documents]
        return shown, read, Owners(collection_id=home.collection_id, record_ids=ids, scope=home.scope)


def _cut(engine: Reranker, text: str, tokens: int) -> str:
    """The part of a text that its first tokens stand for."""
    if len(text.encode()) <= tokens:  # no token is shorter than a byte
        return text
    spans = [span for span in engine.backbone.offsets(text) if span[1] > span[0]]
    return text if len(spans) <= tokens else text[: spans[tokens - 1][1]]
