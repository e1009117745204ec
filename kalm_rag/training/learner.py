"""The training loop of a T5Gemma 2: draws candidate lists, takes steps, averages the weights of the late ones.

Letters: L lists of a batch, C candidates of a list.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from kalm_rag.errors import KalmRagError
from kalm_rag.models.t5gemma2.backbone import T5Gemma2Backbone
from kalm_rag.states.pooling import mean_groups
from kalm_rag.training.lists import TextLists
from kalm_rag.training.lora import add_lora, fold_lora
from kalm_rag.training.losses import distillation_loss, listwise_loss
from kalm_rag.training.mining import Mined
from kalm_rag.training.stages import AdaptConfig


class Learner:
    """Changes a model in place, from candidate lists.

    Args:
        backbone: The model, in float32.
        lists: What batches are drawn from.
        mined: Hard negatives of each of them; None draws over the retrieval ranks alone.
        config: The recipe of this stage.
        bf16: Compute in bfloat16.
    """

    def __init__(
        self,
        backbone: T5Gemma2Backbone,
        lists: Sequence[TextLists],
        mined: Sequence[Sequence[Mined]] | None,
        config: AdaptConfig,
        *,
        bf16: bool,
    ) -> None:
        self._backbone, self._lists, self._mined, self._config, self._bf16 = backbone, lists, mined, config, bf16
        self._random = random.Random(config.seed)
        self._sizes = [len(one.queries) for one in lists] if mined is None else [len(one) for one in mined]
        model = backbone.model.requires_grad_(True)
        homes = _homes(model)
        if config.lora:
            add_lora(model, config.lora)
        if config.checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # old name
            enable({"use_reentrant": False})
        self._homes = {name: home for name, home in homes.items() if getattr(*home).requires_grad}
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._free = [p for _, p in named]
        plain = [p for name, p in named if p.ndim >= 2 and "embed_tokens" not in name]
        other = [p for name, p in named if p.ndim < 2 or "embed_tokens" in name]
        groups = [{"params": plain, "weight_decay": 0.01}, {"params": other, "weight_decay": 0.0}]
        self._solver = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.peak)
        self._average: dict[str, Tensor] = {}
        self._averaged = 0

    def run(self, seconds: float | None, report: Callable[[int], None]) -> list[float]:
        """Take all steps, or as many as fit; leave the averaged weights in the model.

        Args:
            seconds: Time limit; None has none.
            report: Called with the number of steps after each quarter.

        Returns:
            Loss of each batch.

        Raises:
            KalmRagError: If a loss is not finite or the device's memory is too small.
        """
        began, losses, steps = time.perf_counter(), list[float](), self._config.steps
        quarters = {steps * k // 4 for k in (1, 2, 3)} - {0, steps}
        self._backbone.model.train()
        with tqdm(total=steps, desc="learn", unit="step", mininterval=2.0) as bar:
            for step in range(steps):
                spent = 0.0 if seconds is None else (time.perf_counter() - began) / max(seconds, 1e-9)
                share = max(step / steps, spent)
                if share >= 1:
                    break
                warmth = min(1.0, (step + 1) / (0.1 * steps + 1))
                losses.append(self._step(warmth * 0.5 * (1 + math.cos(math.pi * share))))
                bar.update()
                bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
                if max((step + 1) / steps, spent) >= 0.5 + 0.5 * (self._averaged + 1) / self._config.snapshots:
                    self._remember()
                if step + 1 in quarters:
                    report(step + 1)
                    self._backbone.model.train()
        self._settle()
        return losses

    def _step(self, warmth: float) -> float:
        """Learn from one batch at `warmth` times the peak rate; give its loss."""
        config = self._config
        for group in self._solver.param_groups:
            group["lr"] = config.peak * warmth
        ratio = self._random.choice(config.ratios)
        which = self._random.choices(range(len(self._lists)), [size**0.5 for size in self._sizes])[0]
        rows = [self._random.randrange(self._sizes[which]) for _ in range(config.lists)]
        picks = [self._draw(which, row) for row in rows]
        self._solver.zero_grad(set_to_none=True)
        try:
            loss = self._backward(self._lists[which], rows, picks, ratio)
            if not math.isfinite(loss):
                raise KalmRagError(f"the loss is {loss}; nothing was written. Lower the learning rate ({config.peak}).")
            torch.nn.utils.clip_grad_norm_(self._free, 1.0)
            self._solver.step()
        except torch.OutOfMemoryError as err:
            raise KalmRagError(
                f"the device ran out of memory at {-(-config.lists // config.accumulate)} lists of {config.candidates} "
                f"passages; nothing was written. Raise accumulate, turn checkpointing on, lower max_tokens "
                f"({config.max_tokens}), or train with lora."
            ) from err
        return loss

    def _backward(self, lists: TextLists, rows: Sequence[int], picks: Sequence[Sequence[int]], ratio: int) -> float:
        """Add up the gradient of a batch, part by part; give its loss."""
        size, total = -(-len(rows) // self._config.accumulate), 0.0
        for at in range(0, len(rows), size):
            part = slice(at, at + size)
            with torch.autocast(self._backbone.device.type, torch.bfloat16, enabled=self._bf16):
                margins = self._margins(lists, rows[part], picks[part], ratio)
            loss = self._loss(lists, rows[part], picks[part], margins) * len(rows[part]) / len(rows)
            loss.backward()
            total += float(loss.detach())
        return total

    def _margins(self, lists: TextLists, rows: Sequence[int], picks: Sequence[Sequence[int]], ratio: int) -> Tensor:
        """What the engine would give, under autograd, ``(L, C)``."""
        backbone = self._backbone
        texts = [text for row, columns in zip(rows, picks, strict=True) for text in lists.texts(row, columns)]
        ids = [one.ids[: self._config.max_tokens] for one in backbone.tokenize(texts)]
        states, counts = mean_groups(*backbone.read(ids), ratio)
        prompts = [backbone.prompt(lists.queries[row], lists.instructions[row]) for row in rows]
        each = [prompt for prompt, columns in zip(prompts, picks, strict=True) for _ in columns]
        return backbone.judge(each, states, counts).view(len(rows), -1)

    def _loss(self, lists: TextLists, rows: Sequence[int], picks: Sequence[Sequence[int]], margins: Tensor) -> Tensor:
        config, columns = self._config, torch.tensor(picks)
        gold = lists.gold[list(rows)].gather(1, columns).to(margins.device)
        loss = (1 - config.soft) * listwise_loss(margins, gold)
        if config.soft:
            teacher = lists.teacher[list(rows)].gather(1, columns).to(margins.device)
            loss = loss + config.soft * distillation_loss(margins, teacher)
        return loss + config.anchor * functional.binary_cross_entropy_with_logits(margins, gold)

    def _draw(self, which: int, row: int) -> list[int]:
        """Columns of one list: up to two relevant ones, mined negatives if there are, the rest over the ranks."""
        lists, size = self._lists[which], min(self._config.candidates, self._lists[which].candidates.shape[1])
        golden = lists.gold[row].nonzero().flatten().tolist()
        chosen = self._random.sample(golden, min(2, len(golden), size - 1))
        barred = set(golden)
        if self._mined is not None:
            mined = self._mined[which][row]
            barred |= mined.dropped
            chosen += self._random.sample(mined.hard, min(2 * (size - len(chosen)) // 3, len(mined.hard)))
        randoms = [c for c in range(lists.depth, lists.candidates.shape[1]) if c not in barred and c not in chosen]
        chosen += self._random.sample(randoms, min(max(1, size // 8), len(randoms), size - len(chosen)))
        left = [c for c in range(lists.candidates.shape[1]) if c not in barred and c not in chosen]
        while len(chosen) < size and left:  # rank log-uniform: near misses often, far ones too
            chosen.append(left.pop(int((len(left) + 1) ** self._random.random()) - 1))
        again = [c for c in chosen if c not in golden] or chosen  # a small collection: some negatives twice
        return chosen + [self._random.choice(again) for _ in range(size - len(chosen))]

    def _remember(self) -> None:
        """Take the learnt weights as they are now into the average, in the computer's own memory."""
        self._averaged += 1
        for name, (module, leaf) in self._homes.items():
            now = getattr(module, leaf).detach().to("cpu", copy=True)
            self._average[name] = self._average[name].lerp_(now, 1 / self._averaged) if self._averaged > 1 else now

    def _settle(self) -> None:
        """Put the average in place; updates of low rank are folded into it."""
        if not self._averaged:
            self._remember()
        fold_lora(self._backbone.model)
        with torch.no_grad():
            for name, (module, leaf) in self._homes.items():
                getattr(module, leaf).copy_(self._average[name])
        self._backbone.model.eval()
        self._average = {}


def _homes(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where each weight is found, whether it is learnt itself or through updates of low rank."""
    parts = {name: name.rpartition(".") for name, _ in model.named_parameters()}
    return {name: (model.get_submodule(home), leaf) for name, (home, _, leaf) in parts.items()}
