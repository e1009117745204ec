"""The bundled retrieval vectors for LangChain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.embeddings import Embeddings

from kalm_rag.engine.reranker import Reranker
from kalm_rag.index.embedders import BUNDLED, BundledEmbedder
from kalm_rag.index.lazy_engine import EngineSpec

if TYPE_CHECKING:
    import numpy as np


class KaLMEmbeddings(Embeddings):
    """The vectors of pico's encoder (all-MiniLM-L6-v2, 384 wide) for LangChain; loaded on first use.

    Args:
        device: As `Reranker.from_pretrained`.
        reranker: A ready engine over pico, used instead.
    """

    name = BUNDLED

    def __init__(self, device: str | None = None, reranker: Reranker | None = None) -> None:
        self._spec = EngineSpec(device=device)
        self._reranker = reranker

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of passages, unit length."""
        vectors: list[list[float]] = self.passages(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Vector of a query, unit length."""
        return self.query(text)

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of passages, shape ``(passages, 384)``; see `kalm_rag.index.embedders.Embedder`."""
        return self.embedder().passages(texts)

    def query(self, text: str) -> list[float]:
        """Vector of a query; see `kalm_rag.index.embedders.Embedder`."""
        return self.embedder().query(text)

    def embedder(self, engine: Reranker | None = None) -> BundledEmbedder:
        """The embedder over an engine of pico if one is at hand, else over the shared one."""
        if engine is None or engine.info.family != "pico":
            engine = self._reranker if self._reranker is not None else self._spec.engine()
        return BundledEmbedder(engine)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reranker": None}
