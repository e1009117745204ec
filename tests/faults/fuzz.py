"""Inputs that nobody should send, at the public doors: our errors by name, and nothing written on refusal."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

from faults.table import Bench
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from toy import IDS, TEXTS, toy_vectors

from kalm_rag import ChromaIndex, Instructions, Reranker
from kalm_rag.errors import KalmRagError
from kalm_rag.index.collection import comparable_metadata

text = st.one_of(st.text(max_size=30), st.text(st.characters(), max_size=8), st.sampled_from(["", " ", "\0", "\ud800"]))
number = st.one_of(st.integers(), st.integers(-1, 5), st.floats(), st.sampled_from([2**31, 2**63, 2**64, 32_766]))
plain = st.one_of(st.none(), st.booleans(), number, text, st.binary(max_size=5), st.builds(object))
wild = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=3), st.tuples(inner, inner)
    ),
    max_leaves=6,
)
"""Anything at all."""
metadata = st.one_of(st.none(), st.dictionaries(text, st.one_of(plain, st.lists(plain, max_size=3)), max_size=3))
records = st.one_of(
    st.lists(st.tuples(text, text, metadata), max_size=4, unique_by=lambda record: record[0]),
    st.lists(st.tuples(text, text, metadata), max_size=4),
)
operators = st.sampled_from(["$and", "$or", "$in", "$nin", "$eq", "$ne", "$gt", "$contains", "$regex", "$not_contains"])
filters = st.recursive(
    st.one_of(plain, st.dictionaries(st.one_of(text, operators), plain, max_size=2)),
    lambda inner: st.one_of(
        st.dictionaries(st.one_of(operators, text), inner, max_size=2),
        st.builds(lambda name, parts: {name: parts}, operators, st.lists(inner, max_size=3)),
    ),
    max_leaves=5,
)
prompts = st.one_of(
    wild,
    st.text("{}%#context question_str \n<>ab|", max_size=60),
    st.lists(st.tuples(st.sampled_from(["system", "human", "user", "ai", "x"]), text), max_size=4),
    st.builds("{}{{context}}{}{{question}}{}".format, text, text, text),
)
names = st.one_of(wild, text, st.from_regex(r"[a-zA-Z0-9._-]{1,70}", fullmatch=True))


def mostly(good: Any) -> st.SearchStrategy[Any]:
    """A value that fits, so that others of the call are reached; now and then anything."""
    return st.one_of(st.just(good), st.just(good), wild)


class Doors:
    """An index in memory and its engine; each call is tried, and what it did is looked at."""

    def __init__(self, bench: Bench, engine: Reranker) -> None:
        self.bench, self.engine, self.seen = bench, engine, Counter[str]()
        self.index = ChromaIndex.open(model=engine, embedder=toy_vectors, collection="fuzz")
        self.index.add(IDS, TEXTS)
        self.taken = False

    def attempt(self, door: str, call: Callable[[], object], writes: bool = False) -> None:
        """Call a door; `taken` says whether it took its input."""
        before, ok = self._state() if writes else None, False
        try:
            call()
            ok = True
        except KalmRagError as err:
            self.seen[f"{type(err).__name__}"] += 1
        except Exception as err:
            where = traceback.extract_tb(err.__traceback__)[-1]
            place = f"{where.filename.rsplit('/site-packages/')[-1]}:{where.lineno}"
            self.bench.row.add("foreign", f"{door}: {type(err).__name__} at {place}: {str(err)[:100]}")
        self.seen["taken"] += ok
        self.bench.row.trials += 1
        if writes and not ok and self._state() != before:
            self.bench.row.add("lost", f"{door}: something was written, and an error raised")
        self.taken = ok

    def _state(self) -> tuple[int, int, int]:
        stats = self.index.store.stats()
        return len(self.index), stats.states, stats.references

    def write(self, kind: str, rows: list[tuple[str, str, Any]], odd: tuple[str, Any] | None) -> None:
        """Write records; what was taken is there as it was given, and goes again."""
        arguments: dict[str, Any] = {"ids": [r[0] for r in rows], "texts": [r[1] for r in rows]}
        arguments["metadatas"] = [r[2] for r in rows]
        arguments |= dict([odd]) if odd is not None else {}
        self.attempt(kind, lambda: getattr(self.index, kind)(**arguments), writes=True)
        if not self.taken:
            return
        if odd is None and rows:
            got = self.index.collection.get(ids=arguments["ids"], include=["documents", "metadatas"])
            there = dict(zip(got["ids"], zip(got["documents"], got["metadatas"], strict=True), strict=True))
            for name, document, told in rows:
                kept, kept_meta = there.get(name, (None, None))
                same = comparable_metadata(kept_meta or {}) == comparable_metadata(told or {})
                self.bench.row.add("lost", f"{kind}: not kept as given", kept != document or not same)
        added = [i for i in self.index.collection.get(include=[])["ids"] if i not in IDS]
        self.index.delete(added)
        self.index.upsert(IDS, TEXTS)


def fuzz(bench: Bench) -> None:
    """Hypothesis draws, always the same."""
    with Reranker.from_pretrained(str(bench.model), device="cpu") as engine:
        doors = Doors(bench, engine)
        parts: list[tuple[int, str, Callable[..., None], dict[str, st.SearchStrategy[Any]]]] = [
            (2500, "query", lambda **o: doors.attempt("query", lambda: doors.index.query(o.pop("text"), **o)), {
                "text": mostly("What?"), "top_n": mostly(2), "fetch_k": mostly(3), "threshold": mostly(None),
                "ratio": mostly(None), "instructions": st.one_of(mostly("Find it."), prompts), "missing": mostly(None),
                "where": st.one_of(st.none(), filters), "where_document": st.one_of(st.none(), filters),
            }),
            (2500, "add and upsert", doors.write, {
                "kind": st.sampled_from(["add", "upsert"]), "rows": records,
                "odd": st.one_of(st.none(), st.none(), st.tuples(st.sampled_from(["ids", "texts", "metadatas"]), wild)),
            }),
            (500, "delete", lambda ids: doors.attempt("delete", lambda: doors.index.delete(ids), writes=True), {
                "ids": st.one_of(wild, st.lists(text, max_size=3)).filter(lambda ids: not _holds(ids)),
            }),
            (1500, "rank", lambda **o: doors.attempt("rank", lambda: engine.rank(o.pop("query"), **o)), {
                "query": st.one_of(mostly("What?"), text), "top_n": mostly(None), "threshold": mostly(None),
                "passages_or_states": st.one_of(wild, st.lists(text, max_size=3)), "ratio": mostly(None),
                "instructions": mostly(None),
            }),
            (1500, "from_prompt", lambda prompt: doors.attempt("from_prompt", lambda: _read(prompt)), {
                "prompt": prompts,
            }),
            (500, "open", lambda **o: doors.attempt("open", lambda: _open(engine, **o), writes=True), {
                "collection": names, "codec": mostly(None), "ratio": mostly(None), "passage": mostly(None),
                "missing": mostly("encode"),
            }),
        ]  # fmt: skip
        for count, name, call, strategies in parts:
            examples = bench.count(count)
            run = settings(
                max_examples=examples, database=None, deadline=None, derandomize=True, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(given(**strategies)(call))  # fmt: skip
            run()
            bench.tell(f"{name}: {bench.row.trials} inputs so far")
        doors.attempt("verify", lambda: doors.index.verify())
        bench.row.add("lost", "not clean at the end", not doors.index.verify().clean)
        doors.index.close()
    bench.row.notes.append(", ".join(f"{count} {what}" for what, count in doors.seen.most_common(4)))


def _holds(ids: Any) -> bool:
    """Whether a call would delete what the other calls need."""
    try:
        return bool(set(ids) & set(IDS))
    except TypeError:
        return False


def _read(prompt: object) -> None:
    told = Instructions.from_prompt(prompt)
    assert isinstance(told.system_text + told.task_text, str)


def _open(engine: Reranker, **options: Any) -> None:
    ChromaIndex.open(model=engine, embedder=toy_vectors, **options).close()
