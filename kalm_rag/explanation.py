"""Which part of a passage the decoder looked at: attention over pooled states, mapped back to character spans.

Attention shows where the decoder looked, not why it judged as it did. One passage at a time; not for ranking.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

from kalm_rag.instructions import Instructions, check_text
from kalm_rag.prompts import as_instructions
from kalm_rag.ranking import check_query
from kalm_rag.reranker import Reranker
from kalm_rag.states import batch_states


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
    """

    query: str
    passage: str
    spans: list[Span]
    margin: float
    probability: float

    def top(self, count: int = 3) -> list[tuple[str, float]]:
        """The stretches looked at most: text and share, most first."""
        best = sorted(self.spans, key=lambda s: -s.weight)[:count]
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

    def _repr_html_(self) -> str:
        return self.to_html()


def explain(
    engine: Reranker,
    query: str,
    passage: str,
    *,
    instructions: Instructions | str | None = None,
    ratio: int | None = None,
) -> Explanation:
    """Score one passage and tell where the decoder looked.

    Args:
        engine: Any engine.
        query: The question.
        passage: One text.
        instructions: System and task text.
        ratio: A multiple of the engine's ratio; spans get longer with it. None takes the engine's.

    Raises:
        InputError: If the query is blank, or a text is no valid string.
        StateMismatchError: If `ratio` is no multiple of the engine's.
    """
    check_query(query)
    check_text(passage, "passage")
    backbone = engine.backbone
    states = batch_states(engine.encode([passage]))
    (relevance,) = engine.score(query, states, instructions=instructions, ratio=ratio)
    prompt = backbone.prompt(query, as_instructions(instructions) or Instructions())
    vectors, counts = states.on(backbone.device, backbone.state_dtype, ratio)
    words = states.words_on(backbone.device, ratio)
    weights = backbone.attend(prompt, vectors, counts, words)[0].float().cpu().tolist()
    offsets = backbone.offsets(passage)
    step = ratio if ratio is not None else states.ratio
    spans: list[Span] = []
    for number, weight in enumerate(weights):
        behind = [o for o in offsets[number * step : (number + 1) * step] if o[1] > o[0]]
        start = max(min((o[0] for o in behind), default=0), spans[-1].end if spans else 0)
        end = max((o[1] for o in behind), default=0)
        if end > start:
            spans.append(Span(start, end, weight))
    return Explanation(
        query=query, passage=passage, spans=spans, margin=relevance.margin, probability=relevance.probability
    )
