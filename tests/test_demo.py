"""The demo: its sessions without a browser, and the whole of it in a real one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile
from PIL import Image as PILImage
from starlette.responses import PlainTextResponse

from mmllm import media
from mmllm.conversation import Image, Video, assistant, user
from mmllm.demo import Demo
from mmllm.demo.archive import pack, unpack
from mmllm.demo.middleware import OriginMiddleware
from mmllm.demo.replying import stream_reply
from mmllm.demo.sessions import BrowserSession, SessionStore, Turn
from mmllm.demo.settings_panel import SettingsPanel
from mmllm.errors import ConfigError, MediaError
from mmllm.inference.chat import Chat
from mmllm.media import isolated
from mmllm.model import AnyToAny
from mmllm.server.listener import allowed_hosts
from tests import parts
from tests.decoders import tiny
from tests.samples import picture

ALL = {"image": "force", "audio": "force", "video": "force"}


@pytest.fixture
def sessions(tmp_path: Path) -> SessionStore:
    (tmp_path / "demo").mkdir()
    return SessionStore(tmp_path / "demo", expires=3600)


def sent(sessions: SessionStore, name: str = "cat.png", data: bytes | None = None) -> Path:
    """A file as an upload leaves it."""
    folder = sessions.root / "upload"
    folder.mkdir(exist_ok=True)
    if data is not None:
        (folder / name).write_bytes(data)
        return folder / name
    return picture(40).save(folder / name)


# --- sessions -----------------------------------------------------------------------------------


def test_a_session_is_found_by_its_secret_only(sessions: SessionStore) -> None:
    one, other = sessions.open(None), sessions.open("guessed")
    assert len({one.token, other.token, "guessed"}) == 3
    assert sessions.open(one.token) is one
    assert one.folder != other.folder
    assert sessions.open({"token": one.token}) not in (one, other)  # pyright: ignore[reportArgumentType]


def test_sessions_are_bounded_and_empty_ones_make_room(
    sessions: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmllm.demo.sessions.MAX_SESSIONS", 3)
    spoken = sessions.open(None)
    spoken.turns.append(Turn(user("hello")))
    for _ in range(10):
        sessions.open(None)
    assert sessions.open(spoken.token) is spoken
    assert len(list(sessions.root.iterdir())) == 3


def test_a_file_that_was_sent_becomes_a_medium_in_the_sessions_folder(
    sessions: SessionStore,
) -> None:
    session = sessions.open(None)
    path = sent(sessions)
    (medium, again), errors = session.take([path, path])
    assert errors == []
    assert (medium.modality, medium.source) == ("image", session.folder / "001.png")
    assert (again.modality, again.source) == ("image", session.folder / "002.png")
    (other,), _ = sessions.open(None).take([path])  # the same picture in another session
    assert np.array_equal(other.to_numpy(), picture(40).to_numpy())


@pytest.mark.parametrize(
    ("name", "kept"),
    [("a.tif", ".png"), ("a.jpg", ".jpg"), ("a.html", ".png"), ("a", ".png"), ("a.JPG", ".jpg")],
)
def test_pictures_are_kept_as_what_browsers_show(
    sessions: SessionStore, name: str, kept: str
) -> None:
    file = io.BytesIO()
    kind = "tiff" if name.endswith("tif") else "jpeg" if name.lower().endswith("jpg") else "png"
    PILImage.fromarray(picture(40).to_numpy()).save(file, kind)
    (medium,), errors = sessions.open(None).take([sent(sessions, name, file.getvalue())])
    assert errors == []
    assert isinstance(medium.source, Path)
    assert medium.source.suffix == kept
    assert np.array_equal(medium.to_numpy(), Image(file.getvalue()).to_numpy())
    assert (media.probe(medium.source).format == "PNG") == (kept == ".png")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.png", b"no picture", "neither an image, audio nor a video"),
        ("empty.wav", b"", "empty"),
        ("../../secret.png", None, "no file that was sent"),
    ],
)
def test_other_files_are_refused(
    sessions: SessionStore, name: str, data: bytes | None, said: str
) -> None:
    path = sessions.root / name if data is None else sent(sessions, name, data)
    if data is None:
        picture(40).save(path)
    taken, errors = sessions.open(None).take([sent(sessions), path, sent(sessions)])
    assert len(taken) == 2  # what is good is taken
    (error,) = errors
    assert isinstance(error, MediaError)
    assert said in str(error)


def test_a_picture_beyond_the_limits_is_refused(
    sessions: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmllm.demo.sessions.UPLOADS", media.Limits(pixels=4))
    taken, (error,) = sessions.open(None).take([sent(sessions)])
    assert taken == []
    assert "limit of 4" in str(error)


def test_unused_sessions_and_uploads_are_deleted(sessions: SessionStore) -> None:
    late, used, busy = (sessions.open(None) for _ in range(3))
    orphan = sent(sessions)
    for session in (late, busy):
        session.used -= 3601
    busy.replying.acquire()
    long_ago = time.time() - 3601
    os.utime(orphan.parent, (long_ago, long_ago))
    sessions.sweep()
    assert {path.name for path in sessions.root.iterdir()} == {used.token, busy.token}
    assert sessions.open(late.token) is not late


def spoken(chat: Chat, session: BrowserSession) -> BrowserSession:
    """A session in which a picture was sent and every kind of medium was made."""
    session.turns.append(Turn(user(picture(40), "what?")))
    session.turns[0] = Turn(user(session.keep(picture(40)), "what?"))
    list(stream_reply(chat, session, {"seed": 5, "modalities": ALL, "max_new_tokens": 3}))
    return session


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
    """(what is wrong, the file, what is said)."""
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


BAD = {what: (data, said) for what, data, said in bad_zips()}


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
    data, said = BAD[what]
    path = sent(sessions, "bad.zip", data)
    began = time.monotonic()
    with pytest.raises((ConfigError, MediaError), match=said) as caught:
        unpack(session, path)
    assert time.monotonic() - began < 30
    assert len(str(caught.value)) < 400
    assert session.turns[0].message.text == "here"
    assert [file.name for file in session.folder.iterdir()] == ["001.png"]
    assert {file.name for file in sessions.root.iterdir()} == {session.token, "upload"}
    assert sum(written) <= 2 * len(wav(60))


def test_halves_of_characters_do_not_stay(sessions: SessionStore) -> None:
    session = sessions.open(None)
    unpack(session, sent(sessions, "odd.zip", zipped(turned({"text": "a\ud800b"}, note="\udfffc"))))
    assert (session.turns[0].message.text, session.turns[0].note) == ("a?b", "?c")


def test_a_conversation_that_is_full_says_so_and_can_be_saved(
    tiny_model: AnyToAny, sessions: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = sessions.open(None)
    monkeypatch.setattr("mmllm.demo.sessions.MAX_FILES", 3)
    path = sent(sessions)
    taken, (error,) = session.take([path] * 4)
    assert len(taken) == 3
    assert "at most 3 files" in str(error)
    session.turns.append(Turn(user(*taken)))
    assert "at most 3 files" in str(session.take([path])[1][0])
    monkeypatch.setattr("mmllm.demo.sessions.MAX_TURNS", 1)
    with pytest.raises(ConfigError, match="at most 1 messages"):
        list(stream_reply(Chat(tiny_model), session, {}))
    assert not session.replying.locked()
    other = sessions.open(None)
    unpack(other, pack(session, "tiny"))
    assert [len(message.media) for message in other.conversation] == [3]


def test_the_demo_gives_what_python_gives(tiny_model: AnyToAny, sessions: SessionStore) -> None:
    options = {"seed": 5, "modalities": ALL, "max_new_tokens": 3}
    session = spoken(Chat(tiny_model, prefixes=0), sessions.open(None))
    plain = Chat(tiny_model, prefixes=0).reply([user(picture(40), "what?")], **options)
    made = session.turns[1].message
    assert made.text == plain.text
    for one, other in zip(made.media, plain.media, strict=True):
        assert np.array_equal(one.to_numpy(), other.to_numpy())


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(
    tiny_model: AnyToAny, sessions: SessionStore
) -> None:
    chat, session = Chat(tiny_model), sessions.open(None)
    session.turns.append(Turn(user("draw")))
    denoising = Steps(tiny_model, "image")
    looks = stream_reply(chat, session, {"modalities": ALL, "decoders": {"image": {"steps": 50}}})
    assert any("Drawing …" in pieces for pieces in looks)  # reads on until it is being drawn
    session.cancel.set()
    denoising.let(9)
    list(looks)
    assert not session.replying.locked()
    assert session.turns[-1].note == "stopped"
    assert session.turns[-1].message.text
    assert session.turns[-1].message.media == []

    session.turns = [Turn(user("x")), Turn(assistant("y")), Turn(user("smell"))]
    with pytest.raises(ConfigError):
        list(stream_reply(chat, session, {"modalities": {"smell": "force"}}))
    assert len(session.turns) == 3


# --- what may come in, and how it ends ----------------------------------------------------------


def test_the_clip_of_a_phone_is_taken_and_one_that_takes_too_long_is_not(
    sessions: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1080p at 60 frames a second: more than the limit when it is decoded whole."""
    frames = np.zeros((60, 1080, 1920, 3), np.uint8)
    frames[:, :, ::2] = 255
    path = Video.from_numpy(frames, fps=60).save(sessions.root / "clip.mp4")
    (clip,), errors = sessions.open(None).take([path])
    assert errors == []
    assert clip.modality == "video"
    assert clip.sample_frames(3).shape == (3, 1080, 1920, 3)

    hasty = functools.partial(isolated.sample_frames, seconds=0.01)
    monkeypatch.setattr("mmllm.media.isolated.sample_frames", hasty)
    taken, (error,) = sessions.open(None).take([path])
    assert taken == []
    assert "not decoded within 0.01 s" in str(error)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 200),
        ("GET", "/", {"host": "localhost:80"}, 200),
        ("GET", "/", {"host": "evil.example"}, 403),
        ("GET", "/", {"host": "127.0.0.1.evil.example:7860"}, 403),
        ("GET", "/", {"host": ""}, 403),
        ("GET", "/config", {"host": "evil.example"}, 403),
        ("POST", "/gradio_api/upload", {"host": "evil.example"}, 403),
        ("POST", "/gradio_api/upload", {"origin": "http://evil.example"}, 403),
        ("POST", "/gradio_api/upload", {"origin": "null"}, 403),
        ("POST", "/gradio_api/upload", {"origin": "http://127.0.0.1:1"}, 403),
        ("POST", "/gradio_api/upload", {"origin": "http://["}, 403),
        ("POST", "/gradio_api/upload", {"sec-fetch-site": "cross-site"}, 403),
        ("POST", "/gradio_api/upload", {"sec-fetch-site": "same-site"}, 403),
        ("POST", "/gradio_api/queue/join", {"origin": "http://evil.example"}, 403),
        ("OPTIONS", "/gradio_api/upload", {"origin": "http://evil.example"}, 403),
        ("GET", "/gradio_api/info", {"sec-fetch-site": "cross-site"}, 403),
        (
            "GET",
            "/",
            {
                "sec-fetch-site": "cross-site",
                "sec-fetch-mode": "navigate",
                "sec-fetch-dest": "document",
            },
            200,
        ),
        (
            "GET",
            "/",
            {
                "sec-fetch-site": "cross-site",
                "sec-fetch-mode": "navigate",
                "sec-fetch-dest": "iframe",
            },
            403,
        ),
        ("POST", "/gradio_api/upload", {"content-length": str(10**9)}, 413),
        ("POST", "/gradio_api/queue/join", {"content-length": str(2 * 10**6)}, 413),
        ("POST", "/gradio_api/upload", {"transfer-encoding": "chunked"}, 411),
        ("GET", "/gradio_api/proxy=http://example.org", {}, 403),
        ("GET", "/gradio_api/file=http://example.org/a.png", {}, 403),
        ("GET", "/gradio_api/file/http://example.org/a.png", {}, 403),
        ("POST", "/gradio_api/process_recording", {"content-length": "0"}, 403),
        ("GET", "/gradio_api/deep_link?session_hash=x", {}, 403),
    ],
)
def test_the_demo_answers_to_its_own_page_only(
    sessions: SessionStore, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    async def page(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("the page")(scope, receive, send)

    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    given = {"host": "127.0.0.1:7860", "content-length": "0", **headers}
    pairs = [(name.encode(), value.encode()) for name, value in given.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs}
    asyncio.run(OriginMiddleware(page, allowed_hosts("127.0.0.1"), sessions)(scope, receive, send))
    assert said[0]["status"] == status
    if status != 200:
        assert re.fullmatch(rb"[ -~]{10,200}", said[1]["body"])


def upload(demo: Demo, *files: bytes, **headers: str) -> tuple[int, str]:
    """Send files as the page does; (status, answer)."""
    url = urlsplit(demo.url)
    assert url.hostname
    head = b'--x\r\ncontent-disposition: form-data; name="files"; filename="a.bin"\r\n\r\n'
    body = b"".join(head + file + b"\r\n" for file in files) + b"--x--\r\n"
    kind = "multipart/form-data; boundary=x"
    headers = {"content-type": kind, "origin": demo.url.rstrip("/"), **headers}
    with contextlib.closing(HTTPConnection(url.hostname, url.port, timeout=60)) as connection:
        connection.request("POST", "/gradio_api/upload", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def stored(demo: Demo) -> set[Path]:
    """The files in the demo's folder."""
    return {path for path in demo.sessions.root.rglob("*") if path.is_file()}


def test_what_is_sent_and_not_used_is_bounded(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    own = stored(demo)  # the images of the start page
    assert upload(demo, b"x", host="evil.example")[0] == 403
    assert upload(demo, b"x", origin="http://evil.example")[0] == 403
    assert stored(demo) == own
    monkeypatch.setattr("mmllm.demo.sessions.MAX_UPLOADED", 10_000)
    for number in range(20):
        status, answer = upload(demo, bytes([number]) * 1000, bytes([number, 1]) * 500)
        assert status == 200
    time.sleep(0.5)  # the sweep follows the answer
    files = stored(demo) - own
    assert 0 < sum(path.stat().st_size for path in files) <= 10_000
    assert own <= stored(demo)
    (newest, _) = json.loads(answer)
    assert Path(newest).read_bytes() == bytes([19]) * 1000


ENDLESS = """
import sys, tempfile, types
import gradio
from mmllm.demo import Demo

with gradio.Blocks() as blocks:
    gradio.Markdown("another page, which needs no model")
page = types.ModuleType("mmllm.demo.page")
page.CSS, page.theme, page.build = "", lambda: None, lambda *_, **__: blocks
sys.modules["mmllm.demo.page"] = page
tempfile.tempdir = sys.argv[1]
with Demo(None) as demo:
    (demo.sessions.open(None).folder / "secret.txt").write_text("secret")
    print("ready", flush=True)
    demo.wait()
"""


def test_no_folder_outlives_its_demo(tmp_path: Path) -> None:
    """By Ctrl-C, by SIGTERM, by SIGHUP; and after kill -9 the next demo deletes it."""
    (tmp_path / "mmllm-demo-file").write_text("no folder")
    (tmp_path / "other").mkdir()

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=parts.heed_signals,
            cwd=Path(__file__).parent.parent,
        )

    def count() -> int:
        return sum(path.is_dir() for path in tmp_path.glob("mmllm-demo-*"))

    ends = {
        signal.SIGKILL: -signal.SIGKILL,
        signal.SIGTERM: 128 + signal.SIGTERM,
        signal.SIGHUP: 128 + signal.SIGHUP,
        signal.SIGINT: 0,
    }
    processes = {number: start() for number in ends}
    try:
        for process in processes.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        assert count() == 4
        for (number, process), left in zip(processes.items(), (4, 3, 2, 1), strict=True):
            process.send_signal(number)
            assert process.wait(60) == ends[number]
            assert count() == left  # what was killed leaves its own behind
        processes[signal.SIGTERM] = last = start()
        assert last.stdout is not None
        assert last.stdout.readline() == "ready\n"
        assert count() == 1  # its own
        last.terminate()
        assert last.wait(60) == 128 + signal.SIGTERM
    finally:
        for process in processes.values():
            process.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mmllm-demo-file", "other"]


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture
def demo(tiny_model: AnyToAny) -> Iterator[Demo]:
    with Demo(Chat(tiny_model), card="# How it was trained\nNot at all.") as demo:
        yield demo


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("seed",), "7a", "a number such as 7"),
        (("seed",), "9" * 30, "a number such as 7"),
        (("seed",), "\u00b2", "a number such as 7"),
        (("seed",), "-1", "a number such as 7"),
        (("stop",), "\n".join("abcdefghijklmnopqrs"), "19 texts to stop at"),
        (("decoders", "image", "negative_prompt"), "x" * 100_001, "100001 characters"),
        (("decoders", "image", "height"), 10**9, "width x height: expected at most"),
        (("decoders", "video", "frames"), 20_001, "frames: expected at most 500"),
        (("decoders", "video", "frames"), 10**40, "frames: expected at most 500"),
        (("decoders", "audio", "seconds"), 1e300, "seconds: expected at most 60"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_one_sentence(
    place: tuple[str, ...], value: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        SettingsPanel([], [place], None).read([value])


class Steps:
    """Denoising steps of a decoder that wait until they are let through."""

    def __init__(self, model: AnyToAny, key: str):
        self._steps = threading.Semaphore(0)
        transformer = model.decoders[key].pipeline.transformer
        forward = transformer.forward

        def held(*args: Any, **kwargs: Any) -> Any:
            assert self._steps.acquire(timeout=120)
            return forward(*args, **kwargs)

        transformer.forward = held

    def let(self, steps: int) -> None:
        self._steps.release(steps)


@pytest.fixture
def browse() -> Iterator[Callable[..., Any]]:
    """`browse(width, height)`: a new page in Debian's Chromium, where no request leaves for
    another host and no error is logged."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "no browser: apt-get install chromium"
    flags = ["--disable-gpu", "--no-first-run"]
    flags += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a camera
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    troubles: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)

        def page(width: int, height: int) -> Any:
            context = browser.new_context(viewport={"width": width, "height": height})
            context.set_default_timeout(60_000)  # milliseconds, on a busy machine
            page = context.new_page()
            page.on("request", lambda request: troubles.append(request.url))
            page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
            return page

        yield page
        browser.close()
    own = re.compile(r"(https?://127\.0\.0\.1:|data:|blob:)")
    assert [trouble for trouble in troubles if not own.match(trouble)] == []


def say(page: Any, text: str) -> None:
    page.fill("#message textarea", text)
    page.press("#message textarea", "Enter")


def answers(page: Any, count: int) -> Any:
    """Wait until there are `count` finished answers; the last one."""
    bots = page.locator("#conversation .bot.message", has_text=re.compile(r"seed \d+|stopped"))
    page.wait_for_function(
        "count => [...document.querySelectorAll('#conversation .bot.message')]"
        ".filter(e => /seed \\d+|stopped/.test(e.innerText)).length == count",
        arg=count,
    )
    return bots.last


@contextlib.contextmanager
def another_answer(page: Any, count: int) -> Iterator[None]:
    """Within it something is pressed that replaces the last of `count` answers; then wait until
    another stands there. The old one looks finished all the while; seeds tell them apart."""
    old = answers(page, count).inner_text()
    yield
    page.wait_for_function(
        "([count, old]) => { const found = [...document.querySelectorAll("
        "'#conversation .bot.message')].map(e => e.innerText);"
        " return found.length == count && found.at(-1) != old && /seed \\d+/.test(found.at(-1)) }",
        arg=[count, old],
    )


def press(page: Any, name: str) -> None:
    """One of the small buttons of the conversation."""
    page.locator(f"#conversation button[aria-label={name}]:enabled").last.click()


def set_up(page: Any, **wishes: str) -> None:
    """Choose what answers hold; then back to the chat."""
    page.get_by_role("tab", name="Settings").click()
    for modality, wish in wishes.items():
        page.locator(f"#wish-{modality}").get_by_label(wish).check()
    page.get_by_role("tab", name="Chat").click()


WAVE = "e => e.shadowRoot?.querySelector('canvas')?.width > 0"
"""That a sound was decoded and is drawn."""


def shot(page: Any, name: str) -> None:
    """Save a picture of the page where MMLLM_SHOTS says, for those who want to look."""
    if folder := os.environ.get("MMLLM_SHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


def check_accessibility(page: Any) -> None:
    """axe-core finds nothing serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    page.wait_for_timeout(300)  # milliseconds, until colours have faded in
    found = Axe().run(page).response["violations"]
    bad = [
        (entry["id"], [node["html"][:200] for node in entry["nodes"]])
        for entry in found
        if entry["impact"] in ("serious", "critical")
    ]
    assert bad == []


def test_the_whole_of_it_in_a_real_browser(
    demo: Demo, browse: Callable[..., Any], tiny_model: AnyToAny, tmp_path: Path
) -> None:
    page = browse(1100, 850)
    page.goto(demo.url)
    page.wait_for_selector("#conversation .example img")
    shot(page, "empty")
    check_accessibility(page)
    page.get_by_text("Camera, save, load").click()
    say(page, "hello")
    answers(page, 1)

    # What is no picture is told of in one sentence, and what was written stays.
    bad = tmp_path / "<b>.png"
    bad.write_bytes(b"no picture")
    page.set_input_files("#message input[type=file]", bad)
    page.wait_for_selector("#message .thumbnail-item")
    say(page, "what is that?")
    page.wait_for_selector("text=neither an image, audio nor a video")
    page.locator(".toast-close").first.click()
    page.set_input_files("#keep input[type=file]", bad.rename(tmp_path / "bad.zip"))
    page.wait_for_selector("text=File is not a zip file")
    page.locator(".toast-close").first.click()
    assert page.input_value("#message textarea") == "what is that?"
    assert page.locator("#message .thumbnail-item").count() == 0

    # A picture in; a picture, a sound and a clip out, all of which the browser can show.
    page.set_input_files("#message input[type=file]", tiny.medium("image").save(tmp_path / "a.png"))
    page.wait_for_selector("#message .thumbnail-item")
    set_up(page, image="always", audio="always", video="always")
    page.get_by_role("tab", name="Settings").click()
    page.fill("#seed textarea, #seed input", "7")
    shot(page, "settings")
    check_accessibility(page)
    page.get_by_role("tab", name="Chat").click()
    say(page, "what is this?")
    made = answers(page, 2)
    assert "seed 7" in made.inner_text()
    for selector, ready in (
        ("#conversation .user.message img", "e => e.complete && e.naturalWidth == 16"),
        ("#conversation .bot.message img", "e => e.complete && e.naturalWidth == 16"),
        ("#conversation .bot.message [data-testid^=waveform] .waveform-wrapper div", WAVE),
        ("#conversation .bot.message video", "e => e.videoWidth == 16 && !e.error"),
    ):
        page.wait_for_function(
            f"s => {{ const e = document.querySelector(s); return e && ({ready})(e) }}",
            arg=selector,
        )
    shot(page, "media")
    check_accessibility(page)

    # The page is loaded again: the conversation is there again.
    page.reload()
    answers(page, 2)
    page.wait_for_selector("#conversation .bot.message [data-testid^=waveform]")
    shot(page, "again")
    page.get_by_text("Camera, save, load").click()

    # Stopped in the midst of denoising: what was said stays, and the engine is free at once.
    denoising = Steps(tiny_model, "image")
    page.get_by_role("tab", name="Settings").click()
    page.fill("#seed textarea, #seed input", "")
    page.get_by_role("button", name="Use the last answer's seed").click()
    page.wait_for_function("document.querySelector('#seed textarea, #seed input').value == '7'")
    page.get_by_role("tab", name="Chat").click()
    set_up(page, image="always", audio="never", video="never")
    say(page, "draw")
    page.wait_for_selector("text=Drawing …")
    denoising.let(1)
    page.wait_for_selector("text=Drawing: step 1 of 2")
    shot(page, "drawing")
    page.click("#message .stop-button")
    (session,) = demo.sessions.all
    assert session.cancel.wait(120)
    denoising.let(999)
    assert "stopped" in answers(page, 3).inner_text()
    page.get_by_role("tab", name="Settings").click()
    page.fill("#seed textarea, #seed input", "")
    page.get_by_role("tab", name="Chat").click()
    say(page, "draw again")
    answers(page, 4)

    # Retry gives another answer, edit asks another question, undo puts it back.
    with another_answer(page, 4):
        press(page, "Retry")
    press(page, "Edit")
    page.fill("#conversation textarea", "draw this")
    with another_answer(page, 4):
        press(page, "Submit")
    page.wait_for_selector("#conversation >> text=draw this")
    press(page, "Undo")
    answers(page, 3)
    assert page.input_value("#message textarea") == "draw this"

    # Saved, cleared, loaded.
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save conversation").click()
    assert saved.value.suggested_filename == "conversation.zip"
    saved.value.save_as(tmp_path / "saved.zip")
    press(page, "Clear")
    page.wait_for_selector("#conversation .example")
    page.set_input_files("#keep input[type=file]", tmp_path / "saved.zip")
    answers(page, 3)
    page.get_by_role("tab", name="About").click()
    page.wait_for_selector("text=How it was trained")
    shot(page, "about")
    check_accessibility(page)

    # A picture by the camera stands beside the message that is being written.
    page.get_by_role("tab", name="Chat").click()
    page.locator("#camera").get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#camera video')?.currentTime > 0.5")
    page.locator("#camera button[aria-label='capture photo']").click()
    page.wait_for_selector("#message .thumbnail-item")
    shot(page, "camera")
    say(page, "what is this?")
    page.wait_for_function(
        "() => [...document.querySelectorAll('#conversation .user.message img')]"
        ".some(e => e.naturalWidth > 100)"
    )
    answers(page, 4)

    # On a phone, where nothing may be wider than the screen.
    phone = browse(360, 740)
    phone.goto(demo.url)
    phone.wait_for_selector("#conversation .example")
    shot(phone, "phone-empty")
    set_up(phone, image="always")
    phone.get_by_text("Play the sound of a bell.").click()
    answers(phone, 1)
    phone.wait_for_selector("#conversation .bot.message img")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    shot(phone, "phone")
