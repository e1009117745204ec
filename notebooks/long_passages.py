"""Does it matter where in a long passage the answer stands?

    python notebooks/long_passages.py FOLDER [--split dev] [--questions 100]

FOLDER is in BEIR format, of passages that are one sentence. Each question's passage is put at the start, in the middle
and at the end of others, up to a length, and scored; "none" is the same without it. Prints mean P(yes) by place, for
passages cut at 256 tokens and read whole.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from kalm_rag import Reranker
from kalm_rag.evaluation.beir import load_collection

PLACES = ("start", "middle", "end", "none")


def passage_of(gold: str, others: list[str], place: str) -> str:
    """`gold` among the others, at a place."""
    at = {"start": 0, "middle": len(others) // 2, "end": len(others)}.get(place)
    return " ".join(others if at is None else [*others[:at], gold, *others[at:]])


def main() -> None:
    """Measure, and print one row for each length and cut."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="BEIR folder of passages that are one sentence")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--questions", type=int, default=100)
    arguments = parser.parse_args()
    data, draw = load_collection(arguments.folder, arguments.split), random.Random(1)
    corpus = dict(zip(data.doc_ids, data.passages, strict=True))
    asked = draw.sample(sorted(data.queries), arguments.questions)
    print("mean P(yes)   " + "  ".join(f"{place:>6}" for place in PLACES) + "   end - start, share of gold above none")
    for words in (150, 220, 450, 900):
        made = []
        for query_id in asked:
            gold = corpus[max(data.qrels[query_id], key=lambda doc: data.qrels[query_id][doc])]
            others: list[str] = []
            while sum(len(text.split()) for text in [gold, *others]) < words:
                others.append(draw.choice(data.passages))
            made.append((data.queries[query_id], [passage_of(gold, others, place) for place in PLACES]))
        for limit in (256, 2048):
            with Reranker.from_pretrained("pico", max_passage_tokens=limit) as reranker:
                rows = [[r.probability for r in reranker.score(query, reranker.encode(four))] for query, four in made]
            means = [sum(row[i] for row in rows) / len(rows) for i in range(len(PLACES))]
            above = sum(min(row[:3]) > row[3] for row in rows) / len(rows)
            line = "  ".join(f"{mean:6.3f}" for mean in means)
            print(f"{words:4} words {limit:4} {line}   {means[2] - means[0]:+.3f}, {above:.2f}", flush=True)


if __name__ == "__main__":
    main()
