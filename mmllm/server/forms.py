"""Parse the body of a request as a form (multipart/form-data) into fields and files."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

from fastapi import Request
from fastapi.exceptions import StarletteHTTPException

from mmllm.server.errors import ApiError, bad_request

_MOST_FIELDS = 64
_MOST_BYTES = 2**18
"""Most bytes of a field that is not a file."""


def parsed(kind: str, data: bytes) -> tuple[dict[str, str], dict[str, list[bytes]]]:
    """(the fields, the files by name) of a form; `kind`: its content-type. Raises ApiError. It
    runs in a thread that has no event loop of its own."""
    if not kind.lower().startswith("multipart/form-data"):
        raise bad_request("the body: expected a form, with content-type multipart/form-data")
    if importlib.util.find_spec("python_multipart") is None:
        raise ApiError(
            501, "forms need python-multipart where the server runs: pip install python-multipart"
        )
    try:
        return asyncio.run(_read(kind, data))
    except (StarletteHTTPException, ValueError) as error:
        why = str(getattr(error, "detail", error))[:200]
        raise bad_request(f"the body is no form that can be read: {why}") from error


async def _read(kind: str, data: bytes) -> tuple[dict[str, str], dict[str, list[bytes]]]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    headers = [(b"content-type", kind.encode("latin-1"))]
    request = Request({"type": "http", "app": None, "headers": headers}, receive)
    fields: dict[str, str] = {}
    files: dict[str, list[bytes]] = {}
    limits = {"max_files": _MOST_FIELDS, "max_fields": _MOST_FIELDS, "max_part_size": _MOST_BYTES}
    async with request.form(**limits) as form:
        for name, value in form.multi_items():
            if isinstance(value, str):
                fields[name] = value
            else:
                files.setdefault(name, []).append(await value.read())
    return fields, files
