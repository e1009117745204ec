"""Components written down, pickled and copied give the same scores."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import chromadb
import pytest
from llama_index.core.schema import MetadataMode
from llama_nodes import QUERY, got, make_nodes, scored
from pydantic import ValidationError

from kalm_rag import Instructions, Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.lazy_engine import release_engines
from kalm_rag.llama_index import KaLMChromaVectorStore, KaLMNodePostprocessor
from kalm_rag.store.memory import MemoryStore


def test_how_a_model_runs_is_a_setting_like_others(collection: chromadb.Collection, tiny_folder: Path) -> None:
    try:
        store = KaLMChromaVectorStore(collection, model=str(tiny_folder), device="cpu")
        store.add(make_nodes())
        post = KaLMNodePostprocessor(store=store, decoder_weights="int8", prefix_cache_bytes=12_345, missing="raise")
        assert post.parts.get()[0].backbone.decoder_weights == "int8"  # type: ignore[attr-defined]
        assert post.parts.get()[0].info == store.parts.get()[0].info, "states are the same either way"
        assert len(post.postprocess_nodes(scored(), query_str=QUERY)) == 3
        assert store.parts.get()[0].backbone.decoder_weights is None  # type: ignore[attr-defined]
        again = KaLMNodePostprocessor.from_dict(post.to_dict() | {"store": None})
        assert again.parts.get()[0] is post.parts.get()[0]
    finally:
        release_engines()


class TestSerialisation:
    def test_round_trip_loses_nothing(self, tmp_path: Path) -> None:
        fields = {
            "model": "nano",
            "revision": "main",
            "device": "cpu",
            "dtype": "fp32",
            "ratio": 8,
            "batch_size": 7,
            "top_n": None,
            "threshold": 0.25,
            "missing": "skip",
            "instructions": Instructions(system="Be brief.", task="Find laws.", system_mode="replace"),
            "store": tmp_path,
            "metadata_mode": MetadataMode.LLM,
            "keep_retrieval_score": True,
        }
        post = KaLMNodePostprocessor(**fields)
        for other in (
            KaLMNodePostprocessor.from_dict(post.to_dict()),
            KaLMNodePostprocessor.from_json(post.to_json()),
            pickle.loads(pickle.dumps(post)),
            copy.deepcopy(post),
        ):
            assert {name: getattr(other, name) for name in fields} == {**fields, "store": str(tmp_path)}
            assert other.to_dict() == post.to_dict()
        assert list(tmp_path.iterdir()) == []  # nothing was opened, nothing loaded

    def test_a_ready_engine_is_written_down_by_name(self, tiny: Reranker, tiny_folder: Path) -> None:
        post = KaLMNodePostprocessor(reranker=tiny, instructions="auto")
        nodes = scored()
        first = got(post.postprocess_nodes(nodes, query_str=QUERY))
        data = pickle.dumps(post)
        assert len(data) < 5000
        other = pickle.loads(data)
        assert (other.model, other.reranker, other.instructions) == (str(tiny_folder), None, "auto")
        assert got(other.postprocess_nodes(nodes, query_str=QUERY)) == first

    def test_a_live_store_is_not_lost_silently(self, tiny: Reranker) -> None:
        store = MemoryStore(tiny.layout())
        post = KaLMNodePostprocessor(reranker=tiny, store=store)
        with pytest.raises(InputError, match="uses a live MemoryStore, which can't be pickled"):
            pickle.dumps(post)
        with pytest.raises(ValidationError, match="store was a live MemoryStore"):
            KaLMNodePostprocessor.from_dict(post.to_dict())
        assert KaLMNodePostprocessor.from_dict(post.to_dict(), store=store).store is store
        assert copy.deepcopy(post).parts is post.parts

    def test_a_folders_store_is_shared_with_the_vector_store(self, tiny: Reranker, tmp_path: Path) -> None:
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=tiny)
        vectors.add(make_nodes())
        by_folder = KaLMNodePostprocessor(reranker=tiny, store=tmp_path, missing="raise")
        by_vectors = vectors.as_postprocessor(missing="raise")
        reborn = pickle.loads(pickle.dumps(by_vectors))
        ranked = [got(p.postprocess_nodes(scored(), query_str=QUERY)) for p in (by_folder, by_vectors, reborn)]
        assert ranked[0] == ranked[1] == ranked[2]
