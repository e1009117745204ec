"""Passes of the decoder: bounded by tokens, halved where memory runs out, and what they wasted is told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kalm_rag.engine.decoder_pass import decode_all
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import KalmRagError
from kalm_rag.instructions import Instructions
from kalm_rag.states import batch_states

PASSAGES = [f"passage {i} " * (1 + i) for i in range(9)]


class Small:
    """A backbone on a device that has memory for so many rows; everything else is the real one's."""

    def __init__(self, backbone: Any, rows: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self._backbone, self._rows, self._error = backbone, rows, error
        self.tried: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def decode(self, prompts: list[Any], states: Tensor, counts: Tensor, token_ids: Tensor | None = None) -> Tensor:
        self.tried.append(len(prompts))
        if len(prompts) > self._rows:
            raise self._error("CUDA out of memory. Tried to allocate 1 EiB")
        return self._backbone.decode(prompts, states, counts, token_ids)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_memory_that_runs_out_halves_the_batch(
    pico: Reranker, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    small = Small(pico.backbone, 2, error)
    engine = Reranker(small)  # type: ignore[arg-type]
    states = engine.encode(PASSAGES)
    got = [r.margin for r in engine.score("which?", states)]
    assert got == pytest.approx([r.margin for r in pico.score("which?", states)], rel=1e-5, abs=1e-5)
    assert small.tried[:3] == [9, 4, 2]
    assert max(small.tried[2:]) == 2  # it doesn't run into the wall again
    assert engine.stats.halvings == 2
    assert "memory ran out with 9 passages" in caplog.text


def test_memory_that_runs_out_with_one_passage_is_named(pico: Reranker) -> None:
    engine = Reranker(Small(pico.backbone, 0))  # type: ignore[arg-type]
    with pytest.raises(KalmRagError, match="memory ran out while scoring a single passage"):
        engine.score("which?", engine.encode(PASSAGES[:3]))


def test_other_errors_pass_through(pico: Reranker) -> None:
    class Broken(Small):
        def decode(self, *_: object) -> Tensor:
            raise RuntimeError("shapes don't fit")

    with pytest.raises(RuntimeError, match="shapes don't fit"):
        Reranker(Broken(pico.backbone, 9)).score("which?", pico.encode(PASSAGES))  # type: ignore[arg-type]


def test_passes_and_padding_are_told(tiny: Reranker, caplog: pytest.LogCaptureFixture) -> None:
    engine = Reranker(tiny.backbone, batch_size=4)
    states = engine.encode(PASSAGES)
    with caplog.at_level(logging.DEBUG, "kalm_rag.engine.decoder_pass"):
        engine.score("which?", states)
    assert (engine.stats.rows, engine.stats.passes) == (9, 3)
    assert 0 < engine.stats.waste < 0.5
    told = [record.getMessage() for record in caplog.records]
    assert [message.split(",")[0] for message in told] == [
        "decoded 4 passages in 1 passes",
        "decoded 4 passages in 1 passes",
        "decoded 1 passages in 1 passes",
    ]
    engine.score("which?", states[:1])
    assert engine.stats.passes == 4


def test_a_budget_counts_prompt_and_states(tiny: Reranker) -> None:
    """Long prompts make small batches: KaLM's rows are bounded by decoder tokens, not by how many there are."""
    prompt = tiny.backbone.prompt("which? " * 60, Instructions())
    states = batch_states(tiny.encode(PASSAGES))
    _, stats = decode_all(tiny.backbone, [prompt] * 9, states, None)
    assert tiny.backbone.decode_width(prompt, 4) == len(prompt.ids) + 4
    assert stats.passes > 1
    assert stats.padded <= stats.passes * max(tiny.backbone.decode_budget, len(prompt.ids) + states.vectors.shape[1])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_rows_are_copied_straight_into_pinned_memory(tiny: Reranker) -> None:
    batch = batch_states(tiny.encode(PASSAGES))
    pinned, plain = batch.select([3, 0], pin=True), batch.select([3, 0])
    assert pinned.vectors.is_pinned()
    assert pinned.tokens.is_pinned()
    assert torch.equal(pinned.vectors, plain.vectors)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("model", ["tiny", "pico"])
def test_no_pass_waits_for_the_gpu(model: str, tiny_folder: Path) -> None:
    """So the next passages are laid out while these are scored."""
    told = Instructions(task="Find passages about the sea.")
    with Reranker.from_pretrained(str(tiny_folder) if model == "tiny" else "pico", device="cuda") as engine:
        backbone = engine.backbone
        batch, prompts = batch_states(engine.encode(PASSAGES)), [backbone.prompt("which?", told)] * len(PASSAGES)

        def run() -> torch.Tensor:
            part = batch.select(range(len(PASSAGES)), pin=True)
            return backbone.decode(
                prompts, *part.on(backbone.device, torch.float32), part.token_ids_on(backbone.device)
            )

        run()  # what is done once, such as choosing kernels, may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            margins = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(torch.isfinite(margins).all())
