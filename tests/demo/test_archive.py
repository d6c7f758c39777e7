"""Conversations saved as a zip and loaded again, and zips that lie."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image as PILImage

from mmllm import media
from mmllm.conversation import user
from mmllm.demo.archive import pack, unpack
from mmllm.demo.sessions import SessionStore, Turn
from mmllm.errors import ConfigError, MediaError
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny
from tests.demo.samples import sent, spoken
from tests.samples import picture


def turned(*parts: Any, **fields: Any) -> dict[str, Any]:
    """An index with one message."""
    turn = {"role": "user", "parts": list(parts), "seed": None, "note": "", **fields}
    return {"format": 1, "model": "x", "turns": [turn]}


def zipped(index: Any = None, /, **files: bytes) -> bytes:
    """A zip with an index (an object, or bytes) and files, `_png` standing for `.png`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        if index is not None:
            text = index if isinstance(index, bytes) else json.dumps(index).encode()
            archive.writestr("conversation.json", text)
        for name, data in files.items():
            archive.writestr(name.replace("_", ".").removeprefix("n"), data)
    return file.getvalue()


def with_entry(change: Callable[[zipfile.ZipInfo], None], data: bytes = b"x") -> bytes:
    """A zip whose second entry, 001.png, was changed before it was written."""
    file = io.BytesIO()
    info = zipfile.ZipInfo("001.png")
    change(info)
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        archive.writestr("conversation.json", json.dumps(turned({"image": "001.png"})))
        archive.writestr(info, data)
    return file.getvalue()


def named(name: str) -> bytes:
    return with_entry(lambda info: setattr(info, "filename", name))


def patched(data: bytes, where: bytes, offset: int, value: bytes) -> bytes:
    """`data` with `value` written `offset` bytes after the last `where`."""
    at = data.rindex(where) + offset
    return data[:at] + value + data[at + len(value) :]


def png(pixels: int = 4) -> bytes:
    file = io.BytesIO()
    PILImage.new("RGB", (pixels, pixels)).save(file, "png")
    return file.getvalue()


def wav(seconds: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros((48_000 * seconds, 2), np.int16), 48_000, format="WAV")
    return file.getvalue()


def bad_zips() -> Iterator[tuple[str, bytes, str]]:
    """(what is wrong, the file, the error message)."""
    listing, local = b"PK\1\2", b"PK\3\4"
    part = {"image": "001.png"}
    whole = zipped(turned(part), n001_png=png())
    yield "empty", b"", "not a zip"
    yield "no zip", b"hello", "not a zip"
    yield "cut", whole[:-60], "not a zip"
    yield "cut in front", whole[40:], "is damaged"
    yield "no files", zipped(), "no conversation.json"
    yield "no index", zipped(n001_png=png()), "no conversation.json"
    yield "no JSON", zipped(b"{"), "Expecting"
    yield "no text", zipped(b'{"a": "\xff"}'), "decode"
    yield "nested deeply", zipped(b"[" * 200_000), "recursion"
    yield "a long number", zipped(b"[" + b"9" * 10_000 + b"]"), "digits"
    for value in (None, [], 3, "x", {}, {"format": True}, {"format": [1]}):
        yield f"index {value}", zipped(json.dumps(value).encode()), "expected 'format'"
    yield "another format", zipped({"format": 9, "turns": []}), "format 9 is not known"
    for value in (None, {}, "x", 3):
        yield f"turns {value}", zipped({"format": 1, "turns": value}), "expected 'turns'"
    for value in (None, [], "x"):
        yield f"turn {value}", zipped({"format": 1, "turns": [value]}), "expected 'role'"
    yield "many turns", zipped({"format": 1, "turns": [None] * 300_000}), "300000 messages"
    for value in ("system", "", "\ud800"):
        yield f"role {value!a}", zipped(turned(role=value)), "unknown role"
    yield "no parts", zipped(turned(parts=None)), "expected 'parts'"
    yield "many parts", zipped(turned(*[{"text": ""}] * 300_000)), "more than 2000 parts"
    for value in (True, -1, 2**70, "7", 1.5, [1]):
        yield f"seed {value}", zipped(turned(seed=value)), "unknown seed"
    yield "a note", zipped(turned(note=["x"])), "expected 'note'"
    for value in ({}, None, 3, "x", [], {**part, "text": ""}, {"smell": "001.png"}, {"image": 1}):
        yield f"part {value}", zipped(turned(value), n001_png=png()), "unknown part"
    yield "a long text", zipped(turned({"text": "x" * 100_001})), "100001 characters"
    yield "a file less", zipped(turned(part)), "'001.png' is not in this file"
    yield "its own index", zipped(turned({"image": "conversation.json"})), "is not in this file"
    sixty = zipped(turned(*[{"audio": "001.wav"}] * 60), n001_wav=wav(60))
    yield "a sound sixty times", sixty, "named by several parts"
    yield "many files", zipped(turned(), **{f"n{n:06}_png": b"" for n in range(600)}), "too large"
    many = zipped(turned(), **{f"n{n:06}_png": b"" for n in range(9_000)})
    yield "very many files", many, "more than 500 files"
    yield "an index of 60 MB", zipped(b"[" + b" " * 60_000_000), "'conversation.json' is too large"
    bomb = zipped(turned(part), n001_png=b"\0" * 2**26)
    yield "a bomb", bomb, "'001.png' is too large"
    bombs = {f"n{n:03}_png": b"\0" * 2**24 for n in range(6)}
    yield "many bombs", zipped(turned(), **bombs), "too large: 7 files, 96 MiB"
    yield "no picture", zipped(turned(part), n001_png=b"x"), "neither an image"
    yield "half a picture", zipped(turned(part), n001_png=png(64)[:-40]), "damaged"
    yield "a picture of another kind", zipped(turned({"audio": "001.png"}), n001_png=png()), "image"
    yield "another, by its name", zipped(turned({"audio": "001.wav"}), n001_wav=png()), "image"
    for name in (
        "../001.png",
        "/001.png",
        "C:\\001.png",
        "x/001.png",
        "001.png/",
        "a\nb",
        "__MACOSX",
    ):
        yield f"the name {name!a}", named(name), "unknown file"
    yield "a name twice", named("conversation.json"), "'conversation.json' twice"
    link = with_entry(lambda info: setattr(info, "external_attr", 0o120777 << 16), b"/etc/passwd")
    yield "a link", link, "no plain file"
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        packed = with_entry(lambda info, kind=kind: setattr(info, "compress_type", kind))
        yield f"compression {kind}", packed, "unknown way"
    yield "unknown compression", patched(whole, listing, 10, b"\x63\0"), "unknown way"
    yield "encrypted", patched(whole, listing, 8, b"\1"), "is encrypted"
    yield "encrypted index", patched(zipped(turned()), listing, 8, b"\1"), "is encrypted"
    yield "broken deflate", patched(whole, local, 37, b"\xff" * 20), "decompressing|invalid"
    yield "a wrong sum", patched(whole, listing, 16, b"\0\0\0\0"), "CRC"
    yield "a smaller size", patched(whole, listing, 24, b"\5"), "CRC|damaged|neither|picture"
    yield "a larger size", patched(whole, listing, 24, b"\xff\xff\xff\x01"), "not whole"
    yield "an immense size", patched(whole, listing, 24, b"\xfe\xff\xff\xff"), "too large"
    yield "less compressed", patched(whole, listing, 20, b"\5"), "EOF|damaged|CRC|picture"
    yield "a wrong place", patched(whole, listing, 42, b"\7\7"), "magic|offset|header|Overlap"
    yield "a far place", patched(whole, listing, 42, b"\7\7\7\7"), "magic|offset|header|Truncated"
    yield "a long list", patched(whole, b"PK\5\6", 12, b"\xff\xff\xff\x0f"), "not a zip|Bad"
    yield "another zip in it", zipped(turned(part), n001_png=whole), "neither an image"


BAD = {what: (data, message) for what, data, message in bad_zips()}


def test_a_conversation_survives_its_zip(tiny_model: AnyToAny, sessions: SessionStore) -> None:
    session = spoken(Chat(tiny_model), sessions.open(None))
    path = shutil.copy(pack(session, "tiny"), sessions.root / "saved.zip")
    other = sessions.open(None)
    unpack(other, path)
    assert [turn.message.role for turn in other.turns] == ["user", "assistant"]
    assert (other.turns[1].seed, other.turns[1].note) == (5, session.turns[1].note)
    for one, two in zip(session.conversation, other.conversation, strict=True):
        assert one.text == two.text
        assert [m.modality for m in one.media] == [m.modality for m in two.media]
        for saved, loaded in zip(one.media, two.media, strict=True):
            assert isinstance(saved.source, Path)
            assert isinstance(loaded.source, Path)
            assert loaded.source.parent == other.folder
            assert saved.source.read_bytes() == loaded.source.read_bytes()
    assert media.read_provenance(other.turns[1].message.media[0].source)["seed"] == 5  # pyright: ignore


@pytest.mark.parametrize("what", BAD)
def test_a_bad_zip_is_refused_and_nothing_is_left_of_it(
    sessions: SessionStore, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    written: list[int] = []

    class Draft(tempfile.TemporaryDirectory[str]):
        def cleanup(self) -> None:
            written.append(sum(file.stat().st_size for file in Path(self.name).rglob("*")))
            super().cleanup()

    monkeypatch.setattr("mmllm.demo.archive.tempfile.TemporaryDirectory", Draft)
    session = sessions.open(None)
    session.turns.append(Turn(user(session.keep(picture(40)), "here")))
    data, message = BAD[what]
    path = sent(sessions, "bad.zip", data)
    began = time.monotonic()
    with pytest.raises((ConfigError, MediaError), match=message) as caught:
        unpack(session, path)
    assert time.monotonic() - began < 30
    assert len(str(caught.value)) < 400
    assert session.turns[0].message.text == "here"
    assert [file.name for file in session.folder.iterdir()] == ["001.png"]
    assert {file.name for file in sessions.root.iterdir()} == {session.token, "upload"}
    assert sum(written) <= 2 * len(wav(60))


def test_lone_surrogates_are_removed(sessions: SessionStore) -> None:
    session = sessions.open(None)
    unpack(session, sent(sessions, "odd.zip", zipped(turned({"text": "a\ud800b"}, note="\udfffc"))))
    assert (session.turns[0].message.text, session.turns[0].note) == ("a?b", "?c")
