"""What a part of the fault table counts, and how an index is looked at after a fault. Knows no part."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from toy import QUERY, reopen

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.errors import KalmRagError

FAULTS = ("wrong", "lost", "hangs", "foreign", "leaks")
"""Counts that make the command fail."""
TOLERANCE = 1e-4
GONE = None
"""As a text that a record may have: it may be gone."""


@dataclass
class Row:
    """One line of the table.

    Attributes:
        trials: Faults that were made.
        repaired: After how many of them something had to be mended, and was.
        wrong: Scores that are not those of the text scored afresh.
        lost: Records that were acknowledged, and are gone, changed or found by no search.
        hangs: What didn't end in time.
        foreign: Exceptions that are not ours.
        leaks: Descriptors, threads or memory that grow.
        seconds: All in all.
        notes: What else was counted.
        problems: How often each problem came up, in words.
    """

    part: str
    trials: int = 0
    repaired: int = 0
    wrong: int = 0
    lost: int = 0
    hangs: int = 0
    foreign: int = 0
    leaks: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    problems: dict[str, int] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether there is anything that must not be."""
        return any(getattr(self, name) for name in FAULTS)

    def add(self, fault: str, what: str, count: int = 1) -> None:
        """Count a fault, and say which."""
        if count:
            setattr(self, fault, getattr(self, fault) + count)
            self.problems[f"{fault}: {what}"] = self.problems.get(f"{fault}: {what}", 0) + count

    @contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Count an exception of ours as records that can't be had, any other as foreign."""
        try:
            yield
        except KalmRagError as err:
            self.add("lost", f"{what}: {type(err).__name__}: {str(err)[:200]}")
        except Exception as err:
            where = traceback.extract_tb(err.__traceback__)[-1]
            self.add("foreign", f"{what}: {type(err).__name__} at {where.filename}:{where.lineno}: {str(err)[:160]}")

    def dump(self) -> str:
        """As JSON, for the process that prints the table."""
        return json.dumps(asdict(self))


@dataclass
class Bench:
    """What a part works with: a folder of its own, a tiny checkpoint, how many trials, and where it counts."""

    folder: Path
    model: Path
    scale: float
    row: Row
    data: Path | None = None

    def count(self, number: int) -> int:
        """How many trials at this scale."""
        return max(1, round(number * self.scale))

    def tell(self, line: str) -> None:
        """A line of progress."""
        sys.stderr.write(f"  {self.row.part}: {line}\n")
        sys.stderr.flush()


class Fresh:
    """Margins of texts scored without any store, each once."""

    def __init__(self, engine: Reranker) -> None:
        self._engine, self._known = engine, {}

    def wrong(self, scored: Mapping[str, float] | list[tuple[str, float]], query: str = QUERY) -> int:
        """How many margins are not those of their texts."""
        pairs = list(scored.items()) if isinstance(scored, Mapping) else scored
        new = [text for text in dict.fromkeys(text for text, _ in pairs) if (query, text) not in self._known]
        for text, got in zip(new, self._engine.score(query, self._engine.encode(new)), strict=True):
            self._known[query, text] = got.margin
        close = (math.isclose(m, self._known[query, t], rel_tol=TOLERANCE, abs_tol=TOLERANCE) for t, m in pairs)
        return sum(not right for right in close)


def check_index(
    row: Row, path: Path, engine: Reranker, fresh: Fresh, wanted: Mapping[str, set[str | None]], what: str
) -> None:
    """Open what a fault left, mend it as a user is told to, and look at every record and score.

    Args:
        row: Where to count.
        path: The index.
        engine: Its model.
        fresh: Scores to compare with.
        wanted: Texts that each acknowledged record may have; `GONE` among them if it may be gone.
        what: The fault, for the messages.
    """
    with row.watching(what), _open(path, engine) as index:
        report = index.verify()
        if not report.clean:
            row.repaired += 1
            if report.unfindable:
                index.rebuild()
            index.backfill()
            report = index.verify()
        row.add("lost", f"{what}: not clean after the repair", not report.clean)
        there = index.collection.get(include=["documents"])
        texts = dict(zip(there["ids"], there["documents"], strict=True))
        for name, allowed in wanted.items():
            row.add("lost", f"{what}: a record is gone or changed", texts.get(name, GONE) not in allowed)
        result = index.query(QUERY, top_n=None, fetch_k=max(1, len(texts)))
        row.add("wrong", what, fresh.wrong([(hit.text or "", hit.margin or 0.0) for hit in result]))
        row.add("wrong", f"{what}: unscored", result.unscored)


def _open(path: Path, engine: Reranker) -> ChromaIndex:
    return ChromaIndex.open(path) if engine.info.family == "pico" else reopen(path, engine)


def print_table(rows: list[Row]) -> None:
    """One line per part, then what went wrong."""
    names = ("part", "trials", "repaired", *FAULTS, "seconds")
    lines = [[f"{v:.0f}" if isinstance(v := getattr(row, n), float) else str(v) for n in names] for row in rows]
    lines = [[*names, "notes"], *([*line, "; ".join(row.notes)] for row, line in zip(rows, lines, strict=True))]
    widths = [max(map(len, column)) for column in zip(*(line[:-1] for line in lines), strict=True)]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells, line[-1]]))
    for row in rows:
        for problem, count in Counter(row.problems).most_common(12):
            print(f"{row.part}: {count} x {problem}")
