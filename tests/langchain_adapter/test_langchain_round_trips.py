"""What is pickled, dumped or copied gives the scores it gave before."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_documents import QUERY, TEXTS, VECTORS, documents
from pydantic import ValidationError

from kalm_rag import Instructions
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.lazy_engine import EngineSpec, release_engines, spec_of
from kalm_rag.langchain import KaLMChroma, KaLMDocumentCompressor
from kalm_rag.store import open_store


def test_round_trips(tiny: Reranker, tiny_folder: Path, tmp_path: Path) -> None:
    """Nothing is lost: device, instructions, a ready engine's settings, and where the states lie."""
    store = open_store(tmp_path, tiny.layout("int8"))
    made = KaLMDocumentCompressor(
        reranker=tiny,
        store=store,
        top_n=2,
        threshold=0.001,
        instructions=Instructions(system="S", task="T"),
        keep_margin=True,
        missing="skip",
        ratio=8,
    )
    store.put_many(tiny.encode(TEXTS))
    wanted = made.compress_documents(documents(), QUERY)
    copies = [
        pickle.loads(pickle.dumps(made)),
        KaLMDocumentCompressor.model_validate(made.model_dump()),
        KaLMDocumentCompressor.model_validate_json(made.model_dump_json()),
    ]
    for copied in copies:
        assert copied.reranker is None
        assert copied.model_dump() == made.model_dump()
        assert copied.compress_documents(documents(), QUERY) == wanted
    assert made.device == "cpu"
    assert made.store is store
    assert len(pickle.dumps(made)) < 5_000
    spec = EngineSpec(model=str(tiny_folder), device=tiny.backbone.device)  # type: ignore[arg-type]
    assert spec.device == "cpu"
    assert pickle.loads(pickle.dumps(spec)) == spec
    release_engines()
    store.close()


def test_how_a_model_runs_is_a_setting_like_others(tiny: Reranker, tiny_folder: Path) -> None:
    ways = {"decoder_weights": "int8", "prefix_cache_bytes": 12_345}
    try:
        made = KaLMDocumentCompressor(model=str(tiny_folder), device="cpu", **ways)
        copied = pickle.loads(pickle.dumps(made))
        assert copied.compress_documents(documents(), QUERY)
        assert copied.engine() is made.engine()
        assert {key: spec_of(made.engine())[key] for key in ways} == ways
        ready = KaLMDocumentCompressor(reranker=made.engine())
        assert ready.model_dump()["decoder_weights"] == "int8", "or a copy would run another way"
        with pytest.raises(ValidationError, match="both given"):
            KaLMDocumentCompressor(reranker=tiny, decoder_weights="int8")
        with pytest.raises(InputError, match="both given"):
            KaLMChroma("ways", reranker=tiny, compiled=True)
        store = KaLMChroma("ways", VECTORS, model=str(tiny_folder), device="cpu", **ways)
        assert store.as_compressor().engine() is made.engine()
    finally:
        release_engines()


def test_a_deep_copy_shares_the_engine(compressor: KaLMDocumentCompressor) -> None:
    twin = copy.deepcopy(compressor)
    assert twin.reranker is compressor.reranker
    assert twin.compress_documents(documents(), QUERY) == compressor.compress_documents(documents(), QUERY)
