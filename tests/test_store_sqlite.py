"""The SQLite store under what disks, processes and people do to it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import subprocess
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import Script
from stores import make_layout, make_many, make_states, refer

from kalm_rag.errors import InputError, KalmRagError, StateMismatchError, StoreError, StoreFormatError
from kalm_rag.states import Codec, Layout, PassageStates, pack_states, passage_key
from kalm_rag.store import Fetched, Reference, collection_layouts, open_store, stored_layout
from kalm_rag.store.rows import make_row
from kalm_rag.store.sqlite import SqliteStore

LAYOUT = make_layout()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "db" / "kalm_states.sqlite3"


@pytest.fixture
def filled(path: Path) -> list[PassageStates]:
    """A closed store of 12 passages with references."""
    states = make_many(12, LAYOUT)
    with SqliteStore.open(path, LAYOUT) as store:
        store.put_many(states, refer(states))
    return states


def check_kept(path: Path, states: list[PassageStates]) -> None:
    with SqliteStore.open(path, LAYOUT) as store:
        fetched = store.get_many([s.key for s in states])
        assert fetched.missing == []
        assert store.verify() == []
    assert fetched.batch is not None
    for index, one in enumerate(states):
        assert torch.equal(fetched.batch.vectors[index, : one.vectors.shape[0]], one.vectors)


def edit(path: Path, statement: str, values: tuple[object, ...] = ()) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def script(body: str, *arguments: object) -> Script:
    """Run Python in a process of its own, with the names the tests use."""
    head = """
        import os, sys, time
        import torch
        torch.set_num_threads(1)
        from stores import make_layout, make_many, make_states, refer
        from kalm_rag.store.sqlite import SqliteStore
        LAYOUT = make_layout()
        PATH = sys.argv[1]
    """
    return Script(textwrap.dedent(head) + textwrap.dedent(body), *arguments)


# The file


@pytest.mark.parametrize(
    ("codec", "dtype", "page"),
    [
        (Codec.EXACT, "float32", 16384),
        (Codec.EXACT, "float16", 8192),
        (Codec.BF16, "float32", 8192),
        (Codec.INT8, "float32", 4096),
    ],
)
def test_disk_stays_within_a_fifth_of_the_payload(path: Path, codec: Codec, dtype: str, page: int) -> None:
    layout = make_layout(hidden_size=384, codec=codec, state_dtype=dtype)
    lengths = random.Random(0)
    states = [make_states(f"{i}", layout, max(5, int(lengths.gauss(100, 35)))) for i in range(300)]
    with SqliteStore.open(path, layout) as store:
        for start in range(0, 300, 100):
            some = states[start : start + 100]
            store.put_many(some, refer(some, f"0b7b1d3c-6f2e-4c55-9c1b-{start:012}"))
        payload = store.stats().payload_bytes
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # closing leaves no log behind
    ratio = path.stat().st_size / payload
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA page_size").fetchone()[0] == page
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    connection.close()
    assert ratio <= 1.2, f"{path.stat().st_size} bytes of disk for {payload} of payload: {ratio:.3f}"


def test_folder_means_a_file_beside_chromas(tmp_path: Path) -> None:
    open_store(tmp_path / "a" / "b", LAYOUT).close()
    open_store(str(tmp_path / "ü #1%.sqlite3"), LAYOUT).close()
    assert (tmp_path / "a" / "b" / "kalm_states.sqlite3").is_file()
    assert (tmp_path / "ü #1%.sqlite3").is_file()


def test_home_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`store="~/x"` made a folder named `~` in the working folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    open_store("~/a", LAYOUT).close()
    open_store(Path("~/b.sqlite3"), LAYOUT).close()
    assert stored_layout("~/a", LAYOUT.fingerprint) == LAYOUT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b.sqlite3"]
    with pytest.raises(InputError, match=r"store path is '~nobody-of-this-name/x'.*Write the folder out"):
        open_store("~nobody-of-this-name/x", LAYOUT)
    with pytest.raises(InputError, match=r"store path is b'x'; wanted a folder"):
        open_store(PathOfBytes(), LAYOUT)  # type: ignore[arg-type]


class PathOfBytes(os.PathLike[bytes]):
    def __fspath__(self) -> bytes:
        return b"x"


def test_gc_gives_space_back_without_a_vacuum(path: Path) -> None:
    layout = make_layout(hidden_size=256)
    states = [make_states(f"{i}", layout, 40) for i in range(400)]
    with SqliteStore.open(path, layout) as store:
        store.put_many(states, refer(states))
        store.unreference("c", [f"r{i}" for i in range(0, 400, 2)])
        before = store.stats()
        swept = store.gc(younger_than=0)
        after = store.stats()
        assert store.verify() == []
        assert store.missing([s.key for s in states]) == {s.key for s in states[::2]}
    assert (swept.states, swept.payload_bytes) == (200, before.payload_bytes // 2)
    assert after.payload_bytes == before.payload_bytes // 2
    assert path.stat().st_size < 1.3 * after.payload_bytes


def test_gc_leaves_what_a_writer_claims_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record is added between gc's look at what is unused and its delete: its states must stay."""
    states = make_many(3, LAYOUT)
    with SqliteStore.open(path, LAYOUT) as store, SqliteStore.open(path, LAYOUT) as other:
        store.put_many(states)
        original = store._writing

        def after_another_writer() -> object:
            other.put_many([], refer(states[:1]))
            return original()

        monkeypatch.setattr(store, "_writing", after_another_writer)
        assert store.gc(younger_than=0).states == 2
        assert store.missing([s.key for s in states]) == {states[1].key, states[2].key}


# Files of other releases

EARLIER = (
    "CREATE TABLE namespaces (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, hidden_size INTEGER NOT NULL, "
    "ratio INTEGER NOT NULL, codec TEXT NOT NULL, state_dtype TEXT NOT NULL, format INTEGER NOT NULL)",
    "CREATE TABLE states (id INTEGER PRIMARY KEY, namespace INTEGER NOT NULL, key BLOB NOT NULL, "
    "tokens INTEGER NOT NULL, found INTEGER NOT NULL, checksum INTEGER NOT NULL, payload BLOB NOT NULL)",
    "CREATE UNIQUE INDEX states_by_key ON states (namespace, key)",
    "CREATE TABLE uses (namespace INTEGER NOT NULL, collection_id TEXT NOT NULL, record_id TEXT NOT NULL, "
    "key BLOB NOT NULL, PRIMARY KEY (namespace, collection_id, record_id)) WITHOUT ROWID",
    "CREATE INDEX uses_by_key ON uses (namespace, key)",
    "PRAGMA application_id=1801546861",
    "PRAGMA user_version=1",
)
"""The tables of the first releases."""


@pytest.fixture
def earlier(path: Path) -> list[PassageStates]:
    """A store of 12 passages as the first releases wrote it."""
    path.parent.mkdir()
    states = make_many(12, LAYOUT)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        for statement in EARLIER:
            connection.execute(statement)
        connection.execute(
            "INSERT INTO namespaces (fingerprint, hidden_size, ratio, codec, state_dtype, format) VALUES (?,?,?,?,?,?)",
            (LAYOUT.fingerprint, LAYOUT.hidden_size, LAYOUT.ratio, "exact", "float32", 1),
        )
        insert_as_earlier(connection, states, refer(states))
    return states


def insert_as_earlier(connection: sqlite3.Connection, states: list[PassageStates], references: list[Reference]) -> None:
    for row in (make_row(one, LAYOUT) for one in states):
        connection.execute(
            "INSERT INTO states (namespace, key, tokens, found, checksum, payload) VALUES (1, ?, ?, ?, ?, ?) "
            "ON CONFLICT (namespace, key) DO NOTHING",
            (bytes.fromhex(row.key), *row[1:5]),
        )
    connection.executemany(
        "INSERT INTO uses (namespace, collection_id, record_id, key) VALUES (1, ?, ?, ?)",
        [(r.collection_id, r.record_id, bytes.fromhex(r.key)) for r in references],
    )


def test_files_of_earlier_releases_open(path: Path, earlier: list[PassageStates]) -> None:
    """Ages, scopes and the namespace's checksum came later: an old file gets them when it is opened for writing."""
    before = path.read_bytes()
    assert stored_layout(path, LAYOUT.fingerprint) == LAYOUT
    assert collection_layouts(path, "c") == [LAYOUT]
    with SqliteStore.open(path, LAYOUT, read_only=True) as store:
        assert store.get_many([s.key for s in earlier]).missing == []
        assert store.verify() == []
    assert path.read_bytes() == before
    check_kept(path, earlier)
    new = make_states("new", LAYOUT)
    with SqliteStore.open(path, LAYOUT) as store:
        store.put_many([new], refer([new], "new"), scope="/elsewhere")
        store.unreference("c", ["r0"])
        assert store.gc().states == 1  # never put again, so of no known age: old
        assert store.gc([]).states == 11
        assert store.collections() == {"new": 1}
    edit(path, "UPDATE namespaces SET ratio=5")
    with pytest.raises(StoreFormatError, match="doesn't match its checksum"):
        SqliteStore.open(path, LAYOUT)


def test_earlier_releases_go_on_writing_in_our_files(path: Path, filled: list[PassageStates]) -> None:
    """They name their columns, so a file that two releases share serves both."""
    more = make_many(2, LAYOUT, 100)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        insert_as_earlier(connection, more, refer(more, "theirs"))
        connection.execute(
            "INSERT INTO namespaces (fingerprint, hidden_size, ratio, codec, state_dtype, format) VALUES (?,?,?,?,?,?)",
            ("beef" * 16, 6, 4, "int8", "float32", 2),
        )
    check_kept(path, [*filled, *more])
    assert collection_layouts(path, "theirs") == [LAYOUT]
    edit(path, "UPDATE namespaces SET ratio=5 WHERE codec='int8'")
    with pytest.raises(StoreFormatError, match="doesn't match its checksum"):
        stored_layout(path, "beef" * 16)


def test_an_earlier_file_that_cannot_be_written_is_read(path: Path, earlier: list[PassageStates]) -> None:
    with sqlite3.connect(path, isolation_level=None) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked"):
            SqliteStore.open(path, LAYOUT, timeout=0.1)
        with SqliteStore.open(path, LAYOUT, timeout=0.1, read_only=True) as store:
            assert store.get_many([s.key for s in earlier]).missing == []
        holder.execute("ROLLBACK")
    holder.close()
    check_kept(path, earlier)


# Damage


@pytest.mark.parametrize("keep", [50, 4096, 0.5, 0.95], ids=str)
def test_truncated_file(path: Path, keep: float) -> None:
    states = make_many(200, LAYOUT)
    with SqliteStore.open(path, LAYOUT) as store:
        store.put_many(states, refer(states))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(int(keep * size) if keep < 1 else int(keep))
    with pytest.raises(StoreFormatError, match=r"kalm_states.sqlite3.*rebuilt from the texts"):
        with SqliteStore.open(path, LAYOUT) as store:
            store.get_many([s.key for s in states])


def test_foreign_files_are_left_alone(path: Path) -> None:
    path.parent.mkdir()
    edit(path, "CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(StoreFormatError, match="SQLite file of another program"):
        SqliteStore.open(path, LAYOUT)
    with pytest.raises(StoreFormatError, match="SQLite file of another program"):
        stored_layout(path, LAYOUT.fingerprint)
    assert path.read_bytes() == before
    text = path.with_name("notes.sqlite3")
    text.write_text("not a database, but longer than its header would be. " * 40)
    with pytest.raises(StoreFormatError, match=r"notes.sqlite3.*isn't a kalm_rag state store"):
        SqliteStore.open(text, LAYOUT)
    assert text.read_text().startswith("not a database")


def test_chromas_own_file_is_refused(tmp_path: Path) -> None:
    import chromadb

    chromadb.PersistentClient(str(tmp_path / "chroma"))
    with pytest.raises(StoreFormatError, match="another program"):
        open_store(tmp_path / "chroma" / "chroma.sqlite3", LAYOUT)


@pytest.mark.parametrize("where", ["folder", "file"])
def test_newer_versions(path: Path, filled: list[PassageStates], where: str) -> None:
    edit(path, "PRAGMA user_version=99")
    with pytest.raises(StoreFormatError, match=r"newer kalm_rag \(schema version 99.*Upgrade"):
        open_store(path.parent if where == "folder" else path, LAYOUT)
    edit(path, "PRAGMA user_version=1")
    edit(path, "UPDATE namespaces SET format=7")
    with pytest.raises(StoreFormatError, match="byte format 7; this release reads 2 at most"):
        SqliteStore.open(path, LAYOUT)


@pytest.mark.parametrize(
    "change",
    ["codec='zip'", "state_dtype='complex'", "ratio=0", "hidden_size='wide'", "ratio=5", "ratio=6", "codec='bf16'",
     "codec='int8'", "state_dtype='bfloat16'", "hidden_size=6", "format=2", "id=2"],
)  # fmt: skip
def test_damaged_namespace(path: Path, filled: list[PassageStates], change: str) -> None:
    edit(path, f"UPDATE namespaces SET {change}")
    with pytest.raises(StoreFormatError, match="damaged: namespace row"):
        SqliteStore.open(path, LAYOUT)


def test_lost_table(path: Path, filled: list[PassageStates]) -> None:
    edit(path, "DROP TABLE uses")
    with SqliteStore.open(path, LAYOUT) as store, pytest.raises(StoreFormatError, match="no such table"):
        store.collections()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("payload=zeroblob(length(payload))", "checksum"),
        ("payload=substr(payload, 2)", "bytes stored, wanted"),
        ("payload='text'", "wrong type"),
        ("tokens=tokens+1, found=found+1", "checksum|bytes stored"),
        ("found=found+1", "checksum"),
        ("tokens='many'", "wrong type"),
        ("tokens=0", "claims 0 tokens"),
        ("checksum=checksum+1", "checksum"),
    ],
)
def test_damaged_row_is_found_dropped_and_rebuilt(
    path: Path, filled: list[PassageStates], change: str, reason: str
) -> None:
    victim, good = filled[5], [s for s in filled if s is not filled[5]]
    edit(path, f"UPDATE states SET {change} WHERE key=?", (bytes.fromhex(victim.key),))
    with SqliteStore.open(path, LAYOUT) as store:
        with pytest.raises(StoreFormatError, match=rf"{victim.key[:12]}.*({reason}).*kalm-rag verify"):
            store.get_many([filled[0].key, victim.key])
        assert store.get_many([s.key for s in good]).missing == []
        assert store.verify() == [victim.key]
        store.put_many([victim])  # leaves the row: see put_many
        assert store.verify() == [victim.key]
        assert store.discard(store.verify()) == 1
        store.put_many([victim])
    check_kept(path, filled)


def test_damaged_key_in_a_row_is_mended(path: Path, filled: list[PassageStates]) -> None:
    """The index still has the right key, so dropping the row by the wrong one found nothing: verify never got clean."""
    data, key = path.read_bytes(), bytes.fromhex(filled[5].key)
    places = [i for i in range(len(data)) if data.startswith(key, i)]
    assert len(places) == 4  # the row, its index, the reference, its index
    place = max(i for i in places if i < data.index(pack_states(filled[5], LAYOUT)))  # in the row, before its payload
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with SqliteStore.open(path, LAYOUT) as store:
        wrong = store.verify()
        assert len(wrong) == 1
        assert wrong != [filled[5].key]
        assert store.discard(wrong) == 1
        assert store.missing([s.key for s in filled]) == {filled[5].key}
        store.put_many(filled)
    check_kept(path, filled)


def test_swapped_payloads_are_noticed(path: Path) -> None:
    """Two passages of the same length: lengths fit, only the checksum over the key can tell."""
    a, b = make_states("a", LAYOUT, 20), make_states("b", LAYOUT, 20)
    with SqliteStore.open(path, LAYOUT) as store:
        store.put_many([a, b])
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT id, found, checksum, payload FROM states ORDER BY id").fetchall()
    for (_, *values), (number, *_) in zip(rows, rows[::-1], strict=True):
        connection.execute("UPDATE states SET found=?, checksum=?, payload=? WHERE id=?", (*values, number))
    connection.commit()
    connection.close()
    with SqliteStore.open(path, LAYOUT) as store:
        assert sorted(store.verify()) == sorted([a.key, b.key])
        with pytest.raises(StoreFormatError, match="checksum"):
            store.get_many([a.key])


def test_any_flipped_byte_gives_an_error_or_a_miss_never_other_states(tmp_path: Path) -> None:
    """One byte changed: ratio 4 became 5 in the namespace row, and 38 of 40 scores were wrong without a word.

    Every byte of every row, of the trees' pages and of the file's header, one at a time; of the namespace row every
    bit. What is fetched is right, or isn't fetched; what can be mended is clean afterwards; only our errors come out.
    """
    layout = make_layout(hidden_size=2)
    states = [make_states(text, layout, 7) for text in "ab"]  # 7 tokens: two states at ratio 4 and at ratio 5
    whole = tmp_path / "whole.sqlite3"
    with SqliteStore.open(whole, layout) as store:
        store.put_many(states, refer(states), scope="/db")
    data = whole.read_bytes()
    row = data.index(layout.fingerprint.encode()) - 12  # the namespace row, with its cell's head
    changes = [(place, 1 << bit) for place in range(row, row + 12 + 64 + 24) for bit in range(8)]
    changes += [(place, 1 << place % 8) for place in changeable(data)]
    seen: Counter[str] = Counter()
    broken = tmp_path / "broken.sqlite3"
    for place, bits in changes:
        broken.write_bytes(data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :])
        seen[outcome(broken, layout, states, mend=place >= 4 * 4096)] += 1
        for leftover in tmp_path.glob("broken*"):
            leftover.unlink()
    firsts = ("right", "missing", "error")
    assert set(seen) <= {*firsts, *(f"{first}, {end}" for first in firsts for end in ("mended", "error"))}
    assert seen["right"] > 100, seen
    assert seen["error"] > 400, seen
    for first in firsts:
        assert seen[f"{first}, mended"] > 30, seen


def changeable(data: bytes) -> list[int]:
    """Places of the file's header, of what stands in its pages, and every fifth of the tables' own text."""
    text = [place for place in range(120, 4096) if data[place]][::5]
    return [*range(112), *text, *(i for i in range(4096, len(data)) if data[i] or i % 4096 < 12)]


def outcome(broken: Path, layout: Layout, states: list[PassageStates], mend: bool) -> str:
    """Open and fetch from a store of which one byte was changed; then mend and use it, as backfill and gc do."""
    keys = [s.key for s in states]
    try:
        stored = stored_layout(broken, layout.fingerprint)
        store = SqliteStore.open(broken, stored if stored is not None else layout)
    except KalmRagError:
        return "error"
    with store:
        try:
            fetched = store.get_many(keys)
            check_fetched(fetched, states)
            first = "missing" if fetched.missing else "right"
        except KalmRagError:
            first = "error"
        if not mend:
            return first
        try:
            list(store.references("c"))
            store.discard(store.verify())
            store.put_many(states, refer(states))
            assert store.verify() == []
            check_fetched(store.get_many(keys), states)
            assert {r.record_id: r.key for r in store.references("c")} == {r.record_id: r.key for r in refer(states)}
            store.unreference("c", ["r0"])
            store.gc(["c"], younger_than=0, scopes=["/db", ""])
        except KalmRagError:
            return f"{first}, error"
    return f"{first}, mended"


def check_fetched(fetched: Fetched, states: list[PassageStates]) -> None:
    for index, position in enumerate(fetched.found):
        assert fetched.batch is not None
        assert fetched.batch.ratio == states[position].ratio
        assert torch.equal(fetched.batch.vectors[index], states[position].vectors)
        assert int(fetched.batch.tokens[index]) == states[position].tokens
        assert int(fetched.batch.total_tokens[index]) == states[position].total_tokens


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("states", "key", b"short"),
        ("states", "key", "text"),
        ("states", "namespace", 77),
        ("states", "namespace", "text"),
        ("uses", "key", b"short"),
        ("uses", "key", "text"),
        ("uses", "record_id", "r0\x01"),
        ("uses", "collection_id", "k"),
    ],
)
def test_a_damaged_key_is_mended_around(
    path: Path, filled: list[PassageStates], table: str, column: str, value: object
) -> None:
    """A key that is none stopped verify with an AttributeError and backfill with a refusal, so nothing mended it.

    The index goes on as it was, as after a changed byte.
    """
    edit_row_only(path, table, column, value)
    with SqliteStore.open(path, LAYOUT) as store:
        list(store.references("c"))
        names = store.verify()
        assert len(names) == 1
        assert names[0] == "index" or names[0].startswith("row:")
        assert store.discard(names) == (1 if table == "states" else 0)
        assert store.verify() == []
        store.put_many(filled, refer(filled))
        assert store.verify() == []
        assert store.collections() == {"c": 12}
    check_kept(path, filled)


def edit_row_only(path: Path, table: str, column: str, value: object) -> None:
    """Change a row without its index: SQLite is told that there is none, and then of it again."""
    index = "states_by_key" if table == "states" else "uses_by_key"
    chosen = "id=5" if table == "states" else "record_id='r5'"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        entry = connection.execute("SELECT * FROM sqlite_master WHERE name=?", (index,)).fetchone()
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute("DELETE FROM sqlite_master WHERE name=?", (index,))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"UPDATE {table} SET {column}=? WHERE {chosen}", (value,))
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute("INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)", entry)


@pytest.mark.parametrize("timeout", [-1, "1", None, float("inf")])
def test_timeouts_that_are_none(path: Path, timeout: object) -> None:
    for call in (open_store, lambda at, layout, timeout: stored_layout(at, layout.fingerprint, timeout=timeout),
                 lambda at, _, timeout: collection_layouts(at, "c", timeout=timeout)):  # fmt: skip
        with pytest.raises(InputError, match=r"timeout is .*wanted seconds"):
            call(path, LAYOUT, timeout=timeout)  # type: ignore[operator]
    assert not path.parent.exists()


def test_names_that_are_no_rows(path: Path, filled: list[PassageStates]) -> None:
    with SqliteStore.open(path, LAYOUT) as store:
        for name in ("row:", "row:x", "row:-1", "row:" + "9" * 30):
            with pytest.raises(InputError, match="wanted a row number"):
                store.discard([name])
        with pytest.raises(InputError, match="sha256"):
            store.discard(["indices"])
        assert store.discard(["index", "row:999"]) == 0
    check_kept(path, filled)


# Read-only, full, locked


def test_read_only_reads_and_refuses_to_write(path: Path, filled: list[PassageStates]) -> None:
    new = make_states("new", LAYOUT)
    with SqliteStore.open(path, LAYOUT, read_only=True) as store:
        assert store.get_many([s.key for s in filled]).missing == []
        for call in (
            lambda: store.put_many([new]),
            lambda: store.unreference("c", ["r0"]),
            lambda: store.discard([filled[0].key]),
            lambda: store.gc([], younger_than=0),
        ):
            with pytest.raises(StoreError, match=r"read-only here, so nothing was written"):
                call()
        assert store.collections() == {"c": 12}
    check_kept(path, filled)


def test_read_only_makes_nothing(path: Path, filled: list[PassageStates], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="doesn't exist, and read_only=True makes none"):
        open_store(tmp_path / "new", LAYOUT, read_only=True)
    assert not (tmp_path / "new").exists()
    other = make_layout(fingerprint="beef" * 16)
    with SqliteStore.open(path, other, read_only=True) as store:
        assert store.missing([filled[0].key]) == {filled[0].key}
    assert stored_layout(path, other.fingerprint) is None
    with pytest.raises(StateMismatchError, match="ratio 4"):
        SqliteStore.open(path, make_layout(ratio=2), read_only=True)


@pytest.fixture
def frozen(path: Path, filled: list[PassageStates]) -> Iterator[Path]:
    """The filled store in a folder that can't be written, not by root either where chattr works."""
    targets = [path, path.parent]
    if os.geteuid() == 0:
        chattr = shutil.which("chattr")
        if chattr is None or subprocess.run([chattr, "+i", *targets], capture_output=True).returncode:
            pytest.skip("root may write everywhere here")
        yield path
        subprocess.run([chattr, "-i", *targets], check=True)
    else:
        path.chmod(0o400)
        path.parent.chmod(0o500)
        yield path
        path.parent.chmod(0o700)


@pytest.mark.parametrize("read_only", [False, True])
def test_read_only_folder(frozen: Path, filled: list[PassageStates], read_only: bool) -> None:
    with SqliteStore.open(frozen, LAYOUT, read_only=read_only) as store:
        assert store.get_many([s.key for s in filled]).missing == []
        assert store.verify() == []
        with pytest.raises(StoreError, match="read-only"):
            store.put_many([make_states("new", LAYOUT)])
    with SqliteStore.open(frozen, make_layout(fingerprint="beef" * 16)) as store:
        assert store.stats().other_namespaces == {LAYOUT.fingerprint: 12}
    assert stored_layout(frozen, LAYOUT.fingerprint) == LAYOUT
    with pytest.raises(StoreError, match="folder exists and can be read and written"):
        SqliteStore.open(frozen.with_name("new.sqlite3"), LAYOUT)


def test_log_in_a_read_only_folder_is_not_passed_over(tmp_path: Path, path: Path) -> None:
    """Copied while open: newest states are in the log only. Reading without it would give an older store, silently."""
    with SqliteStore.open(path, LAYOUT) as store:
        store.put_many(make_many(3, LAYOUT))
        copy = tmp_path / "copy" / path.name
        copy.parent.mkdir()
        for suffix in ("", "-wal"):
            shutil.copy(f"{path}{suffix}", f"{copy}{suffix}")
    assert Path(f"{copy}-wal").stat().st_size > 0
    with SqliteStore.open(copy, LAYOUT, read_only=True) as store:
        assert store.stats().states == 3


def test_path_below_a_file(tmp_path: Path) -> None:
    blocker = tmp_path / "file.txt"
    blocker.write_text("mine")
    with pytest.raises(StoreError, match="folder can't be made"):
        open_store(blocker / "below", LAYOUT)
    with pytest.raises(StoreError, match="is a file, not a folder"):
        open_store(blocker, LAYOUT)
    assert blocker.read_text() == "mine"


def test_full_disk_keeps_all_or_nothing(path: Path, filled: list[PassageStates]) -> None:
    many = [make_states(f"big {i}", LAYOUT, 4000) for i in range(60)]
    with SqliteStore.open(path, LAYOUT) as store:
        with (
            store._pool.borrow() as connection
        ):  # the limit belongs to a connection, and one thread gets the same again
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count={pages + 40}")
        with pytest.raises(StoreError, match=r"full.*nothing of this call was kept. Free space on this disk"):
            store.put_many(many, refer(many, "new"))
        assert store.missing([s.key for s in many]) == {s.key for s in many}
        assert store.collections() == {"c": 12}
        assert store.get_many([s.key for s in filled]).missing == []
        with store._pool.borrow() as connection:
            connection.execute("PRAGMA max_page_count=100000")
        store.put_many(many, refer(many, "new"))
    check_kept(path, [*filled, *many])


def test_locked_by_another_writer(path: Path, filled: list[PassageStates]) -> None:
    holder = sqlite3.connect(path, isolation_level=None)
    new = make_states("new", LAYOUT)
    with SqliteStore.open(path, LAYOUT, timeout=0.2) as store:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"locked.*try again, or open with a longer timeout"):
            store.put_many([new], refer([new], "late"))
        assert store.get_many([s.key for s in filled]).missing == []  # readers aren't held up
        holder.execute("COMMIT")
        holder.close()
        assert store.collections() == {"c": 12}
        store.put_many([new])
    check_kept(path, [*filled, new])


def test_optional_states_wait_as_long_as_told(path: Path, filled: list[PassageStates]) -> None:
    """The answer was ready, and the query waited 30 seconds for another writer only to keep a state."""
    new = make_states("new", LAYOUT)
    with (
        SqliteStore.open(path, LAYOUT) as store,
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder,
    ):
        holder.execute("BEGIN IMMEDIATE")
        start = time.monotonic()
        for wait in (0.05, 0):
            with pytest.raises(StoreError, match=r"locked.*Another process is writing"):
                store.put_many([new], wait=wait)
        assert time.monotonic() - start < 10  # of 30, the store's own
        with store._pool.borrow() as connection:  # the connection is as it was
            assert connection.execute("PRAGMA busy_timeout").fetchone()[0] == 30_000
        holder.execute("ROLLBACK")
        store.put_many([new], wait=0.05)
    check_kept(path, [*filled, new])


@pytest.mark.parametrize("read_only", [False, True])
def test_opening_a_locked_file_waits_as_long_as_told(path: Path, filled: list[PassageStates], read_only: bool) -> None:
    """Nobody may even read while another program holds the file for itself: each step of opening waited anew."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("PRAGMA locking_mode=EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        with pytest.raises(StoreError, match=r"locked.*longer timeout"):
            SqliteStore.open(path, LAYOUT, timeout=0.3, read_only=read_only)
        for call in (lambda: stored_layout(path, LAYOUT.fingerprint, timeout=0.3),
                     lambda: collection_layouts(path, "c", timeout=0.3)):  # fmt: skip
            with pytest.raises(StoreError, match=r"locked.*longer timeout"):
                call()
        assert time.monotonic() - start < 10  # of 30, the default, each
    check_kept(path, filled)


def test_a_file_that_is_being_made_has_no_layouts_yet(path: Path) -> None:
    """Whoever swept or opened a folder while another process made the file was told that it is broken."""
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as maker:
        maker.execute("PRAGMA journal_mode=WAL")
        maker.execute("PRAGMA application_id=0")  # writes the file's first page, and no table
        assert path.stat().st_size > 0
        assert stored_layout(path, LAYOUT.fingerprint) is None
        assert collection_layouts(path, "c") == []
        with pytest.raises(StoreFormatError, match="it is empty"):
            SqliteStore.open(path, LAYOUT, read_only=True)
    SqliteStore.open(path, LAYOUT).close()
    assert stored_layout(path, LAYOUT.fingerprint) == LAYOUT


def test_file_deleted_under_an_open_store(path: Path, filled: list[PassageStates]) -> None:
    store = SqliteStore.open(path, LAYOUT)
    store._pool._close_idle()
    shutil.rmtree(path.parent)
    with pytest.raises(StoreError, match="unable to open"):
        store.put_many(filled)
    assert not path.exists()
    store.close()


# Threads and processes


@pytest.mark.parametrize("there", [False, True], ids=["new file", "file of an earlier release"])
def test_threads_opening_a_file_at_once(path: Path, request: pytest.FixtureRequest, there: bool) -> None:
    """Whoever is first makes the tables, or adds what an earlier release's file lacks; the others find it done."""
    before = request.getfixturevalue("earlier") if there else []
    errors: list[BaseException] = []
    gate = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            gate.wait(20)
            with SqliteStore.open(path, LAYOUT) as store:
                store.put_many(make_many(3, LAYOUT, 100 + 3 * number))
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    check_kept(path, [*before, *make_many(24, LAYOUT, 100)])


def test_two_processes_writing_at_once(path: Path) -> None:
    body = """
        start = int(sys.argv[2])
        with SqliteStore.open(PATH, LAYOUT) as store:
            for turn in range(15):
                some = make_many(10, LAYOUT, start + 5 * turn)  # half of each batch is there already
                store.put_many(some, refer(some, f"c{start}-{turn}"))
                assert store.get_many([s.key for s in some]).missing == []
    """
    for process in [script(body, path, start) for start in (0, 40)]:
        process.finish()
    check_kept(path, make_many(120, LAYOUT))
    with SqliteStore.open(path, LAYOUT) as store:
        assert store.stats().states == 120
        assert store.stats().references == 300


def test_gc_beside_a_process_that_adds_loses_nothing(path: Path) -> None:
    """States of records just added went: 1,097 of 1,578 in a minute. States come first, then Chroma, then references.

    Both processes run until the writer is done; the collector knows no live collection, as if all were made after
    it had asked.
    """
    SqliteStore.open(path, LAYOUT).close()
    collector = script(
        """
        count = 0
        with SqliteStore.open(PATH, LAYOUT) as store:
            print("ready", flush=True)
            while not os.path.exists(PATH + ".done"):
                count += store.gc([]).states
        print(count)
        """,
        path,
    )
    assert collector.stdout.readline() == "ready\n"
    states = make_many(120, LAYOUT)
    with SqliteStore.open(path, LAYOUT) as store:
        for start in range(0, 120, 4):
            some = states[start : start + 4]
            store.put_many(some)
            assert store.missing([s.key for s in some]) == set()
            store.put_many([], refer(some, f"c{start}"))
        Path(f"{path}.done").touch()
        assert collector.finish() == "0\n"
        assert store.missing([s.key for s in states]) == set()
        assert store.stats().references == 120


def test_kill_in_the_middle_of_writing(path: Path) -> None:
    """Whatever put_many returned for is there after kill -9, and each batch is there whole or not at all."""
    process = script(
        """
        with SqliteStore.open(PATH, LAYOUT) as store:
            for turn in range(100_000):
                some = make_many(20, LAYOUT, 20 * turn)
                store.put_many(some, refer(some, f"c{turn}"))
                print(turn, flush=True)
        """,
        path,
    )
    for line in process.stdout:
        if int(line) >= 6:
            break
    time.sleep(0.003)
    rest = process.kill().split()
    done = max(int(turn) for turn in ["6", *rest]) + 1
    check_kept(path, make_many(20 * done, LAYOUT))
    with SqliteStore.open(path, LAYOUT) as store:
        counts = store.collections()
        assert set(counts.values()) == {20}
        assert len(counts) in (done, done + 1)  # one more may have been committed, but not told
        assert store.stats().states == 20 * len(counts)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_beside_busy_threads_loses_nothing(path: Path) -> None:
    """A child that inherits SQLite's table of locks skips locking; when the parent closes, its commits are lost.

    Seen with plain sqlite3: the child opens its own connection, the parent closes, the child commits: 3 rows of 5 gone.
    """
    process = script(
        """
        import threading
        store = SqliteStore.open(PATH, LAYOUT)
        store.put_many(make_many(5, LAYOUT))
        stop = threading.Event()
        def read():
            while not stop.is_set():
                assert store.missing([s.key for s in make_many(5, LAYOUT)]) == set()
        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        children, ready, go = [], os.pipe(), os.pipe()
        for number in range(3):
            child = os.fork()
            if child == 0:
                store.put_many(make_many(5, LAYOUT, 100 * number + 100))
                os.write(ready[1], b"x")
                os.read(go[0], 1)
                store.put_many(make_many(5, LAYOUT, 100 * number + 105))
                os._exit(0)
            children.append(child)
        for _ in children:
            os.read(ready[0], 1)
        stop.set()
        for thread in threads:
            thread.join()
        store.close()
        os.write(go[1], b"xxx")
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        """,
        path,
    )
    process.finish()
    check_kept(path, make_many(5, LAYOUT) + [s for n in (100, 200, 300) for s in make_many(10, LAYOUT, n)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_with_a_connection_in_use_leaves_it_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forking thread is itself inside the store: the child must come up with connections of its own."""
    process = script(
        """
        from kalm_rag.store import connections
        connections.FORK_WAIT = 0.1
        store = SqliteStore.open(PATH, LAYOUT)
        store.put_many(make_many(5, LAYOUT))
        with store._pool.borrow() as connection:
            child = os.fork()
            if child == 0:
                with store._pool.borrow() as own:
                    assert own is not connection
                assert store.missing([s.key for s in make_many(5, LAYOUT)]) == set()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        store.put_many(make_many(5, LAYOUT, 5))
        store.close()
        """,
        path,
    )
    process.finish()
    check_kept(path, make_many(10, LAYOUT))


def test_references_can_be_changed_while_they_are_read(path: Path, filled: list[PassageStates]) -> None:
    with SqliteStore.open(path, LAYOUT) as store:
        for reference in store.references("c"):
            store.unreference("c", [reference.record_id])
        assert store.collections() == {}
        assert store.missing([passage_key("passage 0")]) == set()
