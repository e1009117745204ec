"""The compression curve: quality, bytes and time at each ratio and codec, as a table and a plot.

States really pass through the codec: a store of each layout is filled, read and scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.evaluation.beir import EvalSet
from kalm_rag.evaluation.candidates import Candidates, StoredEngine, Workplace, check_ratios
from kalm_rag.evaluation.metrics import best_first, load_measures, mean, query_metrics
from kalm_rag.evaluation.plots import check_plot, new_figure, save, tidy
from kalm_rag.evaluation.report import Plain
from kalm_rag.evaluation.run import baselines
from kalm_rag.instructions import Instructions
from kalm_rag.states import DTYPES, Codec, Layout, passage_key, split_batch
from kalm_rag.store import open_store

RATIOS = (1, 2, 4, 8, 16, 32, 64)

_STYLES = {"bf16": ("#1f6fb4", "o", "-"), "int8": ("#d1622b", "s", "-"), "exact": ("#3a3a3a", "D", ":")}
"""Colour, marker and line of a codec."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One ratio under one codec; mean over sets."""

    ratio: int  # tokens a state stands for
    codec: str
    ndcg_10: float
    bytes_per_passage: float  # payload of a candidate passage
    milliseconds: float  # from a query's stored bytes to its order, disk aside: median over queries


@dataclass(frozen=True, kw_only=True)
class Curve(Plain):
    """What `measure_curve` found."""

    model: str
    sets: tuple[str, ...]
    queries: int  # of all sets
    top_k: int  # most candidates of a query
    retrieval: float  # nDCG@10 of retrieval alone, mean over sets
    fusion: float  # nDCG@10 of BM25 fused with retrieval, mean over sets
    points: tuple[CurvePoint, ...]  # by codec, then by rising ratio


def measure_curve(
    sets: Sequence[EvalSet],
    engine: Reranker,
    *,
    retriever: Reranker | None = None,
    ratios: Sequence[int] = RATIOS,
    codecs: Sequence[str | Codec] = tuple(Codec),
    top_k: int = 50,
    max_queries: int | None = None,
    cache: Path | None = None,
) -> Curve:
    """Measure quality, bytes and time at each ratio and codec; arguments are those of `kalm_rag.evaluation.evaluate`.

    Raises:
        InputError: If there are no sets or codecs, a folder is missing, or an argument is out of range.
        MissingDependencyError: If ir-measures or bm25s is not installed.
    """
    ratios, kinds = check_ratios(ratios), [Codec.parse(codec) for codec in codecs]
    if not sets or not kinds:
        raise InputError(f"{len(sets)} sets and {len(kinds)} codecs; wanted at least one of each.")
    layouts = [engine.info.layout(ratio, codec) for codec in kinds for ratio in ratios]
    cells: list[list[CurvePoint]] = []  # by set
    floors: list[list[float]] = []
    queries, most = 0, 0
    with Workplace.open(
        engine, retriever=retriever, ratio=ratios[0], top_k=top_k, max_queries=max_queries, cache=cache
    ) as place:
        for what in sets:
            candidates = place.find(what)
            floors.append([_quality(candidates, ranked.scores) for ranked in baselines(candidates)])
            with place.stored(engine) as reader:
                cells.append([_measure(reader, candidates, layout) for layout in layouts])
            queries, most = queries + len(candidates.rows), max(most, candidates.top_k)
    return Curve(
        model=engine.info.name,
        sets=tuple(what.name for what in sets),
        queries=queries,
        top_k=most,
        retrieval=mean([floor[0] for floor in floors]),
        fusion=mean([floor[2] for floor in floors]),
        points=tuple(_mean_point(points) for points in zip(*cells, strict=True)),
    )


def curve_table(curve: Curve) -> str:
    """One markdown table: a row per ratio, the columns of each codec side by side."""
    codecs = list(dict.fromkeys(point.codec for point in curve.points))
    head = [f"{codec} {what}" for codec in codecs for what in ("nDCG@10", "bytes/passage", "ms/query")]
    lines = [
        f"{Path(curve.model).name}, mean of {len(curve.sets)} sets ({', '.join(curve.sets)}), {curve.queries} queries, "
        f"at most {curve.top_k} candidates. Retrieval alone {curve.retrieval:.4f}, BM25 + retrieval "
        f"{curve.fusion:.4f}. ms: a query's candidates, from stored bytes to an order, median.",
        "",
        f"| r | {' | '.join(head)} |",
        "|--:" * (len(head) + 1) + "|",
    ]
    for ratio in dict.fromkeys(point.ratio for point in curve.points):
        own = [point for point in curve.points if point.ratio == ratio]  # in the order of the codecs
        shown = [f"{point.ndcg_10:.4f} | {point.bytes_per_passage:,.0f} | {point.milliseconds:.1f}" for point in own]
        lines.append(f"| {ratio} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def draw_curve(curve: Curve, path: Path) -> None:
    """Draw nDCG@10 against bytes per passage, and milliseconds against the ratio, into a svg, png or pdf.

    Raises:
        InputError: If the file's ending is another one.
        MissingDependencyError: If matplotlib is not installed.
    """
    check_plot(path)
    figure = new_figure(10, 4.2)
    quality, speed = figure.subplots(1, 2, width_ratios=(3, 2))
    for codec in dict.fromkeys(point.codec for point in curve.points):
        own = [point for point in curve.points if point.codec == codec]
        colour, marker, line = _STYLES[codec]
        look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5, "label": codec}
        if codec == "exact":  # often the same bytes as bf16: a ring around its marks
            look |= {"markerfacecolor": "none", "markersize": 9, "linewidth": 1}
        quality.plot([p.bytes_per_passage for p in own], [p.ndcg_10 for p in own], **look)
        speed.plot([p.ratio for p in own], [p.milliseconds for p in own], **look)
    _annotate(curve, quality)
    _label(curve, quality, speed)
    save(figure, path)


def _annotate(curve: Curve, quality: Any) -> None:  # noqa: ANN401 - axes of matplotlib
    """Write the ratios beside the points, and the floors as lines."""
    text = {"textcoords": "offset points", "fontsize": 8}
    for codec, shift in (("bf16", (8, -13)), ("int8", (-8, 8))):  # int8 lies above: less bytes at like quality
        for point in (p for p in curve.points if p.codec == codec):
            where = (point.bytes_per_passage, point.ndcg_10)
            quality.annotate(f"r={point.ratio}", where, xytext=shift, ha="center", color=_STYLES[codec][0], **text)
    for level, name, line in ((curve.retrieval, "retrieval alone", "--"), (curve.fusion, "BM25 + retrieval", "-.")):
        quality.axhline(level, color="#8a8a8a", linewidth=1, linestyle=line)
        look = {"xycoords": ("axes fraction", "data"), "ha": "right", "color": "#6a6a6a"}
        quality.annotate(name, (0.995, level), xytext=(0, 3), **look, **text)


def _label(curve: Curve, quality: Any, speed: Any) -> None:  # noqa: ANN401
    ratios = list(dict.fromkeys(point.ratio for point in curve.points))
    powers = np.log2([point.bytes_per_passage for point in curve.points])
    steps = [2**power for power in range(int(np.floor(powers.min())), int(np.ceil(powers.max())) + 1)]
    quality.set_xscale("log", base=2)
    quality.set_xticks(steps, [f"{step / 1024:g}k" if step >= 1024 else str(step) for step in steps])
    quality.set(xlabel="bytes per passage (k = 1024)", ylabel="nDCG@10")
    quality.set_title(f"{Path(curve.model).name}: {', '.join(curve.sets)}", fontsize=10, loc="left", wrap=True)
    quality.margins(x=0.06, y=0.14)
    speed.set_xscale("log", base=2)
    speed.set_xticks(ratios, [str(ratio) for ratio in ratios])
    speed.set(xlabel="ratio r (tokens per state)", ylabel=f"ms per query, {curve.top_k} candidates")
    speed.set_ylim(bottom=0)
    tidy(quality, speed)
    for axes in (quality, speed):
        axes.minorticks_off()
    speed.legend(frameon=False)


def _quality(candidates: Candidates, scores: Sequence[Tensor]) -> float:
    orders = best_first(candidates.rows, scores)
    return mean(query_metrics(candidates.found, orders, [load_measures().nDCG @ 10])[0])


def _measure(reader: StoredEngine, candidates: Candidates, layout: Layout) -> CurvePoint:
    """Fill a store of one layout with the candidates' states, and score every query from it."""
    texts = list(dict.fromkeys(text for own in candidates.texts for text in own))
    tokens: dict[str, int] = {}
    with open_store(":memory:", layout) as store:
        for part, found in reader.index(texts):
            pooled, _ = found.on(torch.device("cpu"), torch.float32, layout.ratio)  # (B, N, H)
            made = replace(found, vectors=pooled.to(DTYPES[layout.state_dtype]), ratio=layout.ratio)
            store.put_many(split_batch(made, [passage_key(text) for text in part]))
            tokens |= dict(zip(part, found.tokens.tolist(), strict=True))
        scored = StoredEngine(reader.engine, store).score(candidates, Instructions())
    return CurvePoint(
        ratio=layout.ratio,
        codec=layout.codec.value,
        ndcg_10=_quality(candidates, scored.margins),
        bytes_per_passage=mean([layout.payload_bytes(tokens[text]) for own in candidates.texts for text in own]),
        milliseconds=scored.milliseconds,
    )


def _mean_point(points: Sequence[CurvePoint]) -> CurvePoint:
    """One ratio and codec, mean over sets."""
    return replace(
        points[0],
        ndcg_10=mean([point.ndcg_10 for point in points]),
        bytes_per_passage=mean([point.bytes_per_passage for point in points]),
        milliseconds=mean([point.milliseconds for point in points]),
    )
