"""Names of models to loaded backbones: resolves, fetches at a pinned commit, loads once per process, releases.

Nothing here touches the network until `acquire` is called with a name that needs it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kalm_rag.errors import InputError, ModelError
from kalm_rag.models.backbone import Backbone

logger = logging.getLogger(__name__)

PICO = "pico"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: repository and the commit this release was written for (None: resolved at download)."""

    repository: str
    revision: str | None


CHECKPOINTS = {
    "nano": Checkpoint("KaLM-Embedding/KaLM-Reranker-V1-Nano-R2", "3902d6453ea915007dcbf88fbc8a1d7dd5f8df10"),
    "small": Checkpoint("KaLM-Embedding/KaLM-Reranker-V1-Small-R2", "68b74f09ff2ab5df9b9a9a48c812a81aaff8815e"),
    "large": Checkpoint("KaLM-Embedding/KaLM-Reranker-V1-Large-R2", None),
}
"""Short names of the R2 checkpoints. Their states are not interchangeable with V1's."""

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


@dataclass
class _Slot:
    """One loaded (or loading) backbone and how many engines use it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    backbone: Backbone | None = None
    users: int = 0


_slots: dict[tuple[str | None, ...], _Slot] = {}
_slots_lock = threading.Lock()


@dataclass(frozen=True)
class Lease:
    """A shared backbone, and how to give it back; the last one given back frees the model."""

    backbone: Backbone
    release: Callable[[], None]


def parse_device(device: str | torch.device | None) -> torch.device:
    """Read a device; None means CUDA where there is one, else the CPU.

    Raises:
        InputError: If torch doesn't know the device, or it asks for CUDA where there is none.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except RuntimeError as err:
        raise InputError(f"device is {device!r}; wanted 'cpu', 'cuda' or 'cuda:N'.") from err
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {device!r}, but this torch sees no CUDA device. Use device='cpu'.")
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
    parsed = [parse_device(device) for device in devices]
    if len({device.type for device in parsed}) != 1:
        raise InputError(f"device is {devices!r}; wanted one device, or several of one kind ('cuda:0,cuda:1').")
    return parsed


def parse_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Read a dtype; None means bfloat16 on CUDA and float32 elsewhere.

    Raises:
        InputError: If it is unknown, or float16, which these models overflow.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    parsed = dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(str(dtype))
    if parsed is torch.float16:
        raise InputError("dtype is float16; these models overflow it (non-finite logits). Use 'bf16' or 'fp32'.")
    if parsed not in (torch.float32, torch.bfloat16):
        raise InputError(f"dtype is {dtype!r}; wanted 'fp32' or 'bf16'.")
    return parsed


def acquire(
    name: str,
    *,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype,
    decoder_weights: str | None = None,
    compiled: bool = False,
) -> Lease:
    """Load a model, or share the one already loaded in this process.

    Args:
        name: ``pico``, ``nano``, ``small``, ``large``, a repository id, a checkpoint folder, or a folder of pico's
            weights that ``kalm-rag train`` wrote.
        revision: Commit, tag or branch of a repository; None takes the pinned one (or main, resolved to its commit).
        device: Where to compute.
        dtype: float32 or bfloat16.
        decoder_weights: ``"int8"``, or None for `dtype`; see `T5Gemma2Backbone.load`.
        compiled: Run the decoder through torch.compile; see there too.

    Raises:
        ModelError: If the name is unknown, or the checkpoint can't be found, fetched or loaded.
        InputError: If `revision` is given where it means nothing.
        MissingDependencyError: If the model needs a package that is not installed.
    """
    key = (_identity(name), revision, str(device), str(dtype), decoder_weights, str(compiled))
    with _slots_lock:
        slot = _slots.setdefault(key, _Slot())
        slot.users += 1
    try:
        with slot.lock:  # the second asker waits for the first one's load instead of loading again
            if slot.backbone is None:
                slot.backbone = _load(name, revision, device, dtype, decoder_weights, compiled)
            backbone = slot.backbone
    except BaseException:
        _give_back(key, slot)
        raise
    done = threading.Event()

    def release() -> None:
        if not done.is_set():
            done.set()
            _give_back(key, slot)

    return Lease(backbone, release)


def _give_back(key: tuple[str | None, ...], slot: _Slot) -> None:
    with _slots_lock:
        slot.users -= 1
        if slot.users == 0 and _slots.get(key) is slot:
            del _slots[key]


def _identity(name: str) -> str:
    return str(Path(name).resolve()) if name not in {PICO, *CHECKPOINTS} and Path(name).is_dir() else name


def _load(
    name: str,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype,
    decoder_weights: str | None,
    compiled: bool,
) -> Backbone:
    trained = name not in CHECKPOINTS and (Path(name) / "pico.safetensors").is_file()
    if (name == PICO or trained) and (decoder_weights is not None or compiled):
        raise InputError(f"decoder_weights and compiled are for KaLM checkpoints; {name!r} is small. Leave them out.")
    if name == PICO:
        if revision is not None:
            raise InputError(
                f"revision {revision!r} was given for 'pico', which ships with this package; leave it out."
            )
        from kalm_rag.models.pico.backbone import PicoBackbone  # its encoder is an optional dependency

        return PicoBackbone.load(device=device, dtype=dtype)
    if trained:
        from kalm_rag.models.pico.backbone import PicoBackbone

        return PicoBackbone.load(device=device, dtype=dtype, weights=_identity(name))
    from kalm_rag.models.t5gemma2.backbone import T5Gemma2Backbone  # transformers' model code is slow to import

    folder, commit, weights = find_checkpoint(name, revision)
    return T5Gemma2Backbone.load(
        folder,
        name=_identity(name),
        revision=commit,
        device=device,
        dtype=dtype,
        weights=weights,
        decoder_weights=decoder_weights,
        compiled=compiled,
    )


def find_checkpoint(name: str, revision: str | None = None) -> tuple[Path, str, str | None]:
    """Find the folder of a T5Gemma 2 checkpoint, fetching it if it is not at hand.

    Args:
        name: ``nano``, ``small``, ``large``, a repository id, or a folder.
        revision: As `acquire` takes it.

    Returns:
        Folder, commit (``"local"`` for a folder) and what pins the weights (None for a folder: its files do).

    Raises:
        ModelError: If the name is unknown, or the checkpoint can't be fetched.
    """
    if name not in CHECKPOINTS and Path(name).is_dir():
        return Path(name), "local", None
    checkpoint = CHECKPOINTS.get(name)
    if checkpoint is None:
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            known = ", ".join([PICO, *CHECKPOINTS])
            raise ModelError(
                f"no model named {name!r}, and no such folder. Known names: {known}. "
                f"A repository id (owner/name) or a folder with a T5Gemma 2 checkpoint works too."
            )
        checkpoint = Checkpoint(name, None)
    folder, commit = _fetch(checkpoint.repository, revision if revision is not None else checkpoint.revision)
    return folder, commit, f"{checkpoint.repository}@{commit}"


def _fetch(repository: str, revision: str | None) -> tuple[Path, str]:
    """Download (or find in the cache) a snapshot; gives its folder and the commit it is at."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model"])
        )
    except (OSError, HfHubHTTPError, ValueError) as err:
        raise ModelError(
            f"{repository} (revision {revision or 'main'}) could not be fetched: {err}\n"
            f"Without a network, use the bundled model (name 'pico') or give the folder of a downloaded checkpoint."
        ) from err
    logger.info("using %s at commit %s", repository, folder.name)
    return folder, folder.name
