"""Decoder passes in turn: nobody starves, nobody pays for another's error, and every score is that of asking alone."""

from __future__ import annotations

import asyncio
import contextvars
import linecache
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch

from kalm_rag.engine import queue as queue_module
from kalm_rag.engine.queue import DecodeQueue, Request, cancel_on_error, queue_of
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import ClosedError, KalmRagError
from kalm_rag.instructions import Instructions
from kalm_rag.states import StateBatch, batch_states

QUERIES = ["capital of France?", "who drinks tea", "what is iron oxide " * 6, "bees"]
PASSAGES = ["Paris is the capital of France.", "tea", "", "long words go on " * 30, "Bees make honey.", "Rust is iron."]

LONG = 60.0
"""Seconds after which a test says that something hangs; a busy machine is not to be taken for that."""


@pytest.fixture(params=["tiny", "pico"])
def engine(request: pytest.FixtureRequest) -> Reranker:
    return request.getfixturevalue(request.param)


def states_of(values: Sequence[float]) -> StateBatch:
    """One state a passage; the passage's number is its value."""
    ones = torch.ones(len(values), dtype=torch.long)
    vectors = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
    return StateBatch(vectors=vectors, scales=None, tokens=ones, total_tokens=ones, ratio=1, fingerprint="f")


class Slow:
    """A decoder whose passes wait to be let through; a margin is prompt + value of the state."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.passes: list[list[Any]] = []
        self.running = 0
        self.most = 0

    def __call__(self, prompts: Sequence[Any], states: StateBatch, ratio: int | None) -> list[float]:
        self.running += 1
        self.most = max(self.most, self.running)
        self.passes.append(list(prompts))
        passed = self.gate.acquire(timeout=LONG)
        self.running -= 1
        assert passed
        if "bad" in prompts:
            raise KalmRagError("bad prompt")
        return [p + v for p, v in zip(prompts, states.vectors.flatten().tolist(), strict=True)]


class Asked(threading.Thread):
    """A request made by a thread of its own, and how it came out."""

    def __init__(self, run: Callable[[], list[float]]) -> None:
        super().__init__(daemon=True)
        self._run = run
        self.margins: list[float] | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.margins = self._run()
        except BaseException as err:
            self.error = err

    def result(self) -> list[float]:
        self.join(LONG)
        assert not self.is_alive(), "the request never came back"
        if self.error is not None:
            raise self.error
        assert self.margins is not None
        return self.margins


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def ask(queue: DecodeQueue, decode: Any, prompt: Any, values: Sequence[float], share: int = 4) -> Asked:
    """Ask in a thread, and come back once the request is in line or being decoded."""
    line, passes = len(queue._line), len(decode.passes)
    asked = Asked(lambda: queue.run(Request(decode, [prompt] * len(values), states_of(values), None, share=share)))
    asked.start()
    until(lambda: len(queue._line) > line or len(decode.passes) > passes)
    return asked


def test_those_who_wait_share_the_next_pass_and_get_their_own_margins() -> None:
    queue, slow = DecodeQueue(), Slow()
    first = ask(queue, slow, 10, [0.5])
    others = [ask(queue, slow, p, v) for p, v in ((20, [1.0, 2.0]), (30, [3.0]), (40, [4.0, 5.0]))]
    slow.gate.release(9)
    assert first.result() == [10.5]
    assert [o.result() for o in others] == [[21.0, 22.0], [33.0], [44.0, 45.0]]
    assert slow.passes == [[10], [20, 20, 30], [40, 40]]  # a pass has 4 rows: 40's two don't fit whole
    assert slow.most == 1


def test_a_lone_request_waits_for_nothing() -> None:
    """No timer: with the model free, the caller's own thread decodes at once."""
    seen: list[int] = []

    def decode(prompts: Sequence[Any], states: StateBatch, ratio: int | None) -> list[float]:
        seen.append(threading.get_ident())
        return [0.0] * len(prompts)

    queue = DecodeQueue()
    taken = []
    for _ in range(200):
        request = Request(decode, [1], states_of([1.0]), None, share=4)
        started = time.perf_counter()
        queue.run(request)
        taken.append(time.perf_counter() - started)
    assert set(seen) == {threading.get_ident()}
    assert (
        min(taken) < 0.001
    )  # microseconds on a quiet machine, some of the 200 on a busy one; a wait is milliseconds in each


def test_nobody_starves_behind_a_big_request() -> None:
    queue, slow = DecodeQueue(), Slow()
    big = ask(queue, slow, 1, list(map(float, range(12))))
    small = ask(queue, slow, 2, [0.0])
    slow.gate.release(2)
    assert small.result() == [2.0]  # after one slice of the big one, not after all three
    assert slow.passes[:2] == [[1] * 4, [2]]
    assert big.is_alive()
    slow.gate.release(9)
    assert big.result() == [1.0 + i for i in range(12)]
    assert [len(p) for p in slow.passes] == [4, 1, 4, 4]


def test_a_big_request_is_not_starved_by_small_ones() -> None:
    queue, slow = DecodeQueue(), Slow()
    running = ask(queue, slow, 0, [0.0])
    big = ask(queue, slow, 1, list(map(float, range(8))))
    small = [ask(queue, slow, 10 + i, [0.0]) for i in range(6)]
    slow.gate.release(20)
    assert big.result() == [1.0 + i for i in range(8)]
    assert [s.result() for s in (running, *small)] == [[0.0], *([10.0 + i] for i in range(6))]
    assert slow.passes[1] == [1] * 4  # first come, first served
    assert slow.passes.index([1] * 4, 2) <= 4


def test_an_error_hits_only_its_own_request() -> None:
    queue, slow = DecodeQueue(), Slow()
    first = ask(queue, slow, 0, [0.0])
    good, bad, other = (ask(queue, slow, p, [1.0]) for p in (10, "bad", 20))
    slow.gate.release(9)
    assert first.result() == [0.0]
    assert good.result() == [11.0]
    assert other.result() == [21.0]
    with pytest.raises(KalmRagError, match="bad prompt"):
        bad.result()
    slow.gate.release()
    assert queue.run(Request(slow, [5], states_of([0.0]), None, share=4)) == [5.0]  # the line moves on


def test_ctrl_c_in_the_pass_ends_one_request_and_not_the_line() -> None:
    queue, slow = DecodeQueue(), Slow()

    def interrupted(prompts: Sequence[Any], states: StateBatch, ratio: int | None) -> list[float]:
        slow(prompts, states, ratio)
        raise KeyboardInterrupt

    interrupted.passes = slow.passes  # type: ignore[attr-defined]
    first = ask(queue, interrupted, 0, [0.0])
    waiting = ask(queue, slow, 1, [1.0])
    slow.gate.release(3)
    with pytest.raises(KeyboardInterrupt):
        first.result()
    assert waiting.result() == [2.0]


class Watched(threading.Event):
    """Tells that it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.begun.set()
        return super().wait(timeout)


class CutShort(Watched):
    """Ctrl-C arrives in the very moment in which the turn has come."""

    def wait(self, timeout: float | None = None) -> bool:
        super().wait(timeout)
        raise KeyboardInterrupt


@pytest.fixture
def hears_ctrl_c() -> Iterator[None]:
    """SIGINT is KeyboardInterrupt; a process that a shell started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals to threads are POSIX")
@pytest.mark.parametrize("leads", [False, True])
def test_ctrl_c_while_waiting_leaves_the_line_in_order(leads: bool) -> None:
    queue, slow = DecodeQueue(), Slow()
    first = ask(queue, slow, 0, [0.0])
    later: list[Asked] = []
    request = Request(slow, [1], states_of([1.0]), None, share=1)
    request.woken = woken = CutShort() if leads else Watched()

    def interrupt() -> None:
        woken.begun.wait()  # before that, Ctrl-C would come anywhere in the line's own code
        later.append(ask(queue, slow, 2, [2.0]))
        if leads:
            slow.gate.release()
        else:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    killer = threading.Thread(target=interrupt)
    killer.start()
    with pytest.raises(KeyboardInterrupt):
        queue.run(request)
    killer.join()
    slow.gate.release(9)
    assert first.result() == [0.0]
    assert later[0].result() == [4.0]
    assert slow.passes == [[0], [2]]
    assert queue._leader is None


def test_unlike_requests_do_not_share_a_pass() -> None:
    queue, slow = DecodeQueue(), Slow()
    first = ask(queue, slow, 0, [0.0])
    plain = ask(queue, slow, 1, [1.0])
    other = Asked(lambda: queue.run(Request(slow, [2], states_of([1.0]), 8, share=4)))
    other.start()
    until(lambda: len(queue._line) == 2)
    slow.gate.release(9)
    assert [first.result(), plain.result(), other.result()] == [[0.0], [2.0], [3.0]]
    assert slow.passes == [[0], [1], [2]]


@contextmanager
def held(engine: Reranker) -> Iterator[DecodeQueue]:
    """Keep the model busy for as long as the block lasts."""
    queue, entered, leave = queue_of(engine.backbone), threading.Event(), threading.Event()

    def decode(prompts: Sequence[Any], states: StateBatch, ratio: int | None) -> list[float]:
        entered.set()
        assert leave.wait(LONG)
        return [0.0] * len(prompts)

    holder = Asked(lambda: queue.run(Request(decode, [None], states_of([0.0]), None, share=1)))
    holder.start()
    assert entered.wait(LONG)
    try:
        yield queue
    finally:
        leave.set()
        holder.result()


def test_scores_together_are_those_of_one_by_one(engine: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [batch_states(engine.encode(PASSAGES[i:])) for i in range(len(QUERIES))]
    told = [None, Instructions(task="Find drinks."), None, Instructions(task="Find insects.", system="Be brief.")]
    alone = [
        [r.margin for r in engine.score(q, b, instructions=i)] for q, b, i in zip(QUERIES, batches, told, strict=True)
    ]
    sizes: list[int] = []
    margins = engine._margins
    monkeypatch.setattr(engine, "_margins", lambda p, *rest: (sizes.append(len(p)), margins(p, *rest))[1])
    with held(engine) as queue:
        asked = []
        for query, batch, one in zip(QUERIES, batches, told, strict=True):
            asked.append(
                Asked(
                    lambda q=query, b=batch, i=one: [r.margin for r in engine.score(q, b, instructions=i)]  # type: ignore[misc]
                )
            )
            asked[-1].start()
            until(lambda: len(queue._line) == len(asked))
    together = [one.result() for one in asked]
    assert sizes == [sum(map(len, batches))]  # all four in one pass
    for ours, theirs in zip(together, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_slices_of_a_big_request_give_the_scores_of_one_pass(engine: Reranker) -> None:
    states = engine.encode(PASSAGES * 2)
    whole = [r.margin for r in engine.score(QUERIES[0], states)]
    small = Reranker(engine.backbone, batch_size=1)
    assert [r.margin for r in small.score(QUERIES[0], states)] == pytest.approx(whole, abs=1e-5)


def test_many_threads_score_as_one(engine: Reranker) -> None:
    states = engine.encode(PASSAGES)
    want = {q: [r.margin for r in engine.score(q, states)] for q in QUERIES}

    def clients(query: str) -> list[float]:
        got = [[r.margin for r in engine.score(query, states)] for _ in range(3)]
        for one in got:
            assert one == pytest.approx(want[query], abs=1e-5)
        return got[0]

    asked = [Asked(lambda q=q: clients(q)) for q in QUERIES * 2]  # type: ignore[misc]
    for one in asked:
        one.start()
    for one in asked:
        one.result()


def test_closing_an_engine_ends_its_waiting_requests_only(tiny: Reranker) -> None:
    states = tiny.encode(PASSAGES)
    other = Reranker(tiny.backbone)
    with held(tiny) as queue:
        asked = [Asked(lambda e=e: [r.margin for r in e.score(QUERIES[0], states)]) for e in (other, tiny)]  # type: ignore[misc]
        for count, one in enumerate(asked, start=1):
            one.start()
            until(lambda n=count: len(queue._line) == n)  # type: ignore[misc]
        other.close()
    with pytest.raises(ClosedError, match="was closed"):
        asked[0].result()
    assert len(asked[1].result()) == len(PASSAGES)


def test_a_cancelled_task_is_dropped_before_it_is_decoded() -> None:
    queue, slow = DecodeQueue(), Slow()
    ended: list[BaseException] = []

    def blocking(prompt: int) -> list[float]:
        try:
            return queue.run(Request(slow, [prompt], states_of([1.0]), None, share=4))
        except BaseException as err:
            ended.append(err)
            raise

    async def asking(prompt: int) -> list[float]:
        with cancel_on_error():
            return await asyncio.to_thread(blocking, prompt)

    async def main() -> list[list[float]]:
        tasks = [asyncio.create_task(asking(prompt)) for prompt in (10, 20, 30)]
        while len(queue._line) < 2:
            await asyncio.sleep(0.001)
        waiting = queue._line[0].prompts[0]
        tasks[(waiting // 10) - 1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[(waiting // 10) - 1]
        slow.gate.release(9)
        return [await task for task in tasks if not task.cancelled()]

    assert len(asyncio.run(main())) == 2
    assert len(slow.passes) == 2
    assert [type(err) for err in ended] == [CancelledError]


@pytest.mark.parametrize("adapter", ["langchain", "llama_index"])
def test_adapters_drop_what_was_cancelled_and_keep_the_loop_free(
    pico: Reranker, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    decoded: list[int] = []
    margins = pico._margins
    monkeypatch.setattr(pico, "_margins", lambda p, *rest: (decoded.append(len(p)), margins(p, *rest))[1])
    ask_once = {"langchain": _langchain, "llama_index": _llama_index}[adapter](pico)

    async def main() -> int:
        with held(pico) as queue:
            task = asyncio.create_task(ask_once())
            while not queue._line:  # the loop queue while the request waits
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return await ask_once()

    assert asyncio.run(main()) == len(PASSAGES[:2])
    assert decoded == [2]


def _langchain(engine: Reranker) -> Callable[[], Any]:
    pytest.importorskip("langchain_core")
    from langchain_core.documents import Document

    from kalm_rag.langchain import KaLMDocumentCompressor

    compressor = KaLMDocumentCompressor(reranker=engine)

    async def ask_once() -> int:
        return len(await compressor.acompress_documents([Document(t) for t in PASSAGES[:2]], QUERIES[0]))

    return ask_once


def _llama_index(engine: Reranker) -> Callable[[], Any]:
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import NodeWithScore, TextNode

    from kalm_rag.llama_index import KaLMNodePostprocessor

    post = KaLMNodePostprocessor(reranker=engine)

    async def ask_once() -> int:
        nodes = [NodeWithScore(node=TextNode(text=t)) for t in PASSAGES[:2]]
        return len(await post.apostprocess_nodes(nodes, query_str=QUERIES[0]))

    return ask_once


def test_a_fork_starts_with_a_free_model(tiny: Reranker) -> None:
    """A child has none of the parent's threads: a line that it inherited would wait for a pass that never ends."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    with held(tiny) as queue:
        assert queue._leader is not None
        child = os.fork()
        if child == 0:
            os._exit(1 if queue_of(tiny.backbone)._leader else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line that a thread runs in the queue's own code.

    Lines that begin a ``with`` are left out: they run again at its end, where no signal comes before the lock is free.
    """

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, arg: object) -> Interrupter | None:
        if frame.f_code.co_filename != queue_module.__file__ or frame.f_code.co_name == "__init__":
            return None
        if event == "line" and not linecache.getline(queue_module.__file__, frame.f_lineno).strip().startswith("with "):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def test_an_interrupt_at_any_line_loses_nobody_else() -> None:
    """Ctrl-C between two lines left a request in line without a thread to run it, and all waited for ever."""
    reached, at = True, 0
    while reached:
        at += 1
        queue, slow = DecodeQueue(), Slow()
        first = ask(queue, slow, 0, [0.0], share=2)
        interrupter = Interrupter(at)

        def interrupted(queue: DecodeQueue = queue, slow: Slow = slow, interrupter: Interrupter = interrupter) -> Any:
            request = Request(slow, [1] * 3, states_of([1.0, 2.0, 3.0]), None, share=2)
            sys.settrace(interrupter)
            try:
                return queue.run(request)
            finally:
                sys.settrace(None)

        second = Asked(interrupted)
        second.start()
        until(lambda queue=queue, second=second: queue._line or not second.is_alive())  # type: ignore[misc]
        third = Asked(lambda q=queue, s=slow: q.run(Request(s, [3], states_of([3.0]), None, share=2)))  # type: ignore[misc]
        third.start()
        until(lambda queue=queue: any(request.prompts == [3] for request in queue._line))  # type: ignore[misc]
        slow.gate.release(20)
        assert first.result() == [0.0]
        assert third.result() == [6.0], f"lost after an interrupt at line {at}"
        second.join(LONG)
        reached = interrupter.left <= 0
        if reached:
            with pytest.raises(KeyboardInterrupt):
                second.result()
        else:
            assert second.result() == [2.0, 3.0, 4.0]
        assert queue._leader is None
        assert not queue._line
        assert not queue._group
    assert at > 40  # so many lines, among them those of a pass and of its end


def test_a_storm_of_cancelled_and_failing_requests_leaves_the_rest_right() -> None:
    """Callers give up before, while and after they wait, others fail, and the queue stays one pass at a time."""
    queue, most, running = DecodeQueue(), [0], [0]
    draw = random.Random(0)

    def decode(prompts: Sequence[Any], states: StateBatch, ratio: int | None) -> list[float]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        try:
            if any(prompt < 0 for prompt in prompts):
                raise KalmRagError("bad prompt")
            return [p + v for p, v in zip(prompts, states.vectors.flatten().tolist(), strict=True)]
        finally:
            running[0] -= 1

    def blocking(prompt: int, size: int) -> list[float]:
        values = list(map(float, range(size)))
        return queue.run(Request(decode, [prompt] * size, states_of(values), None, share=4))

    async def asking(prompt: int, size: int) -> list[float]:
        with cancel_on_error():
            return await asyncio.get_running_loop().run_in_executor(
                pool, contextvars.copy_context().run, blocking, prompt, size
            )

    async def main() -> None:
        plan = [(draw.randrange(-1, 9) * 100, draw.randrange(1, 12)) for _ in range(600)]
        tasks = [asyncio.create_task(asking(prompt, size)) for prompt, size in plan]
        for task in draw.sample(tasks, 300):
            task.cancel()
            await asyncio.sleep(0)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for (prompt, size), result in zip(plan, ended, strict=True):
            if isinstance(result, BaseException):
                assert isinstance(result, asyncio.CancelledError) or (prompt < 0 and isinstance(result, KalmRagError))
            else:
                assert result == [prompt + value for value in range(size)]
        assert sum(isinstance(result, list) for result in ended) > 100

    with ThreadPoolExecutor(64) as pool:
        asyncio.run(asyncio.wait_for(main(), LONG))
    assert most == [1]
    assert (queue._leader, list(queue._line), queue._group) == (None, [], [])


def test_whatever_decodes_waits_its_turn(engine: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """`predict` and `explain` went past the queue: four threads ran four passes of the decoder at a time."""
    backbone, states, decoded = engine.backbone, engine.encode(PASSAGES), []
    pairs = [(query, text) for query in QUERIES[:2] for text in PASSAGES[:3]]
    calls = [
        lambda: engine.predict(pairs).tolist(),
        lambda: engine.predict(pairs, batch_size=2).tolist(),
        lambda: [engine.explain(QUERIES[0], PASSAGES[0]).margin],
        lambda: [r.margin for r in engine.score(QUERIES[0], states)],
    ]
    want = [call() for call in calls]
    for name in ("decode", "attend"):
        plain = getattr(backbone, name)
        monkeypatch.setattr(backbone, name, lambda *given, plain=plain: (decoded.append(1), plain(*given))[1])
    with held(engine) as queue:
        asked = [Asked(call) for call in calls]
        for one in asked:
            one.start()
        until(lambda: decoded or len(queue._line) == len(asked))
        assert not decoded, "something decodes while the model is busy"
    for one, margins in zip(asked, want, strict=True):
        assert one.result() == pytest.approx(margins, abs=1e-5)


def test_a_requests_rows_keep_their_own_prompts() -> None:
    queue, sizes = DecodeQueue(), []

    def decode(prompts: Sequence[Any], states: StateBatch, ratio: int | None) -> list[float]:
        sizes.append(len(prompts))
        return [p + v for p, v in zip(prompts, states.vectors.flatten().tolist(), strict=True)]

    prompts = [100, 200, 100, 300, 200]
    request = Request(decode, prompts, states_of([0.0, 1.0, 2.0, 3.0, 4.0]), None, share=2)
    assert queue.run(request) == [100.0, 201.0, 102.0, 303.0, 204.0]
    assert sizes == [2, 2, 1]


def test_what_runs_alone_shares_no_pass() -> None:
    queue, slow, own = DecodeQueue(), Slow(), Slow()
    first = ask(queue, slow, 0, [0.0])
    alone = Asked(lambda: queue.run(Request(own, [1], states_of([1.0]), None, share=4, alone=True)))
    alone.start()
    until(lambda: len(queue._line) == 1)
    last = ask(queue, slow, 2, [2.0])
    slow.gate.release(9)
    own.gate.release(9)
    assert [first.result(), alone.result(), last.result()] == [[0.0], [2.0], [4.0]]
    assert (slow.passes, own.passes) == ([[0], [2]], [[1]])
