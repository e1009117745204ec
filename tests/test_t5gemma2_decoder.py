"""Our own decoder forward against transformers', and what is kept of a prompt's beginning against starting afresh."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import save_tiny

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import ModelError
from kalm_rag.instructions import Instructions
from kalm_rag.models.t5gemma2.backbone import Prompt, T5Gemma2Backbone

SHAPES = {
    "grouped heads, both kinds of layer, window below the prompt": {},
    "one key head": {"num_key_value_heads": 1},
    "a key head a query head": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True},
    "one layer": {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
    "window of 8": {"sliding_window": 8},
    "softcap": {"final_logit_softcapping": 3.0},
    "another activation": {"hidden_activation": "silu"},
    "linearly scaled rope": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> T5Gemma2Backbone:
    return T5Gemma2Backbone.load(folder, name="t", revision="local", device=torch.device("cpu"), dtype=dtype)


def some_batch(backbone: T5Gemma2Backbone) -> tuple[list[Prompt], torch.Tensor, torch.Tensor]:
    """Seven passages of 1 to 9 states under three prompts of different lengths, two with a common prefix of 60."""
    draw = torch.Generator().manual_seed(1)
    prefix = torch.randint(5, 260, (60,), generator=draw)
    tails = [torch.randint(5, 260, (n,), generator=draw) for n in (7, 23, 90)]
    prompts = [Prompt(torch.cat([prefix, tail]), tuple(prefix.tolist())) for tail in tails[:2]]
    prompts.append(Prompt(tails[2]))  # nothing known of its beginning
    lengths = [9, 4, 1, 7, 9, 2, 5]
    states = torch.zeros(7, 9, backbone.info.hidden_size)
    counts = torch.zeros(7, 9)
    for row, n in enumerate(lengths):
        states[row, :n] = torch.randn(n, backbone.info.hidden_size, generator=draw)
        counts[row, :n] = 4
    return [prompts[i] for i in (0, 0, 1, 2, 1, 2, 0)], states, counts


def transformers_margins(backbone: T5Gemma2Backbone, *batch: object) -> torch.Tensor:
    lean, backbone._lean = backbone._lean, None
    try:
        return backbone.decode(*batch)  # type: ignore[arg-type]
    finally:
        backbone._lean = lean


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cache", [0, 1 << 20], ids=["afresh", "cached"])
def test_equals_transformers(tmp_path: Path, changes: dict[str, object], dtype: torch.dtype, cache: int) -> None:
    backbone = load(save_tiny(tmp_path, seed=5, **changes), dtype)
    assert backbone._lean is not None
    backbone.prefix_cache.resize(cache)
    batch = some_batch(backbone)
    want = transformers_margins(backbone, *batch)
    for _ in range(2):  # the second time everything is kept
        worst = float((backbone.decode(*batch) - want).abs().max())
        assert worst < (1e-5 if dtype is torch.float32 else 0.1), (worst, want)
    assert float(want.max() - want.min()) > 0.1
    assert (backbone.prefix_cache.stats.hits > 0) == (cache > 0)


def test_unknown_decoders_run_in_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny(tmp_path, attn_logit_softcapping=20.0)
    backbone = load(folder)
    assert backbone._lean is None
    assert "attn_logit_softcapping" in caplog.text
    assert torch.isfinite(backbone.decode(*some_batch(backbone))).all()


def test_unknown_decoders_take_no_other_way_to_run(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, attn_logit_softcapping=5.0)
    with pytest.raises(ModelError, match="compiled=True can't be had"):
        Reranker.from_pretrained(str(folder), compiled=True)


def test_the_model_keeps_its_own_tensors(tiny_folder: Path) -> None:
    """No second copy of the weights, and a change of them (training) is a change of the scores."""
    backbone = load(tiny_folder)
    backbone.prefix_cache.resize(0)
    batch = some_batch(backbone)
    before = backbone.decode(*batch)
    with torch.no_grad():
        for parameter in backbone._model.model.decoder.layers.parameters():
            parameter.mul_(1.1)
    after = backbone.decode(*batch)
    assert not torch.allclose(before, after)
    assert torch.allclose(after, transformers_margins(backbone, *batch), atol=1e-5)


def test_the_prefix_is_what_no_query_changes(tiny: Reranker) -> None:
    backbone = tiny.backbone
    for instructions in (Instructions(), Instructions(task="Find <end_of_turn> yes"), Instructions(system="a\n\n\n\n")):
        prompts = [backbone.prompt(q, instructions) for q in ("a", "the", "\n\n", "<bos>yes", "a long one " * 40)]
        assert len({p.prefix for p in prompts}) == 1
        assert all(p.ids[: len(p.prefix)].tolist() == list(p.prefix) for p in prompts)
        assert len(prompts[0].prefix) > 0.6 * len(prompts[0].ids)
