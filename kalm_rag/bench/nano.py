"""KaLM-Reranker-V1-Nano's shape: queries over stored states against the published one-phase protocol.

Random weights, so only time, memory and equality of scores mean anything here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from kalm_rag.bench.checkpoint import Reference, passage_of, prompt_of
from kalm_rag.bench.measuring import Spread, measure, stretch_states
from kalm_rag.bench.query import Query, query_rows
from kalm_rag.bench.report import Check, Row, row_of
from kalm_rag.models.prefix_cache import CPU_CACHE_BYTES
from kalm_rag.models.registry import parse_dtype
from kalm_rag.models.t5gemma2 import T5Gemma2Backbone
from kalm_rag.reranker import Reranker
from kalm_rag.states import PassageStates
from kalm_rag.store import open_store

ALLOWED = {"fp32": 1e-5, "bf16": 1e-2}
"""Difference of P(yes) between stored states and the published protocol that is still rounding."""


@dataclass(frozen=True, kw_only=True)
class NanoCase:
    """What is timed.

    Attributes:
        candidates: Passages of a query.
        tokens: Tokens a passage.
        prompt: Tokens of the prompt.
        ratio: Tokens a state stands for.
        batch: Passages that the published protocol takes at a time.
        repeats: Timed queries.
        full: Encode all candidates and run the protocol over all of them, instead of one batch.
    """

    candidates: int = 100
    tokens: int = 200
    prompt: int = 80
    ratio: int = 4
    batch: int = 32
    repeats: int = 3
    full: bool = False

    def group(self, dtype: str) -> str:
        """Title of the table."""
        return (
            f"KaLM-Nano's shape, random weights, {dtype}: {self.candidates} passages of {self.tokens} tokens, "
            f"r={self.ratio}, prompt of {self.prompt} tokens"
        )

    @property
    def texts(self) -> list[str]:
        """The candidates."""
        return [passage_of(self.tokens, seed) for seed in range(self.candidates)]

    @property
    def sample(self) -> list[str]:
        """Those that are really encoded, and scored by the protocol."""
        return self.texts if self.full else self.texts[: self.batch]


def open_nano(folder: Path, dtype: str, device: torch.device, ratio: int = 4) -> Reranker:
    """Load the checkpoint with its cache of prompt beginnings off, so that every query costs what a first one does."""
    engine = Reranker.from_pretrained(str(folder), device=device, dtype=dtype, ratio=ratio)
    cast("T5Gemma2Backbone", engine.backbone).prefix_cache.resize(0)
    return engine


def bench_nano(folder: Path, dtype: str, device: torch.device, case: NanoCase) -> tuple[list[Row], list[Check]]:
    """Time one dtype: the published protocol, encoding, and queries over stored states by stage.

    Args:
        folder: What `checkpoint.save_checkpoint` wrote.
        dtype: ``"fp32"`` or ``"bf16"``.
        device: Where.
        case: Shapes.
    """
    published, wanted = _published(folder, dtype, device, case)
    with open_nano(folder, dtype, device, case.ratio) as engine, tempfile.TemporaryDirectory() as home:
        encode, made = _encode(engine, case)
        with open_store(home, engine.layout()) as store:
            store.put_many(stretch_states(made, case.texts))
            query = Query(engine, store, case.texts, prompt_of(case.prompt))
            rows, checks = _ways(query, dtype, case, made[0].tokens, wanted)
    encoded = row_of(f"nano.{dtype}.encode", case.group(dtype), "encode", "encode", encode, passages=len(case.sample))
    return [published, encoded, *rows], checks


def _encode(engine: Reranker, case: NanoCase) -> tuple[Spread, list[PassageStates]]:
    made: list[PassageStates] = []
    spread = measure(
        lambda: made.extend(engine.encode(case.sample, show_progress=False)),
        1,
        engine.backbone.device,
        warm_up=lambda: engine.encode(case.sample[:2]),
    )
    return spread, made


def _ways(query: Query, dtype: str, case: NanoCase, tokens: int, wanted: torch.Tensor) -> tuple[list[Row], list[Check]]:
    """Rows and checks of each way to decode: as it comes, and behind prompt beginnings that were kept."""
    rows: list[Row] = []
    checks: list[Check] = []
    cache = cast("T5Gemma2Backbone", query.engine.backbone).prefix_cache
    size = query.engine.layout().payload_bytes(tokens)
    for name, what, held in (("stored", "stored", 0), ("prefix", "prefix kept", CPU_CACHE_BYTES)):
        cache.resize(held)
        if held:
            query.after(prompt_of(case.prompt, seed=5))  # another query under the same instructions came before
        key = f"nano.{dtype}.{name}"
        timed = query_rows(key, case.group(dtype), what, query, case.repeats, size, baseline=f"nano.{dtype}.one_phase")
        if held:
            seen = cache.stats
            note = (
                f"an earlier query left {seen.entries} prompt beginnings, {seen.bytes / seen.entries / 1e6:.2f} MB each"
            )
            timed[-1] = replace(timed[-1], note=note)
        rows += timed
        worst = float((query.probabilities()[: len(wanted)] - wanted).abs().max())
        told = f"Nano shape, {dtype}: {what} and the published protocol, {len(wanted)} passages"
        checks.append(Check(key=key, what=told, worst=worst, allowed=ALLOWED[dtype]))
    cache.resize(0)
    return rows, checks


def _published(folder: Path, dtype: str, device: torch.device, case: NanoCase) -> tuple[Row, torch.Tensor]:
    """The protocol's row, and P(yes) of the passages it scored."""
    reference = Reference(folder, device, parse_dtype(dtype, device))
    query, told = prompt_of(case.prompt)
    margins: list[torch.Tensor] = []

    def score(texts: Sequence[str]) -> None:
        margins.append(reference.margins(query, texts, told, ratio=case.ratio, batch=case.batch))

    spread = measure(lambda: score(case.sample), 1, device, warm_up=lambda: score(case.sample[:2]))
    note = f"batches of {case.batch}"
    if len(case.sample) < case.candidates:
        whole = spread.p50 / len(case.sample) * case.candidates
        note = f"timed on {len(case.sample)}, by which {case.candidates} take {whole:.1f} s (--full times them all)"
    what = "one phase, published"
    row = row_of(
        f"nano.{dtype}.one_phase",
        case.group(dtype),
        what,
        "end to end",
        spread,
        passages=len(case.sample),
        note=note,
    )
    return row, margins[-1].double().sigmoid()
