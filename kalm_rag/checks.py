"""What every public door checks before anything runs or is written. Knows errors only.

A message says what was found, what was wanted and what to do next. The argument that it names is the caller's: a check
that serves several doors takes its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TypeVar

from kalm_rag.errors import InputError

Item = TypeVar("Item")
Argument = TypeVar("Argument")
Result = TypeVar("Result")

_MEANT = {
    **dict.fromkeys(("score_threshold", "similarity_cutoff", "min_score", "cutoff"), ("threshold",)),
    **dict.fromkeys(("top_k", "limit", "n_results", "similarity_top_k", "top_n", "k"), ("top_n", "k")),
    **dict.fromkeys(("instruction", "instruct", "prompt", "system_prompt"), ("instructions",)),
    **dict.fromkeys(("model_name", "model_id", "model_name_or_path", "checkpoint"), ("model", "name")),
    **dict.fromkeys(("embedder", "embedding", "embeddings", "embed_model"), ("embedder", "embedding_function")),
    **dict.fromkeys(("engine", "backbone", "cross_encoder"), ("reranker", "model")),
    **dict.fromkeys(("documents", "docs", "texts", "nodes"), ("passages", "documents", "texts", "nodes")),
    **dict.fromkeys(("path", "persist_dir", "db_path"), ("persist_directory", "path")),
}
"""What people type, as other rerankers and stores call it, and what it may be called here."""


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


def call_app(what: str, function: Callable[[Argument], Result], given: Argument) -> Result:
    """Call a function of the app's; `what` names it.

    Raises:
        InputError: If it raises StopIteration (a used-up iterator, say), which a future can't carry: who awaits it
            would wait for ever.
    """
    try:
        return function(given)
    except StopIteration as err:
        raise InputError(
            f"{what} raised StopIteration; wanted a result. It may read an iterator that has come to its end."
        ) from err


def check_items(items: Iterable[Item], what: str, wanted: str = "a list of strings") -> list[Item]:
    """Read an iterable of any kind once: a list, tuple, generator, ``map``, array or set becomes a list.

    Args:
        items: The value to read.
        what: The caller's argument, as the message names it.
        wanted: What it should be, for the message.

    Raises:
        InputError: If it is a single string, bytes, a mapping, None or nothing that can be iterated over.

    Example:
        >>> check_items((n for n in range(3)), "numbers")
        [0, 1, 2]
    """
    if isinstance(items, str):
        raise InputError(f"{what} is one string; wanted {wanted}. Put it in brackets.")
    if isinstance(items, Mapping):
        raise InputError(f"{what} is a {type(items).__name__}; wanted {wanted}. Pass its keys or its values.")
    if items is None or isinstance(items, bytes | bytearray):
        raise InputError(f"{what} is {'None' if items is None else type(items).__name__}; wanted {wanted}.")
    try:
        each = iter(items)
    except TypeError as err:
        raise InputError(f"{what} is {type(items).__name__}; wanted {wanted}.") from err
    return list(each)  # outside of the try: an error of the caller's own generator is the caller's


def check_passages(passages: Iterable[str], what: str = "passages") -> list[str]:
    """Read strings of any iterable once, and give them as a list.

    Args:
        passages: The strings.
        what: The caller's argument, in the plural: ``"ids"`` makes messages about ``id 3``.

    Raises:
        InputError: If `passages` is one string, bytes, a mapping or no iterable, or an item is no valid string; the
            item's position is named.

    Example:
        >>> check_passages(str(n) for n in range(2))
        ['0', '1']
    """
    one = what.removesuffix("s")
    return [check_text(text, f"{one} {position}") for position, text in enumerate(check_items(passages, what))]


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


def check_cut(
    top_n: int | None,
    threshold: float | None,
    *,
    count: str = "top_n",
    least: str = "threshold",
    none: str = "None for all",
) -> None:
    """Refuse a cut that means nothing.

    Args:
        top_n: Most results; None for all.
        threshold: Least P(yes); None for all.
        count: What the caller's argument for `top_n` is called.
        least: What the caller's argument for `threshold` is called.
        none: What the message says that None does there.

    Raises:
        InputError: If `top_n` is not a whole number >= 1, or `threshold` is no number in [0, 1].
    """
    if top_n is not None:
        check_count(top_n, count, hint=f", or {none}")
    number = isinstance(threshold, Real) and not isinstance(threshold, bool)
    if threshold is not None and not (number and 0.0 <= threshold <= 1.0):
        raise InputError(f"{least} is {threshold!r}; wanted P(yes) in [0, 1], or {none}.")


def unknown_argument_hint(name: str, known: Iterable[str]) -> str:
    """Say which argument was probably meant, for an argument that a door doesn't have.

    Args:
        name: What was passed.
        known: The arguments that there are.

    Returns:
        A sentence with a space before it, to put behind a message; empty if nothing comes near.

    Example:
        >>> unknown_argument_hint("top_k", ["top_n", "threshold"])
        ' Did you mean top_n?'
    """
    there = list(known)
    meant = [other for other in _MEANT.get(name, ()) if other in there and other != name]
    meant = meant or get_close_matches(name, there, n=1, cutoff=0.75)
    return f" Did you mean {meant[0]}?" if meant else ""
