"""Two-phase reranking for RAG: encode passages once beside their Chroma vectors, run only a decoder per query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalm_rag.engine.reranker import Reranker
    from kalm_rag.index import ChromaIndex
    from kalm_rag.instructions import Instructions
    from kalm_rag.states import PassageStates
    from kalm_rag.store import open_store

__version__ = "0.1.0"
__all__ = ["ChromaIndex", "Instructions", "PassageStates", "Reranker", "open_store"]
_HOMES = {
    "ChromaIndex": "index",
    "Instructions": "instructions",
    "Reranker": "engine.reranker",
    "PassageStates": "states",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - importing the package must not import torch or Chroma
    if name not in __all__:
        raise AttributeError(f"module 'kalm_rag' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"kalm_rag.{_HOMES.get(name, 'store')}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
