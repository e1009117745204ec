"""The recipe that makes pico's weights: read text once, learn to rank it at every ratio, calibrate, save.

`train` is what ``kalm-rag train`` calls. Owns which stages run on what; batches and steps are `trainer`'s.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalm_rag.errors import InputError
from kalm_rag.models.pico.backbone import PicoBackbone, WordCodes
from kalm_rag.models.pico.decoder import DecoderConfig, PicoDecoder
from kalm_rag.models.pico.encoder import MiniLMEncoder
from kalm_rag.training.data import Lists, TokenStates, load_source
from kalm_rag.training.dev import DevScore, calibrate_on, score_dev, settle_lexical
from kalm_rag.training.gates import fit_gates
from kalm_rag.training.hard_lists import mine, narrow_lists
from kalm_rag.training.stages import peak_memory
from kalm_rag.training.trainer import Stage, TrainConfig, Trainer

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainReport:
    """What a run did.

    Attributes:
        folder: Where the weights are.
        seed: What fixed the draws.
        seconds: Wall-clock: reading text, each stage, settling gates, and all of it.
        peak_bytes: Most memory that was resident.
        losses: Loss of every batch, by stage.
        dev: Scores on held-out queries, nDCG@10 of the retriever and of the result.
    """

    folder: Path
    seed: int
    seconds: dict[str, float]
    peak_bytes: int
    losses: dict[str, list[float]]
    dev: list[DevScore]

    @property
    def steps(self) -> int:
        """Batches learnt from (fewer than asked if the time ran out)."""
        return sum(len(losses) for losses in self.losses.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able."""
        return {**asdict(self), "folder": str(self.folder), "steps": self.steps}


def train(
    data: Path | Sequence[Path],
    out: Path,
    *,
    seed: int = 0,
    stage: str = "all",
    base: Path | None = None,
    minutes: float | None = None,
    config: TrainConfig | None = None,
    encoder: Path | str | None = None,
) -> TrainReport:
    """Make pico's weights, from scratch or from the weights of an earlier stage.

    Args:
        data: Folder with the BEIR folders named in ``config.sources``, or several such folders.
        out: Where ``pico.safetensors``, ``config.json`` and ``train.json`` go; with ``stage="all"`` the weights after
            each stage are kept below it.
        seed: Fixes every draw; ignored if `config` is given.
        stage: ``"general"``, ``"hard"``, ``"distil"``, or ``"all"`` of them.
        base: Weights to begin with; None begins untrained, which only the first stage can.
        minutes: Stop learning after this many minutes (the result then depends on the machine); None runs all steps.
        config: The whole recipe; None takes the shipped one.
        encoder: As `PicoBackbone.load` takes it.

    Returns:
        What was done, and scores on the held-out queries.

    Raises:
        InputError: If a folder, a split or the stage is missing, or a later stage has no `base`.
        ModelError: If `base` can't be read.
        MissingDependencyError: If bm25s or the encoder's package is not installed.
    """
    config = config if config is not None else TrainConfig(seed=seed)
    stages = _pick_stages(config, stage, base)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(config.seed)
        reader = MiniLMEncoder.load(encoder)
        lists, dev_lists = load_all([data] if isinstance(data, str | Path) else data, reader, config)
        seconds = {"read": time.perf_counter() - began}
        if base is None:
            backbone = new_backbone(reader, [one.passages for one in lists])
        else:
            backbone = PicoBackbone.load(weights=base, encoder=encoder)
    backbone.decoder.lexical_scale.zero_()  # the rest learns on its own; see `PicoDecoder`
    losses = _learn(backbone, lists, config, stages, out, seconds, minutes)
    started = time.perf_counter()
    fit_gates(backbone, lists, seed=config.seed, pairs=config.gate_pairs)
    seconds["gates"] = time.perf_counter() - started
    if dev_lists:
        settle_lexical(backbone, dev_lists)
        calibrate_on(backbone, dev_lists)
    dev = [score for one in dev_lists for score in score_dev(backbone, one)]
    backbone.save(out)
    seconds["total"] = time.perf_counter() - began
    report = TrainReport(
        folder=out,
        seed=config.seed,
        seconds=seconds,
        peak_bytes=peak_memory(torch.device("cpu")),
        losses=losses,
        dev=dev,
    )
    (out / "train.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    logger.info("trained %d steps in %.0f s; weights in %s", report.steps, seconds["total"], out)
    return report


def _pick_stages(config: TrainConfig, stage: str, base: Path | None) -> list[Stage]:
    stages = [one for one in config.stages if stage in ("all", one.name)]
    if not stages:
        raise InputError(f"stage is {stage!r}; wanted all, or one of {', '.join(one.name for one in config.stages)}.")
    if base is None and stages[0].name != "general":
        raise InputError(f"stage {stage!r} goes on from an earlier one's weights. Pass their folder as base.")
    return stages


def _learn(
    backbone: PicoBackbone,
    lists: Sequence[Lists],
    config: TrainConfig,
    stages: Sequence[Stage],
    out: Path,
    seconds: dict[str, float],
    minutes: float | None,
) -> dict[str, list[float]]:
    """Run stages; the last two end as one average of their weights. Gives the losses of each."""
    losses: dict[str, list[float]] = {}
    weights: list[dict[str, Tensor]] = []
    mined: list[Lists] = []
    margins: list[list[Tensor]] = []
    for stage in stages:
        began = time.perf_counter()
        if stage.name != "general":
            if not mined:
                draw = torch.Generator().manual_seed(config.seed)
                mined = narrow_lists(lists, queries=config.mined, candidates=config.mined_candidates, generator=draw)
                margins = [[] for _ in mined]
            mine(backbone, mined, margins)
        share = stage.steps / sum(one.steps for one in stages)
        trainer = Trainer(backbone, mined or lists, config, stage)
        losses[stage.name] = trainer.run(None if minutes is None else minutes * 60 * share)
        weights.append({name: value.clone() for name, value in backbone.decoder.state_dict().items()})
        seconds[stage.name] = time.perf_counter() - began
        if len(stages) > 1:
            backbone.save(out / stage.name)
    last = weights[-2:] if len(stages) > 2 else weights[-1:]
    backbone.decoder.load_state_dict({name: torch.stack([one[name] for one in last]).mean(0) for name in last[0]})
    return losses


def load_all(folders: Sequence[Path], reader: MiniLMEncoder, config: TrainConfig) -> tuple[list[Lists], list[Lists]]:
    """Read every source from the first folder that has it: lists to learn from, and held-out lists."""
    names = dict.fromkeys(source.name for source in config.sources)
    missing = [name for name in names if not any((Path(one) / name).is_dir() for one in folders)]
    if missing:  # said before minutes of reading
        raise InputError(
            f"{', '.join(missing)} is not a folder below {', '.join(map(str, folders))}; wanted all collections of the "
            f"recipe. Those named debian-* come from notebooks/collect_text.py: give its --out as another --data."
        )
    learnt, held = [], []
    for source in config.sources:
        home = next((one for one in folders if (Path(one) / source.name).is_dir()), folders[0])
        used, dev = load_source(Path(home), source, reader, seed=config.seed, fast=config.fast)
        learnt += [used] if used is not None else []
        held += [dev] if dev is not None else []
    if not learnt:
        raise InputError("no source gives a query to train on; wanted at least one with queries or spans.")
    return learnt, held


def new_backbone(reader: MiniLMEncoder, texts: Sequence[TokenStates]) -> PicoBackbone:
    """Make an untrained pico: word codes from the vocabulary, idf and mean state from the training passages."""
    settings = DecoderConfig()
    decoder = PicoDecoder(settings)
    seen, passages, mean = torch.zeros(settings.vocab), 0, torch.zeros(settings.hidden)
    for one in texts:
        owner = torch.repeat_interleave(torch.arange(len(one.starts) - 1), one.starts.diff())
        pairs = torch.unique(owner * settings.vocab + one.ids.long())
        seen += torch.bincount(pairs % settings.vocab, minlength=settings.vocab)
        passages += len(one.starts) - 1
        mean += one.states[:: max(1, len(one.states) // 20_000)].float().mean(0) / len(texts)
    decoder.idf.copy_(((passages + 1.0) / (seen + 1.0)).log() / math.log(passages + 1.0))
    with torch.no_grad():
        decoder.centre.copy_(mean)
    return PicoBackbone(reader, WordCodes.fit(reader.word_embeddings, settings.lexical), decoder)
