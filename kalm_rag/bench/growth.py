"""How cost grows: with the index, with candidates, with the length of passages and of prompts; and the law of each."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from kalm_rag.bench.checkpoint import passage_of, prompt_of
from kalm_rag.bench.laws import Law, fit_law
from kalm_rag.bench.measuring import QUERY, Tell, measure, random_text, stretch_states
from kalm_rag.bench.nano import open_nano
from kalm_rag.bench.pico import WORDS
from kalm_rag.bench.query import Query
from kalm_rag.bench.serving import FETCH_K, Filled
from kalm_rag.engine.reranker import Reranker
from kalm_rag.instructions import Instructions
from kalm_rag.states import PassageStates, batch_states
from kalm_rag.store import open_store

Points = list[tuple[float, float]]
"""Pairs of what grows and seconds."""


@dataclass(frozen=True, kw_only=True)
class GrowthCase:
    """Which values are tried.

    Attributes:
        index: Passages in the index.
        candidates: Passages of a query.
        lengths: Tokens a passage.
        prompts: Tokens of the prompt.
        few: Candidates where length or prompt grows.
        repeats: Timed runs of each value.
        clock: ``"wall"``, or ``"cpu"`` for CPU seconds, where the machine has other work.
    """

    index: tuple[int, ...] = (1_000, 10_000, 100_000)
    candidates: tuple[int, ...] = (10, 25, 50, 100, 200, 500)
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    prompts: tuple[int, ...] = (40, 80, 160, 280, 400)
    few: int = 16
    repeats: int = 3
    clock: str = "wall"


def measure_growth(folder: Path | None, dtype: str, device: torch.device, case: GrowthCase, tell: Tell) -> list[Law]:
    """Measure every law.

    Args:
        folder: A Nano-shaped checkpoint; None leaves its laws out.
        dtype: In which it runs.
        device: Where.
        case: Values tried.
        tell: Gets a line about what is measured now.
    """
    laws = [*index_laws(device, case, tell), pico_candidates(device, case, tell)]
    if folder is None:
        return laws
    with open_nano(folder, dtype, device) as engine:
        return [
            *laws,
            nano_candidates(engine, case, tell),
            *nano_lengths(engine, case, tell),
            nano_prompts(engine, case, tell),
        ]


def index_laws(device: torch.device, case: GrowthCase, tell: Tell) -> list[Law]:
    """Vector search, fetch and whole query over an index that grows."""
    series: dict[str, Points] = {"search": [], "fetch": [], "total": []}
    with tempfile.TemporaryDirectory() as home:
        filled = Filled(Path(home), device)
        try:
            for size in sorted(case.index):
                filled.grow(size, tell)
                tell(f"growth: index of {size:,} passages")
                for name, run in filled.parts().items():
                    series[name].append((size, measure(run, 10 * case.repeats, device).cost(case.clock)))
        finally:
            filled.close()
    note = f"pico, made-up states and vectors, {FETCH_K} candidates"
    what = {"search": "Chroma's vector search", "fetch": "fetch of the states", "total": "a whole query"}
    unit = "passages in the index"
    return [
        fit_law(f"index.{name}", what[name], unit, points, clock=case.clock, note=note)
        for name, points in series.items()
    ]


def pico_candidates(device: torch.device, case: GrowthCase, tell: Tell) -> Law:
    """Fetch and score of pico, by number of candidates."""
    with Reranker.from_pretrained("pico", device=device) as engine:
        few = engine.encode([random_text(WORDS, seed) for seed in range(16)], show_progress=False)
        points = _by_candidates(engine, few, (QUERY, Instructions()), case, tell)
    note = f"passages of about {few[0].tokens} tokens, r={few[0].ratio}"
    return fit_law("pico.candidates", "pico: fetch and score", "candidates", points, clock=case.clock, note=note)


def nano_candidates(engine: Reranker, case: GrowthCase, tell: Tell) -> Law:
    """Fetch and score of the Nano shape, by number of candidates."""
    few = engine.encode([passage_of(200, seed) for seed in range(4)], show_progress=False)
    points = _by_candidates(engine, few, prompt_of(80), case, tell)
    note = f"{engine.info.dtype}, passages of 200 tokens, r={engine.ratio}, prompt of 80"
    return fit_law("nano.candidates", "Nano shape: fetch and score", "candidates", points, clock=case.clock, note=note)


def nano_lengths(engine: Reranker, case: GrowthCase, tell: Tell) -> list[Law]:
    """Encoding and scoring of the Nano shape, by tokens a passage."""
    encoding: Points = []
    scoring: Points = []
    for tokens in case.lengths:
        tell(f"growth: Nano shape, passages of {tokens} tokens")
        texts = [passage_of(tokens, seed) for seed in range(2)]
        spread = measure(partial(engine.encode, texts, show_progress=False), case.repeats, engine.backbone.device)
        encoding.append((tokens, spread.cost(case.clock) / len(texts)))
        scoring.append((tokens, _score(engine, tokens, 80, case)))
    unit, dtype = "tokens a passage", engine.info.dtype
    note = f"{dtype}, r={engine.ratio}, prompt of 80"
    return [
        fit_law("nano.length.encode", "Nano shape: encode one of 2", unit, encoding, clock=case.clock, note=dtype),
        fit_law("nano.length.score", f"Nano shape: score {case.few}", unit, scoring, clock=case.clock, note=note),
    ]


def nano_prompts(engine: Reranker, case: GrowthCase, tell: Tell) -> Law:
    """Scoring of the Nano shape, by tokens of the prompt."""
    points: Points = []
    for tokens in case.prompts:
        tell(f"growth: Nano shape, prompt of {tokens} tokens")
        points.append((tokens, _score(engine, 200, tokens, case)))
    what, note = f"Nano shape: score {case.few}", f"{engine.info.dtype}, passages of 200 tokens, r={engine.ratio}"
    return fit_law("nano.prompt", what, "tokens of the prompt", points, clock=case.clock, note=note)


def _score(engine: Reranker, tokens: int, prompt: int, case: GrowthCase) -> float:
    """Seconds of scoring a few passages of so many tokens under a prompt of so many."""
    query, told = prompt_of(prompt)
    one = engine.encode([passage_of(tokens, 0)], show_progress=False)
    states = batch_states(stretch_states(one, map(str, range(case.few))))
    run = partial(engine.score, query, states, instructions=told)
    return measure(run, case.repeats, engine.backbone.device).cost(case.clock)


def _by_candidates(
    engine: Reranker, few: Sequence[PassageStates], prompt: tuple[str, Instructions], case: GrowthCase, tell: Tell
) -> Points:
    """Pairs of candidates and median seconds of fetching and scoring them."""
    texts = [random_text(8, 10**8 + seed) for seed in range(max(case.candidates))]
    points: Points = []
    with tempfile.TemporaryDirectory() as home, open_store(home, engine.layout()) as store:
        store.put_many(stretch_states(few, texts))
        for count in case.candidates:
            tell(f"growth: {engine.info.family}, {count} candidates")
            query = Query(engine, store, texts[:count], prompt)
            points.append((count, measure(query, case.repeats, engine.backbone.device).cost(case.clock)))
    return points
