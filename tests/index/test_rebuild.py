"""A collection whose vector index is broken is made again out of its own records; kills lose nothing."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from processes import Script
from toy import QUERY, reopen, toy_vectors

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.errors import StoreError
from kalm_rag.index import rebuilding

WORDS = "bad face cab dad egg ace bed fig hag jig".split()


def passages(count: int) -> list[str]:
    return [f"{WORDS[n % 10]} {WORDS[n // 10 % 10]} {n}" for n in range(count)]


def break_vectors(folder: Path) -> None:
    """As a writer that was killed while Chroma wrote its files."""
    (vectors,) = (path.parent for path in folder.glob("*-*/header.bin"))
    vectors.rename(vectors.with_suffix(".away"))


@pytest.mark.parametrize("bundled", [False, True], ids=["embedder", "bundled"])
def test_a_broken_index_is_told_and_made_again(
    tmp_path: Path, tiny: Reranker, pico: Reranker, bundled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, object] = {} if bundled else {"embedder": toy_vectors}
    model, count = (pico, 1100) if bundled else (tiny, 1100)  # Chroma writes vectors to disk every 1,000 records
    with ChromaIndex.open(tmp_path, model=model, **options) as index:  # type: ignore[arg-type]
        index.add([str(n) for n in range(count)], passages(count), [{"n": n} for n in range(count)])
        want = index.query(QUERY, top_n=None, fetch_k=30, where={"n": {"$lt": 30}}).hits
        assert len(want) == 30
    break_vectors(tmp_path)
    with ChromaIndex.open(tmp_path, model=model, **options) as index:  # type: ignore[arg-type]
        assert "vectors can't be read" in caplog.text or bundled  # told at opening, where vectors are compared
        assert len(index.verify().unfindable) > 900
        with pytest.raises(StoreError, match=r"vector index is broken.*rebuild\(\) or `kalm-rag repair`"):
            index.add(["new"], ["Another text."])
        report = index.rebuild()
        assert (report.records, report.encoded) == (count, 0)
        assert index.verify().clean
        got = index.query(QUERY, top_n=None, fetch_k=30, where={"n": {"$lt": 30}}, missing="raise").hits
        assert {h.id: h.margin for h in got} == {h.id: h.margin for h in want}
        assert index.query(QUERY, where={"n": 7}, fetch_k=5).hits[0].id == "7"
        index.gc(younger_than=0)
    with ChromaIndex.open(tmp_path, model=model, **options) as index:  # type: ignore[arg-type]
        assert index.verify().clean
        assert len(index) == count


def test_a_rebuild_that_dies_is_begun_again_or_finished(
    tmp_path: Path, tiny: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reopen(tmp_path, tiny) as index:
        index.add([str(n) for n in range(20)], passages(20))
        with monkeypatch.context() as patch:
            patch.setattr(rebuilding, "_copy", _die)
            with pytest.raises(KeyboardInterrupt):
                index.rebuild()
        assert len(index) == 20
        assert index.rebuild().kept == 20
        with monkeypatch.context() as patch:
            patch.setattr(rebuilding, "_take_name", _die)  # the old one is deleted, the new one has no name yet
            with pytest.raises(KeyboardInterrupt):
                index.rebuild()
    with reopen(tmp_path, tiny, create=False) as index:
        assert index.verify().clean
        assert len(index) == 20


def _die(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


VICTIM = """
import random, sys
from toy import reopen
from test_rebuild import passages
seed = int(sys.argv[3]); rng = random.Random(seed)
with reopen(sys.argv[1], sys.argv[2]) as index:
    print("ready", flush=True)
    for turn in range(1000):
        rows = rng.sample(range(400), 25)
        act = rng.choice(["upsert", "upsert", "upsert", "gc", "backfill"])
        if act == "gc": index.gc(younger_than=0)
        elif act == "backfill": index.backfill()
        else: index.upsert([f"r{n}" for n in rows], [passages(400)[n] for n in rows])
        print(act, *rows if act == "upsert" else [], flush=True)
"""


def kills(path: Path, model: Path, count: int, seed: int) -> set[str]:
    """Kill a writer again and again; give the ids whose writing was acknowledged."""
    rng, acknowledged = random.Random(seed), set()
    for kill in range(count):
        process = Script(VICTIM, path, model, seed * 1000 + kill)
        assert process.stdout.readline().strip() == "ready"
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.3))  # anywhere in a later turn
        for line in process.kill().splitlines():
            act, *rows = line.split()
            acknowledged |= {f"r{n}" for n in rows} if act == "upsert" else set()
    return acknowledged


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_kills_lose_nothing_that_was_acknowledged(
    tmp_path: Path, tiny: Reranker, tiny_folder: Path, count: int
) -> None:
    acknowledged = kills(tmp_path, tiny_folder, count, seed=count)
    with reopen(tmp_path, tiny) as index:
        report = index.verify()
        assert not report.damaged
        if not report.clean:
            index.rebuild()
            index.backfill()
        assert index.verify().clean
        result = index.query(QUERY, top_n=None, fetch_k=500)
        assert acknowledged <= {h.id for h in result}
        hits = [h for h in result if h.text is not None][:50]
        want = tiny.score(QUERY, tiny.encode([str(h.text) for h in hits]))
        assert [h.margin for h in hits] == pytest.approx([r.margin for r in want], rel=1e-4, abs=1e-4)
