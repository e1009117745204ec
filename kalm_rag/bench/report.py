"""What a benchmark gives: rows with stable keys and checks; as plain values for JSON and as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from kalm_rag.bench.measuring import Spread

FORMAT_VERSION = 2
"""Version of the JSON; a key that is there stays there under one version."""


CANDIDATES = "candidates"
"""Stage of the rows that a picture of latency by number of candidates is drawn from."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the benchmark."""

    key: str  # stable name, e.g. "nano.fp32.total"
    group: str  # title of its table: which model, which shapes
    what: str  # what was timed, e.g. "stored states: score"
    stage: str  # encode, fetch, score, end to end, index, serve, load or candidates
    passages: int = 0  # passages (or queries, when serving) of one run; 0 where nothing is counted
    runs: int = 0
    p50: float | None = None  # median seconds of a run; None for rows about memory
    p95: float | None = None  # seconds that 95% of the runs stayed within
    cpu: float | None = None  # median CPU seconds of a run, over all threads; None where they were not taken
    peak_bytes: int | None = None  # most memory held meanwhile, model included
    bytes_per_passage: float | None = None  # what is stored for one passage
    baseline: str | None = None  # key of the row this one is compared with
    # how many times less time (by the clock of the run) a passage takes here than in the baseline; bytes, for rows
    # about memory
    times: float | None = None
    note: str = ""

    @property
    def per_second(self) -> float | None:
        """Passages per second, at the median."""
        return self.passages / self.p50 if self.p50 and self.passages else None


def row_of(key: str, what: str, stage: str, spread: Spread, **more: Any) -> Row:  # noqa: ANN401
    """Make a row of timed runs; `more` are further fields of `Row`, `group` and `passages` among them."""
    return Row(
        key=key,
        what=what,
        stage=stage,
        runs=len(spread.seconds),
        p50=spread.p50,
        p95=spread.quantile(0.95),
        cpu=spread.cpu50,
        peak_bytes=spread.peak_bytes,
        **more,
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """Two ways to the same scores, compared within the run."""

    key: str
    what: str  # which two ways
    worst: float  # what they differ by at most
    allowed: float  # largest that is still rounding
    # what `worst` is: the difference of P(yes), or for rounded weights what the order lost
    measure: str = "P(yes) differs by"

    @property
    def passed(self) -> bool:
        """Whether the two ways agree."""
        return self.worst <= self.allowed


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that one run measured."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0  # how long the run took

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "format": FORMAT_VERSION,
            "machine": self.machine,
            "settings": self.settings,
            "seconds": self.seconds,
            "rows": [{**asdict(row), "per_second": row.per_second} for row in self.rows],
            "checks": [{**asdict(check), "passed": check.passed} for check in self.checks],
        }


def compare(rows: Sequence[Row], clock: str = "wall") -> list[Row]:
    """Fill in `Row.times` wherever the baseline is there: seconds per passage, or bytes for rows without seconds.

    The clock is ``"wall"``, or ``"cpu"`` for CPU seconds.
    """
    costs = {row.key: _cost(row, clock) for row in rows}
    out = []
    for row in rows:
        mine, theirs = costs[row.key], costs.get(row.baseline or "")
        out.append(replace(row, times=theirs / mine) if mine and theirs else row)
    return out


def _cost(row: Row, clock: str) -> float | None:
    if row.p50 is None:
        return row.peak_bytes
    seconds = row.p50 if clock == "wall" else row.cpu
    return None if seconds is None else seconds / max(row.passages, 1)


def tables(report: Report) -> list[RenderableType]:
    """The report for a terminal: machine and settings, a table for each group of rows, and checks."""
    by_group = groupby(report.rows, key=lambda row: row.group)
    return [
        _line(report.machine),
        _line(report.settings),
        *(_row_table(group, list(rows)) for group, rows in by_group),
        *(_check_line(check) for check in report.checks),
        f"{report.seconds:.0f} s in all",
    ]


def _row_table(group: str, rows: Sequence[Row]) -> Table:
    against = [row.what for row in rows if row.key in {other.baseline for other in rows}]
    caption = [f"times: how many times less than {', '.join(against)}"] if against else []
    caption += [f"{row.what}: {row.note}" for row in rows if row.note]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", caption_justify="left")
    table.title, table.title_style = escape(group), "bold"
    table.caption, table.caption_style = escape("\n".join(caption)), "dim"
    counted = "queries/s" if all(row.stage == "serve" for row in rows) else "passages/s"
    columns = {
        counted: [_number(row.per_second, 1) for row in rows],
        "p50 ms": [_number(row.p50, 1000) for row in rows],
        "p95 ms": [_number(row.p95, 1000) for row in rows],
        "CPU ms": [_number(row.cpu, 1000) for row in rows],
        "peak MB": [_number(row.peak_bytes, 1e-6) for row in rows],
        "kB each": [_number(row.bytes_per_passage, 1e-3) for row in rows],
        "times": ["" if row.times is None else f"{row.times:.{1 if row.times >= 2 else 2}f}x" for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    table.add_column("")
    for name in shown:
        table.add_column(name, justify="right")
    for row, *cells in zip(rows, *shown.values(), strict=True):
        table.add_row(escape(row.what), *cells)
    return table


def _check_line(check: Check) -> str:
    told = "as published" if check.passed else "[red]NOT AS PUBLISHED[/red]"
    return f"{told}: {escape(check.what)}; {check.measure} {check.worst:.1e} (at most {check.allowed:.0e})"


def _line(values: dict[str, Any]) -> str:
    flat = {k: ", ".join(f"{a} {b}" for a, b in v.items()) if isinstance(v, dict) else v for k, v in values.items()}
    return escape("; ".join(f"{name}: {value}" for name, value in flat.items() if value is not None))


def _number(value: float | None, factor: float) -> str:
    if value is None:
        return ""
    scaled = value * factor
    return f"{scaled:,.0f}" if scaled >= 100 else f"{scaled:.1f}" if scaled >= 1 else f"{scaled:.2f}"
