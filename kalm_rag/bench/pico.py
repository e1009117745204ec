"""The bundled model: stored states against a cross-encoder of its size, and indexing against sentence-transformers."""

from __future__ import annotations

import random
import statistics
import tempfile
from functools import partial

import torch

from kalm_rag.bench.measuring import QUERY, measure, random_text, stretch_states
from kalm_rag.bench.query import Query, query_rows
from kalm_rag.bench.report import Row, row_of
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import require
from kalm_rag.index import ChromaIndex
from kalm_rag.instructions import Instructions
from kalm_rag.models.pico.encoder import find_encoder
from kalm_rag.store import open_store

WORDS = 143
"""Words per passage: about 145 tokens, so that a cross-encoder reads pairs of about 170."""
TASK = Instructions(task="Find advice for people who work outdoors.")


def bench_pico(device: torch.device, *, candidates: int = 50, repeats: int = 7, ratio: int = 4) -> list[Row]:
    """Time pico by stage, with and without a task, and a cross-encoder of MiniLM-L6 shape (random weights)."""
    texts = [random_text(WORDS, seed) for seed in range(candidates)]
    with Reranker.from_pretrained("pico", device=device, ratio=ratio) as engine:
        states = engine.encode(texts, show_progress=False)
        tokens = round(statistics.median(passage.tokens for passage in states))
        size = engine.layout().payload_bytes(tokens)
        group = f"pico: {candidates} passages of {tokens} tokens, r={ratio}"
        rows = [_cross_encoder(device, group, candidates, tokens + 20)]
        encode = measure(lambda: engine.encode(texts, show_progress=False), 2, device)
        rows.append(row_of("pico.encode", "encode", "encode", encode, group=group, passages=candidates))
        with tempfile.TemporaryDirectory() as home, open_store(home, engine.layout()) as store:
            store.put_many(stretch_states(states, texts))
            for key, what, told in (("pico.stored", "stored", Instructions()), ("pico.task", "with a task", TASK)):
                query = Query(engine, store, texts, (QUERY, told))
                rows += query_rows(key, group, what, query, repeats, size, baseline="pico.cross_encoder")
    return rows


def bench_indexing(device: torch.device, *, passages: int = 100) -> list[Row]:
    """Time indexing new passages (states, vectors and text kept) against sentence-transformers' encode alone.

    Raises:
        MissingDependencyError: If sentence-transformers is not installed.
    """
    draw = random.Random(0)
    texts = [random_text(draw.randint(20, 240), 10**6 + row) for row in range(passages)]
    module = require("sentence_transformers", "pico", "the indexing baseline")
    baseline = module.SentenceTransformer(str(find_encoder()), device=str(device))
    read = partial(baseline.encode, batch_size=32, show_progress_bar=False)
    encode = measure(lambda: read(texts), 1, device, warm_up=lambda: read(texts[:1]))
    with tempfile.TemporaryDirectory() as home, ChromaIndex.open(home, model="pico", device=device) as index:
        ids = [str(row) for row in range(passages)]
        spread = measure(
            lambda: index.upsert(ids, texts), 1, device, warm_up=lambda: index.upsert(["first"], ["one to warm up"])
        )
        size = index.store.stats().payload_bytes / (passages + 1)
    group = f"indexing with pico: {passages} new passages of 20 to 240 words"
    row = partial(row_of, group=group, passages=passages)
    note = "vectors, states and text are kept; sentence-transformers' encode keeps nothing"
    more = {"bytes_per_passage": size, "baseline": "index.encode", "note": note}
    return [
        row("index.encode", "sentence-transformers", "index", encode),
        row("index.upsert", "ChromaIndex.upsert", "index", spread, **more),
    ]


def _cross_encoder(device: torch.device, group: str, pairs: int, tokens: int) -> Row:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = BertForSequenceClassification(BertConfig(num_labels=1, **shape)).eval().to(device)
    ids = torch.randint(1000, 30000, (pairs, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        spread = measure(lambda: [model(ids[at : at + 32]).logits for at in range(0, pairs, 32)], 2, device)
    note = f"MiniLM-L6 shape, pairs of {tokens} tokens; its tokenising is not counted"
    named = ("pico.cross_encoder", "cross-encoder", "end to end")
    return row_of(*named, spread, group=group, passages=pairs, note=note)
