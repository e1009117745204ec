"""The one home of "texts become states": looked up by content, else encoded, at query time and at indexing.

`load_states` serves a query, `keep_states` the writer, `rank_texts` goes on to the decoder. No door has a loop of its
own over missing states, and none can score a text other than the one at hand. Knows no Chroma and no framework.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from kalm_rag.engine.prepared import PreparedQuery
from kalm_rag.engine.relevance import rank_relevances
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, MissingStateError, StoreError, StoreFormatError
from kalm_rag.index.results import Timings
from kalm_rag.index.state_cache import cache_beside
from kalm_rag.instructions import Instructions
from kalm_rag.states import (
    Codec,
    PassageStates,
    StateBatch,
    batch_states,
    merge_batches,
    pack_states,
    passage_key,
    unpack_batch,
)
from kalm_rag.store import Reference, StateStore

logger = logging.getLogger(__name__)

Missing = Literal["encode", "raise", "skip"]

KEEP_SECONDS = 0.5
"""How long a query waits for another process's write before it keeps fresh states in memory instead."""


@dataclass(frozen=True, kw_only=True)
class Owners:
    """Records that texts come from: what is encoded for them is kept in the store, with a reference.

    Attributes:
        collection_id: Chroma's id of their collection.
        record_ids: One per text; None for a text that is no record's.
        scope: Names the database, see `StateStore.put_many`.
    """

    collection_id: str
    record_ids: Sequence[str | None]
    scope: str = ""

    @classmethod
    def nobody(cls, count: int) -> Owners:
        """For texts that are no record's (yet): what is encoded for them is kept in memory only."""
        return cls(collection_id="", record_ids=[None] * count)


@dataclass(frozen=True, kw_only=True)
class CandidateStates:
    """States of candidates.

    Attributes:
        rows: Positions of the candidates that have states, ascending.
        states: Their states, one row each, in that order; None if there are none.
        from_store: How many candidates had states already, in the store or in the process's cache.
        encoded: How many distinct texts were encoded now.
    """

    rows: list[int]
    states: StateBatch | None
    from_store: int
    encoded: int


@dataclass(frozen=True, kw_only=True)
class KeptStates:
    """What the writer knows of the texts of one batch: their keys, states encoded now, how many were stored."""

    keys: list[str]
    fresh: dict[str, PassageStates] = field(default_factory=dict)
    from_store: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedCandidate:
    """One candidate of a ranking.

    Attributes:
        index: Its position among the candidates.
        margin: logit(yes) - logit(no); None if it was not scored.
        probability: P(yes); None likewise.
        truncated: Whether the model read only the beginning of it.
        kept: Characters ``[start, end)`` of its own text that a selection left of it; None for all.
    """

    index: int
    margin: float | None = None
    probability: float | None = None
    truncated: bool = False
    kept: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Candidates in their new order, and how they came by their states.

    Attributes:
        candidates: Best first, ties in input order; unscored ones behind the scored, in input order.
        from_store: How many had states already.
        encoded: How many distinct texts were encoded now.
        unscored: How many were not scored: skipped by policy, or without text.
        states: Their states, for who goes on to select; None if there was no ranking.
        seconds: Stage to seconds: fetch, encode, score; a caller's own stages, too.
        score: Margins of other states under the same query, for who goes on to select.
    """

    candidates: list[RankedCandidate]
    from_store: int
    encoded: int
    unscored: int
    states: CandidateStates | None = field(default=None, repr=False, compare=False)
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    score: Callable[[StateBatch], list[float]] | None = field(default=None, repr=False, compare=False)


def check_missing(missing: str) -> Missing:
    """Read a policy for candidates without stored states."""
    if missing not in get_args(Missing):
        raise InputError(f"missing is {missing!r}; wanted one of {', '.join(get_args(Missing))}.")
    return cast("Missing", missing)


def load_states(
    engine: Reranker,
    store: StateStore,
    texts: Sequence[str | None],
    *,
    missing: Missing,
    timings: Timings,
    owners: Owners | None = None,
) -> CandidateStates:
    """Get states of texts, by content: from the store, from the process's cache, or by the caller's policy.

    Args:
        engine: Encodes what is missing; its ratio must be the store's.
        store: Where states are kept.
        texts: Candidates in retrieval order; None marks one without text, which gets no states.
        missing: ``"encode"`` (and keep), ``"raise"`` or ``"skip"``.
        timings: Gets the stages ``fetch`` and ``encode``.
        owners: Records the texts are of: what is encoded for a record is kept in the store, the rest in the process's
            cache. None keeps all in the store, without references.

    Raises:
        MissingStateError: Under ``"raise"``, naming how many and the first.
        StoreFormatError: If a stored state is damaged.
    """
    rows = [i for i, text in enumerate(texts) if text is not None]
    wanted = [text for text in texts if text is not None]
    keys = [passage_key(text) for text in wanted]
    parts: list[tuple[Sequence[int], StateBatch]] = []  # which of `wanted`, and their states
    with timings.stage("fetch"):
        absent = list(range(len(wanted)))
        for place in (store, cache_beside(store)):
            if not absent or place is None:
                break
            fetched = place.get_many([keys[i] for i in absent])
            if fetched.batch is not None:
                parts.append(([absent[i] for i in fetched.found], fetched.batch))
            absent = [absent[i] for i in fetched.missing]
    encoded = 0
    if absent and missing == "raise":
        raise MissingStateError(
            f"{len(absent)} of {len(wanted)} candidates have no stored states (first: {wanted[absent[0]]!r:.60}). "
            f"Run backfill, or pass missing='encode'."
        )
    if absent and missing == "encode":
        with timings.stage("encode"):
            states = engine.encode([wanted[i] for i in absent])
            parts.append((absent, as_stored(states, store)))
            encoded = _keep_if_possible(store, states, [rows[i] for i in absent], owners)
    scored = sorted(i for part, _ in parts for i in part)
    if not scored:
        return CandidateStates(rows=[], states=None, from_store=0, encoded=0)
    place_of = {i: row for row, i in enumerate(scored)}
    batch = merge_batches(len(scored), [([place_of[i] for i in part], states) for part, states in parts])
    hits = len(scored) - (len(absent) if missing == "encode" else 0)
    return CandidateStates(rows=[rows[i] for i in scored], states=batch, from_store=hits, encoded=encoded)


def keep_states(engine: Reranker, store: StateStore, texts: Sequence[str], timings: Timings) -> KeptStates:
    """Encode those texts of new records that have no stored states; nothing is written yet."""
    keys = [passage_key(text) for text in texts]
    with timings.stage("fetch"):
        absent = store.missing(keys)
    todo = {key: text for key, text in zip(keys, texts, strict=True) if key in absent}
    with timings.stage("encode"):
        cache = cache_beside(store) if store.layout.codec is Codec.EXACT else None  # as they were made, or not at all
        at_hand = {} if cache is None else cache.states(list(todo))
        left = [key for key in todo if key not in at_hand]
        states = engine.encode([todo[key] for key in left], show_progress=False, keys=left)
        at_hand |= dict(zip(left, states, strict=True))
    return KeptStates(keys=keys, fresh=at_hand, from_store=sum(key not in absent for key in keys))


def rank_texts(
    engine: Reranker,
    store: StateStore,
    query: str | PreparedQuery,
    texts: Sequence[str | None],
    *,
    missing: Missing,
    timings: Timings,
    instructions: Instructions | None = None,
    ratio: int | None = None,
    threshold: float | None = None,
    owners: Owners | None = None,
) -> Ranking:
    """Get states of candidates and order them by relevance; takes and raises what `load_states` does.

    `query` is the question, or what `Reranker.prepare` made of it, then without `instructions`. `ratio` is a multiple
    of the stored ratio (else StateMismatchError); None takes the stored one. `threshold` keeps only P(yes) >= this, and
    no unscored ones.
    """
    loaded = load_states(engine, store, texts, missing=missing, timings=timings, owners=owners)
    states = loaded.states
    with timings.stage("score"):
        if states is not None and not isinstance(query, PreparedQuery):  # read once, for who goes on to select, too
            query, instructions = engine.prepare(query, instructions), None
        relevances = engine.score(query, states if states is not None else [], instructions=instructions, ratio=ratio)

    def score(others: StateBatch) -> list[float]:
        return [r.margin for r in engine.score(query, others, instructions=instructions, ratio=ratio)]

    cut = [] if states is None else (states.total_tokens > states.tokens).tolist()
    ranked = [
        RankedCandidate(index=loaded.rows[r.index], margin=r.margin, probability=r.probability, truncated=cut[r.index])
        for r in rank_relevances(relevances, threshold=threshold)
    ]
    unscored = sorted(set(range(len(texts))) - set(loaded.rows))
    if threshold is None:
        ranked += [RankedCandidate(index=i) for i in unscored]
    return Ranking(
        candidates=ranked,
        from_store=loaded.from_store,
        encoded=loaded.encoded,
        unscored=len(unscored),
        states=loaded,
        seconds=dict(timings.seconds),
        score=score,
    )


def as_stored(states: Sequence[PassageStates], store: StateStore) -> StateBatch:
    """States made just now as the store would give them: with its codec's rounding, so that later queries agree."""
    if store.layout.codec is Codec.EXACT:
        return batch_states(states)
    payloads = [pack_states(s, store.layout) for s in states]
    return unpack_batch(payloads, [s.tokens for s in states], [s.total_tokens for s in states], store.layout)


def _keep_if_possible(
    store: StateStore, states: Sequence[PassageStates], rows: Sequence[int], owners: Owners | None
) -> int:
    """Keep states of records in the store, others in the process's cache; give how many distinct ones there are.

    Keeping never delays or takes away an answer that is ready: where the store is locked, full or read-only, states
    stay in memory. `rows` tells which of the `owners` the states are of.
    """
    distinct = {s.key: s for s in states}
    references = [
        Reference(collection_id=owners.collection_id, record_id=record_id, key=s.key)
        for row, s in zip(rows, states, strict=True)
        if owners is not None and (record_id := owners.record_ids[row]) is not None
    ]
    used = {reference.key for reference in references} if owners is not None else distinct.keys()
    lasting = [s for key, s in distinct.items() if key in used]
    passing = [s for key, s in distinct.items() if key not in used]
    if lasting:
        try:
            store.put_many(lasting, references, scope=owners.scope if owners is not None else "", wait=KEEP_SECONDS)
        except StoreFormatError:
            raise
        except StoreError as err:
            logger.warning("states of %d passages could not be kept, only cached: %s", len(lasting), err)
            passing += lasting
    if passing:
        cache = cache_beside(store)
        (cache if cache is not None else store).put_many(passing)
    return len(distinct)
