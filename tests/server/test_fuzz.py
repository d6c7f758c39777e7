"""Requests at random: none causes a server error, and the server works afterwards."""

from __future__ import annotations

import asyncio
import base64
import copy
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi import checks

from mmllm.inference.chat import Chat
from mmllm.server.app import build_app
from mmllm.server.settings import ServerSettings
from tests.server.conftest import Served, running
from tests.server.files import AUDIO, IMAGE, MP4, PNG, TEXT, VIDEO, WAV, data_uri

SMALL = ServerSettings(
    max_tokens=4, max_steps=3, max_output_media=1, max_output_pixels=4096, max_output_frames=9
)
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
VALID = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [TEXT, IMAGE, AUDIO, VIDEO]},
        {"role": "assistant", "content": "one", "images": [IMAGE], "parts": None},
        {"role": "user", "content": "two"},
    ],
    "modalities": {"image": "auto"},
    "decoders": {"image": {"steps": 2}},
    "temperature": 1.0,
    "max_tokens": 2,
    "stop": ["x"],
    "seed": 1,
}
ODD: list[Any] = [
    None, True, -1, 0, 2**70, 1e300, 0.5, "", "x", "\0", "💥" * 50, [], [[]], {}, {"a": {"b": []}},
]  # fmt: skip


@pytest.fixture(scope="module")
def small(chat: Chat) -> Iterator[Served]:
    """A server that does little work for each request."""
    with running(build_app(chat, SMALL)) as server:
        yield server


@pytest.fixture(scope="module")
def document(small: Served) -> Any:
    return schemathesis.openapi.from_url(f"{small.url}/openapi.json")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_the_server_keeps_to_its_openapi_document(
    document: Any, mode: schemathesis.GenerationMode
) -> None:
    """Requests that the document allows, and requests that it does not."""
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) == 15
    for operation in operations:
        if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing could be wrong

        @hypothesis.settings(
            max_examples=15,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def validate(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS)

        validate()


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a JSON tree."""
    if path:
        yield path
    if isinstance(tree, dict | list):
        keys = tree if isinstance(tree, dict) else range(len(tree))
        for key in keys:
            yield from places(tree[key], (*path, key))


def mutated(tree: Any, draw: random.Random) -> Any:
    """A copy in which one to three values are missing, of another type, or under another name."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        *above, last = draw.choice(list(places(tree)))
        inside = tree
        for key in above:
            inside = inside[key]
        deed = draw.choice(["drop", "odd", "odd", "name", "cut"])
        if deed == "drop":
            del inside[last]
        elif deed == "name" and isinstance(inside, dict):
            inside[draw.choice(["x", "type", "url", "content"])] = inside.pop(last)
        elif deed == "cut" and isinstance(inside[last], str):
            inside[last] = inside[last][: draw.randrange(len(inside[last]) + 1)]
        else:
            inside[last] = copy.deepcopy(draw.choice(ODD))
    return tree


def answered_well(response: httpx2.Response) -> bool:
    """Check that the response is 200, or an error of the API with a message."""
    if response.status_code == 200:
        return True
    error = response.json()["error"]
    return 400 <= response.status_code < 500 and len(error["message"]) > 10


def test_mutated_requests(small: Served) -> None:
    draw = random.Random(0)
    with closing(small.http()) as http:
        before = http.post("/v1/chat/completions", json=VALID).json()
        assert "choices" in before
        statuses = []
        for _ in range(150):
            body = mutated(VALID, draw)
            response = http.post("/v1/chat/completions", json=body)
            assert answered_well(response), f"{json.dumps(body)[:600]}: {response.text}"
            statuses.append(response.status_code)
        assert statuses.count(400) > 75
        assert http.post("/v1/chat/completions", json=VALID).json()["choices"] == before["choices"]


def test_broken_files(small: Served) -> None:
    """Bytes turned, cut off and doubled: seen as they are, or refused."""
    draw = random.Random(0)
    kinds = [("image_url", PNG), ("video_url", MP4), ("input_audio", WAV)]
    with closing(small.http()) as http:
        for number in range(90):
            kind, whole = kinds[number % 3]
            data = bytearray(whole)
            for _ in range(draw.randint(1, 8)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            if draw.random() < 0.3:
                data = data[: draw.randrange(len(data))]
            inside: dict[str, Any] = {"url": data_uri(bytes(data), "any/thing")}
            if kind == "input_audio":
                inside = {"data": base64.b64encode(data).decode()}
            part = {"type": kind, kind: inside}
            body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
            response = http.post("/v1/chat/completions", json=body)
            assert answered_well(response), f"{kind} {bytes(data)!r}: {response.text}"
        assert http.post("/v1/chat/completions", json=VALID).status_code == 200


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """benchmarks/fuzz_server.py, of which this is a small part."""
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz_server.py"
    spec = importlib.util.spec_from_file_location("fuzz_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_server"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_first_requests_of_the_benchmark(small: Served, fuzz: ModuleType) -> None:
    """Over all routes, by raw connections; none is the server's fault, each is answered in time."""
    answers: list[Any] = []
    port = int(small.url.rpartition(":")[2])
    asked = fuzz.requests(0, 200)
    asyncio.run(fuzz.sent("127.0.0.1", port, asked, 4, answers.append))
    assert len(answers) == 200
    assert {answer.asked.kind for answer in answers} >= {"structure", "options", "media", "headers"}
    bad = [
        (answer.asked.kind, answer.status, b"".join(answer.asked.data)[:600], answer.body[:600])
        for answer in answers
        if answer.status >= 500
        or b'"internal_error"' in answer.body
        or (answer.status == 0 and answer.asked.whole)
    ]
    assert bad == []
    statuses = [answer.status for answer in answers]
    assert statuses.count(200) > 10
    assert statuses.count(400) > 50
    with closing(small.http()) as http:
        assert http.post("/v1/chat/completions", json=VALID).status_code == 200


def test_faults_are_seen(fuzz: ModuleType) -> None:
    """The benchmark itself finds the faults that it looks for."""
    asked = fuzz.Asked("x", [b""])
    assert fuzz.faults(fuzz.Answer(asked, 400, 0.1, b"{}")) == []
    assert fuzz.faults(fuzz.Answer(asked, 500, 0.1, b"")) == ["status 500"]
    assert fuzz.faults(fuzz.Answer(asked, 200, 6.0, b"")) == ["6.0 s"]
    assert fuzz.faults(fuzz.Answer(asked, 0, 0.1, b"")) == ["no answer"]
    assert fuzz.faults(fuzz.Answer(fuzz.Asked("x", [b""], whole=False), 0, 0.1, b"")) == []
