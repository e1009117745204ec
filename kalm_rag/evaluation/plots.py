"""What all pictures share: matplotlib without a display, checked before anything is measured. Extra ``plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kalm_rag.errors import InputError, require

PLOTS = (".svg", ".png", ".pdf")


def check_plot(path: Path) -> None:
    """Refuse a plot that can't be drawn.

    Raises:
        InputError: If the file's ending is none of svg, png and pdf.
        MissingDependencyError: If matplotlib is not installed.
    """
    if path.suffix not in PLOTS:
        raise InputError(f"plot is {path.name!r}; wanted a file that ends in {', '.join(PLOTS)}.")
    new_figure(1, 1)


def new_figure(width: float, height: float) -> Any:  # noqa: ANN401 - matplotlib is an extra
    """An empty figure, without pyplot: no global state, no window. Sizes are in inches."""
    return require("matplotlib.figure", "plot", "drawing").Figure(figsize=(width, height), layout="constrained")


def tidy(*every: Any) -> None:  # noqa: ANN401 - axes of matplotlib
    """Give axes a light grid and no frame."""
    for axes in every:
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)


def save(figure: Any, path: Path) -> None:  # noqa: ANN401
    """Write a figure; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
