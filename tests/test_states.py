"""Codecs and batches: what goes in comes out, and padding stays padding."""

from __future__ import annotations

import hashlib
import struct
import warnings
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_layout, make_states

from kalm_rag.errors import InputError, StateMismatchError, StateShapeError
from kalm_rag.states import (
    DTYPES,
    Codec,
    Layout,
    PassageStates,
    batch_states,
    merge_batches,
    pack_states,
    passage_key,
    quantise,
    unpack_batch,
)

FLOATS = ["float32", "float16", "bfloat16"]
LAYOUTS = st.builds(
    make_layout,
    hidden_size=st.integers(1, 9),
    ratio=st.integers(1, 5),
    codec=st.sampled_from(list(Codec)),
    state_dtype=st.sampled_from(FLOATS),
    keeps_token_ids=st.booleans(),
)


def slow_unpack(payload: bytes, layout: Layout, count: int) -> list[list[float]]:
    """One element after the other, with struct only."""
    code, size = {"float32": ("<f", 4), "float16": ("<e", 2), "int8": ("<b", 1), "bfloat16": ("", 2)}[
        str(layout.element).removeprefix("torch.")
    ]
    rows = []
    for n in range(count):
        row = []
        for h in range(layout.hidden_size):
            raw = payload[(n * layout.hidden_size + h) * size :][:size]
            # a bfloat16 is the upper half of a float32
            row.append(struct.unpack("<f", b"\0\0" + raw)[0] if not code else float(struct.unpack(code, raw)[0]))
        if layout.codec is Codec.INT8:
            scale = struct.unpack("<f", payload[count * layout.hidden_size + 4 * n :][:4])[0]
            row = [x * scale for x in row]
        rows.append(row)
    return rows


@settings(deadline=None, max_examples=80)
@given(layout=LAYOUTS, tokens=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_unpacking_agrees_with_a_slow_reference(layout: Layout, tokens: list[int]) -> None:
    states = [make_states(f"{i}", layout, t) for i, t in enumerate(tokens)]
    payloads = [pack_states(s, layout) for s in states]
    assert [len(p) for p in payloads] == [layout.payload_bytes(t) for t in tokens]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of read-only buffers
        batch = unpack_batch(payloads, tokens, [s.total_tokens for s in states], layout)
    assert batch.vectors.dtype is layout.element
    assert batch.vectors.shape == (len(tokens), max(-(-t // layout.ratio) for t in tokens), layout.hidden_size)
    restored, counts = batch.on(torch.device("cpu"), torch.float32)
    for index, (payload, one) in enumerate(zip(payloads, states, strict=True)):
        n = one.vectors.shape[0]
        assert torch.allclose(restored[index, :n], torch.tensor(slow_unpack(payload, layout, n)), rtol=1e-6, atol=0)
        assert not batch.vectors[index, n:].any()
        assert int(counts[index].sum()) == one.tokens
        if one.token_ids is not None:
            assert batch.token_ids is not None
            ids = one.token_ids.tolist()
            assert batch.token_ids[index].tolist() == ids + [0] * (max(tokens) - len(ids))
            assert payload[len(payload) - 2 * len(ids) :] == struct.pack(f"<{len(ids)}H", *ids)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3), min_size=1, max_size=6),
)
def test_int8_is_within_half_a_step_of_each_element(rows: list[list[float]]) -> None:
    vectors = torch.tensor(rows)
    q, scales = quantise(vectors)
    assert q.dtype is torch.int8
    error = (q.double() * scales[:, None].double() - vectors.double()).abs()
    assert (error <= scales[:, None].double() * (0.5 + 1e-4) + 1e-37).all()


def test_int8_by_hand() -> None:
    # max 2.54 -> scale 0.02; 1.0 / 0.02 = 50; -0.013 / 0.02 = -0.65 -> -1
    q, scales = quantise(torch.tensor([[2.54, 1.0, -0.013], [0.0, 0.0, 0.0]]))
    assert q.tolist() == [[127, 50, -1], [0, 0, 0]]
    assert scales.tolist() == pytest.approx([0.02, 0.0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_exact_codec_is_exact(dtype: str) -> None:
    layout = make_layout(state_dtype=dtype)
    one = make_states("a", layout, 30)
    batch = unpack_batch([pack_states(one, layout)], [30], [one.total_tokens], layout)
    assert batch.vectors.dtype is DTYPES[dtype]
    assert torch.equal(batch.vectors[0], one.vectors)


def test_batch_of_nothing() -> None:
    for codec in Codec:
        batch = unpack_batch([], [], [], make_layout(codec=codec))
        assert len(batch) == 0
        assert batch.vectors.shape == (0, 0, 12)


@pytest.mark.parametrize("change", [-1, 1, 4])
def test_payload_of_the_wrong_length(change: int) -> None:
    layout = make_layout()
    payload = bytes(layout.payload_bytes(8) + change)
    with pytest.raises(StateShapeError, match=rf"passage 0: {len(payload)} bytes stored, wanted 96 for 8 tokens"):
        unpack_batch([payload], [8], [8], layout)


def test_sizes_are_compared_before_anything_is_allocated() -> None:
    """A count of 2**40 tokens asked for petabytes before the payload's length was looked at."""
    layout = make_layout()
    payload = bytes(layout.payload_bytes(8))
    with pytest.raises(StateShapeError, match="passage 1: 96 bytes stored"):
        unpack_batch([payload, payload], [8, 2**40], [8, 2**40], layout)
    with pytest.raises(StateShapeError, match="passage 0: 0 bytes stored, wanted 0 for 0 tokens"):
        unpack_batch([b""], [0], [0], layout)


def test_a_layouts_checksum_covers_every_field() -> None:
    layout = make_layout()
    changes: list[dict[str, object]] = [
        {"fingerprint": "beef"}, {"hidden_size": 13}, {"ratio": 5}, {"codec": Codec.BF16}, {"state_dtype": "float16"},
        {"keeps_token_ids": True},
    ]  # fmt: skip
    assert {field for change in changes for field in change} == {f.name for f in fields(Layout)}
    assert len({layout.checksum, *(make_layout(**change).checksum for change in changes)}) == 1 + len(changes)


@pytest.mark.parametrize(
    "change",
    [{"ratio": 0}, {"ratio": "4"}, {"hidden_size": True}, {"codec": "int8"}, {"state_dtype": "complex64"}],
    ids=str,
)
def test_layouts_that_are_none(change: dict[str, object]) -> None:
    """A ratio read as text from a damaged companion was kept, and failed as a TypeError far from there."""
    (name,) = change
    with pytest.raises(InputError, match=rf"{name} (is )?.*wanted"):
        make_layout(**change)


def test_packing_doesnt_touch_the_states() -> None:
    for codec in Codec:
        one = make_states("a", make_layout(), 10)
        before = one.vectors.clone()
        pack_states(one, make_layout(codec=codec))
        assert torch.equal(one.vectors, before)


def test_strided_states_pack_by_value() -> None:
    layout = make_layout(ratio=1, hidden_size=2)
    wide = torch.arange(8.0).view(2, 4)
    one = PassageStates(
        vectors=wide[:, ::2], tokens=2, total_tokens=2, ratio=1, fingerprint=layout.fingerprint, key=passage_key("a")
    )
    assert pack_states(one, layout) == struct.pack("<4f", 0, 2, 4, 6)


def test_key_is_the_sha256_of_the_text() -> None:
    assert passage_key("Grüße") == hashlib.sha256(b"Gr\xc3\xbc\xc3\x9fe").hexdigest()


@pytest.mark.parametrize("shape", [(2, 3, 4), (5,), (2, 4), (0, 4)], ids=str)
def test_states_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(StateShapeError, match=r"wanted \(3, H\) for 9 tokens at ratio 4"):
        PassageStates(vectors=torch.zeros(shape), tokens=9, total_tokens=9, ratio=4, fingerprint="f", key="k")


def test_unknown_codec() -> None:
    with pytest.raises(InputError, match="wanted one of exact, bf16, int8"):
        Codec.parse("zip")


def test_pooling_further_pools_and_refuses() -> None:
    one = make_states("a", make_layout(ratio=2), 5)
    batch = batch_states([one])
    pooled, counts = batch.on(torch.device("cpu"), torch.float32, 4)
    assert (pooled.shape[1], counts.tolist()) == (2, [[4.0, 1.0]])
    assert torch.allclose(pooled[0, 0], one.vectors[:2].float().mean(0))
    assert torch.allclose(pooled[0, 1], one.vectors[2].float())
    assert torch.equal(batch.on(torch.device("cpu"), torch.float32, 2)[0][0], one.vectors.float())
    with pytest.raises(StateMismatchError, match="only multiples of 2"):
        batch.on(torch.device("cpu"), torch.float32, 3)


def test_words_are_laid_out_by_their_states() -> None:
    layout = make_layout(ratio=2, keeps_token_ids=True)
    states = [make_states("a", layout, 5), make_states("b", layout, 1)]
    batch = batch_states(states)
    (a, b, c, d, e), (f,) = (one.token_ids.tolist() for one in states if one.token_ids is not None)
    by_two = batch.token_ids_on(torch.device("cpu"))
    assert by_two is not None
    assert by_two.tolist() == [[[a, b], [c, d], [e, 0]], [[f, 0], [0, 0], [0, 0]]]
    by_four = batch.token_ids_on(torch.device("cpu"), 4)
    assert by_four is not None
    assert by_four.tolist() == [[[a, b, c, d], [e, 0, 0, 0]], [[f, 0, 0, 0], [0, 0, 0, 0]]]
    alone = batch.select([1]).token_ids_on(torch.device("cpu"))
    assert alone is not None
    assert alone.tolist() == [[[f, 0]]]  # cut with its states
    assert batch_states([make_states("a", make_layout())]).token_ids_on(torch.device("cpu")) is None
    with pytest.raises(StateMismatchError, match="only multiples of 2"):
        batch.token_ids_on(torch.device("cpu"), 3)


def test_words_that_dont_fit() -> None:
    layout = make_layout(keeps_token_ids=True)
    one = make_states("a", layout, 3)
    with pytest.raises(StateShapeError, match=r"token ids have shape \(2,\); wanted \(3,\)"):
        replace(one, token_ids=torch.tensor([1, 2]))
    with pytest.raises(InputError, match="run from 1 to 65536; wanted 0 to 65535"):
        pack_states(replace(one, token_ids=torch.tensor([1, 2, 1 << 16])), layout)
    with pytest.raises(StateMismatchError, match="come with no token ids"):
        pack_states(replace(one, token_ids=None), layout)
    with pytest.raises(StateMismatchError, match="come with token ids"):
        pack_states(one, make_layout())
    with pytest.raises(StateMismatchError, match="states 1"):  # never scored as if it had no words
        batch_states([one, replace(one, token_ids=None)])


def test_select_cuts_to_the_longest_row() -> None:
    layout = make_layout(codec=Codec.INT8)
    states = [make_states(f"{i}", layout, t) for i, t in enumerate([4, 20, 9])]
    batch = unpack_batch([pack_states(s, layout) for s in states], [4, 20, 9], [4, 20, 9], layout)
    chosen = batch.select([2, 0])
    assert chosen.vectors.shape == (2, 3, 12)
    assert chosen.tokens.tolist() == [9, 4]
    assert chosen.scales is not None
    assert batch.scales is not None
    assert torch.equal(chosen.vectors[0], batch.vectors[2, :3])
    assert torch.equal(chosen.scales[1], batch.scales[0, :3])
    assert len(batch.select([])) == 0


def test_merge_puts_rows_where_they_belong() -> None:
    layout = make_layout(codec=Codec.INT8, keeps_token_ids=True)
    states = [make_states(f"{i}", layout, t) for i, t in enumerate([4, 20, 9, 1])]

    def packed(rows: list[int]) -> object:
        some = [states[i] for i in rows]
        return unpack_batch(
            [pack_states(s, layout) for s in some], [s.tokens for s in some], [s.total_tokens for s in some], layout
        )

    whole = packed([0, 1, 2, 3])
    merged = merge_batches(4, [([3, 0], packed([3, 0])), ([1, 2], packed([1, 2]))])  # type: ignore[list-item]
    for name in ("vectors", "scales", "tokens", "total_tokens", "token_ids"):
        assert torch.equal(getattr(merged, name), getattr(whole, name)), name


def test_batching_fresh_states() -> None:
    layout = make_layout()
    states = [make_states(f"{i}", layout, t) for i, t in enumerate([4, 20])]
    batch = batch_states(states)
    stored = unpack_batch([pack_states(s, layout) for s in states], [4, 20], [s.total_tokens for s in states], layout)
    assert torch.equal(batch.vectors, stored.vectors)
    with pytest.raises(InputError, match="at least one"):
        batch_states([])
    with pytest.raises(StateMismatchError, match="states 1"):
        batch_states([states[0], make_states("b", make_layout(ratio=2))])
