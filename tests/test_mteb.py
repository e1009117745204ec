"""mteb runs our models: a local reranking task, held in memory, through mteb's own entry."""

from __future__ import annotations

import numpy as np
import pytest

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, MissingDependencyError
from kalm_rag.instructions import Instructions
from kalm_rag.models.pico.backbone import PicoBackbone
from kalm_rag.mteb import MtebReranker

pytest.importorskip("mteb", reason="mteb is in the extra 'mteb'")

import mteb
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import CrossEncoderProtocol

CORPUS = {
    "d1": ("Bees", "make honey in their hive."),
    "d2": ("", "Cows give milk on the farm."),
    "d3": ("", "Sheep give wool to the shepherd."),
    "d4": ("", "The train leaves at nine."),
}
QUERIES = {"q1": "what do bees make", "q2": "which animal gives wool", "q3": "when does the train leave"}
RELEVANT = {"q1": {"d1": 1}, "q2": {"d3": 1}, "q3": {"d4": 1}}
SETTINGS = {
    "description": "Small questions.",
    "reference": "https://example.com",
    "dataset": {"path": "local", "revision": "1"},
    "category": "t2t",
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "date": ("2024-01-01", "2024-01-01"),
    "dialect": ["Written"],
    "domains": [],
    "task_subtypes": [],
    "license": "cc-by-4.0",
    "annotations_creators": "derived",
    "modalities": ["text"],
    "sample_creation": "found",
    "bibtex_citation": "",
    "main_score": "ndcg_at_10",
    "type": "Reranking",
}


class LocalReranking(AbsTaskRetrieval):
    metadata = TaskMetadata(name="LocalReranking", prompt={"query": "Find the sentence."}, **SETTINGS)
    told: str | None = None

    def load_data(self, num_proc=None, **_):
        queries = [{"id": key, "text": text} for key, text in QUERIES.items()]
        if self.told is not None:
            queries = [{**row, "instruction": self.told} for row in queries]
        corpus = [{"id": key, "title": title, "text": text} for key, (title, text) in CORPUS.items()]
        split = {
            "queries": Dataset.from_list(queries),
            "corpus": Dataset.from_list(corpus),
            "relevant_docs": {key: dict(grades) for key, grades in RELEVANT.items()},
            "top_ranked": {key: list(CORPUS) for key in QUERIES},
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class InstructedReranking(LocalReranking):
    metadata = TaskMetadata(name="InstructedReranking", **SETTINGS)
    told = "I write about farms."


class Spy(Reranker):
    """An engine that notes what it was asked and what it encoded."""

    def __init__(self, backbone) -> None:
        super().__init__(backbone)
        self.asked: list[tuple[str, Instructions]] = []
        self.encoded: list[str] = []

    def prepare(self, query, instructions=None):
        if isinstance(query, str):  # what was prepared already was noted then
            self.asked.append((query, instructions))
        return super().prepare(query, instructions)

    def encode(self, passages, *, show_progress=None):
        self.encoded += passages
        return super().encode(passages, show_progress=show_progress)


def run(model: MtebReranker, task: AbsTaskRetrieval) -> float:
    results = mteb.evaluate(model, task, cache=None, co2_tracker=False)
    return float(results.task_results[0].get_score())


def test_mteb_runs_pico(pico):
    """Bees and wool are found by words; mteb's own nDCG of its own run must be what our ranking gives."""
    engine = Spy(pico.backbone)
    model = MtebReranker(engine)
    assert isinstance(model, CrossEncoderProtocol)
    assert run(model, LocalReranking()) == 1.0
    assert sorted(engine.encoded) == sorted(f"{title} {text}".strip() for title, text in CORPUS.values())  # once each
    assert [query for query, _ in engine.asked] == list(QUERIES.values())
    assert {steer.task for _, steer in engine.asked} == {"Find the sentence."}
    run(model, LocalReranking())
    assert len(engine.encoded) == len(CORPUS)  # and never again


def test_a_querys_own_instruction_is_the_task(pico):
    """Mteb joins instruction and query into one text; the model must get them apart."""
    engine = Spy(pico.backbone)
    run(MtebReranker(engine, system="Be brief."), InstructedReranking())
    assert {query for query, _ in engine.asked} == set(QUERIES.values())
    assert {steer for _, steer in engine.asked} == {Instructions(system="Be brief.", task="I write about farms.")}
    engine = Spy(pico.backbone)
    run(MtebReranker(engine, task_prompts=False), LocalReranking())
    assert {steer for _, steer in engine.asked} == {Instructions()}


def test_mteb_runs_a_t5gemma2_checkpoint(tiny_folder, tiny, tmp_path):
    """Random weights: the score means nothing, but must be the one that our own margins give, in input order."""
    with MtebReranker.from_pretrained(str(tiny_folder), device="cpu", store=tmp_path).engine as engine:
        model = MtebReranker(engine, store=tmp_path)
        assert 0.0 <= run(model, LocalReranking()) <= 1.0
        texts = [text for _, text in CORPUS.values()]
        query = QUERIES["q1"]
        found = model.predict([{"text": [query] * 4}], [{"text": texts[:2]}, {"text": texts[2:]}])
        wanted = [one.margin for one in tiny.score(query, tiny.encode(texts))]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert model.mteb_model_meta.name == "local/checkpoint"


def test_names_and_revisions_tell_models_apart(pico, tmp_path):
    """Mteb gives back old results of a name and revision: other weights or another ratio must not share them."""
    meta = MtebReranker(pico).mteb_model_meta
    assert (meta.name, meta.is_cross_encoder, meta.experiment_kwargs) == ("kalm-rag/pico", True, {"ratio": 4})
    assert MtebReranker(pico).mteb_model_meta.revision == meta.revision
    other = PicoBackbone.load()
    next(iter(other.decoder.parameters())).data.mul_(2)
    assert MtebReranker(Reranker(other)).mteb_model_meta.revision != meta.revision
    assert MtebReranker(pico.at(8)).mteb_model_meta.experiment_kwargs == {"ratio": 8}


def test_states_are_kept_for_another_run(pico, tmp_path):
    for wanted in (4, 0):
        engine = Spy(pico.backbone)
        model = MtebReranker(engine, store=tmp_path)
        run(model, LocalReranking())
        model.store.close()
        assert len(engine.encoded) == wanted


def test_bad_pairs_and_missing_package(pico, monkeypatch):
    model = MtebReranker(pico)
    with pytest.raises(InputError, match="2 queries and 1 passages"):
        model.predict([{"text": ["a", "b"]}], [{"text": ["c"]}])
    with pytest.raises(InputError, match="query is blank"):
        model.predict([{"text": [" "]}], [{"text": ["c"]}])
    assert model.predict([], []).shape == (0,)
    monkeypatch.setitem(__import__("sys").modules, "mteb.models.model_meta", None)
    with pytest.raises(MissingDependencyError, match=r"module mteb.*pip install 'kalm-rag\[mteb\]'"):
        MtebReranker(pico)
