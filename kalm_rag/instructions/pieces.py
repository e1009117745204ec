"""What a template is cut into: literal text and slots. Knows no format, no framework and no roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kalm_rag.errors import InputError

MAX_PROMPT_CHARS = 100_000
"""Most characters of one message, partial variables filled in: some 25,000 tokens, more than any model here reads."""

DOCUMENT_SLOTS = frozenset(
    "context contexts documents docs context_str sources passages summaries context_msg context_list chunks "
    "retrieved_chunks input_documents".split()
)
"""Usual names of the slot that takes the retrieved documents; they tell an answering prompt from the others."""
QUERY_SLOTS = frozenset(
    "question query query_str query_msg input user_question user_query user_input user_message search_query".split()
)
"""Usual names of the slot that takes the question."""


@dataclass(frozen=True)
class Slot:
    """A place that the app fills per query: documents, question, history, or anything else."""

    name: str

    @property
    def takes_documents(self) -> bool:
        """Whether it is named like a slot for retrieved documents."""
        return self.name.rpartition(".")[2].lower() in DOCUMENT_SLOTS

    @property
    def takes_query(self) -> bool:
        """Whether it is named like a slot for the question."""
        return self.name.rpartition(".")[2].lower() in QUERY_SLOTS


Piece = str | Slot
Values = Mapping[str, object]
"""Partial variables by name; a callable is called for its value."""


def value_of(name: str, values: Values) -> object:
    """Value of a partial variable.

    Raises:
        InputError: If its callable fails.
    """
    value = values[name]
    if not callable(value):
        return value
    try:
        return value()
    except Exception as err:
        raise InputError(f"partial variable {name!r} could not be computed: {err}") from err


def fill(name: str, values: Values) -> Piece:
    """Text of a partial variable, or the slot where it has none.

    Raises:
        InputError: If its callable fails.
    """
    return str(value_of(name, values)) if name in values else Slot(name)


def check_length(chars: int) -> int:
    """Refuse a message that is longer than any prompt; gives its length back.

    Raises:
        InputError: If it has more than `MAX_PROMPT_CHARS` characters.
    """
    if chars > MAX_PROMPT_CHARS:
        raise InputError(
            f"a message of the prompt has {chars:,} characters or more; wanted at most {MAX_PROMPT_CHARS:,}. Give the "
            f"texts that matter as Instructions(system=..., task=...)."
        )
    return chars
