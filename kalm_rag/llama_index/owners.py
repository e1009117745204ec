"""Which records of a collection the nodes of a query are: what is encoded for a record is kept, all else is cached."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import overload

from llama_index.core.schema import BaseNode

from kalm_rag.errors import InputError, StoreError
from kalm_rag.index.collection import collection_errors
from kalm_rag.index.home import CollectionHome

logger = logging.getLogger(__name__)


class RecordIds(Sequence["str | None"]):
    """Id of the record that reads as a text does, per text; None for one that was rewritten since, or is no record's.

    Chroma is asked when the first id is wanted: most queries encode nothing.

    Args:
        home: The collection.
        nodes: Nodes of a query.
        texts: What is read of each; None for one without text.
    """

    def __init__(self, home: CollectionHome, nodes: Sequence[BaseNode], texts: Sequence[str | None]) -> None:
        self._home, self._nodes, self._texts = home, nodes, texts
        self._ids: list[str | None] | None = None

    def __len__(self) -> int:
        return len(self._nodes)

    @overload
    def __getitem__(self, at: int) -> str | None: ...
    @overload
    def __getitem__(self, at: slice) -> list[str | None]: ...
    def __getitem__(self, at: int | slice) -> str | list[str | None] | None:
        if self._ids is None:
            self._ids = self._find()
        return self._ids[at]

    def _find(self) -> list[str | None]:
        ids = [node.node_id for node in self._nodes]
        try:
            collection = self._home.collection
            with collection_errors(collection):
                found = collection.get(ids=list(dict.fromkeys(ids)), include=["documents", "metadatas"])
            rows = zip(found["ids"], found["documents"] or [], found["metadatas"] or [], strict=True)
            now = {i: self._home.rule.text(document, metadata, i) for i, document, metadata in rows}
        except (StoreError, InputError) as err:  # keeping takes no answer away
            logger.warning("new states are cached only, because their records can't be read: %s", err)
            return [None] * len(ids)
        return [
            i if text is not None and now.get(i) == text else None for i, text in zip(ids, self._texts, strict=True)
        ]
