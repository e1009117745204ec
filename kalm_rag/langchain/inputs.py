"""What LangChain components of ours are given: documents, a chain step's input, what a call's config says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from langchain_core.documents import Document
from langchain_core.runnables import ConfigurableFieldSpec, RunnableConfig
from langchain_core.runnables.config import ensure_config
from pydantic import BaseModel, Field

from kalm_rag.checks import check_cut, check_items, unknown_argument_hint
from kalm_rag.errors import InputError
from kalm_rag.instructions import as_instructions

DEFAULT_TOP_N = 4
"""How many documents come back where nobody says: as many as LangChain's own vector stores and retrievers give."""

_CONFIGURED = {
    "instructions": (
        str | dict[str, str | None] | None,
        "What kind of passage is wanted, for this call: a task, or {'system': ..., 'task': ...}.",
    ),
    "top_n": (int | None, "Most documents given back, for this call."),
    "threshold": (float | None, "Keep only P(yes) >= this, for this call."),
}
"""What a call's config may say as ``kalm_<name>``; None there says nothing: LangServe puts it where none was said."""

CALL_NAMES = tuple(_CONFIGURED)
"""What one call may say otherwise than a component's settings."""

CONFIG_SPECS = [
    ConfigurableFieldSpec(
        id=f"kalm_{name}", annotation=kind, name=name.capitalize(), description=text, default=None, is_shared=True
    )
    for name, (kind, text) in _CONFIGURED.items()
]
"""Tells LangServe what calls may say. What no spec names is dropped there: so is ``kalm_filter``, which may be what
keeps one customer's documents from another's."""

FILTER_KEY = "kalm_filter"
"""Key in ``config["configurable"]`` for the filter of one call to a retriever; None there lifts the filter."""

_QUERY_KEYS = ("query", "question", "input")
_DOCUMENT_KEYS = ("documents", "context", "docs")


class RerankInput(BaseModel):
    """Input of `KaLMRerank`: one of the three names of the question, one of the three of the documents."""

    query: str | None = Field(default=None, description="The question; or question, or input.")
    question: str | None = None
    input: str | None = None
    documents: list[Document] | None = Field(default=None, description="What is reranked; or context, or docs.")
    context: list[Document] | None = None
    docs: list[Document] | None = None


def read_input(given: object) -> tuple[Any, Any]:
    """Find question and documents in what a chain or a graph hands on: a dict, a pydantic model or a dataclass.

    Raises:
        InputError: If it is none of these, or has no question or no documents.
    """
    if isinstance(given, Mapping):
        values: Mapping[str, Any] = given
    elif isinstance(given, BaseModel):
        values = {name: getattr(given, name) for name in type(given).model_fields}
    elif is_dataclass(given) and not isinstance(given, type):
        values = {field.name: getattr(given, field.name) for field in fields(given)}
    else:
        raise InputError(
            f"input is {type(given).__name__}; wanted a dict (or a pydantic or dataclass state) with the question and "
            f"the documents."
        )
    found = []
    for names in (_QUERY_KEYS, _DOCUMENT_KEYS):
        key = next((name for name in names if values.get(name) is not None), None)
        if key is None:
            raise InputError(f"input has the keys {sorted(map(str, values))}; wanted one of {', '.join(names)} in it.")
        found.append(values[key])
    documents = found[1]
    if isinstance(documents, Sequence) and not isinstance(documents, str):
        documents = [_as_document(document) for document in documents]
    return found[0], documents


def check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Answer a mistyped argument, or one that other libraries call so, with what it is called here; others pass.

    Raises:
        InputError: If one of them was probably meant to be one of `known`.
    """
    there = list(known)
    for name in given:
        if name not in there and (hint := unknown_argument_hint(name, there)):
            raise InputError(f"{where} has no argument {name}.{hint}")


def check_documents(documents: Iterable[Document]) -> list[Document]:
    """Read documents of any iterable once.

    Raises:
        InputError: If it is none; the first item that is no `Document` is named.
    """
    if isinstance(documents, str | Mapping):
        raise InputError(f"documents is {type(documents).__name__}; wanted a list of Document.")
    read = check_items(documents, "documents", "a list of Document")
    for position, document in enumerate(read):
        if not isinstance(document, Document):
            raise InputError(f"document {position} is {type(document).__name__}; wanted a langchain_core Document.")
    return read


def configured(config: RunnableConfig | None) -> dict[str, Any]:
    """What a call's config, or that of the running chain, says: instructions, top_n, threshold, as far as it does.

    Raises:
        InputError: If a number is out of range, the instructions are none, or a name that begins with ``kalm_`` is
            unknown.
    """
    held = ensure_config(config).get("configurable") or {}
    known = [*(f"kalm_{name}" for name in _CONFIGURED), FILTER_KEY]
    for key in held:
        if isinstance(key, str) and key.startswith("kalm_") and key not in known:
            hint = unknown_argument_hint(key.removeprefix("kalm_"), [name.removeprefix("kalm_") for name in known])
            raise InputError(
                f"the config says {key}; wanted one of {', '.join(known)}.{hint.replace('mean ', 'mean kalm_')}"
            )
    said = {name: value for name in _CONFIGURED if (value := held.get(f"kalm_{name}")) is not None}
    return read_call(said, prefix="kalm_")


def read_call(said: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Check what one call says otherwise than a component's settings, and read its instructions.

    Args:
        said: Any of instructions, top_n and threshold.
        prefix: What stands before the names where the caller wrote them.

    Raises:
        InputError: If a number is out of range, or the instructions are none.
    """
    none = "None to leave it as it is" if prefix else "None for all"
    check_cut(said.get("top_n"), said.get("threshold"), count=f"{prefix}top_n", least=f"{prefix}threshold", none=none)
    read = dict(said)
    if "instructions" in said:
        read["instructions"] = as_instructions(said["instructions"])
    return read


def _as_document(value: object) -> object:
    """A document that went through JSON (``page_content`` with ``metadata`` and ``id``, or LangChain's own form)."""
    if not isinstance(value, Mapping):
        return value
    held = value["kwargs"] if "lc" in value and isinstance(value.get("kwargs"), Mapping) else value
    if not isinstance(held.get("page_content"), str):
        raise InputError(f"a document is a dict with the keys {sorted(map(str, value))}; wanted page_content in it.")
    return Document(
        page_content=held["page_content"], **{key: held[key] for key in ("metadata", "id") if held.get(key) is not None}
    )
