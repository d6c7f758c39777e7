"""Errors as JSON of OpenAI's API: {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from mmllm.errors import ConfigError, ContextError, MediaError, MmllmError, quoted

log = logging.getLogger(__name__)

CLOSED = 499
"""Status of a request whose client closed the connection (nginx's number); it is never read."""
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
_LONGEST_STEP = 64
"""Most characters of a field's name in an error's path."""
_LONGEST_PATH = 120
"""Most characters of the requested path in an error."""
_REMEDY_IN_PYTHON = re.compile(r",? or use `with mmllm\.[^`]*`:?")
"""A remedy for Python programs; it is cut from messages to clients."""
_CLASS_IN_PYTHON = re.compile(r"give it as (Image|Audio|Video)\(\.\.\.\)")
_PARTS = {"Image": "image_url", "Audio": "input_audio", "Video": "video_url"}
_EXPECTED = {
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "string_type": "a string",
}
"""Pydantic's error types that name Python types -> the name of the type in JSON."""


class ErrorBody(BaseModel):
    """The JSON of an error: a message with its remedy; `param`: the path of the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody


class _Ascii(JSONResponse):
    """A JSON response in ASCII: a message may quote lone surrogates, which UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")


class ApiError(Exception):
    """An error response. `status`: HTTP status; `code`: a machine-readable reason."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self) -> JSONResponse:
        headers = {"retry-after": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return _Ascii(self.body(), self.status, headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400 error for an invalid request."""
    return ApiError(400, message, param=param, code=code)


def to_api_error(error: BaseException, param: str | None = None) -> ApiError:
    """Convert any error to one of the API; those that the client did not cause are only logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return bad_request(str(error), param or "messages", "context_length_exceeded")
    if isinstance(error, MediaError):
        return bad_request(_for_clients(str(error)), param, "invalid_media")
    if isinstance(error, ConfigError):
        return bad_request(str(error), param)
    log.error("a request failed", exc_info=error)
    what = "the model cannot answer" if isinstance(error, MmllmError) else "internal error"
    return ApiError(500, f"{what}; the server's log says why", code="internal_error")


def install(app: FastAPI) -> None:
    """Register handlers that answer with errors of the API; AdmissionMiddleware does the others."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(MmllmError)
    async def _mmllm(request: Request, error: MmllmError) -> JSONResponse:
        return to_api_error(error).response()

    @app.exception_handler(404)
    async def _unknown(request: Request, error: Exception) -> JSONResponse:
        message = f"{_shown(request)}: no such path; see /openapi.json"
        return ApiError(404, message, code="unknown_url").response()

    @app.exception_handler(405)
    async def _method(request: Request, error: Any) -> JSONResponse:
        allowed = dict(error.headers or {})
        method = request.method[:_LONGEST_STEP]
        message = f"{method} {_shown(request)}: not that method, but {allowed.get('Allow', '?')}"
        response = ApiError(405, message, code="method_not_allowed").response()
        response.headers.update(allowed)
        return response


def _shown(request: Request) -> str:
    """Return the path of a request, shortened for a message."""
    path = request.url.path
    return path if len(path) <= _LONGEST_PATH else f"{path[: _LONGEST_PATH - 1]}…"


def invalid(errors: Sequence[Any], body: Any) -> ApiError:
    """Convert pydantic's validation errors of a body to an error that names the field.

    A union reports an error for each of its types; the error of the deepest path is returned.
    """
    found = [(list(_path(error["loc"], body, error["type"])), error) for error in errors]
    path = max((path for path, _ in found), key=len)
    there = [error for steps, error in found if len(steps) == len(path)]
    param = ".".join(str(step)[:_LONGEST_STEP] for step in path) or None
    if not path and not isinstance(body, Mapping):
        return bad_request("the body: expected a JSON object, with content-type application/json")
    inside = [error for error in there if error["type"] not in _EXPECTED]
    if not inside:
        inner: Any = body
        for step in path:
            inner = inner.get(step) if isinstance(inner, Mapping) else inner[step]
        wanted = " or ".join(dict.fromkeys(_EXPECTED[error["type"]] for error in there))
        message = f"expected {wanted}, got {quoted(inner)}"
    else:
        message = _message(inside[0])
    message = message[:1].lower() + message[1:]
    return bad_request(f"{param}: {message}" if param else message, param)


def drop_unknown(errors: Sequence[Any], body: Any) -> list[str]:
    """Remove the fields that the schema does not have from a body; return their paths."""
    dropped = []
    for error in errors:
        if error["type"] != "extra_forbidden":
            continue
        path = list(_path(error["loc"], body, error["type"]))
        if not path or path[-1] != error["loc"][-1]:
            continue
        inner = body
        for step in path[:-1]:
            inner = inner[step]
        if isinstance(inner, dict) and path[-1] in inner:
            del inner[path[-1]]
            dropped.append(".".join(str(step)[:_LONGEST_STEP] for step in path))
    return dropped


def _message(error: Mapping[str, Any]) -> str:
    kind, more = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return (
            "unknown or unsupported field: leave it out, or start the server with --lenient, which "
            "drops such fields and names them in its response"
        )
    if kind == "union_tag_not_found":
        return f"expected an object with the field {more['discriminator']}"
    if kind == "union_tag_invalid":
        expected, got = more["expected_tags"], quoted(more["tag"])
        return f"{more['discriminator']}: expected one of {expected}, got {got}"
    return str(error["msg"])


def _path(loc: Sequence[str | int], body: Any, kind: str) -> Iterator[str | int]:
    """Yield the steps of a location that exist in the body; pydantic adds union members."""
    inner: Any = body
    for number, step in enumerate(loc):
        if isinstance(inner, Mapping) and step in (inner.get("type"), inner.get("role")):
            rest = loc[number + 1 :]
            if rest[0] in inner if rest else kind == "too_long":
                continue  # a union member that has the name of one of its fields
        in_object = isinstance(inner, Mapping) and step in inner
        in_list = isinstance(inner, list) and isinstance(step, int) and step < len(inner)
        if in_object or in_list:
            inner = inner[step]  # pyright: ignore
            yield step
        elif kind == "missing" and number == len(loc) - 1:
            yield step


def _for_clients(message: str) -> str:
    """Replace the remedies of a message for Python programs by those for clients."""
    message = _REMEDY_IN_PYTHON.sub("", message)
    return _CLASS_IN_PYTHON.sub(lambda found: f"send it as `{_PARTS[found[1]]}`", message)
