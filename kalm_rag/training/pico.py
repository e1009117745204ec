"""The recipe that makes pico's weights: passages read once, a decoder that learns to rank them, gates, calibration.

`train` is what ``kalm-rag train`` calls without a base. The frozen encoder reads every passage once; batches are drawn
from what it left. Letters: L lists of a batch, C candidates of a list.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.results import Timings
from kalm_rag.models.pico.backbone import PicoBackbone
from kalm_rag.models.pico.config import DecoderConfig
from kalm_rag.models.pico.decoder import PicoDecoder, Prepared
from kalm_rag.models.pico.encoder import MiniLMEncoder
from kalm_rag.models.pico.prompt import MAX_INSTRUCTION_TOKENS, MAX_QUERY_TOKENS
from kalm_rag.models.pico.word_codes import WordCodes
from kalm_rag.states import batch_states
from kalm_rag.training.batches import Batch, Batches
from kalm_rag.training.checkpoint import check_out
from kalm_rag.training.gates import fit_gates
from kalm_rag.training.instruct import generic, split_query
from kalm_rag.training.lists import CandidateLists
from kalm_rag.training.loop import Solver, WeightAverage, take_steps
from kalm_rag.training.losses import calibrate, list_loss
from kalm_rag.training.report import TrainReport, measure, peak_memory, write_run
from kalm_rag.training.sources import SOURCES, Reading, Source, find_sources, load_sources

DEV_RATIOS = (4, 32)
"""Ratios that held-out queries are measured at; the first is calibrated on."""


@dataclass(frozen=True, kw_only=True)
class PicoConfig:
    """Everything that shapes a run. The same config and data give the same weights to within noise."""

    seed: int = 0  # fixes data draws, initial weights and batches
    steps: int = 1600  # batches learnt from
    learning_rate: float = 1e-3  # peak of the schedule
    teacher: float = 0.5  # share of the BM25 + retriever fusion in the loss, 0 to 1; the labels have the rest
    dense: float = 0.7  # weight of the retriever in that fusion, 0 to 1
    lists: int = 12  # L, lists of a batch (a quarter of it at ratio 1, half at ratio 2)
    candidates: int = 16  # C, candidates of a list
    # pooling ratios drawn from, one per batch, and how often
    ratios: tuple[tuple[int, float], ...] = ((1, 0.1), (2, 0.15), (4, 0.25), (8, 0.2), (16, 0.15), (32, 0.15))
    gate_pairs: int = 8000  # generic and specific instructions, of each so many, that the gate learns from at the end
    gate_steps: int = 600  # batches of 256 of them
    # compute in bfloat16 where the CPU has it
    fast: bool = field(default_factory=lambda: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    sources: tuple[Source, ...] = SOURCES  # what is trained on

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lists < 1 or self.candidates < 3:
            raise InputError(
                f"steps={self.steps}, lists={self.lists}, candidates={self.candidates}; wanted steps and lists >= 1, "
                f"candidates >= 3."
            )
        if not (0 <= self.teacher <= 1 and 0 <= self.dense <= 1):
            raise InputError(f"teacher={self.teacher}, dense={self.dense}; wanted shares from 0 to 1.")


def train(
    data: Path | Sequence[Path],
    out: Path,
    *,
    seed: int = 0,
    minutes: float | None = None,
    config: PicoConfig | None = None,
) -> TrainReport:
    """Make pico's weights from scratch.

    Args:
        data: Folder with the BEIR folders named in ``config.sources``, or several such folders.
        out: A new folder for ``pico.safetensors``, ``config.json`` and ``train.json``.
        seed: Fixes every draw; ignored if `config` is given.
        minutes: Stop learning after this many minutes (the result then depends on the machine); None runs all steps.
        config: The whole recipe; None takes the shipped one.

    Raises:
        InputError: If a folder or split is missing, or `out` holds something.
        MissingDependencyError: If bm25s or the encoder's package is not installed.
    """
    config = config if config is not None else PicoConfig(seed=seed)
    folders = [Path(data)] if isinstance(data, str | Path) else data
    find_sources(config.sources, folders)  # a missing one is told before anything is loaded
    out = check_out(out)
    timings = Timings()
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(config.seed)
        reader, settings = MiniLMEncoder.load(), DecoderConfig()
        codes = WordCodes.fit(reader.word_embeddings, settings.code_size)
        backbone = PicoBackbone(reader, codes, PicoDecoder(settings))
        with timings.stage("read"):
            engine = Reranker(backbone, ratio=1)
            how = Reading(seed=config.seed, dense_share=config.dense, fast=config.fast)
            learnt, held = load_sources(config.sources, folders, engine, how)
        fit_statistics(backbone.decoder, learnt)
        with timings.stage("learn"):
            losses = PicoLearner(backbone, learnt, config).run(None if minutes is None else minutes * 60)
    with timings.stage("gates"):
        fit_gates(backbone, learnt, seed=config.seed, pairs=config.gate_pairs, steps=config.gate_steps)
    with timings.stage("measure"):
        dev, margins = measure(engine, held, DEV_RATIOS)
        if held:
            calibrate_on(backbone, held, [by_ratio[DEV_RATIOS[0]] for by_ratio in margins])
    scale, shift = backbone.decoder.calibration.tolist()
    report = TrainReport(
        folder=out,
        base="",
        stage="general",
        steps=len(losses),
        losses=losses,
        dev=[replace(row, before=row.retrieval) for row in dev],
        calibration=(scale, shift),
        seconds=timings.seconds,
        peak_bytes=peak_memory(torch.device("cpu")),
        settings=asdict(config),
    )
    write_run(report, backbone.save)
    return report


class PicoLearner:
    """Changes the decoder in place; the learnt weights are an average over about the last 100 steps."""

    def __init__(self, backbone: PicoBackbone, lists: Sequence[CandidateLists], config: PicoConfig) -> None:
        self.backbone, self.config = backbone, config
        self.decoder = backbone.decoder.requires_grad_(True)
        self.random = random.Random(f"{config.seed}-general")
        self.batches = Batches(lists, self.random, candidates=config.candidates, randoms=3)
        weights = self.decoder.named_parameters()
        self.solver = Solver(weights, peak=config.learning_rate, decay=0.02, embeddings="segment", betas=(0.9, 0.98))
        self.average = WeightAverage(self.decoder)

    def run(self, seconds: float | None = None) -> list[float]:
        """Take all steps (or as many as fit), put the averaged weights in place, give the losses."""
        self.decoder.train()
        losses = take_steps(self._step, self.config.steps, warm_up=50, seconds=seconds)
        self.average.load()
        self.decoder.eval().requires_grad_(False)
        return losses

    def _step(self, warmth: float) -> float:
        loss = self.solver.step(self._backward, warmth)
        count = self.average.count
        self.average.update(1.0 - min(0.99, (1.0 + count) / (10.0 + count)))  # by 1% late, faster in the first steps
        return loss

    def _backward(self) -> float:
        with sdpa_kernel(SDPBackend.MATH):  # on a CPU, plain matmuls have the faster backward pass
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.fast):
                loss = self._loss()
            loss.backward()
        return float(loss.detach())

    def _loss(self) -> Tensor:
        config = self.config
        ratio = self.random.choices([r for r, _ in config.ratios], [w for _, w in config.ratios])[0]
        size = max(1, {1: config.lists // 4, 2: config.lists // 2}.get(ratio, config.lists))
        batch = self.batches.draw(size, alike=True)
        placed = self._states(batch, ratio)
        owner = torch.arange(size).repeat_interleave(len(batch.picks[0]))
        query, instruction, specific = self._prompts(batch)
        full, base = self.decoder(query.rows(owner), *placed)
        penalty: Tensor | float = 0.0
        if instruction is not None:
            gate = self.decoder.gates(query.vector, instruction.vector)
            heard = self.decoder(instruction.rows(owner), *placed)[0] * gate[owner]
            full = full + heard
            if not specific:  # a generic instruction must not move anything
                spread = heard.view(size, -1)
                penalty = (spread - spread.mean(1, keepdim=True)).pow(2).mean() + 0.1 * gate.mean()
        loss = list_loss(full.view(size, -1), batch.gold, batch.teacher, config.teacher) + penalty
        if instruction is not None:
            return loss
        return loss + 0.3 * list_loss(base.view(size, -1), batch.gold, batch.teacher, config.teacher)

    def _states(self, batch: Batch, ratio: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled states, counts and word codes of a batch's passages, as a store would hand them out."""
        rows = batch.lists.candidates[batch.rows].gather(1, torch.tensor(batch.picks)).flatten().tolist()
        states = batch_states([batch.lists.states[row] for row in rows] if batch.lists.states is not None else [])
        cpu = torch.device("cpu")
        token_ids = states.token_ids_on(cpu, ratio)
        if token_ids is None:
            raise InputError("states come without token ids; wanted those of pico's encoder.")
        return *states.on(cpu, torch.float32, ratio), functional.embedding(token_ids, self.backbone.codes.table)

    def _prompts(self, batch: Batch) -> tuple[Prepared, Prepared | None, bool]:
        """The queries, for some batches an instruction each, and whether it is specific."""
        chance = self.random.random()
        own = [batch.lists.instructions[row].task for row in batch.rows]
        texts = [batch.lists.queries[row] for row in batch.rows]
        told: list[str] = []
        if chance < 0.12:
            told = [generic(self.random) for _ in own]
        elif all(own) and chance < 0.6:
            told = [str(text) for text in own]
        elif chance < 0.24:
            parts = [split_query(text, self.random) or (text, text) for text in texts]
            texts, told = [query for query, _ in parts], [instruction for _, instruction in parts]
        return self._read(texts, 0), self._read(told, 1) if told else None, chance >= 0.12

    def _read(self, texts: Sequence[str], segment: int) -> Prepared:
        encoder = self.backbone.encoder
        limit = MAX_INSTRUCTION_TOKENS if segment else MAX_QUERY_TOKENS
        hidden, mask, ids = encoder.hidden([ids for ids, _ in encoder.tokenize(texts, limit)])
        ids = ids.clone()
        codes = self.backbone.codes.table[ids] * mask[..., None]
        return self.decoder.prepare(hidden.clone().float(), ids, codes, mask.clone(), segment)


@torch.no_grad()
def fit_statistics(decoder: PicoDecoder, lists: Sequence[CandidateLists]) -> None:
    """Take from the passages to learn from how rare each token is (idf), and the mean state."""
    seen, passages, means = torch.zeros(decoder.config.vocab), 0, []
    for source in lists:
        states = source.states if source.states is not None else []
        for passage in states:
            if passage.token_ids is not None:
                seen[passage.token_ids.long().unique()] += 1
        passages += len(states)
        means.append(torch.cat([passage.vectors.float() for passage in states[:: 1 + len(states) // 200]]).mean(0))
    decoder.idf.copy_(((passages + 1.0) / (seen + 1.0)).log() / math.log(passages + 1.0))
    decoder.centre.copy_(torch.stack(means).mean(0))


def calibrate_on(backbone: PicoBackbone, lists: Sequence[CandidateLists], margins: Sequence[Tensor]) -> None:
    """Fit the scale and shift that make ``sigmoid(margin)`` a probability, over all held-out pairs.

    In each set, relevant and irrelevant pairs weigh half each: of 50 candidates mostly one is relevant, and a P(yes)
    that counts on this is hardly ever above 0.5.
    """
    gold = [source.gold.flatten() for source in lists]
    weights = [torch.where(own > 0, 0.5 / own.sum().clamp(min=1), 0.5 / (1 - own).sum().clamp(min=1)) for own in gold]
    found = torch.cat([scores.flatten() for scores in margins])
    scale, shift = calibrate(found, torch.cat(gold), torch.cat(weights) * 1000)
    backbone.decoder.calibration.copy_(torch.tensor([scale, shift]))
