"""Sentences of a passage that don't answer the question go, before it is handed to an LLM.

Each sentence is scored by the same decoder over the stored states of that sentence alone: no text is read again. Knows
no framework and no Chroma.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from kalm_rag.engine.reranker import Reranker
from kalm_rag.index.candidates import Ranking

Span = tuple[int, int]
"""Characters ``[start, end)``."""

GAP = "…"
"""Marks what went."""

# Measured with pico at ratio 4, see the model card: of 300 passages of SelQA's dev set 42% of the text stays with it
# and 95.4% of the answers' sentences; with 3 it is 30% and 91%, with 5 57% and 97%.
PRUNE_MARGINS = {"pico": 4.0}
"""Family of models to how far below its passage's best sentence the margin of one that stays may lie."""

BLOCK = 16
"""Most passages whose sentences are scored in one go."""

MOST_TOKENS = 1 << 18
"""Tokens in a block of sentences, padding included: 50 MB of pico's states at ratio 4."""

_ABBREVIATIONS = (
    "Mr Mrs Ms Dr Prof Rev Hon Gen Col Capt Lt Sgt Gov Sen Rep Pres St Mt Ft Jr Sr Wm vs etc cf al ca Fig Figs Eq Eqs "
    "Vol pp op ed eds Inc Ltd Co Corp Bros approx"
)
_END = re.compile(r"[.!?。！？]+[\"'”’)\]]*|\n[^\S\n]*\n\s*|\n(?=[^\S\n]*(?:[-*•#|>]|\d{1,3}[.)]))")
_FULL_WIDTH = "。！？"
_ABBREVIATED = re.compile(rf"(?:^|[^\w.])(?:(?i:{'|'.join(_ABBREVIATIONS.split())})|Nos?|(?:[A-Za-z]\.)*[A-Za-z])\.$")
_LOOK_BACK = 12  # characters: longer than any of them


def split_sentences(text: str) -> list[Span]:
    """Find sentences, in reading order, without the blanks around them: by marks of their ends, blank lines and lists.

    An abbreviation may end one too early; never is a character in two, and none but blanks in none.
    """
    ends = [0]
    for found in _END.finditer(text):  # no part of it is read twice: a lookahead behind the run of marks would
        end, mark = found.end(), found.group()
        ends_there = mark[0] == "\n" or text[end : end + 1].isspace() or any(c in _FULL_WIDTH for c in mark[:9])
        if ends_there and not _ABBREVIATED.search(text[max(0, end - _LOOK_BACK) : end]):
            ends.append(end)
    spans = []
    for start, end in pairwise([*ends, len(text)]):
        stretch = text[start:end]
        inner = stretch.strip()
        if inner:
            first = start + stretch.index(inner)
            spans.append((first, first + len(inner)))
    return spans


def pruned_text(text: str, kept: Sequence[Span] | None) -> str:
    """The kept stretches of a text, with ``…`` where something went; all of it for None."""
    if kept is None:
        return text
    parts: list[str] = []
    end = 0
    for start, stop in kept:
        between = text[end:start]
        if between.strip():
            parts.append(f" {GAP} " if parts else f"{GAP} ")
        elif parts:
            parts.append(between)
        parts.append(text[start:stop])
        end = stop
    return "".join([*parts, f" {GAP}" if text[end:].strip() else ""])


class Pruner:
    """Finds which sentences of candidates stay; scores those of several candidates at a time, when first asked.

    Args:
        engine: Whose decoder.
        ranking: Candidates, best first, their states and the decoder's pass.
        read: Their texts as the model reads them; None for one without text.
        body: Gives the part of a candidate's text that may be pruned; None for one that stays whole.
        margin: How far below its passage's best sentence one that stays may lie, > 0.
        most: How many candidates are handed on at most; None for all.
    """

    def __init__(
        self,
        engine: Reranker,
        ranking: Ranking,
        read: Sequence[str | None],
        body: Callable[[int], str | None],
        margin: float,
        most: int | None = None,
    ) -> None:
        self._engine, self._read, self._body, self._below = engine, read, body, margin
        self._block = BLOCK if most is None else min(most, BLOCK)
        self._rows: dict[int, int] = {}
        self._kept: dict[int, list[Span] | None] = {}
        if ranking.score is not None and ranking.states is not None and ranking.states.states is not None:
            self._judge, self._states = ranking.score, ranking.states.states
            self._rows = {place: row for row, place in enumerate(ranking.states.rows)}
        self._order = [c.index for c in ranking.candidates if c.index in self._rows]

    def kept(self, place: int) -> list[Span] | None:
        """Stretches of a candidate's body that stay, in reading order; None where all of it does.

        A text whose body isn't found in what the model reads stays whole, and so does what lies behind the model's cut.
        """
        if place not in self._rows:
            return None
        if place not in self._kept:
            behind = self._order[self._order.index(place) + 1 :]  # likely the next that are asked for
            self._score([place, *(other for other in behind if other not in self._kept)])
        return self._kept[place]

    def _score(self, places: Sequence[int]) -> None:
        """Score the sentences of the first of some candidates."""
        sentences = {place: self._sentences(place) for place in places[: self._block]}
        parts = [
            (self._rows[place], *tokens)
            for place, found in sentences.items()
            for _, tokens in found
            if tokens is not None
        ]
        margins = iter(self._margins(parts))
        for place, found in sentences.items():
            scored = [(span, None if tokens is None else next(margins)) for span, tokens in found]
            least = max((m for _, m in scored if m is not None), default=0.0) - self._below
            kept = [span for span, margin in scored if margin is None or margin >= least]
            self._kept[place] = kept if len(kept) < len(scored) else None

    def _margins(self, parts: Sequence[tuple[int, int, int]]) -> list[float]:
        """Margins of stretches (row, first token, token behind the last), in their order.

        Those of like length are scored together, so that a long one doesn't make all others as wide.
        """
        margins = [0.0] * len(parts)
        blocks: list[list[int]] = []
        for number in sorted(range(len(parts)), key=lambda number: parts[number][2] - parts[number][1]):
            size = parts[number][2] - parts[number][1]
            if not blocks or (len(blocks[-1]) + 1) * size > MOST_TOKENS:
                blocks.append([])
            blocks[-1].append(number)
        for block in blocks:
            judged = self._judge(self._states.stretches([parts[number] for number in block]))
            for number, margin in zip(block, judged, strict=True):
                margins[number] = margin
        return margins

    def _sentences(self, place: int) -> list[tuple[Span, Span | None]]:
        """Sentences of a body, and which tokens of the text that was read each is; None where they weren't read."""
        read, body = self._read[place], self._body(place)
        inner = body.strip() if body else ""  # a rule and LlamaIndex's nodes strip what is read
        if not read or not body or inner not in read:
            return []
        at = read.index(inner) - body.index(inner)
        tokens = _TokensBehind(self._engine.backbone.offsets(read)[: int(self._states.tokens[self._rows[place]])])
        return [((start, end), tokens.of(start + at, end + at)) for start, end in split_sentences(body)]


class _TokensBehind:
    """Which tokens are behind a stretch of text, from the characters behind each token."""

    def __init__(self, behind: Sequence[Span]) -> None:
        real = [(number, *span) for number, span in enumerate(behind) if span[0] < span[1]]  # not the template's
        self._numbers, self._starts, self._ends = ([part[which] for part in real] for which in range(3))

    def of(self, start: int, end: int) -> Span | None:
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        return (self._numbers[first], self._numbers[last - 1] + 1) if first < last else None
