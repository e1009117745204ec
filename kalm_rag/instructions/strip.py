"""What remains of a message when its slots go, together with their labels, fences and tags.

Works on parts of one message (see `kalm_rag.instructions.templates`); knows neither frameworks nor roles.
"""

from __future__ import annotations

import re

from kalm_rag.instructions.templates import Parts, Slot

_INSTRUCTS = frozenset(
    "answer use using given based read consider please you write summarise summarize respond reply explain follow act "
    "be do don't do not never always always if when only keep translate compare list find decide think ignore cite "
    "provide return generate create help assume imagine pretend ensure make note remember must should".split()
)
"""First words of a sentence that tells the model what to do: never a label."""
_POINTERS = frozenset("here below these this following context documents relevant retrieved information".split())
"""First words of a lead-in, which may be longer than a label."""
_FENCE = re.compile(r"\s*([-=_*#~`+.\"']{3,}|<[\w:-]+[^<>]*>|</[\w:-]+>)\s*")
_SENTENCE_END = re.compile(r"[.!?;]\s+|[。！？；]\s*|,\s+(?=\S+:)")
_COLONS = (":", "：")
_MARKUP = "*_#>`-•\"' \t"
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def strip_slots(parts: Parts) -> str:
    r"""Text of a message without its slots; a message without slots is its whole text.

    Dropped with a slot: the label before it (``Question:``, ``Context information is below.``, a heading), fences and
    tags around it (``-----``, code fences, ``<context>...</context>``), and an answer cue at the end (``Answer:``).
    An instruction that ends in a colon stays, as a sentence.

    Example:
        >>> strip_slots(["Answer in French.\n\nContext:\n-----\n", Slot("context"), "\n-----\nQ: ", Slot("q"), "\nA:"])
        'Answer in French.'
    """
    if not any(isinstance(part, Slot) for part in parts):
        return "".join(str(part) for part in parts).strip()
    hole = "\0"
    while any(isinstance(part, str) and hole in part for part in parts):
        hole += "\0"
    text = "".join(hole if isinstance(part, Slot) else part for part in parts).replace("\r\n", "\n")
    lines = _drop_surroundings([_Line(line, hole) for line in _unwrap(text, hole).split("\n")])
    kept = re.sub(r"\n{3,}", "\n\n", "\n".join(line.text for line in lines)).strip()
    return _drop_cue(kept)


class _Line:
    """One line without its slots; `empty` if nothing but slots and labels was on it, `opens` if a slot led it."""

    def __init__(self, source: str, hole: str) -> None:
        pieces = source.split(hole)
        self.has_slot = len(pieces) > 1
        self.text = source
        self.opens = self.has_slot and not pieces[0].strip(_MARKUP)
        if self.has_slot:
            heads = [_drop_label(piece) for piece in pieces[:-1]]
            self.text = _tidy("".join([*heads, pieces[-1]]))
        self.empty = self.has_slot and not re.search(r"[^\W\d_]", self.text)
        if self.empty:
            self.text = ""


def _unwrap(text: str, hole: str) -> str:
    """Drop tags, quotes and code fences that hold nothing but slots, from the inside out."""
    holes = rf"{re.escape(hole)}(?:\s*{re.escape(hole)})*"
    tag = re.compile(rf"<([\w:-]+)(?:\s[^<>]*)?>\s*{holes}\s*</\1\s*>")
    square = re.compile(rf"\[([A-Z_]+)\]\s*{holes}\s*\[/\1\]")
    pair = re.compile(rf"(\"\"\"|'''|```|\"|'|`|\*\*)(?:\w+\n)?\s*{holes}\s*\1|\[\s*{holes}\s*\]|\(\s*{holes}\s*\)")
    before = ""
    while before != text:
        before = text
        for pattern in (tag, square, pair):
            text = pattern.sub(hole, text)
    return text


def _drop_surroundings(lines: list[_Line]) -> list[_Line]:
    """Drop empty slot lines, fences on both sides of them, and the label line above."""
    gone: set[int] = set()
    for position, line in enumerate(lines):
        if not line.has_slot:
            continue
        if line.empty:
            gone.add(position)
        if line.opens:
            _drop_above(lines, position, gone)
        if line.empty:
            _drop_fences(lines, range(position + 1, len(lines)), gone)
    return [line for position, line in enumerate(lines) if position not in gone]


def _drop_above(lines: list[_Line], position: int, gone: set[int]) -> None:
    above = _drop_fences(lines, range(position - 1, -1, -1), gone)
    if above is None or lines[above].has_slot:
        return
    line = lines[above]
    if _is_lead_in(line.text):
        gone.add(above)
        _drop_fences(lines, range(above - 1, -1, -1), gone)
    elif line.text.rstrip().endswith(_COLONS):
        line.text = line.text.rstrip()[:-1] + "."


def _drop_fences(lines: list[_Line], positions: range, gone: set[int]) -> int | None:
    """Drop fence lines next to a slot; gives the first line that is neither fence, blank nor gone already."""
    for position in positions:
        text = lines[position].text
        if position in gone or not text.strip():
            continue
        if not _FENCE.fullmatch(text):
            return position
        gone.add(position)
    return None


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
    match = re.search(r"(?:^|(?<=[.!?。！？])|\n)[ \t]*([^\s.!?:：][^.!?:：\n]{0,40})[:：]\W*$", text)
    if match is None or len(match[1].split()) > 3 or _first_word(match[1]) in _INSTRUCTS - {"answer"}:
        return text
    return text[: match.start()].rstrip()


def _tidy(text: str) -> str:
    text = re.sub(r"(?<=\S)[ \t]{2,}", " ", text)
    text = re.sub(r"\(\s*\)|\[\s*\]|\"\s*\"|''", "", text)
    return re.sub(r"[ \t]+([.,;!?])", r"\1", text).rstrip()
