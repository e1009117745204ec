"""Decoder weights as int8 on a CPU: linear layers as integer products over tokens rounded once.

Weights are rounded once, one scale per output; inputs as they come, one per token, so that no passage's score depends
on the batch it is in (torch's own `quantize_dynamic` has one scale per batch). The product is oneDNN's, through the
operator that torch's compiler lowers to, and comes with the weights' scales applied.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUTanh

from kalm_rag.errors import InputError


class Int8Projection:
    """Linear layers of one input, which is rounded once; see `kalm_rag.models.t5gemma2.projection.Projection`.

    Args:
        layers: Their weights are copied as int8, an eighth to a quarter of what they take as they are.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        self._layers = [_Int8Linear(layer) for layer in layers]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Map ``(..., in)`` to one ``(..., out)`` per layer, in the dtype of `x`."""
        rows, scales = _round_tokens(x.flatten(0, -2))
        scales = scales.to(x.dtype)[:, None]
        return [layer(rows, scales).unflatten(0, x.shape[:-1]) for layer in self._layers]

    def gated(self, x: Tensor, activation: Any) -> Tensor:  # noqa: ANN401 - transformers' classes are untyped
        """``activation(first(x)) * second(x)``.

        GELU by the error function: its tanh form is within 0.0005 of it, and takes five times as long on a CPU.
        """
        gate, up = self(x)
        opened = functional.gelu(gate) if isinstance(activation, GELUTanh) else cast("Tensor", activation(gate))
        return opened.mul_(up)  # in place: at this size, fresh memory costs more than the sum


class _Int8Linear:
    """One linear layer over rounded tokens."""

    def __init__(self, layer: nn.Linear) -> None:
        weight = layer.weight.detach().float()  # (out, in)
        self._bias = None if layer.bias is None else layer.bias.detach()
        self._scales = weight.abs().amax(1).clamp_(min=1e-12).div_(127)
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)
        rows = (weight / self._scales[:, None]).round_().to(torch.int8)
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(rows, None)

    def __call__(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Map rounded tokens and their scales ``(M, 1)`` to ``(M, out)`` in the dtype of the scales."""
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, 128, self._packed, self._scales, self._zeros, None, 1.0, 0, scales.dtype, "none", [], ""
        )
        product.mul_(scales)  # of one dtype: where two meet, torch is many times as slow
        return product if self._bias is None else product.add_(self._bias)


def check_weights(weights: str, device: torch.device) -> None:
    """Refuse rounded weights that there aren't, or can't be had here.

    Raises:
        InputError: If they aren't ``"int8"``, on a GPU, or where this torch was built without oneDNN.
    """
    if weights != "int8":
        raise InputError(f"decoder_weights is {weights!r}; wanted 'int8', or None for the checkpoint's own.")
    if device.type != "cpu":
        raise InputError(f"decoder_weights='int8' runs on the CPU only, not on {device}. Use dtype='bf16' there.")
    if not torch.backends.mkldnn.is_available():
        raise InputError("decoder_weights='int8' needs a torch with oneDNN, which this one isn't. Leave it out.")


LARGEST = 126
"""What the largest element of a token becomes: so much less than 127 that in bf16, too, nothing is rounded to 128."""

_INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def _round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``(M, E)`` as ``round(row / scale) + 128`` in uint8, and their scales, float32 ``(M,)``.

    Unsigned, because oneDNN's fast kernels take no signed input, and its slow ones are very slow. In the dtype of `x`
    throughout, because conversions cost more than the sums: in bf16 that adds 7% to the error of rounding.
    """
    kind = _INTEGERS[x.dtype]  # read as integers, positive floats have the same order
    largest = x.view(kind).bitwise_and(torch.iinfo(kind).max).amax(1).view(x.dtype)
    steps = largest.float().clamp_(min=1e-12).reciprocal_().mul_(LARGEST).to(x.dtype)
    rows = (x * steps[:, None]).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)  # + 128: two's complement
    return rows, steps.float().reciprocal_()
