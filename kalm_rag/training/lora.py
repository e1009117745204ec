"""Low-rank updates (LoRA, arXiv 2106.09685): few numbers learnt per matrix, folded into it at the end.

Built on torch's parametrizations, so the model's own code runs unchanged over ``W + (alpha / rank) B A``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

ALPHA = 2.0
"""Weight of an update, as a multiple of what its rank alone would give (alpha = 2 rank)."""


class LowRank(nn.Module):
    """``W -> W + ALPHA * B A``, B zero at first, so that the model starts as it was."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns, device=weight.device) / math.sqrt(columns))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The updated matrix."""
        return weight + ALPHA * (self.b @ self.a)


def add_lora(model: nn.Module, rank: int) -> None:
    """Freeze a model and give every linear layer of its blocks a learnable low-rank update."""
    model.requires_grad_(False)
    for layer in _linears(model):
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def fold_lora(model: nn.Module) -> None:
    """Fold all updates into the matrices; the model is a plain one again. Does nothing where there are none."""
    for layer in _linears(model):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def _linears(model: nn.Module) -> list[nn.Linear]:
    """Linear layers of encoder and decoder blocks; the head shares its matrix with the embeddings and is left out."""
    return [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
