"""KaLM-Reranker-V1-Nano's shape: queries over stored states against the published one-phase protocol.

Random weights, so only time, memory and equality of scores mean anything here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kalm_rag.bench.checkpoint import Reference, passage_of, prompt_of
from kalm_rag.bench.measuring import measure, stretch_states
from kalm_rag.bench.query import Query, query_rows
from kalm_rag.bench.report import Check, Row, row_of
from kalm_rag.models.registry import parse_dtype
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


def bench_nano(folder: Path, dtype: str, device: torch.device, case: NanoCase) -> tuple[list[Row], list[Check]]:
    """Time one dtype: the published protocol, encoding, and queries over stored states by stage.

    Args:
        folder: What `checkpoint.save_checkpoint` wrote.
        dtype: ``"fp32"`` or ``"bf16"``.
        device: Where.
        case: Shapes.
    """
    key, group = f"nano.{dtype}", case.group(dtype)
    prompt = prompt_of(case.prompt)
    rows, wanted = _published(folder, dtype, device, case)
    with Reranker.from_pretrained(str(folder), device=device, dtype=dtype, ratio=case.ratio) as engine:
        made: list[PassageStates] = []
        encode = measure(
            lambda: made.extend(engine.encode(case.sample, show_progress=False)),
            1,
            device,
            warm_up=lambda: engine.encode(case.sample[:2]),
        )
        rows.append(row_of(f"{key}.encode", group, "encode", "encode", encode, passages=len(case.sample)))
        with tempfile.TemporaryDirectory() as home, open_store(home, engine.layout()) as store:
            texts = case.texts
            store.put_many(stretch_states(made, texts))
            size = engine.layout().payload_bytes(made[0].tokens)
            query = Query(engine, store, texts, prompt)
            rows += query_rows(key, group, "stored states", query, case.repeats, size, baseline=f"{key}.one_phase")
            worst = float((query.probabilities()[: len(wanted)] - wanted).abs().max())
    what = f"Nano shape, {dtype}: stored states and the published protocol, {len(wanted)} passages"
    return rows, [Check(key=f"{key}.stored", what=what, worst=worst, allowed=ALLOWED[dtype])]


def _published(folder: Path, dtype: str, device: torch.device, case: NanoCase) -> tuple[list[Row], torch.Tensor]:
    """The protocol's row, and P(yes) of the passages it scored."""
    reference = Reference(folder, device, parse_dtype(dtype, device))
    query, told = prompt_of(case.prompt)
    margins: list[torch.Tensor] = []

    def score(texts: Sequence[str]) -> None:
        margins.append(reference.margins(query, texts, told, ratio=case.ratio, batch=case.batch))

    spread = measure(lambda: score(case.sample), 1, device, warm_up=lambda: score(case.sample[:2]))
    note = ""
    if len(case.sample) < case.candidates:
        whole = spread.p50 / len(case.sample) * case.candidates
        note = f"timed on {len(case.sample)}, by which {case.candidates} take {whole:.1f} s (--full times them all)"
    what = f"published one-phase protocol, batches of {case.batch}"
    row = row_of(
        f"nano.{dtype}.one_phase",
        case.group(dtype),
        what,
        "end to end",
        spread,
        passages=len(case.sample),
        note=note,
    )
    return [row], margins[-1].double().sigmoid()
