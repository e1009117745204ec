"""How states become bytes on disk: codecs, the layout of a namespace, packing and unpacking.

The byte format is versioned (`Layout.format`) and never pickled. One passage's payload is little-endian, without
padding or header: N x H elements row by row, then, for int8, N float32 scales, then, for models that keep token ids, T
unsigned 16-bit ids. Knows neither model nor store.
Letters: B passages, T tokens, N pooled states, H width, r ratio.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalm_rag.checks import check_count
from kalm_rag.errors import InputError, StateMismatchError, StateShapeError
from kalm_rag.states.dtypes import DTYPES
from kalm_rag.states.passage import PassageStates, StateBatch

FORMATS = {False: 1, True: 2}
"""Versions of the byte format written by `pack_states`, by whether token ids are kept."""

MOST_IDS = 1 << 16
"""Token ids that can be kept are below this: two bytes each."""


class Codec(str, Enum):
    """How states are stored: what is lost, and the bytes per state of width H.

    ``exact`` keeps the model's own dtype bit for bit (2 H bytes in 16-bit dtypes, 4 H in float32). ``bf16`` rounds to
    bfloat16 (2 H). ``int8`` rounds to 8 bits with one scale per state (H + 4): within half a step, see `quantise`.
    """

    EXACT = "exact"
    BF16 = "bf16"
    INT8 = "int8"

    @classmethod
    def parse(cls, value: str | Codec) -> Codec:
        """Read a codec name; InputError if there is no such codec."""
        try:
            return cls(value)
        except ValueError as err:
            raise InputError(f"codec is {value!r}; wanted one of {', '.join(c.value for c in cls)}.") from err

    def element(self, state_dtype: torch.dtype) -> torch.dtype:
        """Dtype of the stored elements, for states that the model makes in `state_dtype`."""
        return {Codec.EXACT: state_dtype, Codec.BF16: torch.bfloat16, Codec.INT8: torch.int8}[self]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the states of one namespace of a store are laid out in bytes; all of them alike.

    Two layouts are equal if states written under one can be read under the other.

    Attributes:
        fingerprint: Names the namespace: hex digest of all that changes a state (`BackboneInfo.fingerprint`).
        hidden_size: H, elements per state, >= 1.
        ratio: r, tokens per state, >= 1.
        codec: How states are stored.
        state_dtype: Dtype the model makes states in, a name of `DTYPES` (``"float32"``).
        keeps_token_ids: Whether each token's id is kept behind the states, two bytes per token.

    Raises:
        InputError: If a number is below 1, or there is no such codec or dtype.

    Example:
        >>> layout = Layout(fingerprint="ab" * 16, hidden_size=384, ratio=4, codec=Codec.INT8, state_dtype="float16")
        >>> layout.element, layout.payload_bytes(tokens=10)  # 3 states of 384 bytes and a 4-byte scale
        (torch.int8, 1164)
    """

    fingerprint: str
    hidden_size: int
    ratio: int
    codec: Codec
    state_dtype: str
    keeps_token_ids: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "ratio"):
            check_count(getattr(self, name), name)
        if not isinstance(self.codec, Codec) or self.state_dtype not in DTYPES:
            raise InputError(
                f"codec is {self.codec!r}, state_dtype {self.state_dtype!r}; wanted a Codec and one of "
                f"{', '.join(DTYPES)}."
            )

    @property
    def format(self) -> int:
        """Version of the byte format, written beside the layout: 1, or 2 with token ids."""
        return FORMATS[self.keeps_token_ids]

    @property
    def fields(self) -> tuple[str, int, int, str, str, int]:
        """What a store writes down of a layout: fingerprint, width, ratio, codec, dtype, byte format."""
        return (self.fingerprint, self.hidden_size, self.ratio, self.codec.value, self.state_dtype, self.format)

    @classmethod
    def of(cls, fields: Sequence[Any]) -> Layout:
        """Read `fields` back; KeyError, ValueError or TypeError if they are no layout that this release reads."""
        fingerprint, hidden_size, ratio, codec, state_dtype, version = fields
        return cls(
            fingerprint=fingerprint,
            hidden_size=hidden_size,
            ratio=ratio,
            codec=Codec.parse(codec),
            state_dtype=state_dtype,
            keeps_token_ids={number: keeps for keeps, number in FORMATS.items()}[version],
        )

    @property
    def checksum(self) -> int:
        """CRC-32 over all fields, to be written beside them: one changed byte in a ratio gives other, wrong states."""
        return zlib.crc32(repr(self.fields).encode())

    @property
    def element(self) -> torch.dtype:
        """Dtype of the stored elements."""
        return self.codec.element(DTYPES[self.state_dtype])

    def payload_bytes(self, tokens: int) -> int:
        """Bytes of one passage's payload, of which `tokens` >= 1 were read."""
        scale = 4 if self.codec is Codec.INT8 else 0
        rows = -(-tokens // self.ratio) * (self.hidden_size * self.element.itemsize + scale)
        return rows + (2 * tokens if self.keeps_token_ids else 0)


def quantise(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Round states to int8 with one scale each: ``scale = max|row| / 127``, ``q = round(row / scale)``.

    ``q * scale`` is within half a scale of each element. A scale per state, not per passage or column: one state with
    a large element leaves the others' steps small.

    Args:
        vectors: Shape ``(N, H)``, any float dtype, any device; finite.

    Returns:
        int8 ``(N, H)`` in [-127, 127] and float32 scales ``(N,)``, both on the CPU; a row of zeros has scale 0.

    Example:
        >>> q, s = quantise(torch.tensor([[1.0, -2.54]]))
        >>> q.tolist(), round(float(s[0]), 4)
        ([[50, -127]], 0.02)
    """
    # numpy: a few kB at a time, torch's thread pool costs more than it does (170 times slower on two busy cores)
    rows = vectors.detach().cpu().float().numpy()
    scales = np.abs(rows).max(-1) / np.float32(127)
    safe = np.where(scales > 0, scales, np.float32(1))
    quantised = np.clip(np.rint(rows / safe[:, None]), -127, 127).astype(np.int8)
    return torch.from_numpy(quantised), torch.from_numpy(scales)


def to_bytes(tensor: Tensor) -> bytes:
    """Raw little-endian bytes of a CPU tensor of any dtype (numpy has no bfloat16), row by row."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def pack_states(states: PassageStates, layout: Layout) -> bytes:
    """Write one passage's states (on the CPU, float) as ``layout.payload_bytes(states.tokens)`` bytes.

    Raises:
        StateMismatchError: If they belong to another model, width or ratio than the namespace.
        InputError: If a token's id doesn't fit 16 bits.
    """
    check_layout(states, layout)
    token_ids = b"" if states.token_ids is None else pack_token_ids(states.token_ids)
    if layout.codec is Codec.INT8:
        rows, scales = quantise(states.vectors)
        return to_bytes(rows) + to_bytes(scales) + token_ids
    return to_bytes(states.vectors.to(layout.element)) + token_ids


def pack_token_ids(token_ids: Tensor) -> bytes:
    """Write token ids, shape ``(T,)``, as unsigned 16-bit numbers; InputError if one doesn't fit."""
    ids = token_ids.cpu().numpy()
    if ids.size and not 0 <= ids.min() <= ids.max() < MOST_IDS:
        raise InputError(f"token ids run from {ids.min()} to {ids.max()}; wanted 0 to {MOST_IDS - 1}.")
    return bytes(ids.astype("<u2").tobytes())


def check_layout(states: PassageStates, layout: Layout) -> None:
    """Refuse states that don't belong into a namespace; the StateMismatchError names what differs."""
    found = (states.fingerprint, states.vectors.shape[1], states.ratio)
    wanted = (layout.fingerprint, layout.hidden_size, layout.ratio)
    for name, have, want in zip(("model fingerprint", "width", "ratio"), found, wanted, strict=True):
        if have != want:
            raise StateMismatchError(
                f"states have {name} {have}, this store's namespace holds {want}. "
                f"Encode the passages with the model and ratio the store was made for."
            )
    if (states.token_ids is not None) != layout.keeps_token_ids:
        have, want = ("no token ids", "token ids") if layout.keeps_token_ids else ("token ids", "none")
        raise StateMismatchError(f"states come with {have}, this store's namespace holds {want}. Encode them again.")


def unpack_batch(
    payloads: Sequence[bytes], tokens: Sequence[int], total_tokens: Sequence[int], layout: Layout
) -> StateBatch:
    """Read payloads of `pack_states` straight into one padded batch, with one copy per passage.

    Args:
        payloads: One per passage (B). What is in them is trusted: stores compare checksums first.
        tokens: Tokens read per passage, each >= 1.
        total_tokens: Tokens each whole passage has.
        layout: The namespace's.

    Returns:
        The batch on the CPU, in the stored dtype (``layout.element``), in the order of `payloads`.

    Raises:
        StateShapeError: If a payload's length doesn't fit its token count. All are compared before anything is
            allocated: a wrong count could ask for any amount of memory.
    """
    for row, (payload, count) in enumerate(zip(payloads, tokens, strict=True)):
        wanted = layout.payload_bytes(count)
        if count < 1 or len(payload) != wanted:
            raise StateShapeError(f"passage {row}: {len(payload)} bytes stored, wanted {wanted} for {count} tokens.")
    lengths = [-(-t // layout.ratio) for t in tokens]
    width, hidden = max(lengths, default=0), layout.hidden_size
    item = layout.element.itemsize
    # numpy, in integers of the element's size (it has no bfloat16): torch.zeros wakes torch's thread pool, which took
    # 2 to 6 ms of a 1.6 ms fetch on two busy cores
    block = np.zeros((len(payloads), width, hidden), dtype=f"<i{item}")
    rows = block.view(np.uint8).reshape(len(payloads), width * hidden * item)
    scales = np.zeros((len(payloads), width), dtype="<f4") if layout.codec is Codec.INT8 else None
    token_ids = np.zeros((len(payloads), max(tokens, default=0)), dtype=np.int32) if layout.keeps_token_ids else None
    for row, (payload, n) in enumerate(zip(payloads, lengths, strict=True)):
        size = n * hidden * item
        # numpy reads bytes in place; torch.frombuffer warns about read-only ones and needs aligned scales
        rows[row, :size] = np.frombuffer(payload, np.uint8, count=size)
        if scales is not None:
            scales[row, :n] = np.frombuffer(payload, "<f4", count=n, offset=size)
        if token_ids is not None:
            token_ids[row, : tokens[row]] = np.frombuffer(payload, "<u2", offset=len(payload) - 2 * tokens[row])
    return StateBatch(
        vectors=torch.from_numpy(block).view(layout.element),
        scales=None if scales is None else torch.from_numpy(scales),
        tokens=torch.as_tensor(list(tokens), dtype=torch.long),
        total_tokens=torch.as_tensor(list(total_tokens), dtype=torch.long),
        ratio=layout.ratio,
        fingerprint=layout.fingerprint,
        token_ids=None if token_ids is None else torch.from_numpy(token_ids),
    )
