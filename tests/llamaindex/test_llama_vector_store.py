"""The vector store: writing, deleting, upkeep, reopening."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import chromadb
import pytest
from chromadb.api.models.AsyncCollection import AsyncCollection
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters, VectorStoreQuery
from llama_index.vector_stores.chroma import ChromaVectorStore
from llama_nodes import (
    EMBEDDING,
    QUERY,
    TEXTS,
    documents,
    engine_of,
    expected,
    got,
    index_of,
    make_nodes,
    same,
    scored,
    stored,
)
from pydantic import ValidationError
from stores import running_chroma

from kalm_rag import Instructions, Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.lazy_engine import release_engines
from kalm_rag.llama_index import KaLMChromaVectorStore, KaLMEmbedding, KaLMNodePostprocessor, KaLMStateTransform
from kalm_rag.store.memory import MemoryStore


class TestVectorStore:
    def test_the_whole_way_with_stored_states_only(self, vectors: KaLMChromaVectorStore) -> None:
        index = index_of(vectors, documents())
        assert vectors.verify().clean
        assert vectors.verify().records == stored(vectors) == 4
        app = engine_of(index, vectors.as_postprocessor(missing="raise", top_n=2))
        response = app.query(QUERY)
        assert len(response.source_nodes) == 2
        assert len(asyncio.run(app.aquery(QUERY)).source_nodes) == 2
        modes = ("context", "condense_plus_context", "condense_question")
        for mode in modes:
            chat = index.as_chat_engine(
                chat_mode=mode,
                llm=MockLLM(max_tokens=4),
                node_postprocessors=[vectors.as_postprocessor(missing="raise", top_n=1)],
            )
            assert len(chat.chat(QUERY).source_nodes) == 1

    def test_deleting_and_refreshing_documents(self, vectors: KaLMChromaVectorStore) -> None:
        index = index_of(vectors, documents())
        index.delete_ref_doc("d1")
        assert vectors.verify().clean
        assert vectors.gc(younger_than=0).states == 1
        changed = documents(["The Nile is long.", "Coffee too.", "The Amazon is wide.", "Rivers end in the sea."])
        index.refresh_ref_docs(changed)
        report = vectors.verify()
        assert report.clean
        vectors.gc(younger_than=0)
        assert vectors.verify().records == stored(vectors) == vectors._collection.count()

    def test_pipeline_with_docstore_upserts_and_cache(self, vectors: KaLMChromaVectorStore) -> None:
        pipeline = IngestionPipeline(
            transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0), EMBEDDING],
            vector_store=vectors,
            docstore=SimpleDocumentStore(),
        )
        pipeline.run(documents=documents())
        assert vectors.verify().clean
        assert stored(vectors) == 4
        pipeline.run(documents=documents(["The Nile is longest.", *TEXTS[1:]]))
        assert vectors.verify().clean
        assert vectors._collection.count() == 4
        vectors.gc(younger_than=0)
        assert stored(vectors) == 4
        vectors.clear()
        assert vectors.gc(younger_than=0).states == 4
        again = IngestionPipeline(transformations=pipeline.transformations, vector_store=vectors, cache=pipeline.cache)
        again.run(documents=documents(["The Nile is longest.", *TEXTS[1:]]))  # every step from the cache
        assert vectors.verify().clean
        assert stored(vectors) == 4
        asyncio.run(again.arun(documents=documents(["A brook."])))
        assert vectors.verify().clean

    def test_nodes_are_replaced_not_ignored(self, vectors: KaLMChromaVectorStore) -> None:
        vectors.add(make_nodes())
        old = make_nodes()[0]
        new = TextNode(id_=old.id_, text="The Nile dries up.", metadata={"kind": "news"}, embedding=old.embedding)
        assert vectors.add([old, new]) == ["n0", "n0"]  # in one call, too, the last one counts
        (node,) = vectors.get_nodes(["n0"])
        assert (node.text, node.metadata) == ("The Nile dries up.", {"kind": "news"})  # type: ignore[attr-defined]
        assert vectors._collection.get(where={"topic": "t0"}, include=[])["ids"] == ["n2"]  # no leftover key matches
        assert vectors.verify().clean
        vectors.add([TextNode(id_="n0", text="", embedding=old.embedding)])
        assert vectors.verify().clean
        assert vectors.verify().without_text == ["n0"]

    def test_the_same_text_under_two_ids_is_stored_once(self, vectors: KaLMChromaVectorStore) -> None:
        twins = [TextNode(id_=i, text=TEXTS[0], embedding=EMBEDDING._vector(TEXTS[0])) for i in ("a", "b")]
        vectors.add(twins)
        assert stored(vectors) == 1
        vectors.delete_nodes(["a"])
        vectors.gc(younger_than=0)
        assert stored(vectors) == 1
        assert vectors.as_postprocessor(missing="raise").postprocess_nodes(scored(twins), query_str=QUERY)
        vectors.delete_nodes(["b"])
        assert vectors.gc(younger_than=0).states == 1

    def test_deleting_by_id_and_filter(self, vectors: KaLMChromaVectorStore) -> None:
        vectors.add(make_nodes())
        vectors.delete_nodes()
        vectors.delete_nodes([])
        assert vectors._collection.count() == 4
        only = MetadataFilters(filters=[MetadataFilter(key="topic", value="t1")])
        vectors.delete_nodes(["n0", "n1"], filters=only)
        assert {n.node_id for n in vectors.get_nodes(None)} == {"n0", "n2", "n3"}
        vectors.delete_nodes(filters=only)
        assert {n.node_id for n in vectors.get_nodes(None)} == {"n0", "n2"}
        assert vectors.verify().clean
        vectors.gc(younger_than=0)
        assert stored(vectors) == 2

    def test_async_methods(self, vectors: KaLMChromaVectorStore) -> None:
        main = threading.get_ident()
        seen: set[int] = set()

        class Watched(TextNode):
            def get_embedding(self) -> list[float]:
                seen.add(threading.get_ident())
                return super().get_embedding()

        async def run() -> None:
            await vectors.async_add([Watched(**n.model_dump()) for n in make_nodes()])
            assert len(await vectors.aget_nodes(["n0", "n1"])) == 2
            found = await vectors.aquery(VectorStoreQuery(query_embedding=[0.5] * 8, similarity_top_k=2))
            assert len(found.nodes or []) == 2
            await vectors.adelete_nodes(["n0"])
            await vectors.adelete("None")  # what Chroma has for nodes of no document
            assert vectors._collection.count() == 0
            await vectors.async_add(make_nodes())
            assert (await vectors.averify()).clean
            assert (await vectors.abackfill()).encoded == 0
            await vectors.aclear()
            assert (await vectors.agc(younger_than=0)).states == 4

        asyncio.run(run())
        assert main not in seen
        assert vectors.verify().clean
        assert vectors.verify().records == 0

    def test_text_edited_behind_our_back_is_never_scored_stale(self, vectors: KaLMChromaVectorStore) -> None:
        engine = vectors.parts.get()[0]
        vectors.add(make_nodes())
        vectors._collection.update(ids=["n1"], documents=["The Volga is long, too."], embeddings=[[0.1] * 8])
        report = vectors.verify()
        assert (report.clean, report.missing, report.stale) == (False, ["n1"], ["n1"])
        nodes = scored(vectors.get_nodes(None))
        assert "The Volga is long, too." in {n.text for n in nodes}
        ranked = vectors.as_postprocessor(top_n=None).postprocess_nodes(nodes, query_str=QUERY)
        same(got(ranked), expected(engine, nodes))
        assert vectors.verify().clean  # the query has kept its states, with the reference
        vectors._collection.update(ids=["n1"], documents=["The Volga."], embeddings=[[0.1] * 8])
        assert vectors.backfill().referenced == 1
        assert vectors.verify().clean

    def test_text_rewritten_by_another_postprocessor(self, vectors: KaLMChromaVectorStore) -> None:
        engine = vectors.parts.get()[0]
        nodes = make_nodes()
        for node in nodes:
            node.metadata["window"] = f"Before. {node.text} After."
        vectors.add(nodes)
        rewritten = MetadataReplacementPostProcessor(target_metadata_key="window").postprocess_nodes(scored(nodes))
        ranked = vectors.as_postprocessor(top_n=None).postprocess_nodes(rewritten, query_str=QUERY)
        same(got(ranked), expected(engine, rewritten))

    def test_records_that_somebody_else_wrote(self, collection: chromadb.Collection, tiny: Reranker) -> None:
        embeddings = [EMBEDDING._vector(t) for t in TEXTS]
        collection.add(ids=list("abcd"), documents=TEXTS, embeddings=embeddings, metadatas=[{"by": "them"}] * 4)
        collection.add(ids=["bare"], documents=["No metadata."], embeddings=[[0.1] * 8])
        vectors = KaLMChromaVectorStore(collection, reranker=tiny)
        assert len(vectors.verify().missing) == 5
        assert vectors.backfill().encoded == 5
        assert vectors.verify().clean
        found = vectors.query(VectorStoreQuery(query_embedding=[0.5] * 8, similarity_top_k=5))
        nodes = [NodeWithScore(node=n) for n in found.nodes or []]
        assert len(vectors.as_postprocessor(missing="raise", top_n=None).postprocess_nodes(nodes, query_str=QUERY)) == 5

    @pytest.mark.parametrize("mode", list(MetadataMode), ids=lambda m: str(m.value))
    def test_what_is_encoded_is_what_is_scored(
        self, collection: chromadb.Collection, tiny: Reranker, mode: MetadataMode
    ) -> None:
        """States are those of the node that comes back out of Chroma, metadata of every kind included."""
        vectors = KaLMChromaVectorStore(collection, reranker=tiny, metadata_mode=mode)
        odd = TextNode(
            text="Naïve\r\ntext",
            metadata={"none": None, "pi": 3.10, "yes": True, "n": 1, "ü": "ß", "hidden": "x"},
            excluded_embed_metadata_keys=["hidden"],
            text_template="<{metadata_str}> {content}",
            metadata_template="{key}={value}",
            embedding=[0.1] * 8,
        )
        vectors.add([odd, Document(text="A document.", metadata={"a": 1}, embedding=[0.2] * 8)])
        assert vectors.verify().clean
        found = vectors.query(VectorStoreQuery(query_embedding=[0.1] * 8, similarity_top_k=2))
        nodes = [NodeWithScore(node=n) for n in [*(found.nodes or []), odd]]
        assert vectors.as_postprocessor(missing="raise").postprocess_nodes(nodes, query_str=QUERY)

    def test_six_thousand_nodes_in_one_call(self, vectors: KaLMChromaVectorStore) -> None:
        """Chroma takes 5,461 records a call, and its own wrapper sends 41,665."""
        nodes = make_nodes([f"River {i % 600}" for i in range(6000)])  # each text ten times: encoding is not the point
        assert len(nodes) > vectors._home.database.client.get_max_batch_size()
        assert vectors.add(nodes) == [n.node_id for n in nodes]
        assert vectors._collection.count() == 6000
        short = Instructions(system="Yes or no?", task="Rivers.", system_mode="replace")  # so that this takes seconds
        post = vectors.as_postprocessor(missing="raise", top_n=None, instructions=short)
        ranked = post.postprocess_nodes(scored(nodes), query_str=QUERY)
        assert len({n.node_id for n in ranked}) == 6000
        assert vectors.verify().clean

    def test_bad_nodes_leave_nothing_behind(self, vectors: KaLMChromaVectorStore) -> None:
        with pytest.raises(ValueError, match="embedding not set"):
            vectors.add([*make_nodes(), TextNode(text="no vector")])
        with pytest.raises(ValueError, match="must be one of"):
            vectors.add([TextNode(text="nested", metadata={"a": [1]}, embedding=[0.1] * 8)])
        assert vectors._collection.count() == stored(vectors) == 0
        assert vectors.add([]) == []

    def test_construction(self, client: chromadb.ClientAPI, collection: chromadb.Collection, tiny: Reranker) -> None:
        """What people pass in a collection's place was taken, and failed later in Chroma's words."""
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            KaLMChromaVectorStore(collection, colection_name="x")
        with pytest.raises(ValidationError, match="codec"):
            KaLMChromaVectorStore(collection, codec="int4")
        with pytest.raises(InputError, match=r"Chroma server 127.0.0.1:1: .*"):
            KaLMChromaVectorStore(collection_name="passages", host="127.0.0.1", port=1)
        with pytest.raises(InputError, match="collection 'no name!'"):
            KaLMChromaVectorStore(collection_name="no name!", client=client)
        with pytest.raises(InputError, match="no collection was given"):
            KaLMChromaVectorStore(collection_name="x")
        for make in (KaLMChromaVectorStore, KaLMChromaVectorStore.from_collection):
            with pytest.raises(InputError, match=r"is str; wanted an open chromadb Collection.*from_params\('x'"):
                make("x")
            with pytest.raises(InputError, match=r"is Client; wanted .* Pass client.get_or_create_collection"):
                make(client)
            with pytest.raises(InputError, match=r"is AsyncCollection; wanted .* Open it with chromadb.HttpClient"):
                make(AsyncCollection(client=object(), model=collection._model))
        with pytest.raises(InputError, match="is int; wanted an open chromadb Collection"):
            KaLMChromaVectorStore(3)
        for named in ({"chroma_collection": collection}, {"collection_name": "x"}):
            with pytest.raises(InputError, match="client is str; wanted an open Chroma client"):
                KaLMChromaVectorStore(**named, client="my-db")
        with pytest.raises(InputError, match="folder and host were both given"):
            KaLMChromaVectorStore(collection_name="x", persist_dir="a", host="b")
        with pytest.raises(InputError, match="port is 'http'; wanted a whole number"):
            KaLMChromaVectorStore(collection_name="x", host="b", port="http")
        store = MemoryStore(tiny.layout("int8"))
        vectors = KaLMChromaVectorStore.from_collection(collection, reranker=tiny, store=store)
        vectors.add(make_nodes())
        assert store.stats().states == 4
        with pytest.raises(InputError, match="ephemeral Chroma collection can't be pickled"):
            pickle.dumps(vectors)

    def test_persistent_round_trip(self, tiny: Reranker, tiny_folder: Path, tmp_path: Path) -> None:
        vectors = KaLMChromaVectorStore.from_params(
            "passages", persist_dir=str(tmp_path), model=str(tiny_folder), device="cpu", codec="int8", ratio=2
        )
        vectors.add(make_nodes())
        assert (tmp_path / "kalm_states.sqlite3").exists()
        for other in (
            KaLMChromaVectorStore.from_dict(vectors.to_dict()),
            pickle.loads(pickle.dumps(vectors)),
            KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=tiny),
            KaLMChromaVectorStore(vectors._collection, client=vectors._home.database.client, reranker=tiny),
        ):
            assert other.verify().clean
            assert other.verify().records == 4
            layout = other.parts.get()[1].layout
            assert (layout.ratio, layout.codec.value) == (2, "int8")
        assert copy.deepcopy(vectors).parts is vectors.parts

    def test_a_folder_that_is_open_with_other_settings(self, tiny: Reranker, tmp_path: Path) -> None:
        """Chroma refuses to open a folder twice with different settings; apps keep telemetry's default, we don't."""
        theirs = chromadb.PersistentClient(str(tmp_path)).create_collection("passages")
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=tiny)
        vectors.add(make_nodes())
        assert theirs.count() == 4

    def test_states_in_memory_outlive_the_engine(self, collection: chromadb.Collection, tiny_folder: Path) -> None:
        vectors = KaLMChromaVectorStore(collection, model=str(tiny_folder), device="cpu")
        vectors.add(make_nodes())
        post = vectors.as_postprocessor(missing="raise")
        release_engines()
        assert vectors.verify().clean
        assert post.postprocess_nodes(scored(), query_str=QUERY)

    def test_closing(self, tiny: Reranker, tmp_path: Path) -> None:
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=tiny)
        vectors.add(make_nodes())
        post = vectors.as_postprocessor(missing="raise")
        vectors.close()
        vectors.close()
        assert post.postprocess_nodes(scored(), query_str=QUERY)
        assert vectors.verify().clean

    def test_remote(self, tiny: Reranker, tmp_path: Path) -> None:
        with running_chroma(tmp_path) as client:
            collection = client.create_collection("passages")
            for vectors in (
                KaLMChromaVectorStore(collection, reranker=tiny),
                KaLMChromaVectorStore.from_dict(KaLMChromaVectorStore(collection, reranker=tiny).to_dict()),
            ):
                vectors.add(make_nodes())
                vectors.delete_nodes(["n0"])
                vectors.gc(younger_than=0)
                assert vectors.verify().clean
                assert stored(vectors) == 3

    def test_another_stores_nodes_are_reranked_all_the_same(
        self, collection: chromadb.Collection, tiny: Reranker
    ) -> None:
        ChromaVectorStore(chroma_collection=collection).add(make_nodes())
        vectors = KaLMChromaVectorStore(collection, reranker=tiny)
        index = VectorStoreIndex.from_vector_store(vectors, embed_model=EMBEDDING)
        assert len(engine_of(index, vectors.as_postprocessor()).query(QUERY).source_nodes) == 3
        vectors.backfill()
        assert vectors.verify().clean


def test_arguments_of_another_kind(vectors: KaLMChromaVectorStore, pico: Reranker) -> None:
    """They came as an AttributeError from inside LlamaIndex or Chroma; a string of ids was taken for its characters."""
    vectors.add(make_nodes())
    post = vectors.as_postprocessor()
    unsupported = MetadataFilters(filters=[MetadataFilter(key="topic", value="t", operator=FilterOperator.TEXT_MATCH)])
    tries: list[tuple[Callable[[], object], str]] = [
        (lambda: vectors.add("text"), "nodes is one string; wanted a list of BaseNode"),  # type: ignore[arg-type]
        (lambda: vectors.add(["text"]), "node 0 is str; wanted a BaseNode"),  # type: ignore[list-item]
        (lambda: KaLMStateTransform(store=vectors)(["text"]), "node 0 is str; wanted a BaseNode"),  # type: ignore[list-item]
        (lambda: vectors.delete(3), "ref_doc_id is int; wanted a string"),  # type: ignore[arg-type]
        (lambda: vectors.delete_nodes("n0"), "node_ids is one string; wanted a list"),  # type: ignore[arg-type]
        (lambda: vectors.delete_nodes(["n0"], filters="x"), "filters is str; wanted MetadataFilters"),  # type: ignore[arg-type]
        (lambda: vectors.delete_nodes(filters=unsupported), "collection 'c-.*': Filter operator .* not supported"),
        (lambda: vectors.get_nodes(filters=unsupported), "collection 'c-.*': Filter operator .* not supported"),
        (lambda: vectors.get_nodes("n0"), "node_ids is one string; wanted a list"),  # type: ignore[arg-type]
        (lambda: vectors.get_nodes([1]), "node_id 0 is int; wanted a string"),  # type: ignore[list-item]
        (lambda: post.postprocess_nodes(["text"], query_str=QUERY), "node 0 is str; wanted a NodeWithScore"),  # type: ignore[list-item]
        (lambda: KaLMEmbedding(reranker=pico).get_text_embedding(3), "text 0 is int; wanted a string"),  # type: ignore[arg-type]
        (lambda: KaLMNodePostprocessor(3), "KaLMNodePostprocessor got int without a name; wanted its"),  # type: ignore[call-arg, misc]
        (lambda: KaLMEmbedding("pico"), "KaLMEmbedding got str without a name"),  # type: ignore[call-arg, misc]
    ]
    for attempt, message in tries:
        with pytest.raises(InputError, match=message):
            attempt()
    assert len(vectors.get_nodes()) == 4


def test_a_new_collection_notes_its_model(tmp_path: Path, tiny_folder: Path) -> None:
    made = KaLMChromaVectorStore.from_params("notes", persist_dir=str(tmp_path), model=str(tiny_folder))
    made.add(make_nodes())
    made.close()
    again = KaLMChromaVectorStore.from_params("notes", persist_dir=str(tmp_path))
    assert again.model == str(tiny_folder)
    assert again.as_postprocessor(missing="raise").postprocess_nodes(scored(), query_str=QUERY)
    again.close()
    release_engines()
