"""Candidates ranked for an app: what can't be asked or scored takes no app down, it comes back unscored and is told.

What every door's ranking begins with; `outcome` goes on with selection and failure. Knows no framework and no Chroma.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kalm_rag.checks import check_cut, check_text
from kalm_rag.engine.prepared import PreparedQuery
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.candidates import Missing, Owners, RankedCandidate, Ranking, check_missing, rank_texts
from kalm_rag.index.lazy_engine import match_ratio
from kalm_rag.index.results import Timings
from kalm_rag.instructions import Instructions
from kalm_rag.store import StateStore

logger = logging.getLogger(__name__)


def rank_candidates(
    engine: Reranker,
    store: StateStore | None,
    query: str | PreparedQuery,
    texts: Sequence[str | None],
    *,
    instructions: Instructions | None = None,
    ratio: int | None = None,
    top_n: int | None = None,
    threshold: float | None = None,
    missing: Missing = "encode",
    owners: Owners | None = None,
) -> list[RankedCandidate]:
    """Order candidates by relevance: states by content, decoder, cut.

    An adapter must not take its app down, so what can't be asked or scored comes back in retrieval order, unscored, and
    is told in the log: everything under a blank query (an agent's, or an empty rewriting), and single texts that are no
    valid Unicode.

    Args:
        engine: The engine; used at the store's ratio.
        store: Where states are; None takes the process's bounded cache.
        query: The question, or what `Reranker.prepare` made of it; then without `instructions`.
        texts: Exact candidate texts in retrieval order; None marks one without text, which is not scored.
        instructions: System and task text; None takes the model's defaults.
        ratio: A multiple of the store's ratio to score at; None takes the stored one.
        top_n: Most candidates given back, >= 1; None gives all.
        threshold: Keep only P(yes) >= this; unscored ones are dropped then.
        missing: What to do with texts that have no stored states.
        owners: Records the texts are of; states that are encoded for them now are kept in the store.

    Returns:
        Best first, ties in input order; unscored candidates behind the scored ones, in input order.

    Raises:
        InputError: If the query is no valid string, or a number is out of range.
        MissingStateError: Under ``missing="raise"``.
        StateMismatchError: If the store is another model's, or `ratio` no multiple of its.
        StoreFormatError: If a stored state is damaged.
    """
    check_cut(top_n, threshold)
    check_missing(missing)
    if is_blank(query):
        return unscored_candidates(len(texts), top_n=top_n, threshold=threshold)
    engine, store = match_ratio(engine, store)
    ranking = rank_readable(
        engine,
        store,
        query,
        readable_texts(texts),
        instructions=instructions,
        ratio=ratio,
        threshold=threshold,
        missing=missing,
        owners=owners,
    )
    return ranking.candidates[:top_n]


def rank_readable(
    engine: Reranker,
    store: StateStore,
    query: str | PreparedQuery,
    readable: Sequence[str | None],
    *,
    instructions: Instructions | None,
    ratio: int | None,
    threshold: float | None,
    missing: Missing,
    owners: Owners | None,
) -> Ranking:
    """Rank what `readable_texts` gave and log how: what the adapters do between their hooks; see `rank_candidates`."""
    timings = Timings()
    ranking = rank_texts(
        engine,
        store,
        query,
        readable,
        missing=missing,
        timings=timings,
        instructions=instructions,
        ratio=ratio,
        threshold=threshold,
        owners=owners,
    )
    logger.info(
        "ranked %d candidates: %d from the store, %d encoded, %d not scored; seconds %s",
        len(readable),
        ranking.from_store,
        ranking.encoded,
        ranking.unscored,
        {stage: round(seconds, 4) for stage, seconds in timings.seconds.items()},
    )
    return ranking


def is_blank(query: str | PreparedQuery) -> bool:
    """Whether a query asks for nothing; such a one needs no engine: see `unscored_candidates`.

    Raises:
        InputError: If it is no valid string.
    """
    return not isinstance(query, PreparedQuery) and not check_text(query, "query").strip()


def unscored_candidates(count: int, *, top_n: int | None, threshold: float | None) -> list[RankedCandidate]:
    """What comes back for a blank query: the retrieval order, unscored; nothing under a threshold."""
    logger.warning(
        "query is blank, so %d candidates are not scored: %s",
        count,
        "they come back in retrieval order" if threshold is None else "the threshold drops them",
    )
    return [] if threshold is not None else [RankedCandidate(index=i) for i in range(count)][:top_n]


def readable_texts(texts: Sequence[str | None]) -> list[str | None]:
    """Texts that can be scored, None for others; why not is logged."""
    return [_readable(text, position) for position, text in enumerate(texts)]


def _readable(text: str | None, position: int) -> str | None:
    """A text that can be scored, or None; why not is logged."""
    try:
        return None if text is None else check_text(text, f"document {position}")
    except InputError as err:
        if not isinstance(text, str):
            raise
        logger.warning("%s It comes back unscored.", err)
        return None
