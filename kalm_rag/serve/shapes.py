"""The bodies of requests and answers: Cohere's, Jina's and vLLM's, TEI's, and ours. Knows no engine.

Keys that a foreign shape has and this server does not know are ignored, as the other servers do; ours are refused.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    WithJsonSchema,
    field_validator,
)
from typing_extensions import TypedDict

from kalm_rag.checks import check_query, check_text
from kalm_rag.errors import InputError
from kalm_rag.index.candidates import Missing
from kalm_rag.index.outcome import OnError
from kalm_rag.instructions import Instructions
from kalm_rag.serve.door import Ranked, RecordId

_WANTED = 'a string, an object with a string "text", or {"id": "..."} of a stored passage'


def _read_document(value: object) -> str | RecordId:
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        value = value["text"]
    elif isinstance(value, dict) and isinstance(value.get("id"), str) and "text" not in value:
        return RecordId(check_text(value["id"], "the id"))
    if not isinstance(value, str):
        raise InputError(f"wanted {_WANTED}.")
    return check_text(value, "the text")


def _read_text(value: object) -> str:
    return check_text(value, "the text")


def _read_id(value: object) -> str:
    if not check_text(value, "the id"):
        raise InputError("is empty; wanted a name for each passage.")
    return str(value)


def _read_query(value: object) -> str:
    check_query(value, "the question")
    return str(value)


_STRING = {"type": "string"}
_OBJECTS = [{"type": "object", "properties": {key: _STRING}, "required": [key]} for key in ("text", "id")]
Document = Annotated[
    str | RecordId,
    PlainValidator(_read_document),
    WithJsonSchema({"anyOf": [_STRING, *_OBJECTS], "description": f"Wanted {_WANTED}."}),
]
Documents = Annotated[list[Document], Field(min_length=1)]
Text = Annotated[str, PlainValidator(_read_text), WithJsonSchema(_STRING)]
Id = Annotated[str, PlainValidator(_read_id), WithJsonSchema({**_STRING, "minLength": 1})]
Query = Annotated[str, PlainValidator(_read_query), WithJsonSchema({**_STRING, "minLength": 1})]
Count = Annotated[StrictInt, Field(ge=1, le=2**31)]
Share = Annotated[float, Field(ge=0.0, le=1.0, strict=True)]


class Steered(BaseModel):
    """A question, and what steers the model."""

    query: Query
    instruction: Text | None = Field(
        default=None,
        validation_alias=AliasChoices("instruction", "instructions", "instruct"),
        description="What kind of passage is wanted.",
    )
    system: Text | None = Field(default=None, description="The system text of the app.")

    @property
    def instructions(self) -> Instructions | None:
        """Both texts, or None for the model's defaults."""
        if self.instruction is None and self.system is None:
            return None
        return Instructions(system=self.system, task=self.instruction)


class CohereV2Request(Steered):
    """Body of ``POST /v2/rerank``, as Cohere has it. `model` may be any name: the server has one model."""

    model: Any = None
    documents: Documents
    top_n: Count | None = None
    max_tokens_per_doc: Count | None = None
    rank_fields: list[StrictStr] | None = None
    return_documents: StrictBool = False

    @field_validator("rank_fields")
    @classmethod
    def _only_text(cls, fields: list[str] | None) -> list[str] | None:
        if fields is not None and fields != ["text"]:
            raise InputError('wanted ["text"], the one field of a document that is read. Put the others into its text.')
        return fields


class RerankRequest(CohereV2Request):
    """Body of ``POST /v1/rerank``, as Jina, vLLM and Cohere's first version have it."""

    return_documents: StrictBool = True


class TeiRequest(Steered):
    """Body of ``POST /rerank``, as TEI has it; with `documents` for `texts` it is that of ``/v1/rerank``."""

    texts: Documents
    raw_scores: StrictBool = Field(default=False, description="Give margins, logit(yes) - logit(no), for P(yes).")
    return_text: StrictBool = False
    truncate: StrictBool | None = Field(default=None, description="false refuses texts longer than the model reads.")


def _shape(body: object) -> str:
    return "jina" if isinstance(body, dict) and "documents" in body and "texts" not in body else "tei"


_SHAPES = ("tei", "jina")
TeiOrRerank = Annotated[
    Annotated[TeiRequest, Tag("tei")] | Annotated[RerankRequest, Tag("jina")], Discriminator(_shape)
]


class SearchRequest(Steered):
    """Body of ``POST /v1/search``."""

    model_config = ConfigDict(extra="forbid")

    top_n: Count | None = 5
    fetch_k: Count | None = Field(default=None, description="Candidates; 50, or as many as the server takes.")
    where: dict[str, Any] | None = Field(default=None, description="Chroma's filter of metadata.")
    where_document: dict[str, Any] | None = Field(default=None, description="Chroma's filter of texts.")
    threshold: Share | None = Field(default=None, description="Least P(yes).")
    ratio: Count | None = None
    missing: Missing | None = None
    max_tokens: Count | None = Field(default=None, description="Most tokens of all hits together.")
    drop_duplicates: StrictBool | Share = False
    diversity: Share = 0.0
    prune: StrictBool | Annotated[float, Field(gt=0.0, allow_inf_nan=False, strict=True)] = Field(
        default=False, description="Leave out sentences that don't answer; `kept` says which characters stay."
    )
    on_error: OnError = "raise"
    timeout: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None

    def options(self) -> dict[str, Any]:
        """The arguments of `ChromaIndex.query` besides the question."""
        return self.model_dump(exclude={"query", "instruction", "system"}) | {"instructions": self.instructions}


class ExplainRequest(Steered):
    """Body of ``POST /v1/explain``: each document takes an encoder pass of its own, so they are few."""

    model_config = ConfigDict(extra="forbid")

    documents: Annotated[list[Document], Field(min_length=1, max_length=20)]


class Passage(BaseModel):
    """A passage to be kept."""

    model_config = ConfigDict(extra="forbid")

    id: Id
    text: Text
    metadata: dict[str, Any] | None = None


class PutRequest(BaseModel):
    """Body of ``PUT /v1/passages``."""

    model_config = ConfigDict(extra="forbid")

    passages: Annotated[list[Passage], Field(min_length=1)]


class DeleteRequest(BaseModel):
    """Body of ``DELETE /v1/passages``."""

    model_config = ConfigDict(extra="forbid")

    ids: Annotated[list[Id], Field(min_length=1)]


class ErrorBody(TypedDict):
    """Every answer that is no success."""

    error: str
    message: str
    field: str | None


class RerankAnswer(TypedDict):
    """Answer of ``/v1/rerank``."""

    id: str
    model: str
    object: Literal["list"]
    usage: dict[str, int]
    results: list[dict[str, Any]]
    meta: dict[str, Any]


class CohereV2Answer(TypedDict):
    """Answer of ``/v2/rerank``."""

    id: str
    results: list[dict[str, Any]]
    meta: dict[str, Any]


def cohere_v2_answer(ranked: Ranked, *, documents: bool) -> CohereV2Answer:
    """What ``/v2/rerank`` gives."""
    return {"id": str(uuid.uuid4()), "results": _results(ranked, documents), "meta": _meta(ranked, "2")}


def rerank_answer(ranked: Ranked, *, documents: bool) -> RerankAnswer:
    """What ``/v1/rerank`` gives."""
    return {
        "id": str(uuid.uuid4()),
        "model": ranked.model,
        "object": "list",
        "usage": {"prompt_tokens": ranked.tokens, "total_tokens": ranked.tokens},
        "results": _results(ranked, documents),
        "meta": _meta(ranked, "1"),
    }


def tei_answer(ranked: Ranked, *, raw: bool, texts: bool) -> list[dict[str, Any]]:
    """What ``/rerank`` gives."""
    return [
        {"index": one.index, "score": one.margin if raw else one.probability, **({"text": text} if texts else {})}
        for one, text in ranked.rows()
    ]


def _results(ranked: Ranked, documents: bool) -> list[dict[str, Any]]:
    return [
        {"index": one.index, "relevance_score": one.probability, **({"document": {"text": text}} if documents else {})}
        for one, text in ranked.rows()
    ]


def _meta(ranked: Ranked, version: str) -> dict[str, Any]:
    return {"api_version": {"version": version}, "tokens": {"input_tokens": ranked.tokens}}


def field_name(where: Sequence[int | str]) -> str:
    """A place in a request as people write it.

    Example:
        >>> field_name(["body", "documents", 3, "text"])
        'documents[3].text'
    """
    parts = list(where)
    for first in (("body",), _SHAPES):
        parts = parts[1:] if parts and parts[0] in first else parts
    return "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in parts).removeprefix(".")


def named_field(message: str) -> str | None:
    """The field that an error of ours is about: what its message begins with, if that is a field.

    Example:
        >>> named_field("top_n is 0; wanted a whole number >= 1."), named_field("states were made by another model.")
        ('top_n', None)
    """
    if message.startswith("search:"):  # Chroma's word on a filter
        return "where"
    first = message.partition(" ")[0].rstrip(":")
    return first if first.partition("[")[0] in _FIELDS else None


_FIELDS = {
    name
    for shape in (TeiRequest, RerankRequest, SearchRequest, ExplainRequest, PutRequest, DeleteRequest, Passage)
    for name in shape.model_fields
}
