"""How things are timed here: runs after a warm-up, percentiles, peak memory, and where it was all measured.

Also the made-up text and states that everything is timed on: what they say doesn't matter for time.
"""

from __future__ import annotations

import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kalm_rag.states import PassageStates, passage_key

QUERY = "what helps against the cold in winter"

Tell = Callable[[str], None]
"""Gets a line about what is measured now."""

_WORDS = (
    "the of and to in is was for as with by on not he his but at are this have from or had an they which one you "
    "were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our "
    "man me even most made after also well did many before must through years where much your way down should "
    "because long each just state people those too mr how little good world make very year still see own work men"
).split()

_PACKAGES = ("torch", "transformers", "tokenizers", "sentence-transformers", "chromadb", "numpy", "kalm-rag")
_PROCESS = Path("/proc/self")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Several runs of one thing.

    CPU seconds are those of all threads of this process, which other jobs on the machine disturb far less.
    """

    seconds: tuple[float, ...]  # wall-clock, one entry per run, in order
    cpu: tuple[float, ...] = ()  # CPU seconds likewise; empty where they were not taken
    peak_bytes: int | None = None  # most memory held meanwhile, see `_peak`

    def quantile(self, share: float) -> float:
        """Seconds that this share of the runs stayed within, in [0, 1], linear between runs."""
        return float(np.quantile(self.seconds, share))

    @property
    def p50(self) -> float:
        """Median seconds of a run."""
        return self.quantile(0.5)

    @property
    def cpu50(self) -> float | None:
        """Median CPU seconds of a run."""
        return float(np.median(self.cpu)) if self.cpu else None


def measure(
    run: Callable[[], object],
    repeats: int,
    device: torch.device,
    *,
    warm_up: Callable[[], object] | None = None,
    enough: float = math.inf,
) -> Spread:
    """Time a function on a device, after `warm_up` or one run of it.

    `repeats` >= 1 runs are timed, fewer once they took `enough` seconds.
    """
    (warm_up if warm_up is not None else run)()
    _wait(device)
    _reset_peak(device)
    seconds, cpu = [], []
    for _ in range(repeats):
        started, worked = time.perf_counter(), time.process_time()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - worked)
        if sum(seconds) >= enough:
            break
    return Spread(seconds=tuple(seconds), cpu=tuple(cpu), peak_bytes=_peak(device))


def measure_stages(run: Callable[[], Mapping[str, float]], repeats: int, device: torch.device) -> dict[str, Spread]:
    """Time a function that gives seconds by stage; the whole is ``"total"``, what no stage covers ``"rest"``."""
    told: list[Mapping[str, float]] = []
    total = measure(lambda: told.append(run()), repeats, device)
    told = told[1:]
    names = list(dict.fromkeys(name for spent in told for name in spent))
    stages = {name: Spread(seconds=tuple(spent.get(name, 0.0) for spent in told)) for name in names}
    left = [whole - sum(spent.values()) for whole, spent in zip(total.seconds, told, strict=True)]
    return {**stages, "rest": Spread(seconds=tuple(max(0.0, seconds) for seconds in left)), "total": total}


def machine(device: torch.device) -> dict[str, Any]:
    """Where this is measured: versions, processor, cores, threads, load, device."""
    versions = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # an extra that is not installed
            versions[name] = version(name)
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": str(device),
        "cuda": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def random_text(words: int, seed: int) -> str:
    """Text of common words, about 1.05 tokens each for MiniLM; the same for the same seed."""
    return " ".join(random.Random(seed).choices(_WORDS, k=words))


def words_used() -> list[str]:
    """Every word that `random_text` can give."""
    return list(dict.fromkeys(_WORDS))


def stretch_states(states: Sequence[PassageStates], texts: Iterable[str]) -> list[PassageStates]:
    """Stand-ins for the states of many texts: those of a few, over and over, each under its own text's key.

    Encoding thousands of passages would take most of a benchmark; what is in a state changes no timing. The first ones
    are as they are; each time over, rows are rotated by one, so that nothing takes two of them for one passage.
    """
    out = []
    for row, text in enumerate(texts):
        turn, place = divmod(row, len(states))
        one = states[place]
        out.append(replace(one, key=passage_key(text), vectors=one.vectors.roll(turn, 0)))
    return out


def process_memory(name: str) -> int | None:
    """Bytes resident in this process, ``VmRSS`` now or ``VmHWM`` at most; None where Linux doesn't tell."""
    status = _PROCESS / "status"
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")]  # "kB" means KiB there
    return sizes[0] if sizes else None


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # not Linux, or not allowed: the peak is then the process's so far
        if (_PROCESS / "clear_refs").exists():
            (_PROCESS / "clear_refs").write_text("5", encoding="ascii")


def _peak(device: torch.device) -> int | None:
    """Most memory held since: of a CUDA device, else resident in this process, the loaded model included."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else process_memory("VmHWM")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
