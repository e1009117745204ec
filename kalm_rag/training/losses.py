"""What models are trained to do and measured by: labelled passages first, lists ordered as the teacher does.

Pure tensor functions. Letters: L lists, C candidates of a list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def listwise_loss(margins: Tensor, gold: Tensor) -> Tensor:
    """Softmax loss over each list: ``-log(sum of gold probabilities)``, mean over lists that have a gold one, else 0.

    Margins and gold (1 on relevant candidates, else 0) are ``(L, C)``.

    Example:
        >>> round(float(listwise_loss(torch.zeros(1, 4), torch.tensor([[1.0, 0, 0, 0]]))), 4)
        1.3863
    """
    labelled = gold.sum(1) > 0
    if not bool(labelled.any()):
        return margins.sum() * 0.0
    margins, gold = margins[labelled], gold[labelled]
    hit = margins.masked_fill(gold == 0, torch.finfo(margins.dtype).min).logsumexp(1)
    return (margins.logsumexp(1) - hit).mean()


def distillation_loss(margins: Tensor, teacher: Tensor) -> Tensor:
    """How far lists are from a standardised teacher, mean: ``KL(softmax(1.5 * teacher) || softmax(margins))``."""
    wanted = functional.log_softmax(1.5 * teacher, dim=1)
    return functional.kl_div(functional.log_softmax(margins, dim=1), wanted, log_target=True, reduction="batchmean")


def list_loss(margins: Tensor, gold: Tensor, teacher: Tensor, soft: float) -> Tensor:
    """Labels and teacher together: ``(1 - soft) * listwise_loss + soft * distillation_loss``."""
    loss = (1 - soft) * listwise_loss(margins, gold)
    return loss + soft * distillation_loss(margins, teacher) if soft else loss


def mean_ndcg(scores: Tensor, gold: Tensor, relevant: Sequence[int]) -> float:
    """Mean nDCG@10 of binary labels; ties keep the given order. `relevant` counts those outside the list too."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :10]
    gains = gold.gather(1, order)
    discount = 1.0 / torch.arange(2, 12).float().log2()
    ideal = torch.stack([discount[: max(1, n)].sum() for n in relevant])
    return float(((gains * discount[: gains.shape[1]]).sum(1) / ideal).mean())


def calibrate(margins: Tensor, gold: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """Scale and shift of ``sigmoid(scale * margin + shift)``, fitted to labels by maximum likelihood (Platt).

    Of held-out pairs, all ``(P,)``; `weights` are how much each counts. As scale > 0, no order changes.
    """
    free = torch.zeros(2, requires_grad=True)
    solver = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(margins * free[0].exp() + free[1], gold, weights)
        loss.backward()
        return loss

    solver.step(closure)
    return float(free[0].detach().exp()), float(free[1].detach())
