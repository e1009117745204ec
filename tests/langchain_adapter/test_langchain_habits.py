"""How LangChain apps are used to call vector stores, retrievers and rerankers: their calls mean the same here."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_chroma import Chroma
from langchain_documents import QUERY, TEXTS, VECTORS, documents

from kalm_rag.engine.reranker import Reranker
from kalm_rag.langchain import KaLMChroma


@pytest.mark.parametrize("name", ["from_texts", "from_documents", "__init__"])
def test_arguments_stand_where_chroma_has_them(name: str) -> None:
    """Behind the collection's name, positional arguments were refused."""

    def positional(kind: type[Chroma]) -> list[str]:
        parameters = inspect.signature(getattr(kind, name)).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(KaLMChroma) == positional(Chroma)
    assert len(positional(Chroma)) > 10


def test_a_folder_by_its_place(tiny: Reranker, tmp_path: Path) -> None:
    made = KaLMChroma.from_texts(TEXTS, VECTORS, None, None, "docs", str(tmp_path / "texts"), reranker=tiny)
    assert len(made.rerank(QUERY, k=5)) == 5
    assert (tmp_path / "texts").is_dir()
    made.close()
    where = "docs", str(tmp_path / "documents"), None, None, None, None, None, None, None, None, {"owner": "us"}
    made = KaLMChroma.from_documents(documents(), VECTORS, None, *where, reranker=tiny)
    assert sorted(d.id or "" for d in made.rerank(QUERY, k=5)) == [f"id-{i}" for i in range(5)]
    assert made._collection.metadata["owner"] == "us"
    assert made.verify().clean
    made.close()
