"""The decoder of pico: the query's token states meet a passage's stored states, and one margin comes out.

A cross-attention reranker in small. Each query token is compared with every stored state in three ways: by learned
probes (projections of its own state), by the exact words behind the state, and by what it attends to. The comparisons
are pooled over the passage, mixed over the query's tokens by two transformer layers, and read out as one number. What
depends on the query alone is done once (`PicoDecoder.prepare`); only `PicoDecoder.forward` runs per passage.
A module and its sizes: knows no tokenizer, no text, no file.

Letters: U distinct prompts, B passages, T passage tokens, Q prompt tokens, N pooled states, r tokens per state, H width
of a state (384), X width of a word code, K probes, M pair features, D width of the mixing layers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from kalm_rag.models.pico.config import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the decoder computes from prompts alone: U of them, padded to Q tokens.

    Attributes:
        probes: Unit vectors to compare with the states, ``(U, Q, K, H)``.
        codes: Word codes, ``(U, Q, X)``.
        hidden: Token states as the product branch sees them, ``(U, Q, H)``.
        base: Input of the mixing layers before anything of the passage is added, ``(U, Q, D)``.
        weights: Share of each token in the shallow score, ``(U, Q)``, 0 on padding, sum 1.
        mask: True on real tokens, ``(U, Q)``.
        vector: Retrieval vector, ``(U, H)``, unit length.
    """

    probes: Tensor
    codes: Tensor
    hidden: Tensor
    base: Tensor
    weights: Tensor
    mask: Tensor
    vector: Tensor

    def rows(self, index: Tensor) -> Prepared:
        """Repeat prompts, one per passage: `index` is int64 ``(B,)``, the result ``(B, ...)``."""
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
                tensors = [_pad_tokens(tensor, width) for tensor in tensors]
            joined[field.name] = torch.cat(tensors)
        return cls(**joined)


def _pad_tokens(tensor: Tensor, width: int) -> Tensor:
    """Pad dimension 1 with zeros up to `width`."""
    missing = width - tensor.shape[1]
    return functional.pad(tensor, [0, 0] * (tensor.ndim - 2) + [0, missing]) if missing else tensor


def _neighbours(words: Tensor) -> tuple[Tensor, Tensor]:
    """How well the token before, and after, matches the same state or the one before, or after; ``(B, Q, N)`` each."""
    before = torch.maximum(words, functional.pad(words[:, :, :-1], (1, 0)))  # (B, Q, N)
    after = torch.maximum(words, functional.pad(words[:, :, 1:], (0, 1)))  # (B, Q, N)
    return functional.pad(before[:, :-1], (0, 0, 1, 0)), functional.pad(after[:, 1:], (0, 0, 0, 1))


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
    """Scores passages from their pooled states: ``margin = cosine_scale * cos + shallow + deep``.

    - ``cos``: the retriever's cosine, rebuilt from the states.
    - ``shallow``: a weighted mean over prompt tokens of what the features of their best and summed comparisons say.
      Probes tell the meaning, the nearest word behind a state the word, its neighbours the phrase.
    - ``deep``: what each token attends to, fused with the token by product, mixed over tokens, read out once.

    Before training `shallow` and `deep` are 0, so the order is the retriever's.

    Attributes:
        idf: Rarity of each word of the vocabulary in the training passages, ``(V,)``; a feature of prompt tokens.
        calibration: Scale and shift that make ``sigmoid(margin)`` a probability, ``(2,)``.
    """

    idf: Tensor
    calibration: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        """Make an untrained decoder."""
        super().__init__()
        self.config = c = config
        self.register_buffer("idf", torch.zeros(c.vocab))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))
        self.centre = nn.Parameter(torch.zeros(c.hidden))
        self.probes = nn.Linear(c.hidden, c.probes * c.hidden, bias=False)
        self.sharpness = nn.Parameter(torch.full((c.probes,), 8.0))
        self.word_sharpness = nn.Parameter(torch.linspace(0.0, 4.0, c.probes))
        self.pair = nn.Linear(c.probes + 5, c.pairs)
        features = 2 * c.pairs + 1
        self.enter = nn.Linear(c.hidden + 4, c.width)
        self.fuse = nn.Linear(3 * c.probes * c.hidden, c.width)
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
        self.probes.weight.copy_(torch.cat([eye] * self.config.probes) + 0.01 * torch.randn_like(self.probes.weight))
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
        """Compute what depends on the prompts alone.

        Args:
            hidden: Encoder states of the prompts, float32 ``(U, Q, H)``.
            ids: Their token ids, int64 ``(U, Q)``.
            codes: Their word codes, ``(U, Q, X)``.
            mask: True on real tokens, ``(U, Q)``.
            segment: 0 for a query, 1 for an instruction; one for all, or ``(U,)``.
        """
        c = self.config
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (U, H)
        word = (codes.abs().sum(-1) > 0).float()  # (U, Q); [CLS], [SEP] carry no word
        token = torch.stack([self.idf[ids] * word, (ids.float() + 1).log() / 10.0, word, 1 - word], -1)  # (U, Q, 4)
        centred = functional.normalize(hidden - self.centre, dim=-1)  # (U, Q, H)
        known = torch.cat([centred * c.hidden**0.5, token], -1)  # (U, Q, H + 4)
        share = functional.softplus(self.share(known).squeeze(-1)) * mask  # (U, Q)
        probes = self.probes(centred).view(*ids.shape, c.probes, c.hidden)  # (U, Q, K, H)
        kind = self.segment(torch.as_tensor(segment, device=ids.device)).expand(len(ids), -1)  # (U, D)
        return Prepared(
            probes=functional.normalize(probes, dim=-1),
            codes=codes,
            hidden=centred * c.hidden**0.5,
            base=self.enter(known) + kind[:, None],
            weights=share / share.sum(1, keepdim=True),
            mask=mask,
            vector=functional.normalize(mean, dim=-1),
        )

    def gates(self, query: Tensor, instruction: Tensor) -> Tensor:
        """How far each instruction is heard beside a query, 0 to 1 ``(U,)``, from both retrieval vectors ``(U, H)``."""
        return torch.sigmoid(self.gate(torch.cat([query, instruction, query * instruction * 20.0], -1)).squeeze(-1))

    def forward(self, prompt: Prepared, states: Tensor, counts: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Score passages, each under its own prompt.

        Args:
            prompt: One prompt per passage, ``(B, ...)``.
            states: Pooled states, float32 ``(B, N, H)``.
            counts: Tokens behind each state, ``(B, N)``; 0 is padding, which never changes a score.
            codes: Word codes of those tokens, ``(B, N, r, X)``; zero on padding and where a token is no word.

        Returns:
            Uncalibrated margins ``(B,)``, and the same without the deep part; higher is more relevant.
        """
        real = counts > 0  # (B, N)
        states = torch.where(real[..., None], states, 0.0)  # (B, N, H)
        vector = functional.normalize((states * counts[..., None]).sum(1), dim=-1)  # (B, H)
        cosine = (vector * prompt.vector).sum(-1)  # (B,)
        keys, similarities = self._compare(prompt, states, counts)  # (B, N, H), (B, Q, K, N)
        words = self._word_match(prompt, codes)  # (B, Q, N)
        features = self._pair_features(similarities, words, counts)  # (B, Q, 2M + 1)
        shallow = (self.shallow(features).squeeze(-1) * prompt.weights).sum(1)  # (B,)
        deep = self._deep(prompt, keys, similarities, words, real, features)  # (B,)
        base = self.cosine_scale * cosine + shallow.float()  # (B,)
        return base + deep, base

    def attention(self, prompt: Prepared, states: Tensor, counts: Tensor, codes: Tensor) -> Tensor:
        """Where prompts look: attention, mean over probes, weighted over tokens; ``(B, N)``, rows sum to 1.

        Args are those of `forward`.
        """
        states = torch.where((counts > 0)[..., None], states, 0.0)  # (B, N, H)
        _, similarities = self._compare(prompt, states, counts)
        attention = self._attend(similarities, self._word_match(prompt, codes), counts > 0).mean(2)  # (B, Q, N)
        return (attention * prompt.weights[..., None]).sum(1)

    def _compare(self, prompt: Prepared, states: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``(B, N, H)``, and the cosine of each probe of each prompt token with them, ``(B, Q, K, N)``."""
        keys = functional.normalize(states - self.centre, dim=-1) * (counts > 0)[..., None]  # (B, N, H)
        return keys, torch.einsum("bqkh,bnh->bqkn", prompt.probes, keys)

    def _word_match(self, prompt: Prepared, codes: Tensor) -> Tensor:
        """How far the nearest token behind each state is the prompt token's word, ``(B, Q, N)``: 1 for the same one."""
        by_token = torch.einsum("bqx,btx->bqt", prompt.codes, codes.flatten(1, 2)).float()  # (B, Q, T)
        return by_token.view(*by_token.shape[:2], *codes.shape[1:3]).amax(-1)

    def _attend(self, similarities: Tensor, words: Tensor, real: Tensor) -> Tensor:
        """Softmax over the states for each token and probe, ``(B, Q, K, N)``."""
        logits = similarities * self.sharpness[:, None] + words[:, :, None] * self.word_sharpness[:, None]
        return logits.masked_fill(~real[:, None, None], torch.finfo(logits.dtype).min).softmax(-1)

    def _pair_features(self, similarities: Tensor, words: Tensor, counts: Tensor) -> Tensor:
        """Pool features of every (token, state) pair over the states, ``(B, Q, 2M + 1)``.

        A pair is what the probes and the word say, whether the tokens before and after are here too (a phrase, or the
        pieces of one word), how many tokens the state stands for, and how near the passage's start it is.
        """
        size = (counts.clamp(min=1).log2() / 5.0)[:, None].expand_as(words)  # (B, Q, N)
        lead = (1.0 / (1.0 + (counts.cumsum(1) - counts) / 16.0))[:, None].expand_as(words)  # (B, Q, N)
        more = torch.stack([words, *_neighbours(words), size, lead], 2)  # (B, Q, 5, N)
        pairs = torch.cat([similarities, more], 2).transpose(2, 3)  # (B, Q, N, K + 5)
        pairs = torch.relu(self.pair(pairs)) * (counts > 0)[:, None, :, None]  # (B, Q, N, M) >= 0: padding never wins
        length = counts.sum(1).log()[:, None, None].expand(-1, words.shape[1], 1) / 6.0  # (B, Q, 1)
        return torch.cat([pairs.amax(2), torch.log1p(pairs.sum(2)), length], -1)

    def _deep(
        self, prompt: Prepared, keys: Tensor, similarities: Tensor, words: Tensor, real: Tensor, features: Tensor
    ) -> Tensor:
        """Attend, fuse by product, mix tokens, and read out one number per passage, ``(B,)``."""
        attention = self._attend(similarities, words, real)  # (B, Q, K, N)
        attended = torch.einsum("bqkn,bnh->bqkh", attention, keys) * self.config.hidden**0.5  # (B, Q, K, H)
        own = prompt.hidden[:, :, None]  # (B, Q, 1, H)
        fused = self.fuse(torch.cat([attended, own * attended, (own - attended).abs()], -1).flatten(2))  # (B, Q, D)
        x = prompt.base + fused + self.features(features)  # (B, Q, D)
        for mixer in self.mixers:
            x = mixer(x, prompt.mask)
        x = self.norm(x)
        value, weight = self.token_out(x).unbind(-1)  # (B, Q) each
        weight = functional.softplus(weight) * prompt.mask
        weight = weight / weight.sum(1, keepdim=True)
        mean = (x * weight[..., None]).sum(1)  # (B, D)
        deep: Tensor = (value * weight).sum(1) + self.head(mean).squeeze(-1)
        return deep
