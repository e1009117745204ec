"""A T5Gemma 2 learns from labelled queries: a tiny seeded one, on a made-up collection where topics are matched."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from checkpoints import save_tiny
from safetensors.torch import load_file
from transformers import T5Gemma2ForConditionalGeneration
from typer.testing import CliRunner

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, KalmRagError, ModelError
from kalm_rag.instructions import Instructions
from kalm_rag.models.files import digest_files
from kalm_rag.models.t5gemma2.backbone import T5Gemma2Backbone
from kalm_rag.states.pooling import mean_groups

pytest.importorskip("bm25s", reason="candidate lists need BM25 (extra 'eval')")

from kalm_rag.training.adapt import adapt
from kalm_rag.training.batches import Batch
from kalm_rag.training.checkpoint import save_checkpoint
from kalm_rag.training.config import AdaptConfig
from kalm_rag.training.learner import Learner
from kalm_rag.training.lists import DEV_DEPTH, CandidateLists, bundled_retriever, load_lists
from kalm_rag.training.losses import mean_ndcg
from kalm_rag.training.mining import margins_of, mine
from kalm_rag.training.report import TrainReport

RATIOS = (1, 2, 4, 8, 16, 32)
STEER = Instructions(system="?", task="?", system_mode="replace")  # short prompts: the tiny tokenizer reads bytes
WORDS = {"z": "zap zoo zig zoom", "q": "quip quiz quid quo"}
NAMES = ("ant", "bee", "cow", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kid", "lynx")


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """One thread: tensors this small are slower with more. The retriever's model stays loaded from run to run."""
    before, dense = torch.get_num_threads(), bundled_retriever(torch.device("cpu"))
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    if dense is not None:
        dense.close()


def write_folder(folder: Path, splits: dict[str, list[int]]) -> Path:
    """24 passages on two topics by turns, 24 queries that name one of them; a query's topic is what is relevant."""
    (folder / "qrels").mkdir(parents=True)
    rng, corpus = random.Random(0), []
    for i in range(24):
        words = WORDS["zq"[i % 2]].split()
        rng.shuffle(words)
        corpus.append({"_id": f"d{i}", "text": " ".join(words * 2)})
    queries = [{"_id": f"q{i}", "text": f"{NAMES[i // 2]} {'zq'[i % 2] * 3}"} for i in range(24)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    for split, rows in splits.items():
        labels = "".join(f"q{i}\td{j}\t{int(j % 2 == i % 2)}\n" for i in rows for j in range(24))
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + labels)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "toy", {"train": list(range(20)), "dev": list(range(20, 24))})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "base")


def config(**changes: object) -> AdaptConfig:
    usual = {"stage": "general", "dev_split": "dev", "dev_queries": 2, "steps": 2, "lists": 3, "candidates": 4}
    return AdaptConfig(**usual | {"learning_rate": 5e-3, "instructions": STEER} | changes)


@pytest.fixture(scope="module")
def learnt(toy, base, tmp_path_factory) -> TrainReport:
    out = tmp_path_factory.mktemp("out") / "adapted"
    (report,) = adapt(base, toy, out, config=config(steps=60, lists=4, snapshots=3, dev_queries=4), device="cpu")
    return report


@pytest.fixture
def lists(toy) -> CandidateLists:
    used, _ = load_lists(toy, AdaptConfig(dev_split="dev", instructions=STEER))
    return used[0]


def load(folder: Path) -> T5Gemma2Backbone:
    return T5Gemma2Backbone.load(
        folder, name="tiny", revision="local", device=torch.device("cpu"), dtype=torch.float32, weights="test"
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


def same_weights(one: Path, two: Path) -> float:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def test_loss_falls_and_every_ratio_is_learnt(learnt):
    assert learnt.steps == len(learnt.losses) == 60
    assert sum(learnt.losses[-10:]) < 0.3 * sum(learnt.losses[:10])
    assert [row.ratio for row in learnt.dev] == list(RATIOS)
    for row in learnt.dev:
        assert row.after > 0.9, row
        assert row.after > row.before + 0.05, row
    assert not learnt.fell
    assert set(learnt.curve) == {15, 30, 45}
    written = json.loads((learnt.folder / "train.json").read_text())
    assert written["losses"] == learnt.losses
    assert written["settings"]["steps"] == 60
    assert written["peak_bytes"] > 1e8
    assert {"read", "measure", "learn"} <= set(written["seconds"])


def test_result_is_the_whole_checkpoint_for_transformers_too(learnt, base):
    model, report = T5Gemma2ForConditionalGeneration.from_pretrained(learnt.folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    old, new = weights(base), weights(learnt.folder)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    kept = {name for name in old if "vision_tower" in name or "projector" in name}
    assert kept
    assert not changed & kept
    text = {name for name in old if name not in kept and "eoi_embedding" not in name}
    assert changed >= text
    assert {file.name for file in base.iterdir()} | {"train.json"} == {file.name for file in learnt.folder.iterdir()}
    states = model.get_encoder()(torch.tensor([[5, 6, 7]])).last_hidden_state
    with Reranker.from_pretrained(str(learnt.folder), device="cpu") as engine:
        assert torch.allclose(engine.backbone.encode([[5, 6, 7]])[0], states, atol=1e-5)


def test_loaded_result_scores_as_it_was_measured_and_has_its_own_states(learnt, base, toy):
    _, held = load_lists(toy, AdaptConfig(dev_split="dev", dev_queries=4, instructions=STEER))
    with Reranker.from_pretrained(str(learnt.folder), device="cpu", ratio=1) as engine:
        found = margins_of(engine, held[0], RATIOS, what="again")
        assert [mean_ndcg(found[r], held[0].gold, held[0].relevant) for r in RATIOS] == [r.after for r in learnt.dev]
        good = engine.predict(
            [("ox zzz", "zoo zap"), ("ox zzz", "quid quo"), ("ox qqq", "zoo zap")], instructions=STEER
        )
        with Reranker.from_pretrained(str(base), device="cpu") as before:
            assert engine.info.fingerprint != before.info.fingerprint
    assert good[0] > 0.5 > max(good[1:])  # P(yes) is about the pair, not only about the order


def test_training_path_is_the_scoring_path(base, lists, tmp_path):
    """What is learnt on equals what is scored, and what is saved equals what was learnt."""
    backbone = load(base)
    learner = Learner(backbone, [lists], None, config(), bf16=False)
    learner.run(None, lambda step: None)
    columns = [0, 3, 5]
    for ratio in RATIOS:
        trained = learner.margins(Batch(lists=lists, rows=[2, 4], picks=[columns, columns]), ratio).detach()
        (folder := tmp_path / str(ratio)).mkdir()
        save_checkpoint(base, folder, backbone.model.state_dict())
        with Reranker.from_pretrained(str(folder), device="cpu", ratio=ratio) as engine:
            scored = [
                engine.score(lists.queries[r], engine.encode(lists.texts(r, columns)), instructions=STEER)
                for r in (2, 4)
            ]
        assert trained.tolist() == [pytest.approx([one.margin for one in row], abs=1e-5) for row in scored]


@pytest.mark.parametrize("ratio", [1, 32])
def test_gradients_reach_every_weight(base, ratio):
    backbone = load(base)
    ids = [one.ids for one in backbone.tokenize(["zoo zap", "quid"])]
    states, counts = mean_groups(*backbone.read(ids), ratio)
    margins = backbone.judge([backbone.prompt("zzz?", STEER)] * 2, states, counts)
    with torch.inference_mode():  # scoring goes by a forward of its own
        scored = backbone.decode([backbone.prompt("zzz?", STEER)] * 2, states, counts)
    torch.testing.assert_close(margins.detach(), scored.clone(), atol=1e-5, rtol=1e-5)
    (margins[0] - margins[1]).backward()
    without = {n for n, p in backbone.model.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0}
    assert without <= {"model.encoder.text_model.embed_tokens.eoi_embedding"}  # no image in these texts


def test_same_seed_same_weights_and_parts_of_a_batch_sum_up(base, toy, tmp_path):
    runs = {"one": {}, "two": {}, "parts": {"accumulate": 3}, "slim": {"checkpointing": True}, "other": {"seed": 1}}
    before = digest_files(sorted(base.iterdir()))
    for name, changes in runs.items():
        adapt(base, toy, tmp_path / name, config=config(ratios=(4,), **changes), device="cpu")
    assert same_weights(tmp_path / "one", tmp_path / "two") == 0
    assert same_weights(tmp_path / "one", tmp_path / "slim") < 1e-5
    assert same_weights(tmp_path / "one", tmp_path / "parts") < 1e-4
    assert same_weights(tmp_path / "one", tmp_path / "other") > 1e-3
    assert digest_files(sorted(base.iterdir())) == before


def test_all_stages_are_the_stages_one_after_another(base, toy, tmp_path):
    settings = {"ratios": (4,), "slack": 1.0, "teacher": "self"}
    reports = adapt(base, toy, tmp_path / "all", config=config(stage="all", **settings), device="cpu")
    assert [(one.stage, one.folder.name) for one in reports] == [
        ("general", "all.general"),
        ("hard", "all.hard"),
        ("distil", "all"),
    ]
    assert reports[1].mined["hard"] > 0
    assert reports[1].mined["dropped"] > 0
    for start, stage, end in (("all.general", "hard", "all.hard"), ("all.hard", "distil", "all")):
        adapt(tmp_path / start, toy, tmp_path / stage, config=config(stage=stage, **settings), device="cpu")
        assert same_weights(tmp_path / stage, tmp_path / end) == 0
        assert same_weights(tmp_path / stage, tmp_path / start) > 0


def test_distillation_follows_the_teacher(base, toy, tmp_path, learnt):
    """A teacher that knows the topic is learnt from without one label."""
    settings = config(
        stage="distil",
        distil=1.0,
        anchor=0,
        steps=40,
        lists=4,
        snapshots=2,
        dev_queries=4,
        teacher=str(learnt.folder),
        ratios=(4,),
    )
    (report,) = adapt(base, toy, tmp_path / "out", config=settings, device="cpu")
    assert sum(report.losses[-10:]) < 0.3 * sum(report.losses[:10])
    assert report.dev[0].after > max(0.9, report.dev[0].before)


def test_low_rank_updates_are_folded_in(base, toy, tmp_path):
    (report,) = adapt(base, toy, tmp_path / "out", config=config(lora=4, steps=3, snapshots=2), device="cpu")
    old, new = weights(base), weights(report.folder)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    matrices = {name for name in old if ".layers." in name and old[name].ndim == 2 and "vision" not in name}
    assert changed == matrices
    name = "model.decoder.layers.1.mlp.up_proj.weight"
    assert (
        int(torch.linalg.matrix_rank(new[name] - old[name], atol=1e-5)) <= 2 * 4
    )  # two checkpoints of rank 4 averaged


def test_average_is_the_mean_of_the_late_checkpoints(base, lists):
    backbone, seen = load(base), []
    learner = Learner(backbone, [lists], None, config(steps=4, snapshots=2), bf16=False)
    learner.solver.optimiser.register_step_post_hook(
        lambda *_: seen.append(backbone.model.model.decoder.norm.weight.detach().clone())
    )
    learner.run(None, lambda step: None)
    assert torch.allclose(backbone.model.model.decoder.norm.weight, (seen[2] + seen[3]) / 2)  # after 3/4 and 4/4
    assert not torch.allclose(seen[2], seen[3])


def test_bfloat16_and_shards_are_kept_and_figures_are_of_what_is_saved(toy, tmp_path):
    model = T5Gemma2ForConditionalGeneration.from_pretrained(save_tiny(tmp_path / "fp32")).bfloat16()
    model.save_pretrained(tmp_path / "base", max_shard_size="10KB")
    for file in (tmp_path / "fp32").glob("tokenizer*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    (report,) = adapt(tmp_path / "base", toy, tmp_path / "out", config=config(), device="cpu", dtype="bf16")
    assert len(list(report.folder.glob("*.safetensors"))) > 1
    assert {one.dtype for one in weights(report.folder).values()} == {torch.bfloat16}
    assert report.settings["bf16"] is True
    (again,) = adapt(report.folder, toy, tmp_path / "again", config=config(), device="cpu", dtype="bf16")
    assert [row.before for row in again.dev] == [row.after for row in report.dev]


def test_denoising_by_hand():
    passages = ["the red fox", "the red fox runs", "the Red, fox!", "a blue whale", "a green frog", "a grey cat"]
    lists = CandidateLists(
        name="hand",
        passages=passages,
        queries=["fox"],
        instructions=[STEER],
        candidates=torch.tensor([[0, 1, 2, 3, 4, 5]]),
        depth=5,
        gold=torch.tensor([[1.0, 0, 0, 0, 0, 0]]),
        teacher=torch.zeros(1, 6),
        relevant=[1],
    )
    # relevant at 2.0, slack 0.5: dropped above 1.5 (column 3), and a copy of the relevant one (2; column 1 shares 3 of
    # 4 words, below 0.8); hard are the rest from the highest margin down, 5 too: a random passage, not a retrieved one
    (found,) = mine(lists, torch.tensor([[2.0, 0.5, 1.0, 1.6, 1.5, 1.9]]), 0.5)
    assert found.dropped == {3, 2}
    assert found.hard == [5, 4, 1]


def test_dropped_candidates_are_never_drawn_and_hard_ones_are(base, lists):
    negatives = (lists.gold[0] == 0).nonzero().flatten().tolist()
    margins = lists.gold - 0.01 * torch.arange(
        lists.gold.shape[1]
    )  # relevant ones first, each other one below the last
    margins[0, negatives[3]] = 5.0
    mined = mine(lists, margins, 0.5)
    assert mined[0].dropped == {negatives[3]}
    assert mined[0].hard == negatives[:3] + negatives[4:]
    mined[0] = dataclasses.replace(mined[0], hard=negatives[:2])
    learner = Learner(load(base), [lists], [mined], config(candidates=8), bf16=False)
    draws = [learner.batches.columns(0, 0) for _ in range(40)]
    assert all(len(one) == 8 for one in draws)
    assert negatives[3] not in {column for one in draws for column in one}
    assert all(set(negatives[:2]) <= set(one) for one in draws)
    assert all(1 <= sum(float(lists.gold[0, c]) for c in one) <= 2 for one in draws)


def test_lists_hold_the_relevant_and_keep_dev_apart(toy, tmp_path):
    folder = write_folder(tmp_path / "both" / "one", {"train": list(range(24))})
    write_folder(tmp_path / "both" / "two", {"train": list(range(12)), "test": [13]})
    used, held = load_lists(tmp_path / "both", AdaptConfig(instructions=STEER))
    assert [one.name for one in used] == ["one", "two"]
    assert [(len(u.queries), len(h.queries)) for u, h in zip(used, held, strict=True)] == [(22, 2), (11, 1)]
    assert not set(used[0].queries) & set(held[0].queries)
    again, held_again = load_lists(folder, AdaptConfig(instructions=STEER, seed=5, steps=1, lists=4))
    assert held_again[0].queries == held[0].queries  # whatever the seed
    assert len(again[0].queries) == 4
    one = used[0]
    assert one.candidates.shape == (22, 24)
    assert all(len(set(row)) == 24 for row in one.candidates.tolist())
    assert bool((one.gold.sum(1) == 12).all())
    assert held[0].candidates.shape[1] == min(DEV_DEPTH, 24)
    assert float(one.teacher.mean(1).abs().max()) < 1e-4


def test_instructions_of_a_folder_are_its_tasks(tmp_path):
    folder = write_folder(tmp_path / "told", {"train": list(range(24))})
    rows = [{"_id": f"q{i}", "instruction": f"task {i}", "query": f"query {i}"} for i in range(24)]
    (folder / "instructions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    used, _ = load_lists(folder, AdaptConfig(instructions=STEER))
    for query, steer in zip(used[0].queries, used[0].instructions, strict=True):
        assert steer == dataclasses.replace(STEER, task=query.replace("query", "task"))


def test_failures_leave_nothing_behind(base, toy, tmp_path):
    with pytest.raises(KalmRagError, match=r"after 1 steps .* not finite; nothing was written. Lower the learning"):
        adapt(base, toy, tmp_path / "out", config=config(learning_rate=1e30), device="cpu")
    assert list(tmp_path.iterdir()) == []
    backbone = load(base)
    learner = Learner(backbone, [load_lists(toy, AdaptConfig())[0][0]], None, config(), bf16=False)
    norm = backbone.model.model.decoder.norm.weight
    norm.data[0] = float("nan")
    with pytest.raises(KalmRagError, match=r"the loss is nan; nothing was written. Lower the learning"):
        learner.run(None, print)

    def full(ids: object) -> None:
        raise torch.OutOfMemoryError

    backbone.read = full  # type: ignore[method-assign]
    with pytest.raises(KalmRagError, match=r"ran out of memory at 3 lists of 4 passages.*Raise accumulate"):
        learner.run(None, lambda step: None)


def test_time_limit_still_gives_a_checkpoint(base, toy, tmp_path):
    (report,) = adapt(base, toy, tmp_path / "out", config=config(), minutes=0, device="cpu")
    assert report.steps == 0
    assert same_weights(base, report.folder) == 0


def test_what_cannot_work_is_refused_by_name(base, toy, tmp_path):
    out = tmp_path / "out"

    def run(model: object = base, data: Path = toy, to: Path = out, **changes: object) -> None:
        adapt(model, data, to, config=config(**changes), device="cpu")

    with pytest.raises(InputError, match="float16; such a model overflows"):
        adapt(base, toy, out, config=config(), dtype="fp16", device="cpu")
    with pytest.raises(InputError, match="is not empty"):
        run(to=base)
    with pytest.raises(InputError, match="base is 'pico'"):
        run("pico")
    with pytest.raises(ModelError, match="no model named 'nowhere'"):
        run("nowhere")
    with pytest.raises(ModelError, match=r"has no \.safetensors"):
        run(toy)
    with pytest.raises(InputError, match="is not a folder"):
        run(data=tmp_path / "nowhere")
    with pytest.raises(InputError, match="is no BEIR folder and holds none"):
        run(data=tmp_path)
    with pytest.raises(InputError, match=r"no split 'test'.*found dev, train"):
        run(split="test")
    with pytest.raises(InputError, match="none of the 1 BEIR folders"):
        run(data=toy.parent, split="test")
    with pytest.raises(InputError, match="stage is 'best'"):
        run(stage="best")
    with pytest.raises(InputError, match="steps is 0"):
        run(steps=0)
    with pytest.raises(InputError, match="learning_rate=-1"):
        run(learning_rate=-1)
    with pytest.raises(InputError, match="multiples of the smallest"):
        run(ratios=(2, 3))
    unlabelled = write_folder(tmp_path / "data" / "unlabelled", {"train": []})
    with pytest.raises(InputError, match="judges no query"):
        run(data=unlabelled)
    (unlabelled / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    with pytest.raises(InputError, match="of which 0 are left"):
        run(data=unlabelled, dev_split=None)
    assert not out.exists()


def test_command_line(base, toy, tmp_path):
    from kalm_rag.cli import app

    args = ["train", "--base", str(base), "--data", str(toy), "--out", str(tmp_path / "out"), "--stage", "general"]
    args += ["--steps", "1", "--task", "?", "--dev-split", "dev", "--device", "cpu"]
    run = CliRunner().invoke(app, [*args, "--plot", str(tmp_path / "losses.txt")])
    assert run.exit_code == 1
    assert "wanted a file that ends in" in " ".join(run.output.split())
    assert not (tmp_path / "out").exists()
    plot = ["--plot", str(tmp_path / "plots" / "losses.svg")] if find_spec("matplotlib") else []
    run = CliRunner().invoke(app, [*args, *plot])
    assert run.exit_code == 0, run.output
    if plot:
        assert "general, 1 steps" in re.sub(r"<!-- | -->", "", Path(plot[1]).read_text())
    assert "general: 1 steps" in run.output
    assert json.loads((tmp_path / "out" / "train.json").read_text())["settings"]["instructions"]["task"] == "?"
    run = CliRunner().invoke(app, ["train", "--data", str(toy), "--out", str(tmp_path / "x"), "--stage", "hard"])
    assert run.exit_code == 1
    assert "stage given for pico, whose recipe has its own" in " ".join(run.output.split())
    run = CliRunner().invoke(app, ["train", "--data", str(toy), "--out", str(tmp_path / "x"), "--lora", "4"])
    assert run.exit_code == 1
    assert "lora given for pico" in " ".join(run.output.split())
