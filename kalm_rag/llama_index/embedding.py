"""Retrieval vectors of pico's encoder for LlamaIndex: offline, and one encoder pass for vector and states."""

from __future__ import annotations

import asyncio

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field

from kalm_rag.checks import check_passages
from kalm_rag.errors import InputError
from kalm_rag.index.candidates import Owners, load_states
from kalm_rag.index.embedders import BUNDLED, BundledEmbedder
from kalm_rag.index.results import Timings
from kalm_rag.index.writer import BATCH
from kalm_rag.llama_index.fields import EngineFields


class KaLMEmbedding(EngineFields, BaseEmbedding):
    """Vectors of all-MiniLM-L6-v2 (unit length, width 384), the frozen encoder of pico. Needs no network.

    A passage's vector is made of its states. With `store` set to the `KaLMChromaVectorStore` that the nodes go to,
    indexing encodes each passage once for both.

    Args:
        store: The `KaLMChromaVectorStore` that the nodes go to, so that adding them finds the states made here. Also a
            `StateStore`, a folder or a ``.sqlite3`` file; None takes a bounded cache of this process.
        model: ``pico``, or the folder of weights trained like it. Left out with a vector store: the store's.
        device: ``cpu``, ``cuda``, ``cuda:1``; None takes CUDA where there is one.
        dtype: ``bf16`` or ``fp32``; None takes what fits the device.
        reranker: A ready engine over pico instead of `model`, yours to close.
        embed_batch_size: Passages per call of LlamaIndex's, 1 to 2,048.
        batch_size: Most passages in one encoder pass.
        max_passage_tokens: Where passages are cut; None takes the model's limit.

    Raises:
        InputError: If the model is another than pico (when first used); inside pydantic's ValidationError if an
            argument is unknown.

    Example:
        >>> embedding = KaLMEmbedding()
        >>> len(embedding.get_query_embedding("What is the capital of France?"))
        384
    """

    model_name: str = Field(default=BUNDLED, description="What makes the vectors.")
    embed_batch_size: int = Field(
        default=BATCH, gt=0, le=2048, description="Passages per call: encoded together, kept in one transaction."
    )

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "KaLMEmbedding"

    def _embedder(self) -> BundledEmbedder:
        engine, _ = self.lazy.get()
        if engine.info.family != "pico":
            raise InputError(
                f"model {engine.info.name} makes no retrieval vectors; wanted pico. Use another embed_model with it."
            )
        return BundledEmbedder(engine)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embedder().query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        embedder = self._embedder()
        engine, store = self.lazy.get()
        loaded = load_states(
            engine,
            store,
            check_passages(texts, "texts"),
            missing="encode",
            timings=Timings(),
            owners=Owners.nobody(len(texts)),
        )
        vectors = np.empty((0, 0)) if loaded.states is None else embedder.from_states(loaded.states)
        return [[float(x) for x in vector] for vector in vectors]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
