"""The whole page in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmllm.conversation import assistant, user
from mmllm.demo import Demo
from mmllm.demo.sessions import Turn
from mmllm.model import AnyToAny
from tests.decoders import tiny
from tests.demo.browser import (
    another_answer,
    answers,
    check_accessibility,
    choose,
    press,
    say,
    set_up,
    shot,
    shown,
)
from tests.demo.samples import Steps

WAVE = "e => e.shadowRoot?.querySelector('canvas')?.width > 0"
"""That a sound was decoded and is drawn."""


def test_the_whole_page_in_a_real_browser(
    demo: Demo, browse: Callable[..., Any], tiny_model: AnyToAny, tmp_path: Path
) -> None:
    page = browse(1100, 850)
    page.goto(demo.url)
    page.wait_for_selector("#conversation .example img")
    shot(page, "empty")
    check_accessibility(page)
    say(page, "hello")
    answers(page, 1)

    # A file that is no picture is reported in one sentence, and the text of the message stays.
    bad = tmp_path / "<b>.png"
    bad.write_bytes(b"no picture")
    page.set_input_files("#message input[type=file]", bad)
    page.wait_for_selector("#message .thumbnail-item")
    say(page, "what is that?")
    page.wait_for_selector("text=neither an image, audio nor a video")
    page.locator(".toast-close").first.click()
    page.set_input_files("#more-menu input[type=file]", bad.rename(tmp_path / "bad.zip"))
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

    # Stopped while denoising: the text so far stays, and the engine is free at once.
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
        choose(page, "More", "Save conversation")
    assert saved.value.suggested_filename == "conversation.zip"
    saved.value.save_as(tmp_path / "saved.zip")
    page.once("dialog", lambda dialog: dialog.dismiss())
    choose(page, "More", "Clear conversation")  # not meant
    page.wait_for_timeout(500)
    assert page.locator("#conversation .bot.message").count() == 3
    page.once("dialog", lambda dialog: dialog.accept())
    choose(page, "More", "Clear conversation")
    page.wait_for_selector("#conversation .example")
    page.set_input_files("#more-menu input[type=file]", tmp_path / "saved.zip")
    answers(page, 3)
    page.get_by_role("tab", name="About").click()
    page.wait_for_selector("text=How it was trained")
    shot(page, "about")
    check_accessibility(page)

    # A picture from the camera is shown next to the message that is being written.
    page.get_by_role("tab", name="Chat").click()
    choose(page, "Attach", "Camera")
    page.locator("#camera").get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#camera video')?.currentTime > 0.5")
    page.locator("#camera button[aria-label='capture photo']").click()
    page.wait_for_selector("#message .thumbnail-item")
    shot(page, "camera")
    page.keyboard.press("Escape")
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
    for control in ("Attach", "Submit", "More"):  # nothing that is needed is below the fold
        place = phone.get_by_role("button", name=control, exact=True).bounding_box()
        assert place["y"] + place["height"] <= 740
    assert phone.evaluate("document.documentElement.scrollHeight") <= 740
    set_up(phone, image="always")
    phone.locator("#conversation .example", has_text="Play the sound of a bell.").click()
    answers(phone, 1)
    phone.wait_for_selector("#conversation .bot.message img")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    shot(phone, "phone")


CODE = """def f(x):
    if x < 3:
        return "<b>"
"""
REPLY = f"""Two lines
  and **no** <b>HTML</b>, ![a cat](http://elsewhere.example/cat.png)

```python
{CODE}```
"""


def test_replies_are_markdown_and_what_was_written_stays_as_it_was(
    demo: Demo, browse: Callable[..., Any]
) -> None:
    page = browse(1280, 800)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    shown(demo, page, Turn(user(f"# {REPLY}")), Turn(assistant(REPLY), 7, "1.0 s"))
    assert page.inner_text("#conversation .user.message .chatbot") == f"# {REPLY}".strip()
    answer = page.locator("#conversation .bot.message")
    assert answer.locator("pre").inner_text() == CODE
    assert answer.locator("strong").inner_text() == "no"
    assert "Two lines\n  and no <b>HTML</b>, !a cat" in answer.inner_text()
    assert answer.locator("img, b").count() == 0  # the fixture sees that nothing was fetched
    answer.hover()
    for name, copied in (("Copy code", CODE), ("Copy", REPLY)):
        answer.get_by_role("button", name=name, exact=True).click()
        assert page.evaluate("navigator.clipboard.readText()").strip() == copied.strip()
    shot(page, "markdown")
    check_accessibility(page)

    # The box in which a message is edited is as wide as the conversation.
    page.locator("#conversation .user-row").hover()
    press(page, "Edit")
    box = page.locator("#conversation textarea")
    whole = page.locator("#conversation .message-wrap").bounding_box()["width"]
    assert box.bounding_box()["width"] > 0.8 * whole
    assert box.input_value() == f"# {REPLY}".strip()


def test_pictures_are_shown_at_an_honest_size(demo: Demo, browse: Callable[..., Any]) -> None:
    page = browse(1280, 800)
    shown(demo, page, Turn(user("hello")), Turn(assistant("hello"), 7, "1.0 s"))
    set_up(page, image="always")
    say(page, "draw")
    assert "16 x 16 pixels" in answers(page, 2).inner_text()
    style = "e => [getComputedStyle(e).imageRendering, e.getBoundingClientRect().width]"
    image = "#conversation .bot.message .image-frame img"
    page.wait_for_function(f"() => document.querySelector('{image}')?.matches('.small')")
    assert page.eval_on_selector(image, style) == ["pixelated", 256]
    page.locator("#conversation .bot-row").last.hover()
    page.get_by_role("button", name="Fullscreen").click()
    page.wait_for_function("document.fullscreenElement")
    page.wait_for_timeout(200)
    rendering, width = page.eval_on_selector(image, style)
    assert rendering == "pixelated"
    assert width > 600


def test_everything_is_reached_by_keyboard(demo: Demo, browse: Callable[..., Any]) -> None:
    page = browse(1280, 800)
    page.goto(demo.url)
    page.wait_for_selector("#conversation .example")
    page.wait_for_selector("#message textarea:enabled")

    def focused() -> str:
        """Press Tab; the name of what has the focus, which can be seen."""
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "(e => [e.ariaLabel || e.placeholder || e.innerText.trim(),"
            " getComputedStyle(e).outlineStyle])(document.activeElement)"
        )
        assert outline == "solid"
        return name

    reached = [focused() for _ in range(11)]
    assert reached[:3] == ["Chat", "Settings", "About"]
    assert reached[-4:] == ["Attach", "Type a message", "Submit", "More"]
    assert all(name.startswith("Select example") for name in reached[3:-4])
    page.keyboard.press("Enter")
    examples = [name.partition(": ")[2] for name in reached[3:-4]]
    assert [focused() for _ in examples] == examples  # here they stay
    assert [focused() for _ in range(3)] == [
        "Save conversation",
        "Load conversation",
        "Clear conversation",
    ]
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "more"
    assert page.locator("#more-menu").is_hidden()

    page.focus("#attach")
    page.keyboard.press("Enter")
    assert [focused() for _ in range(3)] == ["File", "Camera", "Microphone"]
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Start recording").wait_for()
    log = page.locator("#conversation [role=log]")  # replies are announced as they grow
    assert log.get_attribute("aria-live") == "polite"

    page.keyboard.press("Escape")
    page.reload()
    say(page, "hello")
    answers(page, 1)
    page.click("#more")
    page.locator("#more-menu .example-chip").first.click()
    answers(page, 2)
