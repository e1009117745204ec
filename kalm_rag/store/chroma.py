"""A state store inside a Chroma server, for apps that can reach nothing else: a companion collection per model.

With `chroma_calls.py` the only store that imports chromadb. A state is a record ``s:<key>`` with its payload as base64
in the metadata; a reference is a record ``r:<digest of collection and record id>``. Costs 2.9 times the payload on
disk and 30 times the SQLite store's fetch: use that one wherever a folder can be reached.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from chromadb.errors import NotFoundError

from kalm_rag.errors import ClosedError, InputError, StoreError
from kalm_rag.states import Layout
from kalm_rag.store.arguments import DAMAGED_ROW, check_same_layout, is_row_name
from kalm_rag.store.base import GcReport, StateStore, StoreStats
from kalm_rag.store.chroma_calls import (
    FoundRecord,
    companions,
    find_collection,
    page_of_records,
    pairs,
    scan_records,
    translated,
)
from kalm_rag.store.companion import (
    CHECKSUM_KEY,
    Record,
    batches,
    companion_name,
    is_reference,
    is_state_id,
    of_collection,
    read_marks,
    read_reference,
    read_row,
    reference_id,
    reference_record,
    state_record,
    write_marks,
)
from kalm_rag.store.rows import Reference, StoredRow, chunked, damage

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

READ_IDS = 256  # payloads of one answer: 256 states of 19 kB are 7 MB
PAGE_IDS = 5000  # ids or references of one answer; `get` fails above 32,766
EMBEDDING = [0.0]  # explicit, or Chroma downloads a model to make one


class ChromaStore(StateStore):
    """States of one model in a companion collection ``<name>-kalm-states-<fingerprint prefix>``.

    Chroma has no transactions. `put_many` writes states first and references after: cut off in between it leaves
    unreferenced states, which `gc` takes, never a reference to states that were not written. `gc` and `put_many`
    at the same time can leave a reference whose state is gone; it is then missing, and encoded again on demand.

    Chroma Cloud is not supported: it takes 4,096 bytes per metadata value, a tenth of a passage (`StoreError`).

    Make one with `ChromaStore.open` or `open_store`.
    """

    def __init__(
        self, client: ClientAPI, collection: Collection | None, layout: Layout, prefix: str, writable: bool
    ) -> None:
        self.layout = layout
        self.writable = writable
        self._client, self._collection, self._prefix = client, collection, prefix
        self._name = companion_name(prefix, layout.fingerprint)
        self.place = f"companion collection {self._name}"
        self._closed = False

    @classmethod
    def open(cls, client: ClientAPI, layout: Layout, *, name: str = "", read_only: bool = False) -> ChromaStore:
        """Open or make the companion collection, see `open_store`; the caller keeps and closes the client.

        `name` is the collection the states belong to, first part of the companion's; "" for one companion a database.
        """
        companion = companion_name(name, layout.fingerprint)
        with translated(companion):
            collection = find_collection(client, companion)
            if collection is None and not read_only:
                collection = client.get_or_create_collection(
                    companion, metadata=write_marks(layout), embedding_function=None
                )
        if collection is not None:
            check_same_layout(read_marks(collection), layout, f"companion collection {companion}")
            if not read_only and CHECKSUM_KEY not in collection.metadata:  # made by an earlier release
                with translated(companion):
                    collection.modify(metadata={**collection.metadata, **write_marks(layout)})
        return cls(client, collection, layout, name, not read_only)

    def _read(self, keys: list[str]) -> dict[str, StoredRow]:
        rows: dict[str, StoredRow] = {}
        for chunk in chunked(keys, READ_IDS):
            for record_id, fields in self._get(ids=["s:" + key for key in chunk]):
                rows[record_id[2:]] = read_row(record_id, fields)
        return rows

    def _present(self, keys: list[str]) -> set[str]:
        present: set[str] = set()
        for chunk in chunked(keys, PAGE_IDS):
            present |= {record_id[2:] for record_id, _ in self._get(ids=["s:" + key for key in chunk], fields=False)}
        return present

    def _put(self, rows: list[StoredRow], references: list[Reference], scope: str, wait: float | None) -> None:
        distinct: dict[str, StoredRow] = {}  # Chroma refuses an id that comes twice in a call
        for row in rows:
            distinct.setdefault(row.key, row)
        there, now = self._present(list(distinct)), int(time.time())
        new = [state_record(row, now) for key, row in distinct.items() if key not in there]
        self._write("add", new)  # add leaves what is there
        self._write("update", [("s:" + key, {"created": now}) for key in distinct if key in there])
        moved = {reference_id(r.collection_id, r.record_id): r for r in references}
        self._write("upsert", [reference_record(record_id, r, scope, now) for record_id, r in moved.items()])

    def _unreference(self, collection_id: str, record_ids: list[str]) -> int:
        return self._delete(reference_id(collection_id, record_id) for record_id in record_ids)

    def _references(self, collection_id: str) -> Iterator[Reference]:
        for _, fields in self._scan(of_collection(collection_id), PAGE_IDS):
            yield read_reference(fields)

    def collections(self) -> dict[str, int]:
        """Collection ids that have references, with their counts."""
        counts: dict[str, int] = {}
        for _, fields in self._scan({"kind": "reference"}, PAGE_IDS):
            collection_id = read_reference(fields).collection_id
            counts[collection_id] = counts.get(collection_id, 0) + 1
        return counts

    def verify(self) -> list[str]:
        """Read every state and reference, page by page; name what is damaged."""
        wrong = []
        for record_id, fields in self._scan({"kind": "state"}, READ_IDS):
            if not is_state_id(record_id):
                wrong.append(DAMAGED_ROW + record_id)
            elif damage(read_row(record_id, fields), self.layout):
                wrong.append(record_id[2:])
        for record_id, fields in self._scan({"kind": "reference"}, PAGE_IDS):
            if not is_reference(record_id, fields):
                wrong.append(DAMAGED_ROW + record_id)
        return wrong

    def _discard(self, names: list[str]) -> int:
        rows = [name.removeprefix(DAMAGED_ROW) for name in names if is_row_name(name)]
        self._delete(record_id for record_id in rows if record_id.startswith("r:"))
        states = ["s:" + name for name in names if not is_row_name(name)]
        return self._delete([*states, *(record_id for record_id in rows if not record_id.startswith("r:"))])

    def _sweep(self, live: set[str] | None, scopes: set[str], before: float) -> GcReport:
        self._check_open(writing=True)
        if live is not None:
            for collection_id in self._gone(live, scopes, before):
                self._forget_collection(collection_id)
        states = size = offset = 0
        while True:
            page = [i for i, _ in self._page({"kind": "state"}, PAGE_IDS, offset, fields=False)]
            dropped = 0
            for chunk in chunked(page, READ_IDS):
                unused = self._get(ids=self._unused(chunk))
                old = [(i, fields) for i, fields in unused if _number(fields, "created") <= before]
                dropped += self._delete(record_id for record_id, _ in old)
                size += sum(len(read_row(record_id, fields).payload) for record_id, fields in old)
            states += dropped
            offset += len(page) - dropped
            if len(page) < PAGE_IDS:
                return GcReport(states=states, payload_bytes=size)

    def _gone(self, live: set[str], scopes: set[str], before: float) -> list[str]:
        """Collections whose references may go: of databases in `scopes`, not live, not written to since `before`."""
        known: dict[str, tuple[str, float]] = {}
        for _, fields in self._scan({"kind": "reference"}, PAGE_IDS):
            collection_id = read_reference(fields).collection_id
            scope, written = known.get(collection_id, ("", 0.0))
            known[collection_id] = (str(fields.get("scope", scope)), max(written, _number(fields, "created")))
        return [
            collection_id
            for collection_id, (scope, written) in known.items()
            if collection_id not in live and scope in scopes and written <= before
        ]

    def _forget_collection(self, collection_id: str) -> None:
        while page := self._page(of_collection(collection_id), PAGE_IDS, 0, fields=False):
            self._delete(record_id for record_id, _ in page)

    def _unused(self, state_ids: list[str]) -> list[str]:
        """Which of some states no reference names."""
        keys = {record_id[2:] for record_id in state_ids}
        while keys:
            where = {"$and": [{"kind": "reference"}, {"key": {"$in": sorted(keys)}}]}
            used = {fields.get("key") for _, fields in self._page(where, PAGE_IDS, 0)} & keys
            if not used:
                break
            keys -= used  # asked again: one passage of many records fills a page alone
        return ["s:" + key for key in keys]

    def stats(self) -> StoreStats:
        """Count what is stored. Reads every state (Chroma gives no sums): slow on a large store; disk can't be told."""
        sizes = [
            len(read_row(record_id, fields).payload) for record_id, fields in self._scan({"kind": "state"}, READ_IDS)
        ]
        with translated(self._name):
            others = {
                read_marks(c).fingerprint: sum(1 for _ in scan_records(c, {"kind": "state"}, PAGE_IDS, False))
                for c in companions(self._client, self._prefix)
                if c.name != self._name
            }
        return StoreStats(
            states=len(sizes),
            references=sum(self.collections().values()),
            payload_bytes=sum(sizes),
            other_namespaces=others,
        )

    def close(self) -> None:
        """Let go of the client, which stays open."""
        self._closed = True

    def _get(self, ids: list[str], fields: bool = True) -> list[FoundRecord]:
        self._check_open()
        if not ids or self._collection is None:  # Chroma refuses an empty list
            return []
        with translated(self._name):
            answer = self._collection.get(ids=ids, include=["metadatas"] if fields else [])
        return pairs(answer)

    def _page(self, where: dict[str, Any], limit: int, offset: int, fields: bool = True) -> list[FoundRecord]:
        self._check_open()
        if self._collection is None:
            return []
        with translated(self._name):
            return page_of_records(self._collection, where, limit, offset, fields)

    def _scan(self, where: dict[str, Any], page: int) -> Iterator[FoundRecord]:
        self._check_open()
        if self._collection is not None:
            with translated(self._name):
                yield from scan_records(self._collection, where, page)

    def _write(self, verb: str, records: list[Record]) -> None:
        self._check_open(writing=True)
        with translated(self._name):
            most = self._client.get_max_batch_size()
            for batch in batches(records, most):
                vectors = {} if verb == "update" else {"embeddings": [EMBEDDING] * len(batch)}
                getattr(self._collection, verb)(
                    ids=[record_id for record_id, _ in batch], metadatas=[fields for _, fields in batch], **vectors
                )

    def _delete(self, ids: Iterable[str]) -> int:
        self._check_open(writing=True)
        count = 0
        for chunk in chunked(ids, PAGE_IDS):
            there = [record_id for record_id, _ in self._get(ids=chunk, fields=False)]  # delete counts unknown ids too
            with translated(self._name):
                if there and self._collection is not None:
                    self._collection.delete(ids=there)
            count += len(there)
        return count

    def _check_open(self, writing: bool = False) -> None:
        if self._closed:
            raise ClosedError(f"{self.place} is closed; open the store again.")
        if writing and not self.writable:
            raise StoreError(f"{self.place} was opened read-only; open it with read_only=False.")


def _number(fields: dict[str, Any], name: str) -> float:
    """A number of a record, 0 where it is missing (earlier releases) or no number."""
    value = fields.get(name, 0)
    return float(value) if isinstance(value, (int, float)) else 0.0


def read_layout(client: ClientAPI, fingerprint: str, name: str = "") -> Layout | None:
    """What layout a model's states have in the server, or None when there are none."""
    companion = companion_name(name, fingerprint)
    with translated(companion):
        collection = find_collection(client, companion)
    return None if collection is None else read_marks(collection)


def collection_layouts(client: ClientAPI, collection_id: str, name: str = "") -> list[Layout]:
    """Layouts of all models whose states records of a collection use."""
    where = of_collection(collection_id)
    with translated(companion_name(name, "")):
        found = [c for c in companions(client, name) if page_of_records(c, where, 1, 0, fields=False)]
    return [read_marks(collection) for collection in found]


def drop_companions(client: ClientAPI, name: str) -> list[str]:
    """Delete the companions of the deleted collection `name`, with all states in them.

    Returns:
        Names of the companions that were deleted; none where another collection shares them (names that are equal in
        their first 400 characters).
    """
    if not name:
        raise InputError("name is ''; wanted the name of the deleted collection. Use gc() for a shared companion.")
    with translated(companion_name(name, "")):
        names = [c.name for c in companions(client, name)]
        alike = {c.name for c in client.list_collections() if c.name[:400] == name[:400]} - {name, *names}
        if alike:
            return []
        for companion in names:
            with contextlib.suppress(NotFoundError):  # another process was first
                client.delete_collection(companion)
    return names
