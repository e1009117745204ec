"""The decoder of pico: from prompt tokens to stored passage states, to one margin a passage.

A module and its config; knows no tokenizer, no text and no file. All prompt-only work is in `prepare`, done once a
query; `forward` is what runs per passage.
Letters: U distinct prompts, B passages, T passage tokens, Q prompt tokens, N pooled states, r tokens a state, H 384,
X width of a word code, K views, M pair features, D width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kalm_rag.errors import ModelError

TYPICAL_TOKENS = 100
"""Length of a passage whose words count neither more nor less than in BM25 without its length normalisation."""

K1, B = 0.9, 0.4
"""BM25's saturation and length normalisation (the values of Anserini and of this project's baselines)."""

ONE_WORD = 0.99
"""Codes nearer than this (cosine) are those of the same word."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of the decoder.

    Attributes:
        hidden: H, width of a state: the encoder's last layer.
        lexical: X, width of a word code.
        vocab: Size of the encoder's vocabulary.
        views: K, learned views of a prompt token that look at the states, each of width H.
        pairs: M, features of one (prompt token, state) pair.
        width: D, width of the mixing layers.
        layers: Mixing layers.
        heads: Attention heads of a mixing layer.
    """

    hidden: int = 384
    lexical: int = 128
    vocab: int = 30522
    views: int = 2
    pairs: int = 16
    width: int = 256
    layers: int = 2
    heads: int = 4

    def to_dict(self) -> dict[str, int]:
        """Plain values, for the config file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderConfig:
        """Read what `to_dict` wrote.

        Raises:
            ModelError: If a key is unknown.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ModelError(f"decoder config has unknown keys {', '.join(unknown)}; wanted a config of this release.")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Prompt-only work of U prompts, padded to Q tokens.

    Attributes:
        views: Unit vectors that look at the states, ``(U, Q, K, H)``.
        codes: Word codes, ``(U, Q, X)``.
        hidden: Token states as the product branch sees them, ``(U, Q, H)``.
        base: Where the mixing layers start, ``(U, Q, D)``.
        weights: Share of each token in the shallow score, ``(U, Q)``, 0 on padding, sum 1.
        rarity: Share of each distinct word in the lexical score by its idf, ``(U, Q)``; 0 where it stood before, and
            in instructions.
        mask: True on real tokens, ``(U, Q)``.
        vector: Retrieval vector, ``(U, H)``, unit length.
    """

    views: Tensor
    codes: Tensor
    hidden: Tensor
    base: Tensor
    weights: Tensor
    rarity: Tensor
    mask: Tensor
    vector: Tensor

    def rows(self, index: Tensor) -> Prepared:
        """Give one prompt a passage, ``(B, ...)``."""
        return Prepared(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @classmethod
    def stack(cls, parts: list[Prepared]) -> Prepared:
        """Join prompts of several lengths, padded with zeros that the mask leaves out."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.mask.shape[1] for part in parts)
        joined = {}
        for field in fields(cls):
            tensors = [getattr(part, field.name) for part in parts]
            if field.name != "vector":
                tensors = [_pad_tokens(one, width) for one in tensors]
            joined[field.name] = torch.cat(tensors)
        return cls(**joined)


def _pad_tokens(tensor: Tensor, width: int) -> Tensor:
    """Pad dimension 1 with zeros up to `width`."""
    missing = width - tensor.shape[1]
    return functional.pad(tensor, [0, 0] * (tensor.ndim - 2) + [0, missing]) if missing else tensor


def _neighbours(words: Tensor) -> tuple[Tensor, Tensor]:
    """How well the token before, and after, matches the same state or the one before, or after; ``(B, Q, N)`` each."""
    before = torch.maximum(words, functional.pad(words[:, :, :-1], (1, 0)))
    after = torch.maximum(words, functional.pad(words[:, :, 1:], (0, 1)))
    return functional.pad(before[:, :-1], (0, 0, 1, 0)), functional.pad(after[:, 1:], (0, 0, 0, 1))


def _nearest(same: Tensor, codes: Tensor) -> Tensor:
    """The most that any token behind a state is each prompt token's word: ``(B, Q, T)`` to ``(B, Q, N)``."""
    return same.view(*same.shape[:2], *codes.shape[1:3]).amax(-1)


def _lexical(same: Tensor, rarity: Tensor, counts: Tensor) -> Tensor:
    """BM25 of a passage as a share of its upper bound, ``(B,)``: ``sum_w rarity_w tf_w / (tf_w + K1 (1 - B + B len))``.

    Args:
        same: How far prompt tokens and passage tokens are one word, ``(B, Q, T)``.
        rarity: Shares of the words by idf, ``(B, Q)``, sum 1.
        counts: Tokens behind each state, ``(B, N)``; ``len`` is their sum in `TYPICAL_TOKENS`.
    """
    times = (same > ONE_WORD).float().sum(2)  # (B, Q)
    length = counts.sum(1, keepdim=True) / TYPICAL_TOKENS
    return (rarity * times / (times + K1 * (1 - B + B * length))).sum(1)


class Mixer(nn.Module):
    """One pre-norm transformer layer over prompt tokens."""

    def __init__(self, width: int, heads: int) -> None:
        """Make a layer of `width` with `heads` heads."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Mix ``(B, Q, D)`` along Q; masked tokens are not attended to."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, Q, D / heads) each
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        grown: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return grown


class PicoDecoder(nn.Module):
    """Scores passages from their pooled states: similarity features, product fusion, mixing, and the cosine.

    ``margin = cosine_scale * cos + shallow + deep + lexical_scale * lexical``. `shallow` is a weighted mean over prompt
    tokens of features of their similarities to all states (views tell the meaning, the nearest word behind a state the
    word, neighbours the phrase). `deep` adds what the token attends to, fused by product, and mixes tokens. Before
    training both are 0, so the order is the retriever's. `lexical` is BM25 of the query by the model's own idf, as a
    share of the most it could be. Its scale is fitted last, on held-out queries: learnt along with the rest, it leaves
    the rest less to learn, and what was learnt without it gains more from it.
    """

    idf: Tensor
    calibration: Tensor
    lexical_scale: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        """Make an untrained decoder."""
        super().__init__()
        self.config = c = config
        self.register_buffer("idf", torch.zeros(c.vocab))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))
        self.register_buffer("lexical_scale", torch.tensor(0.0))
        self.centre = nn.Parameter(torch.zeros(c.hidden))
        self.look = nn.Linear(c.hidden, c.views * c.hidden, bias=False)
        self.sharpness = nn.Parameter(torch.full((c.views,), 8.0))
        self.word_sharpness = nn.Parameter(torch.linspace(0.0, 4.0, c.views))
        self.pair = nn.Linear(c.views + 5, c.pairs)
        features = 2 * c.pairs + 1
        self.enter = nn.Linear(c.hidden + 4, c.width)
        self.fuse = nn.Linear(3 * c.views * c.hidden, c.width)
        self.features = nn.Linear(features, c.width)
        self.mixers = nn.ModuleList(Mixer(c.width, c.heads) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)
        self.share = nn.Linear(c.hidden + 4, 1)
        self.shallow = nn.Sequential(nn.Linear(features, c.pairs), nn.GELU(), nn.Linear(c.pairs, 1))
        self.token_out = nn.Linear(c.width, 2)
        self.head = nn.Sequential(nn.Linear(c.width, c.width // 2), nn.GELU(), nn.Linear(c.width // 2, 1))
        self.cosine_scale = nn.Parameter(torch.tensor(12.0))
        self.segment = nn.Embedding(2, c.width)
        self.gate = nn.Sequential(nn.Linear(3 * c.hidden, 64), nn.GELU(), nn.Linear(64, 1))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        eye = torch.eye(self.config.hidden)
        self.look.weight.copy_(torch.cat([eye] * self.config.views) + 0.01 * torch.randn_like(self.look.weight))
        self.segment.weight.mul_(0.02)
        for last in (self.shallow[2], self.token_out, self.head[2], self.share):
            assert isinstance(last, nn.Linear)
            last.weight.zero_()
            last.bias.zero_()
        self.share.weight[0, self.config.hidden] = 3.0  # tokens weigh by their idf to begin with
        gate = self.gate[2]
        assert isinstance(gate, nn.Linear)
        gate.bias.fill_(-1.0)

    def prepare(self, hidden: Tensor, ids: Tensor, codes: Tensor, mask: Tensor, segment: int | Tensor) -> Prepared:
        """Do the prompt-only work.

        Args:
            hidden: Encoder states of the prompts, float32 ``(U, Q, H)``.
            ids: Their token ids, ``(U, Q)``.
            codes: Their word codes, ``(U, Q, X)``.
            mask: True on real tokens, ``(U, Q)``.
            segment: 0 for a query, 1 for an instruction; one for all, or ``(U,)``.
        """
        c = self.config
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        word = (codes.abs().sum(-1) > 0).float()  # [CLS], [SEP] carry no word
        token = torch.stack([self.idf[ids] * word, (ids.float() + 1).log() / 10.0, word, 1 - word], -1)  # (U, Q, 4)
        centred = functional.normalize(hidden - self.centre, dim=-1)
        known = torch.cat([centred * c.hidden**0.5, token], -1)  # (U, Q, H + 4)
        share = functional.softplus(self.share(known).squeeze(-1)) * mask
        before = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)  # (U, Q): a word counts once
        asks = (torch.as_tensor(segment, device=ids.device) == 0).view(-1, 1)  # instructions are heard without it
        rarity = self.idf[ids] * word * mask * ~before * asks
        views = self.look(centred).view(*ids.shape, c.views, c.hidden)
        kind = self.segment(torch.as_tensor(segment, device=ids.device)).expand(len(ids), -1)
        return Prepared(
            views=functional.normalize(views, dim=-1),
            codes=codes,
            hidden=centred * c.hidden**0.5,
            base=self.enter(known) + kind[:, None],
            weights=share / share.sum(1, keepdim=True),
            rarity=rarity / rarity.sum(1, keepdim=True).clamp(min=0.1),
            mask=mask,
            vector=functional.normalize(mean, dim=-1),
        )

    def gates(self, query: Tensor, instruction: Tensor) -> Tensor:
        """How far an instruction is heard, 0 to 1, from both retrieval vectors ``(U, H)``."""
        return torch.sigmoid(self.gate(torch.cat([query, instruction, query * instruction * 20.0], -1)).squeeze(-1))

    def forward(self, prompt: Prepared, states: Tensor, counts: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Score passages, each under its own prompt.

        Args:
            prompt: One prompt a passage, ``(B, ...)``.
            states: Pooled states, float32 ``(B, N, H)``.
            counts: Tokens behind each, ``(B, N)``; 0 is padding.
            codes: Word codes of those tokens, ``(B, N, r, X)``; zero on padding and where a token is no word.

        Returns:
            Raw margins ``(B,)``, and the same without the deep part.
        """
        real = counts > 0
        states = torch.where(real[..., None], states, 0.0)
        vector = functional.normalize((states * counts[..., None]).sum(1), dim=-1)  # (B, H)
        cosine = (vector * prompt.vector).sum(-1)
        keys, seen = self._similarities(prompt, states, counts)
        same = self._same(prompt, codes)  # (B, Q, T)
        words = _nearest(same, codes)  # (B, Q, N)
        features = self._pair_features(seen, words, counts)  # (B, Q, 2M + 1)
        shallow = (self.shallow(features).squeeze(-1) * prompt.weights).sum(1)
        deep = self._deep(prompt, keys, seen, words, real, features)
        base = self.cosine_scale * cosine + shallow.float() + self.lexical_scale * _lexical(same, prompt.rarity, counts)
        return base + deep, base

    def attention(self, prompt: Prepared, states: Tensor, counts: Tensor, codes: Tensor) -> Tensor:
        """Where prompts look: attention meaned over views, and over tokens by their weight; ``(B, N)``, sums to 1."""
        states = torch.where((counts > 0)[..., None], states, 0.0)
        _, seen = self._similarities(prompt, states, counts)
        words = _nearest(self._same(prompt, codes), codes)
        looks = self._attend(seen, words, counts > 0).mean(2)  # (B, Q, N)
        return (looks * prompt.weights[..., None]).sum(1)

    def _similarities(self, prompt: Prepared, states: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``(B, N, H)``, and how near each view of each prompt token is to them, ``(B, Q, K, N)``."""
        keys = functional.normalize(states - self.centre, dim=-1) * (counts > 0)[..., None]  # (B, N, H)
        return keys, torch.einsum("bqkh,bnh->bqkn", prompt.views, keys)

    def _same(self, prompt: Prepared, codes: Tensor) -> Tensor:
        """How far each prompt token and each token of a passage are one word, ``(B, Q, T)``: 1 for the same one."""
        return torch.einsum("bqx,btx->bqt", prompt.codes, codes.flatten(1, 2)).float()

    def _attend(self, seen: Tensor, words: Tensor, real: Tensor) -> Tensor:
        """Softmax over the states for each token and view, ``(B, Q, K, N)``."""
        logits = seen * self.sharpness[:, None] + words[:, :, None] * self.word_sharpness[:, None]
        return logits.masked_fill(~real[:, None, None], torch.finfo(logits.dtype).min).softmax(-1)

    def _pair_features(self, seen: Tensor, words: Tensor, counts: Tensor) -> Tensor:
        """Pool features of every (token, state) pair over the states, ``(B, Q, 2M + 1)``.

        A pair is what the views and the word say, whether the tokens before and after are here too (a phrase, or the
        pieces of one word), how many tokens the state stands for, and how near the passage's start it is.
        """
        size = (counts.clamp(min=1).log2() / 5.0)[:, None].expand_as(words)
        lead = (1.0 / (1.0 + (counts.cumsum(1) - counts) / 16.0))[:, None].expand_as(words)
        more = torch.stack([words, *_neighbours(words), size, lead], 2)
        pairs = torch.cat([seen, more], 2).transpose(2, 3)  # (B, Q, N, K + 5)
        pairs = torch.relu(self.pair(pairs)) * (counts > 0)[:, None, :, None]  # relu >= 0: 0 is the floor of both
        length = counts.sum(1).log()[:, None, None].expand(-1, words.shape[1], 1) / 6.0
        return torch.cat([pairs.amax(2), torch.log1p(pairs.sum(2)), length], -1)

    def _deep(
        self, prompt: Prepared, keys: Tensor, seen: Tensor, words: Tensor, real: Tensor, features: Tensor
    ) -> Tensor:
        """Attend, fuse by product, mix tokens, and read out one number a passage."""
        attention = self._attend(seen, words, real)
        found = torch.einsum("bqkn,bnh->bqkh", attention, keys) * self.config.hidden**0.5  # (B, Q, K, H)
        own = prompt.hidden[:, :, None]
        fused = self.fuse(torch.cat([found, own * found, (own - found).abs()], -1).flatten(2))  # (B, Q, D)
        x = prompt.base + fused + self.features(features)
        for mixer in self.mixers:
            x = mixer(x, prompt.mask)
        x = self.norm(x)
        value, weight = self.token_out(x).unbind(-1)
        weight = functional.softplus(weight) * prompt.mask
        weight = weight / weight.sum(1, keepdim=True)
        mean = (x * weight[..., None]).sum(1)
        deep: Tensor = (value * weight).sum(1) + self.head(mean).squeeze(-1)
        return deep
