"""What a person does in the browser, and what is waited for."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from mmllm.demo import Demo
from mmllm.demo.sessions import Turn


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
    """Wait, after the block, until the last of `count` answers is replaced. The old one looks
    finished all the while, so texts with their seeds are compared."""
    old = answers(page, count).inner_text()
    yield
    page.wait_for_function(
        "([count, old]) => { const found = [...document.querySelectorAll("
        "'#conversation .bot.message')].map(e => e.innerText);"
        " return found.length == count && found.at(-1) != old && /seed \\d+/.test(found.at(-1)) }",
        arg=[count, old],
    )


def press(page: Any, name: str) -> None:
    """Press one of the small buttons of the conversation."""
    page.locator(f"#conversation button[aria-label={name}]:enabled").last.click()


def set_up(page: Any, **wishes: str) -> None:
    """Choose the modalities of answers in the settings, then return to the chat."""
    page.get_by_role("tab", name="Settings").click()
    for modality, wish in wishes.items():
        page.locator(f"#wish-{modality}").get_by_label(wish).check()
    page.get_by_role("tab", name="Chat").click()


def choose(page: Any, menu: str, item: str) -> None:
    """Choose an item of a menu next to the message box."""
    page.get_by_role("button", name=menu, exact=True).click()
    page.get_by_role("button", name=item, exact=True).click()


def shot(page: Any, name: str) -> None:
    """Save a screenshot of the page in the folder MMLLM_SHOTS, if it is set."""
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
    assert bad == [], bad  # not rewritten by pytest here


def shown(demo: Demo, page: Any, *turns: Turn) -> None:
    """Show a page whose conversation is `turns`."""
    page.goto(demo.url)
    page.wait_for_selector("#message textarea:enabled")  # its session is open
    demo.sessions.all[-1].turns += turns
    page.reload()
    page.wait_for_selector("#conversation .bot.message .note")
