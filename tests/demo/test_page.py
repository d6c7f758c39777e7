"""The whole page in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmllm.demo import Demo
from mmllm.model import AnyToAny
from tests.decoders import tiny
from tests.demo.browser import (
    another_answer,
    answers,
    check_accessibility,
    press,
    say,
    set_up,
    shot,
)
from tests.demo.samples import Steps

WAVE = "e => e.shadowRoot?.querySelector('canvas')?.width > 0"
"""That a sound was decoded and is drawn."""


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
