"""How LangChain apps are used to call vector stores, retrievers and rerankers: their calls mean the same here."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import uuid
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_documents import QUERY, TEXTS, VECTORS, documents
from pydantic import ValidationError

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, MissingStateError
from kalm_rag.langchain import KaLMChroma, KaLMCrossEncoder, KaLMDocumentCompressor, KaLMRerank, KaLMRetriever


def configured(**settings: Any) -> Any:
    return {"configurable": settings}


@pytest.fixture
def filled(chroma: KaLMChroma) -> KaLMChroma:
    chroma.add_documents(documents())
    return chroma


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


def test_one_number_of_documents_where_nobody_says(filled: KaLMChroma) -> None:
    """The compressor gave 3, the retriever 4."""
    given = {"query": QUERY, "documents": documents()}
    counts = [
        len(filled.as_compressor().compress_documents(documents(), QUERY)),
        len(filled.as_compressor().as_runnable().invoke(given)),
        len(KaLMRerank(store=filled).invoke(given)),
        len(KaLMRetriever(vectorstore=filled).invoke(QUERY)),
        len(filled.rerank(QUERY)),
        len(filled.similarity_search(QUERY)),
    ]
    assert counts == [4] * 6


def test_one_call_to_a_retriever(filled: KaLMChroma) -> None:
    retriever = KaLMRetriever(vectorstore=filled, k=4)
    two, best = retriever.invoke(QUERY, k=2), retriever.invoke(QUERY)[0]
    assert len(two) == 2
    assert retriever.bind(k=2).invoke(QUERY) == two
    assert retriever.invoke(QUERY, configured(kalm_top_n=2)) == two
    assert retriever.with_config(configured(kalm_top_n=2)).invoke(QUERY) == two
    assert (RunnablePassthrough() | retriever).invoke(QUERY, configured(kalm_top_n=2)) == two
    fields = retriever.configurable_fields(k=ConfigurableField("how_many"), filter=ConfigurableField("where"))
    assert fields.invoke(QUERY, configured(how_many=2)) == two
    assert [d.id for d in fields.invoke(QUERY, configured(where={"place": 3}))] == ["id-3"]
    assert len(fields.invoke(QUERY)) == 4
    assert retriever.invoke(QUERY, configured(kalm_top_n=3), k=2) == two, "the call goes before its config"
    score = best.metadata["relevance_score"]
    wanted = [best]
    assert retriever.invoke(QUERY, threshold=score) == wanted
    assert retriever.bind(threshold=score).invoke(QUERY) == wanted
    assert retriever.invoke(QUERY, configured(kalm_threshold=score)) == wanted
    assert [d.id for d in retriever.bind(filter={"place": 3}).invoke(QUERY)] == ["id-3"]
    assert [d.id for d in retriever.invoke(QUERY, configured(kalm_filter={"place": 3}))] == ["id-3"]
    with pytest.raises(InputError, match="kalm_top_n is 0; wanted a whole number"):
        retriever.invoke(QUERY, configured(kalm_top_n=0))
    with pytest.raises(InputError, match=r"kalm_threshold is 2; wanted P\(yes\)"):
        retriever.invoke(QUERY, configured(kalm_threshold=2))
    with pytest.raises(ValidationError, match="k is 0; wanted a whole number"):
        fields.invoke(QUERY, configured(how_many=0))


def test_a_configured_k_of_a_retriever_whose_compressor_has_a_top_n(filled: KaLMChroma) -> None:
    """The copy that LangChain makes for the call was refused: two numbers were given."""
    compressor = filled.as_compressor(top_n=3)
    retriever = KaLMRetriever(vectorstore=filled, compressor=compressor)
    fields = retriever.configurable_fields(k=ConfigurableField("how_many"))
    assert [len(fields.invoke(QUERY, configured(**said))) for said in ({}, {"how_many": 1})] == [3, 1]
    assert compressor.model_fields_set >= {"top_n"}, "the caller's own is left as it is"


def test_a_filter_or_a_threshold_is_lifted_for_one_call(filled: KaLMChroma) -> None:
    """``filter=None`` meant the retriever's own, so that nothing could lift it."""
    for settings in ({"filter": {"place": 3}}, {"search_kwargs": {"filter": {"place": 3}}}):
        retriever = KaLMRetriever(vectorstore=filled, k=5, **settings)
        assert [d.id for d in retriever.invoke(QUERY)] == ["id-3"]
        assert len(retriever.invoke(QUERY, filter=None)) == 5
        assert len(retriever.bind(filter=None).invoke(QUERY)) == 5
        assert len(retriever.invoke(QUERY, configured(kalm_filter=None))) == 5
        assert [d.id for d in retriever.invoke(QUERY, filter={"place": 1})] == ["id-1"]
        assert [d.id for d in retriever.invoke(QUERY, configured(kalm_top_n=None, kalm_threshold=None))] == ["id-3"]
    strict = KaLMRetriever(vectorstore=filled, k=5, threshold=1.0)
    assert strict.invoke(QUERY) == []
    assert len(strict.invoke(QUERY, threshold=None)) == 5


def test_one_call_to_a_step(compressor: KaLMDocumentCompressor) -> None:
    given = {"query": QUERY, "documents": documents()}
    step = KaLMRerank(compressor)
    every = step.invoke(given)
    score = every[1].metadata["relevance_score"]
    assert len(every) == 5
    assert step.bind(top_n=2).invoke(given) == every[:2]
    assert step.bind(threshold=score).invoke(given) == every[:2]
    assert step.invoke(given, configured(kalm_top_n=2)) == every[:2]
    assert step.invoke(given, configured(kalm_threshold=score)) == every[:2]
    assert step.invoke(given, configured(kalm_top_n=1), top_n=2) == every[:2], "the call goes before its config"
    fields = step.configurable_fields(top_n=ConfigurableField("how_many"), threshold=ConfigurableField("least"))
    assert fields.invoke(given, configured(how_many=2)) == every[:2]
    assert fields.invoke(given, configured(least=score)) == every[:2]
    assert fields.invoke(given) == every
    food = KaLMRerank(compressor, instructions="Find food.").invoke(given)
    assert food == step.bind(instructions="Find food.").invoke(given) != every
    assert (
        step.configurable_fields(instructions=ConfigurableField("task")).invoke(given, configured(task="Find food."))
        == food
    )
    with pytest.raises(InputError, match="top_n is 0; wanted a whole number"):
        step.bind(top_n=0).invoke(given)
    with pytest.raises(InputError, match=r"KaLMRerank.invoke has no argument top_k\. Did you mean top_n"):
        step.bind(top_k=1).invoke(given)


def test_one_call_without_holding_up_the_loop(compressor: KaLMDocumentCompressor, filled: KaLMChroma) -> None:
    given = {"query": QUERY, "documents": documents()}
    step, retriever = KaLMRerank(compressor), KaLMRetriever(vectorstore=filled, filter={"place": 3})
    two = step.invoke(given)[:2]
    assert asyncio.run(step.bind(top_n=2).ainvoke(given)) == two
    assert asyncio.run(step.ainvoke(given, configured(kalm_top_n=2))) == two
    assert len(asyncio.run(retriever.bind(filter=None, k=2).ainvoke(QUERY))) == 2
    assert len(asyncio.run(retriever.ainvoke(QUERY, configured(kalm_filter=None, kalm_top_n=2)))) == 2


def test_one_call_to_a_compressor_of_a_chain(compressor: KaLMDocumentCompressor) -> None:
    retrievers = pytest.importorskip("langchain_classic.retrievers", reason="langchain-classic is not installed")
    vectors = InMemoryVectorStore(VECTORS)
    vectors.add_documents(documents())
    behind = retrievers.ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=vectors.as_retriever(search_kwargs={"k": 5})
    )
    chain = behind | RunnableLambda(list)
    every: list[Document] = chain.invoke(QUERY)
    assert len(every) == 5
    assert chain.invoke(QUERY, configured(kalm_top_n=2)) == every[:2]
    assert chain.invoke(QUERY, configured(kalm_threshold=every[1].metadata["relevance_score"])) == every[:2]


ALIKE = [*(f"Bees make honey{'!' * i}" for i in range(9)), "Steel rusts."]


class Pointing(Embeddings):
    """Bees point one way, nearly; steel another."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [[1.0, 0.01 * len(text), 0.0] if "ees" in text else [0.5, 0.0, 1.0] for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return [1.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["chroma", "in memory"])
def test_candidates_that_are_unlike_each_other(tiny: Reranker, kind: str) -> None:
    store: Any = (
        KaLMChroma(f"mmr-{uuid.uuid4()}", Pointing(), reranker=tiny)
        if kind == "chroma"
        else InMemoryVectorStore(Pointing())
    )
    compressor = KaLMDocumentCompressor(reranker=tiny, store=store if kind == "chroma" else None)
    settings: dict[str, Any] = {"vectorstore": store, "compressor": compressor, "k": 2, "fetch_k": 2}
    near, unlike = KaLMRetriever(**settings), KaLMRetriever(**settings, search_type="mmr", keep_retrieval_score=True)
    near.add_documents([Document(t, id=f"id-{i}") for i, t in enumerate(ALIKE)])
    assert "Steel rusts." not in [d.page_content for d in near.invoke(QUERY)]
    found = unlike.invoke(QUERY)
    assert "Steel rusts." in [d.page_content for d in found]
    texts = [d.page_content for d in sorted(found, key=_rank)]
    assert [d.page_content for d in found] == [texts[r.index] for r in tiny.rank(QUERY, texts)]
    assert sorted(map(_rank, found)) == [1, 2]
    assert not any("retrieval_score" in d.metadata for d in found), "MMR gives no scores"
    assert asyncio.run(unlike.ainvoke(QUERY)) == found
    same = KaLMRetriever(**settings, search_type="mmr", search_kwargs={"lambda_mult": 1.0, "fetch_k": 10})
    assert same.invoke(QUERY) == near.invoke(QUERY), "its arguments go to the store"
    with pytest.raises(ValidationError, match="Input should be 'similarity' or 'mmr'"):
        KaLMRetriever(**settings, search_type="best")


def _rank(document: Document) -> int:
    rank: int = document.metadata["retrieval_rank"]
    return rank


def test_mmr_over_the_bundled_vectors_reads_stored_states(pico: Reranker) -> None:
    store = KaLMChroma(f"mmr-{uuid.uuid4()}", reranker=pico)
    retriever = KaLMRetriever(vectorstore=store, k=2, search_type="mmr", filter={"place": {"$gte": 1}})
    assert retriever.add_documents(documents()) == [f"id-{i}" for i in range(5)]
    assert store.verify().clean
    assert retriever.invoke(QUERY)[0].id == "id-3"
    assert asyncio.run(retriever.aadd_documents(documents()[:1], ids=["again"])) == ["again"]
    assert store.get_by_ids(["again"])[0].page_content == TEXTS[0]


def test_a_cross_encoder_for_what_takes_one(filled: KaLMChroma, tiny: Reranker) -> None:
    retrievers = pytest.importorskip("langchain_classic.retrievers", reason="langchain-classic is not installed")
    rerankers = pytest.importorskip("langchain_classic.retrievers.document_compressors")
    encoder = KaLMCrossEncoder(store=filled, missing="raise")  # all of them are stored, so nothing is encoded
    reranker = rerankers.CrossEncoderReranker(model=encoder, top_n=2)
    behind = retrievers.ContextualCompressionRetriever(
        base_compressor=reranker, base_retriever=filled.as_retriever(search_kwargs={"k": 5})
    )
    wanted = [d.id for d in filled.rerank(QUERY, k=2)]
    assert [d.id for d in behind.invoke(QUERY)] == wanted
    assert [d.id for d in asyncio.run(behind.ainvoke(QUERY))] == wanted
    assert [d.id for d in behind.invoke(" ")] == [d.id for d in filled.similarity_search(" ", k=2)]


def test_a_cross_encoder_scores_pairs_in_their_order(tiny: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = KaLMCrossEncoder(reranker=tiny, instructions="Find food.")
    encoded: list[str] = []
    encode = tiny.backbone.encode

    def counted(passages: Any, *args: Any, **kwargs: Any) -> Any:
        encoded.extend(passages)
        return encode(passages, *args, **kwargs)

    monkeypatch.setattr(tiny.backbone, "encode", counted)
    texts = [f"{text} {uuid.uuid4()}" for text in TEXTS]
    pairs = [(query, text) for text in texts for query in (QUERY, "what rusts?")]
    scores = encoder.score(pairs)
    monkeypatch.undo()
    assert len(encoded) == len(texts), "a passage was encoded again for the second query"
    wanted = tiny.predict(pairs, instructions="Find food.").tolist()
    assert scores == pytest.approx(wanted, abs=1e-6)
    assert encoder.score(pairs[:1]) == pytest.approx(wanted[:1], abs=1e-6)
    assert all(type(score) is float for score in scores)
    assert encoder.score([(QUERY, "equation \ud835"), (" ", "Steel rusts.")]) == [0.0, 0.0]
    assert encoder.score([]) == []
    assert KaLMCrossEncoder(reranker=tiny, missing="skip").score([(QUERY, str(uuid.uuid4()))]) == [0.0]
    with pytest.raises(MissingStateError, match="1 of 1 candidates have no stored states"):
        KaLMCrossEncoder(reranker=tiny, missing="raise").score([(QUERY, str(uuid.uuid4()))])
    for wrong in [(QUERY, 3)], ["ab"], [(QUERY,)]:
        with pytest.raises(InputError, match=r"pair 0 is .*; wanted"):
            encoder.score(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="text_pairs is one string"):
        encoder.score(QUERY)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=r"KaLMCrossEncoder has no argument instruction\. Did you mean"):
        KaLMCrossEncoder(instruction="x")  # type: ignore[call-arg]
    again = pickle.loads(pickle.dumps(encoder))
    assert again.instructions == encoder.instructions
    assert again.score(pairs[:2]) == pytest.approx(scores[:2], abs=1e-6)


class TestWhatIsKept:
    def test_documents_rewritten_for_a_query_are_cached_only(self, filled: KaLMChroma) -> None:
        """What another step makes of a text filled the store, and nothing referred to it."""
        before = filled.index.store.stats().states
        compressor = filled.as_compressor(top_n=None)
        found = filled.similarity_search(QUERY, k=9)
        rewritten = [d.model_copy(update={"page_content": f"In short: {d.page_content}"}) for d in found]
        seen = [compressor.compress_documents(rewritten, QUERY) for _ in range(2)]
        assert seen[0] == seen[1]
        assert filled.index.store.stats().states == before
        assert filled.verify().clean
        again = filled.as_compressor(top_n=None, missing="raise")
        assert again.compress_documents(rewritten, QUERY) == seen[0], "the cache has them"

    @pytest.mark.parametrize("through", ["compressor", "retriever"])
    def test_a_records_states_are_kept_with_its_reference(self, tmp_path: Path, tiny: Reranker, through: str) -> None:
        Chroma("docs", VECTORS, persist_directory=str(tmp_path)).add_documents(documents())  # somebody else filled it
        store = KaLMChroma("docs", VECTORS, persist_directory=str(tmp_path), reranker=tiny)
        assert store.verify().missing
        if through == "retriever":
            KaLMRetriever(vectorstore=store, k=9, fetch_k=9).invoke(QUERY)
        else:
            elsewhere = [Document("Of another store."), Document("And of another one.", id="id-0")]
            store.as_compressor().compress_documents([*store.similarity_search(QUERY, k=9), *elsewhere], QUERY)
        assert store.verify().clean
        assert store.index.store.stats().states == len(TEXTS)
        store.close()
