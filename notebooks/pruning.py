"""How many sentences with the answer stay when a passage is pruned?

    python notebooks/pruning.py FOLDER [--split test] [--questions 300] [--margins 3 4 5]

FOLDER is in BEIR format, of passages that are one sentence. A question's sentences are joined to one passage: those
that are judged for it, in the order of the corpus, or, where these are less than four, eight neighbours of the answer.
Each margin of `prune` has a row: share of the text that stays, and of the answers' sentences, of which every character
must; beside it what BM25's best sentences, the first ones and some drawn at random give where as much text stays.
Intervals: 95%, questions drawn anew 2,000 times.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kalm_rag import ChromaIndex
from kalm_rag.evaluation.beir import load_collection
from kalm_rag.evaluation.fusion import Bm25

LEAST, AROUND = 4, 8
ENDS, CLOSE = (".", "!", "?"), "\"'`” )"


@dataclass
class Passage:
    """A question and the sentences around its answer; `spans` are their characters in `text`."""

    question: str
    sentences: list[str]
    answers: np.ndarray
    scores: dict[str, np.ndarray]
    spans: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for sentence in self.sentences:
            start = self.spans[-1][1] + 1 if self.spans else 0
            self.spans.append((start, start + len(sentence)))
        self.text = " ".join(self.sentences)
        self.sizes = np.array([end - start for start, end in self.spans])


def read_passages(folder: Path, split: str, questions: int) -> list[Passage]:
    """Some questions with a passage each."""
    data, draw = load_collection(folder, split), random.Random(0)
    with (folder / "corpus.jsonl").open(encoding="utf-8") as lines:
        texts = [" ".join(json.loads(line)["text"].split()) for line in lines]
    place_of = {name: place for place, name in enumerate(data.doc_ids)}
    bm25, made = Bm25(texts), []
    for asked in draw.sample(sorted(data.queries), len(data.queries)):
        grades = {place_of[name]: grade for name, grade in data.qrels[asked].items()}
        places = sorted(grades)
        if len(places) < LEAST:
            start = max(0, places[0] - draw.randrange(AROUND))
            places = list(range(start, min(len(texts), start + AROUND)))
        sentences = [texts[p] if texts[p].rstrip(CLOSE).endswith(ENDS) else f"{texts[p]}." for p in places]
        counts = np.array([len(sentence) for sentence in sentences])
        scores = {
            "BM25": bm25.scores(data.queries[asked]).numpy()[places],
            "first": -(counts.cumsum() - counts) / counts.sum(),
            "random": np.array([draw.random() for _ in places]),
        }
        answers = np.array([grades.get(place, 0) > 0 for place in places])
        made.append(Passage(data.queries[asked], sentences, answers, scores))
        if len(made) == questions:
            break
    return made


def within(passages: Sequence[Passage], name: str, share: float) -> list[np.ndarray]:
    """Sentences that lie at most so far below their passage's best that all together are this share of the text."""

    def keep(below: float) -> list[np.ndarray]:
        return [p.scores[name] >= p.scores[name].max() - below for p in passages]

    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if kept_share(passages, keep(middle)) < share else (low, middle)
    return keep(high)


def kept_share(passages: Sequence[Passage], kept: Sequence[np.ndarray]) -> float:
    return float(sum((p.sizes * k).sum() for p, k in zip(passages, kept, strict=True)) / sum(map(_size, passages)))


def _size(passage: Passage) -> int:
    return int(passage.sizes.sum())


def found(passages: Sequence[Passage], kept: Sequence[np.ndarray]) -> np.ndarray:
    """Answer sentences of each passage that stay, and that there are, ``(2, passages)``."""
    return np.array([((p.answers & k).sum(), p.answers.sum()) for p, k in zip(passages, kept, strict=True)]).T


def interval(measure: Callable[[np.ndarray], float], count: int) -> str:
    draws = np.random.default_rng(0).integers(0, count, (2000, count))
    low, high = np.quantile([measure(rows) for rows in draws], [0.025, 0.975])
    return f"({low:+.3f}, {high:+.3f})"


def main() -> None:
    """Measure, and print a row for each margin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--margins", type=float, nargs="+", default=[3.0, 4.0, 5.0])
    parser.add_argument("--ratio", type=int, default=4)
    arguments = parser.parse_args()
    passages = read_passages(arguments.folder, arguments.split, arguments.questions)
    count = len(passages)
    print(f"{count} questions, {np.mean([len(p.sentences) for p in passages]):.1f} sentences and {sum(map(_size, passages)) / count:.0f} characters each")  # fmt: skip # noqa: E501
    with ChromaIndex.open(collection="pruning", ratio=arguments.ratio) as index:
        index.upsert(map(str, range(count)), [p.text for p in passages], [{"n": n} for n in range(count)])
        for margin in arguments.margins:
            kept = []
            for number, passage in enumerate(passages):
                (hit,) = index.query(passage.question, where={"n": number}, prune=margin)
                stays = np.zeros(len(passage.text), dtype=bool)
                for start, end in hit.kept if hit.kept is not None else [(0, len(stays))]:
                    stays[start:end] = True
                blank = np.array([character == " " for character in passage.text])
                kept.append(np.array([(stays | blank)[start:end].all() for start, end in passage.spans]))
            share, ours = kept_share(passages, kept), found(passages, kept)
            told = interval(lambda rows, a=ours: a[0, rows].sum() / a[1, rows].sum(), count)
            print(f"prune={margin:g}: {share:.3f} of the text, {ours[0].sum() / ours[1].sum():.3f} {told} of the answers", flush=True)  # fmt: skip # noqa: E501
            for name in ("BM25", "first", "random"):
                other = found(passages, within(passages, name, share))
                told = interval(lambda rows, a=ours, b=other: (a[0, rows] - b[0, rows]).sum() / a[1, rows].sum(), count)
                gain = (ours[0] - other[0]).sum() / ours[1].sum()
                print(f"    {name:7} {other[0].sum() / other[1].sum():.3f}, which is less by {gain:+.3f} {told}", flush=True)  # fmt: skip # noqa: E501


if __name__ == "__main__":
    main()
