"""What an index reports: hits of a query, and what adding, verifying and mending did. Plain data, ready for JSON."""

from __future__ import annotations

import html
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One passage of an answer.

    Attributes:
        id: Its record id in the collection.
        text: Its text; with `prune`, what is left of it, with ``…`` where sentences went.
        metadata: Its metadata, a copy.
        retrieval_rank: Its place in the vector search, from 1.
        distance: Chroma's distance; lower is nearer.
        margin: logit(yes) - logit(no); higher is better. None if it was not scored (``missing="skip"``, or no text).
        probability: P(yes) in [0, 1], None likewise.
        truncated: Whether the model read only the beginning of it.
        kept: Characters ``[start, end)`` of the record's text that `text` has; None for all of it.
    """

    id: str
    text: str | None
    metadata: Mapping[str, Any]
    retrieval_rank: int
    distance: float
    margin: float | None = None
    probability: float | None = None
    truncated: bool = False
    kept: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A candidate that the selection passed over.

    Attributes:
        id: Its record id; in the adapters the document's or node's id.
        reason: ``"threshold"``, ``"duplicate"``, ``"budget"``; ``"diversity"`` if one ranked below took its place.
        duplicate_of: Id of the better-ranked passage that it repeats.
        tokens: How many it would have taken, of a budget that had fewer left.
    """

    id: str
    reason: Literal["threshold", "duplicate", "budget", "diversity"]
    duplicate_of: str | None = None
    tokens: int | None = None


@dataclass(kw_only=True)
class Timings:
    """Seconds spent in each named stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage, also when it fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class QueryResult:
    """Answer of `ChromaIndex.query`; iterates over its hits, best first.

    Attributes:
        query: The question.
        hits: Best first; unscored ones behind the scored, in retrieval order.
        candidates: Passages the vector search gave.
        from_store: Of them, how many had stored states.
        encoded: How many were encoded now, because they had none.
        unscored: How many could not be scored (skipped by policy, or without text).
        seconds: Stage to seconds: embed, search, fetch, encode, score.
        status: ``"reranked"``, or ``"skipped: "`` and why: hits are in retrieval order then, unscored.
        model: Name of the model that ranked, or should have.
        fingerprint: Names its states; None if it could not be asked.
        left_out: Candidates that threshold, duplicates, budget or diversity kept from the hits, without those behind
            `top_n`.
    """

    query: str
    hits: list[Hit]
    candidates: int
    from_store: int
    encoded: int
    unscored: int
    seconds: dict[str, float]
    status: str = "reranked"
    model: str = ""
    fingerprint: str | None = None
    left_out: list[LeftOut] = field(default_factory=list)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __len__(self) -> int:
        return len(self.hits)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON."""
        return asdict(self)

    def to_html(self) -> str:
        """The hits as a table that shows how far each one moved; user text is escaped."""
        rows = []
        for place, hit in enumerate(self.hits, 1):
            move = hit.retrieval_rank - place
            arrow = f"▲ {move}" if move > 0 else f"▼ {-move}" if move < 0 else "="
            colour = "green" if move > 0 else "firebrick" if move < 0 else "gray"
            told = "-" if hit.probability is None else f"{hit.probability:.3f}"
            text = html.escape(textwrap.shorten(hit.text or "", 160, placeholder=" …"))
            rows.append(
                f"<tr><td>{place}</td><td>{hit.retrieval_rank}</td><td style='color: {colour}'>{arrow}</td>"
                f"<td>{told}</td><td style='text-align: left'>{html.escape(hit.id)}</td>"
                f"<td style='text-align: left'>{text}</td></tr>"
            )
        names = {"now": "", "was": "", "move": "", "P(yes)": "", "id": "left", "passage": "left"}
        head = "".join(f"<th style='text-align: {side or 'right'}'>{name}</th>" for name, side in names.items())
        caption = f"{self.candidates} candidates: {self.from_store} from the store, {self.encoded} encoded now"
        return f"<b>{html.escape(self.query)}</b><table><tr>{head}</tr>{''.join(rows)}</table><small>{caption}</small>"

    def _repr_html_(self) -> str:
        return self.to_html()


@dataclass(frozen=True, kw_only=True)
class AddReport:
    """What adding did.

    Attributes:
        records: Records written to the collection.
        encoded: Distinct passages that went through the encoder.
        from_store: Records whose states were there already.
        unchanged: Records left alone: same text, same metadata.
        truncated: Ids of passages longer than the model reads.
        seconds: Stage to seconds.
    """

    records: int = 0
    encoded: int = 0
    from_store: int = 0
    unchanged: int = 0
    truncated: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: AddReport) -> AddReport:
        stages = self.seconds.keys() | other.seconds.keys()
        seconds = {stage: self.seconds.get(stage, 0.0) + other.seconds.get(stage, 0.0) for stage in stages}
        sums = {name: mine + getattr(other, name) for name, mine in vars(self).items() if name != "seconds"}
        return AddReport(**sums, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """How a collection and its store agree.

    Attributes:
        records: Records in the collection.
        without_text: Ids of records that hold no text; they can't be reranked.
        missing: Ids of records whose present text has no stored states.
        stale: Ids of records whose reference names another text than the present one.
        unreferenced: Ids of records that the store has no reference of.
        orphans: Record ids the store knows and the collection doesn't.
        damaged: Keys of stored states that fail their checksum.
        unfindable: Ids of records that no vector search reaches, though they are there; `rebuild` mends that.
    """

    records: int
    without_text: list[str]
    missing: list[str]
    stale: list[str]
    unreferenced: list[str]
    orphans: list[str]
    damaged: list[str]
    unfindable: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether every record with text can be found and has sound states and a right reference, and none is over."""
        return not (self.missing or self.stale or self.unreferenced or self.orphans or self.damaged or self.unfindable)


@dataclass(frozen=True, kw_only=True)
class BackfillReport:
    """What mending did: passages encoded, references written and dropped, damaged states thrown away."""

    encoded: int
    referenced: int
    dropped: int = 0
    discarded: int


@dataclass(frozen=True, kw_only=True)
class RebuildReport:
    """What making a collection again did.

    Attributes:
        records: Records in the new collection.
        kept: Of them, how many keep the vector they had.
        embedded: How many vectors were made again, of stored states or by the embedder.
        encoded: Passages that went through the encoder, because their states were missing.
    """

    records: int = 0
    kept: int = 0
    embedded: int = 0
    encoded: int = 0

    def __add__(self, other: RebuildReport) -> RebuildReport:
        return RebuildReport(**{name: count + getattr(other, name) for name, count in vars(self).items()})
