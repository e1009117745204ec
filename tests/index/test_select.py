"""What is handed on of a ranking, and what comes back when there is none: through `ChromaIndex.query`."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selecting import QUERY, TEXTS
from toy import toy_vectors

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.engine.queue import Request, queue_of
from kalm_rag.errors import ClosedError, DeadlineError, InputError, KalmRagError
from kalm_rag.index.select import mean_states
from kalm_rag.states import batch_states

IDS = [f"r{n}" for n in range(len(TEXTS))]


@pytest.fixture
def index(pico: Reranker) -> Iterator[ChromaIndex]:
    with ChromaIndex.open(model=pico, embedder=toy_vectors, collection="select") as made:
        made.delete(made.collection.get()["ids"])
        made.add(IDS, TEXTS)
        yield made


def words(text: str) -> int:
    return len(text.split())


def ids(result: Any) -> list[str]:
    return [hit.id for hit in result]


class TestBudget:
    def test_is_filled_in_rank_order_and_never_exceeded(self, index: ChromaIndex) -> None:
        whole = index.query(QUERY, top_n=None)
        assert not whole.left_out
        for room in range(1, 70):
            result = index.query(QUERY, top_n=None, max_tokens=room, count_tokens=words)
            assert sum(words(hit.text or "") for hit in result) <= room
            expected, left = [], room
            for hit in whole:  # an independent greedy fill
                if words(hit.text or "") <= left:
                    expected.append(hit.id)
                    left -= words(hit.text or "")
            assert ids(result) == expected
            assert {out.id for out in result.left_out} == set(IDS) - set(expected)
            assert all(out.reason == "budget" and out.tokens for out in result.left_out)

    def test_counts_by_the_models_tokenizer_by_default(self, index: ChromaIndex, pico: Reranker) -> None:
        sizes = {text: pico.backbone.tokenize([text])[0].total_tokens for text in TEXTS}
        result = index.query(QUERY, top_n=None, max_tokens=40)
        assert 0 < sum(sizes[hit.text or ""] for hit in result) <= 40
        assert {out.tokens for out in result.left_out} <= set(sizes.values())

    def test_top_n_ends_it(self, index: ChromaIndex) -> None:
        whole = index.query(QUERY, top_n=None, max_tokens=30, count_tokens=words)
        assert ids(index.query(QUERY, top_n=2, max_tokens=30, count_tokens=words)) == ids(whole)[:2]

    @pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "9"])
    def test_wrong_budgets_are_named(self, index: ChromaIndex, wrong: Any) -> None:
        with pytest.raises(InputError, match="max_tokens"):
            index.query(QUERY, max_tokens=wrong)

    def test_wrong_counters_are_named(self, index: ChromaIndex) -> None:
        with pytest.raises(InputError, match="count_tokens is int"):
            index.query(QUERY, max_tokens=5, count_tokens=3)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"what count_tokens gave is 1\.5"):
            index.query(QUERY, max_tokens=5, count_tokens=lambda text: 1.5)  # type: ignore[arg-type,return-value]

    def test_a_counter_at_its_end_holds_nobody_up(self, index: ChromaIndex) -> None:
        """No future can carry StopIteration: `aquery` waited for ever."""
        sizes = iter([3])
        options: dict[str, Any] = {"max_tokens": 50, "count_tokens": lambda text: next(sizes)}
        with pytest.raises(InputError, match="count_tokens raised StopIteration"):
            asyncio.run(asyncio.wait_for(index.aquery(QUERY, **options), 60))


class TestDuplicates:
    def test_near_copies_and_equal_texts_go_and_the_better_stays(self, index: ChromaIndex) -> None:
        order = ids(index.query(QUERY, top_n=None))
        result = index.query(QUERY, top_n=None, drop_duplicates=True)
        left = {out.id: out.duplicate_of for out in result.left_out}
        assert left.keys() == {max(pair, key=order.index) for pair in (("r0", "r1"), ("r2", "r5"))}
        assert all(order.index(better or "") < order.index(worse) for worse, better in left.items())
        assert ids(result) == [record for record in order if record not in left]

    def test_equal_texts_are_duplicates_also_of_unscored_candidates(self, index: ChromaIndex) -> None:
        index.store.gc([], younger_than=0)
        index.store.unreference(index.home.collection_id, IDS)
        index.store.gc([], younger_than=0)
        result = index.query(QUERY, top_n=None, missing="skip", drop_duplicates=True)
        assert result.unscored == len(TEXTS)
        (out,) = result.left_out
        assert {out.id, out.duplicate_of} == {"r2", "r5"}

    def test_a_cosine_of_the_callers_own(self, index: ChromaIndex) -> None:
        assert {out.id for out in index.query(QUERY, top_n=None, drop_duplicates=1.0).left_out} <= {"r2", "r5"}
        assert len(index.query(QUERY, top_n=None, drop_duplicates=0.01).left_out) > 2

    def test_what_found_no_room_takes_no_duplicate_with_it(self, index: ChromaIndex) -> None:
        """The better copy is a word too long; the other one fits, and the app gets the sentence once."""
        first, second = [i for i in ids(index.query(QUERY, top_n=None)) if i in ("r0", "r1")]

        def count(text: str) -> int:
            return 100 if text == TEXTS[IDS.index(first)] else 1

        result = index.query(QUERY, top_n=None, drop_duplicates=True, max_tokens=50, count_tokens=count)
        assert first not in ids(result)
        assert second in ids(result)

    @pytest.mark.parametrize("wrong", [0, 0.0, 1.01, -0.5, "yes", None, float("nan")])
    def test_wrong_thresholds_are_named(self, index: ChromaIndex, wrong: Any) -> None:
        with pytest.raises(InputError, match="drop_duplicates"):
            index.query(QUERY, drop_duplicates=wrong)


class TestDiversity:
    @pytest.mark.parametrize("diversity", [0.05, 0.3, 0.6, 0.95])
    def test_is_maximal_marginal_relevance_and_comes_best_first(self, index: ChromaIndex, diversity: float) -> None:
        order = index.query(QUERY, top_n=None)
        places = {hit.id: place for place, hit in enumerate(order)}
        means = mean_states(batch_states(index.engine.encode([hit.text or "" for hit in order])))
        cosines = (means @ means.T).clamp(min=0.0).tolist()
        chosen: list[int] = []
        for _ in order:  # an independent, slow writing of the formula
            marginal = {
                place: (1 - diversity) * (hit.probability or 0.0)
                - diversity * max((cosines[place][other] for other in chosen), default=0.0)
                for place, hit in enumerate(order)
                if place not in chosen
            }
            chosen.append(max(marginal, key=lambda place: marginal[place]))
            result = index.query(QUERY, top_n=len(chosen), diversity=diversity)
            assert [places[hit.id] for hit in result] == sorted(chosen)
            assert {places[out.id] for out in result.left_out} == set(range(max(chosen))) - set(chosen)
            assert {out.reason for out in result.left_out} <= {"diversity"}

    def test_a_copy_makes_way(self, index: ChromaIndex) -> None:
        assert len({hit.text for hit in index.query(QUERY, top_n=3)}) == 2
        result = index.query(QUERY, top_n=3, diversity=0.5)
        assert len({hit.text for hit in result}) == 3
        assert {out.reason for out in result.left_out} == {"diversity"}

    def test_budget_and_duplicates_hold_with_it(self, index: ChromaIndex) -> None:
        options: dict[str, Any] = {"max_tokens": 30, "count_tokens": words, "drop_duplicates": True}
        result = index.query(QUERY, top_n=None, diversity=0.5, **options)
        assert 0 < sum(words(hit.text or "") for hit in result) <= 30
        margins = [hit.margin or 0.0 for hit in result]
        assert margins == sorted(margins, reverse=True)
        assert len({hit.text for hit in result}) == len(result)
        assert {hit.id for hit in result} | {out.id for out in result.left_out} == set(IDS)

    def test_what_is_not_scored_keeps_its_place_behind(self, index: ChromaIndex) -> None:
        index.store.unreference(index.home.collection_id, IDS[:2])
        index.store.gc([index.home.collection_id], younger_than=0)
        given = index.query(QUERY, top_n=None, missing="skip")
        assert 0 < given.unscored < len(IDS)
        assert ids(index.query(QUERY, top_n=None, missing="skip", diversity=0.9)) == ids(given)
        assert len(index.query(QUERY, top_n=5, missing="skip", diversity=0.9)) == 5

    @pytest.mark.parametrize("wrong", [1, 1.0, -0.1, True, None, "0.5", float("nan")])
    def test_wrong_shares_are_named(self, index: ChromaIndex, wrong: Any) -> None:
        with pytest.raises(InputError, match="diversity is"):
            index.query(QUERY, diversity=wrong)


def test_the_threshold_says_what_it_left_out(index: ChromaIndex) -> None:
    result = index.query(QUERY, top_n=None, threshold=0.5)
    assert {out.id for out in result.left_out if out.reason == "threshold"} == set(IDS) - set(ids(result)) != set()
    assert result.to_dict()["left_out"][0]["reason"] == "threshold"


class TestFailure:
    def test_a_reranked_result_says_so(self, index: ChromaIndex, pico: Reranker) -> None:
        result = index.query(QUERY)
        assert (result.status, result.model, result.fingerprint) == ("reranked", "pico", pico.info.fingerprint)

    def test_a_broken_model_gives_the_retrieval_order_and_says_so(
        self, index: ChromaIndex, pico: Reranker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = [hit.id for hit in sorted(index.query(QUERY, top_n=None), key=lambda hit: hit.retrieval_rank)]

        def broken(*args: Any) -> Any:
            raise KalmRagError("the decoder is broken")

        monkeypatch.setattr(pico.backbone, "decode", broken)
        with pytest.raises(KalmRagError, match="the decoder is broken"):
            index.query(QUERY)
        with caplog.at_level(logging.WARNING):
            result = index.query(QUERY, top_n=None, threshold=0.9, on_error="retrieval_order")
        assert ids(result) == expected
        assert result.status == "skipped: KalmRagError: the decoder is broken"
        assert result.model == "pico"
        assert all(hit.probability is None for hit in result)
        assert [r.message for r in caplog.records if "retrieval order" in r.message] != []
        cut = index.query(QUERY, top_n=2, max_tokens=25, drop_duplicates=True, on_error="retrieval_order")
        assert len(cut) == 2

    def test_a_model_that_is_not_there(self, pico: Reranker) -> None:
        engine = pico.at(4)
        with ChromaIndex.open(model=engine, embedder=toy_vectors, collection="gone") as index:
            index.upsert(["a", "b"], ["I like tea.", "Paris."])
            engine.close()
            with pytest.raises(ClosedError, match="was closed"):
                index.query(QUERY)
            result = index.query(QUERY, on_error="retrieval_order", max_tokens=6)
            assert result.status.startswith("skipped: ClosedError")
            assert (result.model, result.fingerprint) == ("pico", None)
            assert ids(result) == ["a"], "I/like/tea/. and Pari/s/., and two that every passage has"
            assert [(out.id, out.reason, out.tokens) for out in result.left_out] == [("b", "budget", 5)]

    def test_the_budget_holds_in_retrieval_order_too(self, pico: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tokens were counted as bytes / 3 as soon as a ranking failed: three tables of 121 went into 300."""
        tables = {f"t{n}": " | ".join(str((n * 7 + k) % 10) for k in range(60)) for n in range(6)}
        size = pico.backbone.tokenize([tables["t0"]])[0].total_tokens
        with ChromaIndex.open(model=pico, embedder=toy_vectors, collection="tables") as index:
            index.add(list(tables), list(tables.values()))
            monkeypatch.setattr(pico.backbone, "decode", lambda *args: 1 / 0)
            for failing in ({}, {"timeout": 1e-9}):  # while ranking, and before anything is asked of the model
                result = index.query(QUERY, top_n=None, max_tokens=300, on_error="retrieval_order", **failing)
                why = (
                    ("DeadlineError", "ZeroDivisionError") if failing else "ZeroDivisionError"
                )  # either may come first
                assert result.status.removeprefix("skipped: ").startswith(why)
                assert len(result) == 300 // size == 2
                assert {(out.reason, out.tokens) for out in result.left_out} == {("budget", size)}
            for thread in threading.enumerate():
                if thread.name == "kalm-rag-rank":
                    thread.join(60)

    def test_without_a_tokenizer_no_text_is_taken_for_too_short(self, pico: Reranker) -> None:
        texts = [
            " | ".join("0123456789" * 6),
            "1995,0.25,-17,3.1416,88301,42",
            "d41d8cd98f00b204e9800998ecf8427e",
            "if (a[i] != b[i]) { return x->y; }",
            "Париж является столицей Франции.",
            "巴黎是法国的首都。",
            "Paris is the capital of France; Berlin, that of Germany.",
        ]
        engine = pico.at(4)
        with ChromaIndex.open(model=engine, embedder=toy_vectors, collection="unloaded") as index:
            index.add(texts, texts)
            engine.close()
            for spent in index.query(QUERY, on_error="retrieval_order", max_tokens=1, top_n=None).left_out:
                least = pico.backbone.tokenize([spent.id])[0].total_tokens
                assert spent.tokens is not None
                assert least <= spent.tokens < 2 * least, spent

    def test_mistakes_of_the_caller_are_raised_all_the_same(self, index: ChromaIndex) -> None:
        with pytest.raises(InputError, match="query is blank"):
            index.query(" ", on_error="retrieval_order")
        with pytest.raises(InputError, match="on_error is 'ignore'"):
            index.query(QUERY, on_error="ignore")  # type: ignore[arg-type]
        for wrong in (0, -1, True, "1", float("inf"), float("nan")):
            with pytest.raises(InputError, match="timeout is"):
                index.query(QUERY, timeout=wrong)  # type: ignore[arg-type]

    @pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
    def test_a_timeout_holds_and_leaves_no_thread(
        self, index: ChromaIndex, pico: Reranker, monkeypatch: pytest.MonkeyPatch, is_async: bool
    ) -> None:
        """One query holds the decoder; those behind it give up in time, are dropped, and are never decoded."""
        entered, go_on, passes = threading.Event(), threading.Event(), []
        real: Callable[..., Any] = pico.backbone.decode

        def held(*args: Any) -> Any:
            passes.append(1)
            entered.set()
            assert go_on.wait(60)
            return real(*args)

        monkeypatch.setattr(pico.backbone, "decode", held)
        first = threading.Thread(target=index.query, args=(QUERY,))
        first.start()
        try:
            assert entered.wait(60)
            options: dict[str, Any] = {"timeout": 0.2, "on_error": "retrieval_order"}
            started = time.monotonic()
            if is_async:
                result = asyncio.run(index.aquery(QUERY, **options))
            else:
                result = index.query(QUERY, **options)
            assert time.monotonic() - started < 10
            assert result.status.startswith("skipped: DeadlineError: ranking took longer than timeout=0.2")
            assert len(result) == 5
            with pytest.raises(DeadlineError, match="longer than timeout"):
                index.query(QUERY, timeout=0.2)
        finally:
            go_on.set()
        first.join(60)
        for thread in threading.enumerate():
            if thread.name == "kalm-rag-rank":
                thread.join(60)
        assert not [thread for thread in threading.enumerate() if thread.name == "kalm-rag-rank"]
        assert len(passes) == 1, "who gave up was decoded"
        for long in (60, 1e10, sys.maxsize, 1e300):
            assert index.query(QUERY, timeout=long).status == "reranked"


def test_what_is_cut_is_said_once_per_call(index: ChromaIndex, caplog: pytest.LogCaptureFixture) -> None:
    index.add(["long1", "long2"], [f"{n} " + "Paris is the capital of France. " * 1000 for n in range(2)])
    with caplog.at_level(logging.WARNING):
        result = index.query(QUERY, top_n=None)
    assert sorted(hit.id for hit in result if hit.truncated) == ["long1", "long2"]
    (told,) = [r.getMessage() for r in caplog.records if "longer than" in r.getMessage()]
    assert told.startswith("2 of 8 passages are longer than pico reads")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert not index.query(QUERY, threshold=1.0).hits
    assert "2 of 8 passages are longer than pico reads" in caplog.text, "an answer behind the cut has a low P(yes)"


def test_who_gives_up_around_a_timeout_gives_up_within_it(index: ChromaIndex, pico: Reranker) -> None:
    """A cancelled task is dropped from the decoder's line at once, not when its own timeout has passed."""
    queue, entered, leave = queue_of(pico.backbone), threading.Event(), threading.Event()
    states = batch_states(pico.encode(["x"]))

    def hold(prompts: Any, batch: Any, ratio: Any) -> list[float]:
        entered.set()
        assert leave.wait(60)
        return [0.0]

    holder = threading.Thread(target=lambda: queue.run(Request(hold, [None], states, None, share=1, alone=True)))
    holder.start()
    assert entered.wait(60)

    async def give_up() -> None:
        task = asyncio.create_task(index.aquery(QUERY, timeout=50))
        while not queue._line:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    started, before = time.monotonic(), index.engine.stats.rows
    threading.Timer(1.0, leave.set).start()  # `asyncio.run` waits for the thread that it gave the query to
    asyncio.run(give_up())
    holder.join(60)
    assert time.monotonic() - started < 30, "waited for the timeout"
    assert index.query(QUERY).status == "reranked"
    assert index.engine.stats.rows - before == len(TEXTS), "what was given up was decoded"
