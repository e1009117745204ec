"""The Chroma vector store: writing, records of others, upkeep, persistence."""

from __future__ import annotations

import asyncio
import copy
import importlib
import pickle
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromadb
import pytest
from chromadb.api.shared_system_client import SharedSystemClient
from filelock import FileLock

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_documents import QUERY, TEXTS, VECTORS, documents

from kalm_rag import ChromaIndex
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, MissingDependencyError, StateMismatchError, StoreError
from kalm_rag.index.clients import LOCK_FILE
from kalm_rag.index.lazy_engine import EngineSpec, release_engines
from kalm_rag.langchain import (
    KaLMChroma,
    KaLMDocumentCompressor,
    KaLMEmbeddings,
    KaLMRerank,
    KaLMRetriever,
    StateByteStore,
)
from kalm_rag.store import FILE_NAME


def test_writing_keeps_states_in_step(chroma: KaLMChroma) -> None:
    given = documents()
    before = copy.deepcopy(given)
    assert chroma.add_documents(given) == [d.id for d in given]
    assert given == before
    assert chroma.verify().clean
    assert chroma.store.stats().states == 5
    chroma.add_texts(["Steel rusts.", "New."], ids=["id-0", "z"], metadatas=[{"only": 1}])
    assert chroma.get_by_ids(["z", "nope", "id-0", "z"]) == [
        Document("New.", id="z"),
        Document(
            "Steel rusts.", id="id-0", metadata={"only": 1}
        ),  # Chroma's own upsert would merge the old metadata in
    ]
    chroma.update_documents(["id-1"], [Document("Changed.", metadata={"new": True})])
    assert chroma.get_by_ids(["id-1"])[0].metadata == {"new": True}
    assert chroma.verify().clean
    chroma.delete(["id-2", "unknown"])
    chroma.delete(where={"place": 3})
    chroma.delete([])
    assert len(chroma.get()["ids"]) == 4
    assert chroma.verify().clean
    assert chroma.gc(younger_than=0).states == 3, "cats, rain and honey are used by no record any more"
    assert chroma.store.stats().states == 4


def test_writing_from_generators_and_without_ids(chroma: KaLMChroma) -> None:
    ids = chroma.add_texts(f"Text {i}." for i in range(5))
    assert len(set(ids)) == 5
    assert [d.page_content for d in chroma.get_by_ids(ids)] == [f"Text {i}." for i in range(5)]
    more = chroma.add_documents(d for d in [Document("a", id="mine"), Document("b")])
    assert more[0] == "mine"
    assert asyncio.run(chroma.aadd_documents(iter([Document("c", id="yours")]))) == ["yours"]
    assert chroma.add_texts([]) == []
    assert chroma.get_by_ids([]) == []
    assert chroma.verify().clean


def test_bad_writes(chroma: KaLMChroma) -> None:
    chroma.add_documents(documents())
    with pytest.raises(InputError, match=r"1 of 2 ids are unknown \(first: 'nope'\)"):
        chroma.update_documents(["id-0", "nope"], [Document("x"), Document("y")])
    assert chroma.get_by_ids(["id-0"])[0].page_content == TEXTS[0]
    with pytest.raises(InputError, match="id 'a' occurs twice"):
        chroma.add_texts(["x", "y"], ids=["a", "a"])
    with pytest.raises(InputError, match="got 1 ids, 2 texts"):
        chroma.add_texts(["x", "y"], ids=["a"])
    with pytest.raises(InputError, match="passages is one string"):
        chroma.add_texts("text")
    with pytest.raises(InputError, match="filter_complex_metadata"):
        chroma.add_texts(["x"], metadatas=[{"nested": {"a": 1}}])
    with pytest.raises(InputError, match="metadatas is one dict; wanted a list"):
        chroma.add_texts(["x"], metadatas={"a": 1})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="neither ids nor a filter"):
        chroma.delete()
    with pytest.raises(InputError, match="unknown arguments: force"):
        chroma.delete(["id-0"], force=True)
    with pytest.raises(InputError, match="unknown arguments: metadata"):
        chroma.add_texts(["x"], metadata=[{}])


@pytest.mark.parametrize("bad", [{"place": {"$near": 3}}, {"$and": []}, {"place": None}], ids=repr)
def test_a_filter_that_is_none_is_refused_by_name(chroma: KaLMChroma, bad: dict[str, Any]) -> None:
    """Chroma's own ValueError came out, which names neither the collection nor this library."""
    chroma.add_documents(documents())
    for ask in (
        lambda: chroma.delete(where=bad),
        lambda: chroma.rerank(QUERY, filter=bad),
        lambda: chroma.similarity_search(QUERY, filter=bad),
        lambda: chroma.max_marginal_relevance_search(QUERY, filter=bad),
        lambda: chroma.similarity_search_by_vector([0.0] * 6, filter=bad),
        lambda: chroma.get(where=bad),
        lambda: KaLMRetriever(vectorstore=chroma, keep_retrieval_score=True).invoke(QUERY, filter=bad),
        lambda: asyncio.run(chroma.arerank(QUERY, filter=bad)),
    ):
        with pytest.raises(InputError, match=r"collection 'test-.*': "):
            ask()
    with pytest.raises(InputError, match=r"collection 'test-.*': "):
        chroma.rerank(QUERY, where_document={"$sounds like": "honey"})
    with pytest.raises(InputError, match="k is 'x'; wanted a whole number"):
        chroma.rerank(QUERY, k="x")  # type: ignore[arg-type]
    assert len(chroma.get()["ids"]) == 5


def test_a_filter_over_the_bundled_vectors(pico: Reranker) -> None:
    """There the search goes another way, with the query as the decoder reads it."""
    store = KaLMChroma(f"bundled-{uuid.uuid4()}", reranker=pico)
    store.add_texts(TEXTS)
    with pytest.raises(InputError, match=r"collection 'bundled-.*': "):
        store.rerank(QUERY, filter={"place": {"$near": 3}})


def test_ids_and_documents_of_another_kind(chroma: KaLMChroma) -> None:
    """A string of ids was taken character by character: three records got the ids a, b and c."""
    chroma.add_documents(documents())
    with pytest.raises(InputError, match=r"ids is one string; wanted a list of strings. Put it in brackets"):
        chroma.add_texts(["x", "y", "z"], ids="abc")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="ids is one string; wanted a list"):
        chroma.get_by_ids("abc")
    with pytest.raises(InputError, match="id 1 is int; wanted a string"):
        chroma.get_by_ids(["id-0", 1])  # type: ignore[list-item]
    with pytest.raises(InputError, match="id 0 is int; wanted a string"):
        chroma.add_texts(["x"], ids=[1])  # type: ignore[list-item]
    for add in (chroma.add_documents, lambda given: chroma.update_documents(["id-0"], given)):
        with pytest.raises(InputError, match="documents is str; wanted a list of Document"):
            add("some text")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="document 0 is str; wanted a langchain_core Document"):
            add(["some text"])  # type: ignore[list-item]
    assert sorted(chroma.get()["ids"]) == [f"id-{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KaLMChroma(3), "collection_name is int; wanted a string"),  # type: ignore[arg-type]
        (lambda: KaLMChroma("docs", client="my-db"), r"client is str; wanted an open Chroma client"),  # type: ignore[arg-type]
        (lambda: KaLMChroma("docs", "all-MiniLM-L6-v2"), "embedding_function is str; wanted LangChain Embeddings"),  # type: ignore[arg-type]
        (lambda: KaLMChroma("docs", persist_directory="a", host="b"), "folder and host were both given"),
        (lambda: KaLMChroma("docs", persist_directory=3), "folder is int; wanted the path"),  # type: ignore[arg-type]
        (lambda: KaLMChroma("docs", reranker="pico"), "reranker is str; wanted a kalm_rag.Reranker"),  # type: ignore[arg-type]
        (lambda: KaLMEmbeddings(3), "device is 3; wanted"),  # type: ignore[arg-type]
        (lambda: KaLMEmbeddings(reranker="pico"), "reranker is str; wanted a kalm_rag.Reranker"),  # type: ignore[arg-type]
        (lambda: KaLMRerank(3), "compressor is int; wanted a KaLMDocumentCompressor"),  # type: ignore[arg-type]
        (lambda: KaLMRetriever(3), "KaLMRetriever got int without a name; wanted its arguments by name"),  # type: ignore[call-arg, misc]
        (lambda: KaLMDocumentCompressor("pico"), "KaLMDocumentCompressor got str without a name"),  # type: ignore[call-arg, misc]
        (lambda: StateByteStore("my-db"), "store is str; wanted an open StateStore"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_another_kind(make: Callable[[], object], message: str) -> None:
    """They came as an AttributeError from inside Chroma, or at the first use."""
    with pytest.raises(InputError, match=message):
        make()


def test_thousands_in_one_call(chroma: KaLMChroma) -> None:
    """Chroma takes 5,461 records a call; langchain-chroma's ``add_texts`` hands over all of them."""
    count = 6000
    ids = chroma.add_documents([Document(f"n{i % 4000}", id=str(i)) for i in range(count)])
    assert len(ids) == count
    assert chroma._collection.count() == count
    assert chroma.store.stats().states == 4000, "the same text under two ids is encoded and stored once"
    assert len(chroma.get_by_ids(ids)) == count


def test_records_of_others(chroma: KaLMChroma, tiny: Reranker) -> None:
    """Records that plain Chroma wrote: without states, without metadata, without text, edited behind our back."""
    plain = Chroma(chroma._collection_name, VECTORS, client=chroma._client)
    plain.add_texts(TEXTS, ids=list("abcde"))
    chroma._collection.add(ids=["bare"], embeddings=[[0.0] * 6])
    assert chroma.verify().missing == list("abcde")
    assert [d.id for d in chroma.get_by_ids(["e", "bare", "a"])] == ["e", "a"]
    found = KaLMRetriever(vectorstore=chroma, k=5).invoke(QUERY)
    assert [d.page_content for d in found] == [TEXTS[r.index] for r in tiny.rank(QUERY, TEXTS)]
    chroma.gc(younger_than=0)
    assert not chroma.verify().missing, "states encoded at query time are kept with their records"
    chroma.backfill()
    assert chroma.verify().clean
    plain.update_document("a", Document("Edited.", metadata={"by": "another"}))
    assert chroma.verify().stale == ["a"]
    fresh = next(d for d in KaLMRetriever(vectorstore=chroma, k=5).invoke(QUERY) if d.id == "a")
    assert fresh.metadata["relevance_score"] == pytest.approx(tiny.rank(QUERY, ["Edited."])[0].probability, abs=1e-6)


@pytest.mark.parametrize("cleanup", ["incremental", "full"])
def test_indexing_api(chroma: KaLMChroma, cleanup: Any) -> None:
    manager = InMemoryRecordManager("test")
    manager.create_schema()

    def run(docs: list[Document]) -> Any:
        return index(docs, manager, chroma, cleanup=cleanup, source_id_key="source", key_encoder="sha256")

    def from_source(*texts: str) -> list[Document]:
        return [Document(t, metadata={"source": "s"}) for t in texts]

    assert run(from_source("one", "two", "three"))["num_added"] == 3
    assert run(from_source("one", "two", "three"))["num_skipped"] == 3
    changed = run(from_source("one", "four"))
    assert (changed["num_added"], changed["num_deleted"]) == (1, 2)
    assert chroma.verify().clean
    assert chroma.gc(younger_than=0).states == 2
    assert chroma.store.stats().states == chroma.store.stats().references == 2


def test_searching_is_chromas_own(chroma: KaLMChroma) -> None:
    chroma.add_documents(documents())
    plain = Chroma(chroma._collection_name, VECTORS, client=chroma._client)
    assert chroma.similarity_search(QUERY, k=3) == plain.similarity_search(QUERY, k=3)
    assert chroma.as_retriever().invoke(QUERY) == plain.as_retriever().invoke(QUERY)
    reranked = chroma.rerank(QUERY, k=2, filter={"place": {"$gt": 1}}, instructions="Find food.", keep_margin=True)
    assert all(d.metadata["place"] > 1 and "relevance_margin" in d.metadata for d in reranked)
    assert len(chroma.rerank(QUERY, k=2, where_document={"$contains": "honey"})) == 1


def test_collections_come_and_go(chroma: KaLMChroma) -> None:
    chroma.add_documents(documents())
    chroma.reset_collection()
    assert chroma.store.stats().references == 0
    chroma.add_texts(["again"])
    assert chroma.verify().clean
    chroma.gc(younger_than=0)
    assert chroma.store.stats().states == 1


def test_constructors_and_persistence(tiny: Reranker, tiny_folder: Path, tmp_path: Path) -> None:
    made = KaLMChroma.from_documents(
        documents(),
        VECTORS,
        collection_name="kept",
        persist_directory=str(tmp_path),
        model=str(tiny_folder),
        device="cpu",
        codec="int8",
        ratio=2,
    )
    assert (tmp_path / FILE_NAME).exists()
    wanted = made.rerank(QUERY)
    made.close()
    again = KaLMChroma("kept", VECTORS, str(tmp_path))  # model, ratio and codec are those it was made with
    assert again.rerank(QUERY) == wanted
    assert (again.store.layout.ratio, again.store.layout.codec.value) == (2, "int8")
    retriever = KaLMRetriever(vectorstore=again, k=2, instructions="Find food.")
    copied = pickle.loads(pickle.dumps(retriever))
    assert copied.invoke(QUERY) == retriever.invoke(QUERY)
    assert len(pickle.dumps(retriever)) < 10_000
    assert (
        len(
            KaLMChroma.from_texts(
                iter(["a", "b"]), VECTORS, reranker=tiny, collection_name="ab" + uuid.uuid4().hex
            ).get()["ids"]
        )
        == 2
    )
    for store in (again, copied.vectorstore):
        store.close()


def test_bad_stores(chroma: KaLMChroma, tiny: Reranker) -> None:
    with pytest.raises(InputError, match="only a KaLMChroma made with persist_directory or host"):
        pickle.dumps(chroma)
    with pytest.raises(InputError, match="reranker and model settings were both given"):
        KaLMChroma(reranker=tiny, model="nano")
    with pytest.raises(InputError, match="missing is 'guess'"):
        KaLMChroma(missing="guess")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'modle'"):
        KaLMChroma(modle="nano")  # type: ignore[call-arg]


def test_bundled_vectors(pico: Reranker) -> None:
    """Without an embedding function one encoder pass gives vector and states; foreign vectors are refused."""
    store = KaLMChroma(f"bundled-{uuid.uuid4()}", reranker=pico)
    store.add_texts(TEXTS)
    assert [d.page_content for d in store.similarity_search(QUERY, k=1)] == ["Bees make honey."]
    assert [d.page_content for d in store.rerank(QUERY, k=1)] == ["Bees make honey."]
    vector = store._collection.get(limit=1, include=["embeddings", "documents"])
    same = KaLMEmbeddings(reranker=pico).embed_documents(vector["documents"])[0]
    assert same == pytest.approx(list(vector["embeddings"][0]), abs=1e-3)
    assert store.similarity_search_with_relevance_scores(QUERY, k=1)[0][1] > 0.5
    foreign = Chroma(f"foreign-{uuid.uuid4()}", VECTORS, client=store._client)
    foreign.add_texts(["x"])
    with pytest.raises(InputError, match="holds vectors of width 6 made by another embedder"):
        KaLMChroma(foreign._collection_name, client=store._client, reranker=pico)


def test_missing_framework_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.startswith("kalm_rag.langchain")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langchain_chroma", None)
    package = importlib.import_module("kalm_rag.langchain")
    with pytest.raises(MissingDependencyError, match=r"needs langchain-chroma.* pip install 'kalm-rag\[langchain\]'"):
        _ = package.KaLMChroma
    assert package.KaLMRetriever(vectorstore=InMemoryVectorStore(VECTORS)).k == 4, "the others need langchain-core only"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


class Constant(DeterministicFakeEmbedding):
    """One vector for everything: another embedding model, as far as a collection can tell."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [[1.0, *[0.0] * (self.size - 1)] for _ in texts]


def test_added_again_under_other_embeddings_vectors_are_theirs(chroma: KaLMChroma, tiny: Reranker) -> None:
    """As in Chroma itself; LangChain's ``index(force_update=True)`` counts on it."""
    given = [Document(TEXTS[0], id="x")]
    place = {"client": chroma._client, "reranker": tiny, "store": chroma.store}
    other = KaLMChroma(chroma._collection_name, Constant(size=6), **place)  # type: ignore[arg-type]
    for add in (other.add_documents, lambda documents: other.update_documents(["x"], documents)):
        chroma.add_documents(given)
        add(given)
        assert list(other.get(include=["embeddings"])["embeddings"][0]) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_engines_are_loaded_again_after_a_release(tiny_folder: Path, tmp_path: Path) -> None:
    store = KaLMChroma("docs", VECTORS, persist_directory=str(tmp_path), model=str(tiny_folder))
    store.add_documents(documents())
    first = store.rerank(QUERY, k=2)
    release_engines()
    assert store.rerank(QUERY, k=2) == first
    assert store.verify().clean
    store.close()
    release_engines()


def test_upkeep_from_a_coroutine(chroma: KaLMChroma) -> None:
    async def kept() -> None:
        await chroma.aadd_documents(documents())
        assert (await chroma.averify()).clean
        assert (await chroma.abackfill()).encoded == 0
        assert (await chroma.agc(younger_than=0)).states == 0
        assert await chroma.arerank(QUERY, top_n=2) == chroma.rerank(QUERY, k=2)

    asyncio.run(kept())


@pytest.mark.parametrize("how", [release_engines, KaLMChroma.close])
def test_a_compressor_goes_on_after_a_release(tiny_folder: Path, tmp_path: Path, how: Any) -> None:
    """One taken from a store stayed dead after ``release_engines()`` or the store's ``close()``."""
    store = KaLMChroma("docs", VECTORS, str(tmp_path), model=str(tiny_folder), device="cpu")
    store.add_documents(documents())
    compressor = store.as_compressor(top_n=2)
    step, retriever = compressor.as_runnable(), KaLMRetriever(vectorstore=store, compressor=compressor)
    given = {"query": QUERY, "documents": documents()}
    wanted, found = step.invoke(given), retriever.invoke(QUERY)
    how(*[store] if how is KaLMChroma.close else [])
    assert step.invoke(given) == wanted
    assert retriever.invoke(QUERY) == found
    assert store.verify().clean
    store.close()
    release_engines()


def test_close_closes_the_client_it_made(tiny: Reranker, tmp_path: Path) -> None:
    """It was left open: a folder that was deleted and made again in one process could not be used."""
    folder = tmp_path / "db"
    for text in ("first", "second"):
        store = KaLMChroma("docs", VECTORS, str(folder), reranker=tiny)
        store.add_texts([text], ids=["x"])
        store.close()
        assert str(folder) not in SharedSystemClient._identifier_to_system
        assert store.get_by_ids(["x"])[0].page_content == text, "opened again"
        store.close()
        shutil.rmtree(folder)
    client = chromadb.PersistentClient(str(folder))
    given = KaLMChroma("docs", VECTORS, client=client, reranker=tiny)
    given.add_texts(["x"])
    given.close()
    assert client.get_collection("docs").count() == 1, "the app's own client stays open"
    assert len(given.get()["ids"]) == 1
    memory = KaLMChroma(f"kept-{uuid.uuid4()}", VECTORS, reranker=tiny)
    memory.add_texts(["x"])
    memory.close()
    assert len(memory.get()["ids"]) == 1, "what is in memory has no other place"
    assert memory.verify().clean
    given.close()
    client.close()


def test_deleting_and_upkeep_load_no_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = KaLMChroma("docs", VECTORS, str(tmp_path), model=str(tiny_folder), device="cpu")
    filled.add_documents(documents())
    filled.close()
    release_engines()
    monkeypatch.setattr(EngineSpec, "engine", lambda spec: pytest.fail("a model was loaded"))
    store = KaLMChroma("docs", VECTORS, str(tmp_path))
    store.delete(["id-0", "unknown"])
    assert store.verify().clean
    assert store.gc(younger_than=0).states == 1
    assert len(store.get()["ids"]) == 4
    store.close()


def test_a_collection_made_again_is_followed(tiny: Reranker, tmp_path: Path) -> None:
    store = KaLMChroma("docs", VECTORS, str(tmp_path), reranker=tiny)
    store.add_documents(documents())
    wanted, compressor = store.rerank(QUERY), store.as_compressor()
    for change in (store.refresh, store.rebuild):
        change()
        assert store.rerank(QUERY) == wanted
        assert KaLMRetriever(vectorstore=store, compressor=compressor).invoke(QUERY) == wanted
        assert store.verify().clean
    store.close()


def test_nothing_is_made_for_a_collection_that_is_not_there(tiny: Reranker, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Chroma database in"):
        KaLMChroma("docs", VECTORS, str(tmp_path / "db"), reranker=tiny, create_collection_if_not_exists=False)
    assert not (tmp_path / "db").exists()


def test_a_second_writer_waits_or_fails_by_name(tiny: Reranker, tmp_path: Path) -> None:
    store = KaLMChroma("docs", VECTORS, str(tmp_path), reranker=tiny)
    store.add_texts(["one"], ids=["1"])
    store.home.database.lock_seconds = 0.05
    writes = (
        lambda: store.add_texts(["two"], ids=["2"]),
        lambda: store.update_documents(["1"], [Document("changed")]),
        lambda: store.delete(["1"]),
        store.delete_collection,
        store.reset_collection,
    )
    with FileLock(tmp_path / LOCK_FILE):
        for write in writes:
            with pytest.raises(StoreError, match="another process has been writing to the Chroma database"):
                write()
        assert [d.page_content for d in store.rerank("one?")] == ["one"], "readers are not held up"
        assert len(KaLMChroma("docs", VECTORS, str(tmp_path), reranker=tiny).get()["ids"]) == 1
    store.add_texts(["two"], ids=["2"])
    assert store.verify().clean
    store.close()


def test_metadata_in_the_text_that_is_read(tiny: Reranker, tmp_path: Path) -> None:
    """The rule is the collection's: every door and every later opening reads by it."""
    store = KaLMChroma("docs", VECTORS, str(tmp_path), reranker=tiny, passage="{title}: {text}")
    given = [Document("Boil it.", id="tea", metadata={"title": "Tea"}), Document("Bake it.", id="bread")]
    store.add_documents(given)
    again = KaLMChroma("docs", VECTORS, str(tmp_path), reranker=tiny, missing="raise")
    expected = tiny.rank(QUERY, ["Tea: Boil it.", ": Bake it."])
    for found in (
        again.rerank(QUERY),
        again.as_compressor().compress_documents(given, QUERY),
        KaLMDocumentCompressor(reranker=tiny, passage="{title}: {text}").compress_documents(given, QUERY),
    ):
        assert [d.page_content for d in found] == [given[r.index].page_content for r in expected]
        assert [d.metadata["relevance_score"] for d in found] == [
            pytest.approx(r.probability, abs=1e-6) for r in expected
        ]
    with ChromaIndex.open(tmp_path, collection="docs", model=tiny, embedder=VECTORS) as index:
        assert index.verify().clean
    with pytest.raises(StateMismatchError, match=r"was made with passage '\{title\}: \{text\}'; asked for 'document'"):
        KaLMChroma("docs", VECTORS, str(tmp_path), reranker=tiny, passage="document").rerank(QUERY)
    with pytest.raises(InputError, match=r"passage is '\{title\}'"):
        KaLMChroma("docs", VECTORS, str(tmp_path), reranker=tiny, passage="{title}")
    for opened in (store, again):
        opened.close()


def test_states_of_llama_index_are_found(tiny: Reranker, tmp_path: Path) -> None:
    """A collection filled through LlamaIndex has states of its nodes' text; they were encoded again, and swept."""
    llama = pytest.importorskip("kalm_rag.llama_index", reason="llama-index-core is not installed")
    schema = pytest.importorskip("llama_index.core.schema")
    theirs = llama.KaLMChromaVectorStore(collection_name="docs", persist_dir=str(tmp_path), reranker=tiny)
    nodes = [
        schema.TextNode(id_=f"n{i}", text=t, metadata={"topic": f"t{i}"}, embedding=VECTORS.embed_query(t))
        for i, t in enumerate(TEXTS)
    ]
    theirs.add(nodes)
    ours = KaLMChroma("docs", VECTORS, str(tmp_path), reranker=tiny, missing="raise")
    assert len(ours.rerank(QUERY, k=5)) == 5
    assert ours.verify().clean
    assert ours.gc(younger_than=0).states == 0
    assert ours.backfill().encoded == 0
    ours.close()


def test_a_deleted_collection_leaves_nothing(tiny: Reranker, tmp_path: Path) -> None:
    """Its states stayed for good, and lists in its metadata turned up in records that were added later."""
    store = KaLMChroma("docs", VECTORS, str(tmp_path), reranker=tiny)
    store.add_documents(documents())
    states = store.store
    store.delete_collection()
    assert store.gc(younger_than=0).states == 5, "swept though no collection is left"
    assert states.stats().states == states.stats().references == 0
    other = KaLMChroma("others", VECTORS, str(tmp_path), reranker=tiny)
    other.add_texts(TEXTS, [{"n": i} for i in range(5)], ids=list("abcde"))
    assert [d.metadata for d in other.get_by_ids(list("abcde"))] == [{"n": i} for i in range(5)]
    for opened in (store, other):
        opened.close()
