"""/v1/images/edits: a form with a picture and a prompt."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import httpx2
import openai
import pytest

from mmllm.conversation import Image, user
from mmllm.inference.chat import Chat
from tests.server.conftest import Served
from tests.server.files import PNG, WAV, file_of

ASKED: dict[str, Any] = {"model": "tiny", "prompt": "one", "extra_body": {"seed": 3}}
FORM = {"prompt": "one", "seed": "3"}
FILE = {"image": ("cat.png", PNG, "image/png")}


@pytest.mark.parametrize("as_list", [True, False])
def test_an_edit_is_a_reply_that_starts_from_the_picture(
    chat: Chat, client: openai.OpenAI, as_list: bool
) -> None:
    file: Any = [("cat.png", PNG)] if as_list else ("cat.png", PNG)
    made = client.images.edit(image=file, **ASKED).data
    reply = chat.reply(
        [user(Image(PNG), "one")],
        modalities={"image": "force", "audio": "forbid", "video": "forbid"},
        decoders={"image": {"init_media": "last"}},
        max_media=1,
        seed=3,
    )
    assert made
    assert base64.b64decode(made[0].b64_json or "") == file_of(reply.media[0], "png")


@pytest.mark.parametrize(
    ("files", "form", "param"),
    [
        ({}, FORM, None),
        ({"other": PNG}, FORM, "image"),
        ({"image": WAV}, FORM, "image"),
        ({"image": b"no picture"}, FORM, "image"),
        ({**FILE, "mask": PNG}, FORM, "mask"),
        (FILE, {"seed": "3"}, "prompt"),
        (FILE, {**FORM, "n": "two"}, "n"),
        (FILE, {**FORM, "n": "99"}, "n"),
        (FILE, {**FORM, "strength": "7"}, "strength"),
        (FILE, {**FORM, "strength": "nan"}, "strength"),
        (FILE, {**FORM, "input_fidelity": "high"}, "input_fidelity"),
        (FILE, dict.fromkeys(map(str, range(100)), "x"), None),
    ],
)
def test_invalid_fields_are_named(
    http: httpx2.Client, files: Any, form: dict[str, str], param: str | None
) -> None:
    response = http.post("/v1/images/edits", files=files, data=form)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("body", [b"", b"--x", b"--x\r\nnonsense\r\n--x--", bytes(1000)])
@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "multipart/form-data", "x"])
def test_bodies_that_are_not_forms_are_refused(http: httpx2.Client, body: bytes, kind: str) -> None:
    response = http.post("/v1/images/edits", content=body, headers={"content-type": kind})
    assert response.status_code == 400, response.text


def test_a_lenient_server_names_the_mask(serve: Callable[..., Served]) -> None:
    with serve(lenient=True).http() as http:
        response = http.post("/v1/images/edits", files={**FILE, "mask": PNG}, data=FORM)
    assert response.status_code == 200, response.text
    assert response.json()["mmllm"]["ignored"] == ["mask"]


def test_a_model_that_cannot_start_from_a_picture_says_so(
    served: Served, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.service.options.decoders["image"], "init_modality", "")
    response = http.post("/v1/images/edits", files=FILE, data=FORM)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "not_supported"
