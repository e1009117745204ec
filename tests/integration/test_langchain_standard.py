"""LangChain's standard suites, as its own partner packages run them, without a network."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("langchain_tests", reason="langchain-tests is not installed (extra 'dev')")

from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.retrievers import BaseRetriever
from langchain_tests.integration_tests import (
    BaseStoreAsyncTests,
    BaseStoreSyncTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)

from kalm_rag.engine.reranker import Reranker
from kalm_rag.langchain import KaLMChroma, KaLMRetriever, StateByteStore
from kalm_rag.store import Reference, open_store


class TestKaLMChroma(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tiny: Reranker) -> Iterator[KaLMChroma]:
        store = KaLMChroma(f"standard-{uuid.uuid4()}", self.get_embeddings(), reranker=tiny)
        yield store
        assert store.verify().clean  # whatever the suite did, states are in step
        store.delete_collection()


class TestKaLMChromaOnDisk(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tiny: Reranker, tmp_path: Any) -> Iterator[KaLMChroma]:
        store = KaLMChroma("standard", self.get_embeddings(), str(tmp_path), reranker=tiny, codec="int8")
        yield store
        assert store.verify().clean
        store.close()


class TestKaLMRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _filled(self, tiny: Reranker) -> None:
        self._store = KaLMChroma(f"standard-{uuid.uuid4()}", DeterministicFakeEmbedding(size=6), reranker=tiny)
        self._store.add_documents([Document(f"Passage number {i}.") for i in range(8)])

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return KaLMRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"vectorstore": self._store}

    @property
    def retriever_query_example(self) -> str:
        return "number three"


def three_states(tiny: Reranker) -> tuple[bytes, bytes, bytes]:
    """Bytes of three passages, as the view itself gives them."""
    store = open_store(":memory:", tiny.layout())
    texts = ["one", "number two", "the third of three passages"]
    states = tiny.encode(texts)
    store.put_many(states, [Reference(collection_id="c", record_id=s.key, key=s.key) for s in states])
    one, two, three = (value for value in StateByteStore(store, "c").mget([s.key for s in states]) if value is not None)
    return one, two, three


class TestStateByteStore(BaseStoreSyncTests[bytes]):
    @pytest.fixture
    def kv_store(self, tiny: Reranker) -> StateByteStore:
        return StateByteStore(open_store(":memory:", tiny.layout()))

    @pytest.fixture
    def three_values(self, tiny: Reranker) -> tuple[bytes, bytes, bytes]:
        return three_states(tiny)


class TestStateByteStoreAsync(BaseStoreAsyncTests[bytes]):
    @pytest.fixture
    def kv_store(self, tiny: Reranker) -> StateByteStore:
        return StateByteStore(open_store(":memory:", tiny.layout()))

    @pytest.fixture
    def three_values(self, tiny: Reranker) -> tuple[bytes, bytes, bytes]:
        return three_states(tiny)
