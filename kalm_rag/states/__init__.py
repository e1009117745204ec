"""States of passages: what they are, how they are pooled, and their bytes on disk."""

from __future__ import annotations

from kalm_rag.states.codec import (
    FORMATS,
    Codec,
    Layout,
    check_layout,
    pack_states,
    pack_token_ids,
    quantise,
    to_bytes,
    unpack_batch,
)
from kalm_rag.states.dtypes import DTYPES, check_dtype, dtype_name
from kalm_rag.states.passage import PassageStates, StateBatch, batch_states, merge_batches, passage_key, split_batch

__all__ = [
    "DTYPES",
    "FORMATS",
    "Codec",
    "Layout",
    "PassageStates",
    "StateBatch",
    "batch_states",
    "check_dtype",
    "check_layout",
    "dtype_name",
    "merge_batches",
    "pack_states",
    "pack_token_ids",
    "passage_key",
    "quantise",
    "split_batch",
    "to_bytes",
    "unpack_batch",
]
