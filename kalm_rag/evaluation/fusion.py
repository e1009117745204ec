"""BM25, and its z-scored fusion with a retriever's scores: what a reranker learns from and is measured against.

Shared by training and evaluation, so that both mean the same. Knows no model.
Letters: Q queries, C candidates of a list.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kalm_rag.errors import require


class Bm25:
    """BM25 over one collection (lucene's formula, k1 0.9, b 0.4, English stop words left out)."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Count the words of every passage; a `MissingDependencyError` where bm25s is not installed."""
        bm25s = require("bm25s", "eval", "BM25")
        self.module = bm25s
        self.index = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
        self.index.index(bm25s.tokenize(list(texts), stopwords="en", show_progress=False), show_progress=False)

    def scores(self, query: str) -> Tensor:
        """Score of every passage, float32 ``(passages,)``; 0 where no word of the query is in it."""
        words = self.module.tokenize([query], stopwords="en", return_ids=False, show_progress=False)[0]
        known = [word for word in words if word in self.index.vocab_dict]
        if not known:
            return torch.zeros(self.index.scores["num_docs"])
        return torch.from_numpy(np.asarray(self.index.get_scores(known), dtype=np.float32))


def fuse(dense: Tensor, bm25: Tensor, depth: int | None = None, share: float = 0.5) -> Tensor:
    """Weighted mean of two scores ``(Q, C)``, each standardised over its list: ``z(s) = (s - mean) / std``.

    Mean and deviation are those of the first `depth` candidates (None: of all). `dense`, the retriever's, weighs
    `share`, BM25 the rest. Higher is better; a list of one candidate has score 0.

    Example:
        >>> fuse(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[1.0, 5.0, 3.0]]))[0].argmax().item()
        1
    """
    parts = []
    for scores in (dense, bm25):
        top = scores[:, :depth]
        spread = top.std(1, keepdim=True) if top.shape[1] > 1 else torch.zeros_like(top)
        parts.append((scores - top.mean(1, keepdim=True)) / (spread + 1e-6))
    return share * parts[0] + (1 - share) * parts[1]
