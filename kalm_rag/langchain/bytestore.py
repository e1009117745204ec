"""A state store as LangChain's ``ByteStore``: to move states to another machine or another key-value store."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import torch
from langchain_core.stores import BaseStore

from kalm_rag.errors import InputError, StoreFormatError
from kalm_rag.states import PassageStates, StateBatch, pack_token_ids, to_bytes, unpack_batch
from kalm_rag.store import Reference, StateStore

_MAGIC = b"kalm1"
_HEAD = struct.Struct("<5s16s32sQQ")  # magic, model fingerprint, content key, tokens read, tokens found


class StateByteStore(BaseStore[str, bytes]):
    """Records' states as bytes by record id. Values are what this class gave, of the same model, ratio and codec.

    A value carries the content key of its passage, so states can't end up under another text. Deleting a record
    leaves the states to `StateStore.gc`.

    Args:
        store: The states.
        collection_id: The collection whose records are the keys (``str(collection.id)`` of Chroma).
    """

    def __init__(self, store: StateStore, collection_id: str = "kalm_rag:bytes") -> None:
        self._store = store
        self._collection_id = collection_id

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """States of records, in order; None where a record, or its states, are not there."""
        wanted = {i: key for i, key in self._known().items() if i in set(keys)}
        content = list(dict.fromkeys(wanted.values()))
        fetched = self._store.get_many(content)
        rows = {content[position]: row for row, position in enumerate(fetched.found)}
        batch = fetched.batch
        if batch is None:
            return [None] * len(keys)
        made = {key: _write(batch, row, key) for key, row in rows.items()}
        return [made.get(wanted[i]) if i in wanted else None for i in keys]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Keep states of records; a known record then points to the new ones.

        Raises:
            InputError: If a value is not what this class gives.
            StateMismatchError: If it belongs to another model.
        """
        states = [self._read(record, value) for record, value in key_value_pairs]
        references = [
            Reference(collection_id=self._collection_id, record_id=record, key=one.key)
            for (record, _), one in zip(key_value_pairs, states, strict=True)
        ]
        self._store.put_many(states, references)

    def mdelete(self, keys: Sequence[str]) -> None:
        """Forget records; unknown ones are ignored."""
        self._store.unreference(self._collection_id, keys)

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """Record ids, in no order."""
        yield from (i for i in self._known() if prefix is None or i.startswith(prefix))

    def _known(self) -> dict[str, str]:
        return {r.record_id: r.key for r in self._store.references(self._collection_id)}

    def _read(self, record: str, value: bytes) -> PassageStates:
        layout = self._store.layout
        if len(value) < _HEAD.size or not value.startswith(_MAGIC):
            raise InputError(f"value of {record!r} is not what StateByteStore gives ({len(value)} bytes).")
        _, fingerprint, key, tokens, total_tokens = _HEAD.unpack_from(value)
        payload = value[_HEAD.size :]
        if fingerprint.hex() == layout.fingerprint and len(payload) != layout.payload_bytes(tokens):
            raise StoreFormatError(
                f"value of {record!r} holds {len(payload)} bytes of states; wanted {layout.payload_bytes(tokens)} "
                f"for {tokens} tokens at ratio {layout.ratio}, codec {layout.codec.value}."
            )
        vectors = torch.zeros(-(-tokens // layout.ratio) or 1, layout.hidden_size)
        token_ids = None
        if fingerprint.hex() == layout.fingerprint:
            batch = unpack_batch([payload], [tokens], [total_tokens], layout)
            vectors, token_ids = batch.on(torch.device("cpu"), torch.float32)[0][0], batch.token_ids
        return PassageStates(  # another model's are refused by the store, which names both
            vectors=vectors,
            tokens=tokens,
            total_tokens=total_tokens,
            ratio=layout.ratio,
            fingerprint=fingerprint.hex(),
            key=key.hex(),
            token_ids=None if token_ids is None else token_ids[0],
        )


def _write(batch: StateBatch, row: int, key: str) -> bytes:
    length, tokens, total_tokens = int(batch.lengths[row]), int(batch.tokens[row]), int(batch.total_tokens[row])
    head = _HEAD.pack(_MAGIC, bytes.fromhex(batch.fingerprint), bytes.fromhex(key), tokens, total_tokens)
    scales = b"" if batch.scales is None else to_bytes(batch.scales[row, :length].clone())
    token_ids = b"" if batch.token_ids is None else pack_token_ids(batch.token_ids[row, :tokens])
    return head + to_bytes(batch.vectors[row, :length].clone()) + scales + token_ids
