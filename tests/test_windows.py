"""Passages longer than pico's encoder reads at once are read whole, wherever the answer is; short ones as before."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import chromadb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import Script
from typer.testing import CliRunner

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.cli import app
from kalm_rag.errors import InputError, StateMismatchError
from kalm_rag.index.collection import NOTE
from kalm_rag.index.embedders import BundledEmbedder
from kalm_rag.models.pico.encoder import MiniLMEncoder
from kalm_rag.models.pico.windows import cut_windows
from kalm_rag.states import batch_states

ANSWERS = {
    "What do bees make from nectar?": "Bees make honey from nectar and keep it in combs of wax.",
    "How tall is the Eiffel tower?": "The Eiffel tower in Paris is 330 metres tall.",
    "Who wrote the opera Carmen?": "Carmen is an opera that Georges Bizet wrote in 1875.",
}
FILLER = [
    "A list holds items of any kind and grows at its end.",
    "The committee met on Tuesday and put the vote off by a week.",
    "Iron rusts where water and air reach it.",
    "Trains to the coast leave every half hour from the second platform.",
    "The recipe wants flour, butter, two eggs and a pinch of salt.",
    "Sea levels rose by some twenty centimetres within the last century.",
    "A compiler turns the source of a program into machine code.",
    "The goalkeeper was injured in the second half of the match.",
    "Copper conducts heat and electricity better than most metals do.",
    "Her second novel is set in a fishing village in the north.",
]


def passage_of(answer: str, tokens: int, place: str, seed: int = 0) -> str:
    """Some 12 tokens a sentence, with the answer at the start, in the middle, at the end or nowhere."""
    draw = random.Random(seed)
    sentences = [draw.choice(FILLER) for _ in range(tokens // 12)]
    at = {"start": 0, "middle": len(sentences) // 2, "end": len(sentences)}.get(place)
    return " ".join(sentences if at is None else [*sentences[:at], answer, *sentences[at:]])


@given(tokens=st.integers(0, 3000), width=st.integers(2, 300), overlap=st.integers(0, 299))
def test_every_token_is_kept_once_and_read_behind_its_overlap(tokens: int, width: int, overlap: int) -> None:
    overlap = min(overlap, width - 1)
    windows = cut_windows(tokens, width, overlap)
    assert [i for w in windows for i in range(w.first, w.last)] == list(range(tokens))
    for number, w in enumerate(windows):
        assert 0 <= w.start <= w.first <= w.last <= w.stop <= min(tokens, w.start + width)
        assert number == 0 or w.first - w.start >= overlap
    # reading is linear in length: windows move on by all that they don't share
    assert len(windows) <= 1 + -(-max(0, tokens - width) // (width - overlap))


@pytest.mark.parametrize("tokens", [300, 600, 1200])
def test_the_place_of_the_answer_does_not_matter(pico: Reranker, tokens: int) -> None:
    """Cut at 256 tokens, an answer at the end had P(yes) 0.00 where the same at the start had 0.84."""
    found: dict[str, list[float]] = {}
    for query, answer in ANSWERS.items():
        places = ["start", "middle", "end", "nowhere"]
        states = pico.encode([passage_of(answer, tokens, place) for place in places])
        assert all(not s.truncated and s.tokens > tokens * 0.8 for s in states)
        for place, relevance in zip(places, pico.score(query, states), strict=True):
            found.setdefault(place, []).append(relevance.probability)
    assert min(found["middle"] + found["end"]) > 0.1 > 0.01 > max(found["nowhere"]), found
    assert mean(found["start"]) - mean(found["end"]) < 0.5, found


def test_short_passages_are_read_as_they_were_before_windows(pico: Reranker) -> None:
    """To the bit; beside long ones, within the rounding of another batch."""
    short = [*FILLER, " ".join(FILLER * 2)]
    long = [passage_of("", 500, "nowhere", seed) for seed in range(3)]
    alone = pico.encode(short)
    beside = pico.encode([*long, *short])[len(long) :]
    with Reranker.from_pretrained("pico", device="cpu", max_passage_tokens=256) as former:
        as_before = former.encode(short)
    for one, two, three in zip(alone, beside, as_before, strict=True):
        assert torch.equal(one.vectors, three.vectors)
        assert torch.allclose(one.vectors.float(), two.vectors.float(), atol=2e-3)


def test_a_long_passage_is_read_alike_alone_and_among_others(pico: Reranker) -> None:
    long = [passage_of("", 700, "nowhere", seed) for seed in range(4)]
    for alone, together in zip([pico.encode([text])[0] for text in long], pico.encode(long), strict=True):
        assert torch.allclose(alone.vectors.float(), together.vectors.float(), atol=2e-3)
        assert alone.token_ids is not None
        assert together.token_ids is not None
        assert torch.equal(alone.token_ids, together.token_ids)


def test_an_explanation_names_what_stands_in_a_later_window(pico: Reranker) -> None:
    query, answer = next(iter(ANSWERS.items()))
    text = passage_of(answer, 900, "end")
    explained = pico.explain(query, text)
    spans = explained.spans
    assert spans[-1].end >= len(text) - 1
    assert all(a.end <= b.start for a, b in pairwise(spans))
    assert text.rindex(explained.top(1)[0][0]) >= text.index(answer) - 20


def test_the_cut_is_a_setting(pico: Reranker, tiny_folder: Path) -> None:
    text = "word " * 3000
    assert pico.encode([text])[0].tokens == 2048
    with Reranker.from_pretrained("pico", device="cpu", max_passage_tokens=3002) as whole:
        states = whole.encode([text])[0]
        assert (states.tokens, states.truncated) == (3002, False)
        assert whole.info.fingerprint != pico.info.fingerprint
    with Reranker.from_pretrained(str(tiny_folder), device="cpu", max_passage_tokens=64) as tiny:
        assert tiny.encode(["x" * 500])[0].tokens == 64
    for wrong in (0, 15, 1 << 17, True, 2.5, "256"):
        with pytest.raises(InputError, match="max_passage_tokens"):
            Reranker.from_pretrained("pico", device="cpu", max_passage_tokens=wrong)  # type: ignore[arg-type]


def forget_cut(index: ChromaIndex) -> None:
    """Leave a collection as it was before cuts were noted."""
    told = {key: value for key, value in index.collection.metadata.items() if key != NOTE + "max_passage_tokens"}
    index.collection.modify(metadata=told)


def test_a_collection_keeps_the_cut_it_was_made_with(tmp_path: Path, pico: Reranker) -> None:
    """Nothing is encoded again because a release reads more of a passage; who asks for it gets it."""
    query, answer = next(iter(ANSWERS.items()))
    text = passage_of(answer, 600, "end")
    with ChromaIndex.open(tmp_path, device="cpu", max_passage_tokens=256) as index:
        assert index.add(["long"], [text]).truncated == ["long"]
        forget_cut(index)
    with ChromaIndex.open(tmp_path, device="cpu") as index:
        found = index.query(query)
        assert (index.engine.info.max_passage_tokens, found.from_store, found.hits[0].truncated) == (256, 1, True)
        before = found.hits[0].probability
    with pytest.raises(StateMismatchError, match="cut at 256 tokens; this engine cuts them at 2048"):
        ChromaIndex.open(tmp_path, model=pico).query(query)
    with ChromaIndex.open(tmp_path, device="cpu", change_model=True) as index:
        assert index.backfill().encoded == 1
    with ChromaIndex.open(tmp_path, device="cpu") as index:
        found = index.query(query)
        assert (found.from_store, found.hits[0].truncated) == (1, False)
        assert before is not None
        assert (found.hits[0].probability or 0) > before + 0.1
        index.upsert(["long"], ["Short."])
    with pytest.raises(StateMismatchError, match="made with max_passage_tokens '2048'; asked for '256'"):
        ChromaIndex.open(tmp_path, device="cpu", max_passage_tokens=256)


def test_a_cut_that_is_no_number_is_named(tmp_path: Path) -> None:
    with ChromaIndex.open(tmp_path, device="cpu") as index:
        index.add(["a"], ["Bees make honey."])
        index.collection.modify(metadata={**index.collection.metadata, NOTE + "max_passage_tokens": "many"})
    with pytest.raises(StateMismatchError, match="notes max_passage_tokens 'many'; wanted a number"):
        ChromaIndex.open(tmp_path, device="cpu")
    with ChromaIndex.open(tmp_path, device="cpu", change_model=True) as index:
        index.backfill()
    with ChromaIndex.open(tmp_path, device="cpu") as index:
        assert index.query("What do bees make?").from_store == 1


def test_the_command_line_lets_an_old_collection_go_over(tmp_path: Path) -> None:
    with ChromaIndex.open(tmp_path, device="cpu", max_passage_tokens=256) as index:
        index.add(["long"], [passage_of("", 600, "nowhere")])
        forget_cut(index)
    run = CliRunner().invoke(app, ["backfill", "--db", str(tmp_path), "--change-model"])
    assert run.exit_code == 0, run.output
    with ChromaIndex.open(tmp_path, device="cpu") as index:
        assert index.engine.info.max_passage_tokens == 2048
        assert index.verify().clean


def test_no_more_is_read_than_a_vector_stands_for(pico: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no state is kept, in another store than ours or beside a KaLM checkpoint, one window is enough."""
    read: list[int] = []
    plain = MiniLMEncoder.hidden
    monkeypatch.setattr(MiniLMEncoder, "hidden", lambda self, ids: (read.extend(map(len, ids)), plain(self, ids))[1])
    long = passage_of("", 1800, "nowhere")
    vectors = BundledEmbedder(pico).passages([long, "Bees make honey."])
    assert sorted(read) == [6, 256]
    monkeypatch.undo()
    kept = BundledEmbedder(pico).from_states(batch_states(pico.encode([long, "Bees make honey."])))
    assert (vectors * kept).sum(1) == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.parametrize("door", ["index", "langchain", "llama_index"])
@pytest.mark.parametrize("change", ["max_passage_tokens=2048", "dtype='bf16'"])
def test_who_opened_before_a_change_may_not_undo_it(pico: Reranker, tmp_path: Path, door: str, change: str) -> None:
    """Its first write was refused, and its second one noted the former cut again: later readers saw old states."""
    long = passage_of("", 600, "nowhere")
    with ChromaIndex.open(tmp_path, device="cpu", max_passage_tokens=256) as index:
        index.add(["x"], [long])
    write: Callable[[], Any]
    if door == "index":
        old: Any = ChromaIndex.open(tmp_path, device="cpu")
        write = lambda: old.upsert(["y"], ["I like tea."])  # noqa: E731
    elif door == "langchain":
        old = pytest.importorskip("kalm_rag.langchain").KaLMChroma("passages", persist_directory=str(tmp_path))
        write = lambda: old.add_texts(["I like tea."], ids=["y"])  # noqa: E731
    else:
        room = pytest.importorskip("kalm_rag.llama_index")
        node = pytest.importorskip("llama_index.core.schema").TextNode(id_="y", text="I like tea.")
        old = room.KaLMChromaVectorStore.from_params("passages", persist_dir=str(tmp_path), passage="document")
        node.embedding = old.as_embedding().get_text_embedding(node.text)
        write = lambda: old.add([node])  # noqa: E731
    assert old.verify().clean
    code = (
        f"from kalm_rag import ChromaIndex\nwith ChromaIndex.open({str(tmp_path)!r}, device='cpu', "
        f"{change}, change_model=True) as index: index.backfill()"
    )
    Script(code).finish()
    told = {
        "max_passage_tokens=2048": "made with max_passage_tokens '2048' since this opened it with '256'",
        "dtype='bf16'": "made with dtype 'bfloat16' since this opened it with 'float32'",
    }[change]
    for _ in range(3):
        for work in (write, old.backfill, *([old.refresh] if door == "index" else [])):
            with pytest.raises(StateMismatchError, match=rf"{told}: another process.* Open it again"):
                work()
    old.close()
    with ChromaIndex.open(tmp_path, device="cpu") as index:
        info, cut = index.engine.info, change.startswith("max")
        assert (info.max_passage_tokens, info.dtype) == ((2048, "float32") if cut else (256, "bfloat16"))
        assert index.verify().clean
        assert len(index) == 1


@pytest.mark.parametrize("door", ["langchain", "llama_index"])
def test_another_limit_than_the_stores_is_named(pico: Reranker, door: str) -> None:
    """Two fingerprints were shown, and no word about what differs."""
    if door == "langchain":
        room = pytest.importorskip("kalm_rag.langchain")
        document = pytest.importorskip("langchain_core.documents").Document("Paris is the capital of France.")
        store = room.KaLMChroma("limits", max_passage_tokens=256)
        store.add_documents([document], ids=["x"])
        other = store.as_compressor(max_passage_tokens=2048)
        own = room.KaLMDocumentCompressor(store=store, max_passage_tokens=2048)
        asked: list[Callable[[], Any]] = [
            lambda c=c: c.compress_documents([document], "capital?") for c in (other, own)
        ]
    else:
        room, core = pytest.importorskip("kalm_rag.llama_index"), pytest.importorskip("llama_index.core.schema")
        collection = chromadb.EphemeralClient().get_or_create_collection("limits-of-nodes")
        store = room.KaLMChromaVectorStore(collection, max_passage_tokens=256)
        other = store.as_postprocessor(max_passage_tokens=2048)
        nodes = [core.NodeWithScore(node=core.TextNode(text="Paris"))]
        asked = [
            lambda: other.postprocess_nodes(nodes, query_str="capital?"),
            lambda: room.KaLMEmbedding(store=store, max_passage_tokens=2048).get_text_embedding("x"),
        ]
    for ask in asked:
        with pytest.raises(StateMismatchError, match=r"max_passage_tokens is 2048, and the store's .* with 256"):
            ask()


def test_a_command_lets_a_collection_go_over_to_another_limit(tmp_path: Path) -> None:
    """``backfill --change-model`` kept the former limit and encoded nothing, and no command took one."""

    def call(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == code, done.output
        return " ".join(done.output.split())

    texts, db = tmp_path / "texts", str(tmp_path / "db")
    texts.mkdir()
    (texts / "tea.txt").write_text("I like tea.")
    again = ("index", str(texts), "--db", db)
    call(*again, "--max-passage-tokens", "256")
    for limit, changing in (("2048", ()), ("100", ("--max-passage-tokens", "100"))):
        told = call(*again, "--max-passage-tokens", limit, code=1)
        assert "Leave --max-passage-tokens out to go on with it, or run kalm-rag backfill with it" in told
        assert "1 passages encoded" in call("backfill", "--db", db, "--change-model", *changing)
        call(*again, "--max-passage-tokens", limit)
        assert "I like tea." in call("query", "What do I like?", "--db", db)
        with ChromaIndex.open(db, device="cpu") as index:
            assert index.engine.info.max_passage_tokens == int(limit)
            assert index.verify().clean
    long = passage_of("", 600, "Paris is the capital of France.")
    scores = {call("rank", "What is the capital of France?", long, "--max-passage-tokens", n) for n in ("64", "2048")}
    assert len(scores) == 2
