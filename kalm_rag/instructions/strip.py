"""What remains of a message when its slots go, together with their labels, fences and tags.

Works on pieces of one message (see `kalm_rag.instructions.templates`); knows neither frameworks nor roles. Every step
takes time that grows with the length of the message, whatever stands in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from kalm_rag.instructions.pieces import Piece, Slot

_INSTRUCTS = frozenset(
    "answer use using given based read consider please you write summarise summarize respond reply explain follow act "
    "be do don't do not never always always if when only keep translate compare list find decide think ignore cite "
    "provide return generate create help assume imagine pretend ensure make note remember must should".split()
)
"""First words of a sentence that tells the model what to do: never a label."""
_POINTERS = frozenset("here below these this following context documents relevant retrieved information".split())
"""First words of a lead-in, which may be longer than a label."""
_FENCE = re.compile(r"\s*([-=_*#~`+.\"']{3,}|<[\w:-][^<>]*>|</[\w:-]+>)\s*")
_SENTENCE_END = re.compile(r"[.!?;]\s+|[。！？；]\s*|,\s+(?=\S+:)")
_COLONS = (":", "：")
_MARKUP = "*_#>`-•\"' \t"
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_ENCLOSING = re.compile(
    r"(?P<space>\s+)"
    r"|<(?P<tag>[\w:-]+)(?:\s[^<>]*)?>|</(?P<end_tag>[\w:-]+)\s*>"
    r"|\[(?P<square>[A-Z_]+)\]|\[/(?P<end_square>[A-Z_]+)\]"
    r"|(?P<quote>\"\"\"|'''|```|\"|'|`|\*\*)(?P<language>\w+\n)?"
    r"|(?P<bracket>[\[(])|(?P<end_bracket>[\])])"
    r"|[^\s<\[\]()\"'`*]+|."
)
"""Cuts a text into space, what can enclose a slot, and the rest."""
_MATCHING = {")": "(", "]": "["}
_LONGEST_CUE = 40


def strip_slots(pieces: Sequence[Piece]) -> str:
    r"""Text of a message without its slots; a message without slots is its whole text.

    Dropped with a slot: the label before it (``Question:``, ``Context information is below.``, a heading), fences and
    tags around it (``-----``, code fences, ``<context>...</context>``), and an answer cue at the end (``Answer:``).
    An instruction that ends in a colon stays, as a sentence.

    Example:
        >>> strip_slots(["Answer in French.\n\nContext:\n-----\n", Slot("context"), "\n-----\nQ: ", Slot("q"), "\nA:"])
        'Answer in French.'
    """
    if not any(isinstance(piece, Slot) for piece in pieces):
        return "".join(str(piece) for piece in pieces).strip()
    lines = [_Line(stretches) for stretches in _split_lines(_unwrap(pieces))]
    kept = re.sub(r"\n{3,}", "\n\n", "\n".join(_Surroundings(lines).drop())).strip()
    return _drop_cue(kept)


class _Line:
    """One line without its slots; `empty` if nothing but slots and labels was on it, `opens` if a slot led it."""

    def __init__(self, stretches: list[str]) -> None:
        """Take the stretches of text between the slots of a line: one more than there are slots."""
        self.has_slot = len(stretches) > 1
        self.text = stretches[0]
        self.opens = self.has_slot and not stretches[0].strip(_MARKUP)
        if self.has_slot:
            heads = [_drop_label(stretch) for stretch in stretches[:-1]]
            self.text = _tidy("".join([*heads, stretches[-1]]))
        self.empty = self.has_slot and not re.search(r"[^\W\d_]", self.text)
        if self.empty:
            self.text = ""
        self.blank = not self.text.strip()
        self.is_fence = _FENCE.fullmatch(self.text) is not None


class _Enclosures:
    """Texts and slots (None) read so far, and which of them may open an enclosure."""

    def __init__(self) -> None:
        self.items: list[str | None] = []
        self._openers: list[object] = []  # beside each item: what it opens, None if nothing
        # beside each item: the last one up to it that is neither space nor slot, and whether a slot came after that
        self._last: list[tuple[int, bool]] = []

    def add(self, text: str | None, opens: object = None, *, is_space: bool = False) -> None:
        before, has_slot = self._last[-1] if self._last else (-1, False)
        if text is None or is_space:
            self._last.append((before, has_slot or text is None))
        else:
            self._last.append((len(self.items), False))
        self.items.append(text)
        self._openers.append(opens)

    def close(self, opener: object) -> bool:
        """Put one slot in the place of an opener with nothing but slots behind it; False if there is none."""
        at, has_slot = self._last[-1] if self._last else (-1, False)
        if not has_slot or at < 0 or self._openers[at] != opener:
            return False
        del self.items[at:], self._openers[at:], self._last[at:]
        self.add(None)
        return True


def _unwrap(pieces: Sequence[Piece]) -> list[str | None]:
    """Texts and slots (None), without the tags, quotes and brackets that hold nothing but slots."""
    read = _Enclosures()
    for is_slot, group in groupby(pieces, key=lambda piece: isinstance(piece, Slot)):
        if is_slot:
            for _ in group:
                read.add(None)
        else:
            _read_text(read, "".join(map(str, group)).replace("\r\n", "\n"))
    return read.items


def _read_text(read: _Enclosures, text: str) -> None:
    for match in _ENCLOSING.finditer(text):
        kind, found = match.lastgroup, match[0]
        if kind in ("quote", "language"):  # closes one, or else opens one
            closes = read.close(("quote", match["quote"]))
            left = match["language"] or "" if closes else found
            if left:
                read.add(left, None if closes else ("quote", match["quote"]))
        elif kind in ("end_tag", "end_square", "end_bracket"):
            name = _MATCHING.get(found, match[kind])
            if not read.close((kind.removeprefix("end_"), name)):
                read.add(found)
        elif kind == "space":
            read.add(found, is_space=True)
        else:
            read.add(found, (kind, match[kind]) if kind is not None else None)


def _split_lines(items: Sequence[str | None]) -> list[list[str]]:
    """Lines as the stretches of text between their slots."""
    lines: list[list[list[str]]] = [[[]]]
    for item in items:
        if item is None:
            lines[-1].append([])
            continue
        first, *more = item.split("\n")
        lines[-1][-1].append(first)
        lines += [[[text]] for text in more]
    return [["".join(texts) for texts in line] for line in lines]


class _Surroundings:
    """Lines of a message, of which empty slot lines go, fences on both sides of them, and the label line above.

    Looking up and down from each slot skips lines that are blank or gone. Links over such stretches are shortened
    while they are walked, so that no stretch is walked once per slot.
    """

    def __init__(self, lines: list[_Line]) -> None:
        self._lines = lines
        self._gone = [False] * len(lines)
        self._judged = [False] * len(lines)  # whether it was asked already if it only announces a slot
        self._links = {step: list(range(len(lines))) for step in (-1, 1)}
        for at, line in enumerate(lines):
            if line.blank:
                self._skip(at)

    def drop(self) -> list[str]:
        """Texts of the lines that stay."""
        for at, line in enumerate(self._lines):
            if line.empty:
                self._remove(at)
            if line.opens:
                self._drop_above(at)
            if line.empty:
                self._drop_fences(at, 1)
        return [line.text for line, gone in zip(self._lines, self._gone, strict=True) if not gone]

    def _skip(self, at: int) -> None:
        for step, links in self._links.items():
            links[at] = at + step

    def _remove(self, at: int) -> None:
        self._gone[at] = True
        self._skip(at)

    def _next(self, at: int, step: int) -> int | None:
        """First line from `at` on, up or down, that is neither blank nor gone."""
        links = self._links[step]
        while 0 <= at < len(links) and links[at] != at:
            further = links[at]
            if 0 <= further < len(links):
                links[at] = links[further]
            at = further
        return at if 0 <= at < len(links) else None

    def _drop_fences(self, at: int, step: int) -> int | None:
        """Drop the fences next to a line on one side; gives the line behind them."""
        near = self._next(at + step, step)
        while near is not None and self._lines[near].is_fence:
            self._remove(near)
            near = self._next(near, step)
        return near

    def _drop_above(self, at: int) -> None:
        above = self._drop_fences(at, -1)
        if above is None or self._lines[above].has_slot or self._judged[above]:
            return
        line, self._judged[above] = self._lines[above], True
        if _is_lead_in(line.text):
            self._remove(above)
            self._drop_fences(above, -1)
        elif line.text.rstrip().endswith(_COLONS):
            line.text = line.text.rstrip()[:-1] + "."


def _drop_label(text: str) -> str:
    """Text before a slot on one line, without the label at its end; an instruction keeps its words."""
    start = 0
    for match in _SENTENCE_END.finditer(text.rstrip()):
        start = match.end()
    head, tail = text[:start], text[start:]
    if not tail.rstrip(_MARKUP).endswith((*_COLONS, "=", "->")):
        return text
    if _is_label(tail):
        return head.rstrip().removesuffix(",") + (" " if head.strip() else "")
    return text.rstrip(_MARKUP)[:-1] + "."


def _is_lead_in(text: str) -> bool:
    """Whether a line above a slot only announces it."""
    plain = text.strip(_MARKUP)
    if text.lstrip().startswith("#") or (plain and text.strip().startswith("**") and text.strip().endswith("**")):
        return len(plain) <= 60 and _first_word(plain) not in _INSTRUCTS
    if plain.endswith(_COLONS):
        return _is_label(text)
    return len(plain) <= 60 and bool(re.search(r"\b(below|follows|following)[.]?$", plain, re.IGNORECASE))


def _is_label(text: str) -> bool:
    plain = text.strip(_MARKUP).rstrip(":：=->").strip(_MARKUP)
    first = _first_word(plain)
    if first in _INSTRUCTS:
        return False
    if _CJK.search(plain):
        return len(plain) <= 8
    words = len(plain.split())
    return words <= 6 or (words <= 12 and first in _POINTERS)


def _first_word(text: str) -> str:
    words = text.split()
    return words[0].lower().strip(",.:;\"'") if words else ""


def _drop_cue(text: str) -> str:
    """Drop a last label that nothing follows: the place where the model would have answered."""
    end = len(text)
    while end and not (text[end - 1].isalnum() or text[end - 1] == "_"):
        end -= 1
    colon = next((at for at in range(end, len(text)) if text[at] in _COLONS), None)
    if colon is None:
        return text
    start = colon
    while start and text[start - 1] not in ".!?。！？\n:：":
        start -= 1
    if start and text[start - 1] in _COLONS:
        return text
    label = text[start:colon].strip(" \t")
    if not 0 < len(label) <= _LONGEST_CUE or len(label.split()) > 3 or _first_word(label) in _INSTRUCTS - {"answer"}:
        return text
    return text[:start].rstrip()


def _tidy(text: str) -> str:
    text = re.sub(r"(?<=\S)[ \t]{2,}", " ", text)
    text = re.sub(r"\(\s*\)|\[\s*\]|\"\s*\"|''", "", text)
    return re.sub(r"(?<![ \t])[ \t]+([.,;!?])", r"\1", text).rstrip()
