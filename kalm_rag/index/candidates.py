"""From candidate texts to a ranking: states fetched where stored, else by the caller's policy; then the decoder.

The one way in which the index and the framework adapters get and score states, so that all of them count alike and
none can score a text other than the one at hand. Knows no Chroma and no framework.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kalm_rag.engine.relevance import rank_relevances
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, MissingStateError, StoreError, StoreFormatError
from kalm_rag.index.results import Timings
from kalm_rag.instructions import Instructions
from kalm_rag.states import StateBatch, merge_batches, pack_states, passage_key, unpack_batch
from kalm_rag.store import Reference, StateStore

logger = logging.getLogger(__name__)

Missing = Literal["encode", "raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class CandidateStates:
    """States of candidates.

    Attributes:
        rows: Positions of the candidates that have states, ascending.
        states: Their states, one row each, in that order; None if there are none.
        from_store: How many candidates had stored states.
        encoded: How many distinct texts were encoded now.
    """

    rows: list[int]
    states: StateBatch | None
    from_store: int
    encoded: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedCandidate:
    """One candidate of a ranking.

    Attributes:
        index: Its position among the candidates.
        margin: logit(yes) - logit(no); None if it was not scored.
        probability: P(yes); None likewise.
        truncated: Whether the model read only the beginning of it.
    """

    index: int
    margin: float | None = None
    probability: float | None = None
    truncated: bool = False


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Candidates in their new order, and how they came by their states.

    Attributes:
        placed: Best first, ties in input order; unscored ones behind the scored, in input order.
        from_store: How many had stored states.
        encoded: How many distinct texts were encoded now.
        unscored: How many were not scored: skipped by policy, or without text.
    """

    placed: list[RankedCandidate]
    from_store: int
    encoded: int
    unscored: int


def check_missing(missing: str) -> Missing:
    """Read a policy for candidates without stored states.

    Raises:
        InputError: If there is no such policy.
    """
    for policy in get_args(Missing):
        if missing == policy:
            return policy  # type: ignore[no-any-return]
    raise InputError(f"missing is {missing!r}; wanted one of {', '.join(get_args(Missing))}.")


def find_states(
    engine: Reranker,
    store: StateStore,
    texts: Sequence[str | None],
    *,
    missing: Missing,
    timings: Timings,
    references: Sequence[Reference] = (),
) -> CandidateStates:
    """Get states of texts, by content.

    Args:
        engine: Encodes what is missing; its ratio must be the store's.
        store: Where states are kept.
        texts: Candidates in retrieval order; None marks one without text, which gets no states.
        missing: ``"encode"`` (and keep), ``"raise"`` or ``"skip"``.
        timings: Gets the stages ``fetch`` and ``encode``.
        references: Records whose states should not be swept by `gc`; those of texts encoded now are kept with them.

    Raises:
        MissingStateError: Under ``"raise"``, naming how many and the first.
        StoreFormatError: If a stored state is damaged.
    """
    rows = [i for i, text in enumerate(texts) if text is not None]
    wanted = [text for text in texts if text is not None]
    keys = [passage_key(text) for text in wanted]
    if not rows:
        return CandidateStates(rows=[], states=None, from_store=0, encoded=0)
    with timings.stage("fetch"):
        fetched = store.get_many(keys)
    absent = fetched.missing
    if absent and missing == "raise":
        raise MissingStateError(
            f"{len(absent)} of {len(wanted)} candidates have no stored states (first: {wanted[absent[0]]!r:.60}). "
            f"Run backfill, or pass missing='encode'."
        )
    if not absent or missing == "skip":
        found = [rows[i] for i in fetched.found]
        return CandidateStates(rows=found, states=fetched.batch, from_store=len(found), encoded=0)
    with timings.stage("encode"):
        fresh, encoded = _encode_and_keep(
            engine, store, [wanted[i] for i in absent], [r for r in references if r.key in {keys[i] for i in absent}]
        )
    parts = [(absent, fresh)] if fetched.batch is None else [(fetched.found, fetched.batch), (absent, fresh)]
    states = merge_batches(len(rows), parts)
    return CandidateStates(rows=rows, states=states, from_store=len(fetched.found), encoded=encoded)


def rank_texts(
    engine: Reranker,
    store: StateStore,
    query: str,
    texts: Sequence[str | None],
    *,
    missing: Missing,
    timings: Timings,
    instructions: Instructions | None = None,
    ratio: int | None = None,
    threshold: float | None = None,
    references: Sequence[Reference] = (),
) -> Ranking:
    """Find states of candidates and order them by relevance; see `find_states` for the arguments both take.

    Args:
        engine: Encodes and scores.
        store: Where states are kept.
        query: The question.
        texts: Candidates in retrieval order; None marks one without text.
        missing: Policy for texts without states.
        timings: Gets the stages ``fetch``, ``encode`` and ``score``.
        instructions: System and task text.
        ratio: A multiple of the stored ratio; None takes the stored one.
        threshold: Keep only P(yes) >= this; unscored ones are dropped too.
        references: Records whose states should be kept.

    Raises:
        InputError: As `Reranker.score`.
        MissingStateError: Under ``missing="raise"``.
        StateMismatchError: If `ratio` is no multiple of the stored one.
        StoreFormatError: If a stored state is damaged.
    """
    looked = find_states(engine, store, texts, missing=missing, timings=timings, references=references)
    states = looked.states
    with timings.stage("score"):
        relevances = engine.score(query, states if states is not None else [], instructions=instructions, ratio=ratio)
    cut = [] if states is None else (states.total_tokens > states.tokens).tolist()
    placed = [
        RankedCandidate(index=looked.rows[r.index], margin=r.margin, probability=r.probability, truncated=cut[r.index])
        for r in rank_relevances(relevances, threshold=threshold)
    ]
    unscored = sorted(set(range(len(texts))) - set(looked.rows))
    if threshold is None:
        placed += [RankedCandidate(index=i) for i in unscored]
    return Ranking(placed=placed, from_store=looked.from_store, encoded=looked.encoded, unscored=len(unscored))


def _encode_and_keep(
    engine: Reranker, store: StateStore, texts: Sequence[str], references: Sequence[Reference]
) -> tuple[StateBatch, int]:
    """Encode texts, keep them if the store can be written, and give what the store would give."""
    states = engine.encode(texts)
    distinct = list({s.key: s for s in states}.values())
    try:
        store.put_many(distinct, references)
    except StoreFormatError:
        raise
    except StoreError as err:  # a read-only or full disk must not take the answer away
        logger.warning("states of %d passages could not be kept: %s", len(distinct), err)
    payloads = [pack_states(s, store.layout) for s in states]  # the stored rounding, so that later queries agree
    batch = unpack_batch(payloads, [s.tokens for s in states], [s.total_tokens for s in states], store.layout)
    return batch, len(distinct)
