"""What a state store promises: content-addressed states, and references that say which records use them.

A store knows no model and no Chroma collection; it keeps bytes under keys, inside one namespace (`Layout`), and
reference rows ``(collection id, record id) -> key`` for deletion, verification and garbage collection only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from kalm_rag.states import Layout, PassageStates, StateBatch

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

GRACE_SECONDS = 600.0
"""Age below which `StateStore.gc` leaves states and references alone: whoever wrote them may not be done yet."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One record of a collection that uses a state."""

    collection_id: str
    record_id: str
    key: str


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What `StateStore.get_many` found.

    Attributes:
        batch: States of the found keys, in the order asked for (missing ones left out); None if none was found.
        found: Positions in the request that `batch`'s rows stand for, ascending.
        missing: Positions in the request without stored states, ascending.
    """

    batch: StateBatch | None
    found: list[int]
    missing: list[int]


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
    disk_bytes: int
    other_namespaces: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """What `StateStore.gc` removed: passages and bytes of payload."""

    states: int
    payload_bytes: int


class StateStore(Protocol):
    """States of one namespace. Safe to use from several threads; the SQLite one from several processes too."""

    layout: Layout

    def get_many(self, keys: Sequence[str]) -> Fetched:
        """Fetch states, packed into a padded batch; a key may be asked for twice.

        Raises:
            StoreFormatError: If a stored state is damaged (checksum, length). Never a wrong score.
            StoreError: If the store can't be read.
        """
        ...

    def missing(self, keys: Sequence[str]) -> set[str]:
        """Which of the keys have no stored states (reads no vectors)."""
        ...

    def put_many(
        self,
        states: Sequence[PassageStates],
        references: Sequence[Reference] = (),
        *,
        scope: str = "",
        wait: float | None = None,
    ) -> None:
        """Keep states and references in one transaction.

        A key that is there already keeps its states, and its age starts anew (see `gc`). A reference of a record that
        pointed elsewhere is moved. A reference may name a key stored before.

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
            InputError: If an id is not text or not valid Unicode, a key is no sha256, or `wait` is negative.
            StoreError: If they can't be written (read-only, disk full, locked); then nothing of the call is kept.
        """
        ...

    def unreference(self, collection_id: str, record_ids: Iterable[str]) -> int:
        """Forget records; their states stay until `gc`. Returns how many references there were."""
        ...

    def references(self, collection_id: str) -> Iterator[Reference]:
        """All records of one collection that are known here, in any order."""
        ...

    def collections(self) -> dict[str, int]:
        """Collection ids that have references, with their counts."""
        ...

    def verify(self) -> list[str]:
        """Read everything in the namespace; give a name to each thing that is damaged, for `discard`.

        A name is the key of states whose checksum, length or layout is wrong. Where the key itself is damaged, it is
        the store's own name of the row (``"row:17"``), or ``"index"`` for references or an index that disagree.

        Raises:
            StoreFormatError: If the store is damaged so that rows can't be read at all.
            StoreError: If it can't be read.
        """
        ...

    def discard(self, names: Iterable[str]) -> int:
        """Drop states by key, and what `verify` named; returns how many states went.

        References stay, but for damaged ones. What is dropped is missing afterwards: backfill encodes it again.

        Raises:
            InputError: If a name is neither a key nor one that `verify` gives.
            StoreError: If it can't be written.
        """
        ...

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

        Raises:
            InputError: If `younger_than` is negative or no number.
            StoreError: If it can't be written.
        """
        ...

    def stats(self) -> StoreStats:
        """Count what is stored."""
        ...

    def close(self) -> None:
        """Release files and connections; later calls raise `ClosedError`."""
        ...

    def __enter__(self) -> StateStore: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Closing:
    """A store as a context manager: leaving closes it."""

    def close(self) -> None:
        """Release what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
