"""A cheap embedder, a few texts, and an index over them, for tests and for processes that tests start."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from kalm_rag import ChromaIndex, Reranker

TEXTS = ["Paris is the capital of France.", "I like tea.", "Berlin is the capital of Germany.", "Bees make honey."]
IDS = ["a", "b", "c", "d"]
QUERY = "What is the capital of France?"


def toy_vectors(texts: list[str]) -> np.ndarray:
    """Letter counts."""
    return np.array([[1.0, *(text.lower().count(c) for c in "abcdefghijklmnop")] for text in texts], dtype=np.float32)


def reopen(path: str | os.PathLike[str], model: str | Reranker, **options: Any) -> ChromaIndex:
    """An index in a folder, over the toy embedder."""
    return ChromaIndex.open(path, model=model, embedder=toy_vectors, **options)
