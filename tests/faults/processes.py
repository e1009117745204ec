"""Processes at one index at once: two writers, a reader beside a writer, two collectors beside one that adds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from faults.children import end, start
from faults.table import GONE, Bench, Fresh, check_index
from test_clients import WRITER
from test_rebuild import passages
from toy import QUERY, reopen

from kalm_rag import Reranker

ROUNDS, SIZE = 8, 10


def writers(bench: Bench) -> None:
    """Each adds 36 records and deletes 6 of them."""
    with Reranker.from_pretrained(str(bench.model), device="cpu") as engine:
        for number in range(bench.count(3)):
            path = bench.folder / str(number)
            reopen(path, engine).close()
            two = [_writer(path, bench.model, name) for name in "ab"]
            wanted: set[str] = set()
            for process in two:
                assert process.stdin is not None
                process.stdin.write("go\n")
            for process in two:
                try:
                    wanted |= set(process.communicate(timeout=200)[0].split()) - {"ready"}
                except subprocess.TimeoutExpired:
                    process.kill()
                    bench.row.add("hangs", "a writer")
                bench.row.add("foreign", "a writer failed", bool(process.returncode))
            bench.row.trials += 1
            what = "two writers"
            check_index(bench.row, path, engine, Fresh(engine), {}, what)
            with bench.row.watching(what), reopen(path, engine) as index:
                found = {hit.id for hit in index.query(QUERY, top_n=None, fetch_k=500)}
                bench.row.add("lost", f"{what}: deleted, and still found", len(found - wanted))
                bench.row.add("lost", f"{what}: written, and not found", len(wanted - found))
            bench.tell(f"{len(wanted)} records written, {len(found)} found")


def _writer(path: Path, model: Path, name: str) -> subprocess.Popen[str]:
    """A process of its own; it finds helpers of tests as this one does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", WRITER, str(path), str(model), name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def reader(bench: Bench) -> None:
    """Another process adds 80 records: they are found after `refresh`, and after opening again."""
    names = [f"n{n}" for n in range(ROUNDS * SIZE)]
    with Reranker.from_pretrained(str(bench.model), device="cpu") as engine:
        for number in range(bench.count(3)):
            path, fresh = bench.folder / str(number), Fresh(engine)
            with bench.row.watching("reader"), reopen(path, engine) as index:
                index.add(["first"], ["The first text."])
                child = start(_add, path, bench.model, names)
                queries = 0
                while child.is_alive():
                    hits = index.query(QUERY, top_n=None, fetch_k=100).hits
                    bench.row.add("wrong", "reader", fresh.wrong([(h.text or "", h.margin or 0.0) for h in hits]))
                    queries += 1
                    if queries % 5 == 0:
                        index.refresh()
                bench.row.add("foreign", "the writer failed", end(child) != 0)
                index.refresh()
                found = {hit.id for hit in index.query(QUERY, top_n=None, fetch_k=100)}
                bench.row.add("lost", "not found after refresh", len({*names, "first"} - found))
            bench.row.trials += 1
            wanted: dict[str, set[str | None]] = {n: {t} for n, t in zip(names, passages(len(names)), strict=True)}
            check_index(bench.row, path, engine, fresh, wanted, "reopened")
            bench.tell(f"{queries} queries beside the writer, {len(found) - 1} of {len(names)} found after refresh")


def collectors(bench: Bench) -> None:
    """Two sweep without a pause, and spare nothing for its youth; a third process adds, rewrites and deletes."""
    with Reranker.from_pretrained(str(bench.model), device="cpu") as engine:
        for number in range(bench.count(3)):
            path, done = bench.folder / str(number), bench.folder / f"{number}.done"
            reopen(path, engine).close()
            sweeping = [start(_sweep, path, bench.model, done) for _ in range(2)]
            adding = start(_change, path, bench.model)
            code = end(adding, 120)
            done.touch()
            codes = [code, *(end(child) for child in sweeping)]
            bench.row.add("hangs", "collectors", codes.count(None))
            bench.row.add("foreign", f"collectors: exit codes {codes}", any(codes))
            wanted: dict[str, set[str | None]] = {}
            for turn in range(ROUNDS):
                for n, text in enumerate(passages(SIZE)):
                    wanted[f"{turn}-{n}"] = {GONE if n == 9 else f"{text} again" if n < 5 else f"{text} {turn}"}
            bench.row.trials += 1
            check_index(bench.row, path, engine, Fresh(engine), wanted, "collectors")
            bench.tell(f"{done.stat().st_size} sweeps beside the one that adds")


def _add(path: Path, model: Path, names: list[str]) -> None:
    with reopen(path, str(model)) as index:
        for begin in range(0, len(names), SIZE):
            index.add(names[begin : begin + SIZE], passages(len(names))[begin : begin + SIZE])
            time.sleep(0.05)


def _sweep(path: Path, model: Path, done: Path) -> None:
    sweeps = 0
    with reopen(path, str(model)) as index:
        while not done.exists():
            index.gc(younger_than=0)
            sweeps += 1
    with done.open("a") as told:
        told.write("." * sweeps)


def _change(path: Path, model: Path) -> None:
    with reopen(path, str(model)) as index:
        for turn in range(ROUNDS):
            texts, ids = passages(SIZE), [f"{turn}-{n}" for n in range(SIZE)]
            index.add(ids, [f"{text} {turn}" for text in texts])
            index.upsert(ids[:5], [f"{text} again" for text in texts[:5]])
            index.delete(ids[9:])
