"""States as bytes, to move them to another machine or store."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_documents import QUERY, TEXTS, documents
from stores import make_states

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, StateMismatchError, StoreFormatError
from kalm_rag.langchain import KaLMChroma, StateByteStore
from kalm_rag.states import Codec, Layout
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
    chroma.gc(younger_than=0)
    assert ours.mget(["x"]) == source.mget(["x"])


LAYOUT = Layout(fingerprint="ab" * 16, hidden_size=384, ratio=4, codec=Codec.EXACT, state_dtype="float16")


def value_of(tokens: int, total_tokens: int, payload: bytes = b"", fingerprint: str = LAYOUT.fingerprint) -> bytes:
    return struct.pack("<5s16s32sQQ", b"kalm1", bytes.fromhex(fingerprint), b"k" * 32, tokens, total_tokens) + payload


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (value_of(1 << 22, 1 << 22, fingerprint="cd" * 16), StateMismatchError, f"fingerprint {'cd' * 16}"),
        (value_of(1 << 40, 1 << 40, fingerprint="cd" * 16), StateMismatchError, f"fingerprint {'cd' * 16}"),
        (value_of(1 << 40, 1 << 40), StoreFormatError, r"holds 0 bytes of states; wanted \d+ for 1099511627776"),
        (value_of(4, 1 << 63, bytes(768)), StoreFormatError, "for 4 of 9223372036854775808 tokens"),
        (value_of(4, 3, bytes(768)), StoreFormatError, "for 4 of 3 tokens"),
        (value_of(0, 0), StoreFormatError, "for 0 of 0 tokens"),
        ("text", InputError, r"not what StateByteStore gives \(str\)"),
        (None, InputError, r"not what StateByteStore gives \(NoneType\)"),
    ],
)
def test_a_values_sizes_are_checked_before_anything_is_allocated(
    value: object, error: type[Exception], message: str
) -> None:
    """69 bytes that claim four million tokens of another model made the byte store allocate gigabytes."""
    view = StateByteStore(open_store(":memory:", LAYOUT))
    tracemalloc.start()
    with pytest.raises(error, match=message):
        view.mset([("r", value)])  # type: ignore[list-item]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20, f"{peak} bytes allocated for {message}"
    assert list(view.yield_keys()) == []


def test_every_changed_byte_of_a_value_is_noticed(tiny: Reranker) -> None:
    """Moved through another store, a value had no checksum: a changed byte in its vectors was taken for states."""
    source, target = open_store(":memory:", tiny.layout()), open_store(":memory:", tiny.layout())
    source.put_many(
        (made := tiny.encode(["Honey is sweet."])), [Reference(collection_id="c", record_id="1", key=made[0].key)]
    )
    (value,) = StateByteStore(source, "c").mget(["1"])
    assert value is not None
    view = StateByteStore(target, "c")
    for place in range(len(value)):
        for change in (1, 0x80):
            with pytest.raises((InputError, StoreFormatError, StateMismatchError), match="value of '1'"):
                view.mset([("1", value[:place] + bytes([value[place] ^ change]) + value[place + 1 :])])
    old = b"kalm1" + value[5:-4]  # as the first releases gave it
    view.mset(iter([("1", old)]))
    assert view.mget(iter(["1"])) == [value]


def test_bytes_of_another_ratio_are_refused(tiny: Reranker) -> None:
    """A passage of 7 tokens has two states at ratio 4 and at ratio 5: the sizes fit, the states don't."""
    layout = replace(LAYOUT, hidden_size=12, state_dtype="float32")
    states = make_states("a", layout, 7)
    source = open_store(":memory:", layout)
    source.put_many([states], [Reference(collection_id="c", record_id="1", key=states.key)])
    (value,) = StateByteStore(source, "c").mget(["1"])
    for change in ({"ratio": 5}, {"ratio": 6}):
        with pytest.raises(StoreFormatError, match="of another ratio or codec than"):
            StateByteStore(open_store(":memory:", replace(layout, **change)), "c").mset([("1", value)])  # type: ignore[list-item]


def test_one_string_is_no_list_of_keys(tiny: Reranker) -> None:
    view = StateByteStore(open_store(":memory:", tiny.layout()))
    for call in (view.mget, view.mdelete):
        with pytest.raises(InputError, match="keys is one string"):
            call("abc")
    with pytest.raises(InputError, match="key_value_pairs is a dict"):
        view.mset({"a": b""})  # type: ignore[arg-type]
