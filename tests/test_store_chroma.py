"""The companion collection, against a real Chroma server on the loopback."""

from __future__ import annotations

import json
from pathlib import Path

import chromadb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import chroma_client, make_layout, make_many, make_states, refer, running_chroma

from kalm_rag.errors import InputError, StateMismatchError, StoreError, StoreFormatError
from kalm_rag.states import Codec
from kalm_rag.store import open_store, stored_layout
from kalm_rag.store.chroma import ChromaStore, drop_companions
from kalm_rag.store.companion import (
    BODY_BYTES,
    batches,
    companion_name,
    is_reference,
    read_row,
    reference_id,
    state_record,
)
from kalm_rag.store.rows import damage, make_row

__all__ = ["chroma_client"]
LAYOUT = make_layout()


def companion(client: chromadb.ClientAPI, name: str) -> chromadb.Collection:
    return client.get_collection(companion_name(name, LAYOUT.fingerprint), embedding_function=None)


def test_names() -> None:
    assert companion_name("docs", "feed" * 16) == "docs-kalm-states-feedfeedfeedfeed"
    assert companion_name("", "feed" * 16) == "kalm-states-feedfeedfeedfeed"
    assert len(companion_name("x" * 512, "feed" * 16)) <= 512


def test_states_outlive_the_client_and_the_server(tmp_path: Path) -> None:
    states = make_many(6, LAYOUT)
    with running_chroma(tmp_path) as client, open_store(client, LAYOUT, name="docs") as store:
        store.put_many(states, refer(states))
    with running_chroma(tmp_path) as client, open_store(client, LAYOUT, name="docs") as store:
        batch = store.get_many([s.key for s in states]).batch
        assert store.verify() == []
        assert store.collections() == {"c": 6}
    assert batch is not None
    for index, one in enumerate(states):
        assert torch.equal(batch.vectors[index, : one.vectors.shape[0]], one.vectors)


def test_no_model_is_fetched_and_the_dummy_vector_is_there(chroma_client: chromadb.ClientAPI) -> None:
    with open_store(chroma_client, LAYOUT, name="dummy") as store:
        store.put_many(make_many(2, LAYOUT))
    collection = companion(chroma_client, "dummy")
    assert collection.configuration_json["embedding_function"] is None
    assert [list(e) for e in collection.get(include=["embeddings"])["embeddings"]] == [[0.0], [0.0]]


def test_large_writes_are_cut_into_calls(chroma_client: chromadb.ClientAPI) -> None:
    """55 MB of base64 in one body is refused by the server (413); in calls of at most 8 MiB it passes."""
    layout = make_layout(hidden_size=1024, fingerprint="b16" * 20)
    states = [make_states(f"big {i}", layout, 4 * 500) for i in range(20)]  # 2 MB each
    with open_store(chroma_client, layout, name="big") as store:
        store.put_many(states, refer(states))
        fetched = store.get_many([s.key for s in states])
    assert fetched.missing == []
    assert fetched.batch is not None
    assert torch.equal(fetched.batch.vectors[16], states[16].vectors)


def test_batches_keep_both_limits() -> None:
    records = [
        (f"s:{i}", {"payload": "x" * size})
        for i, size in enumerate([100] * 25 + [BODY_BYTES // 2] * 3 + [BODY_BYTES * 2])
    ]
    cut = list(batches(records, 10))
    assert [r for batch in cut for r in batch] == records
    for batch in cut:
        assert 1 <= len(batch) <= 10
        assert len(batch) == 1 or sum(len(f["payload"]) for _, f in batch) <= BODY_BYTES
    assert list(batches([], 10)) == []


def test_states_are_written_before_references(
    chroma_client: chromadb.ClientAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off in between, the store must hold states without references, never references to states never written."""
    states = make_many(3, LAYOUT)
    store = ChromaStore.open(chroma_client, LAYOUT, name="order")
    with monkeypatch.context() as patch:
        patch.setattr(type(store._collection), "upsert", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("cut")))
        with pytest.raises(StoreError, match=r"can't be reached \(ConnectionError: cut\)"):
            store.put_many(states, refer(states))
    assert store.missing([s.key for s in states]) == set()
    assert store.collections() == {}
    assert store.gc(younger_than=0).states == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"payload": "AAAA"}, "bytes stored"), ({"payload": "%"}, "bytes stored"), ({"tokens": "x"}, "wrong type"),
     ({"checksum": 1}, "checksum")],
)  # fmt: skip
def test_damaged_record(chroma_client: chromadb.ClientAPI, change: dict[str, object], reason: str) -> None:
    states = make_many(3, LAYOUT)
    with open_store(chroma_client, LAYOUT, name="damage") as store:
        store.put_many(states)
        companion(chroma_client, "damage").update(ids=["s:" + states[1].key], metadatas=[change])
        with pytest.raises(StoreFormatError, match=rf"{states[1].key[:12]}.*{reason}"):
            store.get_many([s.key for s in states])
        assert store.get_many([states[0].key]).missing == []
        assert store.verify() == [states[1].key]
        assert store.discard(store.verify()) == 1
        store.put_many(states)
        assert store.verify() == []


@pytest.mark.parametrize("change", [{"record_id": None}, {"record_id": "2"}, {"key": "short"}, {"collection_id": 7}])
def test_damaged_reference(chroma_client: chromadb.ClientAPI, change: dict[str, object]) -> None:
    """A reference that couldn't be read stopped backfill before it mended anything."""
    states = make_many(2, LAYOUT)
    references = refer(states)
    with open_store(chroma_client, LAYOUT, name="reference") as store:
        store.put_many(states, references)
        broken = reference_id("c", "r1")
        companion(chroma_client, "reference").update(ids=[broken], metadatas=[change])
        if change == {"record_id": None}:
            with pytest.raises(StoreFormatError, match=r"lacks 'record_id'.*backfill"):
                list(store.references("c"))
        assert store.verify() == [f"row:{broken}"]
        assert store.discard(store.verify()) == 0
        assert store.verify() == []
        assert store.collections() == {"c": 1}
        store.put_many([], references)
        assert store.collections() == {"c": 2}


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8)


@settings(deadline=None, max_examples=300)
@given(changes=st.dictionaries(st.sampled_from(["tokens", "found", "checksum", "payload", "kind"]), ANYTHING))
def test_any_change_of_a_record_is_damage_or_none(changes: dict[str, object]) -> None:
    """Records come from a server: whatever is in them, it is judged, never raised as a foreign error."""
    row = make_row(make_states("a", LAYOUT), LAYOUT)
    record_id, fields = state_record(row, 0)
    read = read_row(record_id, {**fields, **changes})
    told = damage(read, LAYOUT)
    assert told is None or isinstance(told, str)
    assert told is not None or (read.tokens, read.total_tokens, read.payload) == row[1:3] + row[4:5]
    assert not is_reference(record_id, {**fields, **changes})


def test_damaged_id_of_a_record_is_mended(chroma_client: chromadb.ClientAPI) -> None:
    states = make_many(2, LAYOUT)
    with open_store(chroma_client, LAYOUT, name="ids") as store:
        store.put_many(states)
        collection = companion(chroma_client, "ids")
        fields = collection.get(ids=["s:" + states[0].key])["metadatas"][0]
        collection.add(ids=["s:\x01"], embeddings=[[0.0]], metadatas=[fields])
        assert store.verify() == ["row:s:\x01"]
        assert store.discard(store.verify()) == 1
        assert store.verify() == []
        assert store.missing([s.key for s in states]) == set()


@pytest.mark.parametrize("change", ['"ratio": 5', '"hidden_size": 24', '"codec": "bf16"', '"state_dtype": "float16"'])
def test_changed_layout_of_a_companion_is_noticed(chroma_client: chromadb.ClientAPI, change: str) -> None:
    """Ratio 5 for 4 in the companion's metadata was adopted, and gave other states without a word."""
    name = companion_name("marks", LAYOUT.fingerprint)
    open_store(chroma_client, LAYOUT, name="marks").close()
    collection = companion(chroma_client, "marks")
    fields = json.loads(str(collection.metadata["kalm_layout"]))
    text = json.dumps(fields | json.loads("{" + change + "}"))
    collection.modify(metadata={**collection.metadata, "kalm_layout": text})
    with pytest.raises(StoreFormatError, match="is damaged: its layout doesn't match its checksum"):
        stored_layout(chroma_client, LAYOUT.fingerprint, name="marks")
    with pytest.raises(StoreFormatError, match="doesn't match its checksum"):
        open_store(chroma_client, LAYOUT, name="marks")
    chroma_client.delete_collection(name)


def test_companions_of_earlier_releases_open_and_get_a_checksum(chroma_client: chromadb.ClientAPI) -> None:
    open_store(chroma_client, LAYOUT, name="earlier").close()
    collection = companion(chroma_client, "earlier")
    collection.modify(metadata={k: v for k, v in collection.metadata.items() if k != "kalm_checksum"})
    assert stored_layout(chroma_client, LAYOUT.fingerprint, name="earlier") == LAYOUT
    open_store(chroma_client, LAYOUT, name="earlier", read_only=True).close()
    assert "kalm_checksum" not in companion(chroma_client, "earlier").metadata
    open_store(chroma_client, LAYOUT, name="earlier").close()
    assert companion(chroma_client, "earlier").metadata["kalm_checksum"] == LAYOUT.checksum


def test_foreign_and_newer_companions_are_left_alone(chroma_client: chromadb.ClientAPI) -> None:
    name = companion_name("foreign", LAYOUT.fingerprint)
    for marks, message in (
        (None, "not a kalm_rag state store"),
        ({"mine": 1}, "not a kalm_rag state store"),
        ({"kalm_schema": 9, "kalm_layout": "[]"}, r"newer kalm_rag \(schema 9"),
        ({"kalm_schema": 1, "kalm_layout": "[]"}, "not a kalm_rag state store"),
    ):
        chroma_client.create_collection(name, metadata=marks, embedding_function=None)
        with pytest.raises(StoreFormatError, match=message):
            open_store(chroma_client, LAYOUT, name="foreign")
        chroma_client.delete_collection(name)
    open_store(chroma_client, LAYOUT, name="foreign").close()
    assert stored_layout(chroma_client, LAYOUT.fingerprint, name="foreign") == LAYOUT


def test_read_only(chroma_client: chromadb.ClientAPI) -> None:
    states = make_many(2, LAYOUT)
    with open_store(chroma_client, LAYOUT, name="ro", read_only=True) as store:
        assert store.missing([states[0].key]) == {states[0].key}
        assert store.stats().states == 0
        assert store.verify() == []
    assert stored_layout(chroma_client, LAYOUT.fingerprint, name="ro") is None
    with open_store(chroma_client, LAYOUT, name="ro") as store:
        store.put_many(states, refer(states))
    with open_store(chroma_client, LAYOUT, name="ro", read_only=True) as store:
        assert store.get_many([s.key for s in states]).missing == []
        for call in (
            lambda: store.put_many(states),
            lambda: store.gc([], younger_than=0),
            lambda: store.unreference("c", ["r0"]),
        ):
            with pytest.raises(StoreError, match="opened read-only"):
                call()
        assert store.stats().references == 2
    with pytest.raises(StateMismatchError, match="codec exact"):
        open_store(chroma_client, make_layout(codec=Codec.INT8), name="ro", read_only=True)


def test_companion_deleted_under_an_open_store(chroma_client: chromadb.ClientAPI) -> None:
    states = make_many(1, LAYOUT)
    store = open_store(chroma_client, LAYOUT, name="gone")
    chroma_client.delete_collection(companion_name("gone", LAYOUT.fingerprint))
    with pytest.raises(StoreError, match="is gone"):
        store.put_many(states)
    with open_store(chroma_client, LAYOUT, name="gone") as again:
        again.put_many(states)
        assert again.verify() == []


def test_server_that_stopped(tmp_path: Path) -> None:
    with running_chroma(tmp_path) as client:
        store = open_store(client, LAYOUT, name="docs")
    with pytest.raises(StoreError, match="can't be reached"):
        store.get_many([make_states("a", LAYOUT).key])
    with pytest.raises(StoreError, match="can't be reached"):
        open_store(client, LAYOUT, name="docs")


def test_two_stores_of_one_server_see_each_other(chroma_client: chromadb.ClientAPI) -> None:
    states = make_many(4, LAYOUT)
    with open_store(chroma_client, LAYOUT, name="two") as one, open_store(chroma_client, LAYOUT, name="two") as two:
        one.put_many(states[:3], refer(states[:3], "a"))
        two.put_many(states[1:], refer(states[1:], "b"))
        assert one.missing([s.key for s in states]) == set()
        assert one.collections() == {"a": 3, "b": 3}
        assert one.stats().states == 4


def test_companions_of_a_deleted_collection_go(chroma_client: chromadb.ClientAPI) -> None:
    """Deleting a collection left its companion, with all states of the deleted texts, for good."""
    other = make_layout(fingerprint="beef" * 16)
    for layout in (LAYOUT, other):
        open_store(chroma_client, layout, name="secret").close()
        open_store(chroma_client, layout, name="secret-too").close()
    chroma_client.create_collection("secret-kalm-states-mine", metadata={"mine": 1}, embedding_function=None)
    dropped = drop_companions(chroma_client, "secret")
    assert sorted(dropped) == sorted(companion_name("secret", x.fingerprint) for x in (LAYOUT, other))
    assert stored_layout(chroma_client, LAYOUT.fingerprint, name="secret") is None
    assert stored_layout(chroma_client, LAYOUT.fingerprint, name="secret-too") == LAYOUT
    assert "secret-kalm-states-mine" in [c.name for c in chroma_client.list_collections()]
    assert drop_companions(chroma_client, "secret") == []
    with pytest.raises(InputError, match="name is ''"):
        drop_companions(chroma_client, "")


def test_companions_that_two_long_names_share_stay(chroma_client: chromadb.ClientAPI) -> None:
    chroma_client.create_collection("x" * 400 + "2", embedding_function=None)
    open_store(chroma_client, LAYOUT, name="x" * 400 + "1").close()
    assert drop_companions(chroma_client, "x" * 400 + "1") == []
    chroma_client.delete_collection("x" * 400 + "2")
    assert len(drop_companions(chroma_client, "x" * 400 + "1")) == 1


def test_gc_keeps_its_place_in_pages_that_shrink(
    chroma_client: chromadb.ClientAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory stays flat: states are looked at page by page, while what is unused goes from the pages before."""
    monkeypatch.setattr("kalm_rag.store.chroma.PAGE_IDS", 7)
    monkeypatch.setattr("kalm_rag.store.chroma.READ_IDS", 3)
    states = make_many(60, LAYOUT)
    used = [s for i, s in enumerate(states) if i % 3 or i > 45]
    with open_store(chroma_client, LAYOUT, name="pages") as store:
        store.put_many(states, refer(used, "c") + refer(states[:20], "gone"))
        assert store.gc(["c"], younger_than=0).states == len(states) - len(used)
        assert store.missing([s.key for s in states]) == {s.key for s in states} - {s.key for s in used}
        assert store.collections() == {"c": len(used)}
        assert store.gc([], younger_than=0).states == len(used)
        assert store.stats().states == 0
