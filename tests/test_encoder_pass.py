"""Encoding on several devices and in several windows: the same states in the same order, each passage once."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kalm_rag.engine import encoder_pass as encoding
from kalm_rag.engine import reranker
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.lazy_engine import EngineSpec, spec_of
from kalm_rag.models import registry
from kalm_rag.models.devices import parse_devices
from kalm_rag.states import PassageStates


def mixed(count: int) -> list[str]:
    """Texts of 0 to 60 words, some of them twice, in no order of length."""
    draw = random.Random(0)
    texts = [
        " ".join(draw.choice(["tea", "iron", "bees", "Paris"]) for _ in range(draw.randrange(60))) for _ in range(count)
    ]
    return texts + texts[: count // 5]


def alike(found: Sequence[PassageStates], wanted: Sequence[PassageStates]) -> None:
    assert [s.key for s in found] == [s.key for s in wanted]
    assert [(s.tokens, s.total_tokens) for s in found] == [(s.tokens, s.total_tokens) for s in wanted]
    assert all(torch.equal(a.vectors, b.vectors) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["tiny", "pico"])
def test_two_devices_give_what_one_gives(name: str, tiny_folder: Path, request: pytest.FixtureRequest) -> None:
    one: Reranker = request.getfixturevalue(name)
    texts = mixed(60)
    used: set[int] = set()
    rows: list[int] = []
    both = threading.Barrier(2, timeout=60)  # broken unless two batches run at the same time
    with Reranker.from_pretrained(
        "pico" if name == "pico" else str(tiny_folder), device=["cpu", "cpu"], batch_size=8
    ) as two:
        plain = two.backbone.encode

        def encode(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
            if len(used) < 2:
                used.add(threading.get_ident())
                both.wait()
            rows.append(len(ids))
            return plain(ids)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(two.backbone, "encode", encode)
            found = two.encode(texts)
        assert len(used) == 2
        assert threading.get_ident() not in used
        assert sum(rows) == len(set(texts))  # nothing twice
        assert two.devices == [torch.device("cpu")] * 2
        assert two.at(8).devices == two.devices
    alike(found, Reranker(one.backbone, batch_size=8).encode(texts))


def test_keys_at_hand_are_not_made_again(tiny: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looked for stored states has hashed each text already."""
    texts = mixed(10)
    want = tiny.encode(texts)
    monkeypatch.setattr(reranker, "passage_key", None)
    alike(tiny.encode(texts, keys=[states.key for states in want]), want)


def test_windows_are_tokenised_ahead_and_change_nothing(tiny: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = mixed(40)
    want = tiny.encode(texts)
    monkeypatch.setattr(encoding, "WINDOW", 8)
    begun, order = threading.Event(), []
    tokenize, encode = tiny.backbone.tokenize, tiny.backbone.encode

    def noted_tokenize(passages: Sequence[str]) -> object:
        order.append("tokenize")
        if order.count("tokenize") == 2:
            begun.set()
        return tokenize(passages)

    def noted_encode(ids: Sequence[Sequence[int]]) -> object:
        assert begun.wait(60), "the second window was not tokenised while the first was encoded"
        order.append("encode")
        return encode(ids)

    monkeypatch.setattr(tiny.backbone, "tokenize", noted_tokenize)
    monkeypatch.setattr(tiny.backbone, "encode", noted_encode)
    found = tiny.encode(texts)
    assert order.index("encode") >= 2
    assert order.count("tokenize") == -(-len(set(texts)) // 8)
    assert [s.key for s in found] == [s.key for s in want]
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours.vectors, theirs.vectors, atol=1e-5, rtol=0)


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"]], ids=len)
def test_an_error_comes_out_and_stops_the_rest(
    tiny_folder: Path, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    with Reranker.from_pretrained(str(tiny_folder), device=devices, batch_size=1) as engine:
        encode = engine.backbone.encode

        def failing(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
            begun.append(len(ids))
            if len(begun) == 3:
                raise MemoryError("no room")
            return encode(ids)

        monkeypatch.setattr(engine.backbone, "encode", failing)
        with pytest.raises(MemoryError, match="no room"):
            engine.encode([f"passage {i}" for i in range(200)])
        assert len(begun) < 100
        monkeypatch.undo()
        assert len(engine.encode(["a", "b"])) == 2


def test_the_bar_counts_each_passage_once(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = mixed(30)
    with Reranker.from_pretrained(str(tiny_folder), device="cpu,cpu", batch_size=4) as engine:
        engine.encode(texts, show_progress=True)
    distinct = len(set(texts))
    assert f"{distinct}/{distinct}" in capsys.readouterr().err


def test_a_model_on_several_devices_is_given_back(tiny_folder: Path) -> None:
    before = len(registry._slots)
    engine = Reranker.from_pretrained(str(tiny_folder), device=["cpu", "cpu"], dtype="bf16")
    assert len(registry._slots) == before + 1
    engine.close()
    assert len(registry._slots) == before
    with pytest.raises(InputError, match="ratio is 0"):
        Reranker.from_pretrained(str(tiny_folder), device=["cpu", "cpu"], dtype="bf16", ratio=0)
    assert len(registry._slots) == before


def test_settings_name_all_devices(tiny_folder: Path) -> None:
    with Reranker.from_pretrained(str(tiny_folder), device=["cpu", "cpu"]) as engine:
        told = spec_of(engine)
        assert told["device"] == "cpu,cpu"
        assert EngineSpec(**told).device == "cpu,cpu"


def test_devices_are_checked(tiny: Reranker, pico: Reranker) -> None:
    assert parse_devices(torch.device("cpu")) == [torch.device("cpu")]
    with pytest.raises(InputError, match="wanted one device, or several of one kind"):
        parse_devices([])
    with pytest.raises(InputError, match="several of one kind"):
        parse_devices(["cpu", "meta"])
    with pytest.raises(InputError, match="wanted 'cpu', 'cuda' or 'cuda:N'"):
        parse_devices("cpu,nowhere")
    with pytest.raises(InputError, match="wanted the same model"):
        Reranker(tiny.backbone, helpers=[pico.backbone])


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices on this machine")
def test_two_cuda_devices_give_what_one_gives(tiny_folder: Path) -> None:
    texts = mixed(60)
    with (
        Reranker.from_pretrained(str(tiny_folder), device=["cuda:0", "cuda:1"], batch_size=8) as two,
        Reranker.from_pretrained(str(tiny_folder), device="cuda:0", batch_size=8) as one,
    ):
        alike(two.encode(texts), one.encode(texts))
