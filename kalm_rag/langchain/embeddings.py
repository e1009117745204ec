"""The bundled retrieval vectors for LangChain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.embeddings import Embeddings

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.embedders import BUNDLED, BundledEmbedder
from kalm_rag.index.lazy_engine import EngineSpec, spec_of
from kalm_rag.index.settings import check_reranker

if TYPE_CHECKING:
    import numpy as np

    from kalm_rag.engine.prepared import PreparedQuery


class KaLMEmbeddings(Embeddings):
    """The vectors of pico's encoder (all-MiniLM-L6-v2, 384 wide) for any LangChain vector store; loaded on first use.

    `KaLMChroma` takes them by itself, and then makes vector and states in one encoder pass.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:1``; None takes CUDA where there is one.
        reranker: A ready engine over pico whose encoder is used; it stays yours to close.

    Raises:
        InputError: If `reranker` is no engine over pico.

    Example:
        >>> embeddings = KaLMEmbeddings()
        >>> len(embeddings.embed_query("capital of France?"))
        384
        >>> embeddings.embed_documents([])
        []
    """

    name = BUNDLED

    def __init__(self, device: str | None = None, reranker: Reranker | None = None) -> None:
        check_reranker(reranker)
        if reranker is not None and reranker.info.family != "pico":
            raise InputError(f"reranker is {reranker.info.name}, which makes no vectors; wanted an engine over pico.")
        self._spec = EngineSpec(device=device)
        self._reranker = reranker

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of passages, unit length; none for no passages."""
        vectors: list[list[float]] = self.passages(texts).tolist() if texts else []
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Vector of a query, unit length."""
        return self.query(text)

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of passages, shape ``(passages, 384)``; see `kalm_rag.index.embedders.Embedder`."""
        return self.embedder().passages(texts)

    def query(self, text: str | PreparedQuery) -> list[float]:
        """Vector of a query; see `kalm_rag.index.embedders.Embedder`."""
        return self.embedder().query(text)

    def embedder(self, engine: Reranker | None = None) -> BundledEmbedder:
        """The embedder over an engine of pico if one is at hand, else over the shared one."""
        if engine is None or engine.info.family != "pico":
            engine = self._reranker if self._reranker is not None else self._spec.engine()
        return BundledEmbedder(engine)

    def __getstate__(self) -> dict[str, Any]:
        """Settings without the model: the copy loads the same one."""
        spec = self._spec if self._reranker is None else EngineSpec(**spec_of(self._reranker))
        return {"_spec": spec, "_reranker": None}
