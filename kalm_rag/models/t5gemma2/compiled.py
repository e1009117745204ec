"""The decoder through ``torch.compile``, over few shapes: rows, prompt tokens and states are padded to multiples.

Graphs with symbolic sizes serve all of them, so a new length never means minutes of compiling; the multiples keep the
matrices at sizes that tensor cores like. Padding changes no score: what is added is masked, and dropped again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kalm_rag.models.t5gemma2.decoder import DecoderInput, LeanDecoder

ROWS = 8
"""Passages of a pass are a multiple of this."""
TOKENS = 16
"""So are prompt tokens, and states, of this."""


class CompiledDecoder:
    """Stands in for a `LeanDecoder`; compiles at the first pass, which takes a minute or more.

    Passes that go on from a prefix (`PrefixKV`) run uncompiled: they are short, and padding would copy all of it.
    """

    def __init__(self, lean: LeanDecoder) -> None:
        self._lean = lean
        self._run = torch.compile(lean.__call__, dynamic=True)
        self.compute_prefix_kv = lean.compute_prefix_kv

    def __call__(self, batch: DecoderInput) -> Tensor:
        """See `LeanDecoder`."""
        if batch.past is not None:
            return self._lean(batch)
        hidden: Tensor = self._run(round_up(batch))  # (B, H), B rounded up
        return hidden[: len(batch.rows)]


def round_up(batch: DecoderInput) -> DecoderInput:
    """Pad a batch without `past`: prompt tokens and states at their ends, rows by the first prompt without states."""
    rows = -len(batch.rows) % ROWS
    tokens, states = -batch.ids.shape[1] % TOKENS, -batch.states.shape[1] % TOKENS
    return DecoderInput(
        ids=functional.pad(batch.ids, (0, tokens)),
        rows=functional.pad(batch.rows, (0, rows)),
        last=functional.pad(batch.last, (0, rows)),
        states=functional.pad(batch.states, (0, 0, 0, states, 0, rows)),
        real=functional.pad(batch.real, (0, states, 0, rows)),
    )
