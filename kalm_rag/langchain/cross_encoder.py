"""The reranker as LangChain's ``BaseCrossEncoder``, for what takes one: ``CrossEncoderReranker`` and apps' own.

It sees pairs of texts only: no ids, no metadata. States are found by the passage's exact text all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import field_validator

from kalm_rag.checks import check_items
from kalm_rag.errors import InputError, MissingDependencyError
from kalm_rag.index.candidates import Missing
from kalm_rag.index.ranking import is_blank, rank_candidates, unscored_candidates
from kalm_rag.instructions import AnyInstructions, Instructions, as_instructions
from kalm_rag.langchain.settings import EngineSettings

try:
    from langchain_core.cross_encoders import BaseCrossEncoder
except ModuleNotFoundError as absent:  # earlier releases have it where their CrossEncoderReranker looks
    try:
        from langchain_classic.retrievers.document_compressors.cross_encoder import BaseCrossEncoder
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "KaLMCrossEncoder needs langchain-core 1.3 or later, or langchain-classic beside an earlier one. Run: "
            "pip install 'langchain-core>=1.3'."
        ) from absent


class KaLMCrossEncoder(EngineSettings, BaseCrossEncoder):
    """Scores (query, passage) pairs as LangChain's cross encoders do, but each passage is encoded once.

    States come from `store`, or are made and kept in the process's bounded cache; only the decoder runs per pair.
    `KaLMDocumentCompressor` does more behind a retriever: it keeps scores in the metadata, reads titles by a passage
    rule, and knows a threshold.

    Args:
        model: As all that are not named here, an argument of `KaLMDocumentCompressor`.
        store: Where states are: a `StateStore`, a folder or a ``.sqlite3`` file, or a `KaLMChroma`, whose engine is
            then used, too. None keeps the latest 256 MiB of states in memory, shared by the process.
        reranker: A ready engine, in place of `model` and its settings. Stays yours to close.
        missing: Passages without stored states are encoded (``"encode"``), an error (``"raise"``), or not scored
            (``"skip"``).
        instructions: `Instructions`, a task as a string, or the app's prompt or chain.

    Raises:
        pydantic.ValidationError: If an argument is unknown or out of range.

    Example:
        >>> encoder = KaLMCrossEncoder()
        >>> question = "What is the capital of France?"
        >>> tea, paris = encoder.score([(question, "I like tea."), (question, "Paris is the capital of France.")])
        >>> tea < 0.5 < paris
        True
    """

    missing: Missing = "encode"
    instructions: AnyInstructions = None

    @field_validator("instructions", mode="before")
    @classmethod
    def _read_instructions(cls, value: object) -> Instructions | None:
        return as_instructions(value)

    def score(self, text_pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Score pairs; those of one query together.

        Args:
            text_pairs: (query, passage), any number of queries.

        Returns:
            P(yes) in [0, 1] as plain floats, in input order; higher is better. 0.0 for what is not scored: pairs with
            a blank query, passages that are no valid Unicode or, under ``missing="skip"``, have no states. The log
            says so.

        Raises:
            InputError: If an item is no pair of strings, or a query is no valid one.
            MissingStateError: Under ``missing="raise"``.
            StateMismatchError: If the store is another model's, or at a ratio that can't give `ratio`.
            ModelError: If the model can't be loaded.
        """
        places: dict[str, list[int]] = {}
        pairs = check_items(text_pairs, "text_pairs", "a list of (query, passage) pairs")
        for place, pair in enumerate(pairs):
            if not isinstance(pair, list | tuple) or [isinstance(text, str) for text in pair] != [True, True]:
                raise InputError(f"pair {place} is {pair!r:.80}; wanted (query, passage).")
            places.setdefault(pair[0], []).append(place)
        scores = [0.0] * len(pairs)
        for query, rows in places.items():
            for row, probability in zip(rows, self._score(query, [pairs[row][1] for row in rows]), strict=True):
                scores[row] = probability
        return scores

    def _score(self, query: str, passages: list[str]) -> list[float]:
        """P(yes) of one query's passages, in their order."""
        if is_blank(query):
            ranked = unscored_candidates(len(passages), top_n=None, threshold=None)
        else:
            engine, store = self.lazy.get()
            ranked = rank_candidates(
                engine,
                store,
                query,
                passages,
                instructions=self.instructions,
                ratio=self.ratio,
                missing=self.missing,
            )
        scores = {candidate.index: candidate.probability for candidate in ranked}
        return [score if (score := scores[place]) is not None else 0.0 for place in range(len(passages))]
