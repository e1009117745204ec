"""LlamaIndex adapter: rerank retrieved nodes with the decoder over stored states; keep states while indexing.

Thin: states are found by content (`kalm_rag.index.candidates`), scored by the engine, mended by
`kalm_rag.index.upkeep`. The only room that imports LlamaIndex.
"""

from __future__ import annotations

from kalm_rag.errors import MissingDependencyError

try:
    from kalm_rag.llama_index.embedding import KaLMEmbedding
    from kalm_rag.llama_index.postprocessor import KaLMNodePostprocessor
    from kalm_rag.llama_index.transform import KaLMStateTransform
    from kalm_rag.llama_index.vector_store import KaLMChromaVectorStore
except ModuleNotFoundError as err:
    if err.name is None or not err.name.startswith("llama_index"):
        raise
    raise MissingDependencyError(
        f"kalm_rag.llama_index needs {err.name}, which is not installed. Run: pip install 'kalm-rag[llama-index]'."
    ) from err

__all__ = ["KaLMChromaVectorStore", "KaLMEmbedding", "KaLMNodePostprocessor", "KaLMStateTransform"]
