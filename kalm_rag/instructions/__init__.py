"""The texts that steer the decoder, and how they are read out of an app's own prompt."""

from __future__ import annotations

from kalm_rag.instructions.instructions import (
    DEFAULT_TASK,
    JUDGE,
    AnyInstructions,
    Instructions,
    SystemMode,
    as_instructions,
)

__all__ = ["DEFAULT_TASK", "JUDGE", "AnyInstructions", "Instructions", "SystemMode", "as_instructions"]
