"""Rows cut into passes of the decoder: bounded by padded tokens, halved where memory runs out, counted.

Knows models and states; knows no query, store or framework.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kalm_rag.errors import KalmRagError
from kalm_rag.models.backbone import Backbone
from kalm_rag.states import StateBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DecodeStats:
    """What the decoder was given.

    Attributes:
        passes: Calls of the decoder.
        rows: Passages over all of them.
        used: Elements (prompt tokens, states or both, as the model counts) that are something.
        padded: Elements computed, padding included.
        halvings: Times a batch was cut because memory ran out.
    """

    passes: int = 0
    rows: int = 0
    used: int = 0
    padded: int = 0
    halvings: int = 0

    @property
    def waste(self) -> float:
        """Share of the computed elements that is padding, in [0, 1]."""
        return 1 - self.used / self.padded if self.padded else 0.0

    def __add__(self, other: DecodeStats) -> DecodeStats:
        return DecodeStats(
            passes=self.passes + other.passes,
            rows=self.rows + other.rows,
            used=self.used + other.used,
            padded=self.padded + other.padded,
            halvings=self.halvings + other.halvings,
        )


@dataclass(eq=False)
class DecodeLog:
    """Adds up the stats of many calls, from many threads."""

    total: DecodeStats = field(default_factory=DecodeStats)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, stats: DecodeStats) -> None:
        """Count one call."""
        with self._lock:
            self.total += stats
        logger.debug("decoded %d passages in %d passes, %.0f%% padding", stats.rows, stats.passes, 100 * stats.waste)


def decode_all(
    backbone: Backbone, prompts: Sequence[Any], states: StateBatch, ratio: int | None
) -> tuple[Tensor, DecodeStats]:
    """Decode in batches of like prompts and lengths, as large as the device does best with; one transfer at the end.

    Args:
        backbone: The model.
        prompts: One per passage.
        states: The passages.
        ratio: As `StateBatch.on`.

    Returns:
        Margins, float32 ``(B,)`` on the CPU in input order, and what it took.

    Raises:
        KalmRagError: If memory runs out with a single passage.
    """
    lengths = states.lengths.tolist()
    order = order_rows(prompts, lengths)
    widths = [backbone.decode_width(p, n) for p, n in zip(prompts, lengths, strict=True)]
    waiting = list(cut_batches(order, widths, len(order), backbone.decode_budget))[::-1]
    parts, stats = [], DecodeStats()
    while waiting:
        rows = waiting.pop()
        try:
            batch = states.select(rows, pin=backbone.device.type == "cuda")
            placed = *batch.on(backbone.device, torch.float32, ratio), batch.token_ids_on(backbone.device, ratio)
            parts.append(backbone.decode([prompts[i] for i in rows], *placed))
        except (RuntimeError, MemoryError) as err:  # torch.OutOfMemoryError is a RuntimeError
            if not _is_out_of_memory(err):
                raise
            waiting = _halved([*waiting, rows], len(rows), err)
            stats += DecodeStats(halvings=1)
            continue
        used, padded = sum(widths[i] for i in rows), max(widths[i] for i in rows) * len(rows)
        stats += DecodeStats(passes=1, rows=len(rows), used=used, padded=padded)
    ordered = torch.cat(parts).float().cpu() if parts else torch.empty(0)
    margins = torch.empty_like(ordered)
    margins[torch.tensor(order, dtype=torch.long)] = ordered
    return margins, stats


def find_attention(backbone: Backbone, prompt: Any, batch: StateBatch, ratio: int | None) -> list[float]:  # noqa: ANN401
    """Tell where the decoder looks in the one passage of a batch: shares of attention per state, sum 1."""
    vectors, counts = batch.on(backbone.device, backbone.state_dtype, ratio)
    attention = backbone.attend(prompt, vectors, counts, batch.token_ids_on(backbone.device, ratio))  # (1, N)
    weights: list[float] = attention[0].float().cpu().tolist()
    return weights


def order_rows(prompts: Sequence[Any], lengths: Sequence[int]) -> list[int]:
    """Rows of one prompt together (as they come first), the longest first: like with like.

    Example:
        >>> order_rows(["a", "b", "a"], [1, 5, 3])
        [2, 0, 1]
    """
    first_seen: dict[int, int] = {}
    for prompt in prompts:
        first_seen.setdefault(id(prompt), len(first_seen))
    return sorted(range(len(prompts)), key=lambda row: (first_seen[id(prompts[row])], -lengths[row]))


def cut_batches(order: Sequence[int], lengths: Sequence[int], size: int, budget: int) -> Iterator[list[int]]:
    """Cut an order into runs of at most `size` rows and `budget` padded elements (one row always fits).

    Example:
        >>> list(cut_batches([2, 0, 1], [4, 3, 9], size=2, budget=10))
        [[2], [0, 1]]
    """
    rows: list[int] = []
    width = 0
    for row in order:
        wider = max(width, lengths[row])
        if rows and (len(rows) == size or wider * (len(rows) + 1) > budget):
            yield rows
            rows, wider = [], lengths[row]
        rows.append(row)
        width = wider
    if rows:
        yield rows


def _halved(waiting: Sequence[list[int]], size: int, error: BaseException) -> list[list[int]]:
    """Cut what still waits (last first) to half of a size that was too much; the order stays."""
    if size == 1:
        raise KalmRagError(
            "memory ran out while scoring a single passage. Free some, score with a larger ratio, or use a smaller "
            "model or dtype='bf16'."
        ) from error
    logger.warning("memory ran out with %d passages in a pass; going on with %d.", size, size // 2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    step = size // 2
    return [rows[start : start + step] for rows in waiting for start in reversed(range(0, len(rows), step))]


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or "out of memory" in text or "can't allocate memory" in text
