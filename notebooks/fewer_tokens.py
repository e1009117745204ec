"""How much less text reaches the LLM, and is the answer still in it?

    python notebooks/fewer_tokens.py FOLDER [--split test] [--questions 200] [--plot fewer_tokens.svg]

FOLDER is in BEIR format, of passages that are one sentence, in the order of their documents. Eight in a row of one
title make a passage; all are indexed. Prints, of the passages with an answer among the 20 nearest, which share of the
text and of the answers' sentences ``prune=True`` keeps, beside as much text of the first sentences and of the best by
BM25; then tokens of what is handed on against questions with an answer in it, for search, reranking, and reranking with
pruning.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import bm25s
import numpy as np
from tqdm import tqdm

from kalm_rag import ChromaIndex
from kalm_rag.evaluation.beir import load_collection
from kalm_rag.index.results import Hit

SENTENCES, CANDIDATES, HANDED_ON = 8, 20, range(1, 11)


def passages(titles: Sequence[str | None]) -> Iterator[list[int]]:
    """Rows of up to eight sentences in a row of one title."""
    for _, rows in groupby(range(len(titles)), key=lambda row: titles[row]):
        every = list(rows)
        yield from (every[at : at + SENTENCES] for at in range(0, len(every), SENTENCES))


def best_within(scores: np.ndarray, lengths: np.ndarray, room: int) -> set[int]:
    """Places of the best sentences that fit, best first; one at least."""
    kept: set[int] = set()
    for place in np.argsort(-scores, kind="stable"):
        if not kept or sum(lengths[k] for k in kept) + lengths[place] <= room:
            kept.add(int(place))
    return kept


def interval(values: Sequence[float]) -> str:
    """A mean with its 95% interval by bootstrap."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (2000, len(values))).mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{np.mean(values):.3f} ({low:.3f}, {high:.3f})"


class Share:
    """Which share of text and of answers' sentences each way keeps of passages with an answer."""

    def __init__(self, sentences: Sequence[str], groups: dict[str, list[int]]) -> None:
        self.sentences, self.groups = sentences, groups
        self.lexical = bm25s.BM25()
        self.lexical.index(bm25s.tokenize(list(sentences), show_progress=False), show_progress=False)
        self.kept: dict[str, list[float]] = {"text": [], "prune": [], "first": [], "bm25": []}

    def add(self, question: str, gold: set[int], whole: Hit, pruned: Hit) -> None:
        """Count one passage with an answer."""
        rows = self.groups[whole.id]
        answers = [place for place, row in enumerate(rows) if row in gold]
        if not answers or len(rows) < SENTENCES // 2:
            return
        lengths = np.array([len(self.sentences[row]) for row in rows])
        scores = self.lexical.get_scores(bm25s.tokenize([question], return_ids=False, show_progress=False)[0])
        text = pruned.text or ""
        room = len(text)
        ways = {"first": -np.arange(len(rows), dtype=float), "bm25": scores[rows]}
        self.kept["text"].append(room / len(whole.text or " "))
        self.kept["prune"].append(np.mean([self.sentences[rows[place]] in text for place in answers]))
        for way, by in ways.items():
            kept = best_within(by, lengths, room)
            self.kept[way].append(np.mean([place in kept for place in answers]))


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
    share, ways = Share(sentences, groups), ("search", "reranked", "reranked, prune=True")
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
            for one, less in zip(whole, pruned, strict=True):
                share.add(question, gold, one, less)
            nearest = sorted(whole, key=lambda hit: hit.retrieval_rank)
            for way, hits in zip(ways, (nearest, whole, pruned), strict=True):
                handed = [hit.text or "" for hit in hits[: max(HANDED_ON)]]
                sizes = [one.total_tokens for one in index.engine.backbone.tokenize(handed)]
                there = [any(sentences[row] in text for row in gold) for text in handed]
                tokens[way] = np.vstack([tokens[way], np.cumsum(sizes)])
                found[way] = np.vstack([found[way], np.maximum.accumulate(there)])
    print(
        f"{len(share.kept['text'])} passages with an answer: text kept {interval(share.kept['text'])}; of its sentences"
    )
    print("; ".join(f"{way} {interval(share.kept[way])}" for way in ("prune", "first", "bm25")))
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
