"""The one table of dtypes: their names on disk, the short ones that people type, and which a model may compute in."""

from __future__ import annotations

import torch

from kalm_rag.errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""Element types that a stored state may have, by the name written on disk."""

_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def dtype_name(dtype: torch.dtype) -> str:
    """Long name of a dtype.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def check_dtype(dtype: str | torch.dtype | None, default: torch.dtype = torch.float32) -> torch.dtype:
    """Read the dtype that a model computes in.

    Args:
        dtype: A torch dtype, its name, or ``fp32`` or ``bf16``; None takes `default`.
        default: What None means.

    Raises:
        InputError: If it is unknown, or float16, which these models overflow.

    Example:
        >>> check_dtype("bf16")
        torch.bfloat16
    """
    if dtype is None:
        return default
    found = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(_SHORT.get(str(dtype), str(dtype)))
    if found is torch.float16:
        raise InputError("dtype is float16; such a model overflows float16. Use float32 or bfloat16 ('fp32', 'bf16').")
    if found not in (torch.float32, torch.bfloat16):
        raise InputError(f"dtype is {dtype!r}; wanted 'fp32' or 'bf16'.")
    return found
