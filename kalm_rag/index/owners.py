"""Which records of a collection the texts of a query are: what is encoded for a record is kept, all else is cached."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import overload

from kalm_rag.errors import InputError, StoreError
from kalm_rag.index.candidates import Owners
from kalm_rag.index.collection import collection_errors
from kalm_rag.index.home import CollectionHome

logger = logging.getLogger(__name__)


def owners_in(home: CollectionHome, ids: Sequence[str | None], texts: Sequence[str | None]) -> Owners:
    """Records that texts of a query are of, if they still read so.

    Args:
        home: The collection.
        ids: What each text is called where it comes from; a record's id, if it comes from this collection.
        texts: What is read; None for one without text.
    """
    return Owners(collection_id=home.collection_id, record_ids=_RecordIds(home, ids, texts), scope=home.scope)


class _RecordIds(Sequence["str | None"]):
    """Id of the record that reads as a text does, per text; None for one that was rewritten since, or is no record's.

    Chroma is asked when the first id is wanted: most queries encode nothing.
    """

    def __init__(self, home: CollectionHome, ids: Sequence[str | None], texts: Sequence[str | None]) -> None:
        self._home, self._given, self._texts = home, ids, texts
        self._ids: list[str | None] | None = None

    def __len__(self) -> int:
        return len(self._given)

    @overload
    def __getitem__(self, at: int) -> str | None: ...
    @overload
    def __getitem__(self, at: slice) -> list[str | None]: ...
    def __getitem__(self, at: int | slice) -> str | list[str | None] | None:
        if self._ids is None:
            self._ids = self._find()
        return self._ids[at]

    def _find(self) -> list[str | None]:
        named = list(dict.fromkeys(given for given in self._given if given))
        now: dict[str, str | None] = {}
        try:
            collection = self._home.collection
            if named:  # without ids Chroma gives all
                with collection_errors(collection):
                    found = collection.get(ids=named, include=["documents", "metadatas"])
                rows = zip(found["ids"], found["documents"] or [], found["metadatas"] or [], strict=True)
                now = {i: self._home.rule.text(document, metadata, i) for i, document, metadata in rows}
        except (StoreError, InputError) as err:  # keeping takes no answer away
            logger.warning("new states are cached only, because their records can't be read: %s", err)
        pairs = zip(self._given, self._texts, strict=True)
        return [given if given and text is not None and now.get(given) == text else None for given, text in pairs]
