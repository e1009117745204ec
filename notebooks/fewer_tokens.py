"""How much less text reaches the LLM, and is the answer still in it?

    python notebooks/fewer_tokens.py FOLDER [--split test] [--questions 200] [--plot fewer_tokens.svg]

FOLDER is in BEIR format, of passages that are one sentence, in the order of their documents. Eight in a row of one
title make a passage; all are indexed. Prints tokens of the 1 to 10 passages that are handed on against questions with
an answer in them, for search, reranking, and reranking with pruning (`pruning.py` measures that alone).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kalm_rag import ChromaIndex
from kalm_rag.evaluation.beir import load_collection

SENTENCES, CANDIDATES, HANDED_ON = 8, 20, range(1, 11)


def passages(titles: Sequence[str | None]) -> Iterator[list[int]]:
    """Rows of up to eight sentences in a row of one title."""
    for _, rows in groupby(range(len(titles)), key=lambda row: titles[row]):
        every = list(rows)
        yield from (every[at : at + SENTENCES] for at in range(0, len(every), SENTENCES))


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="BEIR folder of passages that are one sentence")
    parser.add_argument("--split", default="test")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    data = load_collection(arguments.folder, arguments.split)
    corpus = [json.loads(line) for line in (arguments.folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    sentences, row_of = [" ".join(one["text"].split()) for one in corpus], {d: n for n, d in enumerate(data.doc_ids)}
    groups = {f"p{rows[0]}": rows for rows in passages([one.get("title") for one in corpus])}
    ways = ("search", "reranked", "reranked, prune=True")
    tokens, found = ({way: np.zeros((0, len(HANDED_ON))) for way in ways} for _ in range(2))
    with ChromaIndex.open() as index:
        texts = {name: " ".join(sentences[row] for row in rows) for name, rows in groups.items()}
        names = list(texts)
        for at in tqdm(range(0, len(names), 256), desc="index", unit="256 passages"):
            index.add(names[at : at + 256], [texts[name] for name in names[at : at + 256]])
        asked = np.random.default_rng(1).permutation(sorted(data.queries))
        for query_id in tqdm(asked[: arguments.questions], desc="ask"):
            question, gold = data.queries[query_id], {row_of[d] for d, s in data.qrels[query_id].items() if s > 0}
            whole = index.query(question, top_n=None, fetch_k=CANDIDATES).hits
            pruned = index.query(question, top_n=None, fetch_k=CANDIDATES, prune=True).hits
            nearest = sorted(whole, key=lambda hit: hit.retrieval_rank)
            for way, hits in zip(ways, (nearest, whole, pruned), strict=True):
                handed = [hit.text or "" for hit in hits[: max(HANDED_ON)]]
                sizes = [one.total_tokens for one in index.engine.backbone.tokenize(handed)]
                there = [any(sentences[row] in text for row in gold) for text in handed]
                tokens[way] = np.vstack([tokens[way], np.cumsum(sizes)])
                found[way] = np.vstack([found[way], np.maximum.accumulate(there)])
    for way in ways:
        points = zip(HANDED_ON, tokens[way].mean(axis=0), found[way].mean(axis=0), strict=True)
        print(f"{way}: " + ", ".join(f"{n}: {size:.0f} tokens {share:.3f}" for n, size, share in points))
    if arguments.plot is not None:
        draw({way: (tokens[way].mean(axis=0), found[way].mean(axis=0)) for way in ways}, arguments.plot)


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Tokens against questions with an answer in what is handed on; a dot per number of passages."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for (way, (tokens, found)), marker in zip(curves.items(), "os^", strict=True):
        axes.plot(tokens, found, marker=marker, label=way)
    axes.set_xlabel("tokens to the LLM, mean per question (dots: 1 to 10 passages)")
    axes.set_ylabel("questions with an answer in them")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
