"""What every public door checks before anything runs or is written. Knows errors only.

A message says what was found, what was wanted and what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from kalm_rag.errors import InputError


def check_text(text: object, what: str) -> str:
    """Give `text` back if it is a string that UTF-8 can hold.

    Args:
        text: The value to check.
        what: How to name it in the message, e.g. ``"passage 3"``.

    Raises:
        InputError: If it is not a ``str``, or holds a lone surrogate.

    Example:
        >>> check_text("naïve", "query")
        'naïve'
    """
    if not isinstance(text, str):
        raise InputError(f"{what} is {type(text).__name__}; wanted a string.")
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise InputError(
            f"{what} holds a lone surrogate (U+{ord(text[err.start]):04X} at position {err.start}), which is not "
            f"valid Unicode. Decode its source with errors='replace', or clean it before."
        ) from err
    return text


def check_passages(passages: Sequence[str]) -> list[str]:
    """Give the passages as a list if each is a valid string.

    Raises:
        InputError: If `passages` is one string, or an item is no valid string; the item's position is named.
    """
    if isinstance(passages, str):
        raise InputError("passages is one string; wanted a list of strings. Put it in brackets.")
    return [check_text(text, f"passage {position}") for position, text in enumerate(passages)]


def check_query(query: object, what: str = "query") -> None:
    """Refuse what can't be asked.

    Raises:
        InputError: If it is not a valid string, or blank.
    """
    if not check_text(query, what).strip():
        raise InputError(f"{what} is blank; wanted the text to search for.")


def check_count(value: object, name: str, least: int = 1, hint: str = "") -> int:
    """Give a whole number back as an ``int``; a ``bool`` is none, an integer of numpy is one.

    Args:
        value: The value to check.
        name: The caller's argument, as the message names it.
        least: The smallest number allowed.
        hint: What the message says after the bound, e.g. ``", or None for all"``.

    Raises:
        InputError: If it is no whole number, or below `least`.

    Example:
        >>> check_count(3, "top_n")
        3
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name} is {value!r}; wanted a whole number >= {least}{hint}.")
    return int(value)


def check_cut(top_n: int | None, threshold: float | None) -> None:
    """Refuse a cut that means nothing.

    Raises:
        InputError: If `top_n` is not a whole number >= 1, or `threshold` is outside [0, 1].
    """
    if top_n is not None:
        check_count(top_n, "top_n", hint=", or None for all")
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise InputError(f"threshold is {threshold!r}; wanted P(yes) in [0, 1], or None for all.")
