"""What one call costs through the LangChain door, counted."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_core.documents import Document
from langchain_documents import QUERY, TEXTS

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


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "rerank", "scored"])
def test_a_query_is_read_once(pico: Reranker, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The search read it, and the decoder read it again."""
    store = KaLMChroma(f"once-{uuid.uuid4()}", reranker=pico)
    store.add_texts(TEXTS, ids=list("abcde"))
    retriever = KaLMRetriever(vectorstore=store, instructions="Find food.", k=2, keep_retrieval_score=how == "scored")
    wanted = [
        d.id
        for d in store.as_compressor(instructions="Find food.", top_n=2).compress_documents(
            store.get_by_ids(list("abcde")), QUERY
        )
    ]
    reads: Counter[str] = Counter()
    for name in ("prompt", "embed"):
        real = getattr(type(pico.backbone.prompts), name)  # type: ignore[attr-defined]
        monkeypatch.setattr(
            type(pico.backbone.prompts),  # type: ignore[attr-defined]
            name,
            lambda *args, real=real, name=name: (reads.update([name]), real(*args))[1],
        )
    ask: dict[str, Callable[[], list[Document]]] = {
        "invoke": lambda: retriever.invoke(QUERY),
        "ainvoke": lambda: asyncio.run(retriever.ainvoke(QUERY)),
        "rerank": lambda: store.rerank(QUERY, k=2, instructions="Find food."),
        "scored": lambda: retriever.invoke(QUERY),
    }
    found = ask[how]()
    assert reads == {"prompt": 1}
    assert [d.id for d in found] == wanted
    assert all(("retrieval_score" in d.metadata) is (how == "scored") for d in found)
