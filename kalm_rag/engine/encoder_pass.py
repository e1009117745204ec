"""Passages through the encoder: tokenised ahead, batches by length, one worker per device, states in the model's dtype.

Knows backbones and states; knows no engine, no query and no store. Letters: B passages, T tokens, N pooled states, H.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from typing import TypeVar

import torch
from tqdm import tqdm

from kalm_rag.engine.decoder_pass import cut_batches
from kalm_rag.engine.queue import check_cancelled
from kalm_rag.models.backbone import Backbone, TokenizedPassage
from kalm_rag.states import PassageStates
from kalm_rag.states.pooling import mean_groups

WINDOW = 2048
"""Passages tokenised and sorted by length at a time: long enough to batch well, short enough to bound memory."""

LONG = 512
"""Passages from which a progress bar is shown without being asked for (on a terminal)."""

_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Most padded tokens of a batch, by kind of device."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def encode_passages(
    backbones: Sequence[Backbone],
    texts: Sequence[str],
    keys: Sequence[str],
    *,
    ratio: int,
    batch_size: int,
    show_progress: bool | None,
) -> list[PassageStates]:
    """Encode passages; one that occurs twice is encoded once.

    Args:
        backbones: The same model on each device.
        texts: Passages.
        keys: Their content addresses.
        ratio: Tokens a state stands for.
        batch_size: Most passages of a batch.
        show_progress: None shows a bar on a terminal when there is much to do.

    Returns:
        Their states, in input order.

    Raises:
        CancelledError: (of `concurrent.futures`) between two batches, if the caller gave up; see `cancel_on_error`.
    """
    distinct = dict(zip(keys, texts, strict=True))
    long = len(distinct) >= LONG and sys.stderr.isatty()
    shown = long if show_progress is None else show_progress
    made: dict[str, PassageStates] = {}
    with tqdm(total=len(distinct), desc="encoding", unit="passage", disable=not shown) as bar:
        parts = list(distinct.values()), list(distinct)
        for batch in encode_texts(backbones, *parts, ratio=ratio, batch_size=batch_size):
            made |= {states.key: states for states in batch}
            bar.update(len(batch))
            check_cancelled()
    return [made[key] for key in keys]


def encode_texts(
    backbones: Sequence[Backbone], texts: Sequence[str], keys: Sequence[str], *, ratio: int, batch_size: int
) -> Iterator[list[PassageStates]]:
    """Encode distinct passages, batch by batch. The next window is tokenised while this one is encoded.

    Args:
        backbones: The same model on each device, at least one; one batch at a time on each. One alone runs in the
            caller's thread. The same one may stand there twice: two batches at a time then share its weights.
        texts: Passages, each once.
        keys: Their content addresses.
        ratio: Tokens a state stands for.
        batch_size: Most passages of a batch, which is also bounded by padded tokens.

    Returns:
        States of each batch, as they are ready in the order of the batches. The first error of a worker comes out
        here, and no further batch is begun.
    """
    spans = [slice(start, start + WINDOW) for start in range(0, len(texts), WINDOW)]
    with ExitStack() as stack:
        ahead = stack.enter_context(ThreadPoolExecutor(1, "kalm-tokenize"))
        workers = stack.enter_context(ThreadPoolExecutor(len(backbones), "kalm-encode"))
        idle: SimpleQueue[Backbone] = SimpleQueue()
        for backbone in backbones:
            idle.put(backbone)

        def encode(batch: tuple[list[str], list[TokenizedPassage]]) -> list[PassageStates]:
            backbone = idle.get()
            try:
                return encode_rows(backbone, *batch, ratio)
            finally:
                idle.put(backbone)

        def cut(rows: Sequence[TokenizedPassage]) -> Iterator[list[int]]:
            lengths = [len(row.ids) for row in rows]
            order = sorted(range(len(rows)), key=lambda row: -lengths[row])
            return cut_batches(order, lengths, batch_size, _TOKENS.get(backbones[0].device.type, _TOKENS["cpu"]))

        run = map if len(backbones) == 1 else workers.map  # both give results in order, and stop at an error
        for span, rows in zip(spans, _ahead(ahead, lambda s: backbones[0].tokenize(texts[s]), spans), strict=True):
            window = keys[span]
            yield from run(encode, (([window[i] for i in b], [rows[i] for i in b]) for b in cut(rows)))


def encode_rows(
    backbone: Backbone, keys: Sequence[str], rows: Sequence[TokenizedPassage], ratio: int
) -> list[PassageStates]:
    """Encode one batch and pool it; the states come back on the CPU."""
    hidden, mask = backbone.encode([row.ids for row in rows])  # (B, T, H), (B, T)
    pooled, _ = mean_groups(hidden, mask, ratio)
    vectors = pooled.to(backbone.state_dtype).cpu()  # (B, N, H)
    return [
        PassageStates(
            vectors=vectors[i, : -(-len(row.ids) // ratio)].clone(),  # a view would keep the padded batch alive
            tokens=len(row.ids),
            total_tokens=row.total_tokens,
            ratio=ratio,
            fingerprint=backbone.info.fingerprint,
            key=key,
            token_ids=torch.tensor(row.ids, dtype=torch.int32) if backbone.info.keeps_token_ids else None,
        )
        for i, (key, row) in enumerate(zip(keys, rows, strict=True))
    ]


def _ahead(pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Results in order; the next one is made in the pool while the caller uses this one."""
    coming: Future[Result] | None = None
    for following, item in enumerate(items, start=1):
        result = work(item) if coming is None else coming.result()
        coming = pool.submit(work, items[following]) if following < len(items) else None
        yield result
