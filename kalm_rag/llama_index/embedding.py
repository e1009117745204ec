"""Retrieval vectors of pico's encoder for LlamaIndex: offline, and one encoder pass for vector and states."""

from __future__ import annotations

import asyncio

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import ConfigDict, Field

from kalm_rag.errors import InputError
from kalm_rag.index.candidates import find_states
from kalm_rag.index.embedders import BUNDLED, BundledEmbedder
from kalm_rag.index.results import Timings
from kalm_rag.index.upkeep import BATCH
from kalm_rag.llama_index.fields import EngineFields


class KaLMEmbedding(EngineFields, BaseEmbedding):
    """Vectors of all-MiniLM-L6-v2 (unit length, width 384), the frozen encoder of pico. Needs no network.

    A passage's vector is made of its states. With `store` set to the `KaLMChromaVectorStore` that the nodes go to,
    indexing encodes each passage once for both.

    Args:
        store: Where states are kept on the way: as `KaLMNodePostprocessor`; None takes the process's bounded cache.

    Raises:
        InputError: If the model is another than pico (when first used), or an argument is unknown.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=("pydantic_model_",))

    model_name: str = Field(default=BUNDLED, description="What makes the vectors.")
    embed_batch_size: int = Field(
        default=BATCH, gt=0, le=2048, description="Passages per call: encoded together, kept in one transaction."
    )

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "KaLMEmbedding"

    def _embedder(self) -> BundledEmbedder:
        engine, _ = self._parts.get()
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
        engine, store = self._parts.get()
        looked = find_states(engine, store, texts, missing="encode", timings=Timings())
        vectors = np.empty((0, 0)) if looked.states is None else embedder.from_states(looked.states)
        return [[float(x) for x in vector] for vector in vectors]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
