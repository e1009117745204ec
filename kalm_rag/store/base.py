"""What a state store promises: content-addressed states, and references that say which records use them.

A store knows no model and no Chroma collection; it keeps bytes under keys, inside one namespace (`Layout`), and
reference rows ``(collection id, record id) -> key`` for deletion, verification and garbage collection only.
"""

from __future__ import annotations

import itertools
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from kalm_rag.checks import check_items
from kalm_rag.errors import InputError, StateMismatchError, StoreFormatError
from kalm_rag.states import Layout, PassageStates, StateBatch, pack_states, unpack_batch

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

Value = TypeVar("Value")

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


DAMAGED_ROW = "row:"
"""How `StateStore.verify` names a row whose key can't be trusted; a number or record id follows."""

DAMAGED_INDEX = "index"
"""How `StateStore.verify` names references, or a store's own index, that disagree with what they are about."""


class StoredRow(NamedTuple):
    """One passage as every store keeps it: payload bytes, what is needed to read them, and a checksum over it all."""

    key: str
    tokens: int
    total_tokens: int
    checksum: int
    payload: bytes
    created: int = 0  # unix seconds of the last put, where the store keeps it with the row


def make_row(states: PassageStates, layout: Layout) -> StoredRow:
    """Turn states into what is stored (packs and checksums, so call it before a transaction is open).

    Raises:
        StateMismatchError: If they belong to another model, width or ratio than the namespace.
        InputError: If their key is not a sha256 in hex.
    """
    check_keys([states.key])
    payload = pack_states(states, layout)
    check = row_checksum(layout.fingerprint, states.key, states.tokens, states.total_tokens, payload)
    return StoredRow(states.key, states.tokens, states.total_tokens, check, payload)


def row_checksum(fingerprint: str, key: str, tokens: int, total_tokens: int, payload: bytes) -> int:
    """CRC-32 over a row and where it belongs, so that a row can't pass for another's.

    It guards against accidents, not attackers. Measured: 0.3 ms for 100 payloads of 19 kB (sha256: 0.9 ms).
    """
    head = fingerprint.encode() + bytes.fromhex(key) + struct.pack("<qq", tokens, total_tokens)
    return zlib.crc32(payload, zlib.crc32(head))


def damage(row: StoredRow, layout: Layout) -> str | None:
    """Say what is wrong with a row read back, or None. Trusts no type: a flipped byte can turn a number into text."""
    if not (all(isinstance(value, int) for value in row[1:4]) and isinstance(row.payload, bytes)):
        return "a column has the wrong type"
    if not (1 <= row.tokens <= row.total_tokens < 2**62):
        return f"it claims {row.tokens} tokens of {row.total_tokens}"
    if len(row.payload) != layout.payload_bytes(row.tokens):
        return f"{len(row.payload)} bytes stored, wanted {layout.payload_bytes(row.tokens)} for {row.tokens} tokens"
    if row_checksum(layout.fingerprint, row.key, row.tokens, row.total_tokens, row.payload) != row.checksum:
        return "its checksum doesn't match"
    return None


def assemble(keys: Sequence[str], rows: Mapping[str, StoredRow], layout: Layout, where: str) -> Fetched:
    """Check the rows that a store found and pack them into one batch, in the order of the request.

    Raises:
        StoreFormatError: If a row is damaged.
    """
    for row in rows.values():
        wrong = damage(row, layout)
        if wrong is not None:
            raise StoreFormatError(
                f"{where} holds damaged states for passage {row.key[:12]}...: {wrong}. Run `kalm-rag verify` (verify() "
                f"and discard() drop damaged states), then backfill: states are rebuilt from the texts."
            )
    found = [position for position, key in enumerate(keys) if key in rows]
    missing = [position for position, key in enumerate(keys) if key not in rows]
    if not found:
        return Fetched(batch=None, found=[], missing=missing)
    hits = [rows[keys[position]] for position in found]
    batch = unpack_batch([r.payload for r in hits], [r.tokens for r in hits], [r.total_tokens for r in hits], layout)
    return Fetched(batch=batch, found=found, missing=missing)


def chunked(values: Iterable[Value], size: int) -> Iterator[list[Value]]:
    """Cut into lists of at most `size`, in order."""
    rest = iter(values)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


def check_keys(keys: Iterable[str]) -> list[str]:
    """Read keys of any iterable, and refuse what can't be one.

    Raises:
        InputError: If `keys` is one string, or a key is not 64 lower-case hex digits.
    """
    read = check_items(keys, "keys")
    for key in read:
        if not (isinstance(key, str) and len(key) == 64 and not key.strip("0123456789abcdef")):
            raise InputError(f"state key is {key!r}; wanted a sha256 in hex (64 digits). Use passage_key(text).")
    return read


def check_names(names: Iterable[str]) -> list[str]:
    """Read names for `StateStore.discard`, each once.

    Raises:
        InputError: If one is neither a key nor what `StateStore.verify` gives.
    """
    distinct = list(dict.fromkeys(check_items(names, "names")))
    check_keys(n for n in distinct if not (isinstance(n, str) and (n == DAMAGED_INDEX or is_row_name(n))))
    return distinct


def is_row_name(name: str) -> bool:
    """Whether a name of `StateStore.verify` is that of a row, not a key."""
    return name.startswith(DAMAGED_ROW)


def check_ids(ids: Iterable[str]) -> list[str]:
    """Read collection or record ids of any iterable, each once, and refuse those that no store can write.

    Raises:
        InputError: If `ids` is one string, or an id is not text or holds lone surrogates.
    """
    distinct = list(dict.fromkeys(check_items(ids, "ids")))
    for value in distinct:
        if not isinstance(value, str):
            raise InputError(f"id is {value!r}; wanted text.")
        try:
            value.encode()
        except UnicodeEncodeError as err:
            raise InputError(f"id {value!r} is not valid Unicode (lone surrogate). Repair it before storing.") from err
    return distinct


def check_seconds(seconds: object, name: str) -> None:
    """Refuse what is no span of time.

    Raises:
        InputError: If it is negative or no number.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise InputError(f"{name} is {seconds!r}; wanted seconds, 0 or more.")


def check_put(references: Iterable[Reference], scope: str, wait: float | None) -> list[Reference]:
    """Read references of any iterable, and refuse arguments of `StateStore.put_many` that can't be stored or meant.

    Raises:
        InputError: Naming the id, key, scope or wait.
    """
    read = check_items(references, "references", "a list of Reference")
    for reference in read:
        check_ids((reference.collection_id, reference.record_id))
        check_keys([reference.key])
    if not isinstance(scope, str):
        raise InputError(f"scope is {scope!r}; wanted text that names a database, or ''.")
    check_ids([scope])
    if wait is not None:
        check_seconds(wait, "wait")
    return read


def check_sweep(
    live_collections: Iterable[str] | None, scopes: Iterable[str], younger_than: float
) -> tuple[set[str] | None, set[str], float]:
    """Read the arguments of `StateStore.gc`.

    Returns:
        Live collections (None: no references go), scopes, and the unix seconds up to which what was written may go.

    Raises:
        InputError: If ids or scopes are one string, or `younger_than` is negative or no number.
    """
    check_seconds(younger_than, "younger_than")
    live = None if live_collections is None else set(check_items(live_collections, "live_collections"))
    before = time.time() - younger_than if younger_than else 2.0**53  # 0: also what a clock that is ahead wrote
    return live, set(check_items(scopes, "scopes")), before


def check_same_layout(stored: Layout, wanted: Layout, where: str) -> None:
    """Refuse to open a namespace under another layout than the one it was made with.

    Raises:
        StateMismatchError: Showing both, and what to do.
    """
    if stored != wanted:
        raise StateMismatchError(
            f"{where} holds states of model {stored.fingerprint} as {_describe(stored)}; asked for "
            f"{_describe(wanted)}. Open it with what is stored (stored_layout tells), or index again in another folder."
        )


def _describe(layout: Layout) -> str:
    kept = " with token ids" if layout.keeps_token_ids else ""
    return f"ratio {layout.ratio}, codec {layout.codec.value}, width {layout.hidden_size}, {layout.state_dtype}{kept}"
