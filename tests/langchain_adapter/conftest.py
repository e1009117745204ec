"""Fixtures of the LangChain adapter's tests. Each test file says what it needs, so nothing is imported here."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from kalm_rag import Reranker
    from kalm_rag.langchain import KaLMChroma, KaLMDocumentCompressor


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from torch's own threads, and lose much on a loaded machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compressor(tiny: Reranker) -> KaLMDocumentCompressor:
    from kalm_rag.langchain import KaLMDocumentCompressor
    from kalm_rag.store.memory import MemoryStore

    return KaLMDocumentCompressor(reranker=tiny, store=MemoryStore(tiny.layout()), top_n=None)


@pytest.fixture
def chroma(tiny: Reranker) -> Iterator[KaLMChroma]:
    from langchain_documents import VECTORS

    from kalm_rag.langchain import KaLMChroma

    store = KaLMChroma(f"test-{uuid.uuid4()}", VECTORS, reranker=tiny)
    store.store.gc([], younger_than=0)  # collections in one process's memory share their states
    yield store
    if store._chroma_collection is not None:
        store.delete_collection()
