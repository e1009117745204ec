"""Passages through the encoder: tokenised ahead, batches by length, one worker per device, states in the model's dtype.

Knows backbones and states; knows no engine, no query and no store. Letters: B passages, T tokens, N pooled states, H.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from typing import TypeVar

import torch

from kalm_rag.models.backbone import Backbone, TokenizedPassage
from kalm_rag.states import PassageStates
from kalm_rag.states.pooling import mean_groups

WINDOW = 2048
"""Passages tokenised and sorted by length at a time: long enough to batch well, short enough to bound memory."""

Cut = Callable[[Sequence[TokenizedPassage]], "Iterable[list[int]]"]
"""Rows of a window, in batches."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def encode_texts(
    backbones: Sequence[Backbone], texts: Sequence[str], keys: Sequence[str], *, ratio: int, cut: Cut
) -> Iterator[list[PassageStates]]:
    """Encode distinct passages, batch by batch. The next window is tokenised while this one is encoded.

    Args:
        backbones: The same model on each device, at least one; one batch at a time on each. One alone runs in the
            caller's thread. The same one may stand there twice: two batches at a time then share its weights.
        texts: Passages, each once.
        keys: Their content addresses.
        ratio: Tokens a state stands for.
        cut: Cuts a window into batches.

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
