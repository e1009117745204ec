"""One passage as every store keeps it: a row, its checksum, what is wrong with it, and a batch made of several."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from kalm_rag.errors import StoreFormatError
from kalm_rag.states import Layout, PassageStates, StateBatch, pack_states, unpack_batch

Value = TypeVar("Value")


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


class StoredRow(NamedTuple):
    """One passage as every store keeps it: payload bytes, what is needed to read them, and a checksum over it all."""

    key: str
    tokens: int
    total_tokens: int
    checksum: int
    payload: bytes
    created: int = 0  # unix seconds of the last put, where the store keeps it with the row


def make_row(states: PassageStates, layout: Layout) -> StoredRow:
    """Turn states into what is stored; StateMismatchError if they belong to another namespace."""
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
    """Check the rows that a store found (StoreFormatError) and pack them into one batch, in the request's order."""
    for row in rows.values():
        wrong = damage(row, layout)
        if wrong is not None:
            raise StoreFormatError(
                f"{where} holds damaged states for passage {row.key[:12]}...: {wrong}. Run `kalm-rag verify "
                f"--repair` or backfill(): damaged states are dropped and rebuilt from the texts."
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
