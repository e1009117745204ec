"""Fixtures of the LlamaIndex adapter's tests."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import chromadb
import pytest
import torch

from kalm_rag import Reranker
from kalm_rag.llama_index import KaLMChromaVectorStore


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from torch's own threads, and lose much on a loaded machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def client() -> chromadb.ClientAPI:
    return chromadb.EphemeralClient()


@pytest.fixture
def collection(client: chromadb.ClientAPI) -> chromadb.Collection:
    return client.create_collection(f"c-{uuid.uuid4().hex}")


@pytest.fixture
def vectors(collection: chromadb.Collection, tiny: Reranker) -> KaLMChromaVectorStore:
    return KaLMChromaVectorStore(collection, reranker=tiny)
