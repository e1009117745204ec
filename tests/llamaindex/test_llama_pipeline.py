"""The steps of an ingestion pipeline: states and embeddings."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import chromadb
import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import TextNode
from llama_nodes import EMBEDDING, QUERY, TEXTS, documents, make_nodes, scored, stored
from pydantic import ValidationError

from kalm_rag import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.embedders import BundledEmbedder
from kalm_rag.llama_index import KaLMChromaVectorStore, KaLMEmbedding, KaLMNodePostprocessor, KaLMStateTransform
from kalm_rag.store.memory import MemoryStore


class TestTransform:
    def pipeline(self, transform: KaLMStateTransform, **fields: Any) -> IngestionPipeline:
        return IngestionPipeline(
            transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0), transform], **fields
        )

    def test_a_cached_pipeline_fills_a_wiped_store_again(self, tiny: Reranker, tmp_path: Path) -> None:
        transform = KaLMStateTransform(reranker=tiny, store=tmp_path / "a.sqlite3")
        pipeline = self.pipeline(transform)
        nodes = pipeline.run(documents=documents())
        store = transform.parts.get()[1]
        assert store.stats().states == 4
        assert [n.get_content() for n in nodes] == TEXTS
        store.gc(younger_than=0)  # nothing refers to them
        assert store.stats().states == 0
        for _ in range(2):
            assert [n.get_content() for n in pipeline.run(documents=documents())] == TEXTS
            assert store.stats().states == 4
        asyncio.run(pipeline.arun(documents=documents(["A brook."])))
        assert store.stats().states == 5
        post = KaLMNodePostprocessor(reranker=tiny, store=store, missing="raise")
        assert post.postprocess_nodes(scored(list(nodes)), query_str=QUERY)

    def test_to_dict_names_store_and_fingerprint(self, tiny: Reranker, tmp_path: Path) -> None:
        transform = KaLMStateTransform(reranker=tiny, store=tmp_path)
        data = transform.to_dict()
        assert (data["store"], data["fingerprint"]) == (str(tmp_path), tiny.info.fingerprint)
        for other in (
            KaLMStateTransform.from_dict(json.loads(json.dumps(data))),
            pickle.loads(pickle.dumps(transform)),
        ):
            assert {**other.to_dict(), "run": data["run"]} == data

    def test_bad_places(self, tiny: Reranker) -> None:
        with pytest.raises(ValidationError, match="store is None; wanted the store to fill"):
            KaLMStateTransform(reranker=tiny)
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            KaLMStateTransform(store="x", top_n=3)
        with pytest.raises(InputError, match="live MemoryStore, which can't be pickled"):
            pickle.dumps(KaLMStateTransform(reranker=tiny, store=MemoryStore(tiny.layout())))
        with pytest.raises(InputError, match="live MemoryStore, which can't be pickled"):
            pickle.dumps(KaLMStateTransform(reranker=tiny, store=":memory:"))  # another process would fill another one

    def test_into_the_vector_stores_states(self, vectors: KaLMChromaVectorStore) -> None:
        transform = KaLMStateTransform(store=vectors)
        pipeline = IngestionPipeline(transformations=[EMBEDDING, transform], vector_store=vectors)
        pipeline.run(documents=documents())
        assert stored(vectors) == 4
        assert vectors.verify().clean

    @pytest.mark.slow
    def test_in_a_worker_process(self, tiny_folder: Path, tmp_path: Path) -> None:
        """What ``num_workers`` does with a step (LlamaIndex's own pool hangs on our machine, also without us)."""
        transform = KaLMStateTransform(model=str(tiny_folder), device="cpu", store=tmp_path)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert len(pool.apply_async(transform, (make_nodes(),)).get(timeout=60)) == 4
        assert transform.parts.get()[1].stats().states == 4


class TestEmbedding:
    def test_one_encoder_pass_for_vector_and_states(self, collection: chromadb.Collection, pico: Reranker) -> None:
        vectors = KaLMChromaVectorStore(collection, reranker=pico)
        embedding = vectors.as_embedding()
        (vector,) = embedding.get_text_embedding_batch([TEXTS[0]])
        assert vector == pytest.approx(BundledEmbedder(pico).passages([TEXTS[0]])[0].tolist(), abs=1e-5)
        assert stored(vectors) == 0  # in memory, for the node that is about to be added
        assert embedding.get_query_embedding(QUERY) == pytest.approx(BundledEmbedder(pico).query(QUERY), abs=1e-5)
        assert asyncio.run(embedding.aget_text_embedding(TEXTS[0])) == pytest.approx(vector, abs=1e-5)
        assert embedding.get_text_embedding_batch([]) == []
        vectors.add([TextNode(text=TEXTS[0], embedding=vector)])
        assert stored(vectors) == 1
        assert vectors.verify().clean

    def test_two_hundred_and_fifty_six_passages_a_call(self, tiny: Reranker) -> None:
        """LlamaIndex's default is ten: ten passages per encoder pass, and a transaction for each ten."""
        assert KaLMEmbedding(reranker=tiny).embed_batch_size == 256
        assert KaLMEmbedding(reranker=tiny, embed_batch_size=8).embed_batch_size == 8

    def test_without_a_store(self, pico: Reranker) -> None:
        embedding = KaLMEmbedding(reranker=pico)
        assert len(embedding.get_text_embedding("x")) == 384
        assert type(embedding.get_query_embedding("x")[0]) is float
        assert KaLMEmbedding.from_dict(embedding.to_dict()).to_dict() == embedding.to_dict()

    def test_other_models_have_no_vectors(self, tiny: Reranker) -> None:
        with pytest.raises(InputError, match="makes no retrieval vectors; wanted pico"):
            KaLMEmbedding(reranker=tiny).get_query_embedding(QUERY)
