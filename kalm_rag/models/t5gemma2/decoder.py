"""T5Gemma 2's decoder as reranking needs it: the last prompt position over pooled states, and nothing else.

The same tensors as transformers' `T5Gemma2Decoder`, and the same results; inference only. What it leaves out: repeated
key heads, the first layer's projections of one prompt for every passage, and in the last layer everything but the
scoring position. Keys and values of a prompt's beginning can be computed once and handed in (`DecoderInput.past`).

Letters: B passages, U distinct prompts, Q prompt tokens, P prompt tokens in the prefix, N pooled states, S = P + N keys
of the prefix, H width, L layers, K key heads, G query heads per key head, D width of a head, R rows of queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kalm_rag.models.t5gemma2.projection import Projection, by_onednn, project_plainly

_LAYER = {
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    "pre_self_attn_layernorm": set(),
    "post_self_attn_layernorm": set(),
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn", "dropout"},
    "pre_feedforward_layernorm": set(),
    "post_feedforward_layernorm": set(),
    "dropout": set(),
}
"""What a decoder layer is made of, as far as this module knows it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixKV:
    """Keys and values of a prompt's first P tokens and of the states behind them: where a decoder pass goes on from.

    Attributes:
        entries: One per passage, ``(L, 2, P + n, K * D)``: what `LeanDecoder.compute_prefix_kv` gives, cut to the
            passage's own n states.
        width: P + N, longest of them.
    """

    entries: Sequence[Tensor]
    width: int

    def layer(self, index: int, keys: Tensor, values: Tensor) -> Tensor:
        """Keys and values of a layer ``(2, B, P + N + Q, K * D)``: those of the prefix, zero on padding, then new ones.

        Put together when asked for: all layers at once take memory that is never in the processor's cache.
        """
        rows = [entry[index] for entry in self.entries]  # (2, P + n, K * D) each
        joined = keys.new_empty(2, len(rows), self.width + keys.shape[1], keys.shape[2])  # (2, B, P + N + Q, K * D)
        older = joined[:, :, : self.width]
        if all(row.shape[1] == self.width for row in rows):
            torch.stack(rows, 1, out=older)
        else:
            older.zero_()
            for place, row in enumerate(rows):
                older[:, place, : row.shape[1]] = row
        joined[0, :, self.width :], joined[1, :, self.width :] = keys, values
        return joined


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderInput:
    """One batch for the decoder.

    Attributes:
        ids: Distinct prompts, right-padded, int64 ``(U, Q)``; behind a prefix, only the rest of each prompt.
        rows: Which prompt each passage goes with, int64 ``(B,)``.
        last: Index of each passage's last prompt token, int64 ``(B,)``.
        states: Pooled states in the computing dtype, ``(B, N, H)``. Not read where `past` is given.
        real: Which states are no padding, bool ``(B, N)``.
        past: Keys and values of the first P prompt tokens and of the states, if they were computed before.
    """

    ids: Tensor
    rows: Tensor
    last: Tensor
    states: Tensor
    real: Tensor
    past: PrefixKV | None = None

    @property
    def start(self) -> int:
        """P, position of the first token of `ids`."""
        return 0 if self.past is None else self.past.width - int(self.real.shape[1])


class _Layer:
    """One decoder layer: its norms are transformers' own modules, its projections may be replaced."""

    def __init__(self, layer: Any, project: Any) -> None:  # noqa: ANN401 - transformers' classes are untyped
        attention, mlp = layer.self_attn, layer.mlp
        self.module = layer
        self.kind: str = layer.attention_type
        self.qkv: Projection = project(attention.q_proj, attention.k_proj, attention.v_proj)
        self.kv: Projection = project(attention.k_proj, attention.v_proj)
        self.out: Projection = project(attention.o_proj)
        self.gate_up: Projection = project(mlp.gate_proj, mlp.up_proj)
        self.down: Projection = project(mlp.down_proj)
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling

    def keys(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        """Normed keys ``(B, T, K * D)`` of their projection, turned where they have a position."""
        heads = _norm(x.unflatten(-1, (-1, self.head_dim)), self.module.self_attn.k_norm)
        return (heads if rope is None else _turn(heads, rope)).flatten(-2)

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Normed and turned queries ``(B, Q, K * G, D)`` of their projection."""
        return _turn(_norm(x.unflatten(-1, (-1, self.head_dim)), self.module.self_attn.q_norm), rope)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention, ``(B, Q, K * G * D)``; the query heads of one key head stand below each other as rows."""
        b, q, _, d = queries.shape
        keys, values = (x.unflatten(-1, (-1, d)).transpose(1, 2) for x in (keys, values))  # (B, K, T, D)
        k = keys.shape[1]
        folded = queries.unflatten(2, (k, -1)).transpose(1, 2).reshape(b, k, -1, d)  # (B, K, Q * G, D)
        mask = mask.flatten(1, 2)[:, None]  # (B, 1, Q * G, T)
        attended = _attention(folded, keys, values, mask, self.scaling)
        return attended.view(b, k, q, -1, d).transpose(1, 2).reshape(b, q, -1)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection, feed-forward and both residuals: ``(B, Q, H)``."""
        module = self.module
        x = _add_norm(x, self.out(attended)[0], module.post_self_attn_layernorm)
        grown = self.gate_up.gated(_norm(x, module.pre_feedforward_layernorm), module.mlp.act_fn)
        return _add_norm(x, self.down(grown)[0], module.post_feedforward_layernorm)


class LeanDecoder:
    """Computes what transformers' decoder gives at the last prompt position; see the module.

    Args:
        decoder: A `T5Gemma2Decoder` in evaluation mode that `unknown_parts` finds nothing in; its tensors are used,
            never copied, unless `project` copies.
        project: Makes a `Projection` of linear layers that read the same input.
    """

    def __init__(self, decoder: Any, project: Any = project_plainly) -> None:  # noqa: ANN401
        self._decoder = decoder
        self._layers = [_Layer(layer, project) for layer in decoder.layers[: decoder.config.num_hidden_layers]]

    def __call__(self, batch: DecoderInput) -> Tensor:
        """Hidden states of the last prompt positions, after the final norm: ``(B, H)``."""
        x, masks, ropes = self._start(batch)
        for index, layer in enumerate(self._layers):
            x, queries, keys, values = self._project(index, x, batch, ropes[layer.kind])
            mask = masks[layer.kind]
            if index == len(self._layers) - 1:  # nothing but the scoring position is read of what it gives
                x, queries, mask = (_at(t, batch.last) for t in (x, queries, mask))
            x = layer.finish(x, layer.attend(queries, *self._keys_values(index, batch, keys, values), mask))
        return _norm(x[:, 0], self._decoder.norm)

    def compute_prefix_kv(self, batch: DecoderInput) -> Tensor:
        """Compute keys and values of prompts without padding and of the states behind them, for `DecoderInput.past`.

        Returns:
            ``(L, 2, B, Q + N, K * D)``; `PrefixKV` takes it row by row.
        """
        x, masks, ropes = self._start(batch)
        made = []
        for index, layer in enumerate(self._layers):
            x, queries, keys, values = self._project(index, x, batch, ropes[layer.kind])
            both = self._keys_values(index, batch, keys, values)
            made.append(torch.stack(both).roll(len(batch.ids[0]), 2))  # the prompt's own come first here
            if index < len(self._layers) - 1:
                x = layer.finish(x, layer.attend(queries, *both, masks[layer.kind]))
        return torch.stack(made)  # (L, 2, B, Q + N, K * D)

    def _start(self, batch: DecoderInput) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """Embedded prompts ``(U, Q, H)``, and each kind of layer's mask and rotary table."""
        embedded = self._decoder.embed_tokens(batch.ids)  # (U, Q, H)
        positions = torch.arange(batch.start, batch.start + embedded.shape[1], device=embedded.device)
        kinds = {layer.kind for layer in self._layers}
        ropes = {kind: self._decoder.rotary_emb(embedded, positions[None], kind) for kind in kinds}
        return embedded, {kind: self._mask(batch, positions, kind) for kind in kinds}, ropes

    def _project(
        self, index: int, x: Tensor, batch: DecoderInput, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The residual, queries ``(B, Q, K * G, D)``, keys and values ``(B, Q, K * D)`` of a layer."""
        layer = self._layers[index]
        queries, keys, values = layer.qkv(_norm(x, layer.module.pre_self_attn_layernorm))
        queries, keys = layer.queries(queries, rope), layer.keys(keys, rope)
        if index == 0:  # up to here there are no passages in it: distinct prompts, projected once each
            x, queries, keys, values = (t[batch.rows] for t in (x, queries, keys, values))
        return x, queries, keys, values

    def _keys_values(self, index: int, batch: DecoderInput, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the states or of the prefix, the prompt's own behind them: ``(B, S + Q, K * D)`` each."""
        if batch.past is not None:
            both = batch.past.layer(index, keys, values)
            return both[0], both[1]
        layer = self._layers[index]
        state_keys, state_values = layer.kv(batch.states)
        return torch.cat([layer.keys(state_keys, None), keys], 1), torch.cat([state_values, values], 1)

    def _mask(self, batch: DecoderInput, positions: Tensor, kind: str) -> Tensor:
        """Additive attention mask of a kind of layer, a row per query head: ``(B, Q, G, S + Q)``.

        Prompt padding needs no mask: it stands behind the last real token, where no real token looks.
        """
        config = self._decoder.config
        ends = batch.start, batch.start + len(positions)
        own = []
        for others in (torch.arange(ends[0], device=positions.device), positions):
            allowed = others[None, :] <= positions[:, None]
            if kind == "sliding_attention":
                allowed = allowed & (others[None, :] > positions[:, None] - config.sliding_window)
            own.append(allowed.expand(len(batch.real), -1, -1))
        states = batch.real[:, None, :].expand(-1, len(positions), -1)
        allowed = torch.cat([own[0], states, own[1]], 2)  # (B, Q, S + Q)
        dtype = self._decoder.dtype
        mask = torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
        heads = config.num_attention_heads // config.num_key_value_heads
        return mask[:, :, None].expand(-1, -1, heads, -1).contiguous()  # laid out here, not in every layer


def unknown_parts(decoder: Any) -> str | None:  # noqa: ANN401
    """Tell what about a decoder this module doesn't know, or None: what is unknown is left to transformers."""
    config = decoder.config
    if config.attn_logit_softcapping is not None:
        return "attn_logit_softcapping"
    if unknown := set(config.layer_types) - {"full_attention", "sliding_attention"}:
        return f"layer types {sorted(unknown)}"
    for layer in decoder.layers:
        if dict(layer.named_children()).keys() != _LAYER.keys():
            return f"layers of {sorted(dict(layer.named_children()))}"
        for name, wanted in _LAYER.items():
            if wanted and dict(layer.get_submodule(name).named_children()).keys() != wanted:
                return f"{name} of {sorted(dict(layer.get_submodule(name).named_children()))}"
    return None


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention ``(B, K, R, D)`` of R rows of queries; in bf16 on a CPU by plain products, 9% of a query faster.

    Scores are rounded to bf16 and the softmax is in fp32 there, as in transformers' eager attention.
    """
    if queries.dtype is not torch.bfloat16 or not by_onednn(queries):
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    b, k, r, d = queries.shape
    mask = mask.expand(b, k, r, -1).flatten(0, 1)
    scores = torch.baddbmm(mask, queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=scale)
    shares = scores.softmax(-1, dtype=torch.float32).to(queries.dtype)
    return torch.bmm(shares, values.flatten(0, 1)).view(b, k, r, d)


def _at(x: Tensor, last: Tensor) -> Tensor:
    """Rows of ``(B, Q, ...)`` at one index each: ``(B, 1, ...)``."""
    return x[torch.arange(len(last), device=last.device), last][:, None]


def _norm(x: Tensor, norm: Any) -> Tensor:  # noqa: ANN401
    """``x / sqrt(mean(x^2) + eps) * (1 + weight)`` in fp32, rounded once, as transformers does."""
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(norm.eps).rsqrt_()
    wide = wide * scale if x.dtype is torch.float32 else wide.mul_(scale)  # fresh memory costs more than the product
    normed: Tensor = wide.mul_(1.0 + norm.weight.float()).to(x.dtype)
    return normed


def _add_norm(x: Tensor, y: Tensor, norm: Any) -> Tensor:  # noqa: ANN401
    """``x + norm(y)``."""
    return x + _norm(y, norm)


def _turn(heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions over ``(B, T, heads, D)``: ``x * cos + (-x2, x1) * sin``."""
    cos, sin = (table[:, :, None] for table in rope)
    half = heads.shape[-1] // 2
    out = heads * cos
    out[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return out
