"""What keeps a vector store's states true to its collection, and opens and closes both."""

from __future__ import annotations

import asyncio

from llama_index.core.bridge.pydantic import BaseModel, PrivateAttr

from kalm_rag.index.embedders import wrap_embedder
from kalm_rag.index.home import CollectionHome
from kalm_rag.index.results import BackfillReport, RebuildReport, VerifyReport
from kalm_rag.store import GcReport
from kalm_rag.store.base import GRACE_SECONDS


class CollectionUpkeep(BaseModel):
    """Methods of a component over one collection."""

    _home: CollectionHome = PrivateAttr()

    def verify(self, *, search: bool = True) -> VerifyReport:
        """Compare every node with its states, and every state with its checksum. Changes nothing.

        Args:
            search: Also look for every node by its own vector, to tell those that no search finds.

        Raises:
            StoreError: If Chroma or the store can't be read.
        """
        return self._home.verify(search=search)

    def backfill(self, *, show_progress: bool = False) -> BackfillReport:
        """Bring states up to the collection: encode what is missing or damaged, mend references.

        This is how a collection that somebody else filled, or edited, gets its states. Safe to break off.

        Args:
            show_progress: Whether to show a bar.

        Raises:
            StoreError: If states can't be written.
        """
        return self._home.backfill(show_progress=show_progress)

    def gc(self, *, younger_than: float = GRACE_SECONDS) -> GcReport:
        """Drop references of nodes and collections that are gone, then states that nothing refers to.

        Args:
            younger_than: States written less than this many seconds ago stay, so that none is lost whose node is just
                being added.

        Raises:
            StoreError: If Chroma or the store can't be read or written.
        """
        return self._home.gc(younger_than=younger_than)

    def rebuild(self, embed_model: object = None, *, show_progress: bool = False) -> RebuildReport:
        """Make the collection again from its own records, where its vector index is broken or leaves out nodes.

        Nobody else may write to the folder meanwhile. Nothing with stored states is encoded.

        Args:
            embed_model: The embedding model of the index, for vectors that can't be read any more: `as_embedding` or
                any other; None keeps those that can be read.
            show_progress: Whether to show a bar.

        Raises:
            InputError: If vectors can't be read and there is no `embed_model`; the collection stays as it was.
            StoreError: If Chroma fails, or nodes can't be read at all.
        """
        embedder = None if embed_model is None else wrap_embedder(embed_model)
        return self._home.rebuild(embedder, show_progress=show_progress)

    def close(self) -> None:
        """Close the state store (its postprocessors use it, too) and the Chroma client that this opened.

        Both are opened again when they are needed. A client or collection of yours stays open.
        """
        self._home.close()

    def refresh(self) -> None:
        """Open the Chroma client again, so that searches find what other processes have written since.

        Writing does this by itself. A server is always up to date.

        Raises:
            InputError: If client or collection are yours: open them again, and this store over them.
        """
        self._home.database.refresh()

    async def averify(self, *, search: bool = True) -> VerifyReport:
        """Run `verify` in a thread."""
        return await asyncio.to_thread(self.verify, search=search)

    async def abackfill(self, *, show_progress: bool = False) -> BackfillReport:
        """Run `backfill` in a thread."""
        return await asyncio.to_thread(self.backfill, show_progress=show_progress)

    async def agc(self, *, younger_than: float = GRACE_SECONDS) -> GcReport:
        """Run `gc` in a thread."""
        return await asyncio.to_thread(self.gc, younger_than=younger_than)
