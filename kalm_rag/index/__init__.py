"""A Chroma collection and its states in step: one writer, one home for texts that become states, upkeep."""

from __future__ import annotations

from kalm_rag.index.chroma_index import ChromaIndex

__all__ = ["ChromaIndex"]
