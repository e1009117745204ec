"""What every training run shares: steps under a schedule and a time limit, the optimiser, an average of the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kalm_rag.errors import KalmRagError


def take_steps(
    step: Callable[[float], float],
    steps: int,
    *,
    warm_up: float,
    seconds: float | None,
    after: Callable[[int, float], None] = lambda done, share: None,
) -> list[float]:
    """Take all steps, or as many as fit; gives the loss of each batch.

    Args:
        step: Learns from one batch at a share (0 to 1) of the peak rate, which warms up, then falls as a cosine to 0;
            gives the loss.
        steps: How many.
        warm_up: Steps until the peak is reached.
        seconds: Time limit; None has none. The rate falls by the steps or the time, whichever goes faster.
        after: Called after each step with the number of steps and the share of steps or time that is over.
    """
    began, losses = time.perf_counter(), list[float]()

    def spent() -> float:
        return 0.0 if seconds is None else (time.perf_counter() - began) / max(seconds, 1e-9)

    bar = tqdm(range(steps), desc="learn", unit="step", mininterval=2.0)
    for number in bar:
        share = max(number / steps, spent())
        if share >= 1:
            break
        losses.append(step(min(1.0, (number + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * share))))
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
        after(number + 1, max((number + 1) / steps, spent()))
    return losses


class Solver:
    """AdamW over a model's free weights: matrices decay, vectors and embeddings don't; gradients are clipped at 1.

    `peak` is the highest learning rate; `embeddings` is part of the names of those.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        peak: float,
        decay: float,
        embeddings: str,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        free = [(name, weight) for name, weight in named if weight.requires_grad]
        plain = [weight for name, weight in free if weight.ndim >= 2 and embeddings not in name]
        other = [weight for name, weight in free if weight.ndim < 2 or embeddings in name]
        groups = [{"params": plain, "weight_decay": decay}, {"params": other, "weight_decay": 0.0}]
        self.peak, self.weights = peak, [weight for _, weight in free]
        self.optimiser = torch.optim.AdamW([g for g in groups if g["params"]], lr=peak, betas=betas)

    def step(self, backward: Callable[[], float], warmth: float) -> float:
        """Take a step at `warmth` times the peak rate; `backward` leaves gradients and gives the loss, which is given.

        Raises:
            KalmRagError: If the loss is not finite.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = self.peak * warmth
        self.optimiser.zero_grad(set_to_none=True)
        loss = backward()
        if not math.isfinite(loss):
            raise KalmRagError(f"the loss is {loss}; nothing was written. Lower the learning rate ({self.peak}).")
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        return loss


class WeightAverage:
    """An average of a model's learnt weights over the run, in the computer's own memory.

    Made before low-rank updates are added to the model, if any: the average is of the updated matrices.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = {name: name.rpartition(".") for name, _ in model.named_parameters()}
        self._homes = {name: (model.get_submodule(home), leaf) for name, (home, _, leaf) in parts.items()}
        self._mean: dict[str, Tensor] = {}
        self.count = 0

    def update(self, share: float) -> None:
        """Move the average towards the weights as they are now by `share`, 0 to 1; the first time, take them whole."""
        self.count += 1
        for name, (module, leaf) in self._homes.items():
            weight = getattr(module, leaf)
            if weight.requires_grad:
                now = weight.detach().to("cpu", copy=True)
                self._mean[name] = self._mean[name].lerp_(now, share) if name in self._mean else now

    @torch.no_grad()
    def load(self) -> None:
        """Put the average in the weights' place."""
        for name, mean in self._mean.items():
            module, leaf = self._homes[name]
            getattr(module, leaf).copy_(mean)
        self._mean = {}
