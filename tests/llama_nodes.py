"""Nodes, embeddings and engines that the tests of the LlamaIndex adapter share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode

from kalm_rag import Instructions, Reranker
from kalm_rag.llama_index import KaLMChromaVectorStore

QUERY = "Which river is the longest?"
TEXTS = ["The Nile is long.", "Tea is drunk hot.", "The Amazon carries most water.", "Rivers end in the sea."]


class HashEmbedding(BaseEmbedding):
    """Eight numbers out of a digest: no model, and the same text gives the same vector."""

    def _vector(self, text: str) -> list[float]:
        return [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:8]]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._vector(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._vector(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._vector(text)


EMBEDDING = HashEmbedding()


def make_nodes(texts: list[str] | None = None, **fields: Any) -> list[TextNode]:
    texts = texts if texts is not None else TEXTS
    return [
        TextNode(id_=f"n{i}", text=t, metadata={"topic": f"t{i % 2}"}, embedding=EMBEDDING._vector(t), **fields)
        for i, t in enumerate(texts)
    ]


def scored(nodes: list[Any] | None = None) -> list[NodeWithScore]:
    nodes = nodes if nodes is not None else make_nodes()
    return [NodeWithScore(node=node, score=1.0 - i / 10) for i, node in enumerate(nodes)]


def expected(engine: Reranker, nodes: list[NodeWithScore], instructions: Instructions | None = None) -> dict[str, Any]:
    """Id to P(yes), from the engine alone, with everything encoded now."""
    texts = [n.node.get_content(metadata_mode=MetadataMode.EMBED) for n in nodes]
    ranked = engine.rank(QUERY, texts, instructions=instructions)
    return {nodes[r.index].node_id: r.probability for r in ranked}


def got(nodes: list[NodeWithScore]) -> dict[str, Any]:
    return {n.node_id: n.score for n in nodes}


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert list(left) == list(right)
    assert list(left.values()) == pytest.approx(list(right.values()), abs=1e-5)


def index_of(vectors: KaLMChromaVectorStore, documents: list[Document]) -> VectorStoreIndex:
    context = StorageContext.from_defaults(vector_store=vectors)
    return VectorStoreIndex.from_documents(documents, storage_context=context, embed_model=EMBEDDING)


def engine_of(index: VectorStoreIndex, post: BaseNodePostprocessor, **fields: Any) -> Any:
    return index.as_query_engine(llm=MockLLM(max_tokens=4), similarity_top_k=10, node_postprocessors=[post], **fields)


def documents(texts: list[str] | None = None) -> list[Document]:
    return [Document(id_=f"d{i}", text=t) for i, t in enumerate(texts if texts is not None else TEXTS)]


def stored(vectors: KaLMChromaVectorStore) -> int:
    return vectors.parts.get()[1].stats().states


class Recorder(BaseEventHandler):
    """Keeps rerank events."""

    events: list[Any] = []  # noqa: RUF012 - pydantic copies it

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, ReRankStartEvent | ReRankEndEvent):
            self.events.append(event)


@contextmanager
def recorded() -> Iterator[tuple[list[Any], SimpleSpanHandler]]:
    root, recorder, spans = get_dispatcher("root"), Recorder(), SimpleSpanHandler()
    root.add_event_handler(recorder)
    root.add_span_handler(spans)
    try:
        yield recorder.events, spans
    finally:
        root.event_handlers.remove(recorder)
        root.span_handlers.remove(spans)
