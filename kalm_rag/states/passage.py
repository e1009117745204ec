"""What one passage becomes: pooled encoder states, alone or packed into a padded batch.

Knows neither model nor store, nor how states are written down (`codec.py`).
Letters: B passages, T tokens, N pooled states, H width, r ratio.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kalm_rag.errors import InputError, StateMismatchError, StateShapeError
from kalm_rag.states.dtypes import dtype_name
from kalm_rag.states.pooling import group_counts, group_ids, mean_groups, repool_factor


@dataclass(frozen=True, kw_only=True, eq=False)
class PassageStates:
    """The reusable half of scoring one passage: its encoder states, pooled, with no query in them.

    Attributes:
        vectors: Pooled states on the CPU, shape ``(N, H)``, N = ceil(tokens / ratio), in the dtype the model makes.
        tokens: Tokens that were read, >= 1; after the cut at the model's limit.
        total_tokens: Tokens of the whole passage; more than `tokens` when it was cut.
        ratio: Tokens per state, >= 1 (the last state may stand for fewer).
        fingerprint: Hex digest of all that changes a state (`BackboneInfo.fingerprint`).
        key: Content address of the text that was read: `passage_key`.
        token_ids: Ids of the tokens that were read, int ``(tokens,)`` below 65,536, where the model's decoder compares
            them with the query's (`BackboneInfo.keeps_token_ids`); else None.

    Raises:
        StateShapeError: If `vectors` or `token_ids` don't have the shape that `tokens` and `ratio` give.
    """

    vectors: Tensor
    tokens: int
    total_tokens: int
    ratio: int
    fingerprint: str
    key: str
    token_ids: Tensor | None = None

    def __post_init__(self) -> None:
        wanted = -(-self.tokens // self.ratio)
        if self.vectors.ndim != 2 or self.vectors.shape[0] != wanted or wanted < 1:
            raise StateShapeError(
                f"states have shape {tuple(self.vectors.shape)}; wanted ({wanted}, H) for {self.tokens} tokens "
                f"at ratio {self.ratio}. Make them with Reranker.encode."
            )
        if self.token_ids is not None and self.token_ids.shape != (self.tokens,):
            raise StateShapeError(
                f"token ids have shape {tuple(self.token_ids.shape)}; wanted ({self.tokens},), one id per token. Make "
                f"states with Reranker.encode."
            )

    def __repr__(self) -> str:
        count, width = self.vectors.shape
        read = f"{self.tokens} of {self.total_tokens}" if self.truncated else self.tokens
        size = f"{count} states x {width} {dtype_name(self.vectors.dtype)}"
        return f"PassageStates({read} tokens, {size}, ratio={self.ratio})"

    @property
    def truncated(self) -> bool:
        """Whether the passage was longer than the model reads."""
        return self.total_tokens > self.tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class StateBatch:
    """States of several passages in one padded block, as a store hands them out and a decoder wants them.

    Attributes:
        vectors: Shape ``(B, N, H)``, right-padded, in the stored dtype.
        scales: For int8, float32 ``(B, N)``: element * scale is the state. Else None.
        tokens: Tokens that were read per passage, int64 ``(B,)``.
        total_tokens: Tokens of each whole passage, int64 ``(B,)``.
        ratio: Tokens per state, >= 1.
        fingerprint: Hex digest of all that changes a state.
        token_ids: Ids of the tokens, int32 ``(B, T)``, right-padded with 0, where the model keeps them. Else None.
    """

    vectors: Tensor
    scales: Tensor | None
    tokens: Tensor
    total_tokens: Tensor
    ratio: int
    fingerprint: str
    token_ids: Tensor | None = None

    def __len__(self) -> int:
        return int(self.vectors.shape[0])

    def __repr__(self) -> str:
        count, most, width = self.vectors.shape
        size = f"up to {most} states x {width} {dtype_name(self.vectors.dtype)}"
        return f"StateBatch({count} passages, {size}, ratio={self.ratio})"

    @property
    def lengths(self) -> Tensor:
        """States per passage, int64 ``(B,)``."""
        return (self.tokens + self.ratio - 1) // self.ratio

    def select(self, rows: Sequence[int], *, pin: bool = False) -> StateBatch:
        """Give the rows asked for, in that order, cut to the longest of them.

        `pin` copies straight into page-locked memory, from where a GPU takes them while work goes on.
        """
        index = torch.as_tensor(rows, dtype=torch.long)
        width = int(self.lengths[index].max()) if len(rows) else 0
        return replace(
            self,
            vectors=_rows(self.vectors[:, :width], index, pin),
            scales=None if self.scales is None else _rows(self.scales[:, :width], index, pin),
            tokens=_rows(self.tokens, index, pin),
            total_tokens=self.total_tokens[index],
            token_ids=None if self.token_ids is None else _rows(self.token_ids[:, : width * self.ratio], index, pin),
        )

    def stretches(self, parts: Sequence[tuple[int, int, int]]) -> StateBatch:
        """Give stretches of passages as passages of their own, widened to whole states.

        Args:
            parts: Row, first token and token behind the last one, of each stretch; at least one token that was read.
        """
        rows, first, last = torch.tensor(parts, dtype=torch.long).reshape(-1, 3).unbind(1)
        first, last = first // self.ratio, (last + self.ratio - 1) // self.ratio  # states
        tokens = torch.minimum(last * self.ratio, self.tokens[rows]) - first * self.ratio
        width = int((last - first).max()) if len(parts) else 0
        states = (first[:, None] + torch.arange(width)).clamp(max=self.vectors.shape[1] - 1)
        token_ids = None
        if self.token_ids is not None:
            place = torch.arange(width * self.ratio)
            every = (first[:, None] * self.ratio + place).clamp(max=self.token_ids.shape[1] - 1)
            token_ids = torch.where(place < tokens[:, None], self.token_ids[rows[:, None], every], 0)
        return replace(
            self,
            vectors=self.vectors[rows[:, None], states],
            scales=None if self.scales is None else self.scales[rows[:, None], states],
            tokens=tokens,
            total_tokens=tokens,
            token_ids=token_ids,
        )

    def on(self, device: torch.device, dtype: torch.dtype, ratio: int | None = None) -> tuple[Tensor, Tensor]:
        """Put the batch on a device, undo int8 there, and pool further if asked, to a multiple of the stored ratio.

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

    def token_ids_on(self, device: torch.device, ratio: int | None = None) -> Tensor | None:
        """Put the token ids on a device, by the states that `on` gives for the same ratio.

        Returns:
            int64 ``(B, N', r)``, 0 where there is no token; None where the model keeps none.
        """
        if self.token_ids is None:
            return None
        tokens = self.ratio * repool_factor(self.ratio, ratio)
        return group_ids(self.token_ids.to(device, non_blocking=True).long(), tokens)


def _rows(block: Tensor, index: Tensor, pin: bool) -> Tensor:
    """Some rows of a block, copied once; into pinned memory, from which a GPU takes them without being waited for."""
    if not pin:
        return block[index]
    rows = torch.empty(len(index), *block.shape[1:], dtype=block.dtype, pin_memory=True)
    return torch.index_select(block, 0, index, out=rows)


def passage_key(text: str) -> str:
    """Content address of a passage: sha256 of its UTF-8 bytes, 64 hex digits. The template is in the fingerprint."""
    return hashlib.sha256(text.encode()).hexdigest()


def _kind(states: PassageStates) -> tuple[object, ...]:
    """What states of one batch must have in common."""
    return states.fingerprint, states.ratio, states.vectors.shape[1], states.vectors.dtype, states.token_ids is None


def batch_states(states: Sequence[PassageStates]) -> StateBatch:
    """Pad states made just now into one batch, in their own dtype; `split_batch` undoes it.

    Args:
        states: One per passage, in the order of the rows.

    Raises:
        StateMismatchError: If they differ in model, width, dtype or ratio, or only some come with token ids.
        InputError: If there are none.
    """
    if not states:
        raise InputError("no states to batch; wanted at least one.")
    first = states[0]
    width = max(s.vectors.shape[0] for s in states)
    vectors = torch.zeros(len(states), width, first.vectors.shape[1], dtype=first.vectors.dtype)
    token_ids = (
        None if first.token_ids is None else torch.zeros(len(states), max(s.tokens for s in states), dtype=torch.int32)
    )
    for row, passage in enumerate(states):
        if _kind(passage) != _kind(first):
            raise StateMismatchError(
                f"states {row} (model {passage.fingerprint}, ratio {passage.ratio}, width {passage.vectors.shape[1]}) "
                f"don't go with states 0 (model {first.fingerprint}, ratio {first.ratio}, width "
                f"{first.vectors.shape[1]}). Encode all passages with one model and ratio."
            )
        vectors[row, : passage.vectors.shape[0]] = passage.vectors
        if token_ids is not None and passage.token_ids is not None:
            token_ids[row, : passage.tokens] = passage.token_ids
    return StateBatch(
        vectors=vectors,
        scales=None,
        tokens=torch.tensor([s.tokens for s in states]),
        total_tokens=torch.tensor([s.total_tokens for s in states]),
        ratio=first.ratio,
        fingerprint=first.fingerprint,
        token_ids=token_ids,
    )


def split_batch(batch: StateBatch, keys: Sequence[str]) -> list[PassageStates]:
    """Take a batch apart into states of single passages, one per key; the inverse of `batch_states`. Not for int8."""
    return [
        PassageStates(
            vectors=batch.vectors[row, : int(batch.lengths[row])].clone(),
            tokens=int(batch.tokens[row]),
            total_tokens=int(batch.total_tokens[row]),
            ratio=batch.ratio,
            fingerprint=batch.fingerprint,
            key=key,
            token_ids=None if batch.token_ids is None else batch.token_ids[row, : int(batch.tokens[row])].clone(),
        )
        for row, key in enumerate(keys)
    ]


def merge_batches(size: int, parts: Sequence[tuple[Sequence[int], StateBatch]]) -> StateBatch:
    """Put the rows of several batches of one layout where they belong in a single one.

    Args:
        size: B of the result; every row from 0 to B-1 must be named once.
        parts: Target rows and the batch that fills them, in that order. At least one.

    Returns:
        The batch, its rows padded to the longest of all parts; the part itself where it is the only one, in order.
    """
    batches = [batch for _, batch in parts]
    if len(batches) == 1 and list(parts[0][0]) == list(range(size)):
        return batches[0]
    first = batches[0]
    width = max(b.vectors.shape[1] for b in batches)
    vectors = torch.zeros(size, width, first.vectors.shape[2], dtype=first.vectors.dtype)
    scales = None if first.scales is None else torch.zeros(size, width)
    tokens, total_tokens = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    longest = max(0 if b.token_ids is None else b.token_ids.shape[1] for b in batches)
    token_ids = None if first.token_ids is None else torch.zeros(size, longest, dtype=torch.int32)
    for rows, batch in parts:
        index = torch.as_tensor(rows, dtype=torch.long)
        vectors[index, : batch.vectors.shape[1]] = batch.vectors
        if scales is not None and batch.scales is not None:
            scales[index, : batch.vectors.shape[1]] = batch.scales
        if token_ids is not None and batch.token_ids is not None:
            token_ids[index, : batch.token_ids.shape[1]] = batch.token_ids
        tokens[index], total_tokens[index] = batch.tokens, batch.total_tokens
    return replace(first, vectors=vectors, scales=scales, tokens=tokens, total_tokens=total_tokens, token_ids=token_ids)
