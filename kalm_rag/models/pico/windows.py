"""Passages longer than the encoder reads at once: windows joined to one row of token states, and stretches to judge.

Each token's state comes from the first window that reads it, so that the first window is kept whole, as an encoder that
cuts there would read it; a later one adds what is new in it, read behind the `OVERLAP` before. Pure functions.
Letters: B passages, N pooled states, S stretches, W windows, T tokens, H width of a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

OVERLAP = 64
"""Tokens that two neighbouring windows share, a quarter: a long passage costs 1.34 times its tokens to read."""


@dataclass(frozen=True)
class Window:
    """Tokens ``[start, stop)`` of a passage, read at once, of which the states ``[first, last)`` are kept."""

    start: int
    stop: int
    first: int
    last: int


def cut_windows(tokens: int, width: int, overlap: int = OVERLAP) -> list[Window]:
    """Cut a passage into windows of at most `width` tokens; the last one is moved back to be full.

    Args:
        tokens: Tokens of the passage, >= 0, special ones left out.
        width: Most tokens of a window, more than `overlap`.
        overlap: Tokens that two windows share at least.

    Example:
        >>> [(w.start, w.stop, w.first, w.last) for w in cut_windows(10, 6, 2)]
        [(0, 6, 0, 6), (4, 10, 6, 10)]
    """
    if tokens <= width:
        return [Window(0, tokens, 0, tokens)]
    starts = [*range(0, tokens - width, width - overlap), tokens - width]
    seams = [0, *(start + width for start in starts)]
    return [
        Window(start, start + width, first, last) for start, (first, last) in zip(starts, pairwise(seams), strict=True)
    ]


def join_windows(hidden: Tensor, windows: Sequence[Window]) -> Tensor:
    """Put the token states of one passage's windows together.

    Args:
        hidden: States ``(W, T, H)`` of ``[CLS] tokens [SEP]`` per window, all of one width.
        windows: Where each was cut, in order.

    Returns:
        States of ``[CLS] tokens [SEP]`` of the whole passage: the first window's ``[CLS]``, the last one's ``[SEP]``.
    """
    kept = [
        states[1 + window.first - window.start : 1 + window.last - window.start]
        for states, window in zip(hidden, windows, strict=True)
    ]
    return torch.cat([hidden[0, :1], *kept, hidden[-1, -1:]])


@dataclass(frozen=True, eq=False)
class Stretches:
    """Parts of long passages that the decoder judges apart.

    Attributes:
        owners: Passage that each is of, S numbers.
        index: Its states, int64 ``(S, n)``; 0 behind its end.
        real: Which of them are its own, bool ``(S, n)``.
    """

    owners: list[int]
    index: Tensor
    real: Tensor

    @property
    def rows(self) -> Tensor:
        """`owners`, int64 ``(S, 1)``."""
        return torch.tensor(self.owners)[:, None]


def cut_stretches(counts: Tensor, tokens: int) -> Stretches:
    """Cut passages of more than `tokens` tokens into stretches of so many, one every half, the last a quarter at least.

    Args:
        counts: Tokens behind each state, ``(B, N)``; 0 is padding.
        tokens: What the decoder was trained to judge at once.
    """
    ratio = int(counts.max())
    width, step = max(1, tokens // ratio), max(1, tokens // 2 // ratio)
    sizes = zip((counts > 0).sum(1).tolist(), counts.sum(1).tolist(), strict=True)
    cut = [
        (row, start, min(start + width, length))
        for row, (length, total) in enumerate(sizes)
        if total > tokens
        for start in range(0, max(1, length - step // 2), step)
    ]
    starts, stops = torch.tensor([start for _, start, _ in cut]), torch.tensor([stop for _, _, stop in cut])
    index = starts[:, None] + torch.arange(width)  # (S, n)
    real = index < stops[:, None]
    return Stretches([row for row, _, _ in cut], torch.where(real, index, 0), real)
