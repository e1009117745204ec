"""Linear layers of one input as the decoder calls them: in their own dtype here, rounded to int8 in `int8`.

Knows linear layers, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUTanh


class Projection(Protocol):
    """Linear maps of one input, computed together."""

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Map ``(..., in)`` to one ``(..., out)`` per linear layer."""
        ...

    def gated(self, x: Tensor, activation: Any) -> Tensor:  # noqa: ANN401 - transformers' classes are untyped
        """``activation(first(x)) * second(x)`` of two linear layers."""
        ...


class PlainProjection:
    """Linear layers in their own dtype, over their own tensors."""

    def __init__(self, *layers: nn.Linear) -> None:
        self._layers = layers

    def __call__(self, x: Tensor) -> list[Tensor]:
        """See `Projection`."""
        return [linear(x, layer.weight, layer.bias) for layer in self._layers]

    def gated(self, x: Tensor, activation: Any) -> Tensor:  # noqa: ANN401
        """See `Projection`. On a CPU by oneDNN, which applies both to what it has just computed."""
        gate, up = self._layers
        if not (by_onednn(x) and isinstance(activation, GELUTanh)):
            return cast("Tensor", activation(linear(x, gate.weight, gate.bias))).mul_(linear(x, up.weight, up.bias))
        opened = torch.ops.mkldnn._linear_pointwise(x, gate.weight, gate.bias, "gelu", [], "tanh")
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, opened, up.weight, up.bias, "mul")
        return out


def by_onednn(x: Tensor) -> bool:
    """Whether linear layers of an input are left to oneDNN: on a CPU that has it; torch's compiler picks by itself."""
    # asking for oneDNN cuts the compiled graph, but on a CPU only: whole, that one takes minutes to compile
    return x.device.type == "cpu" and torch.backends.mkldnn.is_available() and not torch.compiler.is_compiling()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``; in fp32 on a CPU by oneDNN, 1.1 to 1.4 times as fast as MKL on 2 AMD cores."""
    if x.dtype is torch.float32 and by_onednn(x):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out
    return functional.linear(x, weight, bias)


def project_plainly(*layers: nn.Linear) -> Projection:
    """Make a `PlainProjection`."""
    return PlainProjection(*layers)
