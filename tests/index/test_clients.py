"""One writer at a time per folder, views that are old are opened again, and what was opened is closed."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import chromadb
import pytest
from processes import Script
from toy import IDS, QUERY, TEXTS, reopen, toy_vectors

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.errors import InputError, StoreError
from kalm_rag.index import clients
from kalm_rag.index.clients import Database

WRITER = """
import random, sys
from toy import reopen
name, rng = sys.argv[3], random.Random(sys.argv[3])
index = reopen(sys.argv[1], sys.argv[2])
print("ready", flush=True); sys.stdin.readline()
mine = []
for turn in range(12):
    ids = [f"{name}{turn}-{i}" for i in range(3)]
    index.add(ids, [f"{rng.choice(['bad face', 'cab', 'dad egg'])} {i}" for i in ids])
    mine += ids
    if turn % 4 == 3:
        index.delete(mine[:2]); del mine[:2]
print(" ".join(mine))
"""


def test_two_processes_that_write_lose_nothing(tmp_path: Path, tiny: Reranker, tiny_folder: Path) -> None:
    """Each keeps the vector index in memory: two that wrote at once left a collection no search worked on, for good."""
    reopen(tmp_path, tiny).close()
    two = [Script(WRITER, tmp_path, tiny_folder, name) for name in "ab"]
    for process in two:
        assert process.stdout.readline().strip() == "ready"
    for process in two:
        process.tell("go")
    wanted = {name for process in two for name in process.finish().split()}
    with reopen(tmp_path, tiny) as index:
        assert {h.id for h in index.query(QUERY, top_n=None, fetch_k=500)} == wanted
        assert len(wanted) == 60
        assert index.verify().clean


def test_a_reader_sees_what_another_process_wrote_after_refresh(
    tmp_path: Path, tiny: Reranker, tiny_folder: Path
) -> None:
    """A search never gave the new records, not even after close and open in the same process."""
    code = (
        "import sys; from toy import reopen\n"
        "reopen(sys.argv[1], sys.argv[2]).add([f'n{i}' for i in range(20)], [f'new {i}' for i in range(20)])"
    )
    with reopen(tmp_path, tiny) as reader, reopen(tmp_path, tiny) as other:
        reader.add(IDS, TEXTS)
        assert len(reader.query(QUERY, top_n=None)) == 4
        Script(code, tmp_path, tiny_folder).finish()
        assert len(reader.query(QUERY, top_n=None)) == 4  # what it saw when it was opened
        reader.refresh()
        assert len(reader.query(QUERY, top_n=None)) == 24
        assert len(other.query(QUERY, top_n=None)) == 4  # another door of this process goes on, on its own view
        other.add(["mine"], ["A text."])  # before it writes it catches up by itself
        assert len(other.query(QUERY, top_n=None)) == 25
        reader.refresh()
        assert reader.verify().clean
    with reopen(tmp_path, tiny) as again:
        assert len(again.query(QUERY, top_n=None)) == 25


def test_an_apps_client_with_an_old_view_may_not_write(tmp_path: Path, tiny: Reranker, tiny_folder: Path) -> None:
    """Its client can't be opened again from here, and writing with it would lose the other's vectors."""
    with reopen(tmp_path, tiny) as index:
        index.add(IDS, TEXTS)
    client = chromadb.PersistentClient(str(tmp_path))
    with ChromaIndex.open(client=client, model=tiny, embedder=toy_vectors) as index:
        index.query(QUERY)
        code = "import sys; from toy import reopen\nreopen(sys.argv[1], sys.argv[2]).add(['n'], ['new'])"
        Script(code, tmp_path, tiny_folder).finish()
        with pytest.raises(StoreError, match=r"another process has written .* since this client was opened"):
            index.add(["x"], ["Never written."])
        with pytest.raises(InputError, match="given its Chroma client"):
            index.refresh()
        assert index.query(QUERY).encoded == 0  # reading goes on
    client.close()
    with reopen(tmp_path, tiny) as index:
        assert index.verify().clean


def test_who_waits_too_long_is_told_and_writes_nothing(
    tmp_path: Path, tiny: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from kalm_rag.index.clients import Database\n"
        "with Database.open(sys.argv[1]).writing(): print('held', flush=True); sys.stdin.readline()"
    )
    with reopen(tmp_path, tiny) as index:
        index.add(IDS, TEXTS)
        holder = Script(code, tmp_path)
        assert holder.stdout.readline().strip() == "held"
        monkeypatch.setattr(index.home.database, "lock_seconds", 0.2)
        with pytest.raises(StoreError, match="another process has been writing"):
            index.add(["x"], ["Later."])
        assert len(index.query(QUERY)) == 4  # readers are never held up
        holder.kill()  # a dead writer's lock is free at once
        index.add(["x"], ["Now."])
        assert index.verify().clean


def test_threads_of_one_process_take_turns(tmp_path: Path, tiny: Reranker) -> None:
    with reopen(tmp_path, tiny) as index:
        threads = [threading.Thread(target=index.add, args=([f"t{n}"], [f"text {n}"])) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(index) == 6
        assert index.verify().clean


def test_folders_opened_and_closed_leave_nothing_open(tmp_path: Path, tiny: Reranker) -> None:
    """200 folders left 2,300 descriptors and 1,100 threads; a folder made again in one process failed."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("counts descriptors in /proc")

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def once(number: int) -> None:
        with reopen(tmp_path / str(number), tiny) as index:
            index.add(["a"], [TEXTS[0]])

    once(0)
    before = held()
    for number in range(1, 9):
        once(number)
    files, tasks = held()
    assert files <= before[0] + 4
    assert tasks <= before[1] + 4


def test_nothing_is_made_for_a_collection_that_is_not_there(tmp_path: Path, tiny: Reranker) -> None:
    """`create=False` raised, and left a states file, a database, and on a server a companion collection."""
    with pytest.raises(InputError, match="no Chroma database in"):
        reopen(tmp_path / "typo", tiny, create=False)
    assert not (tmp_path / "typo").exists()
    reopen(tmp_path / "db", tiny).close()
    there = sorted(p.name for p in (tmp_path / "db").iterdir())
    with pytest.raises(InputError, match="no collection 'typo'"):
        reopen(tmp_path / "db", tiny, collection="typo", create=False)
    assert sorted(p.name for p in (tmp_path / "db").iterdir()) == there


def test_foreign_errors_come_out_as_ours(tmp_path: Path, tiny: Reranker) -> None:
    with pytest.raises(InputError, match="collection 'x'"):
        reopen(tmp_path, tiny, collection="x")
    (tmp_path / "not").mkdir()
    (tmp_path / "not" / "chroma.sqlite3").write_text("no database at all, but text that is long enough to be read")
    with pytest.raises(StoreError, match="no Chroma database, or is damaged"):
        Database.open(tmp_path / "not")
    with reopen(tmp_path / "db", tiny) as index:
        index.add(IDS, TEXTS)
        for options, message in [
            ({"where": {"n": {"$about": 1}}}, "search: "),
            ({"where_document": {"contains": "x"}}, "search: "),
            ({"fetch_k": 32_001}, "fetch_k is 32001; wanted at most 32,000"),
        ]:
            with pytest.raises(InputError, match=message):
                index.query(QUERY, **options)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"id 0 is empty|ids\[0\] is empty"):
            index.add([""], ["x"])


@pytest.mark.parametrize("path", ["", "\0", b"x", 3, "x" * 5000, "a\ud800", "~nobody-of-this-name/x"], ids=repr)
def test_paths_that_are_none_are_told(tmp_path: Path, tiny: Reranker, path: Any) -> None:
    with pytest.raises(InputError, match=r"path is .* is no folder here|folder is (bytes|int); wanted the path"):
        reopen(path, tiny)
    with pytest.raises(InputError, match="store is int; wanted a StateStore"):
        reopen(tmp_path / "db", tiny, store=3)
    assert not (tmp_path / "db").exists()


def test_who_opens_again_gets_no_half_made_client(tmp_path: Path, tiny: Reranker) -> None:
    """Every second opening failed on what the first had left: 'RustBindingsAPI' object has no attribute 'bindings'."""
    file = tmp_path / "chroma.sqlite3"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE migrations (none_of_chromas TEXT)")
    for _ in range(2):
        with pytest.raises(StoreError, match=r"can't open the database .*no such column"):
            reopen(tmp_path, tiny)
    file.unlink()
    with reopen(tmp_path, tiny) as index:
        assert len(index) == 0


def test_nothing_is_written_where_no_room_is_left(
    tmp_path: Path, tiny: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk Chroma's add waited for ever in 2 of 36 tries; deleting goes on, which frees room."""
    with reopen(tmp_path, tiny) as index:
        index.add(IDS, TEXTS)
        before = index.store.stats()
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(clients.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
        for write in (index.add, index.upsert):
            with pytest.raises(StoreError, match="has 1 MB left; wanted 64 MB"):
                write(["new"], ["A new text."])
        assert index.store.stats() == before
        assert len(index) == len(IDS)
        assert index.upsert(IDS, TEXTS).unchanged == len(IDS)
        assert index.delete(IDS[:1]) == 1
        monkeypatch.undo()
        index.add(["new"], ["A new text."])
