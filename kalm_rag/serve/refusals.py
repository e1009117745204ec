"""How what goes wrong becomes an answer: errors of ours by their status and field, all else by no more than a kind.

An answer never holds a traceback, nor what a field held.
"""

from __future__ import annotations

import logging
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kalm_rag.errors import DeadlineError, InputError, KalmRagError, MissingStateError, StateMismatchError
from kalm_rag.serve.door import NoCollectionError
from kalm_rag.serve.shapes import ErrorBody, field_name, named_field
from kalm_rag.serve.threads import BusyError

logger = logging.getLogger(__name__)

_STATUS: list[tuple[type[KalmRagError], int, str]] = [
    (NoCollectionError, 404, "no_collection"),
    (BusyError, 429, "busy"),
    (DeadlineError, 504, "deadline"),
    (MissingStateError, 409, "missing_states"),
    (InputError, 422, "invalid"),
    (StateMismatchError, 422, "invalid"),
    (KalmRagError, 503, "unavailable"),  # model, store, Chroma
]
_REFUSED = {
    400: "No JSON.",
    401: "No key, or another.",
    404: "No collection is served.",
    408: "The body came too slowly.",
    409: "States are missing, under missing='raise'.",
    413: "The body is too long.",
    421: "Asked by a name that is not this machine's.",
    422: "A field can't be used; it is named.",
    429: "Too much is waiting; see Retry-After.",
    503: "The model, the store or Chroma fails.",
    504: "Over the deadline; what waited was dropped.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": told} for status, told in _REFUSED.items()
}
"""Of every route, for the OpenAPI file."""


def add_handlers(app: FastAPI) -> None:
    """Have an app answer what goes wrong in its routes."""
    app.add_exception_handler(KalmRagError, _tell_error)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(Exception, _tell_bug)


def error_answer(status: int, error: str, message: str, field: str | None = None) -> JSONResponse:
    """An answer that is no success."""
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse({"error": error, "message": message, "field": field}, status_code=status, headers=headers)


async def _tell_error(_: Request, err: Exception) -> JSONResponse:
    status, name = next((status, name) for kind, status, name in _STATUS if isinstance(err, kind))
    if status == 503:
        logger.error("%s", type(err).__name__, exc_info=err)
    return error_answer(status, name, str(err), named_field(str(err)) if status == 422 else None)


async def _tell_invalid(_: Request, err: Exception) -> JSONResponse:
    """Name the first field that can't be used; what it held is not given back."""
    first: dict[str, Any] = cast("RequestValidationError", err).errors()[0]
    if first["type"] == "json_invalid":
        return error_answer(400, "no_json", f"the body is no JSON: {first.get('ctx', {}).get('error', '')}")
    name = field_name(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return error_answer(422, "invalid", f"{name or 'the body'}: {message}", name or None)


async def _tell_http(_: Request, err: Exception) -> JSONResponse:
    status = cast("HTTPException", err).status_code
    return error_answer(status, "no_json" if status == 400 else "http", str(cast("HTTPException", err).detail))


async def _tell_bug(_: Request, err: Exception) -> JSONResponse:
    return error_answer(500, "bug", f"the server failed ({type(err).__name__}); its log says where.")
