"""Evaluation on a tiny collection whose metrics are worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from kalm_rag import evaluation
from kalm_rag.beir import load_collection
from kalm_rag.errors import InputError, MissingDependencyError
from kalm_rag.evaluation import evaluate, paired_interval
from kalm_rag.instructions import Instructions
from kalm_rag.models.backbone import BackboneInfo, TokenizedPassage

pytest.importorskip("ir_measures", reason="metrics are in the extra 'eval'")


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
        return [TokenizedPassage(ids=one, found=len(one)) for one in ids]

    def encode(self, ids):
        self.encoded += [len(one) for one in ids]
        states, mask = torch.full((len(ids), max(map(len, ids)), 26), 9.0), torch.zeros(len(ids), max(map(len, ids)))
        for row, one in enumerate(ids):
            states[row, : len(one)], mask[row, : len(one)] = torch.eye(26)[one], 1.0
        return states, mask.bool()

    def prompt(self, query, instructions):
        return -1.0 if instructions.task == "the opposite" else 1.0, ord(query[0]) - 97

    def decode(self, prompts, states, counts):
        total = (states * counts[..., None]).sum(1)
        return torch.stack([sign * row[letter] for (sign, letter), row in zip(prompts, total, strict=True)])

    def preview(self, query, instructions):
        return query

    def embed_states(self, states, counts):
        return torch.nn.functional.normalize((states * counts[..., None]).nan_to_num().sum(1), dim=-1)

    def embed_query(self, query):
        return torch.eye(26)[ord(query[0]) - 97]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Query "a": retrieval order d2 (all a), d0 (2 of 3), d1 (4 of 10: relevant). Query "b": d3 only."""
    texts = {"d0": "aab", "d1": "aaaacdefgh", "d2": "a", "d3": "bbbz", "d4": "cccc"}
    root = tmp_path / "tiny"
    (root / "qrels").mkdir(parents=True)
    (root / "corpus.jsonl").write_text("\n".join(json.dumps({"_id": i, "text": t}) for i, t in texts.items()) + "\n")
    queries = {"qa": "a", "qb": "b", "unjudged": "c", "nothing": "z"}
    (root / "queries.jsonl").write_text("\n".join(json.dumps({"_id": i, "text": t}) for i, t in queries.items()))
    (root / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nqa\td1\t1\nqa\td0\t0\nqb\td3\t2\nnothing\td4\t0\n"
    )
    return root


def test_metrics_by_hand(folder):
    """Retrieval: d1 is third for "a" (nDCG 1 / log2 4 = 0.5), d3 first for "b". Reranked: both first."""
    report = evaluate(folder, "test", LetterModel(), ratios=(1, 2), top_k=3)
    before, *after = report.rows
    assert (report.queries, report.passages, report.top_k) == (2, 5, 3)
    assert before.ndcg_10 == pytest.approx((1 / math.log2(4) + 1) / 2)
    assert before.mrr_10 == pytest.approx((1 / 3 + 1) / 2)
    assert (before.ranking, before.ratio, before.recall_k, before.gain) == ("retrieval", None, 1.0, 0.0)
    for row, ratio in zip(after, (1, 2), strict=True):
        assert (row.ranking, row.ratio, row.ndcg_10, row.mrr_10) == ("reranked", ratio, 1.0, 1.0)
        assert row.gain == pytest.approx(0.25)
        assert row.low <= row.gain <= row.high
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["ranking"] == "retrieval"


def test_top_k_bounds_what_reranking_can_reach(folder):
    before, after = evaluate(folder, "test", LetterModel(), ratios=(1,), top_k=2).rows
    assert before.recall_k == after.recall_k == 0.5
    assert after.ndcg_10 == 0.5


def test_instructions_reach_the_model(folder):
    steer = Instructions(task="the opposite")
    assert evaluate(folder, "test", LetterModel(), ratios=(1,), top_k=3, instructions=steer).rows[1].ndcg_10 < 1.0


def test_ties_keep_retrieval_order(folder, monkeypatch):
    """All margins equal: the order, and so every metric, must stay the retriever's."""
    model = LetterModel()
    monkeypatch.setattr(model, "decode", lambda prompts, states, counts: torch.zeros(len(prompts)), raising=False)
    before, after = evaluate(folder, "test", model, ratios=(1,)).rows
    assert (before.ndcg_10, before.mrr_10) == (after.ndcg_10, after.mrr_10)


def test_each_passage_is_encoded_once_and_the_cache_saves_that(folder, tmp_path):
    model = LetterModel()
    first = evaluate(folder, "test", model, ratios=(1, 4), cache=tmp_path / "cache")
    assert len(model.encoded) == 5
    again = evaluate(folder, "test", model, ratios=(1, 4), cache=tmp_path / "cache")
    assert len(model.encoded) == 5
    plain = [(row.ndcg_10, row.gain) for row in first.rows]
    assert plain == [(row.ndcg_10, row.gain) for row in again.rows]


def test_another_model_reranks_what_one_retrieves(folder):
    """With a retriever of its own, a model reads only the candidates, each once."""
    model, retriever = LetterModel(), LetterModel()
    report = evaluate(folder, "test", model, retriever=retriever, ratios=(1,), top_k=2)
    assert report.rows[1].ndcg_10 == 0.5
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
    class Bare:
        info = LetterModel().info

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
