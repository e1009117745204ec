"""Faults that stood between doors: names left by a rebuild, folders spelled in two ways, values that Chroma drops."""

from __future__ import annotations

import os
from pathlib import Path

import chromadb
import pytest
from toy import IDS, QUERY, TEXTS, reopen, toy_vectors

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.errors import InputError, KalmRagError, StateMismatchError
from kalm_rag.index import rebuilding


def test_whoever_opens_after_a_dead_rebuild_finds_the_records(
    tmp_path: Path, tiny: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A framework's door made an empty collection beside the complete one, which the next rebuild then deleted."""
    from kalm_rag.langchain import KaLMChroma
    from kalm_rag.llama_index import KaLMChromaVectorStore

    for number, door in enumerate((KaLMChroma, KaLMChromaVectorStore)):
        folder = tmp_path / str(number)
        with reopen(folder, tiny, collection="docs") as index:
            index.add(IDS, TEXTS)
            with monkeypatch.context() as patch:
                patch.setattr(rebuilding, "_take_name", _die)
                with pytest.raises(KeyboardInterrupt):
                    index.rebuild()
        if door is KaLMChroma:
            store = KaLMChroma("docs", _Toy(), persist_directory=str(folder), reranker=tiny)
            assert len(store.get()["ids"]) == 4
            store.close()
        else:
            nodes = KaLMChromaVectorStore.from_params("docs", persist_dir=str(folder), reranker=tiny)
            assert nodes.verify().records == 4
            nodes.close()


def _die(*args: object) -> None:
    raise KeyboardInterrupt


class _Toy:
    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [[float(x) for x in row] for row in toy_vectors(texts)]

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


def test_a_rebuild_keeps_its_hands_off_and_the_settings(tmp_path: Path, tiny: Reranker) -> None:
    client = chromadb.PersistentClient(str(tmp_path))
    made = client.create_collection(
        "docs", embedding_function=None, configuration={"hnsw": {"ef_search": 77, "max_neighbors": 24}}
    )
    made.add(ids=IDS, documents=TEXTS, embeddings=toy_vectors(TEXTS))
    client.create_collection("docs-kalm-rebuild", embedding_function=None)  # the app's own
    with ChromaIndex.open(client=client, collection="docs", model=tiny, embedder=toy_vectors) as index:
        with pytest.raises(InputError, match="is there already, and is not of a rebuild"):
            index.rebuild()
        client.delete_collection("docs-kalm-rebuild")
        index.rebuild()
        settings = index.collection.configuration_json["hnsw"]
        assert (settings["ef_search"], settings["max_neighbors"]) == (77, 24)
        assert index.verify().records == 4
    client.close()


def test_one_folder_spelled_in_two_ways_is_one_database(
    tmp_path: Path, tiny: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with reopen("db", tiny) as first, reopen(os.path.abspath("db"), tiny) as second:
        second.add(IDS, TEXTS)
        assert len(first.query(QUERY, top_n=None)) == 4


def test_a_door_opened_before_learns_of_another_rule(tmp_path: Path, tiny: Reranker) -> None:
    """It went on under the old one, and both undid each other's work."""
    with reopen(tmp_path, tiny) as old:
        old.add(IDS, TEXTS, [{"title": "A"}] * 4)
        with reopen(tmp_path, tiny, passage="{title}: {text}", change_model=True) as new:
            new.backfill()
        old.refresh()
        assert str(old.home.rule) == "{title}: {text}"
        assert old.verify().clean


def test_another_dtype_is_told_at_refresh(tmp_path: Path, tiny: Reranker, tiny_folder: Path) -> None:
    with reopen(tmp_path, tiny) as old:
        old.add(IDS, TEXTS)
        with reopen(tmp_path, str(tiny_folder), device="cpu", dtype="bf16", change_model=True) as new:
            new.backfill()
        with pytest.raises(StateMismatchError, match="dtype"):
            old.refresh()


def test_nothing_of_a_call_is_written_if_one_record_is_refused(tmp_path: Path, tiny: Reranker) -> None:
    """The last of 300 records was refused by Chroma when 256 were written already."""
    ids = [str(n) for n in range(300)]
    with reopen(tmp_path, tiny) as index:
        with pytest.raises(InputError, match="metadata of '299' has the key '\\$x'"):
            index.add(ids, ids, [*[None] * 299, {"$x": 1}])
        assert (len(index), index.verify().orphans) == (0, [])
        assert index.add(["n"], ["None is no value."], [{"a": None, "b": 1}]).records == 1
        assert index.collection.get(ids=["n"])["metadatas"] == [{"b": 1}]


def test_a_filter_with_too_many_values_is_not_called_damage(tmp_path: Path, tiny: Reranker) -> None:
    with reopen(tmp_path, tiny) as index:
        index.add(IDS, TEXTS)
        with pytest.raises(KalmRagError, match=r"ask with fewer|too many"):
            index.query(QUERY, where={"a": {"$in": list(range(40_000))}})
