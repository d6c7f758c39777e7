"""The page of features: what is on it, on large and small screens."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmllm.insight.features.cards import shown_medium
from mmllm.insight.features.page import FeatureCard, features_html
from tests.samples import clip, picture, sound

CARDS = [
    FeatureCard(
        feature=12,
        title="a <cat>",
        density=0.004,
        by_kind={"text": 0.004, "image": 0.01, "audio": 0.0, "signal": 0.002},
        media={
            "image": [shown_medium(picture(9), 'a "cat"', 0.5)],
            "audio": [shown_medium(sound(0.1), "purring")],
            "video": [shown_medium(clip(3), "a cat runs")],
            "signal": [shown_medium(sound(0.2), "purring")],
        },
        sentences=[[("I saw ", 0.0), ("a cat", 0.8), (" & left", 0.0)]],
        raises=[" cat", "[make image]"],
        lowers=[" the"],
        made=[shown_medium(picture(1), "without"), shown_medium(picture(2), "with it")],
        neighbours=[(7, 0.5), (99, 0.4)],
    ),
    FeatureCard(feature=7, title="robot", density=0.0, by_kind={}),
]
SCORES = {"dictionary": {"text": 0.8, "image": 0.7}, "PCA-32": {"text": 0.5, "image": -0.1}}


def test_a_page_needs_no_other_file_and_escapes_text() -> None:
    page = features_html("Features", CARDS, intro="An intro.", scores=SCORES)
    sources = re.findall(r'(?:src|data-audio|href)="(.*?)"', page)
    assert len(sources) == 9
    assert all(source.startswith(("data:", "#f")) for source in sources)
    assert "<h2>a &lt;cat&gt;</h2>" in page
    assert "a &quot;cat&quot;" in page
    assert '<mark style="--a:0.80">a cat</mark> &amp; left' in page
    assert '<a class="chip" href="#f7">' in page
    assert 'href="#f99"' not in page
    assert ">-0.10<" in page
    assert "active at 0.4 % of all positions" in page


def test_a_page_fits_screens_plays_and_finds(tmp_path: Path, browse: Callable[..., Any]) -> None:
    file = tmp_path / "features.html"
    file.write_text(features_html("Features", CARDS, scores=SCORES), encoding="utf-8")
    for width, scheme in ((1280, "light"), (390, "dark")):
        page = browse(width, 800)
        page.emulate_media(color_scheme=scheme)
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        features = page.locator(".feature:visible")
        assert features.count() == 2
        page.locator("#find").fill("Robot")
        assert [features.nth(i).get_attribute("id") for i in range(features.count())] == ["f7"]
        page.locator("#find").fill("make image")
        assert features.first.get_attribute("id") == "f12"
        player = page.locator(".sound").first
        player.click()
        assert "on" in (player.get_attribute("class") or "") or page.evaluate("now === null")
        page.locator(".tile .zoom").first.click()
        assert page.locator(".zoom.large").count() == 1
