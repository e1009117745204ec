"""A short vector per word of the vocabulary that says which word it is, for the decoder's exact comparisons.

The encoder's last layer blurs words that mean the same; a passage's token ids are kept beside its states, so that the
decoder can still tell them apart. Letters: V words of the vocabulary, X width of a code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

FIRST_WORD = 999
"""Vocabulary ids below this are padding, unused or special (``[UNK]`` 100, ``[CLS]`` 101, ``[SEP]`` 102)."""


class WordCodes:
    """Looks up a unit vector per token id that keeps the exact word.

    ``code = normalise((word_embedding - centre) @ projection)``: whitened principal components, so that different
    words are near right angles while forms of one word stay close. ``[CLS]``, ``[SEP]``, padding and unknown words
    have the zero code.
    """

    def __init__(self, embeddings: Tensor, centre: Tensor, projection: Tensor) -> None:
        """Make the table of codes.

        Args:
            embeddings: The encoder's word embeddings, ``(V, 384)``.
            centre: Their mean over real words, float32 ``(384,)``.
            projection: Whitening map, float32 ``(384, 128)``.
        """
        self.centre, self.projection = centre, projection
        table = (embeddings.float().cpu() - centre) @ projection
        self.table = functional.normalize(table, dim=-1)  # (V, 128)
        self.table[:FIRST_WORD] = 0.0

    @classmethod
    def fit(cls, embeddings: Tensor, size: int) -> WordCodes:
        """Find the whitening map for the encoder's vocabulary (float64 inside, so that reruns agree).

        Args:
            embeddings: As `__init__` takes them.
            size: X, width of a code.
        """
        words = embeddings[FIRST_WORD:].double().cpu()
        centre = words.mean(0)
        values, vectors = torch.linalg.eigh((words - centre).T @ (words - centre) / len(words))
        vectors = vectors * torch.where(vectors.sum(0, keepdim=True) < 0, -1.0, 1.0)  # eigenvectors have no sign
        return cls(embeddings, centre.float(), (vectors[:, -size:] / values[-size:].sqrt()).float())
