"""Changed bytes in the state store, and a disk without room: errors, misses, never a wrong score or a lost record."""

from __future__ import annotations

import multiprocessing
import random
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from faults.children import end, start
from faults.table import Bench, Fresh, check_index
from test_rebuild import passages
from test_store_sqlite import changeable, edit
from toy import QUERY, reopen

from kalm_rag import Reranker, open_store
from kalm_rag.engine.relevance import Relevance
from kalm_rag.errors import KalmRagError
from kalm_rag.states import PassageStates, StateBatch, batch_states
from kalm_rag.store import stored_layout

EDITS = [f"ratio={ratio}" for ratio in (1, 2, 3, 5, 6, 8)] + [
    *("codec='bf16'", "codec='int8'", "state_dtype='bfloat16'", "state_dtype='float16'", "hidden_size=8", "format=2"),
]
"""What a namespace row may be rewritten to."""


def flips(bench: Bench) -> None:
    """Of pico's store: every bit of the namespace row, and other values in it; a bit of many bytes of all pages."""
    texts = [" ".join(["honey"] * length) for length in range(1, 15, 2)]  # some have as many states at ratio 4 and 5
    whole, broken = bench.folder / "whole.sqlite3", bench.folder / "broken.sqlite3"
    with Reranker.from_pretrained("pico", device="cpu") as engine:
        layout, states = engine.layout("exact"), engine.encode(texts)
        with open_store(whole, layout) as store:
            store.put_many(states)
        want = engine.score(QUERY, batch_states(states))
        seen: Counter[str] = Counter()
        for change in _changes(whole.read_bytes(), layout.fingerprint, bench.count(4000)):
            _make(whole, broken, change)
            try:
                seen[_read(broken, engine, states, want, bench)] += 1
            except KalmRagError:
                seen["refused"] += 1
            except Exception as err:
                bench.row.add("foreign", f"{change}: {type(err).__name__}: {err}")
            bench.row.trials += 1
            for leftover in bench.folder.glob("broken*"):
                leftover.unlink()
    bench.row.notes.append(", ".join(f"{count} {what}" for what, count in seen.most_common()))


def _changes(data: bytes, fingerprint: str, most: int) -> list[tuple[int, int] | str]:
    """A place and the bits that turn there, or a new value in the namespace row."""
    row = data.index(fingerprint.encode()) - 12
    namespace = [(place, 1 << bit) for place in range(row, row + 100) for bit in range(8)]
    others = [(place, 1 << place % 8) for place in changeable(data)]
    return [*EDITS, *namespace, *(random.Random(0).sample(others, most) if most < len(others) else others)]


def _make(whole: Path, broken: Path, change: tuple[int, int] | str) -> None:
    data = bytearray(whole.read_bytes())
    if isinstance(change, tuple):
        data[change[0]] ^= change[1]
    broken.write_bytes(data)
    if isinstance(change, str):
        edit(broken, f"UPDATE namespaces SET {change}")


def _read(broken: Path, engine: Reranker, states: list[PassageStates], want: list[Relevance], bench: Bench) -> str:
    """Open a changed file as an index does, and score each passage that it gives other states for."""
    layout = stored_layout(broken, engine.info.fingerprint)
    outcomes = set()
    with open_store(broken, layout if layout is not None else engine.layout("exact")) as store:
        for state, score in zip(states, want, strict=True):
            try:
                batch = store.get_many([state.key]).batch
            except KalmRagError:
                outcomes.add("refused")
                continue
            outcomes.add("right" if batch is not None else "missing")
            if batch is not None and not _is_same(batch, state):
                (got,) = engine.score(QUERY, batch)
                bench.row.add("wrong", "a changed byte", abs(got.margin - score.margin) > 1e-5)
    return "refused" if "refused" in outcomes else "missing" if "missing" in outcomes else "right"


def _is_same(batch: StateBatch, state: PassageStates) -> bool:
    told = (batch.ratio, int(batch.tokens[0]), int(batch.total_tokens[0]))
    return told == (state.ratio, state.tokens, state.total_tokens) and torch.equal(batch.vectors[0], state.vectors)


def full(bench: Bench) -> None:
    """No file may grow over a bound (as on a full disk, writes fail); then there is room again."""
    rng = random.Random(0)
    errors: Counter[str] = Counter()
    with Reranker.from_pretrained(str(bench.model), device="cpu") as engine:
        fresh = Fresh(engine)
        for number in range(bench.count(12)):
            path = bench.folder / str(number)
            with reopen(path, engine) as index:
                index.add(["first"], ["The first text."])
            largest = max(file.stat().st_size for file in path.rglob("*") if file.is_file())
            receiver, sender = multiprocessing.Pipe(duplex=False)
            child = start(_fill, path, bench.model, largest + rng.randrange(-40_000, 200_000), sender)
            sender.close()
            code = end(child, 90)
            told: list[tuple[str, str]] = []
            while receiver.poll():
                try:
                    told.append(receiver.recv())
                except EOFError:
                    break
            wanted: dict[str, set[str | None]] = {"first": {"The first text."}}
            for kind, value in told:
                if kind == "written":
                    wanted |= {f"t{value}-{n}": {f"{text} {value}"} for n, text in enumerate(passages(10))}
                elif kind == "foreign":
                    bench.row.add("foreign", f"full disk: {value}")
                elif kind == "error":
                    errors[value] += 1
            bench.row.add("hangs", "full disk", code is None)
            bench.row.add("foreign", f"full disk: exit code {code}", bool(code))
            bench.row.add("lost", "full disk: doesn't write when there is room again", ("error", "late") in told)
            bench.row.trials += 1
            check_index(bench.row, path, engine, fresh, wanted, "full disk")
    bench.tell(str(errors.most_common(6)))
    bench.row.notes.append(f"{errors.total()} writes and sweeps refused by name")


def _fill(path: Path, model: Path, bound: int, sender: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with reopen(path, str(model)) as index:
        index.query(QUERY)

        def attempt(turn: int, late: bool = False) -> bool:
            try:
                index.add([f"t{turn}-{n}" for n in range(10)], [f"{text} {turn}" for text in passages(10)])
            except KalmRagError as err:
                sender.send(("error", "late" if late else str(err)[:300].replace(str(path), "")))
                return False
            except BaseException as err:
                sender.send(("foreign", f"{type(err).__name__}: {err}"[:300]))
                return False
            sender.send(("written", str(turn)))
            return True

        resource.setrlimit(resource.RLIMIT_FSIZE, (max(bound, 4096), hard))
        turn = 0
        while turn < 60 and attempt(turn):
            turn += 1
        for act in (lambda: index.gc(younger_than=0), lambda: index.query(QUERY)):
            try:
                act()
            except KalmRagError as err:
                sender.send(("error", str(err)[:300].replace(str(path), "")))
            except BaseException as err:
                sender.send(("foreign", f"{type(err).__name__}: {err}"[:300]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        attempt(100, late=True)
