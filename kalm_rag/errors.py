"""What can go wrong, by name. Every error is ours and, where one fits, also the builtin a caller would catch.

A message says what was found, what was wanted and what to do next.
"""

from __future__ import annotations


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


class MissingDependencyError(KalmRagError, ImportError):
    """An optional package that is not installed. The message names module, extra and pip line."""
