"""A picture in and a picture out by other clients than OpenAI's own.

LangChain is run. The others do not install with our pins (LlamaIndex and the Agents SDK refuse
openai 3, litellm needs older releases of two of them; Open WebUI is an application): their requests
were recorded from the clients' real runs, or written from their source, and are sent here. What the
client then shows is looked for where it looks.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image as PILImage

from tests.server.conftest import Served
from tests.server.files import IMAGE, PNG, WAV

URI = IMAGE["image_url"]["url"]
RECORDED = json.loads((Path(__file__).parent / "client_requests.json").read_text("utf-8"))
SHOWN = [{"type": "text", "text": "what"}, {"type": "image_url", "image_url": {"url": URI}}]


def is_picture(data: bytes) -> bool:
    return PILImage.open(io.BytesIO(data)).size[0] > 0


def events(response: httpx2.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def pictures(response: httpx2.Response, recorded: dict[str, Any], http: httpx2.Client) -> list:
    """The files that the client shows."""
    path, stream = recorded["path"], recorded["body"].get("stream")
    if path == "/v1/images/generations":
        return [base64.b64decode(entry["b64_json"]) for entry in response.json()["data"]]
    if path == "/v1/responses":
        body = events(response)[-1]["response"] if stream else response.json()
        calls = [item for item in body["output"] if item["type"] == "image_generation_call"]
        return [base64.b64decode(call["result"]) for call in calls]
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in events(response) if chunk["choices"]]
        content = "".join(delta.get("content") or "" for delta in deltas)
    else:
        message = response.json()["choices"][0]["message"]
        if recorded.get("shows") == "images":
            uris = [image["image_url"]["url"] for image in message["images"]]
            return [base64.b64decode(uri.partition(",")[2]) for uri in uris]
        content = message["content"]
    return [http.get(url).content for url in re.findall(r"!\[picture\]\((http[^)]+)\)", content)]


@pytest.mark.parametrize("recorded", RECORDED, ids=[entry["client"] for entry in RECORDED])
def test_recorded_requests_show_a_picture(
    served: Served, serve: Callable[..., Served], recorded: dict[str, Any]
) -> None:
    server = serve(**recorded["server"]) if "server" in recorded else served
    body = json.loads(json.dumps(recorded["body"]).replace("IMAGE", URI))
    with server.http() as http:
        response = http.post(recorded["path"], json=body)
        assert response.status_code == 200, response.text
        found = pictures(response, recorded, http)
    assert found
    assert all(map(is_picture, found))


def test_open_webui_hears_speaks_and_edits(serve: Callable[..., Served]) -> None:
    """Its other requests (routers/audio.py, routers/images.py), with the models it names."""
    with serve(lenient=True).http() as http:
        transcription = http.post(
            "/v1/audio/transcriptions",
            files={"file": ("speech.wav", WAV, "audio/wav")},
            data={"model": "whisper-1", "language": "en"},
        )
        assert transcription.status_code == 200, transcription.text
        assert "text" in transcription.json()
        spoken = http.post(
            "/v1/audio/speech", json={"model": "tts-1", "input": "rain", "voice": "alloy"}
        )
        assert spoken.status_code == 200, spoken.text
        edited = http.post(
            "/v1/images/edits",
            files={"image": ("image.png", PNG, "image/png")},
            data={
                "model": "gpt-image-1",
                "prompt": "one",
                "n": "1",
                "size": "512x512",
                "response_format": "b64_json",
            },
        )
        assert edited.status_code == 200, edited.text
        assert is_picture(base64.b64decode(edited.json()["data"][0]["b64_json"]))


@pytest.mark.parametrize("stream", [True, False])
def test_langchain_chat(served: Served, stream: bool) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    model: Any = ChatOpenAI(
        base_url=f"{served.url}/v1",
        api_key="none",  # pyright: ignore[reportArgumentType]
        model="tiny",
        max_tokens=8,  # pyright: ignore[reportCallIssue]
        extra_body={"modalities": {"image": "force"}, "mmllm": {"media": "markdown"}},
    )
    asked = [HumanMessage(content=SHOWN)]  # pyright: ignore[reportArgumentType]
    if stream:
        content = "".join(chunk.content for chunk in model.stream(asked))
    else:
        content = model.invoke(asked).content
    (data,) = re.findall(r"!\[picture\]\(data:image/png;base64,([^)]+)\)", content)
    assert is_picture(base64.b64decode(data))


@pytest.mark.parametrize("stream", [True, False])
def test_langchain_responses(served: Served, stream: bool) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    model: Any = ChatOpenAI(
        base_url=f"{served.url}/v1",
        api_key="none",  # pyright: ignore[reportArgumentType]
        model="tiny",
        max_tokens=16,  # pyright: ignore[reportCallIssue]
        use_responses_api=True,
        output_version="responses/v1",
        extra_body={"modalities": {"image": "force"}},
    )
    asked = [HumanMessage(content=SHOWN)]  # pyright: ignore[reportArgumentType]
    message = model.invoke(asked)
    if stream:
        first, *rest = model.stream(asked)
        message = sum(rest, first)
    calls = [block for block in message.content if block["type"] == "image_generation_call"]
    assert any(is_picture(base64.b64decode(call["result"])) for call in calls if call.get("result"))
