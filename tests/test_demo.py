"""The demo: its sessions without a browser, and the whole of it in a real one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmllm import media
from mmllm.chat import Chat
from mmllm.conversation import assistant, user
from mmllm.demo import Demo
from mmllm.demo.answering import answer
from mmllm.demo.rooms import Room, Rooms, Turn
from mmllm.errors import ConfigError, MediaError
from mmllm.model import AnyToAny
from tests.decoders import tiny
from tests.test_rendering import picture

ALL = {"image": "force", "audio": "force", "video": "force"}


@pytest.fixture
def rooms(tmp_path: Path) -> Rooms:
    (tmp_path / "demo").mkdir()
    return Rooms(tmp_path / "demo", expires=3600)


def sent(rooms: Rooms, name: str = "cat.png", data: bytes | None = None) -> Path:
    """A file as an upload leaves it."""
    folder = rooms.root / "upload"
    folder.mkdir(exist_ok=True)
    if data is not None:
        (folder / name).write_bytes(data)
        return folder / name
    return picture(40).save(folder / name)


# --- sessions -----------------------------------------------------------------------------------


def test_a_session_is_found_by_its_secret_only(rooms: Rooms) -> None:
    one, other = rooms.open(None), rooms.open("guessed")
    assert len({one.token, other.token, "guessed"}) == 3
    assert rooms.open(one.token) is one
    assert one.folder != other.folder


def test_a_file_that_was_sent_becomes_a_medium_in_the_sessions_folder(rooms: Rooms) -> None:
    room = rooms.open(None)
    path = sent(rooms)
    medium = room.take(path)
    assert (medium.modality, medium.source) == ("image", room.folder / "001.png")
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.png", b"no picture", "neither a picture, a sound nor a clip"),
        ("empty.wav", b"", "empty"),
        ("../../secret.png", None, "no file that was sent"),
    ],
)
def test_other_files_are_refused(rooms: Rooms, name: str, data: bytes | None, said: str) -> None:
    path = rooms.root / name if data is None else sent(rooms, name, data)
    if data is None:
        picture(40).save(path)
    with pytest.raises(MediaError, match=said):
        rooms.open(None).take(path)


def test_a_picture_beyond_the_limits_is_refused(
    rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmllm.demo.rooms.UPLOADS", media.Limits(pixels=4))
    with pytest.raises(MediaError, match="limit of 4"):
        rooms.open(None).take(sent(rooms))


def test_unused_sessions_and_uploads_are_deleted(rooms: Rooms) -> None:
    late, used, busy = (rooms.open(None) for _ in range(3))
    orphan = sent(rooms)
    for room in (late, busy):
        room.used -= 3601
    busy.answering.acquire()
    long_ago = time.time() - 3601
    os.utime(orphan.parent, (long_ago, long_ago))
    rooms.sweep()
    assert {path.name for path in rooms.root.iterdir()} == {used.token, busy.token}
    assert rooms.open(late.token) is not late


def spoken(chat: Chat, room: Room) -> Room:
    """A room in which a picture was sent and every kind of medium was made."""
    room.turns.append(Turn(user(picture(40), "what?")))
    room.turns[0] = Turn(user(room.keep(picture(40)), "what?"))
    list(answer(chat, room, {"seed": 5, "modalities": ALL, "max_new_tokens": 3}))
    return room


def test_a_conversation_survives_its_zip(tiny_model: AnyToAny, rooms: Rooms) -> None:
    room = spoken(Chat(tiny_model), rooms.open(None))
    path = shutil.copy(room.pack("tiny"), rooms.root / "saved.zip")
    other = rooms.open(None)
    other.unpack(path)
    assert [turn.message.role for turn in other.turns] == ["user", "assistant"]
    assert (other.turns[1].seed, other.turns[1].note) == (5, room.turns[1].note)
    for one, two in zip(room.conversation, other.conversation, strict=True):
        assert one.text == two.text
        assert [m.modality for m in one.media] == [m.modality for m in two.media]
        for saved, loaded in zip(one.media, two.media, strict=True):
            assert isinstance(saved.source, Path)
            assert isinstance(loaded.source, Path)
            assert loaded.source.parent == other.folder
            assert saved.source.read_bytes() == loaded.source.read_bytes()
    assert media.read_provenance(other.turns[1].message.media[0].source)["seed"] == 5  # pyright: ignore


GOOD = {"format": 1, "model": "x", "turns": []}


@pytest.mark.parametrize(
    ("index", "files", "said"),
    [
        (None, {}, "no conversation"),
        ("{", {}, "no conversation"),
        ({**GOOD, "format": 9}, {}, "format 9 is not known"),
        ([{"image": "../a.png"}], {"../a.png": b"x"}, "unknown part"),
        ([{"image": "001.png"}], {}, "no conversation"),
        ([{"image": "001.png"}], {"001.png": b"x"}, "neither a picture"),
        ([{"smell": "001.png"}], {"001.png": b"x"}, "unknown part"),
        ([{"text": "x"}], {f"{n:04}.png": b"" for n in range(501)}, "too large"),
    ],
)
def test_a_bad_zip_is_refused_and_the_conversation_stays(
    rooms: Rooms, tmp_path: Path, index: Any, files: dict[str, bytes], said: str
) -> None:
    room = rooms.open(None)
    room.turns.append(Turn(user(room.keep(picture(40)), "here")))
    if isinstance(index, list):
        index = {**GOOD, "turns": [{"role": "user", "parts": index, "seed": None, "note": ""}]}
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        if index is not None:
            text = index if isinstance(index, str) else json.dumps(index)
            archive.writestr("conversation.json", text)
        for name, data in files.items():
            archive.writestr(name, data)
    with pytest.raises((ConfigError, MediaError), match=said):
        room.unpack(path)
    assert room.turns[0].message.text == "here"
    assert [path.name for path in room.folder.iterdir()] == ["001.png"]
    path.write_bytes(b"no zip")
    with pytest.raises(ConfigError, match="no conversation"):
        room.unpack(path)


def test_the_demo_gives_what_python_gives(tiny_model: AnyToAny, rooms: Rooms) -> None:
    options = {"seed": 5, "modalities": ALL, "max_new_tokens": 3}
    room = spoken(Chat(tiny_model, prefixes=0), rooms.open(None))
    plain = Chat(tiny_model, prefixes=0).reply([user(picture(40), "what?")], **options)
    made = room.turns[1].message
    assert made.text == plain.text
    for one, other in zip(made.media, plain.media, strict=True):
        assert np.array_equal(one.to_numpy(), other.to_numpy())


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(
    tiny_model: AnyToAny, rooms: Rooms
) -> None:
    chat, room = Chat(tiny_model), rooms.open(None)
    room.turns.append(Turn(user("draw")))
    denoising = Gate(tiny_model, "image")
    looks = answer(chat, room, {"modalities": ALL, "decoders": {"image": {"steps": 50}}})
    assert any("Drawing …" in pieces for pieces in looks)  # reads on until it is being drawn
    room.cancel.set()
    denoising.let(9)
    list(looks)
    assert not room.answering.locked()
    assert room.turns[-1].note == "stopped"
    assert room.turns[-1].message.text
    assert room.turns[-1].message.media == []

    room.turns = [Turn(user("x")), Turn(assistant("y")), Turn(user("smell"))]
    with pytest.raises(ConfigError):
        list(answer(chat, room, {"modalities": {"smell": "force"}}))
    assert len(room.turns) == 3


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture
def demo(tiny_model: AnyToAny) -> Iterator[Demo]:
    with Demo(Chat(tiny_model), card="# How it was trained\nNot at all.") as demo:
        yield demo


class Gate:
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


def test_the_whole_of_it_in_a_real_browser(
    demo: Demo, browse: Callable[..., Any], tiny_model: AnyToAny, tmp_path: Path
) -> None:
    page = browse(1100, 850)
    page.goto(demo.url)
    shot(page, "empty")
    say(page, "hello")
    answers(page, 1)

    # A picture in; a picture, a sound and a clip out, all of which the browser can show.
    page.set_input_files("#message input[type=file]", tiny.medium("image").save(tmp_path / "a.png"))
    page.wait_for_selector("#message .thumbnail-item")
    set_up(page, image="always", audio="always", video="always")
    page.get_by_role("tab", name="Settings").click()
    page.fill("#seed textarea, #seed input", "7")
    shot(page, "settings")
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

    # The page is loaded again: the conversation is there again.
    page.reload()
    answers(page, 2)
    page.wait_for_selector("#conversation .bot.message [data-testid^=waveform]")
    shot(page, "again")

    # Stopped in the midst of denoising: what was said stays, and the engine is free at once.
    denoising = Gate(tiny_model, "image")
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
    (room,) = demo.rooms._rooms.values()
    assert room.cancel.wait(120)
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

    # A picture by the camera stands beside the message that is being written.
    page.get_by_role("tab", name="Chat").click()
    page.get_by_text("Camera").click()
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
