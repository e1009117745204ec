"""What is kept of a prompt's beginning: bounded, never stale, and invisible in the scores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.instructions import Instructions
from kalm_rag.models.prefix_cache import PrefixCache, entry_keys
from kalm_rag.states import Codec, pack_states, unpack_batch

PASSAGES = ["Paris is the capital of France.", "tea", "", "long words go on " * 12, "tea"]
TOLERANCE = 1e-5


@pytest.fixture
def cached(tiny_folder: Path) -> Iterator[Reranker]:
    """An engine over a model of its own (bf16 ones of other tests aside), with an empty cache of 4 MiB."""
    with Reranker.from_pretrained(str(tiny_folder), device="cpu", prefix_cache_bytes=0) as engine:
        engine.backbone.prefix_cache.resize(1 << 22)
        yield engine
        engine.backbone.prefix_cache.resize(0)


def afresh(engine: Reranker, *args: object, **kwargs: object) -> list[float]:
    cache = engine.backbone.prefix_cache
    engine.backbone.prefix_cache = PrefixCache(0)
    try:
        return [r.margin for r in engine.score(*args, **kwargs)]
    finally:
        engine.backbone.prefix_cache = cache


def margins(engine: Reranker, *args: object, **kwargs: object) -> list[float]:
    return [r.margin for r in engine.score(*args, **kwargs)]


def test_scores_do_not_depend_on_what_is_kept(cached: Reranker) -> None:
    states = cached.encode(PASSAGES)
    before = cached.backbone.prefix_cache.stats  # the model may have served other tests
    for query in ("what is it?", "a longer question than the one before", "what is it?"):
        assert margins(cached, query, states) == pytest.approx(afresh(cached, query, states), abs=TOLERANCE)
    stats = cached.backbone.prefix_cache.stats
    found = stats.entries, stats.misses - before.misses, stats.hits - before.hits
    assert found == (4, 4, 8)  # a passage that occurs twice is kept once
    first, again = (margins(cached, "what is it?", states[:2]) for _ in range(2))
    assert first == again


def test_changed_text_instructions_ratio_and_codec_are_other_entries(cached: Reranker) -> None:
    states = cached.encode(PASSAGES)
    layout = cached.layout(Codec.INT8)
    rounded = unpack_batch(
        [pack_states(s, layout) for s in states], [s.tokens for s in states], [s.total_tokens for s in states], layout
    )
    told = Instructions(task="Find hot drinks.", system="Be brief.")
    edited = cached.encode([f"{text}!" for text in PASSAGES])
    entries = 0
    for _ in range(2):
        for args, more in [
            (states, {}),
            (edited, {}),
            (rounded, {}),
            (states, {"instructions": told}),
            (states, {"ratio": 8}),
        ]:
            want = afresh(cached, "which?", args, **more)
            assert margins(cached, "which?", args, **more) == pytest.approx(want, abs=TOLERANCE)
        found = cached.backbone.prefix_cache.stats
        assert found.entries == (entries or found.entries)  # the second round adds none
        entries = found.entries
    assert entries >= 4 * 4


def test_the_bound_holds_and_the_oldest_go(cached: Reranker) -> None:
    cache = cached.backbone.prefix_cache
    states = cached.encode([f"passage {i}" for i in range(6)])
    cached.score("q", states[:1])
    one = cache.stats.bytes
    cache.resize(3 * one)
    cached.score("q", states[:3])
    cached.score("q", states[:1])  # used again, so passage 1 is the oldest now
    cached.score("q", states[3:4])
    assert (cache.stats.entries, cache.stats.bytes) == (3, 3 * one)
    hits = cache.stats.hits
    cached.score("q", [states[0], states[2], states[3]])
    assert cache.stats.hits == hits + 3
    cached.score("q", states[1:2])
    assert cache.stats.hits == hits + 3
    want = afresh(cached, "q", states)
    assert margins(cached, "q", states) == pytest.approx(want, abs=TOLERANCE)  # more passages than fit
    assert cache.stats.bytes <= 3 * one
    cache.resize(one - 1)
    assert cache.stats.bytes == 0
    assert margins(cached, "q", states) == pytest.approx(want, abs=TOLERANCE)  # nothing fits
    assert cache.stats.entries == 0


def test_eight_threads_share_it(cached: Reranker) -> None:
    states = cached.encode([f"passage {i} " * (1 + i % 3) for i in range(8)])
    cached.score("q", states[:1])
    cached.backbone.prefix_cache.resize(5 * cached.backbone.prefix_cache.stats.bytes)  # so that they evict each other
    want = [afresh(cached, f"question {i}", states) for i in range(8)]
    got: dict[int, list[float]] = {}

    def work(i: int) -> None:
        for _ in range(3):
            got[i] = margins(cached, f"question {i}", states[i % 4 :] + states[: i % 4])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        assert got[i] == pytest.approx(want[i][i % 4 :] + want[i][: i % 4], abs=TOLERANCE)
    stats = cached.backbone.prefix_cache.stats
    assert stats.bytes <= stats.max_bytes


def test_keys_read_states_and_not_their_padding() -> None:
    states = torch.randn(2, 3, 4)
    keys = entry_keys([1, 2], states, [2, 3])
    states[0, 2] = float("nan")
    assert entry_keys([1, 2], states, [2, 3]) == keys
    assert not set(entry_keys([1, 3], states, [2, 3])) & set(keys)
    states[0, 1, 0] += 1e-3
    assert entry_keys([1, 2], states, [2, 3])[0] != keys[0]


@pytest.mark.parametrize("wrong", [-1, True, 1.5, "512MB"])
def test_wrong_bounds(tiny_folder: Path, wrong: int) -> None:
    with pytest.raises(InputError, match=r"prefix_cache_bytes is .*whole number >= 0"):
        Reranker.from_pretrained(str(tiny_folder), prefix_cache_bytes=wrong)
    assert Reranker.from_pretrained("pico", prefix_cache_bytes=0).info.family == "pico"  # nothing to keep there
