"""What every store promises, asked of all three: SQLite, memory, and a companion collection in a real Chroma server."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stores import chroma_client, make_layout, make_many, make_states, refer

from kalm_rag.errors import ClosedError, InputError, StateMismatchError
from kalm_rag.states import Codec, Layout, PassageStates, StateBatch, passage_key
from kalm_rag.store import Reference, StateStore, collection_layouts, open_store, stored_layout, sweep_folder

__all__ = ["chroma_client"]
NUMBER = itertools.count()
Opener = Callable[[Layout], StateStore]


@pytest.fixture(params=["sqlite", "memory", "chroma"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens the same empty place each time (memory: a new one)."""
    if request.param == "memory":
        return lambda layout: open_store(":memory:", layout)
    if request.param == "sqlite":
        return lambda layout: open_store(tmp_path / "db", layout)
    client, name = request.getfixturevalue("chroma_client"), f"docs{next(NUMBER)}"
    return lambda layout: open_store(client, layout, name=name)


@pytest.fixture
def persistent(opener: Opener) -> Opener:
    store = opener(make_layout(fingerprint="0" * 64))
    if type(store).__name__ == "MemoryStore":
        pytest.skip("a store in memory can't be opened twice")
    store.close()
    return opener


def row(batch: StateBatch, index: int) -> torch.Tensor:
    """A passage's own states out of a batch, without the padding."""
    return batch.vectors[index, : int(batch.lengths[index])]


def check_rows(batch: StateBatch | None, states: list[PassageStates]) -> None:
    assert batch is not None
    assert len(batch) == len(states)
    assert batch.tokens.tolist() == [s.tokens for s in states]
    assert batch.total_tokens.tolist() == [s.total_tokens for s in states]
    for index, one in enumerate(states):
        assert torch.equal(row(batch, index), one.vectors)
        assert not batch.vectors[index, one.vectors.shape[0] :].any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_exact_codec_gives_the_same_bits_back(opener: Opener, dtype: str) -> None:
    layout = make_layout(state_dtype=dtype)
    states = make_many(7, layout)
    with opener(layout) as store:
        store.put_many(states)
        fetched = store.get_many([s.key for s in states])
    check_rows(fetched.batch, states)
    assert fetched.batch is not None
    assert fetched.batch.vectors.dtype is states[0].vectors.dtype
    assert (fetched.batch.ratio, fetched.batch.fingerprint) == (layout.ratio, layout.fingerprint)


def test_bf16_codec_rounds_to_bfloat16(opener: Opener) -> None:
    layout = make_layout(codec=Codec.BF16)
    states = make_many(3, layout)
    with opener(layout) as store:
        store.put_many(states)
        batch = store.get_many([s.key for s in states]).batch
    check_rows(batch, [replace(s, vectors=s.vectors.bfloat16()) for s in states])


@pytest.mark.parametrize("codec", list(Codec))
def test_words_are_kept_beside_the_vectors(opener: Opener, codec: Codec) -> None:
    layout = make_layout(codec=codec, keeps_token_ids=True)
    states = make_many(5, layout)
    with opener(layout) as store:
        store.put_many(states, refer(states))
        batch = store.get_many([s.key for s in states]).batch
        assert store.verify() == []
    assert batch is not None
    assert batch.token_ids is not None
    for index, one in enumerate(states):
        assert one.token_ids is not None
        assert batch.token_ids[index, : one.tokens].tolist() == one.token_ids.tolist()
        assert not batch.token_ids[index, one.tokens :].any()


@pytest.mark.parametrize("hidden", [12, 5])  # 5: the scales then start at an odd byte
def test_int8_codec_stays_within_half_a_step(opener: Opener, hidden: int) -> None:
    layout = make_layout(codec=Codec.INT8, hidden_size=hidden)
    states = make_many(6, layout)
    with opener(layout) as store:
        store.put_many(states)
        batch = store.get_many([s.key for s in states]).batch
    assert batch is not None
    assert batch.scales is not None
    for index, one in enumerate(states):
        scales = batch.scales[index, : one.vectors.shape[0], None]
        assert torch.allclose(scales[:, 0], one.vectors.abs().amax(-1) / 127)
        assert ((row(batch, index) * scales - one.vectors).abs() <= scales * 0.5001).all()


def test_order_duplicates_and_missing(opener: Opener) -> None:
    layout = make_layout()
    a, b, c = make_many(3, layout)
    nowhere = passage_key("never stored")
    with opener(layout) as store:
        store.put_many([a, b, c])
        fetched = store.get_many([c.key, nowhere, a.key, c.key, nowhere, b.key])
        assert (fetched.found, fetched.missing) == ([0, 2, 3, 5], [1, 4])
        check_rows(fetched.batch, [c, a, c, b])
        assert store.missing([nowhere, a.key, nowhere]) == {nowhere}


def test_nothing_asked_and_nothing_found(opener: Opener) -> None:
    layout = make_layout()
    with opener(layout) as store:
        empty = store.get_many([])
        assert (empty.batch, empty.found, empty.missing) == (None, [], [])
        assert store.get_many([passage_key("x")]).batch is None
        store.put_many([])
        assert store.missing([]) == set()
        assert store.unreference("c", []) == 0
        assert store.discard([]) == 0
        assert store.stats().states == 0


def test_more_keys_than_one_statement_takes(opener: Opener) -> None:
    layout = make_layout(hidden_size=2)
    states = make_many(1203, layout)
    with opener(layout) as store:
        store.put_many(states, refer(states))
        check_rows(store.get_many([s.key for s in reversed(states)]).batch, states[::-1])
        assert store.missing([s.key for s in states]) == set()
        assert sorted(r.record_id for r in store.references("c")) == sorted(f"r{i}" for i in range(1203))
        assert store.unreference("c", [f"r{i}" for i in range(1203)]) == 1203
        assert store.gc(younger_than=0).states == 1203


def test_a_key_that_is_there_is_left_as_it_is(opener: Opener) -> None:
    layout = make_layout()
    one = make_states("a", layout)
    with opener(layout) as store:
        store.put_many([one, one])
        store.put_many([replace(one, vectors=one.vectors + 1)])
        check_rows(store.get_many([one.key]).batch, [one])
        assert store.stats().states == 1


def test_references_move_with_their_record(opener: Opener) -> None:
    layout = make_layout()
    a, b = make_many(2, layout)
    with opener(layout) as store:
        store.put_many([a, b], [Reference(collection_id="c", record_id="ä\0 1", key=a.key)])
        store.put_many([], [Reference(collection_id="c", record_id="ä\0 1", key=b.key)])
        store.put_many([], [Reference(collection_id="other", record_id="ä\0 1", key=b.key)])
        assert list(store.references("c")) == [Reference(collection_id="c", record_id="ä\0 1", key=b.key)]
        assert store.collections() == {"c": 1, "other": 1}
        assert store.unreference("c", ["ä\0 1", "unknown", "ä\0 1"]) == 1
        assert list(store.references("c")) == []
        assert store.collections() == {"other": 1}
        assert store.missing([a.key, b.key]) == set()


def test_the_last_reference_of_a_record_in_one_call_wins(opener: Opener) -> None:
    layout = make_layout()
    a, b = make_many(2, layout)
    with opener(layout) as store:
        store.put_many([a, b], [Reference(collection_id="c", record_id="1", key=k) for k in (a.key, b.key)])
        assert [r.key for r in store.references("c")] == [b.key]


def test_gc_takes_what_no_record_uses(opener: Opener) -> None:
    layout = make_layout()
    used, shared, loose = make_many(3, layout)
    with opener(layout) as store:
        references = [*refer([used, shared], "live"), *refer([shared], "gone")]
        store.put_many([used, shared, loose], references)
        swept = store.gc(younger_than=0)
        assert (swept.states, swept.payload_bytes) == (1, layout.payload_bytes(loose.tokens))
        assert store.collections() == {"live": 2, "gone": 1}
        assert store.gc(["live"], younger_than=0).states == 0
        assert store.collections() == {"live": 2}
        store.unreference("live", ["r1"])
        assert store.gc(["live", "unheard of"], younger_than=0).states == 1
        assert store.missing([used.key, shared.key]) == {shared.key}
        assert store.gc([], younger_than=0).states == 1
        assert store.stats().references == 0


class Clock:
    """Time of the stores under test, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_800_000_000.0
        monkeypatch.setattr("time.time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_gc_leaves_what_was_stored_a_moment_ago(opener: Opener, clock: Clock) -> None:
    """A process stores states, then its record; gc of another came between and took them: 1,097 of 1,578 in a minute.

    Putting a state that is there already makes it young again.
    """
    layout = make_layout()
    old, renewed, young = make_many(3, layout)
    with opener(layout) as store:
        store.put_many([old, renewed])
        clock.now += 500
        store.put_many([renewed, young])
        clock.now += 200  # 700, 200 and 200 seconds old
        assert store.gc().states == 1
        assert store.missing([old.key, renewed.key, young.key]) == {old.key}
        assert store.gc(younger_than=300).states == 0
        clock.now += 101
        assert store.gc(younger_than=300).states == 2


def test_gc_of_no_grace_takes_what_a_fast_clock_wrote(opener: Opener, clock: Clock) -> None:
    layout = make_layout()
    with opener(layout) as store:
        store.put_many(make_many(2, layout), refer(make_many(1, layout), "gone"))
        clock.now -= 5000
        assert store.gc([], younger_than=1).states == 0
        assert store.gc([], younger_than=0).states == 2


def test_gc_leaves_a_collection_that_was_made_a_moment_ago(opener: Opener, clock: Clock) -> None:
    """A collection made after the caller listed the live ones lost its references, and with the next gc its states."""
    layout = make_layout()
    states = make_many(3, layout)
    with opener(layout) as store:
        store.put_many(states, refer(states, "just made"))
        clock.now += 500
        store.put_many([], refer(states[:1], "just made"))
        clock.now += 200
        assert store.gc([]).states == 0
        assert store.collections() == {"just made": 3}
        clock.now += 500
        assert store.gc([]).states == 3
        assert store.collections() == {}


def test_gc_leaves_the_collections_of_other_databases(opener: Opener) -> None:
    """Two databases share one store: gc of the first knows its own collections only, and took the other's states."""
    layout = make_layout()
    ours, theirs, nobodys = make_many(3, layout)
    with opener(layout) as store:
        store.put_many([ours], refer([ours], "a"), scope="/data/first")
        store.put_many([theirs], refer([theirs], "b"), scope="/data/second")
        store.put_many([nobodys], refer([nobodys], "c"))
        assert store.gc([], younger_than=0, scopes=["/data/first"]).states == 1
        assert store.collections() == {"b": 1, "c": 1}
        assert store.gc([], younger_than=0).states == 1
        assert store.collections() == {"b": 1}
        assert store.gc(["b"], younger_than=0, scopes=["", "/data/second"]).states == 0
        assert store.gc([], younger_than=0, scopes=["", "/data/second"]).states == 1


def test_a_scope_is_kept_until_another_is_told(opener: Opener) -> None:
    layout = make_layout()
    states = make_many(2, layout)
    with opener(layout) as store:
        store.put_many(states, refer(states))
        store.put_many([], refer(states[:1]), scope="/a")
        store.put_many([], refer(states))
        assert store.gc([], younger_than=0).states == 0
        store.put_many([], refer(states), scope="/b")
        assert store.gc([], younger_than=0, scopes=["", "/a"]).states == 0
        assert store.gc([], younger_than=0, scopes=["/b"]).states == 2


def test_gc_counts_a_passage_of_many_records(opener: Opener) -> None:
    """The companion asks which states of a page have references; one passage's references may fill the answer alone."""
    layout = make_layout(hidden_size=2)
    states = make_many(3, layout)
    many = [Reference(collection_id="c", record_id=f"m{i}", key=states[0].key) for i in range(6000)]
    with opener(layout) as store:
        store.put_many(states, [*many, Reference(collection_id="c", record_id="one", key=states[1].key)])
        assert store.gc(younger_than=0).states == 1
        assert store.missing([s.key for s in states]) == {states[2].key}


@pytest.mark.parametrize("age", [-1, float("nan"), float("inf"), 1e300, "600", None, True])
def test_ages_that_are_none(opener: Opener, age: object) -> None:
    with opener(make_layout()) as store, pytest.raises(InputError, match=r"younger_than is .*wanted seconds"):
        store.gc(younger_than=age)  # type: ignore[arg-type]


def test_scopes_and_waits_that_are_none(opener: Opener) -> None:
    layout = make_layout()
    states = make_many(1, layout)
    with opener(layout) as store:
        with pytest.raises(InputError, match="scope is 7; wanted text"):
            store.put_many(states, refer(states), scope=7)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="lone surrogate"):
            store.put_many(states, refer(states), scope="\ud800")
        for wait in (-1, "1", float("nan"), float("inf"), 1e300, True):
            with pytest.raises(InputError, match=r"wait is .*wanted seconds"):
                store.put_many(states, wait=wait)  # type: ignore[arg-type]
        assert store.missing([states[0].key]) == {states[0].key}
        store.put_many(states, wait=0)
        assert store.missing([states[0].key]) == set()


def test_layouts_of_a_collection_are_read_without_a_model(tmp_path: Path, chroma_client: object) -> None:
    """Deleting a record, gc and verify loaded the whole model only to know where its states are."""
    ours, theirs = make_layout(codec=Codec.INT8), make_layout(fingerprint="beef" * 16, hidden_size=6)
    for where, name in ((tmp_path / "db", ""), (tmp_path / "one.sqlite3", ""), (chroma_client, "by-collection")):
        assert collection_layouts(where, "c", name=name) == []
        for layout in (ours, theirs):
            states = make_many(2, layout)
            with open_store(where, layout, name=name) as store:
                store.put_many(states, refer(states, "c") + refer(states[:1], layout.fingerprint))
        found = collection_layouts(where, "c", name=name)
        assert sorted(found, key=lambda layout: layout.fingerprint) == [theirs, ours]
        assert collection_layouts(where, ours.fingerprint, name=name) == [ours]
        assert collection_layouts(where, "unheard of", name=name) == []
    assert collection_layouts(":memory:", "c") == []
    assert not (tmp_path / "nowhere").exists()
    assert collection_layouts(tmp_path / "nowhere", "c") == []
    assert not (tmp_path / "nowhere").exists()


def test_any_iterable_is_read_once_and_a_string_is_none(opener: Opener) -> None:
    """A generator of keys was consumed by their check, and nothing was found; live_collections="c" was letters."""
    layout = make_layout()
    states = make_many(3, layout)
    with opener(layout) as store:
        store.put_many((s for s in states), (r for r in refer(states)))
        assert store.missing(s.key for s in states) == set()  # type: ignore[arg-type]
        assert store.get_many(s.key for s in states).found == [0, 1, 2]  # type: ignore[arg-type]
        assert store.collections() == {"c": 3}
        assert store.unreference("c", (f"r{i}" for i in range(1))) == 1
        assert store.discard(s.key for s in states[:1]) == 1
        for call, name in (
            (lambda: store.gc("c"), "live_collections"),
            (lambda: store.gc([], scopes="/db"), "scopes"),
            (lambda: store.unreference("c", "r1"), "ids"),
            (lambda: store.get_many(states[0].key), "keys"),  # type: ignore[arg-type]
            (lambda: store.discard(states[0].key), "names"),
        ):
            with pytest.raises(InputError, match=f"{name} is one string"):
                call()
        for call in (lambda: store.gc([uuid.uuid4()]), lambda: store.unreference("c", [["r1"]])):  # type: ignore[list-item]
            with pytest.raises(InputError, match=r"wanted text. Use str\(collection.id\)"):
                call()
        with pytest.raises(InputError, match="references holds a tuple"):
            store.put_many([], [("c", "r1", states[0].key)])  # type: ignore[list-item]
        assert store.collections() == {"c": 2}


def test_sweeping_a_folder_needs_no_model_and_no_collection(tmp_path: Path) -> None:
    """Without a collection left, the states in a folder could not be swept at all: gc was a method of a collection."""
    ours, theirs = make_layout(), make_layout(fingerprint="beef" * 16, hidden_size=6)
    for layout in (ours, theirs):
        states = make_many(3, layout)
        with open_store(tmp_path, layout) as store:
            store.put_many(states, refer(states[:1], "gone") + refer(states[1:2], "live"))
            store.put_many([], refer(states[2:], "other"), scope="/other")
    assert sweep_folder(tmp_path, ["live"]).states == 0
    report = sweep_folder(tmp_path, ["live"], younger_than=0)
    assert (report.states, report.payload_bytes) == (2, sum(x.payload_bytes(states[0].tokens) for x in (ours, theirs)))
    assert sweep_folder(tmp_path / "kalm_states.sqlite3", [], scopes=["", "/other"], younger_than=0).states == 4
    for layout in (ours, theirs):
        with open_store(tmp_path, layout) as store:
            assert store.stats().states == store.stats().references == 0
    assert sweep_folder(tmp_path / "nowhere", []).states == 0
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(InputError, match="live_collections is one string"):
        sweep_folder(tmp_path, "live")


def test_stats_count_payload(opener: Opener) -> None:
    layout = make_layout(codec=Codec.INT8)
    states = make_many(4, layout)
    with opener(layout) as store:
        store.put_many(states, refer(states[:3]))
        stats = store.stats()
    assert (stats.states, stats.references) == (4, 3)
    assert stats.payload_bytes == sum(s.vectors.shape[0] * (12 + 4) for s in states)
    assert stats.other_namespaces == {} or set(stats.other_namespaces.values()) == {0}


def test_verify_and_discard(opener: Opener) -> None:
    layout = make_layout()
    states = make_many(3, layout)
    with opener(layout) as store:
        store.put_many(states, refer(states))
        assert store.verify() == []
        assert store.discard([states[1].key, passage_key("unknown"), states[1].key]) == 1
        assert store.missing([s.key for s in states]) == {states[1].key}
        assert store.collections() == {"c": 3}
        store.put_many(states)
        check_rows(store.get_many([states[1].key]).batch, [states[1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"fingerprint": "f00d"}, "model fingerprint f00d"), ({"hidden_size": 8}, "width 8"), ({"ratio": 2}, "ratio 2")],
)
def test_states_of_another_layout_are_refused(opener: Opener, change: dict[str, object], message: str) -> None:
    layout = make_layout()
    good, bad = make_states("good", layout), make_states("bad", make_layout(**change))
    with opener(layout) as store:
        with pytest.raises(StateMismatchError, match=message):
            store.put_many([good, bad], refer([good]))
        assert store.missing([good.key]) == {good.key}
        assert store.collections() == {}


def test_bad_keys_and_ids_are_refused(opener: Opener) -> None:
    layout = make_layout()
    one = make_states("a", layout)
    with opener(layout) as store:
        for key in ("", "xyz", "AB" * 32, one.key + "0", 7):
            with pytest.raises(InputError, match="wanted a sha256 in hex"):
                store.get_many([key])  # type: ignore[list-item]
        with pytest.raises(InputError, match="sha256"):
            store.put_many([one], [Reference(collection_id="c", record_id="1", key="nope")])
        with pytest.raises(InputError, match="lone surrogate"):
            store.put_many([one], [Reference(collection_id="c", record_id="\ud800", key=one.key)])
        with pytest.raises(InputError, match="wanted text"):
            store.unreference("c", [3])  # type: ignore[list-item]
        assert store.missing([one.key]) == {one.key}


def test_closed_store(opener: Opener) -> None:
    layout = make_layout()
    one = make_states("a", layout)
    store = opener(layout)
    store.close()
    store.close()
    calls: list[Callable[[], object]] = [
        lambda: store.get_many([one.key]),
        lambda: store.missing([one.key]),
        lambda: store.put_many([one]),
        lambda: list(store.references("c")),
        lambda: store.unreference("c", ["1"]),
        lambda: store.discard([one.key]),
        store.verify,
        store.gc,
        store.stats,
        store.collections,
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="closed"):
            call()


def test_kept_over_reopening(persistent: Opener) -> None:
    layout = make_layout()
    states = make_many(5, layout)
    with persistent(layout) as store:
        store.put_many(states, refer(states))
    with persistent(layout) as store:
        check_rows(store.get_many([s.key for s in states]).batch, states)
        assert store.collections() == {"c": 5}


def test_another_models_states_are_invisible(persistent: Opener) -> None:
    ours, theirs = make_layout(), make_layout(fingerprint="beef" * 16, hidden_size=6)
    a, b = make_states("a", ours), make_states("a", theirs)
    with persistent(ours) as one, persistent(theirs) as two:
        one.put_many([a], refer([a]))
        assert two.missing([a.key]) == {a.key}
        assert two.collections() == {}
        two.put_many([b])
        two.gc([], younger_than=0)
        check_rows(one.get_many([a.key]).batch, [a])
        assert one.collections() == {"c": 1}
        assert two.stats().other_namespaces[ours.fingerprint] == 1


@pytest.mark.parametrize(
    "change",
    [{"ratio": 8}, {"codec": Codec.INT8}, {"hidden_size": 24}, {"state_dtype": "float16"}, {"keeps_token_ids": True}],
    ids=str,
)
def test_one_layout_per_model(persistent: Opener, change: dict[str, object]) -> None:
    persistent(make_layout()).close()
    with pytest.raises(StateMismatchError, match=r"ratio 4, codec exact, width 12, float32; asked for .*stored_layout"):
        persistent(make_layout(**change))


def test_stored_layout_can_be_adopted(tmp_path: Path, chroma_client: object) -> None:
    layout = make_layout(codec=Codec.INT8, ratio=2, keeps_token_ids=True)
    for where, name in ((tmp_path, ""), (tmp_path / "one.sqlite3", ""), (chroma_client, "adopt")):
        assert stored_layout(where, layout.fingerprint, name=name) is None
        open_store(where, layout, name=name).close()
        assert stored_layout(where, layout.fingerprint, name=name) == layout
        assert stored_layout(where, "beef" * 16, name=name) is None
    assert stored_layout(":memory:", layout.fingerprint) is None


def test_places_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wanted ':memory:', a folder"):
        open_store(object(), make_layout())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="store path"):
        open_store("", make_layout())
    with pytest.raises(InputError, match="store path"):
        open_store("a\0b", make_layout())


def test_eight_threads(opener: Opener) -> None:
    """All threads write overlapping passages, move references and read; nobody sees anything but exact states."""
    layout = make_layout()
    states = make_many(40, layout)
    errors: list[BaseException] = []

    def work(number: int, store: StateStore) -> None:
        try:
            for turn in range(6):
                mine = [states[(number * 5 + turn * 7 + k) % 40] for k in range(10)]
                store.put_many(mine, refer(mine, f"c{number}"))
                check_rows(store.get_many([s.key for s in mine]).batch, mine)
                assert sum(1 for _ in store.references(f"c{number}")) == 10
                store.unreference(f"c{number}", ["r0"])
        except BaseException as err:
            errors.append(err)

    with opener(layout) as store:
        threads = [threading.Thread(target=work, args=(n, store)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert store.collections() == {f"c{n}": 9 for n in range(8)}
        assert store.verify() == []
        assert store.stats().states == 40
