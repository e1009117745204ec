"""States as bytes, to move them to another machine or store."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_documents import QUERY, TEXTS, documents

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, StateMismatchError, StoreFormatError
from kalm_rag.langchain import KaLMChroma, StateByteStore
from kalm_rag.store import Reference, open_store


def test_bytes_travel_between_stores_and_damage_is_named(tiny: Reranker, tmp_path: Path) -> None:
    for codec in ("exact", "int8"):
        source, target = (open_store(tmp_path / f"{codec}-{i}", tiny.layout(codec)) for i in range(2))
        states = tiny.encode(TEXTS)
        source.put_many(
            states, [Reference(collection_id="c", record_id=t, key=s.key) for t, s in zip(TEXTS, states, strict=True)]
        )
        values = StateByteStore(source, "c").mget(TEXTS)
        StateByteStore(target, "c").mset([(t, v) for t, v in zip(TEXTS, values, strict=True) if v is not None])
        keys = [s.key for s in states]
        before, after = (tiny.score(QUERY, s.get_many(keys).batch or []) for s in (source, target))
        assert before == after
        view, whole = StateByteStore(target, "c"), values[0] or b""
        with pytest.raises(InputError, match=r"value of 'x' is not what StateByteStore gives \(4 bytes\)"):
            view.mset([("x", b"oops")])
        with pytest.raises(StoreFormatError, match="value of 'x' holds"):
            view.mset([("x", whole[:-4])])
        with pytest.raises(StateMismatchError, match="model fingerprint"):
            view.mset([("x", whole[:5] + b"\0" * 16 + whole[21:])])
        source.close()
        target.close()


def test_gc_leaves_states_that_were_brought_in_as_bytes(chroma: KaLMChroma, tiny: Reranker) -> None:
    chroma.add_documents(documents(TEXTS[:1]))
    kept, made = open_store(":memory:", tiny.layout()), tiny.encode(TEXTS[1:2])
    kept.put_many(made, [Reference(collection_id="kalm_rag:bytes", record_id="x", key=made[0].key)])
    source = StateByteStore(kept)
    ours = StateByteStore(chroma.store)
    ours.mset([("x", source.mget(["x"])[0])])  # type: ignore[list-item]
    chroma.gc()
    assert ours.mget(["x"]) == source.mget(["x"])
