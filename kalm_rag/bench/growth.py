"""How cost grows: with the index, with candidates, with the length of passages and of prompts; and the law of each."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kalm_rag.bench.checkpoint import passage_of, prompt_of
from kalm_rag.bench.laws import Law, fit_law
from kalm_rag.bench.measuring import QUERY, Tell, measure, measure_stages, random_text, stretch_states
from kalm_rag.bench.pico import WORDS
from kalm_rag.bench.query import Query
from kalm_rag.bench.serving import FETCH_K, Filled
from kalm_rag.instructions import Instructions
from kalm_rag.reranker import Reranker
from kalm_rag.states import PassageStates
from kalm_rag.store import open_store


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
    """

    index: tuple[int, ...] = (1_000, 10_000, 100_000)
    candidates: tuple[int, ...] = (10, 25, 50, 100, 250, 500)
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    prompts: tuple[int, ...] = (40, 80, 160, 280, 400)
    few: int = 16
    repeats: int = 3


def measure_growth(folder: Path | None, dtype: str, device: torch.device, case: GrowthCase, tell: Tell) -> list[Law]:
    """Measure every law.

    Args:
        folder: A Nano-shaped checkpoint; None leaves its laws out.
        dtype: In which it runs.
        device: Where.
        case: Values tried.
        tell: Gets a line about what is measured now.
    """
    laws = index_laws(device, case, tell)
    tell("growth: pico, candidates")
    laws.append(pico_candidates(device, case.candidates, case.repeats))
    if folder is None:
        return laws
    with Reranker.from_pretrained(str(folder), device=device, dtype=dtype) as engine:
        laws += [
            nano_candidates(engine, case.candidates, case.repeats, tell),
            *nano_lengths(engine, case, tell),
            nano_prompts(engine, case, tell),
        ]
    return laws


def index_laws(device: torch.device, case: GrowthCase, tell: Tell) -> list[Law]:
    """Vector search, fetch and whole query over an index that grows."""
    series: dict[str, list[tuple[float, float]]] = {"search": [], "fetch": [], "total": []}
    with tempfile.TemporaryDirectory() as home:
        filled = Filled(Path(home), device)
        try:
            for size in sorted(case.index):
                filled.grow(size, tell)
                tell(f"growth: index of {size:,} passages")
                stages = filled.ask(filled.queries(10 * case.repeats))
                for name, points in series.items():
                    points.append((size, stages[name].p50))
        finally:
            filled.close()
    note = f"pico, made-up states and vectors, fetch_k={FETCH_K}"
    what = {"search": "Chroma's vector search", "fetch": "fetch of the states", "total": "a whole query"}
    return [fit_law(f"index.{name}", what[name], "passages in the index", series[name], note=note) for name in series]


def pico_candidates(device: torch.device, candidates: Sequence[int], repeats: int) -> Law:
    """Fetch and score of pico, by number of candidates."""
    with Reranker.from_pretrained("pico", device=device) as engine:
        few = engine.encode([random_text(WORDS, seed) for seed in range(16)], show_progress=False)
        points = _by_candidates(engine, few, (QUERY, Instructions()), candidates, repeats, lambda line: None)
    note = f"passages of about {few[0].tokens} tokens, r={few[0].ratio}"
    return fit_law("pico.candidates", "pico: fetch and score", "candidates", points, note=note)


def nano_candidates(engine: Reranker, candidates: Sequence[int], repeats: int, tell: Tell) -> Law:
    """Fetch and score of the Nano shape, by number of candidates."""
    few = engine.encode([passage_of(200, seed) for seed in range(4)], show_progress=False)
    points = _by_candidates(engine, few, prompt_of(80), candidates, repeats, tell)
    note = f"{_name(engine)}, passages of 200 tokens, r={engine.ratio}, prompt of 80"
    return fit_law("nano.candidates", "Nano shape: fetch and score", "candidates", points, note=note)


def nano_lengths(engine: Reranker, case: GrowthCase, tell: Tell) -> list[Law]:
    """Encoding and scoring of the Nano shape, by tokens a passage."""
    device = engine.backbone.device
    encoding: list[tuple[float, float]] = []
    scoring: list[tuple[float, float]] = []
    query, told = prompt_of(80)
    for tokens in case.lengths:
        tell(f"growth: Nano shape, passages of {tokens} tokens")
        few = [passage_of(tokens, seed) for seed in range(2)]
        made: list[PassageStates] = engine.encode(few, show_progress=False)
        encoding.append((tokens, measure(lambda: engine.encode(few), case.repeats, device).p50 / len(few)))  # noqa: B023
        states = [made[row % len(made)] for row in range(case.few)]
        scoring.append(
            (tokens, measure(lambda: engine.score(query, states, instructions=told), case.repeats, device).p50)  # noqa: B023
        )
    unit = "tokens a passage"
    note = f"{_name(engine)}, {case.few} passages, r={engine.ratio}, prompt of 80"
    return [
        fit_law(
            "nano.length.encode", "Nano shape: encode a passage", unit, encoding, note=f"{_name(engine)}, 2 at once"
        ),
        fit_law("nano.length.score", f"Nano shape: score {case.few}", unit, scoring, note=note),
    ]


def nano_prompts(engine: Reranker, case: GrowthCase, tell: Tell) -> Law:
    """Scoring of the Nano shape, by tokens of the prompt."""
    few = engine.encode([passage_of(200, seed) for seed in range(2)], show_progress=False)
    states = [few[row % len(few)] for row in range(case.few)]
    points = []
    for tokens in case.prompts:
        tell(f"growth: Nano shape, prompt of {tokens} tokens")
        query, told = prompt_of(tokens)
        spread = measure(
            lambda: engine.score(query, states, instructions=told),  # noqa: B023 - called before the next turn
            case.repeats,
            engine.backbone.device,
        )
        points.append((tokens, spread.p50))
    note = f"{_name(engine)}, {case.few} passages of 200 tokens, r={engine.ratio}"
    return fit_law("nano.prompt", f"Nano shape: score {case.few}", "tokens of the prompt", points, note=note)


def _by_candidates(
    engine: Reranker,
    few: Sequence[PassageStates],
    prompt: tuple[str, Instructions],
    candidates: Sequence[int],
    repeats: int,
    tell: Tell,
) -> list[tuple[float, float]]:
    """Pairs of candidates and median seconds of fetching and scoring them."""
    texts = [random_text(8, 10**8 + seed) for seed in range(max(candidates))]
    points: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as home, open_store(home, engine.layout()) as store:
        store.put_many(stretch_states(few, texts))
        for count in candidates:
            tell(f"growth: {engine.info.name}, {count} candidates")
            query = Query(engine, store, texts[:count], prompt)
            points.append((count, measure_stages(query, repeats, engine.backbone.device)["total"].p50))
    return points


def _name(engine: Reranker) -> str:
    return engine.info.dtype
