"""Saving a trained T5Gemma 2: the base's folder again, with new text weights. Whole or not at all.

Every file of the base keeps its name, every tensor its name, shard and dtype; what training never touched (the vision
tower) is copied. So whatever loads the base loads the result.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kalm_rag.errors import InputError
from kalm_rag.models.t5gemma2.text_model import KEY_MAPPING

_COPIED = (".json", ".model", ".txt", ".jinja")
"""Files kept beside the weights. A model card is not: it describes the base."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

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
    """Write the base's files into a folder, with `weights` in place of its tensors of those names.

    Args:
        base: Folder of the base.
        folder: An empty folder.
        weights: Tensors by the names `T5Gemma2TextReranker` gives them. Written in the base's dtype.
    """
    for file in sorted(base.iterdir()):
        if file.suffix in _COPIED and file.name != REPORT and file.is_file():
            shutil.copyfile(file, folder / file.name)
    for file in sorted(base.glob("*.safetensors")):
        save_file(dict(_tensors(file, weights)), folder / file.name, metadata={"format": "pt"})


def stored_dtypes(base: Path) -> Callable[[str], torch.dtype | None]:
    """How the base stores a tensor, by the name `T5Gemma2TextReranker` gives it; None if it doesn't."""
    found: dict[str, torch.dtype | None] = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {our_name(name): _DTYPES.get(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}
    return found.get


def our_name(name: str) -> str:
    """The name `T5Gemma2TextReranker` gives a stored tensor."""
    for pattern, replacement in KEY_MAPPING.items():
        name = re.sub(pattern, replacement, name)
    return name


def _tensors(file: Path, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():
            old = tensors.get_tensor(name)
            new = weights.get(our_name(name))
            yield name, old if new is None else new.detach().to("cpu", old.dtype, copy=True).contiguous()
