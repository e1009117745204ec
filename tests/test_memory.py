"""Resident memory of a loaded KaLM checkpoint against loading it whole, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_tokenizer
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

NANO = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
}
SMALL = {**NANO, "vocab_size": 65_536, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SMALL_SIGLIP = {**SIGLIP, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 14}

LOAD_WHOLE = "T5Gemma2ForConditionalGeneration.from_pretrained(folder, dtype=torch.{dtype})"
LOAD_OURS = (
    "T5Gemma2Backbone.load(Path(folder), name='t', revision='local', device=torch.device('cpu'), dtype=torch.{dtype})"
)
MEASURE = """
import gc, psutil, torch
from pathlib import Path
from transformers import T5Gemma2ForConditionalGeneration
from transformers.models.t5gemma2 import modeling_t5gemma2
from transformers.models.siglip import modeling_siglip
from kalm_rag.models.t5gemma2.backbone import T5Gemma2Backbone
folder = {folder!r}
torch.zeros(1 << 20)
before = psutil.Process().memory_info().rss
model = {load}
for tensor in (getattr(model, "_model", model)).state_dict().values():
    tensor.sum()  # reads it, so that a page that is only mapped counts too
gc.collect()
print(psutil.Process().memory_info().rss - before)
"""


def save_shaped(folder: Path, text: dict[str, int], vision: dict[str, int], dtype: torch.dtype) -> Path:
    """A checkpoint of a shape, every weight 0.01 (random ones would take minutes)."""
    encoder = {
        "text_config": dict(text),
        "vision_config": {"model_type": "siglip_vision_model", **vision},
        "mm_tokens_per_image": 256,
        "eoi_token_index": 256 if text is SMALL else 256_000,
    }
    with torch.device("meta"):
        model = T5Gemma2ForConditionalGeneration(T5Gemma2Config(encoder=encoder, decoder=dict(text))).to(dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def growth(folder: Path, load: str, dtype: str) -> int:
    """Bytes that a process grows by when it loads a checkpoint and has read every weight once."""
    code = MEASURE.format(folder=str(folder), load=load.format(dtype=dtype))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[-1])


@pytest.mark.parametrize(
    ("text", "vision", "dtype"),
    [
        pytest.param(SMALL, SMALL_SIGLIP, "float32", id="small"),
        pytest.param(NANO, SIGLIP, "float32", id="nano-fp32", marks=pytest.mark.slow),
        pytest.param(NANO, SIGLIP, "bfloat16", id="nano-bf16", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_takes_half_of_what_it_takes_whole(
    tmp_path: Path, text: dict[str, int], vision: dict[str, int], dtype: str
) -> None:
    pytest.importorskip("psutil", reason="psutil is not installed (extra 'dev')")
    folder = save_shaped(tmp_path, text, vision, getattr(torch, dtype))
    whole, ours = growth(folder, LOAD_WHOLE, dtype), growth(folder, LOAD_OURS, dtype)
    assert ours <= 0.55 * whole, f"{ours / 1e6:.0f} MB of {whole / 1e6:.0f} MB"
    assert ours >= 0.3 * whole  # less can't be: something was not loaded
