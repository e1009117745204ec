"""Decoder weights as int8: close to the exact ones, the same for a passage in any batch, states untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import save_tiny
from torch import nn
from transformers.activations import GELUTanh

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, ModelError
from kalm_rag.models.t5gemma2.int8 import LARGEST, Int8Projection, _round_tokens, check_weights

PASSAGES = [
    f"passage {i} about {word} " * (1 + i % 4) for i, word in enumerate("the sea and a hill in it yes no".split())
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("size", [16, 96, 100])
def test_equals_a_slow_writing_of_it(dtype: torch.dtype, bias: bool, size: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(size, n, bias=bias).to(dtype) for n in (24, 8)]
    x = torch.randn(3, 5, size, dtype=dtype) * torch.logspace(-3, 3, 5)[:, None].to(dtype)
    with torch.inference_mode():
        for layer, got in zip(layers, Int8Projection(*layers)(x), strict=True):
            weight = layer.weight.double()
            ws = weight.abs().amax(1, keepdim=True) / 127
            steps = (LARGEST / x.float().abs().amax(-1, keepdim=True)).to(dtype)
            want = ((x * steps).double().round() / steps.double()) @ ((weight / ws).round() * ws).T
            exact = x.double() @ weight.T
            if bias:
                want, exact = want + layer.bias.double(), exact + layer.bias.double()
            assert got.dtype == dtype
            # a value on the edge of two integers may fall to either side in fp32
            assert float((got.double() - want).abs().max() / exact.abs().max()) < 0.01
            assert float(((got.double() - exact).abs().amax(-1) / exact.abs().amax(-1)).max()) < 0.1


def test_no_element_of_bf16_is_rounded_past_the_end() -> None:
    x = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)[:, None] * torch.tensor([1.0, -1.0]).to(
        torch.bfloat16
    )  # every mantissa once, as the largest element of its token
    rows, scales = _round_tokens(x)
    back = (rows.double() - 128) * scales[:, None]
    assert float(((back - x.double()) / x.double()).abs().max()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_token_alone_gives_the_same_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    projection, x = Int8Projection(nn.Linear(96, 40, bias=False).to(dtype)), torch.randn(4, 9, 96, dtype=dtype)
    x[1] *= 1000.0  # a neighbour that would change a scale of the whole batch
    with torch.inference_mode():
        (together,) = projection(x)
        assert torch.equal(together[0, :1], projection(x[:1, :1])[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", [GELUTanh(), nn.SiLU()], ids=["gelu", "silu"])
def test_gated_opens_by_the_checkpoints_activation(dtype: torch.dtype, activation: nn.Module) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(96, 40, bias=False).to(dtype) for _ in range(2)]
    with torch.no_grad():
        layers[0].weight.mul_(4)  # so that the activation sees both its flat and its straight part
    projection, x = Int8Projection(*layers), torch.randn(3, 50, 96, dtype=dtype)
    with torch.inference_mode():
        gate, up = projection(x)
        want = activation(gate.double()) * up.double()
        rounding = 0.01 if dtype is torch.bfloat16 else 1e-6
        apart = (projection.gated(x, activation).double() - want).abs()
        assert gate.abs().max() > 5
        assert (apart <= rounding * want.abs() + 0.001 * up.double().abs()).all()  # GELU's two forms: up to 0.0005


def test_rows_of_zeros_stay_zero() -> None:
    with torch.inference_mode():
        (out,) = Int8Projection(nn.Linear(16, 8, bias=False))(torch.zeros(1, 2, 16))
    assert out.abs().max() == 0


@pytest.mark.parametrize("cache", [0, 1 << 22], ids=["afresh", "cached"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_scores_are_close_and_states_the_same(tmp_path: Path, dtype: str, cache: int) -> None:
    folder = str(save_tiny(tmp_path, seed=2, hidden_size=64, head_dim=32, intermediate_size=128))
    with (
        Reranker.from_pretrained(folder, device="cpu", dtype=dtype) as exact,
        Reranker.from_pretrained(
            folder, device="cpu", dtype=dtype, decoder_weights="int8", prefix_cache_bytes=cache
        ) as rounded,
    ):
        assert rounded.backbone is not exact.backbone
        assert rounded.info == exact.info  # stored states stay valid
        states = exact.encode(PASSAGES)
        want = torch.tensor([r.margin for r in exact.score("which?", states)])
        for _ in range(2):
            got = torch.tensor([r.margin for r in rounded.score("which?", states)])
        ranks = torch.stack([want.argsort().argsort(), got.argsort().argsort()]).double()
        assert float(torch.corrcoef(ranks)[0, 1]) > 0.8, (want, got)
        assert not torch.equal(want, got)
        alone = [rounded.score("which?", [one])[0].margin for one in states]
        # what batches differ by is the last bit in front of a rounding, which may then fall to the other side
        assert alone == pytest.approx(got.tolist(), abs=0.1)


def test_what_can_not_be_had_is_named(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="decoder_weights is 'int4'; wanted 'int8'"):
        Reranker.from_pretrained(str(tiny_folder), device="cpu", decoder_weights="int4")
    with pytest.raises(InputError, match="'pico' is small"):
        Reranker.from_pretrained("pico", decoder_weights="int8")
    with pytest.raises(InputError, match="runs on the CPU only"):
        check_weights("int8", torch.device("cuda"))
    odd = save_tiny(tmp_path, attn_logit_softcapping=20.0)
    with pytest.raises(ModelError, match="can't be had for a decoder with attn_logit_softcapping"):
        Reranker.from_pretrained(str(odd), device="cpu", decoder_weights="int8")
