"""Where a model computes, and in which dtype: names read into one normal form each. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kalm_rag.checks import check_items
from kalm_rag.errors import InputError
from kalm_rag.states import check_dtype


def parse_device(device: str | torch.device | None) -> torch.device:
    """Read a device into its one normal form, so that two spellings of it share one loaded model.

    ``cpu:0`` is ``cpu``, and ``cuda`` is the CUDA device that torch takes at this moment, usually ``cuda:0``.

    Args:
        device: A torch device or its name; None means CUDA where there is one, else the CPU.

    Raises:
        InputError: If torch doesn't know the device, or it asks for a CUDA device that is not there.

    Example:
        >>> parse_device("cpu:0")
        device(type='cpu')
    """
    cuda = torch.cuda.is_available()
    try:
        parsed = torch.device(device if device is not None else "cuda" if cuda else "cpu")
    except (RuntimeError, TypeError, ValueError) as err:
        raise InputError(f"device is {device!r}; wanted 'cpu', 'cuda' or 'cuda:N'.") from err
    if parsed.type == "cpu":
        return torch.device("cpu")
    if parsed.type == "cuda":
        if not cuda:
            raise InputError(f"device is {device!r}, but this torch sees no CUDA device. Use device='cpu'.")
        index = parsed.index if parsed.index is not None else torch.cuda.current_device()
        if index >= (count := torch.cuda.device_count()):
            raise InputError(f"device is {device!r}, but this torch sees {count} CUDA devices, numbered from 0.")
        return torch.device("cuda", index)
    return parsed


def parse_devices(devices: str | torch.device | Sequence[str | torch.device] | None) -> list[torch.device]:
    """Read one device or several: a list of them, or names with commas between.

    Raises:
        InputError: If there is none, one can't be used (`parse_device`), or they are of several kinds: their
            states would differ by rounding.

    Example:
        >>> parse_devices("cpu,cpu")
        [device(type='cpu'), device(type='cpu')]
    """
    if isinstance(devices, str):
        devices = [name.strip() for name in devices.split(",")]
    elif devices is None or isinstance(devices, torch.device):
        return [parse_device(devices)]
    parsed = [parse_device(device) for device in check_items(devices, "device", "a device or a list of them")]
    if len({device.type for device in parsed}) != 1:
        raise InputError(f"device is {devices!r}; wanted one device, or several of one kind ('cuda:0,cuda:1').")
    return parsed


def parse_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Read a dtype; None means bfloat16 on CUDA and float32 elsewhere.

    Raises:
        InputError: If it is unknown, or float16, which these models overflow.
    """
    return check_dtype(dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)
