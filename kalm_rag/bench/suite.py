"""The whole benchmark: which parts run, in which order, and what was asked for."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kalm_rag.bench.checkpoint import passage_of, prompt_of, save_checkpoint
from kalm_rag.bench.measuring import QUERY, Tell, machine, random_text
from kalm_rag.bench.nano import ALLOWED, NanoCase, bench_loading, bench_nano, open_nano
from kalm_rag.bench.pico import WORDS, bench_indexing, bench_pico
from kalm_rag.bench.query import candidate_rows
from kalm_rag.bench.report import Check, Report, Row, compare
from kalm_rag.bench.serving import bench_serving
from kalm_rag.checks import check_count
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.instructions import Instructions
from kalm_rag.models.devices import parse_device

PICO_CANDIDATES = 50
"""Most passages of a query with pico."""
INDEXED = 100
"""Most passages whose indexing is timed."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run measures; an `InputError` if a number or dtype is out of range."""

    device: str | None = None  # cpu, cuda, cuda:1; None takes CUDA where there is one
    dtype: str | None = None  # fp32 or bf16 for the Nano shape; None measures both
    candidates: int = 100  # passages of a query of the Nano shape (pico: at most 50)
    passages: int = 20_000  # passages in the index whose queries are timed
    repeats: int = 5  # timed queries of each kind
    clients: int = 8  # threads that ask at the same time
    nano: bool = True  # whether the Nano shape is measured (3 GB of memory, most of the time)
    full: bool = False  # time the published protocol over all candidates instead of one batch
    clock: str = "wall"  # what ratios go by: wall, or cpu for CPU seconds, where the machine has other work
    curves: bool = False  # measure latency against candidates too (for a picture)

    def __post_init__(self) -> None:
        for name in ("candidates", "passages", "repeats", "clients"):
            check_count(getattr(self, name), name)
        if self.dtype not in (None, *ALLOWED):
            raise InputError(f"dtype is {self.dtype!r}; wanted one of {', '.join(ALLOWED)}.")
        if self.clock not in ("wall", "cpu"):
            raise InputError(f"clock is {self.clock!r}; wanted wall or cpu.")

    @property
    def dtypes(self) -> list[str]:
        """Dtypes that the Nano shape is measured in."""
        return list(ALLOWED) if self.dtype is None else [self.dtype]


def run(settings: Settings, tell: Tell = lambda line: None, *, checkpoint: Path | None = None) -> Report:
    """Measure; `tell` gets a line about what is done now.

    `checkpoint` is what `save_checkpoint` wrote, measured in the Nano shape's place; None makes one of that shape in a
    temporary folder (1.6 GB).

    Raises:
        InputError: If the device can't be used here.
        MissingDependencyError: If pico's encoder or sentence-transformers is not installed.
    """
    device = parse_device(settings.device)
    started, told = time.perf_counter(), machine(device)
    rows, checks, folder = list[Row](), list[Check](), None
    with ExitStack() as stack:
        if settings.nano:
            folder = checkpoint
            if folder is None:
                tell("making a checkpoint of Nano's shape with random weights")
                folder = save_checkpoint(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            rows, checks = _time_nano(settings, folder, device, tell)
        rows += _time_pico(settings, device, tell)
        rows += _by_candidates(settings, folder, device, tell) if settings.curves else []
    return Report(
        machine=told,
        settings=asdict(settings),
        rows=compare(rows, settings.clock),
        checks=checks,
        seconds=time.perf_counter() - started,
    )


def _time_nano(settings: Settings, folder: Path, device: torch.device, tell: Tell) -> tuple[list[Row], list[Check]]:
    rows: list[Row] = []
    checks: list[Check] = []
    case = NanoCase(candidates=settings.candidates, repeats=max(1, settings.repeats // 2), full=settings.full)
    for dtype in settings.dtypes:
        tell(f"Nano shape, {dtype}: published protocol and stored states")
        timed, equal = bench_nano(folder, dtype, device, case)
        rows += timed
        checks += equal
    tell("Nano shape: memory after loading")
    return rows + bench_loading(folder, settings.dtypes[0]), checks


def _time_pico(settings: Settings, device: torch.device, tell: Tell) -> list[Row]:
    tell("pico: stored states and a cross-encoder")
    rows = bench_pico(device, candidates=min(PICO_CANDIDATES, settings.candidates), repeats=settings.repeats)
    tell("indexing, and sentence-transformers' encode")
    rows += bench_indexing(device, passages=min(INDEXED, settings.passages))
    with tempfile.TemporaryDirectory() as home:
        many = {"passages": settings.passages, "queries": 8 * settings.repeats, "clients": settings.clients}
        return rows + bench_serving(Path(home), device, tell=tell, **many)


def _by_candidates(settings: Settings, folder: Path | None, device: torch.device, tell: Tell) -> list[Row]:
    tell("latency by number of candidates")
    with Reranker.from_pretrained("pico", device=device) as engine:
        few = engine.encode([random_text(WORDS, seed) for seed in range(16)], show_progress=False)
        rows = candidate_rows(engine, few, (QUERY, Instructions()), (10, 25, 50, 100, 200), settings.repeats)
    if folder is not None:
        with open_nano(folder, settings.dtypes[-1], device) as engine:
            few = engine.encode([passage_of(200, seed) for seed in range(4)], show_progress=False)
            rows += candidate_rows(engine, few, prompt_of(80), (10, 25, 50, 100), 1)
    return rows
