"""Steps of a T5Gemma 2's training: batches scored under autograd, learnt from, the weights of the late ones averaged.

Letters: L lists of a batch, C candidates of a list.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kalm_rag.errors import KalmRagError
from kalm_rag.models.t5gemma2.backbone import T5Gemma2Backbone
from kalm_rag.states.pooling import mean_groups
from kalm_rag.training.batches import Batch, Batches, Mined
from kalm_rag.training.config import AdaptConfig
from kalm_rag.training.lists import CandidateLists
from kalm_rag.training.loop import Solver, WeightAverage, take_steps
from kalm_rag.training.lora import add_lora, fold_lora
from kalm_rag.training.losses import list_loss


class Learner:
    """Changes a model in place, from candidate lists, and hard negatives where they were mined.

    The model is in float32; `bf16` computes in bfloat16.
    """

    def __init__(
        self,
        backbone: T5Gemma2Backbone,
        lists: Sequence[CandidateLists],
        mined: Sequence[Sequence[Mined]] | None,
        config: AdaptConfig,
        *,
        bf16: bool,
    ) -> None:
        self._backbone, self._config, self._bf16 = backbone, config, bf16
        self._random = random.Random(config.seed)
        randoms = max(1, config.candidates // 8)
        self.batches = Batches(lists, self._random, candidates=config.candidates, randoms=randoms, mined=mined)
        model = backbone.model.requires_grad_(True)
        self._average = WeightAverage(model)
        if config.lora:
            add_lora(model, config.lora)
        if config.checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # old name
            enable({"use_reentrant": False})
        self.solver = Solver(model.named_parameters(), peak=config.peak, decay=0.01, embeddings="embed_tokens")

    def run(self, seconds: float | None, report: Callable[[int], None]) -> list[float]:
        """Take all steps, or as many as fit into `seconds`; leave the averaged weights in the model; give the losses.

        After each quarter `report` is called with the number of steps.

        Raises:
            KalmRagError: If a loss is not finite or the device's memory is too small.
        """
        steps = self._config.steps
        quarters = {steps * k // 4 for k in (1, 2, 3)} - {0, steps}

        def after(done: int, share: float) -> None:
            if share >= 0.5 + 0.5 * (self._average.count + 1) / self._config.snapshots:
                self._average.update(1 / (self._average.count + 1))
            if done in quarters:
                report(done)
                self._backbone.model.train()

        self._backbone.model.train()
        losses = take_steps(self._step, steps, warm_up=0.1 * steps + 1, seconds=seconds, after=after)
        if not self._average.count:
            self._average.update(1.0)
        fold_lora(self._backbone.model)
        self._average.load()
        self._backbone.model.eval()
        return losses

    def margins(self, batch: Batch, ratio: int) -> Tensor:
        """What the engine would give, under autograd, ``(L, C)``."""
        backbone, lists = self._backbone, batch.lists
        asked = list(zip(batch.rows, batch.picks, strict=True))
        texts = [text for row, columns in asked for text in lists.texts(row, columns)]
        ids = [passage.ids[: self._config.max_tokens] for passage in backbone.tokenize(texts)]
        states, counts = mean_groups(*backbone.read(ids), ratio)
        prompts = [backbone.prompt(lists.queries[row], lists.instructions[row]) for row in batch.rows]
        each = [prompt for prompt, columns in zip(prompts, batch.picks, strict=True) for _ in columns]
        return backbone.judge(each, states, counts).view(len(batch.rows), -1)

    def _step(self, warmth: float) -> float:
        config = self._config
        ratio = self._random.choice(config.ratios)
        batch = self.batches.draw(config.lists)
        try:
            return self.solver.step(lambda: self._backward(batch, ratio), warmth)
        except torch.OutOfMemoryError as err:
            raise KalmRagError(
                f"the device ran out of memory at {-(-config.lists // config.accumulate)} lists of {config.candidates} "
                f"passages; nothing was written. Raise accumulate, turn checkpointing on, lower max_tokens "
                f"({config.max_tokens}), or train with lora."
            ) from err

    def _backward(self, batch: Batch, ratio: int) -> float:
        """Add up the gradient of a batch, part by part; give its loss."""
        size, total = -(-len(batch.rows) // self._config.accumulate), 0.0
        for at in range(0, len(batch.rows), size):
            part = batch.part(slice(at, at + size))
            with torch.autocast(self._backbone.device.type, torch.bfloat16, enabled=self._bf16):
                margins = self.margins(part, ratio)
            gold, teacher = part.gold.to(margins.device), part.teacher.to(margins.device)
            loss = list_loss(margins, gold, teacher, self._config.soft)
            loss = loss + self._config.anchor * functional.binary_cross_entropy_with_logits(margins, gold)
            loss = loss * len(part.rows) / len(batch.rows)
            loss.backward()
            total += float(loss.detach())
        return total
