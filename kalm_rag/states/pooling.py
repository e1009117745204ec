"""Matryoshka embedding pooling (MEP): token states averaged r to 1, and pooled states averaged again.

Pure tensor functions. Letters: B passages, T tokens, N pooled states, H width, r ratio.
Source of the formula: KaLM-Reranker-V1, arXiv 2606.22807.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kalm_rag.checks import check_count
from kalm_rag.errors import InputError, StateMismatchError

MOST_RATIO = 1 << 20
"""Largest ratio taken. Beyond the tokens that a model reads, every ratio means one state per passage."""

_LARGEST_MODELS = 128
"""Largest ratio that a model was trained at: up to here, groups are laid out whole, however short the passages."""


def check_ratio(ratio: int | None) -> int:
    """Give the pooling ratio as an int, from 1 to `MOST_RATIO`; ``None`` means no pooling, which is 1.

    Raises:
        InputError: If it is not an int, or out of that range.

    Example:
        >>> check_ratio(None), check_ratio(4)
        (1, 4)
    """
    if ratio is None:
        return 1
    found = check_count(ratio, "ratio", hint=" (tokens per stored state), or None for no pooling")
    if found > MOST_RATIO:
        raise InputError(f"ratio is {ratio:.3e}; wanted at most {MOST_RATIO} (one state per passage long before).")
    return found


def repool_factor(stored: int, wanted: int | None) -> int:
    """How many states of ratio `stored` make one at ratio `wanted`; ``None`` keeps the stored one.

    Raises:
        InputError: If `wanted` is not a whole number >= 1.
        StateMismatchError: If `wanted` is not a multiple of `stored`.

    Example:
        >>> repool_factor(4, 16)
        4
    """
    if wanted is None:
        return 1
    wanted = check_ratio(wanted)
    if wanted % stored:
        raise StateMismatchError(
            f"ratio {wanted} was asked of states stored at ratio {stored}; only multiples of {stored} can be had. "
            f"Ask for {stored * max(1, wanted // stored)}, or index again with ratio={wanted}."
        )
    return wanted // stored


def group_counts(tokens: Tensor, ratio: int, width: int) -> Tensor:
    """Count the real tokens behind each pooled state: r for full groups, fewer for the last, 0 for padding.

    Args:
        tokens: Real tokens per passage, shape ``(B,)``.
        ratio: Tokens per group, >= 1.
        width: N, the padded number of groups.

    Returns:
        Float32 counts, shape ``(B, N)``, on the device of `tokens`.

    Example:
        >>> group_counts(torch.tensor([5, 2]), 4, 2).tolist()
        [[4.0, 1.0], [2.0, 0.0]]
    """
    starts = torch.arange(width, device=tokens.device) * ratio  # (N,)
    return (tokens[:, None] - starts[None, :]).clamp(0, ratio).float()  # (B, N)


def group_ids(ids: Tensor, ratio: int) -> Tensor:
    """Lay token ids out by the pooled states that stand for them.

    Args:
        ids: Shape ``(B, T)``, right-padded with 0.
        ratio: Tokens a state stands for, >= 1.

    Returns:
        Shape ``(B, ceil(T / ratio), ratio)``, 0 where there is no token; the last dimension is shorter where one state
        stands for all tokens.

    Example:
        >>> group_ids(torch.tensor([[7, 8, 9]]), 2).tolist()
        [[[7, 8], [9, 0]]]
    """
    ratio = _fit_group(ratio, ids.shape[1])
    return torch.nn.functional.pad(ids, (0, -ids.shape[1] % ratio)).view(len(ids), -1, ratio)


def _fit_group(ratio: int, width: int) -> int:
    """A group that holds all `width` rows instead of a far larger one, which would be padding and memory only."""
    return min(ratio, max(width, _LARGEST_MODELS))


def mean_groups(states: Tensor, counts: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Average every `factor` consecutive rows, each weighted by the tokens it stands for.

    ``out_j = sum_i counts_i x_i / sum_i counts_i`` over the rows i of group j. With counts of 1 and 0 this
    is MEP over token states; with the counts of a first pooling it is the same mean as pooling the tokens
    directly, because weighted means of nested groups nest. Rows of count 0 (padding) never enter, whatever
    they hold.

    Args:
        states: Rows, shape ``(B, N, H)``, right-padded.
        counts: Tokens behind each row, shape ``(B, N)``; 0 marks padding.
        factor: Rows per group, >= 1. The last group may be short.

    Returns:
        Pooled rows, shape ``(B, ceil(N / factor), H)``, in float32 (zeros where a group is all padding),
        and their counts, float32 of shape ``(B, ceil(N / factor))``.

    Example:
        >>> x = torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> pooled, counts = mean_groups(x, torch.ones(1, 3), 2)
        >>> pooled.flatten().tolist(), counts.tolist()
        ([2.0, 8.0], [[2.0, 1.0]])
    """
    counts = counts.float()
    rows = torch.where(counts[..., None] > 0, states.float(), 0.0)  # (B, N, H): garbage in padding stays out
    if factor == 1:
        return rows, counts
    batch, width, hidden = rows.shape
    factor = _fit_group(factor, width)
    groups = -(-width // factor)
    pad = groups * factor - width
    rows = torch.nn.functional.pad(rows, (0, 0, 0, pad)).view(batch, groups, factor, hidden)
    weights = torch.nn.functional.pad(counts, (0, pad)).view(batch, groups, factor)
    total = weights.sum(-1)  # (B, ceil(N / factor))
    pooled = (rows * weights[..., None]).sum(2) / total.clamp(min=1.0)[..., None]
    return pooled, total
