"""Instructions to train with: generic ones that must change nothing, specific ones on a topic or a side of it.

The words are in ``instructions.json``: under each name its alternatives, in which ``{name}`` stands for one of another
name's. ``sides`` has forms of questions (MedQuAD's, then general ones) with what each wants to know about its topic.
"""

from __future__ import annotations

import json
import random
import re
from importlib import resources

WORDS = json.loads((resources.files("kalm_rag.training") / "instructions.json").read_text(encoding="utf-8"))
"""Alternatives by name."""


def draw(name: str, rng: random.Random, **given: str) -> str:
    """Draw one alternative and, for every name in it, one of that name's, or the text given for it.

    Example:
        >>> draw("about", random.Random(0), topic="bees").count("bees")
        1
    """

    def fill(slot: re.Match[str]) -> str:
        return given[slot[1]] if slot[1] in given else draw(slot[1], rng)

    return re.sub(r"\{(\w+)\}", fill, rng.choice(WORDS[name]))


def generic(rng: random.Random) -> str:
    """One generic instruction: a known text, a role, a task that fits any query, or circumstances; sometimes two."""
    return " ".join(_capital(draw("generic", rng)) for _ in range(rng.choice((1, 1, 2))))


def split_query(text: str, rng: random.Random) -> tuple[str, str] | None:
    """Move a run of words from a query of at least 5 into an instruction, so that the instruction has to be read."""
    words = text.split()
    if len(words) < 5:
        return None
    size = rng.randint(2, max(2, len(words) // 2))
    start = rng.randint(0, len(words) - size)
    taken = " ".join(words[start : start + size]).strip(" ?.,;:")
    return " ".join(words[:start] + words[start + size :]), draw("about", rng, topic=taken)


def split_side(text: str, rng: random.Random) -> tuple[str, str] | None:
    """Split a question of a known form into its topic and an instruction that says which side of it is wanted."""
    plain = " ".join(text.split()).rstrip(" ?.")
    for form, sides in WORDS["sides"]:
        found = re.fullmatch(form, plain, re.IGNORECASE)
        if found:
            return found[1], _capital(draw("wanted", rng, wish=rng.choice(sides)))
    return None


def kind_of_text(rng: random.Random) -> str:
    """An instruction that asks for some kind of text, whatever the query."""
    return _capital(draw("wanted", rng, wish=rng.choice(WORDS["texts"])))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
