"""What can go wrong, by name. Every error is ours and, where one fits, also the builtin a caller would catch.

A message says what was found, what was wanted and what to do next.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class KalmRagError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(KalmRagError, ValueError):
    """An argument that can't be used: wrong type, wrong range, text that is not valid Unicode."""


class StateShapeError(KalmRagError, ValueError):
    """States whose shape is not what the operation needs."""


class StateMismatchError(KalmRagError, ValueError):
    """States made by another model, or at a ratio that can't give the one asked for."""


class MissingStateError(KalmRagError, KeyError):
    """Candidates without stored states, under ``missing="raise"``."""

    def __str__(self) -> str:  # a KeyError prints the repr of its message otherwise
        return str(self.args[0]) if self.args else ""


class StoreError(KalmRagError, OSError):
    """The state store can't be opened, read or written (read-only folder, full disk, lock timeout)."""


class StoreFormatError(StoreError, ValueError):
    """The state store is damaged, foreign, or of a version this release doesn't read."""


class ModelError(KalmRagError, OSError):
    """A checkpoint that can't be found, fetched or trusted (unknown name, no network, wrong digest)."""


class ClosedError(KalmRagError, RuntimeError):
    """An engine, store or index used after ``close()``."""


class DeadlineError(KalmRagError, TimeoutError):
    """Ranking took longer than the caller's ``timeout``."""


class MissingDependencyError(KalmRagError, ImportError):
    """An optional package that is not installed. The message names module, extra and pip line."""


def missing_extra(package: str, extra: str, purpose: str, hint: str = "") -> MissingDependencyError:
    """Word the error about a package that is not installed.

    Args:
        package: What is missing, e.g. ``"langchain-chroma"`` or ``"the module scipy"``.
        extra: The extra of ours that brings it.
        purpose: What needs it, e.g. ``"drawing the curve"``.
        hint: What helps instead, e.g. ``"or pass a folder"``.

    Example:
        >>> str(missing_extra("the module scipy", "eval", "testing for significance"))
        "testing for significance needs the module scipy, which is not installed. Run: pip install 'kalm-rag[eval]'."
    """
    more = f", {hint}" if hint else ""
    return MissingDependencyError(
        f"{purpose} needs {package}, which is not installed. Run: pip install 'kalm-rag[{extra}]'{more}."
    )


def require(module: str, extra: str, purpose: str, hint: str = "") -> Any:  # noqa: ANN401 - a module
    """Import a module that an extra brings; see `missing_extra` for the other arguments.

    Raises:
        MissingDependencyError: If it is not installed, or needs one that is not. A module that is installed and fails
            in another way says so itself.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as err:
        top = (err.name or module).split(".")[0]
        raise missing_extra(f"the module {top}", extra, purpose, hint) from err
