"""One collection through several doors, what a write costs, and what is refused before anything is written."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
import math
import pickle
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromadb
import pytest
from chromadb.api.shared_system_client import SharedSystemClient
from filelock import FileLock
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_nodes import EMBEDDING, QUERY, TEXTS, expected, got, make_nodes, same, scored, stored
from pydantic import ValidationError

import kalm_rag.states.passage as passage
from kalm_rag import ChromaIndex, Reranker
from kalm_rag.errors import InputError, StateMismatchError, StoreError
from kalm_rag.index.clients import LOCK_FILE
from kalm_rag.index.collection import CollectionNotes
from kalm_rag.llama_index import KaLMChromaVectorStore, KaLMNodePostprocessor, KaLMStateTransform
from kalm_rag.models.pico.encoder import MiniLMEncoder

TITLED = [{"title": f"Title {i}"} for i in range(len(TEXTS))]


class _Counted:
    """Stands for ``hashlib`` where keys are made."""

    def __init__(self, calls: Counter[str]) -> None:
        self.calls = calls

    def sha256(self, data: bytes) -> Any:
        self.calls["sha256"] += 1
        return hashlib.sha256(data)


def count_work(monkeypatch: pytest.MonkeyPatch, vectors: KaLMChromaVectorStore) -> Counter[str]:
    """Count what a door asks of the engine and the store from now on."""
    calls: Counter[str] = Counter()
    _, store = vectors.parts.get()
    monkeypatch.setattr(passage, "hashlib", _Counted(calls))
    encode = Reranker.encode

    def counted_encode(engine: Reranker, passages: Any, **fields: Any) -> Any:
        texts = list(passages)
        calls["encode"] += bool(texts)
        calls["encoded"] += len(texts)
        return encode(engine, texts, **fields)

    monkeypatch.setattr(Reranker, "encode", counted_encode)
    for name in ("missing", "get_many", "put_many"):
        real = getattr(store, name)

        def counted(*args: Any, _name: str = name, _do: Any = real, **fields: Any) -> Any:
            calls[_name] += 1
            result = _do(*args, **fields)
            calls["payloads"] += len(result.found) if _name == "get_many" else 0
            return result

        monkeypatch.setattr(store, name, counted)
    return calls


class TestCost:
    def test_thirty_new_nodes(self, vectors: KaLMChromaVectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = count_work(monkeypatch, vectors)
        vectors.add(make_nodes([f"River {i}" for i in range(30)]))
        assert calls == Counter(sha256=30, encode=1, encoded=30, missing=1, put_many=1)
        assert vectors.verify().clean

    def test_embedding_and_adding_encode_once(
        self, pico: Reranker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What `KaLMEmbedding` makes is handed on in memory: nothing is in the store before its record is."""
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=pico)
        calls = count_work(monkeypatch, vectors)
        nodes = [TextNode(text=f"River {i}") for i in range(30)]
        VectorStoreIndex(
            nodes,
            storage_context=StorageContext.from_defaults(vector_store=vectors),
            embed_model=vectors.as_embedding(),
        )
        assert (calls["encode"], calls["encoded"], calls["put_many"], calls["payloads"]) == (1, 30, 1, 0)
        assert vectors.verify().clean
        vectors.as_embedding().get_text_embedding("Of no record.")
        assert stored(vectors) == 30

    @pytest.mark.parametrize("how", ["retriever", "aretriever", "twice", "postprocessor"])
    def test_a_query_is_read_once(
        self, pico: Reranker, collection: Any, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """The embedding reads it for the search, the postprocessor for the decoder: one pass for both."""
        vectors = KaLMChromaVectorStore(collection, reranker=pico)
        context = StorageContext.from_defaults(vector_store=vectors)
        nodes = [TextNode(id_=f"n{i}", text=text) for i, text in enumerate(TEXTS)]
        index = VectorStoreIndex(nodes, storage_context=context, embed_model=vectors.as_embedding())
        retriever, post = index.as_retriever(similarity_top_k=4), vectors.as_postprocessor(missing="raise")
        passes: list[int] = []
        real = MiniLMEncoder.hidden
        monkeypatch.setattr(MiniLMEncoder, "hidden", lambda self, ids: (passes.append(len(ids)), real(self, ids))[1])
        query = f"Which river is the longest, asked by {how}?"
        if how == "postprocessor":
            assert post.postprocess_nodes(scored(nodes), query_str=query)
        elif how == "aretriever":
            found = asyncio.run(retriever.aretrieve(query))
            assert asyncio.run(post.apostprocess_nodes(found, query_str=query))
        else:
            for _ in range(2 if how == "twice" else 1):
                assert post.postprocess_nodes(retriever.retrieve(query), query_str=query)
        assert passes == [1]

    def test_cut_passages_are_told(self, pico: Reranker, collection: Any, caplog: pytest.LogCaptureFixture) -> None:
        """A splitter may make more tokens than a model reads; the rest was cut without a word."""
        vectors = KaLMChromaVectorStore(collection, reranker=pico)
        long = TextNode(id_="long", text="The river flows on and on. " * 400)
        long.embedding = vectors.as_embedding().get_text_embedding(long.text)
        short = TextNode(id_="short", text="Tea.", embedding=long.embedding)
        with caplog.at_level(logging.WARNING, "kalm_rag.llama_index"):
            vectors.add([short, long])
        assert "1 of 2 passages are longer than the model reads, which has cut them (first: node long)" in caplog.text


class TestOneCollectionTwoDoors:
    """A collection says how its records are read; the doors went by rules of their own, and undid each other's work."""

    def test_a_collection_of_the_index(self, pico: Reranker, tmp_path: Path) -> None:
        with ChromaIndex.open(tmp_path, model=pico) as index:
            index.add(list("abcd"), TEXTS, TITLED)
            truth = {hit.id: hit.probability for hit in index.query(QUERY, top_n=None).hits}
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=pico)
        assert str(vectors.rule) == "document"
        assert vectors.verify().clean
        index_ = VectorStoreIndex.from_vector_store(vectors, embed_model=vectors.as_embedding())
        nodes = index_.as_retriever(similarity_top_k=4).retrieve(QUERY)
        post = vectors.as_postprocessor(top_n=None, missing="raise")
        ranked = got(post.postprocess_nodes(nodes, query_str=QUERY))
        same(ranked, truth)
        for again in (pickle.loads(pickle.dumps(post)), KaLMNodePostprocessor.from_json(post.to_json())):
            assert got(again.postprocess_nodes(nodes, query_str=QUERY)) == ranked
        new = TextNode(id_="e", text="The Rhine.", metadata={"title": "E"})
        new.embedding = vectors.as_embedding().get_text_embedding(new.get_content(metadata_mode=MetadataMode.EMBED))
        vectors.add([new])
        assert vectors.backfill().encoded == 0
        vectors.close()
        with ChromaIndex.open(tmp_path, model=pico) as index:
            assert index.verify().clean
            assert index.backfill().encoded == 0

    def test_a_collection_of_llama_index(self, pico: Reranker, tmp_path: Path) -> None:
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=pico)
        documents = [Document(text=text, metadata=titled) for text, titled in zip(TEXTS, TITLED, strict=True)]
        context = StorageContext.from_defaults(vector_store=vectors)
        app = VectorStoreIndex.from_documents(documents, storage_context=context, embed_model=vectors.as_embedding())
        nodes = app.as_retriever(similarity_top_k=4).retrieve(QUERY)
        ranked = vectors.as_postprocessor(top_n=None).postprocess_nodes(nodes, query_str=QUERY)
        same(got(ranked), expected(pico, nodes))
        vectors.close()
        with ChromaIndex.open(tmp_path, model=pico) as index:
            assert index.verify().clean
            assert index.backfill().encoded == 0
            hits = {hit.id: hit.probability for hit in index.query(QUERY, top_n=None, missing="raise").hits}
            same(hits, got(ranked))
            index.add(["mine"], ["The Volga is long."], [{"title": "Volga"}])
        again = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=pico)
        assert again.verify().clean
        (node,) = again.get_nodes(["mine"])
        assert node.get_content(metadata_mode=MetadataMode.EMBED) == "title: Volga\n\nThe Volga is long."
        assert again.as_postprocessor(missing="raise").postprocess_nodes([NodeWithScore(node=node)], query_str=QUERY)

    @pytest.mark.parametrize("rule", ["document", "{title}: {text}", "llama_index:llm"])
    def test_every_component_follows(self, tiny: Reranker, client: chromadb.ClientAPI, rule: str) -> None:
        collection = client.create_collection(f"c-{id(rule)}", metadata=CollectionNotes(passage=rule).metadata())
        vectors = KaLMChromaVectorStore(collection, reranker=tiny)
        nodes = make_nodes()
        for node in nodes:
            node.metadata = {"title": f"On {node.text}"}
            node.excluded_llm_metadata_keys = ["title"]
        KaLMStateTransform(store=vectors)(nodes)
        post = vectors.as_postprocessor(missing="raise", top_n=None)
        ranked = got(post.postprocess_nodes(scored(nodes), query_str=QUERY))
        read = [f"On {t}: {t}" if rule.startswith("{") else t for t in TEXTS]
        truth = {nodes[r.index].node_id: r.probability for r in tiny.rank(QUERY, read)}
        same(ranked, truth)
        vectors.add(nodes)
        assert vectors.verify().clean
        assert {str(c.rule) for c in (vectors, post, KaLMStateTransform(store=vectors))} == {rule}
        asked: dict[str, Any] = {"metadata_mode": "llm"} if "llama" in rule else {"passage": rule}
        named = KaLMNodePostprocessor(store=vectors, **asked)
        assert str(named.rule) == rule

    def test_what_contradicts_the_collection_is_refused(self, tiny: Reranker, client: chromadb.ClientAPI) -> None:
        collection = client.get_or_create_collection("noted", metadata=CollectionNotes(passage="document").metadata())
        match = r"metadata_mode is .*EMBED.*'llama_index:embed'; collection 'noted' reads them as 'document'. Leave"
        with pytest.raises(StateMismatchError, match=match):
            KaLMChromaVectorStore(collection, reranker=tiny, metadata_mode=MetadataMode.EMBED)
        with pytest.raises(StateMismatchError, match=r"passage is .* 'noted' reads them as 'document'"):
            KaLMChromaVectorStore(collection, reranker=tiny, passage="{title} {text}")
        vectors = KaLMChromaVectorStore(collection, reranker=tiny)
        with pytest.raises(ValidationError, match="the vector store reads them as 'document'"):
            vectors.as_postprocessor(metadata_mode=MetadataMode.LLM)
        with pytest.raises(ValidationError, match=r"passage is '{title}'; wanted 'document', a template with"):
            KaLMNodePostprocessor(passage="{title}")

    @pytest.mark.parametrize(
        ("notes", "rule"),
        [
            ({"kalm_rag:model": "pico", "kalm_rag:embedder": "all-MiniLM-L6-v2"}, "document"),  # ChromaIndex's
            ({"kalm_rag:model": "pico"}, "llama_index:embed"),  # this door's
            ({"theirs": 1}, "llama_index:embed"),  # nobody's
        ],
    )
    def test_collections_from_before_rules_were_noted(
        self, client: chromadb.ClientAPI, notes: dict[str, Any], rule: str
    ) -> None:
        collection = client.create_collection(f"old-{len(notes)}-{rule[:5]}-{'theirs' in notes}", metadata=notes)
        collection.add(ids=["a"], documents=TEXTS[:1], embeddings=[[0.1] * 8], metadatas=[{"title": "T"}])
        vectors = KaLMChromaVectorStore(collection)
        assert str(vectors.rule) == rule
        assert vectors.backfill().encoded == 1
        assert CollectionNotes.read(client.get_collection(collection.name).metadata).passage == rule

    def test_a_new_collection_may_have_a_template(self, tiny: Reranker, tmp_path: Path) -> None:
        vectors = KaLMChromaVectorStore.from_params(
            "passages", persist_dir=str(tmp_path), reranker=tiny, passage="{topic}: {text}"
        )
        vectors.add(make_nodes())
        vectors.close()
        again = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=tiny)
        assert again.passage == "{topic}: {text}"
        assert again.verify().clean
        assert KaLMChromaVectorStore.from_dict(again.to_dict()).rule == again.rule


class TestEmbedders:
    """Vectors of another model as wide as the collection's were mixed with them without a word."""

    def test_new_vectors_must_be_the_noted_models(self, pico: Reranker, tmp_path: Path) -> None:
        with ChromaIndex.open(tmp_path, model=pico) as index:
            index.add(list("abcd"), TEXTS, TITLED)
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=pico)
        with pytest.raises(InputError, match=r"holds vectors of all-MiniLM-L6-v2; the embedding of node 'x' is not"):
            vectors.add([TextNode(id_="x", text="The Rhine.", embedding=[0.1] * 384)])
        assert vectors.verify().records == 4
        node = TextNode(text="The Rhine.", metadata={"title": "A long title about something else"})
        node.embedding = vectors.as_embedding().get_text_embedding(node.get_content(metadata_mode=MetadataMode.EMBED))
        vectors.add([node])
        assert vectors.verify().clean

    def test_ours_over_another_models(self, pico: Reranker, tmp_path: Path) -> None:
        def other(texts: list[str]) -> list[list[float]]:
            return [(EMBEDDING._vector(text) * 48) for text in texts]

        with ChromaIndex.open(tmp_path, model=pico, embedder=other) as index:
            index.add(list("abcd"), TEXTS)
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=pico)
        with pytest.raises(InputError, match=r"made by other; all-MiniLM-L6-v2 gives width 384 .* Pass embed_model="):
            vectors.as_embedding()


class TestNothingIsWritten:
    @pytest.mark.parametrize(
        ("node", "message"),
        [
            (TextNode(id_="", text="x", embedding=[0.1] * 8), r"ids\[1\] is empty"),
            (TextNode(id_="wide", text="x", embedding=[0.1] * 3), "node 'wide' has an embedding of 3 numbers"),
            (
                TextNode(id_="odd", text="x", embedding=[math.nan] * 8),
                "node 'odd' has an embedding .* wanted finite ones",
            ),
            (TextNode(id_="none", text="x"), "node 'none': embedding not set"),
            (TextNode(id_="big", text="x", metadata={"a": 2**70}, embedding=[0.1] * 8), "doesn't fit 64 bits"),
            (
                TextNode(id_="list", text="x", metadata={"a": [1]}, embedding=[0.1] * 8),
                "node 'list': .* must be one of",
            ),
            (TextNode(id_="half", text="\ud800", embedding=[0.1] * 8), "node half holds a lone surrogate"),
        ],
        ids=lambda value: value.node_id or "empty" if isinstance(value, TextNode) else "",
    )
    def test_one_bad_node(self, tiny: Reranker, tmp_path: Path, node: TextNode, message: str) -> None:
        """States and references were written before Chroma refused the record, and stayed."""
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=tiny)
        with pytest.raises(InputError, match=message):
            vectors.add([*make_nodes(TEXTS[:1]), node])
        assert (vectors._collection.count(), stored(vectors)) == (0, 0)

    def test_vectors_of_another_width_than_the_collections(self, tiny: Reranker, tmp_path: Path) -> None:
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=tiny)
        vectors.add(make_nodes())
        with pytest.raises(InputError, match="width 3; collection 'passages' holds width 8"):
            vectors.add([TextNode(text="Another embedder.", embedding=[0.1] * 3)])
        assert vectors.verify().clean
        assert stored(vectors) == 4

    def test_another_process_writes(self, tiny: Reranker, tmp_path: Path) -> None:
        """Two writers of one folder lost vectors without a word; now the second one waits, or fails by name."""
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=tiny)
        vectors.add(make_nodes(TEXTS[:1]))
        vectors._home.database.lock_seconds = 0.1
        theirs = FileLock(tmp_path / LOCK_FILE)
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with theirs:
                held.set()
                done.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            assert held.wait(60)
            with pytest.raises(StoreError, match="another process has been writing"):
                vectors.add(make_nodes())
            with pytest.raises(StoreError, match="another process has been writing"):
                vectors.delete_nodes(["n0"])
            found = vectors.query(VectorStoreQuery(query_embedding=EMBEDDING._vector(TEXTS[0]), similarity_top_k=1))
            assert found.ids == ["n0"]  # readers are never held up
        finally:
            done.set()
            thread.join()
        vectors.add(make_nodes())
        assert vectors.verify().clean


class TestNothingToScore:
    """A reranker takes no app down: an agent's blank query, or one node out of a broken PDF, did."""

    @pytest.mark.parametrize("threshold", [None, 0.5])
    def test_a_blank_query(self, caplog: pytest.LogCaptureFixture, threshold: float | None) -> None:
        post = KaLMNodePostprocessor(model="never loaded", top_n=2, threshold=threshold)
        ranked = post.postprocess_nodes(scored(), query_str=" \n")
        assert [(n.node_id, n.score) for n in ranked] == ([("n0", None), ("n1", None)] if threshold is None else [])
        assert "query is blank, so 4 candidates are not scored" in caplog.text

    def test_one_lone_surrogate(self, tiny: Reranker, caplog: pytest.LogCaptureFixture) -> None:
        nodes = scored([TextNode(id_="bad", text="equation \ud835"), *make_nodes()])
        ranked = KaLMNodePostprocessor(reranker=tiny, top_n=None).postprocess_nodes(nodes, query_str=QUERY)
        same(got(ranked[:4]), expected(tiny, nodes[1:]))
        assert (ranked[4].node_id, ranked[4].score) == ("bad", None)
        assert "text of node bad holds a lone surrogate" in caplog.text


class TestClosing:
    def test_what_was_opened_is_closed(self, tiny: Reranker, tmp_path: Path) -> None:
        """The Chroma client stayed open: files and threads for each folder, and a deleted folder's records lived on."""
        fds = Path("/proc/self/fd")
        if not fds.exists():
            pytest.skip("descriptors can't be counted here")

        def use(folder: Path) -> None:
            vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(folder), reranker=tiny)
            assert vectors.verify().records == 0
            vectors.add(make_nodes())
            assert len(vectors.get_nodes()) == 4
            vectors.close()

        use(tmp_path / "first")
        before = len(list(fds.iterdir()))
        for place in range(5):
            use(tmp_path / str(place))
        assert len(list(fds.iterdir())) < before + 5  # a leak is one per folder at least; others open some
        shutil.rmtree(tmp_path / "first")
        use(tmp_path / "first")

    def test_all_is_opened_again_when_needed(self, tiny: Reranker, tmp_path: Path) -> None:
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=tiny)
        vectors.add(make_nodes())
        query = VectorStoreQuery(query_embedding=EMBEDDING._vector(TEXTS[0]), similarity_top_k=1)
        post, copied = vectors.as_postprocessor(missing="raise"), copy.deepcopy(vectors)
        uses: list[Callable[[], object]] = [
            lambda: post.postprocess_nodes(scored(), query_str=QUERY),
            lambda: vectors.query(query).ids == ["n0"],
            lambda: copied.query(query).ids == ["n0"],
            lambda: len(vectors.get_nodes(["n1"])) == 1,
            lambda: vectors.client.count() == 4,
            lambda: vectors.add(make_nodes()),
            lambda: vectors.verify().clean,
        ]
        for use in uses:
            vectors.close()
            vectors.close()
            assert use()
        vectors.close()
        chromadb.PersistentClient(str(tmp_path)).delete_collection("passages")
        with pytest.raises(InputError, match="no collection 'passages'"):
            vectors.verify()  # it isn't made again, empty

    def test_a_refused_opening_leaves_nothing_open(self, tiny: Reranker, tmp_path: Path) -> None:
        KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=tiny).close()
        with pytest.raises(StateMismatchError, match="Leave metadata_mode out"):
            KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), metadata_mode="llm")
        assert str(tmp_path) not in SharedSystemClient._identifier_to_system

    def test_a_client_of_the_apps_stays_open(self, tiny: Reranker, client: chromadb.ClientAPI) -> None:
        collection = client.get_or_create_collection("theirs")
        for vectors in (
            KaLMChromaVectorStore(collection, reranker=tiny),
            KaLMChromaVectorStore(collection_name="theirs", client=client, reranker=tiny),
        ):
            vectors.add(make_nodes())
            vectors.close()
            assert collection.count() == 4
            assert vectors.verify().clean

    def test_rebuilt_without_encoding(self, pico: Reranker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A broken vector index is made again; the states, and the nodes as the collection reads them, stay."""
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=pico)
        context = StorageContext.from_defaults(vector_store=vectors)
        nodes = [TextNode(id_=f"n{i}", text=t, metadata=m) for i, (t, m) in enumerate(zip(TEXTS, TITLED, strict=True))]
        index = VectorStoreIndex(nodes, storage_context=context, embed_model=vectors.as_embedding())
        found = index.as_retriever(similarity_top_k=4).retrieve(QUERY)
        calls = count_work(monkeypatch, vectors)
        assert vectors.rebuild(vectors.as_embedding()).records == 4
        assert calls["encode"] == 0
        assert vectors.verify().clean
        again = index.as_retriever(similarity_top_k=4).retrieve(QUERY)
        assert [n.to_dict() for n in again] == [n.to_dict() for n in found]
        assert str(vectors.rule) == "llama_index:embed"

    def test_refresh(self, tiny: Reranker, tmp_path: Path) -> None:
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=tiny)
        vectors.add(make_nodes())
        vectors.refresh()
        assert vectors.verify().clean
        theirs = KaLMChromaVectorStore(vectors.client, reranker=tiny)
        with pytest.raises(InputError, match="was given its Chroma client"):
            theirs.refresh()


@pytest.mark.parametrize("trip", [lambda v: v, lambda v: pickle.loads(pickle.dumps(v))], ids=["fresh", "pickled"])
def test_a_store_at_a_place_has_the_ratio_and_codec_asked_for(tiny: Reranker, tmp_path: Path, trip: Any) -> None:
    """With ``store=`` a file, both were left out without a word."""
    place = tmp_path / "elsewhere.sqlite3"
    given: dict[str, Any] = {"persist_dir": str(tmp_path), "reranker": tiny, "store": place}
    vectors = trip(KaLMChromaVectorStore.from_params("passages", ratio=2, codec="int8", **given))
    vectors.add(make_nodes())
    layout = vectors.parts.get()[1].layout
    assert (layout.ratio, layout.codec.value) == (2, "int8")
    post = vectors.as_postprocessor(missing="raise")
    ranked = got(post.postprocess_nodes(scored(), query_str=QUERY))
    assert got(pickle.loads(pickle.dumps(post)).postprocess_nodes(scored(), query_str=QUERY)) == ranked
    again = KaLMChromaVectorStore.from_params("passages", **given)
    assert again.parts.get()[1].layout == layout
    for field, value in (("ratio", 4), ("codec", "exact")):
        with pytest.raises(StateMismatchError, match=r"holds states of model .* ratio 2, codec int8"):
            KaLMChromaVectorStore.from_params("passages", **given, **{field: value}).verify()
