"""Files inside texts, as browsers, shells and Python's own encoders write them."""

from __future__ import annotations

import base64
import time

import pytest

from mmllm import media
from mmllm.errors import MediaError, OversizedMediaError
from mmllm.media import data_uri

DATA = bytes(range(256)) * 3 + b"?>~"
PLAIN = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "text",
    [
        f"data:image/png;base64,{PLAIN}",
        f"DATA:IMAGE/PNG;BASE64,{PLAIN}",
        f"data:;base64,{PLAIN}",
        f'data:image/svg+xml;charset=utf-8;name="a;b";base64,{PLAIN}',
        f"  data:image/png; base64 , {PLAIN}\n",
        f"data:image/png;base64,{base64.encodebytes(DATA).decode()}",
        f"data:image/png;base64,{PLAIN[:76]}\r\n{PLAIN[76:]}\r\n",
        f"data:image/png;base64,{PLAIN.rstrip('=')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(DATA).decode()}",
        f"data:image/png;base64,{PLAIN.replace('+', '%2B').replace('/', '%2f')}",
    ],
)
def test_every_way_to_write_a_data_uri_gives_the_same_bytes(text: str) -> None:
    assert data_uri.is_data_uri(text)
    assert data_uri.parse(text, "here") == DATA


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:image/png,abc", "expected data:TYPE;base64,…"),
        ("data:image/png;base64", "expected data:TYPE;base64,…"),
        (f"data:{'a' * 5000};base64,{PLAIN}", "expected data:TYPE;base64,…"),
        ("https://a.b/c.png", "expected data:TYPE;base64,…"),
        ("data:image/png;base64,", "0 bytes"),
        ("data:image/png;base64,====", "here: "),
        ("data:image/png;base64,a", "not valid base64"),
        ("data:image/png;base64,%%%", "not valid base64"),
        ("data:image/png;base64,ab!d", "not valid base64"),
        ("data:image/png;base64,abc\ud800", "not base64"),
        ("data:image/png;base64,é", "not base64"),
        ("", "expected data:TYPE;base64,…"),
    ],
)
def test_anything_else_is_one_short_error(text: str, message: str) -> None:
    with pytest.raises(MediaError, match=message) as caught:
        data_uri.parse(text, "here")
    assert str(caught.value).startswith("here: ")
    assert len(str(caught.value)) < 300


def test_the_limit_holds_before_anything_is_decoded() -> None:
    with media.limits(bytes=len(DATA)):
        assert data_uri.decode(PLAIN, "here") == DATA
    with media.limits(bytes=len(DATA) - 3), pytest.raises(OversizedMediaError, match="limit of"):
        data_uri.decode(PLAIN, "here")


@pytest.mark.parametrize("letter", ["a", ";", ";a=", " ", "data:", "%", "/"])
def test_long_texts_are_parsed_in_linear_time(letter: str) -> None:
    """What a backtracking pattern needed minutes for."""
    began = time.perf_counter()
    for text in (f"data:{letter * 1_000_000}", f"data:;base64,{letter * 1_000_000}!"):
        with pytest.raises(MediaError):
            data_uri.parse(text, "here")
    assert time.perf_counter() - began < 5


def test_base64_is_distinguished_from_a_name() -> None:
    assert data_uri.looks_like_base64(PLAIN)
    assert data_uri.looks_like_base64("/9j/" + PLAIN)
    assert data_uri.looks_like_base64(base64.encodebytes(DATA).decode())
    assert not data_uri.looks_like_base64("images/000000000139.jpg")
    assert not data_uri.looks_like_base64("a" * 300 + ".png")
