"""A query that the model has read, handed from the search to the decoder so that it is read once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from kalm_rag.instructions import Instructions
from kalm_rag.models.backbone import Backbone


@dataclass(frozen=True, eq=False)
class PreparedQuery:
    """One query under its instructions, ready for any number of passages. Made by `Reranker.prepare`.

    `Reranker.score`, `rank` and `explain` take it for a query, and the bundled embedder's `query` takes its vector from
    it. A model other than the one that made it reads the text again.

    Attributes:
        query: The question.
        instructions: System and task text it is asked under.
        prompt: What the model made of both; the model's own, opaque.

    Example:
        >>> from kalm_rag import Reranker
        >>> with Reranker.from_pretrained("pico") as reranker:
        ...     asked = reranker.prepare("What do bees make?", "Find facts about food.")
        ...     [r.index for r in reranker.rank(asked, ["Rust is iron.", "Bees make honey."])]
        [1, 0]
    """

    query: str
    instructions: Instructions
    prompt: Any = field(repr=False)
    _model: weakref.ref[Any] = field(repr=False)  # weak: who keeps an answer must not keep the model loaded

    def is_of(self, backbone: Backbone) -> bool:
        """Whether this model made it, so that its decoder can read `prompt`."""
        return self._model() is backbone
