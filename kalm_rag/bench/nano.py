"""KaLM-Reranker-V1-Nano's shape: queries over stored states against the published protocol, memory after loading.

Random weights, so only time, memory and equality of scores mean anything here.
"""

from __future__ import annotations

import subprocess
import sys
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
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import KalmRagError
from kalm_rag.models.devices import parse_dtype
from kalm_rag.models.prefix_cache import CPU_CACHE_BYTES
from kalm_rag.models.t5gemma2.backbone import T5Gemma2Backbone
from kalm_rag.states import PassageStates
from kalm_rag.store import open_store

ALLOWED = {"fp32": 1e-5, "bf16": 1e-2}
"""Difference of P(yes) between stored states and the published protocol that is still rounding."""

LEAST_CORRELATION = 0.97
"""Spearman's correlation that int8 weights keep with the published protocol's scores, at least."""

_LOADERS = {
    "whole": "from transformers import T5Gemma2ForConditionalGeneration as model\n"
    "held = model.from_pretrained(folder, dtype=dtype)",
    "text": "from kalm_rag import Reranker\nheld = Reranker.from_pretrained(folder, device='cpu', dtype=dtype)",
}
_REPORT = (
    "import sys\n"
    "from kalm_rag.bench.measuring import process_memory\n"
    "folder, dtype = sys.argv[1:]\n"
    "{load}\n"
    'sys.stdout.write(f\'{{process_memory("VmRSS")}} {{process_memory("VmHWM")}}\')\n'
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to decode."""

    key: str
    what: str  # its name for people
    cache_bytes: int = 0  # of prompt beginnings kept
    decoder_weights: str | None = None


WAYS = (
    Way(key="stored", what="stored"),
    Way(key="prefix", what="prefix kept", cache_bytes=CPU_CACHE_BYTES),
    Way(key="int8", what="int8 weights", decoder_weights="int8"),
    Way(key="int8_prefix", what="int8, prefix kept", decoder_weights="int8", cache_bytes=CPU_CACHE_BYTES),
)
"""Ways to decode over stored states; int8 weights are for the CPU."""


@dataclass(frozen=True, kw_only=True)
class NanoCase:
    """What is timed."""

    candidates: int = 100  # passages of a query
    tokens: int = 200  # per passage
    prompt: int = 80  # its tokens
    ratio: int = 4
    batch: int = 32  # passages that the published protocol takes at a time
    repeats: int = 3  # timed queries
    full: bool = False  # encode all candidates and run the protocol over all of them, instead of one batch

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


def open_nano(folder: Path, dtype: str, device: torch.device, way: Way = WAYS[0], ratio: int = 4) -> Reranker:
    """Load the checkpoint for one way to decode; by default nothing is kept, so that no query helps the next."""
    return Reranker.from_pretrained(
        str(folder),
        device=device,
        dtype=dtype,
        ratio=ratio,
        decoder_weights=way.decoder_weights,
        prefix_cache_bytes=way.cache_bytes,
    )


def bench_nano(folder: Path, dtype: str, device: torch.device, case: NanoCase) -> tuple[list[Row], list[Check]]:
    """Time a checkpoint of `checkpoint.save_checkpoint` in one dtype, ``"fp32"`` or ``"bf16"``.

    That is: the published protocol, encoding, and queries over stored states by stage.
    """
    published, wanted = _published(folder, dtype, device, case)
    with tempfile.TemporaryDirectory() as home:
        with open_nano(folder, dtype, device, ratio=case.ratio) as engine:
            encode, made = _encode(engine, case)
            layout = engine.layout()
        count, group = len(case.sample), case.group(dtype)
        rows = [published, row_of(f"nano.{dtype}.encode", "encode", "encode", encode, group=group, passages=count)]
        checks = []
        with open_store(home, layout) as store:
            store.put_many(stretch_states(made, case.texts))
            for way in WAYS if device.type == "cpu" else WAYS[:2]:
                with open_nano(folder, dtype, device, way, case.ratio) as engine:
                    query = Query(engine, store, case.texts, prompt_of(case.prompt))
                    rows += _way(query, way, dtype, case, layout.payload_bytes(made[0].tokens))
                    checks.append(_check(query.probabilities()[: len(wanted)], wanted, way, dtype))
    return rows, checks


def bench_loading(folder: Path, dtype: str) -> list[Row]:
    """Memory of a fresh process once the checkpoint is loaded: whole by transformers, and its text part by us.

    Raises:
        KalmRagError: If a process fails; its last words are in the message.
    """
    rows: list[Row] = []
    mapped = "; weights of the file's own dtype are mapped, and count once they are used" if dtype == "bf16" else ""
    long = str(parse_dtype(dtype, torch.device("cpu"))).removeprefix("torch.")
    for way, load in _LOADERS.items():
        command = [sys.executable, "-c", _REPORT.format(load=load), str(folder), long]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise KalmRagError(f"loading the checkpoint in a process of its own failed: {run.stderr.strip()[-500:]}")
        held, peak = run.stdout.split()
        if held == "None":  # only Linux tells
            return []
        rows.append(
            Row(
                key=f"nano.load.{dtype}.{way}",
                group=f"KaLM-Nano's shape, {dtype}: memory resident in a fresh process that loaded it",
                what=f"{way}, by {'transformers' if way == 'whole' else 'Reranker'}",
                stage="load",
                peak_bytes=int(held),
                baseline=rows[0].key if rows else None,
                note=f"at most {int(peak) / 1e6:,.0f} MB while loading{mapped}",
            )
        )
    return rows


def _encode(engine: Reranker, case: NanoCase) -> tuple[Spread, list[PassageStates]]:
    made: list[PassageStates] = []
    spread = measure(
        lambda: made.extend(engine.encode(case.sample, show_progress=False)),
        1,
        engine.backbone.device,
        warm_up=lambda: engine.encode(case.sample[:2]),
    )
    return spread, made


def _way(query: Query, way: Way, dtype: str, case: NanoCase, size: int) -> list[Row]:
    if way.cache_bytes:  # another query under the same instructions came before
        Query(query.engine, query.store, query.texts, prompt_of(case.prompt, seed=5))()
    group, baseline = case.group(dtype), f"nano.{dtype}.one_phase"
    rows = query_rows(f"nano.{dtype}.{way.key}", group, way.what, query, case.repeats, size, baseline=baseline)
    if way.cache_bytes:
        kept = cast("T5Gemma2Backbone", query.engine.backbone).prefix_cache.stats
        each = kept.bytes / max(kept.entries, 1) / 1e6
        rows[-1] = replace(rows[-1], note=f"an earlier query left {kept.entries} prompt beginnings of {each:.2f} MB")
    return rows


def _check(found: torch.Tensor, wanted: torch.Tensor, way: Way, dtype: str) -> Check:
    key, what = f"nano.{dtype}.{way.key}", f"Nano shape, {dtype}, {way.what}: {len(wanted)} passages"
    if way.decoder_weights is None:
        return Check(key=key, what=what, worst=float((found - wanted).abs().max()), allowed=ALLOWED[dtype])
    ranks = torch.stack([found, wanted]).argsort(1).argsort(1).double()
    lost = 1.0 - float(torch.corrcoef(ranks)[0, 1])
    return Check(key=key, what=what, worst=lost, allowed=1.0 - LEAST_CORRELATION, measure="1 - Spearman's correlation")


def _published(folder: Path, dtype: str, device: torch.device, case: NanoCase) -> tuple[Row, torch.Tensor]:
    """The protocol's row, and P(yes) of the passages it scored."""
    reference = Reference(folder, device, parse_dtype(dtype, device))
    query, told = prompt_of(case.prompt)
    margins: list[torch.Tensor] = []

    def score(texts: Sequence[str]) -> None:
        margins.append(reference.margins(query, texts, told, ratio=case.ratio, batch=case.batch))

    # every ratio hangs on it, and what else the machine does moves a run of 10 s by up to half
    spread = measure(lambda: score(case.sample), 3, device, warm_up=lambda: score(case.sample[:2]), enough=15)
    note, count = f"batches of {case.batch}", len(case.sample)
    if count < case.candidates:
        whole = spread.p50 / count * case.candidates
        note = f"timed on {count}, by which {case.candidates} take {whole:.1f} s (--full times them all)"
    named = (f"nano.{dtype}.one_phase", "one phase, published", "end to end")
    row = row_of(*named, spread, group=case.group(dtype), passages=count, note=note)
    return row, margins[-1].double().sigmoid()
