"""The fault table counts what must not be; a few of its parts, small (all of it: ``make faults``)."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from faults.__main__ import PARTS
from faults.fuzz import fuzz
from faults.load import storms
from faults.table import GONE, Bench, Fresh, Row, check_index
from toy import IDS, QUERY, TEXTS, reopen

from kalm_rag import Reranker
from kalm_rag.errors import StoreError


def test_what_must_not_be_is_counted(tmp_path: Path, tiny: Reranker) -> None:
    with reopen(tmp_path, tiny) as index:
        index.add(IDS, TEXTS)
        margins = {hit.text or "": hit.margin or 0.0 for hit in index.query(QUERY)}
    row, fresh = Row("sample"), Fresh(tiny)
    wanted: dict[str, set[str | None]] = {i: {text} for i, text in zip(IDS, TEXTS, strict=True)}
    check_index(row, tmp_path, tiny, fresh, {**wanted, "e": {GONE}}, "nothing")
    assert (row.failed, row.repaired) == (False, 0)
    check_index(row, tmp_path, tiny, fresh, {**wanted, "a": {"another text"}, "x": {"a text"}}, "a made up loss")
    assert (row.lost, row.failed) == (2, True)
    assert fresh.wrong(margins) == 0
    assert fresh.wrong({**margins, TEXTS[0]: margins[TEXTS[0]] + 0.01}) == 1
    (tmp_path / "kalm_states.sqlite3").unlink()
    check_index(row, tmp_path, tiny, fresh, wanted, "states are gone")
    assert (row.lost, row.repaired) == (2, 1)
    with row.watching("ours"):
        raise StoreError("no room")
    with row.watching("foreign"):
        raise KeyError("x")
    assert (row.lost, row.foreign, row.wrong, row.hangs) == (3, 1, 0, 0)


@pytest.mark.parametrize(("part", "scale"), [(fuzz, 0.01), (storms, 0.01)], ids=["fuzz", "storms"])
def test_a_part_of_the_table(tmp_path: Path, tiny_folder: Path, part, scale: float) -> None:
    bench = Bench(tmp_path, tiny_folder, scale, Row(part.__name__))
    part(bench)
    assert bench.row.trials > 80
    assert not bench.row.failed, bench.row.problems
    assert part.__name__ in PARTS


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_there(part: str) -> None:
    """A part that can't be imported was found only by who ran the table."""
    assert callable(getattr(importlib.import_module(f"faults.{PARTS[part][0]}"), part))
