"""Keys and values of a prompt's beginning over a passage, kept in memory within a bound.

What the decoder computes for system and task text over one passage doesn't depend on the query, so the next query under
the same instructions can start behind it. An entry is found by the digest of the very states that the decoder read
and of the prompt's first tokens: changed text, another ratio, codec or instruction is another entry, never a stale one.
Knows no model. Letters: N pooled states, H width.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kalm_rag.checks import check_count
from kalm_rag.states import to_bytes

CPU_CACHE_BYTES = 512 * 1024 * 1024
"""Bound of a model's cache on the CPU: 128 passages of 50 states under Nano and the default instructions in fp32,
twice as many in bf16. On a GPU the cache is off unless asked for."""


@dataclass(frozen=True, kw_only=True)
class PrefixCacheStats:
    """What a cache holds and how often it helped, since it was made."""

    entries: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int


class PrefixCache:
    """A bounded map from digests to tensors; the least recently used go first. Safe from many threads.

    Args:
        max_bytes: Most bytes held, >= 0; 0 keeps nothing.

    Raises:
        InputError: If `max_bytes` is no whole number >= 0.
    """

    def __init__(self, max_bytes: int) -> None:
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._held = self._hits = self._misses = 0
        self._max_bytes = check_bytes(max_bytes)

    @property
    def stats(self) -> PrefixCacheStats:
        """What it holds now."""
        with self._lock:
            return PrefixCacheStats(
                entries=len(self._entries),
                bytes=self._held,
                max_bytes=self._max_bytes,
                hits=self._hits,
                misses=self._misses,
            )

    @property
    def enabled(self) -> bool:
        """Whether anything can be kept."""
        return self._max_bytes > 0

    def resize(self, max_bytes: int) -> None:
        """Set another bound; what is over it goes.

        Raises:
            InputError: If it is no whole number >= 0.
        """
        with self._lock:
            self._max_bytes = check_bytes(max_bytes)
            self._shrink()

    def get(self, key: bytes) -> Tensor | None:
        """Give an entry and count it as used just now. It may be read, never written."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return found

    def put(self, key: bytes, value: Tensor) -> None:
        """Keep a tensor that shares its memory with no other; one larger than the bound is not kept."""
        with self._lock:
            if key in self._entries or value.nbytes > self._max_bytes:
                return
            self._entries[key] = value
            self._held += value.nbytes
            self._shrink()

    def _shrink(self) -> None:
        while self._held > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._held -= oldest.nbytes


def check_bytes(max_bytes: int) -> int:
    """Give a bound in bytes.

    Raises:
        InputError: If it is no whole number >= 0.
    """
    return check_count(max_bytes, "prefix_cache_bytes", 0, " (0 keeps nothing)")


def entry_keys(prefix: Sequence[int], states: Tensor, lengths: Sequence[int]) -> list[bytes]:
    """Digest what an entry depends on: the prompt's first tokens, and each passage's states without their padding.

    Args:
        prefix: Token ids whose keys and values are kept.
        states: Shape ``(B, N, H)``, right-padded, on any device (a GPU's are copied to the CPU for it).
        lengths: Real states per passage.
    """
    beginning = hashlib.sha256(to_bytes(torch.tensor(list(prefix), dtype=torch.long)))
    keys = []
    for row, length in zip(states.cpu(), lengths, strict=True):
        digest = beginning.copy()
        digest.update(row[:length].contiguous().view(torch.uint8).numpy().data)
        keys.append(digest.digest())
    return keys
