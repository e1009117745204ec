"""The compression curve: quality, bytes and time at each ratio and codec, as a table and a plot.

States really pass through the codec: pooled, packed to bytes, unpacked, scored. matplotlib is in the extra ``plot``.
Letters: B passages, N pooled states, H width.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kalm_rag.errors import InputError, MissingDependencyError
from kalm_rag.evaluation.gather import EvalSet, Gathered, Library, as_retriever, check_ratios, gather, library_of
from kalm_rag.evaluation.metrics import best_first, mean, query_ndcg
from kalm_rag.evaluation.run import baselines
from kalm_rag.instructions import Instructions
from kalm_rag.models.backbone import Backbone, EmbeddingBackbone
from kalm_rag.states import DTYPES, Codec, Layout, PassageStates, pack_states, unpack_batch

RATIOS = (1, 2, 4, 8, 16, 32, 64)
PLOTS = (".svg", ".png", ".pdf")


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One ratio under one codec.

    Attributes:
        ratio: Tokens a state stands for.
        codec: How states are kept.
        ndcg_10: nDCG@10, mean over sets.
        bytes_per_passage: Payload of a candidate passage, mean over candidates, then over sets.
        milliseconds: Time from a query's stored bytes to its margins, disk aside: median over queries, mean over sets.
    """

    ratio: int
    codec: str
    ndcg_10: float
    bytes_per_passage: float
    milliseconds: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What `measure_curve` found.

    Attributes:
        model: Name of the model.
        sets: Names of the sets.
        queries: Queries of all sets.
        top_k: Most candidates of a query.
        retrieval: nDCG@10 of retrieval alone, mean over sets.
        fusion: nDCG@10 of BM25 fused with retrieval, mean over sets.
        points: By codec, then by rising ratio.
    """

    model: str
    sets: tuple[str, ...]
    queries: int
    top_k: int
    retrieval: float
    fusion: float
    points: tuple[CurvePoint, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-able."""
        return asdict(self)


def measure_curve(
    sets: Sequence[EvalSet],
    backbone: Backbone,
    *,
    retriever: EmbeddingBackbone | None = None,
    ratios: Sequence[int] = RATIOS,
    codecs: Sequence[str | Codec] = tuple(Codec),
    top_k: int = 50,
    max_queries: int | None = None,
    cache: Path | None = None,
) -> Curve:
    """Measure quality, bytes and time at each ratio and codec.

    Args:
        sets: BEIR sets, at least one.
        backbone: The model.
        retriever: The model whose vectors retrieve; None takes `backbone`.
        ratios: Pooling ratios, each a multiple of the smallest, whose states the others are pooled from.
        codecs: How states are kept.
        top_k: Candidates reranked.
        max_queries: Only the first so many queries of a set; None is all.
        cache: As in `kalm_rag.evaluation.evaluate`.

    Raises:
        InputError: If there are no sets or codecs, a folder is missing, or an argument is out of range.
        MissingDependencyError: If ir-measures or bm25s is not installed.
    """
    ratios, kinds = check_ratios(ratios), [Codec.parse(codec) for codec in codecs]
    if not sets or not kinds:
        raise InputError(f"{len(sets)} sets and {len(kinds)} codecs; wanted at least one of each.")
    searcher = as_retriever(backbone, retriever)
    layouts = [backbone.info.layout(ratio, codec) for codec in kinds for ratio in ratios]
    found: list[list[_Cell]] = []
    floors: list[list[float]] = []
    queries, most = 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = cache if cache is not None else Path(scratch)
        for what in sets:
            gathered = gather(
                what,
                searcher,
                top_k=top_k,
                max_queries=max_queries,
                ratio=ratios[0],
                folder=folder,
                keep=backbone.info.fingerprint == searcher.info.fingerprint,
            )
            library = library_of(backbone, gathered, searcher, ratios[0], folder)
            floors.append([_quality(gathered, one.scores) for one in baselines(gathered)])
            found.append([_measure(backbone, gathered, library, layout) for layout in layouts])
            queries, most = queries + len(gathered.rows), max(most, gathered.top_k)
    points = [
        CurvePoint(
            ratio=layout.ratio,
            codec=layout.codec.value,
            ndcg_10=mean([cells[place].ndcg for cells in found]),
            bytes_per_passage=mean([cells[place].size for cells in found]),
            milliseconds=mean([cells[place].milliseconds for cells in found]),
        )
        for place, layout in enumerate(layouts)
    ]
    return Curve(
        model=backbone.info.name,
        sets=tuple(one.name for one in sets),
        queries=queries,
        top_k=most,
        retrieval=mean([floor[0] for floor in floors]),
        fusion=mean([floor[2] for floor in floors]),
        points=tuple(points),
    )


def curve_table(curve: Curve) -> str:
    """One markdown table: a row a ratio, the columns of each codec side by side."""
    codecs = list(dict.fromkeys(point.codec for point in curve.points))
    by_cell = {(point.ratio, point.codec): point for point in curve.points}
    head = [f"{codec} {what}" for codec in codecs for what in ("nDCG@10", "bytes/passage", "ms/query")]
    lines = [
        f"{Path(curve.model).name}, mean of {len(curve.sets)} sets ({', '.join(curve.sets)}), {curve.queries} queries, "
        f"at most {curve.top_k} candidates. Retrieval alone {curve.retrieval:.4f}, BM25 + retrieval "
        f"{curve.fusion:.4f}. ms: a query's candidates, from stored bytes to margins, median.",
        "",
        f"| r | {' | '.join(head)} |",
        "|--:" * (len(head) + 1) + "|",
    ]
    for ratio in dict.fromkeys(point.ratio for point in curve.points):
        cells = [by_cell[ratio, codec] for codec in codecs]
        shown = [f"{one.ndcg_10:.4f} | {one.bytes_per_passage:,.0f} | {one.milliseconds:.1f}" for one in cells]
        lines.append(f"| {ratio} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def check_plot(path: Path) -> None:
    """Refuse a plot that can't be drawn, before anything is measured.

    Raises:
        InputError: If the file's ending is none of svg, png and pdf.
        MissingDependencyError: If matplotlib is not installed.
    """
    if path.suffix not in PLOTS:
        raise InputError(f"plot is {path.name!r}; wanted a file that ends in {', '.join(PLOTS)}.")
    try:
        importlib.import_module("matplotlib")
    except ImportError as err:
        raise MissingDependencyError(
            "drawing the curve needs the module matplotlib, which is not installed. Install the extra 'plot': "
            "pip install 'kalm-rag[plot]'."
        ) from err


def draw_curve(curve: Curve, path: Path) -> None:
    """Draw nDCG@10 against bytes per passage, and milliseconds against the ratio.

    Args:
        curve: What was measured.
        path: Where to; svg, png or pdf.

    Raises:
        InputError: As `check_plot`.
        MissingDependencyError: As `check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure  # no pyplot: no global state, no window

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    quality, speed = figure.subplots(1, 2, width_ratios=(3, 2))
    styles = {"bf16": ("#1f6fb4", "o", "-"), "int8": ("#d1622b", "s", "-"), "exact": ("#3a3a3a", "D", ":")}
    for codec in dict.fromkeys(point.codec for point in curve.points):
        own = [point for point in curve.points if point.codec == codec]
        colour, marker, line = styles[codec]
        look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "label": codec}
        if codec == "exact":  # often the same bytes as bf16: a ring around its marks
            look |= {"markerfacecolor": "none", "markersize": 9, "linewidth": 1}
        quality.plot([p.bytes_per_passage for p in own], [p.ndcg_10 for p in own], **look)
        speed.plot([p.ratio for p in own], [p.milliseconds for p in own], **look)
    for codec, shift in (("bf16", (8, -13)), ("int8", (-8, 8))):  # int8 lies above: less bytes at like quality
        for point in (p for p in curve.points if p.codec == codec):
            quality.annotate(
                f"r={point.ratio}",
                (point.bytes_per_passage, point.ndcg_10),
                textcoords="offset points",
                xytext=shift,
                ha="center",
                fontsize=8,
                color=styles[codec][0],
            )
    for level, name in ((curve.retrieval, "retrieval alone"), (curve.fusion, "BM25 + retrieval")):
        quality.axhline(level, color="#8a8a8a", linewidth=1, linestyle="--" if name.startswith("r") else "-.")
        quality.annotate(
            name,
            (0.995, level),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(0, 3),
            ha="right",
            fontsize=8,
            color="#6a6a6a",
        )
    _finish(curve, quality, speed)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


@dataclass(frozen=True)
class _Cell:
    """One ratio and codec on one set."""

    ndcg: float
    size: float
    milliseconds: float


def _finish(curve: Curve, quality: Any, speed: Any) -> None:  # noqa: ANN401 - axes of matplotlib
    ratios = list(dict.fromkeys(point.ratio for point in curve.points))
    sizes = sorted(point.bytes_per_passage for point in curve.points)
    steps = [2**power for power in range(int(np.floor(np.log2(sizes[0]))), int(np.ceil(np.log2(sizes[-1]))) + 1)]
    quality.set_xscale("log", base=2)
    quality.set_xticks(steps, [f"{step / 1024:g}k" if step >= 1024 else str(step) for step in steps])
    quality.set_xlabel("bytes per passage (k = 1024)")
    quality.set_ylabel("nDCG@10")
    quality.set_title(f"{Path(curve.model).name}: {', '.join(curve.sets)}", fontsize=10, loc="left", wrap=True)
    quality.margins(x=0.06, y=0.14)
    speed.set_xscale("log", base=2)
    speed.set_xticks(ratios, [str(ratio) for ratio in ratios])
    speed.set_xlabel("ratio r (tokens per state)")
    speed.set_ylabel(f"ms per query, {curve.top_k} candidates")
    speed.set_ylim(bottom=0)
    for axes in (quality, speed):
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.minorticks_off()
    speed.legend(frameon=False)


def _quality(gathered: Gathered, scores: Sequence[Tensor]) -> float:
    return mean(query_ndcg(gathered.found, best_first(gathered.rows, scores)))


def _measure(model: Backbone, gathered: Gathered, library: Library, layout: Layout) -> _Cell:
    """Score every query's candidates from bytes in one layout."""
    scores, spent, sizes = [], [], []
    bar = tqdm(gathered.queries, desc=f"r={layout.ratio} {layout.codec.value}", unit="query")
    for query, rows in zip(bar, gathered.rows, strict=True):
        payloads, tokens = _pack(library, rows.tolist(), layout)
        sizes += [len(payload) for payload in payloads]
        began = time.perf_counter()
        batch = unpack_batch(payloads, tokens, tokens, layout)
        placed = *batch.on(model.device, torch.float32), batch.token_ids_on(model.device)
        prompt = model.prompt(query, Instructions())
        scores.append(model.decode([prompt] * len(rows), *placed).float().cpu())
        spent.append(1000 * (time.perf_counter() - began))
    return _Cell(_quality(gathered, scores), mean(sizes), float(np.median(spent)))


def _pack(library: Library, rows: Sequence[int], layout: Layout) -> tuple[list[bytes], list[int]]:
    """Bytes of passages as a store of this layout holds them, and their tokens."""
    states, _, token_ids = library.batch(rows, layout.ratio, torch.device("cpu"))  # (B, N, H), (B, N, r)
    tokens = library.tokens[library.spots(rows)].tolist()
    payloads = [
        pack_states(
            PassageStates(
                vectors=one[: -(-size // layout.ratio)].to(DTYPES[layout.state_dtype]),
                tokens=size,
                total_tokens=size,
                ratio=layout.ratio,
                fingerprint=layout.fingerprint,
                key=str(row),
                token_ids=None if token_ids is None else token_ids[place].flatten()[:size],
            ),
            layout,
        )
        for place, (row, one, size) in enumerate(zip(rows, states, tokens, strict=True))
    ]
    return payloads, tokens
