"""How one ranking went, for every door: ranked, selected and reported, or the retrieval order if that failed.

What the caller got wrong is checked before and always raised. Knows no framework and no Chroma.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from numbers import Real
from typing import Any, Literal, TypeVar, get_args

from kalm_rag.checks import check_cut
from kalm_rag.engine.prepared import PreparedQuery
from kalm_rag.engine.queue import cancel_on_error
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import DeadlineError, InputError
from kalm_rag.index.candidates import Missing, Owners, RankedCandidate, Ranking, check_missing
from kalm_rag.index.lazy_engine import LazyEngine
from kalm_rag.index.ranking import is_blank, rank_readable, readable_texts, unscored_candidates
from kalm_rag.index.results import LeftOut
from kalm_rag.index.select import Candidates, Selection, select_candidates
from kalm_rag.index.traces import ranking_span
from kalm_rag.instructions import Instructions
from kalm_rag.store import StateStore

logger = logging.getLogger(__name__)

OnError = Literal["raise", "retrieval_order"]
RERANKED = "reranked"
Selected = tuple[list[RankedCandidate], list[LeftOut]]
"""What `select_candidates` gives."""
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class FailurePolicy:
    """What happens when the model can't be loaded, fails, or takes too long.

    Attributes:
        on_error: ``"raise"``, or ``"retrieval_order"``: candidates come back in the order of the search, unscored and
            whatever the threshold; duplicates, budget and `top_n` hold. The status and one warning say why.
        timeout: Most seconds for loading, ranking and selecting, > 0; then it has failed with `DeadlineError`. Work
            that waits is dropped; a pass that runs ends by itself, in a thread that nobody waits for. What the app's
            ``count_tokens`` then takes for the retrieval order is not in it. None for no limit.

    Raises:
        InputError: If one is of the wrong kind or out of range.
    """

    on_error: OnError = "raise"
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.on_error not in get_args(OnError):
            raise InputError(f"on_error is {self.on_error!r}; wanted one of {', '.join(get_args(OnError))}.")
        number: object = self.timeout
        if number is not None and (
            isinstance(number, bool) or not isinstance(number, Real) or not 0.0 < float(number) or not isfinite(number)
        ):
            raise InputError(f"timeout is {number!r}; wanted seconds above 0, or None for no limit.")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one ranking.

    Attributes:
        candidates: What is handed on, best first.
        ranking: All that was ranked, and the counts.
        left_out: What the selection passed over, and why.
        status: ``"reranked"``, or ``"skipped: "`` and why.
        model: Name of the model.
        fingerprint: Names its states; None if it was not at hand.
        seconds: Spent on loading, ranking and selecting.
        truncated: How many of the scored passages the model read only the beginning of.
    """

    candidates: list[RankedCandidate]
    ranking: Ranking
    left_out: list[LeftOut]
    status: str
    model: str
    fingerprint: str | None
    seconds: float
    truncated: int

    @property
    def plain(self) -> bool:
        """Whether there is nothing to tell: reranked, nothing cut, nothing left out."""
        return self.status == RERANKED and not self.truncated and not self.left_out

    def report(self) -> dict[str, Any]:
        """Status, model, fingerprint, seconds, and counts of what was left out, for traces. Plain data."""
        return {
            "status": self.status,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "seconds": round(self.seconds, 4),
            "truncated": self.truncated,
            "left_out": dict(Counter(left.reason for left in self.left_out)),
        }

    def details(self, candidate: RankedCandidate) -> dict[str, Any]:
        """The report, with what became of one passage: what ``details=True`` puts on it."""
        pruned = {} if candidate.kept is None else {"kept": [list(span) for span in candidate.kept]}
        return {**self.report(), "truncated": candidate.truncated, **pruned}


def rank_and_select(
    lazy: LazyEngine,
    rank: Callable[[Reranker, StateStore], Ranking],
    *,
    given: Candidates,
    top_n: int | None,
    selection: Selection,
    policy: FailurePolicy,
) -> Outcome:
    """Load, rank and select under a failure policy, and log what came of it.

    Args:
        lazy: Gives engine and store, loading them if need be; also the tokenizer, if the ranking fails.
        rank: Ranks all candidates with them.
        given: The candidates.
        top_n: Most candidates.
        selection: Duplicates and budget.
        policy: What happens on failure.

    Raises:
        DeadlineError: Over the timeout, under ``on_error="raise"``; whatever `lazy` and `rank` raise likewise.
        InputError: If ``count_tokens`` gives anything but a whole number.
    """
    started = time.perf_counter()

    select = partial(select_candidates, given=given, selection=selection, top_n=top_n)

    def work() -> tuple[Reranker, Ranking, Selected]:
        engine, store = lazy.get()
        ranking = rank(engine, store)
        return engine, ranking, select(ranking, engine=engine)

    status = RERANKED
    engine: Reranker | None
    try:
        engine, ranking, selected = run_within(policy.timeout, work)
    except CancelledError:
        raise  # the caller gave up: nobody waits for an order
    except Exception as err:
        if policy.on_error == "raise":
            raise
        logger.warning(
            "reranking failed, so %d candidates come back in retrieval order, unscored: %r", len(given.read), err
        )
        status, ranking = f"skipped: {type(err).__name__}: {err}", retrieval_order(len(given.read))
        engine = lazy.loaded()  # its tokenizer counts all the same
        selected = select(ranking, engine=engine)
    return finish(ranking, selected, engine, status, started, model=lazy.spec.model, given=given)


def rank_for_app(
    lazy: LazyEngine,
    query: str | PreparedQuery,
    given: Candidates,
    *,
    instructions: Instructions | None,
    ratio: int | None,
    top_n: int | None,
    threshold: float | None,
    missing: Missing,
    selection: Selection,
    policy: FailurePolicy,
    owners: Callable[[], Owners | None],
) -> Outcome:
    """Rank and select as the adapters do: a blank query and texts that can't be scored take no app down.

    Takes what `kalm_rag.index.ranking.rank_candidates` and `rank_and_select` take, and raises what they do.
    `owners` is asked when there is something to rank, within the time allowed.
    """
    check_cut(top_n, threshold)
    check_missing(missing)
    started, read = time.perf_counter(), readable_texts(given.read)
    given, model = replace(given, read=read), lazy.spec.model

    def rank(engine: Reranker, store: StateStore) -> Ranking:
        return rank_readable(
            engine,
            store,
            query,
            read,
            instructions=instructions,
            ratio=ratio,
            threshold=threshold,
            missing=missing,
            owners=owners(),
        )

    chosen: dict[str, Any] = {"given": given, "top_n": top_n, "selection": selection}
    with ranking_span(query, instructions, given, top_n=top_n, model=model) as ended:
        if is_blank(query):
            placed = unscored_candidates(len(read), top_n=None, threshold=threshold)
            blank = Ranking(candidates=placed, from_store=0, encoded=0, unscored=len(read))
            selected = select_candidates(blank, engine=lazy.loaded(), **chosen)
            outcome = finish(blank, selected, None, "skipped: the query is blank", started, model=model, given=given)
        else:
            outcome = rank_and_select(lazy, rank, policy=policy, **chosen)
        ended(outcome.ranking, outcome.candidates, outcome.report())
    return outcome


def finish(
    ranking: Ranking,
    selected: Selected,
    engine: Reranker | None,
    status: str,
    started: float,
    *,
    model: str,
    given: Candidates,
) -> Outcome:
    """Report on a ranking and what was selected of it; see `rank_and_select`. `started` is of ``time.perf_counter``."""
    candidates, left_out = selected
    info = None if engine is None else engine.info
    states = None if ranking.states is None else ranking.states.states  # a threshold may have dropped what was cut
    outcome = Outcome(
        candidates=candidates,
        ranking=ranking,
        left_out=left_out,
        status=status,
        model=model if info is None else info.name,
        fingerprint=None if info is None else info.fingerprint,
        seconds=time.perf_counter() - started,
        truncated=0 if states is None else int((states.total_tokens > states.tokens).sum()),
    )
    if outcome.truncated:
        logger.warning(
            "%d of %d passages are longer than %s reads: only their beginnings were scored. Split them shorter.",
            outcome.truncated,
            len(given.read),
            outcome.model,
        )
    if left_out:
        logger.info(
            "handed on %d of %d candidates, left out %s", len(candidates), len(given.read), outcome.report()["left_out"]
        )
    return outcome


def retrieval_order(count: int) -> Ranking:
    """Candidates as the search gave them, unscored."""
    unscored = [RankedCandidate(index=place) for place in range(count)]
    return Ranking(candidates=unscored, from_store=0, encoded=0, unscored=count)


def run_within(seconds: float | None, work: Callable[[], Result]) -> Result:
    """Do some work, in a thread of its own if there is a limit.

    Raises:
        DeadlineError: If it takes longer; what the work still waits for is dropped.
    """
    if seconds is None:
        return work()
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as err:  # told to who waits
            future.set_exception(err)

    with cancel_on_error():
        threading.Thread(target=copy_context().run, args=(run,), name="kalm-rag-rank", daemon=True).start()
        try:
            return future.result(min(seconds, threading.TIMEOUT_MAX))
        except FutureTimeoutError as err:
            if future.done():  # just now, or by a timeout of the work's own
                return future.result()
            raise DeadlineError(
                f"ranking took longer than timeout={seconds:g} seconds. Give it more, rank fewer candidates, or take "
                f"on_error='retrieval_order'."
            ) from err
