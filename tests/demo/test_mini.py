"""The page of the shipped model, which knows what its settings are for, in light and dark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import mmllm
from mmllm.conversation import assistant, user
from mmllm.demo import Demo, card_of
from mmllm.demo.sessions import Turn
from tests.demo.browser import check_accessibility, shot, shown
from tests.samples import picture


@pytest.fixture(scope="module")
def mini() -> Iterator[Demo]:
    with Demo(mmllm.load("mini"), card=card_of("mini")) as demo:
        yield demo


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_mini_is_accessible(mini: Demo, browse: Callable[..., Any], scheme: str) -> None:
    page = browse(1280, 800)
    page.emulate_media(color_scheme=scheme)
    image = mini.sessions.open(None).keep(picture(64))
    shown(mini, page, Turn(user("Draw.")), Turn(assistant("Here.", image), 7, "64 x 64 pixels"))
    shot(page, f"mini-{scheme}")
    check_accessibility(page)
    page.get_by_role("tab", name="Settings").click()
    for section in ("Advanced", "Pictures", "Sounds", "Clips", "Words"):
        page.locator("button.label-wrap", has_text=section).click()
    page.wait_for_selector("text=Repetition penalty")
    for nothing in ("Start from", "Strength", "Width in pixels"):  # mini ignores these
        assert page.get_by_text(nothing).count() == 0
    shot(page, f"mini-settings-{scheme}")
    check_accessibility(page)
    page.get_by_role("tab", name="About").click()
    page.wait_for_selector("text=What it knows")
    lists = page.locator("#about details")
    for index, thing in enumerate(("avocado", "yellow; appear", "trumpet")):
        assert thing in lists.nth(index).text_content()
    check_accessibility(page)
