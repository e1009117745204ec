"""The passage rule: how a record (text and metadata) becomes the text that the encoder reads.

A rule is noted in the collection, so that every door that opens it reads the same texts and finds the same states.
Knows no Chroma; LlamaIndex's own text builder is looked up by name when a collection asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from kalm_rag.errors import InputError, require

DOCUMENT = "document"
LLAMA_INDEX = "llama_index:"
LLAMA_MODES = ("embed", "llm", "none", "all")
_FIELD = re.compile(r"\{([A-Za-z_][\w.-]*)\}")

NodeText = Callable[[str, "str | None", "Mapping[str, Any] | None", str], "str | None"]
"""Record id, document, metadata and mode to the text of the node that LlamaIndex makes of the record."""


@dataclass(frozen=True)
class PassageRule:
    r"""How a record becomes the text that is read.

    Args:
        spec: ``"document"``: the record's text as it is. A template over the record's text and metadata:
            ``"{title}\n{text}"``, ``"{date}: {text}"``; ``{text}`` is the record's text, other names are metadata
            keys, missing ones are empty, other braces stay. Or ``"llama_index:embed"`` (``llm``, ``none``, ``all``):
            the text that a LlamaIndex node has in that metadata mode.

    Raises:
        InputError: If it is none of these; a template must hold ``{text}``.

    Example:
        >>> PassageRule("{title}: {text}").text("Boil it.", {"title": "Tea"})
        'Tea: Boil it.'
    """

    spec: str = DOCUMENT

    def __post_init__(self) -> None:
        spec: object = self.spec
        if not isinstance(spec, str):
            raise InputError(f"passage is {type(spec).__name__}; {_WANTED}.")
        if spec == DOCUMENT or "text" in _FIELD.findall(spec):
            return
        if spec.startswith(LLAMA_INDEX) and spec.removeprefix(LLAMA_INDEX) in LLAMA_MODES:
            return
        raise InputError(f"passage is {spec!r}; {_WANTED}.")

    def __str__(self) -> str:
        return self.spec

    @property
    def needs_metadata(self) -> bool:
        """Whether the text depends on more than the record's document."""
        return self.spec != DOCUMENT

    @property
    def llama_mode(self) -> str | None:
        """The metadata mode of a rule of LlamaIndex's, else None."""
        return self.spec.removeprefix(LLAMA_INDEX) if self.spec.startswith(LLAMA_INDEX) else None

    def text(self, document: str | None, metadata: Mapping[str, Any] | None, record_id: str = "") -> str | None:
        """Text of one record that is read; None for a record without text, which can't be scored.

        Raises:
            MissingDependencyError: If the rule is LlamaIndex's and that is not installed.
        """
        if self.spec == DOCUMENT:
            return document
        if self.llama_mode is not None:
            return _llama_text()(record_id, document, metadata, self.llama_mode)
        if document is None:
            return None
        fields = metadata if metadata is not None else {}

        def value(found: re.Match[str]) -> str:
            name = found[1]
            held = document if name == "text" else fields.get(name)
            return "" if held is None else held if isinstance(held, str) else _plain(held)

        return _FIELD.sub(value, self.spec).strip()


_WANTED = (
    "wanted 'document', a template with {text} in it such as '{title}\\n{text}', or 'llama_index:embed' "
    "(llm, none, all)"
)


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _llama_text() -> NodeText:
    """LlamaIndex's own way to make a node's text. Looked up by name: the index knows no framework."""
    nodes = require(
        "kalm_rag.llama_index.nodes", "llama-index", "reading LlamaIndex nodes, which this collection holds,"
    )
    return cast("NodeText", nodes.record_text)
