"""Which part of a passage the decoder looked at: attention over pooled states, mapped back to character spans.

Attention shows where the decoder looked, not why it judged as it did. One passage at a time; not for ranking.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from kalm_rag.checks import check_count


@dataclass(frozen=True)
class Span:
    """A stretch of the passage behind one pooled state: characters ``[start, end)`` and its share of attention."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where the decoder looked in one passage. Shows itself as highlights in a notebook.

    Attributes:
        query: The question.
        passage: The text, whole; what lies beyond the model's limit has no span.
        spans: In reading order; weights sum to 1 over all states, template tokens included.
        margin: logit(yes) - logit(no).
        probability: P(yes).

    Example:
        >>> from kalm_rag import Reranker
        >>> with Reranker.from_pretrained("pico", device="cpu") as reranker:
        ...     told = reranker.explain("What do bees make?", "Rust is iron. Bees make honey.")
        >>> [text for text, _ in told.top(1)]
        ['. Bees make honey']
    """

    query: str
    passage: str
    spans: list[Span]
    margin: float
    probability: float

    def top(self, count: int = 3) -> list[tuple[str, float]]:
        """Give the stretches looked at most: text and share of attention, most first.

        Args:
            count: Most stretches, >= 1.

        Raises:
            InputError: If `count` is not a whole number >= 1.
        """
        best = sorted(self.spans, key=lambda s: -s.weight)[: check_count(count, "count")]
        return [(self.passage[s.start : s.end], s.weight) for s in best]

    def to_html(self) -> str:
        """The passage with a background as dark as the attention; user text is escaped."""
        strongest = max((s.weight for s in self.spans), default=0.0)
        parts, at = [], 0
        for span in self.spans:
            shade = span.weight / strongest if strongest > 0 else 0.0
            parts.append(html.escape(self.passage[at : span.start]))
            parts.append(
                f'<span style="background: rgba(255, 160, 0, {shade:.2f})" title="{span.weight:.3f}">'
                f"{html.escape(self.passage[span.start : span.end])}</span>"
            )
            at = span.end
        parts.append(html.escape(self.passage[at:]))
        return (
            f'<div style="line-height: 1.6"><b>{html.escape(self.query)}</b> P(yes) = {self.probability:.3f}<br>'
            f'<span style="white-space: pre-wrap">{"".join(parts)}</span></div>'
        )

    def to_text(self) -> str:
        """The passage with ``[[ ]]`` around stretches that got at least half of the strongest attention."""
        strongest = max((s.weight for s in self.spans), default=0.0)
        parts, at, open_until = [], 0, False
        for span in self.spans:
            marked = strongest > 0 and span.weight >= strongest / 2
            gap = self.passage[at : span.start]
            if open_until and not marked:
                parts.append("]]" + gap)
            elif marked and not open_until:
                parts.append(gap + "[[")
            else:
                parts.append(gap)
            parts.append(self.passage[span.start : span.end])
            open_until, at = marked, span.end
        return "".join(parts) + ("]]" if open_until else "") + self.passage[at:]

    def __repr__(self) -> str:
        best = ", ".join(f"{text!r} {share:.2f}" for text, share in self.top())
        return (
            f"Explanation(query={self.query!r:.60}, probability={self.probability:.4f}, looked at: {best or 'nothing'})"
        )

    def _repr_html_(self) -> str:
        return self.to_html()


def attended_spans(weights: Sequence[float], offsets: Sequence[tuple[int, int]], step: int) -> list[Span]:
    """Character spans behind pooled states.

    Args:
        weights: Share of attention of each state.
        offsets: Characters ``[start, end)`` behind each token; empty for template tokens.
        step: Tokens a state stands for.
    """
    spans: list[Span] = []
    for number, weight in enumerate(weights):
        behind = [o for o in offsets[number * step : (number + 1) * step] if o[1] > o[0]]
        start = max(min((o[0] for o in behind), default=0), spans[-1].end if spans else 0)
        end = max((o[1] for o in behind), default=0)
        if end > start:
            spans.append(Span(start, end, weight))
    return spans
