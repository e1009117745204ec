"""What a state store promises: content-addressed states, and references that say which records use them.

A store knows no model and no Chroma collection; it keeps bytes under keys, inside one namespace (`Layout`), and
reference rows ``(collection id, record id) -> key`` for deletion, verification and garbage collection only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from kalm_rag.states import Layout, PassageStates
from kalm_rag.store.arguments import check_ids, check_keys, check_names, check_put, check_sweep
from kalm_rag.store.rows import Fetched, Reference, StoredRow, assemble, make_row

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

GRACE_SECONDS = 600.0
"""Age below which `StateStore.gc` leaves states and references alone: whoever wrote them may not be done yet."""


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """What a store holds.

    Attributes:
        states: Stored passages in this namespace.
        references: Records that point at them.
        payload_bytes: Bytes of their vectors.
        disk_bytes: Bytes the store takes, all namespaces; 0 where it can't be told.
        other_namespaces: Fingerprints of other models' states kept in the same place, with their counts.
    """

    states: int
    references: int
    payload_bytes: int
    disk_bytes: int = 0
    other_namespaces: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """What `StateStore.gc` removed: passages and bytes of payload."""

    states: int = 0
    payload_bytes: int = 0

    def __add__(self, other: GcReport) -> GcReport:
        return GcReport(states=self.states + other.states, payload_bytes=self.payload_bytes + other.payload_bytes)


class StateStore(ABC):
    """States of one namespace. Safe to use from several threads; the SQLite one from several processes too.

    All calls raise StoreError if the store can't be read or written (then nothing of the call is kept), ClosedError
    after `close`, and InputError for ids that are not valid text, keys that are no sha256 in hex and numbers out of
    range: the public methods check for all stores, the ``_`` methods trust what they get.
    """

    layout: Layout
    place: str
    """Names the store in messages."""

    def get_many(self, keys: Sequence[str]) -> Fetched:
        """Fetch states, packed into a padded batch; a key may be asked for twice.

        Raises:
            StoreFormatError: If a stored state is damaged (checksum, length). Never a wrong score.
        """
        wanted = check_keys(keys)
        return assemble(wanted, self._read(list(dict.fromkeys(wanted))), self.layout, self.place)

    def missing(self, keys: Sequence[str]) -> set[str]:
        """Which of the keys have no stored states (reads no vectors)."""
        wanted = dict.fromkeys(check_keys(keys))
        return wanted.keys() - self._present(list(wanted))

    def put_many(
        self,
        states: Sequence[PassageStates],
        references: Sequence[Reference] = (),
        *,
        scope: str = "",
        wait: float | None = None,
    ) -> None:
        """Keep states and references in one transaction.

        A key that is there already keeps its states (even damaged ones: see `verify`), and its age starts anew (see
        `gc`). A reference of a record that pointed elsewhere is moved. A reference may name a key stored before.

        Args:
            states: What to keep.
            references: Records that use states.
            scope: Names the Chroma database of the references' collections, for `gc`: a folder's resolved path, or a
                server's address with tenant and database. "" leaves it unknown, or as it was told before; right for
                the database that the store lies beside, since both move together.
            wait: Seconds to wait while another process writes, where the store has such a lock (SQLite); None takes
                the store's own timeout. A short one is for states that the answer doesn't depend on.

        Raises:
            StateMismatchError: If states belong to another model, width or ratio than the namespace.
        """
        kept = list(states)
        check_keys([passage.key for passage in kept])
        rows = [make_row(passage, self.layout) for passage in kept]  # computed before a transaction is open
        self._put(rows, check_put(references, scope, wait), scope, wait)

    def unreference(self, collection_id: str, record_ids: Iterable[str]) -> int:
        """Forget records; their states stay until `gc`. Returns how many references there were."""
        check_ids([collection_id])
        return self._unreference(collection_id, check_ids(record_ids))

    def references(self, collection_id: str) -> Iterator[Reference]:
        """All records of one collection that are known here, in any order; writes meanwhile may be seen or not."""
        check_ids([collection_id])
        return self._references(collection_id)

    @abstractmethod
    def collections(self) -> dict[str, int]:
        """Collection ids that have references, with their counts."""

    @abstractmethod
    def verify(self) -> list[str]:
        """Read everything in the namespace; give a name to each thing that is damaged, for `discard`.

        A name is the key of states whose checksum, length or layout is wrong. Where the key itself is damaged, it is
        the store's own name of the row (``"row:17"``), or ``"index"`` for references or an index that disagree.

        Raises:
            StoreFormatError: If the store is damaged so that rows can't be read at all.
        """

    def discard(self, names: Iterable[str]) -> int:
        """Drop states by key, and what `verify` named; returns how many states went.

        References stay, but for damaged ones. What is dropped is missing afterwards: backfill encodes it again.
        """
        return self._discard(check_names(names))

    def gc(
        self,
        live_collections: Iterable[str] | None = None,
        *,
        scopes: Iterable[str] = ("",),
        younger_than: float = GRACE_SECONDS,
    ) -> GcReport:
        """Drop references of collections that are gone, then states that nothing refers to.

        What was written a moment ago stays, so that states and references of a process that is just adding records
        are safe: it stores states first, and its collection may be newer than `live_collections`.

        Args:
            live_collections: Ids of all collections of the databases in `scopes`; None drops no references.
            scopes: Databases that `live_collections` speaks for, as told to `put_many`. References of other databases
                that share the store stay. "" stands for those that were never told.
            younger_than: Seconds; states stored or put again, and collections written to, less than this ago are left
                alone. 0 when nobody else writes.
        """
        return self._sweep(*check_sweep(live_collections, scopes, younger_than))

    @abstractmethod
    def stats(self) -> StoreStats:
        """Count what is stored."""

    @abstractmethod
    def close(self) -> None:
        """Release files and connections, after calls under way."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _read(self, keys: list[str]) -> dict[str, StoredRow]: ...

    @abstractmethod
    def _present(self, keys: list[str]) -> set[str]: ...

    @abstractmethod
    def _put(self, rows: list[StoredRow], references: list[Reference], scope: str, wait: float | None) -> None: ...

    @abstractmethod
    def _unreference(self, collection_id: str, record_ids: list[str]) -> int: ...

    @abstractmethod
    def _references(self, collection_id: str) -> Iterator[Reference]: ...

    @abstractmethod
    def _discard(self, names: list[str]) -> int: ...

    @abstractmethod
    def _sweep(self, live: set[str] | None, scopes: set[str], before: float) -> GcReport:
        """What `gc` does to whatever was written up to `before` (unix seconds)."""
