"""Speed, measured against what a user would pick instead: one run, medians, ratios.

Baselines: encoding and scoring at once (no store), a cross-encoder of the same size, and for KaLM checkpoints the
published one-phase protocol. Weights don't matter for time, so baselines and the Nano-shaped model have random ones.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalm_rag.instructions import Instructions
from kalm_rag.models.backbone import BackboneInfo
from kalm_rag.pooling import mean_groups
from kalm_rag.reranker import Reranker
from kalm_rag.states import PassageStates, passage_key
from kalm_rag.store import open_store

QUERY = "what helps against the cold in winter"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One line of the benchmark.

    Attributes:
        what: What was timed.
        seconds: Median wall-clock of a repeat.
        ratio: How many times as long as the line it is compared with; None for those lines themselves.
        note: What it is compared with, or the shapes.
    """

    what: str
    seconds: float
    ratio: float | None = None
    note: str = ""


def machine() -> dict[str, Any]:
    """Where this was measured: versions, cores, threads."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall-clock of `repeats` runs after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def random_text(words: int, seed: int) -> str:
    """Text of common words, about 1.05 tokens each for MiniLM; the same for the same seed."""
    vocabulary = (
        "the of and to in is was for as with by on not he his but at are this have from or had an they which one you "
        "were all her she there would their we him been has when who will no more if out so up said what its about "
        "than into them can only other time new some could these two may first then do any like my now over such our "
        "man me even most made after also well did many before must through years where much your way down should "
        "because long each just state people those too mr how little good world make very year still see own work men"
    ).split()
    draw = random.Random(seed)
    return " ".join(draw.choice(vocabulary) for _ in range(words))


def bench_pico(*, passages: int = 50, words: int = 143, repeats: int = 7, ratio: int = 4) -> list[Timing]:
    """Time pico on stored states against encoding afresh, and against a cross-encoder of MiniLM-L6 shape.

    Args:
        passages: Candidates of the query.
        words: Words a passage (143 are about 150 tokens; the cross-encoder reads pairs of about 170).
        repeats: Runs whose median counts.
        ratio: Tokens a state stands for.
    """
    from transformers import BertConfig, BertForSequenceClassification

    texts = [random_text(words, seed) for seed in range(passages)]
    with Reranker.from_pretrained("pico", ratio=ratio) as engine:
        states = engine.encode(texts)
        lengths = [s.tokens for s in states]
        stored = median_seconds(lambda: engine.score(QUERY, states), repeats)
        told = Instructions(task="Find advice for people who work outdoors.")
        steered = median_seconds(lambda: engine.score(QUERY, states, instructions=told), repeats)
        fresh = median_seconds(lambda: engine.score(QUERY, engine.encode(texts)), max(2, repeats // 3))
        torch.manual_seed(0)
        shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        cross = BertForSequenceClassification(BertConfig(num_labels=1, **shape)).eval().to(engine.backbone.device)
        pairs = torch.randint(1000, 30000, (passages, max(lengths) + 20), device=engine.backbone.device)
        with torch.inference_mode():
            crossed = median_seconds(
                lambda: [cross(pairs[i : i + 32]).logits for i in range(0, passages, 32)], max(2, repeats // 3)
            )
    shapes = f"{passages} passages of {statistics.median(lengths):.0f} tokens, r={ratio}"
    return [
        Timing(what="pico, stored states", seconds=stored, note=shapes),
        Timing(what="pico, stored states, with a task", seconds=steered, ratio=steered / stored, note="vs stored"),
        Timing(what="pico, encoded afresh", seconds=fresh, ratio=fresh / stored, note="vs stored"),
        Timing(
            what=f"cross-encoder of the same size, pairs of {pairs.shape[1]} tokens",
            seconds=crossed,
            ratio=crossed / stored,
            note="vs stored",
        ),
    ]


def bench_store(*, stored: int = 20_000, fetched: int = 100, tokens: int = 100, repeats: int = 15) -> list[Timing]:
    """Time writing to and fetching from a SQLite store of synthetic pico-shaped states.

    Args:
        stored: Passages in the store.
        fetched: Random passages of one fetch, packed into the padded batch.
        tokens: Tokens a passage.
        repeats: Fetches whose median counts.
    """
    with Reranker.from_pretrained("pico") as engine, tempfile.TemporaryDirectory() as folder:
        layout = engine.layout()
        rows = -(-tokens // layout.ratio)
        draw = torch.Generator().manual_seed(0)
        keys = [passage_key(str(i)) for i in range(stored)]
        with open_store(Path(folder), layout) as store:
            started = time.perf_counter()
            for start in range(0, stored, 256):
                vectors = torch.randn(256, rows, layout.hidden_size, generator=draw).to(engine.backbone.state_dtype)
                store.put_many(
                    [
                        PassageStates(
                            vectors=v,
                            tokens=tokens,
                            found=tokens,
                            ratio=layout.ratio,
                            fingerprint=layout.fingerprint,
                            key=key,
                        )
                        for v, key in zip(vectors, keys[start : start + 256], strict=False)
                    ]
                )
            writing = time.perf_counter() - started
            chooser = random.Random(0)
            fetch = median_seconds(lambda: store.get_many(chooser.sample(keys, min(fetched, stored))), repeats)
            stats = store.stats()
    share = stats.disk_bytes / stats.payload_bytes
    return [
        Timing(what=f"store: write {stored} passages", seconds=writing, note=f"{stored / writing:.0f} passages/s"),
        Timing(
            what=f"store: fetch {min(fetched, stored)} of {stored}, warm",
            seconds=fetch,
            note=f"{stats.payload_bytes / stored / 1000:.1f} kB a passage, disk {share:.2f}x the payload",
        ),
    ]


def bench_nano(
    *, passages: int = 8, tokens: int = 200, prompt: int = 80, ratio: int = 4, dtype: str = "fp32", repeats: int = 3
) -> list[Timing]:
    """Time a Nano-shaped T5Gemma 2 (random weights) on stored states against the published one-phase protocol.

    One phase: encode, pool, decode, logits of the whole vocabulary at every prompt position. The margins of both are
    compared, and differ by no more than rounding, or this raises.

    Raises:
        ArithmeticError: If the two ways disagree.
    """
    backbone = _nano(torch.float32 if dtype == "fp32" else torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 262_000, (passages, tokens), generator=draw).tolist()
    prompts = [backbone.own_prompt(torch.randint(10, 262_000, (prompt,), generator=draw))] * passages

    def encode() -> tuple[Tensor, Tensor]:
        hidden, mask = backbone.encode(ids)
        return mean_groups(hidden, mask, ratio)

    states, counts = encode()
    two_phase = backbone.decode(prompts, states, counts)
    one_phase = _one_phase(backbone, prompts, *encode())
    worst = float((two_phase - one_phase).abs().max())
    if worst > (1e-4 if dtype == "fp32" else 0.1):
        raise ArithmeticError(f"stored and one-phase margins differ by {worst}")
    stored = median_seconds(lambda: backbone.decode(prompts, states, counts), repeats)
    whole = median_seconds(lambda: _one_phase(backbone, prompts, *encode()), repeats)
    shapes = f"{passages} passages of {tokens} tokens, r={ratio}, prompt of {prompt}, {dtype}"
    return [
        Timing(what="Nano-shaped KaLM, stored states", seconds=stored, note=shapes),
        Timing(
            what="Nano-shaped KaLM, published one-phase protocol",
            seconds=whole,
            ratio=whole / stored,
            note=f"vs stored; margins differ by {worst:.1e}",
        ),
    ]


def to_json(timings: list[Timing]) -> dict[str, Any]:
    """All of it as plain values."""
    return {"machine": machine(), "timings": [asdict(t) for t in timings]}


def _one_phase(backbone: Any, prompts: list[Any], states: Tensor, counts: Tensor) -> Tensor:  # noqa: ANN401
    """The reference's second half: the decoder, then logits over all positions and words, then two of them."""
    model = backbone._model
    ids = torch.stack([p.ids for p in prompts])
    with torch.inference_mode():
        hidden = model.model.decoder(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=states.to(model.dtype),
            encoder_attention_mask=(counts > 0).long(),
            use_cache=False,
        ).last_hidden_state
        logits: Tensor = model.lm_head(hidden)[:, -1].float()
    return logits[:, backbone._tokens.yes_id] - logits[:, backbone._tokens.no_id]


def _nano(dtype: torch.dtype) -> Any:  # noqa: ANN401 - a backbone and one extra method
    """A T5Gemma 2 of Nano's shape with random weights and no tokenizer (ids are made up)."""
    from transformers import T5Gemma2Config

    from kalm_rag.models.t5gemma2 import PASSAGE_TEMPLATE, Prompt, T5Gemma2Backbone, T5Gemma2TextReranker

    class _Ids:
        pad_id, yes_id, no_id = 0, 1000, 2000

    class _Nano(T5Gemma2Backbone):
        def own_prompt(self, ids: Tensor) -> Prompt:
            return Prompt(ids.to(self.device))

    text = {
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
    }
    encoder = {"text_config": dict(text), "vision_config": {"model_type": "siglip_vision_model"}}
    config = T5Gemma2Config(encoder=encoder, decoder=dict(text))
    torch.manual_seed(0)
    model = T5Gemma2TextReranker(config).to(dtype)
    model.tie_weights()
    name = str(dtype).removeprefix("torch.")
    info = BackboneInfo(
        family="t5gemma2",
        name="nano-shaped",
        revision="random",
        weights="random",
        template=PASSAGE_TEMPLATE,
        hidden_size=640,
        max_passage_tokens=1024,
        dtype=name,
        state_dtype=name,
    )
    return _Nano(model, _Ids(), info)  # type: ignore[arg-type]
