"""Adapting a T5Gemma 2 checkpoint (KaLM-Reranker-V1) to a user's own text, in the paper's stages.

``general``: labels, candidates spread over the retrieval ranks. ``hard``: labels, negatives mined by the model itself
and denoised. ``distil``: soft labels, and the labels beside them. Every batch draws a pooling ratio; every stage ends
in an average of checkpoints and gives a whole checkpoint, which the next stage starts from. Source: arXiv 2606.22807.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, KalmRagError
from kalm_rag.evaluation.fusion import fuse
from kalm_rag.index.results import Timings
from kalm_rag.models.devices import parse_device, parse_dtype
from kalm_rag.models.registry import PICO, find_checkpoint
from kalm_rag.models.t5gemma2.backbone import T5Gemma2Backbone
from kalm_rag.models.t5gemma2.checkpoint import read_config
from kalm_rag.training.batches import Mined
from kalm_rag.training.checkpoint import check_out, save_checkpoint, stored_dtypes
from kalm_rag.training.config import FUSION, OWN, AdaptConfig, Stage
from kalm_rag.training.learner import Learner
from kalm_rag.training.lists import CandidateLists, bundled_retriever, load_lists
from kalm_rag.training.losses import calibrate
from kalm_rag.training.mining import margins_of, mine
from kalm_rag.training.report import DevRow, TrainReport, measure, peak_memory, write_run

logger = logging.getLogger(__name__)


def adapt(
    base: str | Path,
    data: Path,
    out: Path,
    *,
    config: AdaptConfig | None = None,
    minutes: float | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> list[TrainReport]:
    """Train a T5Gemma 2 checkpoint on labelled queries; gives one report per stage.

    Args:
        base: Folder of a checkpoint (an earlier stage's `out` too), a repository id, or a name (``nano``).
        data: One BEIR folder, or a folder of them.
        out: A new folder for the checkpoint. Under stage ``"all"`` the first two stages' checkpoints lie beside it, as
            ``out.general`` and ``out.hard``.
        config: The recipe; None takes the defaults.
        minutes: Stop each stage's learning after this many minutes; None takes all steps.
        device: As `Reranker.from_pretrained` takes it.
        dtype: ``"bf16"`` or ``"fp32"`` to compute in; None is bf16 on CUDA, fp32 elsewhere. Weights and optimiser are
            float32 either way.

    Raises:
        InputError: If the data has no labelled queries, `out` holds something, or an argument is out of range.
        ModelError: If the base can't be found or is no T5Gemma 2.
        MissingDependencyError: If bm25s is not installed.
        KalmRagError: If the loss is not finite or memory runs out; nothing is written then.
    """
    config = config if config is not None else AdaptConfig()
    where = parse_device(device)
    bf16 = parse_dtype(dtype, where) is torch.bfloat16
    stages = [Stage.GENERAL, Stage.HARD, Stage.DISTIL] if config.stage is Stage.ALL else [Stage(config.stage)]
    out = Path(out).absolute()
    outs = [check_out(out if stage is stages[-1] else out.with_name(f"{out.name}.{stage.value}")) for stage in stages]
    if base == PICO or (Path(base) / "pico.safetensors").is_file():
        raise InputError(f"base is {str(base)!r}, which is no T5Gemma 2. Leave base out to train pico, from scratch.")
    folder = find_checkpoint(str(base))[0]
    read_config(folder)  # a bad base fails before the data is read
    timings = Timings()
    with timings.stage("read"), bundled_retriever(where) or nullcontext() as dense:
        learnt, held = load_lists(data, config, dense)
    reports = []
    for stage, target in zip(stages, outs, strict=True):
        run = _Run(folder, replace(config, stage=stage), where, bf16)
        with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
            torch.manual_seed(config.seed)
            reports.append(run.train(learnt, held, target, None if minutes is None else minutes * 60, timings))
        folder, timings = target, Timings()
        del run
        gc.collect()  # the next stage's model finds the room of this one's
    return reports


class _Run:
    """One stage over one loaded model."""

    def __init__(self, base: Path, config: AdaptConfig, device: torch.device, bf16: bool) -> None:
        self.base, self.config, self.device, self.bf16 = base, config, device, bf16
        self.backbone = T5Gemma2Backbone.load(
            base, name=str(base), revision="local", device=device, dtype=torch.float32, weights="in training"
        )
        self.backbone.prefix_cache.resize(0)  # what it would keep is of the weights before the next step
        self.engine = Reranker(self.backbone, ratio=1)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def train(
        self,
        learnt: Sequence[CandidateLists],
        held: Sequence[CandidateLists],
        out: Path,
        limit: float | None,
        timings: Timings,
    ) -> TrainReport:
        """Measure, prepare, learn, measure again, save."""
        config, curve = self.config, dict[int, float]()

        def check(step: int) -> None:
            rows, _ = self._measure(held, [config.usual_ratio], step)
            curve[step] = sum(row.after for row in rows) / len(rows)
            logger.info("step %d: mean dev nDCG@10 %.4f", step, curve[step])

        with timings.stage("measure"):
            before, _ = self._measure(held, config.ratios)
        for row in before:
            logger.info("before: %s r=%d nDCG@10 %.4f (retrieval %.4f)", row.name, row.ratio, row.after, row.retrieval)
        with timings.stage("prepare"):
            mined = self._mine(learnt) if config.stage is Stage.HARD else None
            learnt = self._teach(learnt) if config.stage is Stage.DISTIL else learnt
        with timings.stage("learn"):
            losses = Learner(self.backbone, learnt, mined, config, bf16=self.bf16).run(limit, check)
            self._round()
        with timings.stage("measure"):
            after, margins = self._measure(held, config.ratios, len(losses))
        usual = torch.cat([by_ratio[config.usual_ratio].flatten() for by_ratio in margins])
        every = [found for lists in mined or [] for found in lists]
        report = TrainReport(
            folder=out,
            base=str(self.base),
            stage=Stage(config.stage).value,
            steps=len(losses),
            losses=losses,
            dev=[replace(new, before=old.after) for old, new in zip(before, after, strict=True)],
            curve=curve,
            calibration=calibrate(usual, torch.cat([dev.gold.flatten() for dev in held])),
            mined={name: sum(len(getattr(found, name)) for found in every) for name in ("hard", "dropped")},
            seconds=timings.seconds,
            peak_bytes=peak_memory(self.device),
            settings={**asdict(config), "device": str(self.device), "bf16": self.bf16},
        )
        weights = self.backbone.model.state_dict()
        write_run(report, lambda folder: save_checkpoint(self.base, folder, weights))
        return report

    def _margins(self, engine: Reranker, lists: CandidateLists, ratio: int, what: str, rows: int) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return margins_of(engine, lists, [ratio], what=f"{what} {lists.name}", rows=rows)[ratio]

    def _measure(
        self, held: Sequence[CandidateLists], ratios: Sequence[int], steps: int = 0
    ) -> tuple[list[DevRow], list[dict[int, Tensor]]]:
        """Figures at each ratio, and margins by ratio, after so many steps."""
        self.backbone.model.eval()
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                return measure(self.engine, held, ratios)
        except KalmRagError as err:
            if not steps:
                raise
            raise KalmRagError(  # weights ran away
                f"after {steps} steps the model gives margins that are not finite; nothing was written. Lower the "
                f"learning rate ({self.config.peak})."
            ) from err

    def _mine(self, learnt: Sequence[CandidateLists]) -> list[list[Mined]]:
        """Hard negatives of as many lists as are met about twice, at the ratio that is used by default."""
        share = -(-self.config.steps * self.config.lists // (2 * len(learnt)))
        mined = []
        for lists in learnt:
            rows = min(share, len(lists.queries))
            margins = self._margins(self.engine, lists, self.config.usual_ratio, "mine", rows)
            mined.append(mine(lists, margins, self.config.slack))
        return mined

    def _teach(self, learnt: Sequence[CandidateLists]) -> Sequence[CandidateLists]:
        """Lists with the chosen teacher's soft labels."""
        name = self.config.teacher
        if name == FUSION:
            return learnt
        teacher = self.engine if name == OWN else Reranker.from_pretrained(name, device=self.device)
        taught = []
        for lists in learnt:
            margins = self._margins(teacher, lists, 1, "soft labels", len(lists.queries))
            taught.append(replace(lists, teacher=fuse(margins, margins, lists.depth)))
        if name != OWN:
            teacher.close()
        return taught

    def _round(self) -> None:
        """Give the weights the precision they are saved in, so that what is measured is what is saved."""
        dtypes = stored_dtypes(self.base)
        with torch.no_grad():
            for name, parameter in self.backbone.model.named_parameters():
                parameter.copy_(parameter.to(dtypes.get(name, parameter.dtype)))
