"""Media in `content`, for clients that know nothing else, and the files behind its URLs."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from mmllm.conversation import assistant, user
from mmllm.errors import ConfigError
from mmllm.inference.chat import Chat
from mmllm.inference.replies import Reply
from mmllm.server import markdown
from mmllm.server.generated_files import GeneratedFiles
from mmllm.server.settings import ServerSettings
from tests.server.conftest import Served
from tests.server.exchange import ALL, files_in, files_of, replied

ASKED = [{"role": "user", "content": "one two three"}]
OPTIONS: dict[str, Any] = {"seed": 3, "temperature": 1.0, "max_tokens": 12, "model": "tiny"}


def extra(media: str | None, **more: Any) -> dict[str, Any]:
    return {"modalities": ALL, **({"mmllm": {"media": media}} if media else {}), **more}


def shown(content: str, served: Served) -> list[str | bytes]:
    """The texts and files of `content`, in order; URLs are fetched without a token."""
    found: list[str | bytes] = []
    for modality, part in markdown.split(content):
        if modality is None:
            found.append(part)
        elif part.startswith("data:"):
            found.append(base64.b64decode(part.partition(",")[2]))
        else:
            with served.http() as http:
                found.append(http.get(part).raise_for_status().content)
    return found


def wanted(reply: Reply) -> list[str | bytes]:
    return [part for part in files_of(reply.message) if part != ""]


@pytest.mark.parametrize("media", ["markdown", "urls"])
@pytest.mark.parametrize("by_server", [True, False])
def test_content_holds_the_files(
    chat: Chat, serve: Callable[..., Served], media: str, by_server: bool
) -> None:
    served = serve(token="secret", **({"media_format": media} if by_server else {}))
    body = extra(None if by_server else media)
    reply = replied(chat, [user("one two three")], modalities=ALL)
    with served.openai("secret") as client:
        message = (
            client.chat.completions.create(messages=ASKED, extra_body=body, **OPTIONS)
            .choices[0]
            .message
        )
        assert message.content
        assert shown(message.content, served) == wanted(reply)
        assert len(re.findall(r"!\[picture\]\(", message.content)) == 1
        assert ("data:image/png" in message.content) == (media == "markdown")
        assert files_in(message.parts) == files_of(reply.message)
        deltas = [
            chunk.choices[0].delta
            for chunk in client.chat.completions.create(
                messages=ASKED, extra_body=body, stream=True, **OPTIONS
            )
            if chunk.choices
        ]
    streamed = "".join(delta.content or "" for delta in deltas)
    assert shown(streamed, served) == wanted(reply)
    if media == "markdown":
        assert streamed == message.content


def test_without_the_option_content_is_text(chat: Chat, client: openai.OpenAI) -> None:
    message = (
        client.chat.completions.create(messages=ASKED, extra_body=extra(None), **OPTIONS)
        .choices[0]
        .message
    )
    assert message.content == replied(chat, [user("one two three")], modalities=ALL).text


@pytest.mark.parametrize("media", ["markdown", "urls"])
@pytest.mark.parametrize("as_list", [True, False])
def test_what_was_shown_is_part_of_the_next_turn(
    chat: Chat, client: openai.OpenAI, media: str, as_list: bool
) -> None:
    """Sent back as text by a client that knows nothing of media: the model sees them again."""
    first = replied(chat, [user("one two three")], modalities=ALL)
    content: Any = (
        client.chat.completions.create(messages=ASKED, extra_body=extra(media), **OPTIONS)
        .choices[0]
        .message.content
    )
    if as_list:
        content = [{"type": "text", "text": content}]
    messages = [
        *ASKED,
        {"role": "assistant", "content": content},
        {"role": "user", "content": "two"},
    ]
    second = client.chat.completions.create(
        messages=messages, extra_body={"modalities": ["text"]}, **OPTIONS
    )
    parts = [part for part in first.message.parts if getattr(part, "text", None) != ""]
    history = [user("one two three"), assistant(*parts), user("two")]
    own = replied(chat, history, modalities=dict.fromkeys(ALL, "forbid"))
    assert second.choices[0].message.content == own.text
    assert second.usage
    assert second.usage.prompt_tokens == own.usage.prompt


def test_a_forgotten_file_is_one_clear_error(client: openai.OpenAI, served: Served) -> None:
    url = f"{served.url}/made/{'a' * 32}.png"
    messages = [*ASKED, {"role": "assistant", "content": f"![picture]({url})"}, *ASKED]
    with pytest.raises(openai.BadRequestError, match="kept no longer") as caught:
        client.chat.completions.create(messages=messages, **OPTIONS)
    assert caught.value.param == "messages.1.content.image_url.url"
    assert caught.value.code == "invalid_url"


def test_only_names_of_files_need_no_token(serve: Callable[..., Served]) -> None:
    served = serve(token="secret")
    path = served.service.files.add(b"data", "png")
    with served.http() as http:
        response = http.get(path)
        assert (response.status_code, response.content) == (200, b"data")
        assert response.headers["content-type"] == "image/png"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert http.head(path).status_code == 200
        assert http.post(path).status_code == 405
        assert http.get(f"/made/{'x' * 32}.png").status_code == 404
        for other in ("/made/", "/made/x.png", "/made/../v1/models", f"{path}/x", "/v1/models"):
            assert http.get(other).status_code == 401, other


def test_files_are_bounded_in_number_bytes_and_time() -> None:
    few = GeneratedFiles(ServerSettings(max_files=3))
    paths = [few.add(b"x", "png").removeprefix("/made/") for _ in range(5)]
    assert [few.get(name) is not None for name in paths] == [False, False, True, True, True]
    assert len(set(paths)) == 5
    small = GeneratedFiles(ServerSettings(max_file_bytes=10))
    names = [small.add(bytes(size), "wav").removeprefix("/made/") for size in (4, 4, 4, 100)]
    assert [small.get(name) is not None for name in names] == [False, False, False, True]
    short = GeneratedFiles(ServerSettings(retention_seconds=0.05))
    name = short.add(b"x", "mp4").removeprefix("/made/")
    assert short.get(name)
    time.sleep(0.1)
    assert short.get(name) is None
    assert short.size == 0


def test_the_media_option_is_checked(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=ASKED, extra_body=extra("html"), **OPTIONS)
    assert caught.value.param == "mmllm.media"
    with pytest.raises(ConfigError, match="parts, markdown, urls, got"):
        ServerSettings(media_format="html")  # pyright: ignore


def test_text_waits_for_a_medium_before_it() -> None:
    content = markdown.Content()
    assert content.text(0, "a ") == "a "
    content.started(1)
    assert content.text(2, "b") == ""
    content.started(3)
    assert content.medium(3, "![picture](data:1)") == ""
    assert content.text(4, "c") == ""
    assert content.medium(1, "[sound](data:2)") == (
        "\n\n[sound](data:2)\n\nb\n\n![picture](data:1)\n\nc"
    )
    assert content.text(4, "d") == "d"


@pytest.mark.parametrize(
    "parts",
    [
        ["a\n\n", ("image", "data:x"), "\n\nb"],
        [("audio", "data:x"), ("video", "http://h/made/y")],
        ["no medium [clip](it) ![cat](data:z)"],
        [""],
    ],
)
def test_text_and_media_come_back_as_they_were(parts: list) -> None:
    content, written = markdown.Content(), ""
    for place, part in enumerate(parts):
        if isinstance(part, str):
            written += content.text(place, part)
        else:
            written += content.medium(place, markdown.link(*part))
    back = [
        part if modality is None else (modality, part) for modality, part in markdown.split(written)
    ]
    assert back == [part for part in parts if part]


def test_many_unfinished_links_are_read_in_linear_time() -> None:
    text = "[clip](data:" * 1_000_000
    began = time.monotonic()
    assert "".join(part for _, part in markdown.split(text)) == text
    assert time.monotonic() - began < 10
