"""A state store as LangChain's ``ByteStore``: to move states to another machine or another key-value store."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence

import torch
from langchain_core.stores import BaseStore

from kalm_rag.checks import check_items, check_passages
from kalm_rag.errors import InputError, StateMismatchError, StoreFormatError
from kalm_rag.index.settings import HasStates, read_store
from kalm_rag.states import Layout, PassageStates, StateBatch, pack_token_ids, to_bytes, unpack_batch
from kalm_rag.store import Reference, StateStore

_MAGIC = {b"kalm1": 0, b"kalm2": 4}
"""Bytes of checksum behind the payload, by the value's first bytes; values of earlier releases have none."""

_HEAD = struct.Struct("<5s16s32sQQ")  # magic, model fingerprint, content key, tokens read, tokens of the whole passage
_TAIL = struct.Struct("<I")  # CRC-32 of the layout and of all before it


class StateByteStore(BaseStore[str, bytes]):
    """Records' states as bytes by record id. Values are what this class gave, of the same model, ratio and codec.

    A value carries the content key of its passage, so states can't end up under another text, and a checksum over
    itself and the layout, so damage and another ratio or codec are noticed. Deleting a record leaves the states to
    `StateStore.gc`.

    Args:
        store: The states.
        collection_id: The collection whose records are the keys (``str(collection.id)`` of Chroma).
    """

    def __init__(self, store: StateStore, collection_id: str = "kalm_rag:bytes") -> None:
        if isinstance(store, str | HasStates) or read_store(store) is None:
            raise InputError(f"store is {type(store).__name__}; wanted an open StateStore: kalm_rag.open_store(...).")
        self._store = store
        self._collection_id = collection_id

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """States of records, in order; None where a record, or its states, are not there."""
        records = check_passages(keys, "keys")
        asked = set(records)
        wanted = {record: key for record, key in self._known().items() if record in asked}
        content = list(dict.fromkeys(wanted.values()))
        fetched = self._store.get_many(content)
        batch = fetched.batch
        if batch is None:
            return [None] * len(records)
        made = {
            content[position]: _write(batch, row, content[position], self._store.layout)
            for row, position in enumerate(fetched.found)
        }
        return [made.get(wanted[record]) if record in wanted else None for record in records]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Keep states of records; a known record then points to the new ones.

        Raises:
            InputError: If a value is not what this class gives.
            StateMismatchError: If it belongs to another model.
            StoreFormatError: If it is damaged, or of another ratio or codec.
        """
        pairs = check_items(key_value_pairs, "key_value_pairs", "a list of (record id, bytes)")
        states = [_read(record, value, self._store.layout) for record, value in pairs]
        references = [
            Reference(collection_id=self._collection_id, record_id=record, key=passage.key)
            for (record, _), passage in zip(pairs, states, strict=True)
        ]
        self._store.put_many(states, references)

    def mdelete(self, keys: Sequence[str]) -> None:
        """Forget records; unknown ones are ignored."""
        self._store.unreference(self._collection_id, check_passages(keys, "keys"))

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """Record ids, in no order."""
        yield from (i for i in self._known() if prefix is None or i.startswith(prefix))

    def _known(self) -> dict[str, str]:
        return {r.record_id: r.key for r in self._store.references(self._collection_id)}


def _read(record: str, value: bytes, layout: Layout) -> PassageStates:
    """Read one value, trusting no number in it: nothing is allocated before sizes and checksum are known to fit."""
    extra = _MAGIC.get(bytes(value[:5])) if isinstance(value, bytes) else None
    if extra is None or len(value) < _HEAD.size + extra:
        found = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
        raise InputError(f"value of {record!r} is not what StateByteStore gives ({found}).")
    _, fingerprint, key, tokens, total_tokens = _HEAD.unpack_from(value)
    if fingerprint.hex() != layout.fingerprint:
        raise StateMismatchError(
            f"value of {record!r} has model fingerprint {fingerprint.hex()}, this store's namespace holds "
            f"{layout.fingerprint}. Encode the passages with the model the store was made for."
        )
    payload = value[_HEAD.size : len(value) - extra]
    if not 1 <= tokens <= total_tokens < 2**62 or len(payload) != layout.payload_bytes(tokens):
        raise StoreFormatError(
            f"value of {record!r} holds {len(payload)} bytes of states; wanted {layout.payload_bytes(tokens)} "
            f"for {tokens} of {total_tokens} tokens at ratio {layout.ratio}, codec {layout.codec.value}. Take it from "
            f"a store of this ratio and codec again."
        )
    if extra and _TAIL.unpack(value[-extra:])[0] != _checksum(value[:-extra], layout):
        raise StoreFormatError(
            f"value of {record!r} is damaged, or of another ratio or codec than {layout.ratio} and "
            f"{layout.codec.value}: its checksum doesn't match. Take it from its store again."
        )
    batch = unpack_batch([payload], [tokens], [total_tokens], layout)
    return PassageStates(
        vectors=batch.on(torch.device("cpu"), torch.float32)[0][0],
        tokens=tokens,
        total_tokens=total_tokens,
        ratio=layout.ratio,
        fingerprint=layout.fingerprint,
        key=key.hex(),
        token_ids=None if batch.token_ids is None else batch.token_ids[0],
    )


def _write(batch: StateBatch, row: int, key: str, layout: Layout) -> bytes:
    length, tokens, total_tokens = int(batch.lengths[row]), int(batch.tokens[row]), int(batch.total_tokens[row])
    head = _HEAD.pack(b"kalm2", bytes.fromhex(batch.fingerprint), bytes.fromhex(key), tokens, total_tokens)
    scales = b"" if batch.scales is None else to_bytes(batch.scales[row, :length].clone())
    token_ids = b"" if batch.token_ids is None else pack_token_ids(batch.token_ids[row, :tokens])
    value = head + to_bytes(batch.vectors[row, :length].clone()) + scales + token_ids
    return value + _TAIL.pack(_checksum(value, layout))


def _checksum(value: bytes, layout: Layout) -> int:
    return zlib.crc32(value, layout.checksum)
