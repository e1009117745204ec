"""Names of models to loaded backbones: resolves, fetches at a pinned commit, loads once per process, releases.

Nothing here touches the network until `acquire` is called with a name that needs it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kalm_rag.errors import InputError, ModelError
from kalm_rag.models.backbone import Backbone
from kalm_rag.models.pico.config import FORMER_PASSAGE_TOKENS, MAX_PASSAGE_TOKENS
from kalm_rag.models.t5gemma2.protocol import MAX_PASSAGE_TOKENS as PROTOCOL_LIMIT

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


def acquire(
    name: str,
    *,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype,
    decoder_weights: str | None = None,
    compiled: bool = False,
    max_passage_tokens: int | None = None,
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
        max_passage_tokens: Where passages are cut; None takes the model's default.

    Raises:
        ModelError: If the name is unknown, or the checkpoint can't be found, fetched or loaded.
        InputError: If `revision` is given for pico or a folder, which have none, or passages can't be cut there.
        MissingDependencyError: If the model needs a package that is not installed.
    """
    revision = _check_revision(name, revision)
    limit = max_passage_tokens if max_passage_tokens is not None else passage_limit(name)
    variant = str(device), str(dtype), decoder_weights, str(compiled), str(limit)
    key = (str(_find_folder(name) or name), revision, *variant)
    with _slots_lock:
        slot = _slots.setdefault(key, _Slot())
        slot.users += 1
    try:
        with slot.lock:  # the second asker waits for the first one's load instead of loading again
            if slot.backbone is None:
                slot.backbone = _load(name, revision, device, dtype, decoder_weights, compiled, max_passage_tokens)
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


def acquire_all(
    devices: Sequence[torch.device],
    name: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    decoder_weights: str | None = None,
    compiled: bool = False,
    max_passage_tokens: int | None = None,
) -> tuple[list[Backbone], Callable[[], None]]:
    """Load a model on several devices, or share what is loaded.

    Args:
        devices: Where to compute. The first one scores; the others only encode.
        name: As `acquire`, like the next two.
        revision: Commit, tag or branch.
        dtype: float32 or bfloat16.
        decoder_weights: As `acquire`, for the first device.
        compiled: Likewise.
        max_passage_tokens: As `acquire`.

    Returns:
        A backbone per device, in that order, and how to give them all back.

    Raises:
        ModelError, InputError, MissingDependencyError: As `acquire`; nothing stays loaded then.
    """
    with ExitStack() as leases:
        loaded = []
        for device in devices:
            decodes = device == devices[0]
            lease = acquire(
                name,
                revision=revision,
                device=device,
                dtype=dtype,
                decoder_weights=decoder_weights if decodes else None,
                compiled=compiled and decodes,
                max_passage_tokens=max_passage_tokens,
            )
            leases.callback(lease.release)
            loaded.append(lease.backbone)
        return loaded, leases.pop_all().close


def _give_back(key: tuple[str | None, ...], slot: _Slot) -> None:
    with _slots_lock:
        slot.users -= 1
        if slot.users == 0 and _slots.get(key) is slot:
            del _slots[key]


def _find_folder(name: str) -> Path | None:
    """Give the folder that a name means, whole; None if it is a known name or no folder."""
    if name in {PICO, *CHECKPOINTS}:
        return None
    try:
        folder = Path(name).expanduser()
        return folder.resolve() if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, without a home, with a NUL byte: no folder either way
        return None


def _check_revision(name: str, revision: str | None) -> str | None:
    """Refuse a revision where it means nothing; give the pinned one where it is left out, so that both are one model.

    Raises:
        InputError: If the name is pico's, or a folder's.
    """
    if revision is None:
        return CHECKPOINTS[name].revision if name in CHECKPOINTS else None
    if not isinstance(revision, str) or not revision:
        raise InputError(f"revision is {revision!r}; wanted a commit, tag or branch, or None.")
    if name == PICO or _find_folder(name):
        what = "'pico', which ships with this package" if name == PICO else f"the folder {name!r}, which is as it is"
        raise InputError(f"revision {revision!r} was given for {what}; leave it out.")
    return revision


def _load(
    name: str,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype,
    decoder_weights: str | None,
    compiled: bool,
    max_passage_tokens: int | None,
) -> Backbone:
    home = _find_folder(name)
    if _is_pico(name):
        if decoder_weights is not None or compiled:
            raise InputError(
                f"decoder_weights and compiled are for KaLM checkpoints; {name!r} is small. Leave them out."
            )
        from kalm_rag.models.pico.backbone import PicoBackbone  # its encoder is an optional dependency

        return PicoBackbone.load(device=device, dtype=dtype, weights=home, max_passage_tokens=max_passage_tokens)
    from kalm_rag.models.t5gemma2.backbone import T5Gemma2Backbone  # transformers' model code is slow to import

    folder, commit, weights = find_checkpoint(name, revision)
    return T5Gemma2Backbone.load(
        folder,
        name=str(home or name),
        revision=commit,
        device=device,
        dtype=dtype,
        weights=weights,
        decoder_weights=decoder_weights,
        compiled=compiled,
        max_passage_tokens=max_passage_tokens,
    )


def _is_pico(name: str) -> bool:
    home = _find_folder(name)
    return name == PICO or (home is not None and (home / "pico.safetensors").is_file())


def passage_limit(name: str, *, former: bool = False) -> int:
    """Where a model cuts passages by default; loads nothing.

    Args:
        name: As `acquire` takes it.
        former: Where it did before collections noted it.
    """
    if _is_pico(name):
        return FORMER_PASSAGE_TOKENS if former else MAX_PASSAGE_TOKENS
    return PROTOCOL_LIMIT


def check_name(name: str) -> None:
    """Refuse what can be no model's name, without loading or fetching anything.

    Raises:
        ModelError: If it is no known name, no folder that there is, and no repository id.
    """
    known = name == PICO or name in CHECKPOINTS or _find_folder(name) is not None
    if not known and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ModelError(
            f"no model named {name!r:.100}, and no such folder. Known names: {', '.join([PICO, *CHECKPOINTS])}. "
            f"A repository id (owner/name) or a folder with a T5Gemma 2 checkpoint works too."
        )


def find_checkpoint(name: str, revision: str | None = None) -> tuple[Path, str, str | None]:
    """Find the folder of a T5Gemma 2 checkpoint, fetching it if it is not at hand.

    Args:
        name: ``nano``, ``small``, ``large``, a repository id, or a folder.
        revision: As `acquire` takes it; the pinned one of a known name where it is None.

    Returns:
        Folder, commit (``"local"`` for a folder) and what pins the weights (None for a folder: its files do).

    Raises:
        InputError: If `revision` is given for a folder.
        ModelError: If the name is unknown, or the checkpoint can't be fetched.
    """
    revision = _check_revision(name, revision)
    home = _find_folder(name)
    if home is not None:
        return home, "local", None
    check_name(name)
    repository = CHECKPOINTS[name].repository if name in CHECKPOINTS else name
    folder, commit = _fetch(repository, revision)
    return folder, commit, f"{repository}@{commit}"


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
