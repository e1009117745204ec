"""The compiled decoder against the plain one, and that it may be asked for wherever an engine is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import save_tiny
from test_t5gemma2_decoder import load, some_batch

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.lazy_engine import EngineSpec, release_engines, spec_of
from kalm_rag.models.t5gemma2.backbone import T5Gemma2Backbone
from kalm_rag.models.t5gemma2.compiled import CompiledDecoder, round_up
from kalm_rag.states import PassageStates

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler"
)


def margins_of(engine: Reranker, query: str, states: Sequence[PassageStates]) -> list[float]:
    return [found.margin for found in engine.score(query, states)]


def test_rounding_up_changes_no_score(tmp_path: Path) -> None:
    backbone = load(save_tiny(tmp_path))
    lean = backbone._lean
    assert lean is not None
    prompts, states, counts = some_batch(backbone)
    batch = backbone._batch(prompts, states, counts > 0)
    padded = round_up(batch)
    assert padded.states.shape[:2] == (8, 16)
    assert padded.ids.shape == (3, 96)
    with torch.inference_mode():
        torch.testing.assert_close(lean(padded)[:7], lean(batch), rtol=0, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compiled_equals_plain_over_few_graphs(tmp_path: Path, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    # one layer of each kind: every layer more is compiled for several times, for seconds each, as is every shape of
    # a weight, of which a width of 32 leaves two
    folder = save_tiny(
        tmp_path, hidden_size=32, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    )
    with Reranker.from_pretrained(str(folder), device=device, prefix_cache_bytes=0) as plain:
        texts = [f"passage {i} " + "word " * (3 * i) for i in range(11)]
        queries = ["short", "a query with several more words in it", "and " * 30]
        states = plain.encode(texts)
        wanted = [margins_of(plain, query, states) for query in queries]
        wanted_few = margins_of(plain, queries[0], states[:3])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plainly = torch._inductor.config.patch({"cpp.vec_isa_ok": False})  # less for g++ to do
    with plainly, Reranker.from_pretrained(str(folder), device=device, compiled=True, prefix_cache_bytes=0) as engine:
        assert isinstance(engine.backbone, T5Gemma2Backbone)
        assert isinstance(engine.backbone._lean, CompiledDecoder)
        made = []
        for query, margins in zip(queries, wanted, strict=True):
            assert margins_of(engine, query, states) == pytest.approx(margins, abs=1e-5)
            made.append(torch._dynamo.utils.counters["frames"]["ok"])
        assert margins_of(engine, queries[0], states[:3]) == pytest.approx(wanted_few, abs=1e-5)
        made.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert made[0] > 0
    assert made[1:] == made[1:2] * 3, "other lengths and other numbers of passages are served by graphs there are"


def test_rounded_weights_are_not_compiled(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="can't be compiled"):
        Reranker.from_pretrained(str(tiny_folder), decoder_weights="int8", compiled=True)


@pytest.mark.parametrize("given", [{"decoder_weights": "int8"}, {"compiled": True}])
def test_pico_has_neither(given: dict[str, object]) -> None:
    with pytest.raises(InputError, match="Leave them out"):
        Reranker.from_pretrained("pico", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"decoder_weights": "int4"}, {"compiled": 1}, {"prefix_cache_bytes": -1}])
def test_ways_to_run_are_checked_before_anything_is_loaded(given: dict[str, object]) -> None:
    with pytest.raises(InputError, match="wanted"):
        EngineSpec(model="/no/such/folder", **given)  # type: ignore[arg-type]


def test_settings_lead_back_to_the_same_way_to_run(tiny_folder: Path) -> None:
    try:
        with Reranker.from_pretrained(str(tiny_folder), decoder_weights="int8", prefix_cache_bytes=12345) as engine:
            again = EngineSpec(**spec_of(engine)).engine()
            assert again.backbone is engine.backbone
            assert spec_of(again) == spec_of(engine)
            assert spec_of(again)["prefix_cache_bytes"] == 12345
    finally:
        release_engines()
