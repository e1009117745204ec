"""How cost grows: with the index, with candidates, with the length of passages and of prompts; and the law of each.

    python notebooks/growth.py [--device cuda] [--dtype fp32] [--clock cpu] [--no-nano] [--plot growth.png]

A series of timings follows the simple formula (linear, logarithmic, power) with the least relative error; where it
departs from it is told. Takes up to a quarter of an hour; Nano's shape has random weights.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer

from kalm_rag import Instructions, Reranker, open_store
from kalm_rag.bench.checkpoint import passage_of, prompt_of, save_checkpoint
from kalm_rag.bench.measuring import QUERY, random_text, stretch_states
from kalm_rag.bench.nano import open_nano
from kalm_rag.bench.pico import WORDS
from kalm_rag.bench.query import Query
from kalm_rag.bench.serving import FETCH_K, Filled
from kalm_rag.models.devices import parse_device
from kalm_rag.states import PassageStates, batch_states, passage_key

Points = list[tuple[float, float]]
"""Pairs of what grows and median seconds."""

DEPARTS = 0.15
"""Share by which a point has to lie off a law to be named."""

SHAPES: dict[str, Callable[[float, float, Any], Any]] = {
    "linear": lambda a, b, n: a + b * n,
    "logarithmic": lambda a, b, n: a + b * np.log(n),
    "power": lambda a, b, n: a * n**b,
}


@dataclass(frozen=True, kw_only=True)
class Law:
    """How seconds grow with one variable.

    Attributes:
        what: What was timed.
        variable: What grows, with its unit.
        points: Pairs of variable and median seconds, ascending.
        kind: ``"linear"`` a + b n, ``"logarithmic"`` a + b ln n, or ``"power"`` a n^b.
        a: First coefficient, in seconds.
        b: Second one.
        exponent: Slope of log seconds over log n, all points: 1 is proportional, 0 constant.
    """

    what: str
    variable: str
    points: tuple[tuple[float, float], ...]
    kind: str
    a: float
    b: float
    exponent: float

    def predict(self, n: float) -> float:
        """Seconds that the law gives for one value."""
        return float(SHAPES[self.kind](self.a, self.b, n))

    @property
    def formula(self) -> str:
        """The law in milliseconds."""
        a, b = 1000 * self.a, 1000 * self.b
        if self.kind == "power":
            return f"{a:.3g} n^{self.b:.2f}"
        return f"{a:.3g} {'+' if b >= 0 else '-'} {abs(b):.3g} {'n' if self.kind == 'linear' else 'ln n'}"

    @property
    def departures(self) -> str:
        """Points that lie off the law by more than `DEPARTS`."""
        shares = [(n, seconds / self.predict(n) - 1) for n, seconds in self.points]
        off = [f"{100 * share:+.0f}% at {n:,.0f}" for n, share in shares if abs(share) > DEPARTS]
        return ", ".join(off) or f"nowhere by > {DEPARTS:.0%}"


def fit_law(what: str, variable: str, points: Sequence[tuple[float, float]]) -> Law:
    """Find the law that at least two points (all above 0) follow.

    Errors are relative, so that small values count like large ones. A linear or logarithmic law with a negative
    start or slope is no cost and is not considered (a power law always can be).
    """
    ordered = tuple(sorted((float(n), float(seconds)) for n, seconds in points))
    n, seconds = np.array(ordered, dtype=float).T
    logs, times = np.log(n), np.log(seconds)
    slope, start = np.polyfit(logs, times, 1)
    fits = {"power": (float(np.exp(start)), float(slope))}
    for kind, axis in (("linear", n), ("logarithmic", logs)):
        a, b = np.linalg.lstsq(np.stack([1 / seconds, axis / seconds], 1), np.ones_like(seconds), rcond=None)[0]
        if a >= -1e-6 * seconds.min() and b >= 0:  # a proportional law's start comes out as some rounding around 0
            fits[kind] = (max(float(a), 0.0), float(b))
    errors = {kind: float(np.mean((SHAPES[kind](a, b, n) / seconds - 1) ** 2)) for kind, (a, b) in fits.items()}
    kind = min(sorted(errors), key=lambda name: round(errors[name], 9))  # a tie goes to the linear one
    a, b = fits[kind]
    return Law(what=what, variable=variable, points=ordered, kind=kind, a=a, b=b, exponent=float(slope))


@dataclass(frozen=True, kw_only=True)
class Values:
    """What is tried: passages in the index, candidates, tokens per passage, tokens of the prompt."""

    index: tuple[int, ...] = (1_000, 10_000, 100_000)
    candidates: tuple[int, ...] = (10, 25, 50, 100, 200, 500)
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    prompts: tuple[int, ...] = (40, 80, 160, 280, 400)
    few: int = 16  # candidates where length or prompt grows


class Growth:
    """Measures series. `clock` is ``"wall"``, or ``"cpu"`` for CPU seconds of all threads on a busy machine."""

    def __init__(self, device: torch.device, values: Values, clock: str = "wall", least: float = 1.0) -> None:
        self.device, self.values, self.least = device, values, least
        self.timer = {"timer": time.process_time} if clock == "cpu" else {}

    def seconds(self, run: Callable[[], object]) -> float:
        """Median seconds of a run: repeated after a warm-up for at least `least` seconds."""
        watch = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads(), **self.timer)
        return float(watch.blocked_autorange(min_run_time=self.least).median)

    def laws(self, folder: Path | None, dtype: str) -> Iterator[Law]:
        """Every law; None as folder of a Nano-shaped checkpoint leaves its laws out."""
        yield from self.index()
        with Reranker.from_pretrained("pico", device=self.device) as engine:
            few = engine.encode([random_text(WORDS, seed) for seed in range(16)], show_progress=False)
            note = f"passages of about {few[0].tokens} tokens, r={few[0].ratio}"
            points = self.by_candidates(engine, few, (QUERY, Instructions()))
            yield fit_law(f"pico: fetch and score ({note})", "candidates", points)
        if folder is not None:
            with open_nano(folder, dtype, self.device) as engine:
                yield from self.nano(engine)

    def index(self) -> Iterator[Law]:
        """Vector search, fetch and whole query over an index that grows."""
        series: dict[str, Points] = {}
        with tempfile.TemporaryDirectory() as home:
            filled = Filled(Path(home), self.device)
            try:
                for size in sorted(self.values.index):
                    filled.grow(size, print)
                    for name, run in parts(filled).items():
                        series.setdefault(name, []).append((size, self.seconds(run)))
            finally:
                filled.close()
        what = {"search": "Chroma's vector search", "fetch": "fetch of the states", "total": "a whole query"}
        for name, points in series.items():
            yield fit_law(f"{what[name]} (pico, {FETCH_K} candidates)", "passages in the index", points)

    def nano(self, engine: Reranker) -> Iterator[Law]:
        """Nano's shape by candidates, by tokens per passage and by tokens of the prompt."""
        dtype, values = engine.info.dtype, self.values
        few = engine.encode([passage_of(200, seed) for seed in range(4)], show_progress=False)
        note = f"{dtype}, passages of 200 tokens, r={engine.ratio}"
        points = self.by_candidates(engine, few, prompt_of(80))
        yield fit_law(f"Nano shape: fetch and score ({note}, prompt of 80)", "candidates", points)
        encoding: Points = []
        for tokens in values.lengths:
            texts = [passage_of(tokens, seed) for seed in range(2)]
            run = partial(engine.encode, texts, show_progress=False)
            encoding.append((tokens, self.seconds(run) / len(texts)))
        yield fit_law(f"Nano shape: encode one of 2 ({dtype})", "tokens per passage", encoding)
        scoring = [(tokens, self.score(engine, tokens, 80)) for tokens in values.lengths]
        yield fit_law(f"Nano shape: score {values.few} ({dtype}, prompt of 80)", "tokens per passage", scoring)
        prompts = [(tokens, self.score(engine, 200, tokens)) for tokens in values.prompts]
        yield fit_law(f"Nano shape: score {values.few} ({note})", "tokens of the prompt", prompts)

    def score(self, engine: Reranker, tokens: int, prompt: int) -> float:
        """Seconds of scoring a few passages of so many tokens under a prompt of so many."""
        query, told = prompt_of(prompt)
        one = engine.encode([passage_of(tokens, 0)], show_progress=False)
        states = batch_states(stretch_states(one, map(str, range(self.values.few))))
        return self.seconds(partial(engine.score, query, states, instructions=told))

    def by_candidates(self, engine: Reranker, few: Sequence[PassageStates], prompt: tuple[str, Instructions]) -> Points:
        """Pairs of candidates and median seconds of fetching and scoring them."""
        texts = [random_text(8, 10**8 + seed) for seed in range(max(self.values.candidates))]
        with tempfile.TemporaryDirectory() as home, open_store(home, engine.layout()) as store:
            store.put_many(stretch_states(few, texts))
            return [(n, self.seconds(Query(engine, store, texts[:n], prompt))) for n in self.values.candidates]


def parts(filled: Filled) -> dict[str, Callable[[], object]]:
    """A vector search, a fetch and a whole query over an index, each of another question at every call."""
    index, questions = filled.index, filled.queries(32)
    asked, vectors = cycle(questions), cycle([index.embedder.query(text) for text in questions])
    draws, count = random.Random(0), min(FETCH_K, len(index))
    keys = [passage_key(random_text(filled.words, seed)) for seed in range(len(index))]
    return {
        "search": lambda: index.collection.query(query_embeddings=[next(vectors)], n_results=count),
        "fetch": lambda: index.store.get_many(draws.sample(keys, count)),
        "total": lambda: index.query(next(asked), fetch_k=FETCH_K),
    }


def draw(path: Path, laws: Sequence[Law]) -> None:
    """Draw each law's points and line (needs matplotlib)."""
    from matplotlib.figure import Figure

    lines = -(-len(laws) // 2)
    figure = Figure(figsize=(11, 3.4 * lines), layout="constrained")
    grid = list(figure.subplots(lines, 2, squeeze=False).flat)
    for axes, law in zip(grid, laws, strict=False):
        n, seconds = zip(*law.points, strict=True)
        line = np.geomspace(n[0], n[-1], 60)
        axes.plot(n, [1000 * one for one in seconds], "o", color="#1f6fb4")
        label = f"{law.formula}, exponent {law.exponent:.2f}"
        axes.plot(line, [1000 * law.predict(one) for one in line], color="#1f6fb4", linewidth=1, label=label)
        axes.set(xlabel=law.variable, ylabel="ms", xscale="log", yscale="log")
        axes.set_title(law.what, fontsize="medium")
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.legend(fontsize="small")
    for axes in grid[len(laws) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Read the command line, measure, print a markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", help="cpu, cuda or cuda:1")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"), help="of Nano's shape")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu on a busy machine")
    parser.add_argument("--no-nano", action="store_true", help="leave Nano's shape out (3 GB)")
    parser.add_argument("--plot", type=Path, help="where a picture goes")
    given = parser.parse_args()
    growth = Growth(parse_device(given.device), Values(), given.clock)
    laws = []
    print("| what | grows with | ms | law, ms | exponent | departs |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as home:
        folder = None if given.no_nano else save_checkpoint(Path(home))
        for law in growth.laws(folder, given.dtype):
            points = ", ".join(f"{n:,.0f}: {1000 * seconds:.3g}" for n, seconds in law.points)
            shown = (law.what, law.variable, points, law.formula, f"{law.exponent:.2f}", law.departures)
            print(f"| {' | '.join(shown)} |", flush=True)
            laws.append(law)
    if given.plot is not None:
        draw(given.plot, laws)


if __name__ == "__main__":
    main()
