"""Steps of pico's training: what a stage and a run are set to, and the trainer that draws batches and learns from them.

Knows lists of candidates and the model, no folders; which stages run on what is `recipe`'s.
Letters: L lists of a batch, C candidates of a list.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from kalm_rag.errors import InputError
from kalm_rag.models.pico.backbone import MAX_INSTRUCTION_TOKENS, MAX_QUERY_TOKENS, PicoBackbone
from kalm_rag.models.pico.decoder import Prepared
from kalm_rag.training.data import SOURCES, Lists, Source
from kalm_rag.training.instruct import generic, split_query
from kalm_rag.training.losses import distillation_loss, listwise_loss

STAGES = ("general", "hard", "distil")
"""The stages of a run, in order (as the paper has them: arXiv 2606.22807)."""

_Tensors: TypeAlias = "tuple[Tensor, ...] | list[Tensor]"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run: what its batches teach.

    Attributes:
        name: ``"general"``: candidates by the retriever's ranks. ``"hard"``: by the model's own ranks, without those
            that look like unlabelled positives. ``"distil"``: as hard, and soft labels that models of the earlier
            stages gave when they read unpooled states.
        steps: Batches learnt from.
        learning_rate: Peak of the schedule (warm-up, then cosine to 0).
        teacher: Share of the BM25 + retriever fusion in the loss, 0 to 1.
        dense: Weight of the retriever in that fusion, 0 to 1.
        soft: Share of the soft labels; what is left is the labels' share.
    """

    name: str
    steps: int
    learning_rate: float
    teacher: float
    dense: float = 0.5
    soft: float = 0.0

    def __post_init__(self) -> None:
        shared = 0 <= self.teacher <= self.teacher + self.soft <= 1 and 0 <= self.dense <= 1
        if self.name not in STAGES or self.steps < 1 or not shared:
            raise InputError(
                f"stage {self.name!r} has steps={self.steps}, teacher={self.teacher}, dense={self.dense}, "
                f"soft={self.soft}; wanted one of {', '.join(STAGES)}, steps >= 1, dense from 0 to 1, and teacher and "
                f"soft from 0 that are 1 together at most."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that shapes a run. The same config and data give the same weights to within noise.

    Attributes:
        seed: Fixes data draws, initial weights and batches.
        stages: What is learnt, in order.
        lists: L, lists of a batch (a quarter of it at ratio 1, half at ratio 2).
        candidates: C, candidates of a list.
        mined: Queries that the model scores the candidates of, before each stage but the first.
        mined_candidates: Candidates of each of those.
        ratios: Pooling ratios drawn from, one a batch, and how often.
        gate_pairs: Generic and specific instructions, of each so many, that the gate learns from at the end.
        fast: Compute in bfloat16 where the CPU has it.
        sources: What is trained on.
    """

    seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage(name="general", steps=1600, learning_rate=1e-3, teacher=0.5, dense=0.7),
        Stage(name="hard", steps=250, learning_rate=3e-4, teacher=0.5),
        Stage(name="distil", steps=350, learning_rate=3e-4, teacher=0.3, soft=0.4),
    )
    lists: int = 12
    candidates: int = 16
    mined: int = 6000
    mined_candidates: int = 36
    ratios: tuple[tuple[int, float], ...] = ((1, 0.1), (2, 0.15), (4, 0.25), (8, 0.2), (16, 0.15), (32, 0.15))
    gate_pairs: int = 8000
    fast: bool = field(default_factory=lambda: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    sources: tuple[Source, ...] = SOURCES

    def __post_init__(self) -> None:
        if self.lists < 1 or self.candidates < 3 or self.mined < 1 or self.mined_candidates < 3:
            raise InputError(
                f"lists={self.lists}, candidates={self.candidates}, mined={self.mined}, "
                f"mined_candidates={self.mined_candidates}; wanted lists and mined >= 1, both candidates >= 3."
            )


class Trainer:
    """Draws batches and takes steps. The learnt weights are an average over the last steps."""

    def __init__(self, backbone: PicoBackbone, lists: Sequence[Lists], config: TrainConfig, stage: Stage) -> None:
        """Take the model and what it learns from.

        Args:
            backbone: The model; its decoder is changed in place.
            lists: What to draw batches from.
            config: The recipe.
            stage: Which part of it.
        """
        self.backbone, self.config, self.stage, self.lists = backbone, config, stage, list(lists)
        self.decoder = backbone.decoder.requires_grad_(True)
        self.random = random.Random(f"{config.seed}-{stage.name}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        self.teachers = [one.teacher(stage.dense) for one in self.lists]
        self.shares = [len(one.texts) ** 0.5 for one in self.lists]
        plain = [p for n, p in self.decoder.named_parameters() if p.ndim >= 2 and "segment" not in n]
        other = [p for n, p in self.decoder.named_parameters() if p.ndim < 2 or "segment" in n]
        groups = [{"params": plain, "weight_decay": 0.02}, {"params": other, "weight_decay": 0.0}]
        self.solver = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98))
        self.average = torch.optim.swa_utils.AveragedModel(self.decoder, multi_avg_fn=_running_average)

    def run(self, seconds: float | None = None) -> list[float]:
        """Take all steps (or as many as fit), put the averaged weights in place, give the losses."""
        began, losses = time.perf_counter(), []
        self.decoder.train()
        with tqdm(total=self.stage.steps, desc=self.stage.name, unit="step", mininterval=2.0) as bar:
            for step in range(self.stage.steps):
                share = step / self.stage.steps
                if seconds is not None:
                    share = max(share, (time.perf_counter() - began) / max(seconds, 1e-9))
                if share >= 1:
                    break
                losses.append(self.step(min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share))))
                bar.update()
                bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
        self.decoder.load_state_dict(self.average.module.state_dict())
        self.decoder.eval().requires_grad_(False)
        return losses

    def step(self, warmth: float) -> float:
        """Learn from one batch at `warmth` times the peak rate; give its loss."""
        for group in self.solver.param_groups:
            group["lr"] = self.stage.learning_rate * warmth
        self.solver.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):  # on a CPU, plain matmuls have the faster backward pass
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.fast):
                loss = self._loss()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.solver.step()
        self.average.update_parameters(self.decoder)
        return float(loss.detach())

    def _loss(self) -> Tensor:
        ratio = self.random.choices([r for r, _ in self.config.ratios], [w for _, w in self.config.ratios])[0]
        which = self.random.choices(range(len(self.lists)), self.shares)[0]
        source = self.lists[which]
        size = max(1, {1: self.config.lists // 4, 2: self.config.lists // 2}.get(ratio, self.config.lists))
        rows = self._rows(source, size)
        picks = torch.stack([self._draw(source, int(row)) for row in rows])  # (L, C)
        wanted = source.candidates[rows].gather(1, picks).flatten()
        placed = source.passages.pooled(wanted, ratio, self.backbone.codes.table)
        owner = torch.arange(size).repeat_interleave(picks.shape[1])
        query, extra = self._prompts(source, rows)
        full, base = self.decoder(query.rows(owner), *placed)
        penalty: Tensor | float = 0.0
        if extra is not None:
            gate = self.decoder.gates(query.vector, extra[0].vector)
            heard = self.decoder(extra[0].rows(owner), *placed)[0] * gate[owner]
            full = full + heard
            if not extra[1]:  # a generic instruction must not move anything
                spread = heard.view(size, -1)
                penalty = (spread - spread.mean(1, keepdim=True)).pow(2).mean() + 0.1 * gate.mean()
        gold = source.gold[rows].gather(1, picks)
        teacher = self.teachers[which][rows].gather(1, picks)
        soft = None if source.soft is None else source.soft[rows].gather(1, picks)
        loss = self._mixed(full.view(size, -1), gold, teacher, soft) + penalty
        return loss + 0.3 * self._mixed(base.view(size, -1), gold, teacher, soft) if extra is None else loss

    def _mixed(self, margins: Tensor, gold: Tensor, teacher: Tensor, soft: Tensor | None) -> Tensor:
        shares = self.stage.teacher, 0.0 if soft is None else self.stage.soft
        loss = (1 - sum(shares)) * listwise_loss(margins, gold) + shares[0] * distillation_loss(margins, teacher)
        return loss if soft is None else loss + shares[1] * distillation_loss(margins, soft, sharpness=1.0)

    def _rows(self, source: Lists, size: int) -> Tensor:
        """Queries of a batch, of like length so that little of it is padding; each is as likely as the other."""
        drawn = torch.randint(len(source.texts), (4 * size,), generator=self.generator)
        drawn = drawn[source.queries.starts.diff()[drawn].argsort(stable=True)]
        start = self.random.randrange(4) * size
        return drawn[start : start + size]

    def _draw(self, source: Lists, row: int) -> Tensor:
        """Columns of one list: up to two gold ones, a few random passages, the rest spread over the ranks."""
        total, size = source.candidates.shape[1], min(self.config.candidates, source.candidates.shape[1])
        gold = source.gold[row].nonzero().squeeze(1).tolist()
        chosen = self.random.sample(gold, min(2, len(gold)))
        chosen += [c for c in self.random.sample(range(source.depth, total), min(3, size - 2)) if c not in chosen]
        chances = 1.0 / torch.arange(1, source.depth + 1) if source.chances is None else source.chances[row].clone()
        chances[[c for c in chosen if c < source.depth]] = 0.0
        free = min(size - len(chosen), int((chances > 0).sum()))
        chosen += torch.multinomial(chances, free, generator=self.generator).tolist() if free else []
        rest = [c for c in range(total) if c not in set(chosen)]
        return torch.tensor((chosen + rest)[:size])

    def _prompts(self, source: Lists, rows: Tensor) -> tuple[Prepared, tuple[Prepared, bool] | None]:
        """The queries, and for some batches an instruction each (with whether it is specific)."""
        chance = self.random.random()
        own = [source.instructions[int(row)] for row in rows]
        texts = [source.texts[int(row)] for row in rows]
        if chance < 0.12:
            return self._cached(source, rows), (self._read([generic(self.random) for _ in own], 1), False)
        if all(own) and chance < 0.6:
            return self._cached(source, rows), (self._read([str(text) for text in own], 1), True)
        if chance < 0.24:
            parts = [split_query(text, self.random) or (text, text) for text in texts]
            return self._read([q for q, _ in parts], 0), (self._read([i for _, i in parts], 1), True)
        return self._cached(source, rows), None

    def _cached(self, source: Lists, rows: Tensor) -> Prepared:
        hidden, ids, counts = source.queries.gather(rows)
        return self.decoder.prepare(hidden, ids, self.backbone.codes.table[ids], counts > 0, 0)

    def _read(self, texts: Sequence[str], segment: int) -> Prepared:
        encoder = self.backbone.encoder
        limit = MAX_INSTRUCTION_TOKENS if segment else MAX_QUERY_TOKENS
        hidden, mask, ids = encoder.hidden([one for one, _ in encoder.tokenize(texts, limit)])
        ids = ids.clone()
        codes = self.backbone.codes.table[ids] * mask[..., None]
        return self.decoder.prepare(hidden.clone().float(), ids, codes, mask.clone(), segment)


def _running_average(average: _Tensors, current: _Tensors, count: Tensor | int) -> None:
    """Move the average towards the current weights: by 1% late, faster in the first steps."""
    keep = min(0.99, (1.0 + int(count)) / (10.0 + int(count)))
    for mean, now in zip(average, current, strict=True):
        mean.lerp_(now.to(mean.dtype), 1.0 - keep)
