"""Laws of growth: which simple formula a series of timings follows, its exponent, and where it departs from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kalm_rag.errors import InputError

DEPARTS = 0.15
"""Share by which a point has to lie off a law to be named."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """How seconds grow with one variable.

    Attributes:
        key: Stable name, e.g. ``"nano.candidates"``.
        what: What was timed.
        variable: What grows, with its unit.
        points: Pairs of variable and median seconds, ascending.
        clock: Which seconds: ``"wall"``, or ``"cpu"`` of all threads.
        kind: ``"linear"`` a + b n, ``"logarithmic"`` a + b ln n, or ``"power"`` a n^b.
        a: First coefficient, in seconds.
        b: Second one.
        exponent: Slope of log seconds over log n, all points: 1 is proportional, 0 constant.
        local: The same between each two neighbours.
        note: Shapes.
    """

    key: str
    what: str
    variable: str
    points: tuple[tuple[float, float], ...]
    kind: str
    a: float
    b: float
    exponent: float
    local: tuple[float, ...]
    clock: str = "wall"
    note: str = ""

    def predict(self, n: float) -> float:
        """Seconds that the law gives for one value."""
        return float(_SHAPES[self.kind](self.a, self.b, n))

    @property
    def off(self) -> list[tuple[float, float]]:
        """Points that lie off the law by more than `DEPARTS`: variable, measured / predicted - 1."""
        shares = [(n, seconds / self.predict(n) - 1) for n, seconds in self.points]
        return [(n, share) for n, share in shares if abs(share) > DEPARTS]

    @property
    def formula(self) -> str:
        """The law in milliseconds."""
        a, b = 1000 * self.a, 1000 * self.b
        if self.kind == "power":
            return f"{a:.3g} n^{self.b:.2f}"
        return f"{a:.3g} {'+' if b >= 0 else '-'} {abs(b):.3g} {'n' if self.kind == 'linear' else 'ln n'}"

    @property
    def departures(self) -> str:
        """Where it departs, for people."""
        return ", ".join(f"{100 * share:+.0f}% at {n:,.0f}" for n, share in self.off) or f"nowhere by > {DEPARTS:.0%}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "key": self.key,
            "what": self.what,
            "variable": self.variable,
            "clock": self.clock,
            "points": [{"n": n, "seconds": seconds} for n, seconds in self.points],
            "kind": self.kind,
            "a": self.a,
            "b": self.b,
            "formula_ms": self.formula,
            "exponent": self.exponent,
            "local_exponents": list(self.local),
            "departs": [{"n": n, "share": share} for n, share in self.off],
            "note": self.note,
        }


def fit_law(
    key: str, what: str, variable: str, points: Sequence[tuple[float, float]], *, clock: str = "wall", note: str = ""
) -> Law:
    """Find the law that a series follows: of the three kinds, the one with the least relative error.

    Errors are relative, so that small values count like large ones. A linear or logarithmic law with a negative
    start or slope is no cost and is not considered (a power law always can be).

    Args:
        key: Stable name.
        what: What was timed.
        variable: What grows.
        points: Pairs of variable (> 0) and seconds (> 0), at least two with different values.
        clock: Which seconds they are.
        note: Shapes.

    Raises:
        InputError: If there are too few points, or one is not above 0.

    Example:
        >>> law = fit_law("x", "x", "n", [(10, 0.012), (20, 0.022), (40, 0.042), (80, 0.082)])
        >>> law.kind, law.formula, law.off
        ('linear', '2 + 1 n', [])
    """
    ordered = tuple(sorted((float(n), float(seconds)) for n, seconds in points))
    n, seconds = np.array(ordered, dtype=float).reshape(-1, 2).T
    if len(set(n.tolist())) < 2 or (n <= 0).any() or (seconds <= 0).any():
        raise InputError(f"points are {list(ordered)}; wanted at least two different values, all above 0.")
    logs, times = np.log(n), np.log(seconds)
    slope, start = np.polyfit(logs, times, 1)
    fits = {"power": (float(np.exp(start)), float(slope))}
    for kind, axis in (("linear", n), ("logarithmic", logs)):
        a, b = np.linalg.lstsq(np.stack([1 / seconds, axis / seconds], 1), np.ones_like(seconds), rcond=None)[0]
        if a >= -1e-6 * seconds.min() and b >= 0:  # a proportional law's start comes out as some rounding around 0
            fits[kind] = (max(float(a), 0.0), float(b))
    errors = {kind: float(np.mean((_SHAPES[kind](a, b, n) / seconds - 1) ** 2)) for kind, (a, b) in fits.items()}
    kind = min(sorted(errors), key=lambda name: round(errors[name], 9))  # a tie goes to the linear one
    steps = np.diff(times) / np.diff(logs)
    return Law(
        key=key,
        what=what,
        variable=variable,
        points=ordered,
        kind=kind,
        a=fits[kind][0],
        b=fits[kind][1],
        exponent=float(slope),
        local=tuple(steps.tolist()),
        clock=clock,
        note=note,
    )


_SHAPES: dict[str, Callable[[float, float, Any], Any]] = {
    "linear": lambda a, b, n: a + b * n,
    "logarithmic": lambda a, b, n: a + b * np.log(n),
    "power": lambda a, b, n: a * n**b,
}
