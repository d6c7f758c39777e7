"""Requests, what a response holds, and the replies of the Python API to compare it with."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import httpx2

from mmllm.conversation import Message, Text
from mmllm.inference.chat import Chat
from mmllm.inference.replies import Reply
from tests.server.files import file_of

CHAT = "/v1/chat/completions"
ALL = {"image": "force", "audio": "force", "video": "force"}
FORMATS = {"image": "png", "audio": "wav", "video": "mp4"}


def asking(*parts: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The body of a request with one message."""
    return {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 2, **options}


def error_of(response: httpx2.Response, status: int = 400) -> dict[str, Any]:
    """The error of a response, which must have the form of the API's errors."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error


def files_in(parts: list[dict[str, Any]]) -> list[str | bytes]:
    """The texts and the bytes of files of a response's parts, in order."""
    found: list[str | bytes] = []
    for part in parts:
        inside = part[part["type"]]
        if part["type"] == "text":
            found.append(inside)
        elif part["type"] == "input_audio":
            found.append(base64.b64decode(inside["data"]))
        else:
            found.append(base64.b64decode(inside["url"].partition(",")[2]))
    return found


def replied(chat: Chat, conversation: Sequence[Message], **options: Any) -> Reply:
    """The reply of the Python API."""
    settings = {"seed": 3, "temperature": 1.0, "max_new_tokens": 12, **options}
    return chat.reply(conversation, **settings)


def files_of(message: Message) -> list[str | bytes]:
    """The texts of a message and its media as the bytes of files, in order."""
    return [
        part.text if isinstance(part, Text) else file_of(part, FORMATS[part.modality])
        for part in message.parts
    ]
