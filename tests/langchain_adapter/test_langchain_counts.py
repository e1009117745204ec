"""What one call costs through the LangChain door, counted."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_documents import QUERY

from kalm_rag.engine.reranker import Reranker
from kalm_rag.index import candidates
from kalm_rag.langchain import KaLMChroma, KaLMRetriever
from kalm_rag.store.sqlite import SqliteStore


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often states are looked up, made, kept and read, texts hashed, and files opened."""
    counted: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    for name in ("missing", "put_many", "get_many"):
        count(SqliteStore, name)
    count(Reranker, "encode")
    count(candidates, "passage_key")
    count(sqlite3, "connect")
    return counted


def test_thirty_passages_and_a_query(pico: Reranker, tmp_path: Path, calls: Counter[str]) -> None:
    store = KaLMChroma("docs", persist_directory=str(tmp_path), reranker=pico)
    retriever, compressor = KaLMRetriever(vectorstore=store, fetch_k=30), store.as_compressor()
    assert store.store.stats().states == 0
    assert retriever.invoke(QUERY) == []  # everything is open
    texts = [f"Fact {i} about bees." for i in range(30)]
    calls.clear()
    store.add_texts(texts, ids=list(map(str, range(30))))
    assert calls == {"passage_key": 30, "missing": 1, "encode": 1, "put_many": 1}
    for ask in (retriever.invoke, store.rerank, KaLMRetriever(vectorstore=store, compressor=compressor).invoke):
        calls.clear()
        assert len(ask(QUERY)) in (3, 4)
        assert calls == {"passage_key": 30, "get_many": 1}
    store.close()
