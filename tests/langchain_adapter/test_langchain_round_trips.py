"""What is pickled, dumped or copied gives the scores it gave before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import chromadb
import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_core.documents import Document
from langchain_core.load import dumpd, load
from langchain_documents import QUERY, TEXTS, VECTORS, documents
from pydantic import ValidationError

from kalm_rag import Instructions
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.lazy_engine import EngineSpec, release_engines, spec_of
from kalm_rag.langchain import KaLMChroma, KaLMDocumentCompressor, KaLMEmbeddings, KaLMRerank, KaLMRetriever
from kalm_rag.store import open_store
from kalm_rag.store.memory import MemoryStore

LONG = [f"{text} " * 20 for text in TEXTS]
NAMES = ["kalm_rag"]


def test_round_trips(tiny: Reranker, tiny_folder: Path, tmp_path: Path) -> None:
    """Nothing is lost: device, instructions, a ready engine's settings, and where the states lie."""
    store = open_store(tmp_path, tiny.layout("int8"))
    made = KaLMDocumentCompressor(
        reranker=tiny,
        store=store,
        top_n=2,
        threshold=0.001,
        instructions=Instructions(system="S", task="T"),
        keep_margin=True,
        missing="skip",
        ratio=8,
    )
    store.put_many(tiny.encode(TEXTS))
    wanted = made.compress_documents(documents(), QUERY)
    copies = [
        pickle.loads(pickle.dumps(made)),
        KaLMDocumentCompressor.model_validate(made.model_dump()),
        KaLMDocumentCompressor.model_validate_json(made.model_dump_json()),
    ]
    for copied in copies:
        assert copied.reranker is None
        assert copied.model_dump() == made.model_dump()
        assert copied.compress_documents(documents(), QUERY) == wanted
    assert made.device == "cpu"
    assert made.store is store
    assert len(pickle.dumps(made)) < 5_000
    spec = EngineSpec(model=str(tiny_folder), device=tiny.backbone.device)  # type: ignore[arg-type]
    assert spec.device == "cpu"
    assert pickle.loads(pickle.dumps(spec)) == spec
    release_engines()
    store.close()


def test_how_a_model_runs_is_a_setting_like_others(tiny: Reranker, tiny_folder: Path) -> None:
    ways = {"decoder_weights": "int8", "prefix_cache_bytes": 12_345}
    try:
        made = KaLMDocumentCompressor(model=str(tiny_folder), device="cpu", **ways)
        copied = pickle.loads(pickle.dumps(made))
        assert copied.compress_documents(documents(), QUERY)
        assert copied.engine() is made.engine()
        assert {key: spec_of(made.engine())[key] for key in ways} == ways
        ready = KaLMDocumentCompressor(reranker=made.engine())
        assert ready.model_dump()["decoder_weights"] == "int8", "or a copy would run another way"
        with pytest.raises(ValidationError, match="both given"):
            KaLMDocumentCompressor(reranker=tiny, decoder_weights="int8")
        with pytest.raises(InputError, match="both given"):
            KaLMChroma("ways", reranker=tiny, compiled=True)
        store = KaLMChroma("ways", VECTORS, model=str(tiny_folder), device="cpu", **ways)
        assert store.as_compressor().engine() is made.engine()
    finally:
        release_engines()


def test_a_deep_copy_shares_the_engine(compressor: KaLMDocumentCompressor) -> None:
    twin = copy.deepcopy(compressor)
    assert twin.reranker is compressor.reranker
    assert twin.compress_documents(documents(), QUERY) == compressor.compress_documents(documents(), QUERY)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda made: pickle.loads(pickle.dumps(made)),
    "deepcopy": copy.deepcopy,
    "model_dump": lambda made: type(made).model_validate(made.model_dump()),
}


def scores(found: list[Document]) -> list[tuple[str, float]]:
    return [(d.page_content, d.metadata["relevance_score"]) for d in found]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("where", ["nowhere", "new folder", "open store", "coarser store"])
def test_a_ready_engines_ratio_is_kept(tiny: Reranker, tmp_path: Path, how: str, where: str) -> None:
    """An engine at 16 tokens per state came back at 4: other scores."""
    engine = tiny.at(16)
    store = {
        "nowhere": lambda: None,
        "new folder": lambda: str(tmp_path),
        "open store": lambda: open_store(tmp_path, engine.layout()),
        "coarser store": lambda: open_store(tmp_path, tiny.at(32).layout()),
    }[where]()
    made = KaLMDocumentCompressor(reranker=engine, store=store, top_n=None)
    copied = COPIES[how](made)  # before anything is opened
    wanted = scores(made.compress_documents(documents(LONG), QUERY))
    assert scores(copied.compress_documents(documents(LONG), QUERY)) == wanted
    assert made == KaLMDocumentCompressor(reranker=engine, store=store, top_n=None), "whatever was opened for it"
    assert made != KaLMDocumentCompressor(reranker=engine, store=store)
    assert copied.lazy.get()[0].ratio == (32 if where == "coarser store" else 16)
    assert copied.model_dump() == made.model_dump()
    release_engines()


@pytest.mark.filterwarnings("ignore:The function `load` is in beta")
@pytest.mark.parametrize("how", [*COPIES, "dumpd"])
def test_a_step_written_down(tiny: Reranker, how: str) -> None:
    step = KaLMRerank(reranker=tiny.at(2), top_n=2, instructions=Instructions(task="Find food."), name="my step")
    allowed: Any = {"allowed_objects": [KaLMRerank]} if "allowed_objects" in signature(load).parameters else {}
    again = {**COPIES, "dumpd": lambda made: load(dumpd(made), valid_namespaces=NAMES, **allowed)}
    copied = again[how](step)
    given = {"query": QUERY, "documents": documents(LONG)}
    assert scores(copied.invoke(given)) == scores(step.invoke(given))
    assert copied.get_name() == "my step"
    release_engines()


def test_states_that_only_live_here_are_refused_by_name(tiny: Reranker, chroma: KaLMChroma) -> None:
    """They were left out, without a word."""
    live = KaLMDocumentCompressor(reranker=tiny, store=MemoryStore(tiny.layout()))
    for made, kind in ((live, "MemoryStore"), (chroma.as_compressor(), "KaLMChroma")):
        with pytest.raises(InputError, match=f"uses a live {kind}.*can't be pickled. Give store="):
            pickle.dumps(made)
        with pytest.raises(ValidationError, match=f"store was a live {kind}.*Pass store= again"):
            KaLMDocumentCompressor.model_validate(made.model_dump())
        assert dumpd(made.as_runnable())["type"] == "not_implemented"
        assert copy.deepcopy(made).lazy.get()[1] is made.lazy.get()[1]


@pytest.mark.parametrize("how", COPIES)
def test_a_retriever_written_down(tiny: Reranker, tmp_path: Path, how: str) -> None:
    store = KaLMChroma("docs", VECTORS, str(tmp_path), reranker=tiny.at(16))
    store.add_documents(documents(LONG))
    for made in (
        KaLMRetriever(vectorstore=store, k=3, instructions="Find food."),
        KaLMRetriever(vectorstore=store, compressor=store.as_compressor(top_n=2, keep_margin=True)),
        KaLMRetriever(vectorstore=store, compressor=store.as_compressor(), k=2, threshold=0.0, ratio=32),
    ):
        copied = COPIES[how](made)
        assert copied.invoke(QUERY) == made.invoke(QUERY)
        assert copied.model_dump(exclude={"vectorstore"}) == made.model_dump(exclude={"vectorstore"})
    release_engines()
    store.close()


@pytest.mark.parametrize("place", ["beside the vectors", "in a file", "in an open store", "in another database"])
def test_a_vector_store_written_down(tiny: Reranker, tmp_path: Path, place: str) -> None:
    """A store that was given was replaced by the default one, without a word; so was a ready engine's ratio."""
    engine, folder, settings = tiny.at(16), str(tmp_path / "db"), {}
    if place == "in a file":
        settings["store"] = tmp_path / "states.sqlite3"
    elif place == "in an open store":
        settings["store"] = open_store(tmp_path / "elsewhere", engine.layout("int8"))
    elif place == "in another database":
        admin = chromadb.AdminClient(chromadb.Settings(is_persistent=True, persist_directory=folder))
        admin.create_tenant("ours")
        admin.create_database("texts", "ours")
        settings = {"tenant": "ours", "database": "texts"}
    made = KaLMChroma("docs", VECTORS, folder, reranker=engine, **settings)
    made.add_documents(documents(LONG))
    copied = pickle.loads(pickle.dumps(made))
    assert scores(copied.rerank(QUERY)) == scores(made.rerank(QUERY))
    assert copied.states_place() == made.states_place()
    assert copied.store.layout == made.store.layout
    assert copied.verify().clean
    assert copy.deepcopy(made).reranker is made.reranker
    for store in (made, copied):
        store.close()
    release_engines()


def test_a_vector_store_over_states_in_memory_is_refused(tiny: Reranker, tmp_path: Path) -> None:
    made = KaLMChroma("docs", VECTORS, str(tmp_path), reranker=tiny, store=MemoryStore(tiny.layout()))
    with pytest.raises(InputError, match="uses a live MemoryStore, which can't be pickled"):
        pickle.dumps(made)
    made.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"headers": {"Authorization": "Bearer s3cret"}},
        {"client_settings": chromadb.Settings(chroma_client_auth_credentials="s3cret")},
    ],
    ids=["headers", "client_settings"],
)
def test_secrets_are_not_written_down(tiny: Reranker, tmp_path: Path, settings: dict[str, Any]) -> None:
    """They stood in the pickle, in clear."""
    made = KaLMChroma("docs", VECTORS, str(tmp_path), reranker=tiny, **settings)
    with pytest.raises(InputError, match=r"may hold secrets, which are not written down\. Make the KaLMChroma where"):
        pickle.dumps(made)
    assert "s3cret" not in repr(made) + repr(KaLMRetriever(vectorstore=made))
    assert settings.get("headers", {"Authorization": "Bearer s3cret"}) == {"Authorization": "Bearer s3cret"}
    made.close()


def test_embeddings_written_down(pico: Reranker, tiny: Reranker) -> None:
    with pytest.raises(InputError, match="makes no vectors; wanted an engine over pico"):
        KaLMEmbeddings(reranker=tiny)
    made = KaLMEmbeddings(reranker=pico)
    for how in ("pickle", "deepcopy"):
        assert COPIES[how](made).embed_query(QUERY) == made.embed_query(QUERY)
