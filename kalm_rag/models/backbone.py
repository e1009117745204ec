"""What a reranking model must offer the engine: passages to token states, and a decoder over pooled states.

The engine (`kalm_rag.engine.reranker`) owns batching, pooling, threads and stores; a backbone owns tokens and weights.
Two families implement this: `kalm_rag.models.t5gemma2.backbone` (KaLM checkpoints) and `kalm_rag.models.pico.backbone`.
Letters: B passages, T tokens, N pooled states, H width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kalm_rag.checks import check_count
from kalm_rag.errors import InputError
from kalm_rag.instructions import Instructions
from kalm_rag.models.prefix_cache import PrefixCache
from kalm_rag.states import Codec, Layout

LEAST_PASSAGE_TOKENS = 16
"""The shortest limit that can be asked for: the template's tokens and a few words."""


@dataclass(frozen=True, kw_only=True)
class TokenizedPassage:
    """Encoder input of one passage, already cut at the model's limit.

    Attributes:
        ids: Token ids the encoder reads, at least one.
        total_tokens: Tokens the whole passage has; more than ``len(ids)`` when it was cut.
    """

    ids: Sequence[int]
    total_tokens: int


@dataclass(frozen=True, kw_only=True)
class BackboneInfo:
    """What a model is, for people and for the fingerprint of its states.

    Attributes:
        family: ``"t5gemma2"`` or ``"pico"``.
        name: Checkpoint as asked for: a name, repository id or folder.
        revision: Commit, release or ``"local"``.
        weights: Digest of the files that change a state (hex), or repository and commit.
        template: Passage template of the encoder input.
        hidden_size: H, width of a state in elements.
        max_passage_tokens: Where passages are cut, template included.
        dtype: Computing dtype, e.g. ``"float32"``.
        state_dtype: Dtype that states are made and exactly stored in.
        keeps_token_ids: Whether the decoder also compares the passages' tokens as they are, so that their ids are
            kept with the states. They change no state, so they are not in the fingerprint.
    """

    family: str
    name: str
    revision: str
    weights: str
    template: str
    hidden_size: int
    max_passage_tokens: int
    dtype: str
    state_dtype: str
    keeps_token_ids: bool = False

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that changes a state; the name of its namespace in a store.

        The name is left out on purpose: the same weights under another path give the same states.
        """
        parts = {
            "family": self.family,
            "revision": self.revision,
            "weights": self.weights,
            "template": self.template,
            "hidden_size": self.hidden_size,
            "max_passage_tokens": self.max_passage_tokens,
            "dtype": self.dtype,
            "state_dtype": self.state_dtype,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def layout(self, ratio: int, codec: str | Codec = Codec.EXACT) -> Layout:
        """What a store needs to know to hold the model's states, pooled `ratio` tokens to 1."""
        return Layout(
            fingerprint=self.fingerprint,
            hidden_size=self.hidden_size,
            ratio=ratio,
            codec=Codec.parse(codec),
            state_dtype=self.state_dtype,
            keeps_token_ids=self.keeps_token_ids,
        )


def check_passage_limit(limit: int | None, default: int, most: int) -> int:
    """Where passages are cut: what was asked for, or the model's default.

    Args:
        limit: Tokens, the template's included; None takes `default`.
        default: The model's.
        most: What the model can read.

    Raises:
        InputError: If it is no whole number from 16 to `most`.
    """
    if limit is None:
        return default
    if not LEAST_PASSAGE_TOKENS <= check_count(limit, "max_passage_tokens") <= most:
        raise InputError(f"max_passage_tokens is {limit}; wanted {LEAST_PASSAGE_TOKENS} to {most} for this model.")
    return int(limit)


def index_tensor(values: Sequence[int], device: torch.device) -> Tensor:
    """Indices as int64 on a device; to a GPU by way of pinned memory, so that nothing waits for what it is doing."""
    made = torch.tensor(values, dtype=torch.long)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


class Backbone(Protocol):
    """A loaded model. All methods are safe to call from several threads at once."""

    info: BackboneInfo
    device: torch.device
    state_dtype: torch.dtype

    @property
    def decode_budget(self) -> int:
        """Most padded `decode_width` of one `decode`, over all its rows, that this device does best with."""
        ...

    def decode_width(self, prompt: Any, states: int) -> int:  # noqa: ANN401 - as `prompt`
        """What one row of `decode` costs, in elements that rows are padded to: states, prompt tokens or both."""
        ...

    def tokenize(self, passages: Sequence[str]) -> list[TokenizedPassage]:
        """Turn passages into encoder input, cut at the limit. Special tokens inside the text are inert."""
        ...

    def encode(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Read passages once, without any query.

        Returns:
            Token states ``(B, T, H)`` in the computing dtype, and a bool mask ``(B, T)``, both on the device.
        """
        ...

    def prompt(self, query: str, instructions: Instructions) -> Any:  # noqa: ANN401 - each family has its own
        """Prepare one query under its instructions; the result is opaque and may be used for many passages."""
        ...

    def decode(self, prompts: Sequence[Any], states: Tensor, counts: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Score each passage under its own prompt.

        Args:
            prompts: B prompts, one per row; the same object may stand in many rows (and is then computed once
                where the family allows it).
            states: Pooled states, shape ``(B, N, H)``, right-padded, float32 or the computing dtype, on the device.
            counts: Tokens behind each state, float32 ``(B, N)``; 0 marks padding, which must not change a score.
            token_ids: Ids of the tokens behind each state, int64 ``(B, N, r)``, 0 where there is none; for models that
                keep them (`BackboneInfo.keeps_token_ids`), else None.

        Returns:
            Margins, float32 ``(B,)`` on the device: logit(yes) - logit(no), higher is more relevant.
        """
        ...

    def attend(self, prompt: Any, states: Tensor, counts: Tensor, token_ids: Tensor | None = None) -> Tensor:  # noqa: ANN401
        """Tell where the decoder looks under one prompt.

        Returns:
            Shares of attention per state, float32 ``(B, N)``; rows sum to 1, padding has 0.
        """
        ...

    def offsets(self, passage: str) -> list[tuple[int, int]]:
        """Character spans ``[start, end)`` behind the tokens of `tokenize`, one per id; empty for template tokens."""
        ...

    def preview(self, query: str, instructions: Instructions) -> str:
        """Show the exact text that the decoder reads."""
        ...


class EmbeddingBackbone(Backbone, Protocol):
    """A backbone whose encoder also gives the retrieval vector (pico)."""

    embedding_size: int
    embedded_tokens: int  # first tokens of a passage that its vector stands for

    def cut_at(self, tokens: int) -> EmbeddingBackbone:
        """The same model, sharing its weights, that cuts passages elsewhere: for who wants no more than the vector."""
        ...

    def embed_states(self, states: Tensor, counts: Tensor) -> Tensor:
        """Rebuild passage vectors from pooled states: unit length, float32 ``(B, embedding_size)``."""
        ...

    def embed_query(self, query: str) -> Tensor:
        """Give the query's retrieval vector: unit length, float32 ``(embedding_size,)`` on the CPU."""
        ...

    def embed_prompt(self, prompt: Any) -> Tensor | None:  # noqa: ANN401 - as `prompt`
        """Give the vector that `embed_query` gives, of a query that `prompt` has read; None if it read only a part."""
        ...


@runtime_checkable
class CachingBackbone(Protocol):
    """A backbone that keeps decoder work per passage, and whose decoder runs in several ways (KaLM checkpoints)."""

    prefix_cache: PrefixCache
    decoder_weights: str | None
    compiled: bool
