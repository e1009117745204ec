"""Sentences that don't answer go: by the decoder over stored states alone, with the characters that stay."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import toy_vectors

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.errors import InputError
from kalm_rag.index import pruning
from kalm_rag.index.pruning import PRUNE_MARGINS, pruned_text, split_sentences
from kalm_rag.states import StateBatch, batch_states

QUERY = "What is the capital of France?"
ANSWER = "Its capital is Paris, on the Seine."
TEXTS = [
    f"France lies in western Europe. {ANSWER} The wine is good there. I like tea with milk – and 3.5 g of sugar.",
    "The capital of France is Paris.",
    "Steel rusts. Bees make honey. Cats sleep a lot.\n\n- Rain falls in May.\n- Snow falls in January.",
    "Trains leave every hour. " * 30 + ANSWER + " Trains leave every hour." * 30,
]
IDS = [f"r{n}" for n in range(len(TEXTS))]


@pytest.fixture
def index(pico: Reranker) -> Iterator[ChromaIndex]:
    with ChromaIndex.open(model=pico, embedder=toy_vectors, collection="prune") as made:
        made.delete(made.collection.get()["ids"])
        made.add(IDS, TEXTS)
        yield made


class TestSentences:
    @pytest.mark.parametrize(
        ("text", "sentences"),
        [
            ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
            ("At 9 a.m. J. R. Ford (c. 1700) of Warner Bros. left the U.S. for No. 9, Wm. and Mr. Li. Next.", 2),
            ("mr. li met the rev. li. then he left.", 2),
            ("He said no. Then left.", 2),
            ("He (Dr. A. Smith) paid 3.50 to Acme Inc. for it. Then left.", 2),
            ('He said: "Go." And went. See e.g. Fig. 3.', ['He said: "Go."', "And went.", "See e.g. Fig. 3."]),
            ("A title\n\nIts text\nruns on.\n- one\n- two", ["A title", "Its text\nruns on.", "- one", "- two"]),
            ("東京は首都です。雨が降る。", ["東京は首都です。", "雨が降る。"]),
            ("   ", []),
            ("", []),
        ],
    )  # fmt: skip
    def test_are_told_apart(self, text: str, sentences: list[str] | int) -> None:
        found = [text[start:end] for start, end in split_sentences(text)]
        assert (len(found) if isinstance(sentences, int) else found) == sentences

    @given(st.text(alphabet=st.sampled_from("aB .!?…\n-\t。\"')1U.S"), max_size=200))
    def test_every_character_but_blanks_is_in_one(self, text: str) -> None:
        spans = split_sentences(text)
        inside = [place for start, end in spans for place in range(start, end)]
        assert inside == sorted(set(inside))
        assert not "".join(c for place, c in enumerate(text) if place not in set(inside)).strip()
        assert all(text[start:end] == text[start:end].strip() != "" for start, end in spans)
        assert pruned_text(text, spans).split() == text.split()
        for start, end in spans:
            assert pruned_text(text, [(start, end)]).strip("… ") == text[start:end].strip("… ")

    @pytest.mark.parametrize("piece", ["a. ", ".", "Mr. ", "\n", "\n- ", "A.", "x" * 3])
    def test_take_time_that_grows_with_the_text(self, piece: str) -> None:
        started = time.perf_counter()
        split_sentences(piece * (300_000 // len(piece)))
        assert time.perf_counter() - started < 10

    def test_gaps_are_marked(self) -> None:
        assert pruned_text("One. Two. Three.", [(5, 9)]) == "… Two. …"
        assert pruned_text("One. Two. Three.", [(0, 4), (10, 16)]) == "One. … Three."
        assert pruned_text("One.\n\nTwo. Three.", [(0, 4), (6, 10)]) == "One.\n\nTwo. …"
        assert pruned_text(" One. ", None) == " One. "


def test_the_answer_stays_and_what_went_is_known(index: ChromaIndex) -> None:
    whole = {hit.id: hit for hit in index.query(QUERY, top_n=None)}
    result = index.query(QUERY, top_n=None, prune=True)
    assert [hit.id for hit in result] == list(whole), "pruning changes no order"
    for hit in result:
        before = whole[hit.id]
        assert (hit.margin, hit.probability) == (before.margin, before.probability)
        assert hit.text == pruned_text(before.text or "", hit.kept)
        assert hit.text
        if hit.kept is not None:
            sentences = split_sentences(before.text or "")
            assert set(hit.kept) < set(sentences)
            assert list(hit.kept) == sorted(hit.kept) != []
    texts = {hit.id: hit.text or "" for hit in result}
    assert ANSWER in texts["r0"]
    assert "tea" not in texts["r0"]
    assert texts["r1"] == TEXTS[1]
    assert whole["r1"].kept is None
    assert ANSWER in texts["r3"]
    assert len(texts["r3"]) < len(TEXTS[3]) / 4, "a passage of several windows"


def test_a_sentence_is_scored_by_its_own_states_alone(index: ChromaIndex, pico: Reranker) -> None:
    """As the decoder scores those states as a passage, whatever other sentences and passages are beside them."""
    kept_by = {b: {hit.id: hit.kept for hit in index.query(QUERY, top_n=None, prune=b)} for b in (1e-3, 1.5, 4.0)}
    for text, record in zip(TEXTS, IDS, strict=True):
        (states,) = pico.encode([text])
        behind = pico.backbone.offsets(text)
        margins = {}
        for start, end in split_sentences(text):
            tokens = [n for n, (a, b) in enumerate(behind) if a < b and a < end and b > start]
            first, last = tokens[0] // 4, tokens[-1] // 4 + 1
            count = min(last * 4, states.tokens) - first * 4
            assert states.token_ids is not None
            alone = batch_states([states])
            part = StateBatch(
                vectors=alone.vectors[:, first:last], scales=None, tokens=torch.tensor([count]),
                total_tokens=torch.tensor([count]), ratio=4, fingerprint=alone.fingerprint,
                token_ids=states.token_ids[None, first * 4 : first * 4 + count].int(),
            )  # fmt: skip
            margins[start, end] = pico.score(QUERY, part)[0].margin
        best = max(margins.values())
        for below, found in kept_by.items():
            expected = tuple(span for span, margin in margins.items() if margin >= best - below - 1e-4)
            nearly = tuple(span for span, margin in margins.items() if margin >= best - below + 1e-4)
            kept = found[record] or tuple(margins)
            assert set(nearly) | {max(margins, key=lambda s: margins[s])} <= set(kept) <= set(expected)


def test_stored_and_fresh_states_give_the_same(index: ChromaIndex) -> None:
    stored = index.query(QUERY, top_n=None, prune=True)
    index.store.unreference(index.home.collection_id, IDS)
    index.store.gc([index.home.collection_id], younger_than=0)
    fresh = index.query(QUERY, top_n=None, prune=True)
    assert fresh.encoded == len(TEXTS)
    assert [(hit.id, hit.kept) for hit in fresh] == [(hit.id, hit.kept) for hit in stored]


def test_the_query_is_read_once(index: ChromaIndex, pico: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with an embedder of the app's, where the decoder gets its text: it was made a prompt once more to prune."""
    read: list[str] = []
    kind = type(pico.backbone)
    plain = kind.prompt
    monkeypatch.setattr(kind, "prompt", lambda self, text, *told: (read.append(text), plain(self, text, *told))[1])
    assert any(hit.kept for hit in index.query(QUERY, prune=True))
    assert read == [QUERY]


def test_a_budget_counts_what_is_left(index: ChromaIndex) -> None:
    def words(text: str) -> int:
        return len(text.split())

    left = {hit.id: words(hit.text or "") for hit in index.query(QUERY, top_n=None, prune=True)}
    room = sum(left.values())
    assert room < sum(map(words, TEXTS)) / 2
    assert len(index.query(QUERY, top_n=None, prune=True, max_tokens=room, count_tokens=words)) == len(TEXTS)
    assert len(index.query(QUERY, top_n=None, prune=True, max_tokens=room - 1, count_tokens=words)) < len(TEXTS)


def test_passes_are_counted(index: ChromaIndex) -> None:
    """Nothing is encoded for it, and no sentence is scored of a passage that `top_n` leaves out."""
    whole = index.query(QUERY, top_n=None)
    for top_n in (1, 2, None):
        before = index.engine.stats
        result = index.query(QUERY, top_n=top_n, prune=True)
        after = index.engine.stats
        assert result.encoded == 0
        sentences = sum(len(split_sentences(hit.text or "")) for hit in whole.hits[:top_n])
        assert after.rows - before.rows == len(TEXTS) + sentences


def test_a_long_sentence_makes_no_others_as_wide(pico: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sentences of some passages were padded to the one without an end; in blocks the same comes out."""
    endless = "and it is a long one " * 300
    with ChromaIndex.open(model=pico, embedder=toy_vectors, collection="prune-long") as index:
        index.upsert(["a", "b"], [f"{TEXTS[0]} {endless}", TEXTS[3]])
        expected = [(hit.id, hit.kept) for hit in index.query(QUERY, prune=True)]
        assert all(kept for _, kept in expected)
        blocks: list[int] = []
        real = StateBatch.stretches

        def watched(states: StateBatch, parts: Any) -> StateBatch:
            batch = real(states, parts)
            blocks.append(batch.vectors.shape[0] * batch.vectors.shape[1] * batch.ratio)
            return batch

        monkeypatch.setattr(StateBatch, "stretches", watched)
        monkeypatch.setattr(pruning, "MOST_TOKENS", 500)
        assert [(hit.id, hit.kept) for hit in index.query(QUERY, prune=True)] == expected
        assert len(blocks) > 2
        assert sorted(blocks)[-2] < 600, "all but the endless one, widened to whole states"


@pytest.mark.parametrize("wrong", [0, 0.0, -1, -0.5, "yes", None, float("nan"), float("inf")])
def test_wrong_margins_are_named(index: ChromaIndex, wrong: Any) -> None:
    with pytest.raises(InputError, match="prune is"):
        index.query(QUERY, prune=wrong)


def test_a_rule_that_puts_metadata_before_the_text(pico: Reranker) -> None:
    """Characters are those of the record's own text; a text that isn't found in what is read stays whole."""
    with ChromaIndex.open(
        model=pico, embedder=toy_vectors, collection="prune-rule", passage="{title}: {text}\n({title})"
    ) as index:
        index.upsert(["a"], [TEXTS[0]], [{"title": "Wine. Cheese. Paris is the capital of France"}])
        (hit,) = index.query(QUERY, prune=True)
        assert hit.kept is not None
        assert ANSWER in (hit.text or "")
        assert hit.text == pruned_text(TEXTS[0], hit.kept)
        assert set(hit.kept) <= set(split_sentences(TEXTS[0]))


def test_blanks_that_a_rule_strips(pico: Reranker) -> None:
    with ChromaIndex.open(
        model=pico, embedder=toy_vectors, collection="prune-blank", passage="{title}\n{text}"
    ) as index:
        text = f"\n  {TEXTS[0]} \n"
        index.upsert(["a", "b"], [text, " \n"], [{"title": ""}] * 2)
        hits = {hit.id: hit for hit in index.query(QUERY, prune=True, top_n=None)}
        kept = hits["a"].kept
        assert kept is not None
        assert ANSWER in [text[start:end] for start, end in kept]
        assert hits["b"].kept is None


def test_other_models_need_a_margin(tiny: Reranker) -> None:
    with ChromaIndex.open(model=tiny, embedder=toy_vectors, collection="prune-tiny") as index:
        index.upsert(IDS, TEXTS)
        assert tiny.info.family not in PRUNE_MARGINS
        assert all(hit.kept is None for hit in index.query(QUERY, prune=True))
        tight = {hit.id: hit.kept for hit in index.query(QUERY, top_n=None, prune=1e-6)}
        assert [record for record, kept in tight.items() if kept is None] == ["r1"]
        assert len(tight["r0"] or ()) == len(tight["r2"] or ()) == 1


class TestFrameworks:
    def test_langchain(self, index: ChromaIndex, pico: Reranker) -> None:
        pytest.importorskip("langchain_core", reason="langchain-core is not installed (extra 'langchain')")
        from langchain_core.documents import Document

        from kalm_rag.langchain import KaLMDocumentCompressor

        given = [Document(text, id=i, metadata={"n": [1]}) for i, text in zip(IDS, TEXTS, strict=True)]
        before = copy.deepcopy(given)
        compressor = KaLMDocumentCompressor(reranker=pico, top_n=None, prune=True, details=True)
        found = compressor.compress_documents(given, QUERY)
        assert given == before
        expected = index.query(QUERY, top_n=None, prune=True)
        assert [(d.id, d.page_content) for d in found] == [(hit.id, hit.text) for hit in expected]
        kept = [d.metadata["rerank_details"].get("kept") for d in found]
        assert kept == [None if hit.kept is None else [list(span) for span in hit.kept] for hit in expected]
        assert compressor.model_dump()["prune"] is True

    def test_llama_index(self, index: ChromaIndex, pico: Reranker) -> None:
        pytest.importorskip("llama_index.core", reason="llama-index-core is not installed (extra 'llama-index')")
        from llama_index.core.schema import NodeWithScore, TextNode

        from kalm_rag.llama_index import KaLMNodePostprocessor

        given = [NodeWithScore(node=TextNode(id_=i, text=t)) for i, t in zip(IDS, TEXTS, strict=True)]
        before = copy.deepcopy(given)
        post = KaLMNodePostprocessor(reranker=pico, top_n=None, prune=True, keep_retrieval_score=True)
        found = post.postprocess_nodes(given, query_str=QUERY)
        assert given == before
        expected = index.query(QUERY, top_n=None, prune=True)
        assert [(n.node_id, n.text) for n in found] == [(hit.id, hit.text) for hit in expected]
        with_metadata = TextNode(id_="m", text=TEXTS[0], metadata={"title": "On France. A guide."})
        (node,) = post.postprocess_nodes([NodeWithScore(node=with_metadata)], query_str=QUERY)
        assert ANSWER in node.text
        assert len(node.text) < len(TEXTS[0])
        assert node.metadata["title"] == "On France. A guide."
