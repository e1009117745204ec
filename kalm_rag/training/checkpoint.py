"""Saving a trained T5Gemma 2: the base's folder again, with new text weights. Whole or not at all.

Every file of the base keeps its name, every tensor its name, shard and dtype; what training never touched (the vision
tower) is copied. So whatever loads the base loads the result.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kalm_rag.errors import InputError
from kalm_rag.models.t5gemma2.text_model import KEY_MAPPING

_COPIED = (".json", ".model", ".txt", ".jinja")
"""Files kept beside the weights. A model card is not: it describes the base."""

REPORT = "train.json"


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes `out` on success and vanishes on any failure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp keeps it to its owner
        if out.exists():
            out.rmdir()  # empty, as check_out saw to: anything that came in since stops us here
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def check_out(out: Path) -> Path:
    """Give an absolute path that nothing would be overwritten at.

    Raises:
        InputError: If it is a file, or a folder that holds something.
    """
    out = Path(out).absolute()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty; wanted a new folder for the trained checkpoint.")
    return out


def save_checkpoint(base: Path, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the base's files into an empty folder, with new tensors in its dtypes.

    `weights` go by the names that `T5Gemma2TextReranker` gives them; what is not among them is the base's.
    """
    for file in sorted(base.iterdir()):
        if file.suffix in _COPIED and file.name != REPORT and file.is_file():
            shutil.copyfile(file, folder / file.name)
    for file in sorted(base.glob("*.safetensors")):
        tensors = load_file(file)
        for name, old in tensors.items():
            if (new := weights.get(_our_name(name))) is not None:
                tensors[name] = new.detach().to("cpu", old.dtype, copy=True).contiguous()
        save_file(tensors, folder / file.name, metadata={"format": "pt"})


def stored_dtypes(base: Path) -> dict[str, torch.dtype]:
    """How the base stores each tensor, by the name that `T5Gemma2TextReranker` gives it."""
    files = (load_file(file) for file in sorted(base.glob("*.safetensors")))  # mapped: no weight is read
    return {_our_name(name): tensor.dtype for tensors in files for name, tensor in tensors.items()}


def _our_name(name: str) -> str:
    for pattern, replacement in KEY_MAPPING.items():
        name = re.sub(pattern, replacement, name)
    return name
