"""Components written down, pickled and copied give the same scores."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromadb
import pytest
from llama_index.core import PromptTemplate, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.schema import MetadataMode
from llama_nodes import EMBEDDING, QUERY, TEXTS, got, make_nodes, scored
from pydantic import ValidationError
from stores import running_chroma

from kalm_rag import Instructions, Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.lazy_engine import release_engines
from kalm_rag.llama_index import KaLMChromaVectorStore, KaLMEmbedding, KaLMNodePostprocessor, KaLMStateTransform
from kalm_rag.store import open_store
from kalm_rag.store.memory import MemoryStore


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


TRIPS: dict[str, Callable[[Any], Any]] = {
    "dict": lambda c: type(c).from_dict(c.to_dict()),
    "json": lambda c: type(c).from_json(c.to_json()),
    "pickle": lambda c: pickle.loads(pickle.dumps(c)),
    "deepcopy": copy.deepcopy,
}


@pytest.fixture(scope="module")
def coarse(tiny_folder: Path) -> Iterator[Reranker]:
    """An engine at another ratio than the default."""
    with Reranker.from_pretrained(str(tiny_folder), device="cpu", ratio=2) as engine:
        yield engine


@pytest.mark.parametrize("trip", list(TRIPS.values()), ids=list(TRIPS))
class TestSameScores:
    """A ready engine makes states at 2 tokens each; written down and read back, it made them at 4."""

    def ranked(self, post: KaLMNodePostprocessor) -> dict[str, Any]:
        return got(post.postprocess_nodes(scored(), query_str=QUERY))

    @pytest.mark.parametrize("ratio", [None, 4])
    @pytest.mark.parametrize("place", [None, "folder", "states.sqlite3", "open store", "vector store"])
    @pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
    def test_postprocessor(
        self, coarse: Reranker, tmp_path: Path, trip: Any, ratio: int | None, place: str | None, used: bool
    ) -> None:
        store: Any = place and tmp_path / place
        if place == "open store":
            store = open_store(tmp_path / "open.sqlite3", coarse.layout())
        if place == "vector store":
            store = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=coarse)
        named = {} if place == "vector store" else {"reranker": coarse}
        post = KaLMNodePostprocessor(**named, store=store, ratio=ratio, top_n=None)
        if used:
            self.ranked(post)
        again = trip(post)
        scores = self.ranked(again)  # first: a new store is made at the copy's ratio
        assert scores == self.ranked(post)
        wanted = ratio if place is None and ratio is not None else 2
        assert again.parts.get()[1].layout.ratio == post.parts.get()[1].layout.ratio == wanted

    @pytest.mark.parametrize("place", [None, "states.sqlite3"])
    def test_vector_store(self, coarse: Reranker, tmp_path: Path, trip: Any, place: str | None) -> None:
        store = place and tmp_path / place
        vectors = KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), reranker=coarse, store=store)
        again = trip(vectors)
        again.add(make_nodes())
        scores = self.ranked(again.as_postprocessor(missing="raise"))
        assert scores == self.ranked(vectors.as_postprocessor(missing="raise"))
        assert again.parts.get()[1].layout.ratio == 2
        assert vectors.verify().clean

    def test_transform(self, coarse: Reranker, tmp_path: Path, trip: Any) -> None:
        transform = KaLMStateTransform(reranker=coarse, store=tmp_path)
        trip(transform)(make_nodes())
        scores = self.ranked(KaLMNodePostprocessor(reranker=coarse, store=tmp_path, missing="raise"))
        assert scores == self.ranked(KaLMNodePostprocessor(reranker=coarse))

    def test_embedding(self, pico: Reranker, trip: Any) -> None:
        embedding = KaLMEmbedding(reranker=pico.at(8))
        again = trip(embedding)
        assert again.parts.get()[0].ratio == 8
        assert again.get_text_embedding(TEXTS[0]) == embedding.get_text_embedding(TEXTS[0])

    def test_a_followed_engine_leaves_its_instructions(self, tiny: Reranker, trip: Any) -> None:
        """The copy of a postprocessor that follows an engine had nothing to follow, and took the defaults."""
        index = VectorStoreIndex([], embed_model=EMBEDDING)
        app = index.as_query_engine(llm=MockLLM(), text_qa_template=PromptTemplate("Find laws.\n{context_str}"))
        post = KaLMNodePostprocessor(reranker=tiny, top_n=None).follow(app)
        plain = self.ranked(KaLMNodePostprocessor(reranker=tiny, top_n=None))
        assert self.ranked(trip(post)) == self.ranked(post) != plain


def test_another_tenant_and_database_are_found_again(tiny: Reranker, tmp_path: Path) -> None:
    """The copy opened the default database, where it made an empty collection of the same name."""
    settings = chromadb.PersistentClient(str(tmp_path)).get_settings()
    admin = chromadb.AdminClient(settings)
    admin.create_tenant("acme")
    admin.create_database("docs", tenant="acme")
    client = chromadb.PersistentClient(str(tmp_path), settings=settings, tenant="acme", database="docs")
    vectors = KaLMChromaVectorStore(client.create_collection("passages"), reranker=tiny)
    vectors.add(make_nodes())
    for trip in TRIPS.values():
        again = trip(vectors)
        assert (again.tenant, again.database) == ("acme", "docs")
        assert again.verify().records == 4
        assert again.verify().clean
    by_name = KaLMChromaVectorStore.from_params(
        "passages", persist_dir=str(tmp_path), tenant="acme", database="docs", reranker=tiny
    )
    assert by_name.verify().records == 4


def test_headers_are_secrets(tiny: Reranker, tmp_path: Path) -> None:
    """They were lost with an open collection, and written in clear with named ones."""
    with running_chroma(tmp_path) as plain:
        port = plain.get_settings().chroma_server_http_port
        client = chromadb.HttpClient(host="127.0.0.1", port=port, headers={"X-Token": "hunter2"})
        vectors = KaLMChromaVectorStore(client.get_or_create_collection("passages"), reranker=tiny)
        assert vectors.headers == {"X-Token": "hunter2"}
        data = vectors.to_dict()
        assert "hunter2" not in f"{data} {vectors!r} {vectors.to_json()}"
        assert "X-Token" in str(data)
        with pytest.raises(ValidationError, match=r"headers had X-Token when this was written down.*Pass them again"):
            KaLMChromaVectorStore.from_dict(data)
        again = KaLMChromaVectorStore.from_dict(data, headers={"X-Token": "hunter2"})
        assert again._home.database.client.get_settings().chroma_server_headers["X-Token"] == "hunter2"
        assert again.headers == vectors.headers
        with pytest.raises(InputError, match=r"headers of the Chroma server \(X-Token\) are secrets"):
            pickle.dumps(vectors)


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


def test_what_pydantic_dumps_is_read_back(tmp_path: Path) -> None:
    """Each component refused its own ``class_name``, which LlamaIndex writes into every dump."""
    made: list[Any] = [
        KaLMNodePostprocessor(top_n=7),
        KaLMEmbedding(embed_batch_size=9),
        KaLMStateTransform(store=str(tmp_path), batch_size=3),
        KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path)),
    ]
    for one in made:
        kind, wanted = type(one), one.model_dump()
        assert wanted["class_name"] == kind.class_name()
        assert kind(**wanted).model_dump() == wanted
        assert kind.model_validate(wanted).model_dump() == wanted
        assert kind.model_validate_json(one.model_dump_json()).model_dump() == wanted
        with pytest.raises(ValidationError, match="class_name is 'Other'; wanted 'KaLM"):
            kind(**{**wanted, "class_name": "Other"})
