"""Storms of cancelled tasks, and thousands of queries: scores stay right, nothing is left behind."""

from __future__ import annotations

import asyncio
import random

import psutil
from faults.table import GONE, Bench, Fresh, check_index
from test_rebuild import passages
from toy import QUERY, reopen

from kalm_rag import Reranker
from kalm_rag.errors import KalmRagError
from kalm_rag.index.results import QueryResult

QUERIES = ("What is the capital of France?", "bad face", "Who dug the fig?")
TASKS = 300
MOST_GROWTH = 24_000_000
"""Bytes of memory that 2,000 queries may add."""
SLACK = 4
"""Descriptors and threads that may come on top: Chroma's runtime starts some when it first needs them."""


def storms(bench: Bench) -> None:
    """Of each 300 tasks half are cancelled, at any time; of what ends every score is looked at."""
    with Reranker.from_pretrained(str(bench.model), device="cpu") as engine:
        tasks = min(TASKS, max(90, bench.count(TASKS)))
        for number in range(bench.count(4)):
            path, fresh = bench.folder / str(number), Fresh(engine)
            wanted: dict[str, set[str | None]] = {f"r{n}": {text} for n, text in enumerate(passages(60))}
            with bench.row.watching("storm"), reopen(path, engine) as index:
                index.add(list(wanted), passages(60))
                ended = asyncio.run(_storm(index, engine, random.Random(number), tasks))
                cancelled = sum(isinstance(result, asyncio.CancelledError) for _, result in ended)
                for (kind, argument), result in ended:
                    if isinstance(result, QueryResult):
                        hits = [(hit.text or "", hit.margin or 0.0) for hit in result]
                        bench.row.add("wrong", "aquery", fresh.wrong(hits, argument))
                    elif isinstance(result, list):
                        ranked = [(passages(20)[one.index], one.margin) for one in result]
                        bench.row.add("wrong", "arank", fresh.wrong(ranked, argument))
                    elif isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                        ours = isinstance(result, KalmRagError)
                        bench.row.add("lost" if ours else "foreign", f"{kind}: {type(result).__name__}: {result}")
                    if kind == "aupsert":
                        done = not isinstance(result, BaseException)
                        wanted[argument] = {f"text of {argument}"} | (set() if done else {GONE})
                index.query(QUERY)
            bench.row.trials += len(ended)
            check_index(bench.row, path, engine, fresh, wanted, "after a storm")
            bench.tell(f"{len(ended)} tasks, {cancelled} cancelled")


async def _storm(index, engine, rng, count):
    plan = [(rng.choice(["aquery", "aquery", "arank", "aupsert"]), rng.choice(QUERIES)) for _ in range(count)]
    plan = [(kind, f"s{n}" if kind == "aupsert" else query) for n, (kind, query) in enumerate(plan)]

    def begin(kind, argument):
        if kind == "aupsert":
            return index.aupsert([argument], [f"text of {argument}"])
        return index.aquery(argument, top_n=None) if kind == "aquery" else engine.arank(argument, passages(20))

    tasks = [asyncio.create_task(begin(kind, argument)) for kind, argument in plan]
    for task in rng.sample(tasks, count // 2):
        await asyncio.sleep(rng.choice([0, 0, 0.002, 0.02]))
        task.cancel()
    return list(zip(plan, await asyncio.gather(*tasks, return_exceptions=True), strict=True))


def queries(bench: Bench) -> None:
    """3,000 queries, some scored afresh, too: memory, descriptors and threads are those after the first 1,000."""
    count = max(1500, bench.count(3000))
    process = psutil.Process()
    with Reranker.from_pretrained(str(bench.model), device="cpu") as engine:
        fresh = Fresh(engine)
        with reopen(bench.folder / "db", engine) as index:
            index.add([f"r{n}" for n in range(200)], passages(200))
            seen: list[tuple[int, int, int]] = []
            for number in range(count):
                result = index.query(f"{QUERY} {number}", fetch_k=20, top_n=None)
                hits = [(hit.text or "", hit.margin or 0.0) for hit in result]
                if number % 50 == 0:
                    bench.row.add("wrong", "query", fresh.wrong(hits, f"{QUERY} {number}"))
                bench.row.trials += 1
                if number % 500 == 499:
                    seen.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
                    bench.tell(f"{number + 1}: {seen[-1][0] / 1e6:.0f} MB, {seen[-1][1]} files, {seen[-1][2]} threads")
    grown = [last - first for first, last in zip(seen[1], seen[-1], strict=True)]
    bench.row.add("leaks", f"memory grew by {grown[0] / 1e6:.0f} MB", grown[0] > MOST_GROWTH)
    bench.row.add("leaks", f"{grown[1]} more descriptors", grown[1] > SLACK)
    bench.row.add("leaks", f"{grown[2]} more threads", grown[2] > SLACK)
    bench.row.notes.append(
        f"from query 1000 to {count}: {grown[0] / 1e6:+.1f} MB, {grown[1]:+} descriptors, {grown[2]:+} threads"
    )
