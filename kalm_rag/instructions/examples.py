"""Worked examples inside a message: a question with its answer that shows the form of an answer, not what to look for.

Works on pieces of one message, in time that grows with its length; knows neither frameworks nor roles.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from kalm_rag.instructions.pieces import Piece, Slot

_ANNOUNCED = re.compile(
    r"for (example|instance)|((here|below) (is|are) )?((an?|some|the|a few|one|two|three) )?(worked )?examples?( \d+)?"
)
"""What stands before examples, as a sentence of its own at the end of a line."""
_TURN = re.compile(
    r"[\W_]*(question|query|q|input|user|human|source|document|passage|context|"
    r"(?P<answer>answer|a|output|response|assistant|ai))( ?\d+)?[*_\]]*\s*[:：]",
    re.IGNORECASE,
)
"""Start of a labelled line of an example."""
_YOUR_TURN = re.compile(r"now,? (it['’]?s|it is)? ?your turn[.!:]*\s*", re.IGNORECASE)
_GOES_ON = frozenset("now below here these this given using use answer please begin always never you your it's".split())
"""First words of a line right under an example's answer that is the app's own again."""


def drop_examples(pieces: Sequence[Piece]) -> list[Piece]:
    r"""Pieces without the worked examples among their texts.

    One is dropped where it is announced at a line's end ("For example:", "Example 1:") and its lines have labels, an
    answer's among them. Any other example stays: it may say what is wanted.

    Example:
        >>> drop_examples(["Cite. For example:\nQ: Is it wet?\nA: Yes [1].\n\nBe brief.", Slot("context")])
        ['Cite.\n\nBe brief.', Slot(name='context')]
        >>> drop_examples(["Find laws. For example:\n- statutes\n- treaties"])
        ['Find laws. For example:\n- statutes\n- treaties']
    """
    left: list[Piece] = []
    for is_slot, group in groupby(pieces, key=lambda piece: isinstance(piece, Slot)):
        found = list(group)
        left += found if is_slot else [_drop_in("".join(map(str, found)))]
    return left


def _drop_in(text: str) -> str:
    lines, kept, at = text.split("\n"), list[str](), 0
    while at < len(lines):
        start = _announcement(lines[at])
        end = at if start is None else _end_of_example(lines, at + 1)
        if end <= at + 1:
            kept.append(lines[at])
            at += 1
            continue
        kept.append(lines[at][:start].rstrip())
        at = end
        if at < len(lines):
            lines[at] = _YOUR_TURN.sub("", lines[at], count=1)
        else:
            kept.append("")  # what follows is a slot, on a line of its own
    return "\n".join(kept)


def _announcement(line: str) -> int | None:
    """Where a line starts to announce an example, or None."""
    at = max(line.rfind(mark) + 1 for mark in (". ", "! ", "? ", "; ", "。"))
    return at if _ANNOUNCED.fullmatch(line[at:].strip(" \t\r*_#>-:：").lower()) else None


def _end_of_example(lines: Sequence[str], start: int) -> int:
    """Line behind the labelled lines from `start` on, and what belongs to them; `start` if no answer is among them."""
    end, answered, has_gap = start, False, False
    for at in range(start, len(lines)):
        line = lines[at]
        turn = _TURN.match(line)
        if not line.strip():
            has_gap = True
            continue
        if turn is None:
            words = line.split(maxsplit=1)
            if end == start or _announcement(line) is not None:
                break
            if answered and (has_gap or words[0].lower().strip(",.:") in _GOES_ON):
                break
        elif turn["answer"] is not None:
            answered = True
        end, has_gap = at + 1, False
    return end if answered else start
