"""What every public door refuses, and what the message says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from kalm_rag.checks import check_count, check_cut, check_items, check_passages, unknown_argument_hint
from kalm_rag.errors import InputError, MissingDependencyError, require


@pytest.mark.parametrize("value", [0, -3, True, 1.0, "4", None, float("nan")], ids=str)
def test_no_whole_number_is_refused_by_its_name(value: object) -> None:
    """Copies of this check let `batch_size=True` or 0 through in some doors; now one check names its argument."""
    with pytest.raises(InputError, match=r"^batch_size is .*; wanted a whole number >= 1\.$"):
        check_count(value, "batch_size")


def test_whole_numbers_come_back_as_int() -> None:
    assert type(check_count(np.int64(7), "fetch_k")) is int
    assert check_count(0, "prefix_cache_bytes", least=0) == 0
    with pytest.raises(InputError, match=r"top_n is 0; wanted a whole number >= 1, or None for all\."):
        check_cut(0, None)


@pytest.mark.parametrize(
    "passages",
    [
        ["a", "b"],
        ("a", "b"),
        (text for text in "ab"),
        map(str.lower, ["A", "B"]),
        {"a": 1, "b": 2}.keys(),
        np.array(["a", "b"]),
        iter(["a", "b"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_iterable_is_read_once(passages: list[str]) -> None:
    """A generator was eaten by the check of its types, and nothing was left to work on."""
    found = check_passages(passages)
    assert found == ["a", "b"]


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ("ab", "ids is one string; wanted a list of strings. Put it in brackets."),
        ({"a": 1}, "ids is a dict; wanted a list of strings. Pass its keys or its values."),
        (b"ab", "ids is bytes; wanted a list of strings."),
        (None, "ids is None; wanted a list of strings."),
        (5, "ids is int; wanted a list of strings."),
        (np.array("ab"), "ids is ndarray; wanted a list of strings."),
        (["a", 1], "id 1 is int; wanted a string."),
        (["a\ud83d"], r"id 0 holds a lone surrogate (U+D83D at position 1)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_list_is_refused_by_its_own_name(passages: list[str], message: str) -> None:
    """`ids=[1]` blamed "passage 0", and `delete("1")` said that "passages is one string"."""
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        check_passages(passages, "ids")


def test_an_error_of_the_callers_generator_is_the_callers() -> None:
    def broken() -> object:
        yield "a"
        raise TypeError("theirs")

    with pytest.raises(TypeError, match="theirs"):
        check_items(broken(), "passages")  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", ["0.5", True, [], -0.1, 1.1, float("nan")], ids=str)
def test_thresholds_that_are_no_probability(threshold: float) -> None:
    with pytest.raises(InputError, match=r"score_threshold is .*; wanted P"):
        check_cut(None, threshold, least="score_threshold")
    check_cut(np.int64(3), np.float32(0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("score_threshold", " Did you mean threshold?"),
        ("top_k", " Did you mean top_n?"),
        ("instruction", " Did you mean instructions?"),
        ("instruct", " Did you mean instructions?"),
        ("model_name", " Did you mean model?"),
        ("instrctions", " Did you mean instructions?"),
        ("colour", ""),
    ],
)
def test_what_people_type_gets_a_hint(typed: str, meant: str) -> None:
    assert unknown_argument_hint(typed, ["model", "top_n", "threshold", "instructions"]) == meant


def test_a_hint_names_an_argument_that_is_there() -> None:
    assert unknown_argument_hint("top_k", ["k", "fetch_k"]) == " Did you mean k?"
    assert unknown_argument_hint("embedding", ["embedding_function"]) == " Did you mean embedding_function?"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    message = r"^BM25 needs the module bm25s, .*pip install 'kalm-rag\[eval\]', or so\.$"
    with pytest.raises(MissingDependencyError, match=message):
        require("bm25s", "eval", "BM25", "or so")
    assert require("json", "eval", "BM25").dumps([]) == "[]"


def test_a_module_that_is_there_and_broken_says_so_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Packages that were installed and failed at import were said to be not installed."""
    (tmp_path / "broken_here.py").write_text("raise ImportError('needs a newer numpy')\n")
    (tmp_path / "needs_another.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="needs a newer numpy") as caught:
        require("broken_here", "eval", "this")
    assert not isinstance(caught.value, MissingDependencyError)
    with pytest.raises(MissingDependencyError, match="needs the module not_there_at_all"):
        require("needs_another", "eval", "this")
