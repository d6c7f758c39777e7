"""/v1/images/edits: a form with a picture and a prompt."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image as PILImage

from mmllm.conversation import Image, user
from mmllm.inference.chat import Chat
from mmllm.server import schemas as api
from mmllm.server.errors import ApiError
from tests.server.conftest import Served
from tests.server.exchange import CHAT, asking, error_of
from tests.server.files import PNG, WAV, file_of

ASKED: dict[str, Any] = {"model": "tiny", "prompt": "one", "extra_body": {"seed": 3}}
FORM = {"prompt": "one", "seed": "3"}
FILE = {"image": ("cat.png", PNG, "image/png")}


def png(width: int, height: int) -> bytes:
    """A picture whose left half is transparent."""
    alpha = np.full((height, width, 4), 255, np.uint8)
    alpha[:, : width // 2, 3] = 0
    file = io.BytesIO()
    PILImage.fromarray(alpha).save(file, "PNG")
    return file.getvalue()


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
        ({**FILE, "mask": WAV}, FORM, "mask"),
        ([("image", PNG), ("mask", png(4, 4)), ("mask", png(4, 4))], FORM, "mask"),
        ({**FILE, "mask": png(3, 7)}, FORM, "mask"),
        ([("image", PNG), ("image[]", PNG)], FORM, "image"),
        ([("image", PNG), ("image", PNG), ("mask", png(4, 4))], FORM, "image"),
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


def test_only_what_is_transparent_in_the_mask_changes(
    chat: Chat, client: openai.OpenAI, served: Served
) -> None:
    height, width = chat.model.decoders["image"].size
    original = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PILImage.fromarray(original).save(file, "PNG")
    mask = ("mask.png", png(width, height))
    made = client.images.edit(image=("cat.png", file.getvalue()), mask=mask, **ASKED).data
    assert made
    after = Image(base64.b64decode(made[0].b64_json or "")).to_numpy()
    half = width // 2
    assert np.array_equal(after[:, half:], original[:, half:])
    assert not np.array_equal(after[:, :half], original[:, :half])
    white = np.zeros((height, width, 3), np.uint8)
    white[:, :half] = 255
    options = {"image": {"mask": Image(white)}}
    asked: dict[str, Any] = {"modalities": {"image": "force", "audio": "forbid"}, "seed": 3}
    asked["modalities"]["video"] = "forbid"
    same = chat.reply([user(Image(original), "one")], decoders=options, max_media=1, **asked)
    assert np.array_equal(same.media[0].to_numpy(), after)


def test_a_decoder_without_masks_says_so(
    served: Served, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = served.service.options.decoders["image"]
    monkeypatch.setattr(type(decoder), "takes_mask", False)
    response = http.post("/v1/images/edits", files={**FILE, "mask": png(4, 4)}, data=FORM)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "mask"
    assert response.json()["error"]["code"] == "not_supported"


def test_several_pictures_are_references_where_the_decoder_takes_them(
    served: Served, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = served.service.options.decoders["image"]
    monkeypatch.setattr(decoder, "max_references", 2)
    options = served.service.options
    asked = {"references": "auto", "init_media": "none"}
    monkeypatch.setattr(options, "decoder", lambda modality, given, *_, **__: given.model_dump(
        exclude_none=True
    ))  # fmt: skip
    body = api.EditRequest(prompt="one")
    assert options.edit(body, 2).decoders == {"image": asked}
    with pytest.raises(ApiError, match="3 files, more than the 2"):
        options.edit(body, 3)
    with pytest.raises(ApiError, match=r"2 files, more than the 1 .* with a mask"):
        options.edit(body, 2, has_mask=True)
    monkeypatch.setattr(decoder, "masks_references", True)
    masked = options.edit(body, 2, has_mask=True)
    one, two, mask = (Image(np.zeros((4, 4, 3), np.uint8)) for _ in range(3))
    own = options.with_mask(masked, [one, two], mask).decoders["image"]
    assert own == {"init_media": one, "mask": mask, "references": [two]}


def test_a_model_that_cannot_start_from_a_picture_says_so(
    served: Served, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.service.options.decoders["image"], "init_modality", "")
    response = http.post("/v1/images/edits", files=FILE, data=FORM)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "not_supported"


def test_the_same_picture_is_made_again_from_what_came_back(http: httpx2.Client) -> None:
    """By the noise and the condition that the file's provenance names; a part changes it."""

    def made(messages: list[dict[str, Any]], seed: int, **options: Any) -> dict[str, Any]:
        body = {"messages": messages, "seed": seed, "max_tokens": 2, "max_media": 1}
        body |= {"modalities": {"image": "force", "audio": "forbid", "video": "forbid"}}
        response = http.post(CHAT, json={**body, "decoders": {"image": options}})
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]

    def pixels(message: dict[str, Any]) -> np.ndarray:
        url = next(part for part in message["parts"] if part["type"] == "image_url")["image_url"]
        return Image(base64.b64decode(url["url"].partition(",")[2])).to_numpy().astype(int)

    asked = {"role": "user", "content": "one"}
    first = made([asked], seed=5)
    talk = [asked, {"role": "assistant", "content": first["parts"]}]
    talk.append({"role": "user", "content": "two three"})
    whole, half, new = (
        pixels(made(talk, seed=6, noise="last", keep=share)) for share in (1.0, 0.5, 0.0)
    )
    assert np.array_equal(whole, pixels(first))
    assert 0 < np.abs(half - whole).mean() < np.abs(new - whole).mean()
    wrong = asking({"type": "text", "text": "one"}, decoders={"image": {"keep": 2}})
    assert error_of(http.post(CHAT, json=wrong))["param"] == "decoders.image.keep"
