"""LlamaIndex adapter: rerank retrieved nodes with the decoder over stored states; keep states while indexing.

Thin: states are found by content (`kalm_rag.index.candidates`), scored by the engine, mended by
`kalm_rag.index.upkeep`. The only room that imports LlamaIndex.
"""

from __future__ import annotations

from kalm_rag.errors import missing_extra

try:
    from kalm_rag.llama_index.embedding import KaLMEmbedding
    from kalm_rag.llama_index.postprocessor import KaLMNodePostprocessor
    from kalm_rag.llama_index.transform import KaLMStateTransform
    from kalm_rag.llama_index.vector_store import KaLMChromaVectorStore
except ModuleNotFoundError as err:
    if err.name is None or not err.name.startswith("llama_index"):
        raise
    raise missing_extra(f"the module {err.name}", "llama-index", "kalm_rag.llama_index") from err

__all__ = ["KaLMChromaVectorStore", "KaLMEmbedding", "KaLMNodePostprocessor", "KaLMStateTransform"]
