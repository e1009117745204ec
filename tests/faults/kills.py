"""A process killed at each point where an index writes: what it acknowledged is there, and scored right."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import chromadb
from chromadb.api.client import Client
from chromadb.api.models.Collection import Collection
from faults.children import DIED, Points, end, start
from faults.table import GONE, Bench, Fresh, check_index
from test_rebuild import passages
from toy import reopen

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.index import rebuilding
from kalm_rag.index.clients import Database
from kalm_rag.store import sqlite

COUNT = 90
TEXTS = dict(zip([f"r{n}" for n in range(COUNT)], passages(COUNT), strict=True))
NEW = {f"new{n}": f"bad jig {n} of those that are new" for n in range(25)}
CHANGED = {f"r{n}": f"bad fig {n}, written again" for n in range(20)}
DELETED = [f"r{n}" for n in range(40, 70)]

ACTIONS: dict[str, Callable[[ChromaIndex], object]] = {
    "add": lambda index: index.add(list(NEW), list(NEW.values())),
    "upsert": lambda index: index.upsert([*CHANGED, "r30", "r31"], [*CHANGED.values(), TEXTS["r30"], TEXTS["r31"]]),
    "delete": lambda index: index.delete(DELETED),
    "gc": lambda index: index.gc(younger_than=0),
    "backfill": lambda index: index.backfill(),
    "rebuild": lambda index: index.rebuild(),
}
MIDDLES = ("before add", "before upsert", "before delete", "before create_collection", "before delete_collection")
"""Calls of Chroma that write for long enough to be cut off in their middle."""


def allowed(action: str, acknowledged: bool) -> Mapping[str, set[str | None]]:
    """Texts that each record may have after an action that was cut off, or was not."""
    wanted: dict[str, set[str | None]] = {name: {text} for name, text in TEXTS.items()}
    change: Mapping[str, str | None] = {
        "add": NEW, "upsert": CHANGED, "delete": dict.fromkeys(DELETED, GONE)
    }.get(action, {})  # fmt: skip
    for name, text in change.items():
        wanted[name] = {text} if acknowledged else wanted.get(name, {GONE}) | {text}
    return wanted


def kills(bench: Bench) -> None:
    """Of each action: every point, and the middles of Chroma's calls."""
    base = _make_base(bench)
    with Reranker.from_pretrained(str(bench.model), device="cpu") as engine:
        fresh = Fresh(engine)
        for action in ACTIONS:

            def check(path: Path, acknowledged: bool, what: str, action: str = action) -> None:
                check_index(bench.row, path, engine, fresh, allowed(action, acknowledged), what)

            _kill_at_each(bench, base, action, _act, check)


def cli(bench: Bench) -> None:
    """The same for ``kalm-rag index`` on a folder whose files come, change and go."""
    docs, base = bench.folder / "docs", bench.folder / "base"
    docs.mkdir()
    for n in range(6):
        (docs / f"{n}.txt").write_text(f"Note {n}: bees make honey. " * 30)
    _index(base, bench.model, docs, Points())
    (docs / "0.txt").unlink()
    (docs / "1.txt").write_text("Rust is iron and oxygen. " * 30)
    (docs / "7.txt").write_text("Tea is made of leaves. " * 30)
    with Reranker.from_pretrained("pico", device="cpu") as engine:
        fresh = Fresh(engine)

        def check(path: Path, acknowledged: bool, what: str) -> None:
            with bench.row.watching(what):
                _index(path, bench.model, docs, Points())  # whoever is cut off runs the same command again
            with ChromaIndex.open(path) as index:
                there = index.collection.get(include=["metadatas"])["metadatas"]
            names = {str(metadata["source"]) for metadata in there}
            wrong = names != {f"docs/{path.name}" for path in docs.iterdir()}
            bench.row.add("lost", f"{what}: other documents than in the folder", wrong)
            check_index(bench.row, path, engine, fresh, {}, what)

        _kill_at_each(bench, base, "cli", _index, check, docs, most=bench.count(14))


def _kill_at_each(
    bench: Bench,
    base: Path,
    action: str,
    act: Callable[..., None],
    check: Callable[[Path, bool, str], None],
    argument: object = None,
    most: int | None = None,
) -> None:
    """Count the points of an action, then kill it at each."""
    rng = random.Random(action)
    trial = bench.folder / "trial"
    argument = argument if argument is not None else action
    receiver, sender = multiprocessing.Pipe(duplex=False)
    code = end(start(act, _copied(base, trial, action), bench.model, argument, Points(), sender))
    if code != 0:
        bench.row.add("foreign", f"{action}: exit code {code} without a kill")
        return
    points: list[tuple[str, float]] = receiver.recv()
    check(trial, True, f"{action}, not killed")
    plan = [(place, 0.0) for place in range(len(points))]
    for place, (name, at) in enumerate(points[:-1]):
        if name in MIDDLES:
            plan += [(place, rng.uniform(0.05, 0.95) * (points[place + 1][1] - at)) for _ in range(bench.count(3))]
    most = most if most is not None else bench.count(len(plan))
    chosen = rng.sample(plan, most) if most < len(plan) else plan
    bench.tell(f"{action}: {len(points)} points, {len(chosen)} kills")
    for place, delay in chosen:
        what = f"{action} killed {'in ' if delay else ''}{points[place][0]}"
        code = end(start(act, _copied(base, trial, action), bench.model, argument, Points(place, delay)))
        bench.row.trials += 1
        if code not in (0, *DIED):
            bench.row.add("hangs" if code is None else "foreign", f"{what}: exit code {code}")
        check(trial, code == 0, what)


def _copied(base: Path, trial: Path, action: str) -> Path:
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(base, trial)
    if action == "backfill":
        (trial / "kalm_states.sqlite3").unlink()
    return trial


def _make_base(bench: Bench) -> Path:
    """Records whose vector index Chroma writes at every call, and states that nothing uses."""
    base = bench.folder / "base"
    settings: Any = {"hnsw": {"space": "cosine", "batch_size": 5, "sync_threshold": 10}}
    with contextlib.closing(chromadb.PersistentClient(str(base))) as client:
        client.create_collection("passages", embedding_function=None, configuration=settings)
    end(start(_fill, base, bench.model))
    return base


def _fill(path: Path, model: Path) -> None:
    with reopen(path, str(model)) as index:
        index.add(list(TEXTS), [f"{text}, at first" for text in TEXTS.values()])
        index.upsert(list(TEXTS), list(TEXTS.values()))


def _act(path: Path, model: Path, action: str, points: Points, sender: Any = None) -> None:
    with reopen(path, str(model)) as index:
        _watch(points)
        ACTIONS[action](index)
        if sender is not None:
            sender.send(points.passed)


def _index(path: Path, model: Path, docs: Path, points: Points, sender: Any = None) -> None:
    from typer.testing import CliRunner

    from kalm_rag.cli import app

    if points.at is not None or sender is not None:
        _watch(points)
    result = CliRunner().invoke(app, ["index", str(docs), "--db", str(path)])
    if result.exit_code != 0:
        raise RuntimeError(result.output) from result.exception
    if sender is not None:
        sender.send(points.passed)


def _watch(points: Points) -> None:
    """Every place where an index changes something on the disk."""
    inner = sqlite.transaction

    @contextlib.contextmanager
    def transaction(connection: sqlite3.Connection, wait: float | None = None) -> Iterator[None]:
        with inner(connection, wait):
            yield
            points.reach("commit")

    sqlite.transaction = transaction
    for holder, names in (
        (sqlite.SqliteStore, ("put_many", "unreference")),
        (sqlite, ("give_back_space",)),
        (Collection, ("add", "upsert", "delete", "modify")),
        (Client, ("create_collection", "delete_collection")),
        (Database, ("_sign",)),
        (rebuilding, ("_take_name",)),
    ):
        for name in names:
            points.watch(holder, name)
