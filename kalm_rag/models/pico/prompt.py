"""What pico reads of a query and its instructions: which texts, how much of each, and which of them are heard.

Query, system text and task are separate texts here, each read once by the encoder and prepared once for the decoder.
A learned gate tells how far an instruction is about a topic; one that says nothing of any ("be brief") is left out.
Letters: Q prompt tokens, H width of a state (384).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kalm_rag.checks import check_text
from kalm_rag.instructions import DEFAULT_TASK, Instructions
from kalm_rag.models.backbone import index_tensor
from kalm_rag.models.pico.decoder import PicoDecoder, Prepared
from kalm_rag.models.pico.encoder import MiniLMEncoder
from kalm_rag.models.prefix_cache import PrefixCache

MAX_QUERY_TOKENS = 128
MAX_INSTRUCTION_TOKENS = 128
"""Where a query, a system text and a task are cut, each for itself, ``[CLS]`` and ``[SEP]`` included: a long
instruction never pushes the query out."""

CACHE_BYTES = 32 * 1024 * 1024
"""Most bytes of encoder states of queries and instructions that are kept for their next use, the latest: some 1,500 of
14 tokens. A search whose vector and decoder are asked apart (a vector store and a reranker of a framework's) then reads
its query once, however many searches run at a time."""

GATE_THRESHOLD = 0.4
"""Instructions whose gate is below this are taken for generic ("be brief") and leave every score as it is. Specific
ones are trained towards 0.8, generic ones towards 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PicoPrompt:
    """One query under its instructions, ready for any number of passages.

    Attributes:
        query: What the decoder computes from the query alone.
        extras: The same for the system text and the task, each if it is there and specific, and its gate (how far it
            is heard, 0 to 1, ``(1,)``).
        embedding: The query's retrieval vector, ``(H,)`` on the device; None if the decoder reads less of the query
            than its vector stands for.
    """

    query: Prepared
    extras: tuple[tuple[Prepared, Tensor], ...]
    embedding: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """How much is heard in all, ``(1,)``: 1 for the query, and the gates of its instructions."""
        return torch.stack([torch.ones_like(self.query.weights[:, 0]), *(gate for _, gate in self.extras)]).sum(0)


@dataclass(frozen=True)
class _Read:
    """One text as the encoder left it: states ``(1, Q, H)``, and its ids, int64 ``(1, Q)``, without padding."""

    hidden: Tensor
    ids: Tensor


class PromptReader:
    """Turns queries and instructions into prompts. Safe to call from several threads.

    Args:
        encoder: Reads the texts.
        table: Word codes of its vocabulary, ``(V, X)`` on its device.
        decoder: Prepares what was read, and holds the gate.
    """

    def __init__(self, encoder: MiniLMEncoder, table: Tensor, decoder: PicoDecoder) -> None:
        self._encoder, self._table, self._decoder = encoder, table, decoder
        self.cache = PrefixCache(CACHE_BYTES)

    def prompt(self, query: str, instructions: Instructions) -> PicoPrompt:
        """Read one query and its instructions.

        Raises:
            InputError: If a text is not a string that UTF-8 can hold.
        """
        ids, total_tokens = self._encoder.tokenize([check_text(query, "query")], MAX_QUERY_TOKENS)[0]
        read = self._encode_cached(ids)
        main = self._prepare(read, 0)
        gated = [self._gated(main, text) for _, text in _instruction_texts(instructions)]
        return PicoPrompt(
            query=main,
            extras=tuple((extra, gate) for extra, gate in gated if float(gate) >= GATE_THRESHOLD),
            embedding=_mean_vector(read.hidden) if total_tokens <= MAX_QUERY_TOKENS else None,
        )

    def embed(self, query: str) -> Tensor:
        """The query's retrieval vector, of as many tokens as a passage's stands for: float32 ``(H,)`` on the device."""
        return _mean_vector(self._encode_cached(self._encoder.tokenize([query])[0][0]).hidden)

    def preview(self, query: str, instructions: Instructions) -> str:
        """Show the exact texts that are read, one per line, after their cut.

        An instruction that is taken for generic, and so changes no score, is marked ``(generic: not heard)``.
        """
        lines = [self._shown("query", check_text(query, "query"), MAX_QUERY_TOKENS)]
        main = self._prepare(self._encode_cached(self._encoder.tokenize([query], MAX_QUERY_TOKENS)[0][0]), 0)
        for name, text in _instruction_texts(instructions):
            heard = float(self._gated(main, text)[1]) >= GATE_THRESHOLD
            lines.append(self._shown(name, text, MAX_INSTRUCTION_TOKENS) + ("" if heard else " (generic: not heard)"))
        return "\n".join(lines)

    def _shown(self, name: str, text: str, limit: int) -> str:
        offsets = self._encoder.tokenizer.encode(text, add_special_tokens=False).offsets
        read = offsets[: limit - 2]
        line = f"{name}: [CLS] {text[: read[-1][1]] if read else ''} [SEP]"
        return line if len(read) == len(offsets) else f"{line} (cut: {len(read)} of {len(offsets)} tokens)"

    @torch.inference_mode()
    def _gated(self, query: Prepared, text: str) -> tuple[Prepared, Tensor]:
        """An instruction, and how far it is heard beside a query, 0 to 1, ``(1,)``."""
        extra = self._prepare(self._encode_cached(self._encoder.tokenize([text], MAX_INSTRUCTION_TOKENS)[0][0]), 1)
        return extra, self._decoder.gates(query.vector, extra.vector)

    @torch.inference_mode()
    def _prepare(self, read: _Read, segment: int) -> Prepared:
        mask = torch.ones_like(read.ids, dtype=torch.bool)  # one text has no padding
        return self._decoder.prepare(read.hidden.float(), read.ids, self._table[read.ids], mask, segment)

    def _encode_cached(self, ids: Sequence[int]) -> _Read:
        """One text's states, from memory where it was read lately."""
        key = b"".join(number.to_bytes(4, "little") for number in ids)
        hidden = self.cache.get(key)
        if hidden is None:
            hidden, _, block = self._encoder.hidden([ids])
            self.cache.put(key, hidden)
            return _Read(hidden, block)
        return _Read(hidden, index_tensor(ids, self._encoder.device)[None])


def mean_vectors(states: Tensor, counts: Tensor) -> Tensor:
    """Retrieval vectors: mean of the states, weighted by the tokens behind each, unit length.

    Args:
        states: Pooled states ``(B, N, H)``.
        counts: Tokens behind each, ``(B, N)``; 0 is padding, whatever stands there.

    Returns:
        float32 ``(B, H)``.
    """
    hidden = torch.where(counts[..., None] > 0, states.float(), 0.0)  # (B, N, H)
    return functional.normalize((hidden * counts[..., None]).sum(1), dim=-1)


def _mean_vector(hidden: Tensor) -> Tensor:
    """Retrieval vector ``(H,)`` of the states of one text."""
    hidden = hidden.clone()  # a tensor made in inference mode may not go on outside of it
    return mean_vectors(hidden, torch.ones(hidden.shape[:2], device=hidden.device))[0]


def _instruction_texts(instructions: Instructions) -> list[tuple[str, str]]:
    """Name and text of what is read. The default task and KaLM's judge sentence say nothing to pico."""
    parts = []
    if instructions.app_system is not None:
        parts.append(("system", instructions.app_system))
    if instructions.task_text != DEFAULT_TASK:
        parts.append(("task", instructions.task_text))
    return parts
