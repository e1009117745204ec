"""LangChain: a document compressor, a Chroma vector store, a retriever and more that score stored passage states.

Thin: states are found by content (`kalm_rag.index.candidates`), the engine scores them, the classes here
speak the framework's language: documents, callbacks, configs. Needs ``langchain-core``; `KaLMChroma` needs
``langchain-chroma``, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kalm_rag.errors import missing_extra

if TYPE_CHECKING:
    from kalm_rag.langchain.bytestore import StateByteStore
    from kalm_rag.langchain.compressor import KaLMDocumentCompressor, KaLMRerank
    from kalm_rag.langchain.cross_encoder import KaLMCrossEncoder
    from kalm_rag.langchain.embeddings import KaLMEmbeddings
    from kalm_rag.langchain.retriever import KaLMRetriever
    from kalm_rag.langchain.vectorstore import KaLMChroma

_HOMES = {
    "KaLMChroma": "vectorstore",
    "KaLMCrossEncoder": "cross_encoder",
    "KaLMDocumentCompressor": "compressor",
    "KaLMEmbeddings": "embeddings",
    "KaLMRerank": "compressor",
    "KaLMRetriever": "retriever",
    "StateByteStore": "bytestore",
}
__all__ = [
    "KaLMChroma",
    "KaLMCrossEncoder",
    "KaLMDocumentCompressor",
    "KaLMEmbeddings",
    "KaLMRerank",
    "KaLMRetriever",
    "StateByteStore",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - each class needs only its own packages
    if name not in _HOMES:
        raise AttributeError(f"module 'kalm_rag.langchain' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(f"kalm_rag.langchain.{_HOMES[name]}"), name)
    except ModuleNotFoundError as err:
        if err.name is None or not err.name.startswith("langchain"):
            raise
        package = err.name.split(".")[0].replace("_", "-")
        raise missing_extra(package, "langchain", f"kalm_rag.langchain.{name}") from err
