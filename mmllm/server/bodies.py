"""Parse the body of a request into a model of `schemas`.

The size is checked first. Parsing and validation run in a thread, so that the event loop stays free
for other requests.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema

from mmllm.errors import quoted
from mmllm.server import errors, forms
from mmllm.server import schemas as api
from mmllm.server.errors import bad_request
from mmllm.server.responses_schemas import ResponsesRequest

B = TypeVar("B", bound=BaseModel)

MODELS = (
    api.ChatRequest,
    api.ImageRequest,
    api.EditRequest,
    api.SpeechRequest,
    api.TranscriptionRequest,
    api.VideoRequest,
    ResponsesRequest,
)
_REFS = "#/components/schemas/{model}"
_MOST_PIECES = 200_000
"""Most commas, colons and brackets of a body, including those in up to 100,000 characters of text:
each parsed value takes about a hundred bytes and a microsecond."""
_PIECES = (b",", b":", b"[", b"{")
_NUMBERS = {"n": int, "seed": int, "strength": float, "temperature": float}
"""Fields of a form that are numbers."""
_POOL = ThreadPoolExecutor(2, thread_name_prefix="mmllm-bodies")
_JSON = re.compile(r"application/(?:[\w.-]{1,64}\+)?json", re.ASCII)


def read(model: type[B], *, form: bool = False) -> Callable[[Request], Awaitable[B]]:
    """A dependency of a route: the request's JSON body as `model`.

    `form`: a form without files is accepted too. Raises ApiError (400).
    """

    async def body(request: Request) -> B:
        content_type = request.headers.get("content-type", "")
        kind = content_type.partition(";")[0].strip().lower()[:100]
        data = await request.body()
        lenient = request.app.state.service.settings.lenient
        loop = asyncio.get_running_loop()
        if form and kind == "multipart/form-data":
            return await loop.run_in_executor(_POOL, _form, model, content_type, data, lenient)
        if not _JSON.fullmatch(kind):
            raise bad_request(
                "the body: expected a JSON object, with content-type application/json"
            )
        return await loop.run_in_executor(_POOL, parsed, model, data, lenient)

    return body


def parsed(model: type[B], data: bytes, lenient: bool = False) -> B:
    """Validate a body; raise ApiError (400) that names the field. `lenient`: unknown or unsupported
    fields are dropped and listed in `ignored`."""
    num = sum(map(data.count, _PIECES))
    if num > _MOST_PIECES:
        raise bad_request(
            f"the body: {num} commas, colons and brackets, more than {_MOST_PIECES}: send fewer "
            "values"
        )
    try:
        tree = json.loads(data.decode("utf-8-sig"), parse_constant=_no_json)
        if rb"\u" in data:  # without an escape, UTF-8 holds whole characters only
            _check_characters(tree)  # it nests deeper than reading does
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: byte {error.start} of {len(data)}") from error
    except RecursionError as error:
        raise bad_request(
            "the body is not JSON that can be meant: it is nested too deeply"
        ) from error
    except ValueError as error:
        why = "a number of thousands of digits" if "digits" in str(error) else str(error)[:200]
        raise bad_request(f"the body is not JSON: {why}") from error
    return validated(model, tree, lenient)


def validated(model: type[B], tree: Any, lenient: bool = False) -> B:
    """Validate a parsed body as `model`; see `parsed`."""
    ignored: list[str] = []
    while True:
        try:
            body = model.model_validate(tree)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            dropped = errors.drop_unknown(found, tree) if lenient else []
            if not dropped:
                raise errors.invalid(found, tree) from error
            ignored += dropped
        else:
            if isinstance(body, api.ApiRequest):
                body.ignored.extend(ignored)
            return body


@dataclass(frozen=True)
class EditForm:
    """The form of an edit: its fields, its images, at least one, and its mask, if it has one."""

    body: api.EditRequest
    images: list[bytes]
    mask: bytes | None


async def read_edit(request: Request) -> EditForm:
    """A dependency of a route: the form of an edit. Raises ApiError (400)."""
    data, content_type = await request.body(), request.headers.get("content-type", "")
    lenient = request.app.state.service.settings.lenient
    return await asyncio.get_running_loop().run_in_executor(
        _POOL, _edit_form, content_type, data, lenient
    )


def _edit_form(content_type: str, data: bytes, lenient: bool) -> EditForm:
    fields, files = forms.parsed(content_type, data)
    images = files.pop("image", []) + files.pop("image[]", [])
    masks = files.pop("mask", [])
    if not images:
        raise bad_request("image: expected at least one file, got none", "image")
    if len(masks) > 1 or "mask" in fields:  # also where unknown fields are ignored
        got = "a text" if "mask" in fields else len(masks)
        raise bad_request(f"mask: expected one file, got {got}", "mask")
    body = _fields(api.EditRequest, fields, files, lenient)
    return EditForm(body, images, masks[0] if masks else None)


async def read_transcription(request: Request) -> tuple[api.TranscriptionRequest, bytes]:
    """A dependency of a route: the form and audio of a transcription. Raises ApiError (400)."""
    return await _read_upload(request, api.TranscriptionRequest, "file")


async def _read_upload(request: Request, model: type[B], name: str) -> tuple[B, bytes]:
    data, content_type = await request.body(), request.headers.get("content-type", "")
    lenient = request.app.state.service.settings.lenient
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_POOL, _upload, model, name, content_type, data, lenient)


def _upload(
    model: type[B], name: str, content_type: str, data: bytes, lenient: bool
) -> tuple[B, bytes]:
    """Return the fields of a form as `model`, and its one file of this name."""
    fields, files = forms.parsed(content_type, data)
    uploads = files.pop(name, []) + files.pop(f"{name}[]", [])
    if len(uploads) != 1:
        raise bad_request(f"{name}: expected one file, got {len(uploads)}", name)
    return _fields(model, fields, files, lenient), uploads[0]


def _form(model: type[B], content_type: str, data: bytes, lenient: bool) -> B:
    """Return the fields of a form without files as `model`."""
    return _fields(model, *forms.parsed(content_type, data), lenient)


def _fields(
    model: type[B], fields: dict[str, str], files: dict[str, list[bytes]], lenient: bool
) -> B:
    """Parse the numbers among the fields of a form, which are all strings. A file that the model
    has no field for is an unknown field."""
    tree: dict[str, Any] = {**fields, **dict.fromkeys(files, "a file")}
    for name, number in _NUMBERS.items():
        if name in tree:
            try:
                tree[name] = number(tree[name])
            except ValueError as error:
                raise bad_request(
                    f"{name}: expected a number, got {quoted(tree[name])}", name
                ) from error
    if tree.get("stream") == "false":
        del tree["stream"]
    return validated(model, tree, lenient)


def component_schemas() -> dict[str, Any]:
    """Return the schemas of the bodies for the OpenAPI document, by name."""
    modes: Any = [(model, "validation") for model in MODELS]
    return models_json_schema(modes, ref_template=_REFS)[1]["$defs"]


def documented_form(
    model: type[BaseModel], file: str, *, optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the OpenAPI schema of a form with a file, and others that it may have."""
    schema = dict(component_schemas()[model.__name__])  # it allows no other properties
    upload = {"type": "string", "format": "binary"}
    schema["properties"] = dict.fromkeys((file, *optional), upload) | schema["properties"]
    schema["required"] = [file, *schema.get("required", [])]
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    }


def documented(model: type[BaseModel], *, form: bool = False) -> dict[str, Any]:
    """Return the reference to a body's schema for a route's entry in the OpenAPI document."""
    schema = {"$ref": _REFS.format(model=model.__name__)}
    kinds = ["application/json", *(["multipart/form-data"] if form else [])]
    return {
        "requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}
    }


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _check_characters(tree: Any) -> None:
    try:
        json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        around = quoted(error.object[max(error.start - 8, 0) : error.start + 9])
        raise bad_request(
            f"half a character (a lone surrogate) is no text, got …{around}…"
        ) from error
