"""What one passage becomes: pooled encoder states, alone or packed into a padded batch, and their bytes on disk.

The byte format is versioned (`Layout.format`) and never pickled: raw little-endian rows, then, for int8, one float32
scale a row, then, for models that keep the words, one unsigned 16-bit id a token. Knows neither model nor store.
Letters: B passages, T tokens, N pooled states, H width, r ratio.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from kalm_rag.errors import InputError, StateMismatchError, StateShapeError
from kalm_rag.pooling import group_counts, group_ids, mean_groups, repool_factor

FORMATS = {False: 1, True: 2}
"""Versions of the byte format written by `pack_states`, by whether words are kept."""

MOST_IDS = 1 << 16
"""Word ids that a state can keep are below this."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""Element types that a stored state may have, by the name written on disk."""


class Codec(str, Enum):
    """How states are kept: in the model's own dtype (exact), as bfloat16, or as int8 with a scale per vector."""

    EXACT = "exact"
    BF16 = "bf16"
    INT8 = "int8"

    @classmethod
    def parse(cls, value: str | Codec) -> Codec:
        """Read a codec name.

        Raises:
            InputError: If there is no such codec.
        """
        try:
            return cls(value)
        except ValueError as err:
            raise InputError(f"codec is {value!r}; wanted one of {', '.join(c.value for c in cls)}.") from err

    def element(self, state_dtype: torch.dtype) -> torch.dtype:
        """Element type on disk, for states made in `state_dtype`."""
        return {Codec.EXACT: state_dtype, Codec.BF16: torch.bfloat16, Codec.INT8: torch.int8}[self]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the states of one namespace look like. All of a namespace's states share it.

    Attributes:
        fingerprint: Digest of all that changes a state (`BackboneInfo.fingerprint`).
        hidden_size: H, elements a vector.
        ratio: Tokens a state stands for.
        codec: How they are stored.
        state_dtype: Name of the dtype the model makes states in.
        words: Whether the ids of the tokens are kept behind the vectors, two bytes each.
    """

    fingerprint: str
    hidden_size: int
    ratio: int
    codec: Codec
    state_dtype: str
    words: bool = False

    @property
    def format(self) -> int:
        """Version of the byte format of these states."""
        return FORMATS[self.words]

    @property
    def element(self) -> torch.dtype:
        """Element type of a stored vector."""
        return self.codec.element(DTYPES[self.state_dtype])

    def payload_bytes(self, tokens: int) -> int:
        """Bytes that one passage of `tokens` tokens takes, headers aside."""
        scale = 4 if self.codec is Codec.INT8 else 0
        rows = -(-tokens // self.ratio) * (self.hidden_size * self.element.itemsize + scale)
        return rows + (2 * tokens if self.words else 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class PassageStates:
    """The reusable half of scoring one passage: its encoder states, pooled, with no query in them.

    Attributes:
        vectors: Pooled states on the CPU, shape ``(N, H)``, N = ceil(tokens / ratio), in the model's state dtype.
        tokens: Tokens that were read, after the cut at the model's limit.
        found: Tokens the whole passage has; more than `tokens` when it was cut.
        ratio: Tokens a state stands for (the last may stand for fewer).
        fingerprint: Digest of the model they belong to.
        key: Content address: sha256 of the passage text, hex.
        words: Ids of the tokens that were read, int ``(tokens,)`` below 65,536, where the model's decoder compares
            words as they are (`BackboneInfo.keeps_words`); else None.
    """

    vectors: Tensor
    tokens: int
    found: int
    ratio: int
    fingerprint: str
    key: str
    words: Tensor | None = None

    def __post_init__(self) -> None:
        wanted = -(-self.tokens // self.ratio)
        if self.vectors.ndim != 2 or self.vectors.shape[0] != wanted or wanted < 1:
            raise StateShapeError(
                f"states have shape {tuple(self.vectors.shape)}; wanted ({wanted}, H) for {self.tokens} tokens "
                f"at ratio {self.ratio}. Make them with Reranker.encode."
            )
        if self.words is not None and self.words.shape != (self.tokens,):
            raise StateShapeError(
                f"words have shape {tuple(self.words.shape)}; wanted ({self.tokens},), one id a token. Make states "
                f"with Reranker.encode."
            )

    @property
    def truncated(self) -> bool:
        """Whether the passage was longer than the model reads."""
        return self.found > self.tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class StateBatch:
    """States of several passages in one padded block, as a store hands them out and a decoder wants them.

    Attributes:
        vectors: Shape ``(B, N, H)``, right-padded, in the stored element type.
        scales: For int8, float32 ``(B, N)``: element * scale is the state. Else None.
        tokens: Tokens read per passage, int64 ``(B,)``.
        found: Tokens each whole passage has, int64 ``(B,)``.
        ratio: Tokens a state stands for.
        fingerprint: Digest of the model they belong to.
        words: Ids of the tokens, int32 ``(B, T)``, right-padded with 0, where the model keeps them. Else None.
    """

    vectors: Tensor
    scales: Tensor | None
    tokens: Tensor
    found: Tensor
    ratio: int
    fingerprint: str
    words: Tensor | None = None

    def __len__(self) -> int:
        return int(self.vectors.shape[0])

    @property
    def lengths(self) -> Tensor:
        """States per passage, int64 ``(B,)``."""
        return (self.tokens + self.ratio - 1) // self.ratio

    def select(self, rows: Sequence[int], *, pin: bool = False) -> StateBatch:
        """Give the rows asked for, in that order, cut to the longest of them.

        Args:
            rows: Which, and in which order.
            pin: Copy straight into page-locked memory, from where a GPU takes them while work goes on.
        """
        index = torch.as_tensor(rows, dtype=torch.long)
        width = int(self.lengths[index].max()) if len(rows) else 0
        return replace(
            self,
            vectors=_rows(self.vectors[:, :width], index, pin),
            scales=None if self.scales is None else _rows(self.scales[:, :width], index, pin),
            tokens=_rows(self.tokens, index, pin),
            found=self.found[index],
            words=None if self.words is None else _rows(self.words[:, : width * self.ratio], index, pin),
        )

    def on(self, device: torch.device, dtype: torch.dtype, ratio: int | None = None) -> tuple[Tensor, Tensor]:
        """Put the batch on a device, undo int8 there, and pool further if asked.

        Args:
            device: Where the decoder is.
            dtype: Dtype the decoder computes in.
            ratio: A multiple of the stored ratio; None keeps it.

        Returns:
            States ``(B, N', H)`` in `dtype` and their counts, float32 ``(B, N')``, both on `device`.

        Raises:
            StateMismatchError: If `ratio` is not a multiple of the stored one.
        """
        factor = repool_factor(self.ratio, ratio)
        vectors = self.vectors.to(device, non_blocking=True)
        counts = group_counts(self.tokens.to(device, non_blocking=True), self.ratio, vectors.shape[1])
        if self.scales is not None:
            vectors = vectors.float() * self.scales.to(device, non_blocking=True)[..., None]
        if factor > 1:
            vectors, counts = mean_groups(vectors, counts, factor)
        # a masked key still meets its value (0 x NaN is NaN), so padding is zeroed whatever it held
        return torch.where(counts[..., None] > 0, vectors.to(dtype), 0.0), counts

    def words_on(self, device: torch.device, ratio: int | None = None) -> Tensor | None:
        """Put the word ids on a device, by the states that `on` gives for the same ratio.

        Returns:
            int64 ``(B, N', r)``, 0 where there is no token; None where the model keeps no words.

        Raises:
            StateMismatchError: If `ratio` is not a multiple of the stored one.
        """
        if self.words is None:
            return None
        tokens = self.ratio * repool_factor(self.ratio, ratio)
        return group_ids(self.words.to(device, non_blocking=True).long(), tokens)


def _rows(block: Tensor, index: Tensor, pin: bool) -> Tensor:
    """Some rows of a block, copied once; into pinned memory, from which a GPU takes them without being waited for."""
    if not pin:
        return block[index]
    rows = torch.empty(len(index), *block.shape[1:], dtype=block.dtype, pin_memory=True)
    return torch.index_select(block, 0, index, out=rows)


def passage_key(text: str) -> str:
    """Content address of a passage: sha256 of its UTF-8 bytes, hex. The template is in the fingerprint."""
    return hashlib.sha256(text.encode()).hexdigest()


def quantise(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to int8 with one scale each: ``scale = max|row| / 127``, ``q = round(row / scale)``.

    Args:
        vectors: Shape ``(N, H)``, any float dtype.

    Returns:
        int8 ``(N, H)`` and float32 scales ``(N,)``; a row of zeros has scale 0.

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
    """Raw little-endian bytes of a contiguous CPU tensor, whatever its dtype (numpy has no bfloat16)."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def pack_states(states: PassageStates, layout: Layout) -> bytes:
    """Write one passage's states as bytes, in a namespace's layout.

    Raises:
        StateMismatchError: If they belong to another model, width or ratio than the namespace.
        InputError: If a word's id doesn't fit 16 bits.
    """
    check_layout(states, layout)
    words = b"" if states.words is None else pack_words(states.words)
    if layout.codec is Codec.INT8:
        rows, scales = quantise(states.vectors)
        return to_bytes(rows) + to_bytes(scales) + words
    return to_bytes(states.vectors.to(layout.element)) + words


def pack_words(words: Tensor) -> bytes:
    """Write word ids as unsigned 16-bit numbers.

    Raises:
        InputError: If one doesn't fit.
    """
    ids = words.cpu().numpy()
    if ids.size and not 0 <= ids.min() <= ids.max() < MOST_IDS:
        raise InputError(f"word ids run from {ids.min()} to {ids.max()}; wanted 0 to {MOST_IDS - 1}.")
    return bytes(ids.astype("<u2").tobytes())


def check_layout(states: PassageStates, layout: Layout) -> None:
    """Refuse states that don't belong into a namespace.

    Raises:
        StateMismatchError: Naming what differs, found and wanted.
    """
    found = (states.fingerprint, states.vectors.shape[1], states.ratio)
    wanted = (layout.fingerprint, layout.hidden_size, layout.ratio)
    for name, have, want in zip(("model fingerprint", "width", "ratio"), found, wanted, strict=True):
        if have != want:
            raise StateMismatchError(
                f"states have {name} {have}, this store's namespace holds {want}. "
                f"Encode the passages with the model and ratio the store was made for."
            )
    if (states.words is not None) != layout.words:
        have, want = ("no words", "words") if layout.words else ("words", "none")
        raise StateMismatchError(f"states come with {have}, this store's namespace holds {want}. Encode them again.")


def unpack_batch(payloads: Sequence[bytes], tokens: Sequence[int], found: Sequence[int], layout: Layout) -> StateBatch:
    """Pack stored bytes straight into one padded batch, with one copy per passage.

    Args:
        payloads: What `pack_states` wrote, one per passage. Lengths must fit `tokens` (stores check checksums).
        tokens: Tokens read per passage.
        found: Tokens each whole passage has.
        layout: The namespace's layout.

    Raises:
        StateShapeError: If a payload's length doesn't fit its token count.
    """
    lengths = [-(-t // layout.ratio) for t in tokens]
    width, hidden = max(lengths, default=0), layout.hidden_size
    item = layout.element.itemsize
    # numpy, in integers of the element's size (it has no bfloat16): torch.zeros wakes torch's thread pool, which took
    # 2 to 6 ms of a 1.6 ms fetch on two busy cores
    block = np.zeros((len(payloads), width, hidden), dtype=f"<i{item}")
    rows = block.view(np.uint8).reshape(len(payloads), width * hidden * item)
    scales = np.zeros((len(payloads), width), dtype="<f4") if layout.codec is Codec.INT8 else None
    words = np.zeros((len(payloads), max(tokens, default=0)), dtype=np.int32) if layout.words else None
    for row, (payload, n) in enumerate(zip(payloads, lengths, strict=True)):
        wanted = layout.payload_bytes(tokens[row])
        if len(payload) != wanted:
            raise StateShapeError(
                f"passage {row}: {len(payload)} bytes stored, wanted {wanted} for {tokens[row]} tokens."
            )
        size = n * hidden * item
        # numpy reads bytes in place; torch.frombuffer warns about read-only ones and needs aligned scales
        rows[row, :size] = np.frombuffer(payload, np.uint8, count=size)
        if scales is not None:
            scales[row, :n] = np.frombuffer(payload, "<f4", count=n, offset=size)
        if words is not None:
            words[row, : tokens[row]] = np.frombuffer(payload, "<u2", offset=wanted - 2 * tokens[row])
    return StateBatch(
        vectors=torch.from_numpy(block).view(layout.element),
        scales=None if scales is None else torch.from_numpy(scales),
        tokens=torch.as_tensor(list(tokens), dtype=torch.long),
        found=torch.as_tensor(list(found), dtype=torch.long),
        ratio=layout.ratio,
        fingerprint=layout.fingerprint,
        words=None if words is None else torch.from_numpy(words),
    )


def _kind(states: PassageStates) -> tuple[object, ...]:
    """What states of one batch must have in common."""
    return states.fingerprint, states.ratio, states.vectors.shape[1], states.vectors.dtype, states.words is None


def batch_states(states: Sequence[PassageStates]) -> StateBatch:
    """Pad states made just now into one batch, in their own dtype.

    Raises:
        StateMismatchError: If they differ in model, width, dtype or ratio, or only some come with words.
        InputError: If there are none.
    """
    if not states:
        raise InputError("no states to batch; wanted at least one.")
    first = states[0]
    width = max(s.vectors.shape[0] for s in states)
    vectors = torch.zeros(len(states), width, first.vectors.shape[1], dtype=first.vectors.dtype)
    words = None if first.words is None else torch.zeros(len(states), max(s.tokens for s in states), dtype=torch.int32)
    for row, one in enumerate(states):
        if _kind(one) != _kind(first):
            raise StateMismatchError(
                f"states {row} (model {one.fingerprint}, ratio {one.ratio}, width {one.vectors.shape[1]}) don't "
                f"go with states 0 (model {first.fingerprint}, ratio {first.ratio}, width {first.vectors.shape[1]}). "
                f"Encode all passages with one model and ratio."
            )
        vectors[row, : one.vectors.shape[0]] = one.vectors
        if words is not None and one.words is not None:
            words[row, : one.tokens] = one.words
    return StateBatch(
        vectors=vectors,
        scales=None,
        tokens=torch.tensor([s.tokens for s in states]),
        found=torch.tensor([s.found for s in states]),
        ratio=first.ratio,
        fingerprint=first.fingerprint,
        words=words,
    )


def merge_batches(size: int, parts: Sequence[tuple[Sequence[int], StateBatch]]) -> StateBatch:
    """Put the rows of several batches of one layout where they belong in a single one.

    Args:
        size: B of the result; every row from 0 to B-1 must be named once.
        parts: Target rows and the batch that fills them, in that order.
    """
    batches = [batch for _, batch in parts]
    if len(batches) == 1 and list(parts[0][0]) == list(range(size)):
        return batches[0]
    first = batches[0]
    width = max(b.vectors.shape[1] for b in batches)
    vectors = torch.zeros(size, width, first.vectors.shape[2], dtype=first.vectors.dtype)
    scales = None if first.scales is None else torch.zeros(size, width)
    tokens, found = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    longest = max(0 if b.words is None else b.words.shape[1] for b in batches)
    words = None if first.words is None else torch.zeros(size, longest, dtype=torch.int32)
    for rows, batch in parts:
        index = torch.as_tensor(rows, dtype=torch.long)
        vectors[index, : batch.vectors.shape[1]] = batch.vectors
        if scales is not None and batch.scales is not None:
            scales[index, : batch.vectors.shape[1]] = batch.scales
        if words is not None and batch.words is not None:
            words[index, : batch.words.shape[1]] = batch.words
        tokens[index], found[index] = batch.tokens, batch.found
    return replace(first, vectors=vectors, scales=scales, tokens=tokens, found=found, words=words)
