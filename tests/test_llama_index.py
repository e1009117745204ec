"""The LlamaIndex adapter, through LlamaIndex's own entry points: postprocessing, indexes, engines, pipelines."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import math
import multiprocessing
import pickle
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromadb
import pytest
import torch
from llama_index.core import Document, PromptTemplate, StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import RetrieverTool
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery
from llama_index.vector_stores.chroma import ChromaVectorStore
from pydantic import ValidationError
from stores import running_chroma

from kalm_rag import Instructions, Reranker
from kalm_rag.errors import InputError, MissingStateError, StateMismatchError
from kalm_rag.index.embedders import BundledEmbedder
from kalm_rag.index.lazy_engine import release_engines
from kalm_rag.llama_index import KaLMChromaVectorStore, KaLMEmbedding, KaLMNodePostprocessor, KaLMStateTransform
from kalm_rag.llama_index.nodes import QuietMetadata
from kalm_rag.store.memory import MemoryStore

QUERY = "Which river is the longest?"
TEXTS = ["The Nile is long.", "Tea is drunk hot.", "The Amazon carries most water.", "Rivers end in the sea."]


class HashEmbedding(BaseEmbedding):
    """Eight numbers out of a digest: no model, and the same text gives the same vector."""

    def _vector(self, text: str) -> list[float]:
        return [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:8]]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._vector(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._vector(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._vector(text)


EMBEDDING = HashEmbedding()


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


def make_nodes(texts: list[str] | None = None, **fields: Any) -> list[TextNode]:
    texts = texts if texts is not None else TEXTS
    return [
        TextNode(id_=f"n{i}", text=t, metadata={"topic": f"t{i % 2}"}, embedding=EMBEDDING._vector(t), **fields)
        for i, t in enumerate(texts)
    ]


def scored(nodes: list[Any] | None = None) -> list[NodeWithScore]:
    nodes = nodes if nodes is not None else make_nodes()
    return [NodeWithScore(node=node, score=1.0 - i / 10) for i, node in enumerate(nodes)]


def expected(engine: Reranker, nodes: list[NodeWithScore], instructions: Instructions | None = None) -> dict[str, Any]:
    """Id to P(yes), from the engine alone, with everything encoded now."""
    texts = [n.node.get_content(metadata_mode=MetadataMode.EMBED) for n in nodes]
    ranked = engine.rank(QUERY, texts, instructions=instructions)
    return {nodes[r.index].node_id: r.probability for r in ranked}


def got(nodes: list[NodeWithScore]) -> dict[str, Any]:
    return {n.node_id: n.score for n in nodes}


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert list(left) == list(right)
    assert list(left.values()) == pytest.approx(list(right.values()), abs=1e-5)


def index_of(vectors: KaLMChromaVectorStore, documents: list[Document]) -> VectorStoreIndex:
    context = StorageContext.from_defaults(vector_store=vectors)
    return VectorStoreIndex.from_documents(documents, storage_context=context, embed_model=EMBEDDING)


def engine_of(index: VectorStoreIndex, post: KaLMNodePostprocessor, **fields: Any) -> Any:
    return index.as_query_engine(llm=MockLLM(max_tokens=4), similarity_top_k=10, node_postprocessors=[post], **fields)


def documents(texts: list[str] | None = None) -> list[Document]:
    return [Document(id_=f"d{i}", text=t) for i, t in enumerate(texts if texts is not None else TEXTS)]


def stored(vectors: KaLMChromaVectorStore) -> int:
    return vectors.parts.get()[1].stats().states


class TestRanking:
    def test_scores_are_the_engines_and_best_comes_first(self, tiny: Reranker) -> None:
        nodes = scored()
        ranked = KaLMNodePostprocessor(reranker=tiny, top_n=None).postprocess_nodes(nodes, query_str=QUERY)
        same(got(ranked), expected(tiny, nodes))
        assert all(type(n.score) is float and 0.0 <= n.score <= 1.0 for n in ranked)
        json.dumps([n.to_dict() for n in ranked])

    def test_nothing_of_the_callers_is_changed(self, tiny: Reranker) -> None:
        nodes = scored()
        before = copy.deepcopy(nodes)
        for keep in (False, True):
            post = KaLMNodePostprocessor(reranker=tiny, keep_retrieval_score=keep)
            ranked = post.postprocess_nodes(nodes, query_str=QUERY)
            assert [n.to_dict() for n in nodes] == [n.to_dict() for n in before]
            assert not {id(n) for n in ranked} & {id(n) for n in nodes}
            assert all(n.node is not m.node for n in ranked for m in nodes) == keep

    def test_the_retrieval_score_is_kept_out_of_texts_and_hash(self, tiny: Reranker) -> None:
        nodes = scored()
        ranked = KaLMNodePostprocessor(reranker=tiny, keep_retrieval_score=True).postprocess_nodes(
            nodes, query_str=QUERY
        )
        old = {n.node_id: n for n in nodes}
        for one in ranked:
            before = old[one.node_id]
            assert one.metadata["retrieval_score"] == before.score
            assert one.node.hash == before.node.hash
            for mode in (MetadataMode.EMBED, MetadataMode.LLM, MetadataMode.NONE):
                assert one.node.get_content(metadata_mode=mode) == before.node.get_content(metadata_mode=mode)
        assert json.loads(ranked[0].node.to_json())["metadata"]["retrieval_score"] == old[ranked[0].node_id].score
        assert repr(QuietMetadata({"a": 1, "retrieval_score": 2})) == "{'a': 1}"

    def test_top_n_and_threshold(self, tiny: Reranker) -> None:
        nodes = scored()
        whole = expected(tiny, nodes)
        cut = sorted(whole.values())[2]
        one = KaLMNodePostprocessor(reranker=tiny, top_n=1).postprocess_nodes(nodes, query_str=QUERY)
        assert [n.node_id for n in one] == list(whole)[:1]
        assert len(KaLMNodePostprocessor(reranker=tiny, top_n=99).postprocess_nodes(nodes, query_str=QUERY)) == 4
        high = KaLMNodePostprocessor(reranker=tiny, threshold=cut, top_n=None).postprocess_nodes(nodes, query_str=QUERY)
        assert set(got(high)) == {i for i, p in whole.items() if p >= cut}

    @pytest.mark.parametrize("score", [None, math.nan, math.inf])
    def test_odd_retrieval_scores_do_not_matter(self, tiny: Reranker, score: float | None) -> None:
        nodes = [NodeWithScore(node=n, score=score) for n in make_nodes()]
        ranked = KaLMNodePostprocessor(reranker=tiny, top_n=None, keep_retrieval_score=True).postprocess_nodes(
            nodes, query_str=QUERY
        )
        same(got(ranked), expected(tiny, nodes))

    def test_nodes_without_text_come_last_unscored(self, tiny: Reranker) -> None:
        bare = [TextNode(id_="empty", text=""), ImageNode(id_="image"), TextNode(id_="blank", text=" \n")]
        nodes = scored([*bare, *make_nodes()])
        ranked = KaLMNodePostprocessor(reranker=tiny, top_n=None).postprocess_nodes(nodes, query_str=QUERY)
        assert [n.node_id for n in ranked[4:]] == ["empty", "image", "blank"]
        assert [n.score for n in ranked[4:]] == [None] * 3
        strict = KaLMNodePostprocessor(reranker=tiny, top_n=None, threshold=0.0)
        assert len(strict.postprocess_nodes(nodes, query_str=QUERY)) == 4

    def test_duplicate_ids_and_equal_texts_keep_their_own_scores(self, tiny: Reranker) -> None:
        nodes = scored([TextNode(id_="a", text=TEXTS[0]), TextNode(id_="a", text=TEXTS[1]), TextNode(text=TEXTS[0])])
        ranked = KaLMNodePostprocessor(reranker=tiny, top_n=None).postprocess_nodes(nodes, query_str=QUERY)
        truth = {t: r.probability for t, r in zip(TEXTS[:2], tiny.score(QUERY, tiny.encode(TEXTS[:2])), strict=True)}
        assert [n.score for n in ranked] == pytest.approx([truth[n.text] for n in ranked], abs=1e-5)
        assert len(ranked) == 3

    def test_ratio(self, tiny: Reranker) -> None:
        """Without a store the engine makes states at the ratio; with one, stored states are pooled further."""
        nodes = scored()
        texts = [n.node.get_content(metadata_mode=MetadataMode.EMBED) for n in nodes]
        truth = {nodes[r.index].node_id: r.probability for r in tiny.rank(QUERY, texts, ratio=8)}
        for store in (None, MemoryStore(tiny.layout())):
            post = KaLMNodePostprocessor(reranker=tiny, ratio=8, store=store, top_n=None)
            assert got(post.postprocess_nodes(nodes, query_str=QUERY)) == pytest.approx(truth, abs=1e-2)
        wrong = KaLMNodePostprocessor(reranker=tiny, ratio=6, store=MemoryStore(tiny.layout()))
        with pytest.raises(StateMismatchError, match="multiple"):
            wrong.postprocess_nodes(nodes, query_str=QUERY)

    def test_metadata_mode_says_which_text(self, tiny: Reranker) -> None:
        nodes = scored()
        post = KaLMNodePostprocessor(reranker=tiny, metadata_mode=MetadataMode.NONE, top_n=None)
        ranked = post.postprocess_nodes(nodes, query_str=QUERY)
        truth = {nodes[r.index].node_id: r.probability for r in tiny.rank(QUERY, TEXTS)}
        same(got(ranked), truth)


class TestMissing:
    """Nodes that another retriever brought: nobody has made their states yet."""

    def test_encode_keeps_them_so_that_raise_passes_next(self, tiny: Reranker) -> None:
        store = MemoryStore(tiny.layout())
        nodes = scored()
        ranked = KaLMNodePostprocessor(reranker=tiny, store=store).postprocess_nodes(nodes, query_str=QUERY)
        assert store.stats().states == 4
        again = KaLMNodePostprocessor(reranker=tiny, store=store, missing="raise")
        assert got(again.postprocess_nodes(nodes, query_str=QUERY)) == got(ranked)

    def test_raise(self, tiny: Reranker) -> None:
        post = KaLMNodePostprocessor(reranker=tiny, store=MemoryStore(tiny.layout()), missing="raise")
        with pytest.raises(MissingStateError, match="4 of 4 candidates have no stored states"):
            post.postprocess_nodes(scored(), query_str=QUERY)

    def test_skip_keeps_retrieval_order_behind(self, tiny: Reranker) -> None:
        store = MemoryStore(tiny.layout())
        nodes = scored()
        store.put_many(tiny.encode([nodes[2].node.get_content(metadata_mode=MetadataMode.EMBED)]))
        post = KaLMNodePostprocessor(reranker=tiny, store=store, missing="skip", top_n=None)
        ranked = post.postprocess_nodes(nodes, query_str=QUERY)
        assert [n.node_id for n in ranked] == ["n2", "n0", "n1", "n3"]
        assert [n.score is None for n in ranked] == [False, True, True, True]

    def test_another_models_store_is_refused(self, tiny: Reranker) -> None:
        layout = tiny.layout()
        other = MemoryStore(type(layout)(**{**layout.__dict__, "fingerprint": "0" * 64}))
        with pytest.raises(StateMismatchError, match="0000"):
            KaLMNodePostprocessor(reranker=tiny, store=other).postprocess_nodes(scored(), query_str=QUERY)

    def test_without_a_store_repeated_nodes_are_not_encoded_again(self, tiny: Reranker) -> None:
        post = KaLMNodePostprocessor(reranker=tiny)
        text = f"A river named {uuid.uuid4()}."
        post.postprocess_nodes([NodeWithScore(node=TextNode(text=text))], query_str=QUERY)
        other = KaLMNodePostprocessor(reranker=tiny, missing="raise")  # another component, the same process
        assert other.postprocess_nodes([NodeWithScore(node=TextNode(text=text))], query_str=QUERY)


class TestBadInput:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"top_n": 0}, "top_n is 0; wanted a whole number >= 1"),
            ({"top_n": -1}, "top_n is -1"),
            ({"top_n": "3"}, "top_n is '3'"),
            ({"top_n": True}, "top_n is True"),
            ({"threshold": 1.5}, "threshold is 1.5"),
            ({"threshold": math.nan}, "threshold is nan"),
            ({"missing": "ignore"}, "missing is 'ignore'; wanted one of"),
            ({"topn": 3}, "Extra inputs are not permitted"),
            ({"model": ""}, "model is ''"),
            ({"ratio": 0}, "ratio is 0"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"store": 3}, "store is int; wanted a StateStore"),
            ({"reranker": "pico"}, "reranker is str"),
            ({"instructions": 3}, "prompt is int"),
        ],
        ids=str,
    )
    def test_construction(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            KaLMNodePostprocessor(**fields)

    def test_both_model_and_reranker(self, tiny: Reranker) -> None:
        with pytest.raises(ValidationError, match="both reranker and model were given"):
            KaLMNodePostprocessor(reranker=tiny, model="pico")

    def test_engine_fields_are_fixed(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            KaLMNodePostprocessor().model = "nano"

    def test_queries(self, tiny: Reranker) -> None:
        post = KaLMNodePostprocessor(reranker=tiny)
        with pytest.raises(InputError, match="no query was given"):
            post.postprocess_nodes(scored())
        with pytest.raises(InputError, match="query is blank"):
            post.postprocess_nodes(scored(), query_str=" ")
        with pytest.raises(InputError, match="no query was given"):
            asyncio.run(post.apostprocess_nodes([]))
        assert post.postprocess_nodes([], query_str=QUERY) == []
        assert asyncio.run(post.apostprocess_nodes([], query_str=QUERY)) == []

    def test_a_lone_surrogate_names_its_node(self, tiny: Reranker) -> None:
        node = TextNode(id_="bad", text="\ud800")
        with pytest.raises(InputError, match="text of node bad holds a lone surrogate"):
            KaLMNodePostprocessor(reranker=tiny).postprocess_nodes([NodeWithScore(node=node)], query_str=QUERY)

    def test_values_changed_later_are_checked_too(self, tiny: Reranker) -> None:
        post = KaLMNodePostprocessor(reranker=tiny)
        post.top_n = 0
        with pytest.raises(InputError, match="top_n is 0"):
            post.postprocess_nodes(scored(), query_str=QUERY)


def test_how_a_model_runs_is_a_setting_like_others(collection: chromadb.Collection, tiny_folder: Path) -> None:
    try:
        store = KaLMChromaVectorStore(collection, model=str(tiny_folder), device="cpu")
        store.add(make_nodes())
        post = KaLMNodePostprocessor(store=store, decoder_weights="int8", prefix_cache_bytes=12_345, missing="raise")
        assert post.parts.get()[0].backbone.decoder_weights == "int8"  # type: ignore[attr-defined]
        assert post.parts.get()[0].info == store.parts.get()[0].info, "states are the same either way"
        assert len(post.postprocess_nodes(scored(), query_str=QUERY)) == 3
        assert store.parts.get()[0].backbone.decoder_weights is None  # type: ignore[attr-defined]
        again = KaLMNodePostprocessor.from_dict(post.to_dict() | {"store": None})
        assert again.parts.get()[0] is post.parts.get()[0]
    finally:
        release_engines()


class TestSerialisation:
    def test_round_trip_loses_nothing(self, tmp_path: Path) -> None:
        fields = {
            "model": "nano",
            "revision": "main",
            "device": "cpu",
            "dtype": "fp32",
            "ratio": 8,
            "batch_size": 7,
            "top_n": None,
            "threshold": 0.25,
            "missing": "skip",
            "instructions": Instructions(system="Be brief.", task="Find laws.", system_mode="replace"),
            "store": tmp_path,
            "metadata_mode": MetadataMode.LLM,
            "keep_retrieval_score": True,
        }
        post = KaLMNodePostprocessor(**fields)
        for other in (
            KaLMNodePostprocessor.from_dict(post.to_dict()),
            KaLMNodePostprocessor.from_json(post.to_json()),
            pickle.loads(pickle.dumps(post)),
            copy.deepcopy(post),
        ):
            assert {name: getattr(other, name) for name in fields} == {**fields, "store": str(tmp_path)}
            assert other.to_dict() == post.to_dict()
        assert list(tmp_path.iterdir()) == []  # nothing was opened, nothing loaded

    def test_a_ready_engine_is_written_down_by_name(self, tiny: Reranker, tiny_folder: Path) -> None:
        post = KaLMNodePostprocessor(reranker=tiny, instructions="auto")
        nodes = scored()
        first = got(post.postprocess_nodes(nodes, query_str=QUERY))
        data = pickle.dumps(post)
        assert len(data) < 5000
        other = pickle.loads(data)
        assert (other.model, other.reranker, other.instructions) == (str(tiny_folder), None, "auto")
        assert got(other.postprocess_nodes(nodes, query_str=QUERY)) == first

    def test_a_live_store_is_not_lost_silently(self, tiny: Reranker) -> None:
        store = MemoryStore(tiny.layout())
        post = KaLMNodePostprocessor(reranker=tiny, store=store)
        with pytest.raises(InputError, match="uses a live MemoryStore, which can't be pickled"):
            pickle.dumps(post)
        with pytest.raises(ValidationError, match="store was a live MemoryStore"):
            KaLMNodePostprocessor.from_dict(post.to_dict())
        assert KaLMNodePostprocessor.from_dict(post.to_dict(), store=store).store is store
        assert copy.deepcopy(post).parts is post.parts

    def test_a_folders_store_is_shared_with_the_vector_store(self, tiny: Reranker, tmp_path: Path) -> None:
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=tiny)
        vectors.add(make_nodes())
        by_folder = KaLMNodePostprocessor(reranker=tiny, store=tmp_path, missing="raise")
        by_vectors = vectors.as_postprocessor(missing="raise")
        reborn = pickle.loads(pickle.dumps(by_vectors))
        ranked = [got(p.postprocess_nodes(scored(), query_str=QUERY)) for p in (by_folder, by_vectors, reborn)]
        assert ranked[0] == ranked[1] == ranked[2]


class Recorder(BaseEventHandler):
    """Keeps rerank events."""

    events: list[Any] = []  # noqa: RUF012 - pydantic copies it

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, ReRankStartEvent | ReRankEndEvent):
            self.events.append(event)


@contextmanager
def recorded() -> Iterator[tuple[list[Any], SimpleSpanHandler]]:
    root, recorder, spans = get_dispatcher("root"), Recorder(), SimpleSpanHandler()
    root.add_event_handler(recorder)
    root.add_span_handler(spans)
    try:
        yield recorder.events, spans
    finally:
        root.event_handlers.remove(recorder)
        root.span_handlers.remove(spans)


class TestEvents:
    @pytest.mark.parametrize("top_n", [2, None])
    @pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
    def test_start_and_end_are_paired_and_spanned(self, tiny: Reranker, top_n: int | None, is_async: bool) -> None:
        post = KaLMNodePostprocessor(reranker=tiny, top_n=top_n)
        nodes = scored()
        with recorded() as (events, spans):
            if is_async:
                ranked = asyncio.run(post.apostprocess_nodes(nodes, query_str=QUERY))
            else:
                ranked = post.postprocess_nodes(nodes, query_str=QUERY)
        start, end = events
        assert (start.query.query_str, start.top_n, start.model_name) == (QUERY, top_n or 4, post.model)
        assert [n.score for n in start.nodes] == [n.score for n in nodes]  # still those of the retriever
        assert end.nodes == ranked
        assert [s.id_.split("-")[0] for s in spans.completed_spans] == [
            f"KaLMNodePostprocessor.{'_a' if is_async else '_'}postprocess_nodes"
        ]

    def test_they_are_paired_when_scoring_fails(self, tiny: Reranker) -> None:
        debug = LlamaDebugHandler(print_trace_on_end=False)
        post = KaLMNodePostprocessor(
            reranker=tiny,
            store=MemoryStore(tiny.layout()),
            missing="raise",
            callback_manager=CallbackManager([debug]),
        )
        with recorded() as (events, _), pytest.raises(MissingStateError, match="no stored states"):
            post.postprocess_nodes(scored(), query_str=QUERY)
        assert [type(e) for e in events] == [ReRankStartEvent, ReRankEndEvent]
        assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 1
        with recorded() as (events, _), pytest.raises(InputError, match="no query was given"):
            post.postprocess_nodes(scored())
        assert events == []  # refused before anything started

    def test_query_engines_assign_their_callbacks(self, vectors: KaLMChromaVectorStore) -> None:
        debug = LlamaDebugHandler(print_trace_on_end=False)
        post = vectors.as_postprocessor()
        app = RetrieverQueryEngine.from_args(
            index_of(vectors, documents()).as_retriever(similarity_top_k=4),
            llm=MockLLM(max_tokens=4),
            node_postprocessors=[post],
            callback_manager=CallbackManager([debug]),
        )
        app.query(QUERY)
        ((start, end),) = debug.get_event_pairs(CBEventType.RERANKING)
        assert start.payload is not None
        assert start.payload["query_str"] == QUERY
        assert end.payload is not None
        assert len(end.payload["nodes"]) == 3


LAW = Instructions(task="Find statutes only.")


class TestInstructions:
    def test_what_can_be_given(self, tiny: Reranker) -> None:
        nodes = scored()
        prompt = PromptTemplate("Find statutes only.\n\nContext:\n{context_str}\n\nQuestion: {query_str}\nAnswer:")
        for given in (LAW, "Find statutes only.", prompt, {"task": "Find statutes only."}):
            post = KaLMNodePostprocessor(reranker=tiny, instructions=given, top_n=None)
            same(got(post.postprocess_nodes(nodes, query_str=QUERY)), expected(tiny, nodes, LAW))
            assert post.preview(QUERY) == tiny.preview(QUERY, LAW)
        assert got(post.postprocess_nodes(nodes, query_str=QUERY)) != expected(tiny, nodes)  # they do steer

    @pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
    def test_auto_follows_the_prompt_of_the_engine_around(self, vectors: KaLMChromaVectorStore, is_async: bool) -> None:
        """One postprocessor in two query engines: each query has the instructions of its own engine's prompt, now."""
        engine = vectors.parts.get()[0]
        post = vectors.as_postprocessor(instructions="auto", top_n=None)
        index = index_of(vectors, documents())

        def template(task: str) -> PromptTemplate:
            return PromptTemplate(f"{task}\n\nContext:\n{{context_str}}\n\nQuestion: {{query_str}}\nAnswer:")

        apps = {task: engine_of(index, post, text_qa_template=template(task)) for task in ("Find laws.", "Find jokes.")}

        def check(app: Any, task: str) -> None:
            response = asyncio.run(app.aquery(QUERY)) if is_async else app.query(QUERY)
            nodes = response.source_nodes
            same(got(nodes), expected(engine, nodes, Instructions(task=task)))

        for task, app in apps.items():
            check(app, task)
        apps["Find laws."].update_prompts({"response_synthesizer:text_qa_template": template("Find poems.")})
        check(apps["Find laws."], "Find poems.")
        assert post.preview(QUERY) == engine.preview(QUERY)  # nobody around: the defaults

    def test_auto_follows_a_chat_engine(self, vectors: KaLMChromaVectorStore) -> None:
        engine = vectors.parts.get()[0]
        post = vectors.as_postprocessor(instructions="auto", top_n=None)
        chat = index_of(vectors, documents()).as_chat_engine(
            chat_mode="context",
            llm=MockLLM(max_tokens=4),
            system_prompt="Only trust geographers.",
            node_postprocessors=[post],
            similarity_top_k=10,
        )
        nodes = chat.chat(QUERY).source_nodes
        wanted = Instructions.from_prompt(chat)
        assert wanted.system is not None
        assert "Only trust geographers." in wanted.system
        same(got(nodes), expected(engine, nodes, wanted))

    def test_follow_reads_the_prompt_at_each_query(self, vectors: KaLMChromaVectorStore) -> None:
        engine = vectors.parts.get()[0]
        post = vectors.as_postprocessor(top_n=None)
        app = engine_of(index_of(vectors, documents()), post)
        assert post.follow(app) is post
        for task in ("Find laws.", "Find jokes."):
            prompt = PromptTemplate(f"{task}\n{{context_str}}\n{{query_str}}")
            app.update_prompts({"response_synthesizer:text_qa_template": prompt})
            assert post.preview(QUERY) == engine.preview(QUERY, Instructions(task=task))
        with pytest.raises(InputError, match="prompt is int"):
            post.follow(3)

    def test_override_holds_for_one_thread_or_task_only(self, tiny: Reranker) -> None:
        post = KaLMNodePostprocessor(reranker=tiny, top_n=None)
        nodes = scored()
        plain, law = expected(tiny, nodes), expected(tiny, nodes, LAW)
        with post.use("Find statutes only."):
            same(got(post.postprocess_nodes(nodes, query_str=QUERY)), law)
            same(got(asyncio.run(post.apostprocess_nodes(nodes, query_str=QUERY))), law)
            with ThreadPoolExecutor(1) as pool:
                same(got(pool.submit(post.postprocess_nodes, nodes, None, QUERY).result()), plain)
            other = KaLMNodePostprocessor(reranker=tiny, top_n=None)
            same(got(other.postprocess_nodes(nodes, query_str=QUERY)), plain)
            with post.use(None):
                same(got(post.postprocess_nodes(nodes, query_str=QUERY)), plain)
        same(got(post.postprocess_nodes(nodes, query_str=QUERY)), plain)

        async def ask(task: str) -> dict[str, Any]:
            with post.use(task):
                await asyncio.sleep(0)
                return got(await post.apostprocess_nodes(nodes, query_str=QUERY))

        async def both() -> list[dict[str, Any]]:
            return await asyncio.gather(ask("Find statutes only."), ask("Find jokes."), ask("Find statutes only."))

        first, joke, again = asyncio.run(both())
        same(first, law)
        same(joke, expected(tiny, nodes, Instructions(task="Find jokes.")))
        same(again, law)


class TestConcurrency:
    def test_eight_threads_and_fifty_tasks_score_as_one(self, vectors: KaLMChromaVectorStore) -> None:
        index = index_of(vectors, documents())
        app = engine_of(index, vectors.as_postprocessor(top_n=None))
        queries = [f"River {i}?" for i in range(50)]
        alone = [got(app.query(q).source_nodes) for q in queries]

        async def all_at_once() -> list[Any]:
            return await asyncio.gather(*(app.aquery(q) for q in queries))

        with ThreadPoolExecutor(8) as pool:
            threaded = [got(r.source_nodes) for r in pool.map(app.query, queries)]
        together = [got(r.source_nodes) for r in asyncio.run(all_at_once())]
        for found, wanted in zip([*threaded, *together], alone * 2, strict=True):
            same(found, wanted)  # queries that share a decoder pass differ by no more than rounding

    def test_one_engine_and_one_store_for_all_threads(self, tiny_folder: Path, tmp_path: Path) -> None:
        posts = [KaLMNodePostprocessor(model=str(tiny_folder), device="cpu", store=tmp_path) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda p: p.postprocess_nodes(scored(), query_str=QUERY), posts))
            parts = list(pool.map(lambda p: p.parts.get(), posts))
        assert len({id(engine) for engine, _ in parts}) == 1
        assert len({id(store) for _, store in parts}) == 1

    def test_the_event_loop_stays_responsive(self, pico: Reranker) -> None:
        """A ticking task is not late by more than 50 ms while a rerank runs that takes far longer.

        On a loaded machine a tick can be late for reasons of its own: three attempts, and a bound far below the work.
        """

        async def ticked() -> tuple[float, float]:
            nodes = [NodeWithScore(node=TextNode(text=f"{uuid.uuid4()} flows to the sea. " * 10)) for _ in range(32)]
            post = KaLMNodePostprocessor(reranker=pico, store=MemoryStore(pico.layout()))
            late = 0.0
            started = time.perf_counter()
            work = asyncio.create_task(post.apostprocess_nodes(nodes, query_str=QUERY))
            while not work.done():
                before = time.perf_counter()
                await asyncio.sleep(0.01)
                late = max(late, time.perf_counter() - before - 0.01)
            await work
            return late, time.perf_counter() - started

        attempts = []
        for _ in range(3):
            late, seconds = asyncio.run(ticked())
            attempts.append((late, seconds))
            if late <= 0.05:
                break
        assert min(late for late, _ in attempts) <= 0.05, attempts


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
        assert vectors.gc().states == 1
        changed = documents(["The Nile is long.", "Coffee too.", "The Amazon is wide.", "Rivers end in the sea."])
        index.refresh_ref_docs(changed)
        report = vectors.verify()
        assert report.clean
        vectors.gc()
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
        vectors.gc()
        assert stored(vectors) == 4
        vectors.clear()
        assert vectors.gc().states == 4
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
        vectors.gc()
        assert stored(vectors) == 1
        assert vectors.as_postprocessor(missing="raise").postprocess_nodes(scored(twins), query_str=QUERY)
        vectors.delete_nodes(["b"])
        assert vectors.gc().states == 1

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
        vectors.gc()
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
            await vectors.aclear()

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
        nodes = make_nodes([f"River {i}" for i in range(6000)])
        assert len(nodes) > vectors._client().get_max_batch_size()
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

    def test_construction(self, collection: chromadb.Collection, tiny: Reranker, tmp_path: Path) -> None:
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            KaLMChromaVectorStore(collection, colection_name="x")
        with pytest.raises(ValidationError, match="codec"):
            KaLMChromaVectorStore(collection, codec="int4")
        with pytest.raises(InputError, match="no collection was given"):
            KaLMChromaVectorStore(collection_name="x")
        with pytest.raises(InputError, match="wanted an open chromadb Collection"):
            KaLMChromaVectorStore.from_collection("x")
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
            KaLMChromaVectorStore(vectors._collection, client=vectors._client(), reranker=tiny),
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
                vectors.gc()
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


class TestTransform:
    def pipeline(self, transform: KaLMStateTransform, **fields: Any) -> IngestionPipeline:
        return IngestionPipeline(
            transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0), transform], **fields
        )

    def test_a_cached_pipeline_fills_a_wiped_store_again(self, tiny: Reranker, tmp_path: Path) -> None:
        transform = KaLMStateTransform(reranker=tiny, store=tmp_path / "a.sqlite3")
        pipeline = self.pipeline(transform)
        nodes = pipeline.run(documents=documents())
        store = transform.parts.get()[1]
        assert store.stats().states == 4
        assert [n.get_content() for n in nodes] == TEXTS
        store.gc()  # nothing refers to them
        assert store.stats().states == 0
        for _ in range(2):
            assert [n.get_content() for n in pipeline.run(documents=documents())] == TEXTS
            assert store.stats().states == 4
        asyncio.run(pipeline.arun(documents=documents(["A brook."])))
        assert store.stats().states == 5
        post = KaLMNodePostprocessor(reranker=tiny, store=store, missing="raise")
        assert post.postprocess_nodes(scored(list(nodes)), query_str=QUERY)

    def test_to_dict_names_store_and_fingerprint(self, tiny: Reranker, tmp_path: Path) -> None:
        transform = KaLMStateTransform(reranker=tiny, store=tmp_path)
        data = transform.to_dict()
        assert (data["store"], data["fingerprint"]) == (str(tmp_path), tiny.info.fingerprint)
        for other in (
            KaLMStateTransform.from_dict(json.loads(json.dumps(data))),
            pickle.loads(pickle.dumps(transform)),
        ):
            assert {**other.to_dict(), "run": data["run"]} == data

    def test_bad_places(self, tiny: Reranker) -> None:
        with pytest.raises(ValidationError, match="store is None; wanted the store to fill"):
            KaLMStateTransform(reranker=tiny)
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            KaLMStateTransform(store="x", top_n=3)
        with pytest.raises(InputError, match="live MemoryStore, which can't be pickled"):
            pickle.dumps(KaLMStateTransform(reranker=tiny, store=MemoryStore(tiny.layout())))

    def test_into_the_vector_stores_states(self, vectors: KaLMChromaVectorStore) -> None:
        transform = KaLMStateTransform(store=vectors)
        pipeline = IngestionPipeline(transformations=[EMBEDDING, transform], vector_store=vectors)
        pipeline.run(documents=documents())
        assert stored(vectors) == 4
        assert vectors.verify().clean

    @pytest.mark.slow
    def test_in_a_worker_process(self, tiny_folder: Path, tmp_path: Path) -> None:
        """What ``num_workers`` does with a step (LlamaIndex's own pool hangs on our machine, also without us)."""
        transform = KaLMStateTransform(model=str(tiny_folder), device="cpu", store=tmp_path)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert len(pool.apply_async(transform, (make_nodes(),)).get(timeout=60)) == 4
        assert transform.parts.get()[1].stats().states == 4


class TestEmbedding:
    def test_one_encoder_pass_for_vector_and_states(self, collection: chromadb.Collection, pico: Reranker) -> None:
        vectors = KaLMChromaVectorStore(collection, reranker=pico)
        embedding = vectors.as_embedding()
        (vector,) = embedding.get_text_embedding_batch([TEXTS[0]])
        assert vector == pytest.approx(BundledEmbedder(pico).passages([TEXTS[0]])[0].tolist(), abs=1e-5)
        assert stored(vectors) == 1  # on the way, for the node that is about to be added
        assert embedding.get_query_embedding(QUERY) == pytest.approx(BundledEmbedder(pico).query(QUERY), abs=1e-5)
        assert asyncio.run(embedding.aget_text_embedding(TEXTS[0])) == pytest.approx(vector, abs=1e-5)
        assert embedding.get_text_embedding_batch([]) == []
        vectors.add([TextNode(text=TEXTS[0], embedding=vector)])
        assert stored(vectors) == 1
        assert vectors.verify().clean

    def test_without_a_store(self, pico: Reranker) -> None:
        embedding = KaLMEmbedding(reranker=pico)
        assert len(embedding.get_text_embedding("x")) == 384
        assert type(embedding.get_query_embedding("x")[0]) is float
        assert KaLMEmbedding.from_dict(embedding.to_dict()).to_dict() == embedding.to_dict()

    def test_other_models_have_no_vectors(self, tiny: Reranker) -> None:
        with pytest.raises(InputError, match="makes no retrieval vectors; wanted pico"):
            KaLMEmbedding(reranker=tiny).get_query_embedding(QUERY)


def test_real_relevance_with_the_bundled_model(pico: Reranker) -> None:
    texts = ["I like tea in the morning.", "Berlin is the capital of Germany.", "Paris is the capital of France."]
    nodes = [NodeWithScore(node=TextNode(text=t)) for t in texts]
    bundle = QueryBundle("What is the capital of France?")
    ranked = KaLMNodePostprocessor(reranker=pico, top_n=1).postprocess_nodes(nodes, query_bundle=bundle)
    assert ranked[0].node.get_content() == texts[2]


def test_auto_without_a_prompt_takes_the_defaults(vectors: KaLMChromaVectorStore) -> None:
    """A retriever tool, or an engine that only retrieves, has nothing to follow."""
    vectors.add(make_nodes())
    index = VectorStoreIndex.from_vector_store(vectors, embed_model=EMBEDDING)
    follower = vectors.as_postprocessor(top_n=2, instructions="auto")
    plain = vectors.as_postprocessor(top_n=2).postprocess_nodes(index.as_retriever().retrieve(QUERY), query_str=QUERY)
    engine = RetrieverQueryEngine(index.as_retriever(), NoText(llm=MockLLM()), node_postprocessors=[follower])
    answer = engine.query(QUERY)
    assert [n.score for n in answer.source_nodes] == [n.score for n in plain]
    tool = RetrieverTool.from_defaults(index.as_retriever(), node_postprocessors=[follower])
    assert len(tool.call(QUERY).raw_output) == 2  # the tool words the query in its own way


def test_instructions_may_be_assigned_as_a_task(vectors: KaLMChromaVectorStore) -> None:
    assigned = vectors.as_postprocessor()
    assigned.instructions = "Find rivers."  # type: ignore[assignment]
    given = vectors.as_postprocessor(instructions="Find rivers.")
    assert assigned.postprocess_nodes(scored(), query_str=QUERY) == given.postprocess_nodes(scored(), query_str=QUERY)


def test_a_new_collection_notes_its_model(tmp_path: Path, tiny_folder: Path) -> None:
    made = KaLMChromaVectorStore.from_params("notes", persist_dir=str(tmp_path), model=str(tiny_folder))
    made.add(make_nodes())
    made.close()
    again = KaLMChromaVectorStore.from_params("notes", persist_dir=str(tmp_path))
    assert again.model == str(tiny_folder)
    assert again.as_postprocessor(missing="raise").postprocess_nodes(scored(), query_str=QUERY)
    again.close()
    release_engines()
