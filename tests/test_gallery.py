"""Pages of conversations: who speaks, what is shown and how large, on what screens."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmllm.conversation import Image, assistant, user
from mmllm.evaluation.report import EvaluationReport
from mmllm.gallery import GalleryEntry, read_gallery, write_comparison, write_gallery
from tests.samples import clip, picture, sound

ROOT = Path(__file__).parent.parent


def entries(word: str) -> list[GalleryEntry]:
    return [
        GalleryEntry((user("draw <b>"), assistant(word, picture(64))), "made & shown"),
        GalleryEntry((user(Image(caption="a cat"), "play"), assistant(sound(), clip()))),
    ]


def test_a_gallery_says_who_speaks_and_how_large_media_are(tmp_path: Path) -> None:
    page = write_gallery(tmp_path / "new", "A <title>", entries("here"), "An intro.").read_text()
    assert "<title>A &lt;title&gt;</title>" in page
    assert "<p>An intro.</p>" in page
    assert re.findall(r'<p class="speaker">(.*?)</p>', page) == ["You", "Model"] * 2
    assert "draw &lt;b&gt;" in page
    assert "made &amp; shown" in page
    assert "[image: a cat]" in page
    assert page.count("4 x 4 pixels") == 2
    named = re.findall(r'src="(.*?)"', page)
    assert sorted(named) == ["000-1-1.png", "001-1-0.png", "001-1-0.wav", "001-1-1.webp"]
    assert all((tmp_path / "new" / file).is_file() for file in named)


def test_programs_read_what_a_gallery_holds(tmp_path: Path) -> None:
    write_gallery(tmp_path, "x", entries("here"))
    first, second = read_gallery(tmp_path)
    assert first[1]["parts"][0] == {"text": "here"}
    assert first[1]["parts"][1]["size"] == [4, 4]
    assert second[1]["parts"][0]["file"] == "001-1-0.wav"
    assert read_gallery(tmp_path / "elsewhere") == []
    assert write_gallery(tmp_path / "empty", "x", []).is_file()
    assert read_gallery(tmp_path / "empty") == []


def test_two_models_stand_side_by_side(tmp_path: Path, browse: Callable[..., Any]) -> None:
    columns = {"yours": entries("one"), "shipped mini": entries("two")}
    file = write_comparison(tmp_path, "Both", columns)
    for width, scheme in ((1280, "light"), (390, "dark")):
        page = browse(width, 800)
        page.emulate_media(color_scheme=scheme)
        page.goto(file.as_uri())
        cells = page.locator("tbody tr").first.locator("th, td")
        assert [cells.nth(i).inner_text().split("\n")[0] for i in range(3)] == [
            *("draw <b>", "one", "two")
        ]
        prompt, *replies = (cells.nth(i).bounding_box() for i in range(3))
        assert replies[0]["y"] == replies[1]["y"]
        assert replies[1]["x"] + replies[1]["width"] <= width  # nothing to scroll for
        assert (prompt["y"] < replies[0]["y"]) == (width == 390)  # on a phone it stands above them
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", dark))) < 60) == (scheme == "dark")

        # A click, or the keyboard, enlarges an image without blur, and makes it small again.
        image = page.locator("td img").first
        before = image.bounding_box()["width"]
        page.locator("td .zoom").first.press("Enter")
        assert image.bounding_box()["width"] > 1.3 * before
        assert image.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"
        page.keyboard.press("Enter")
        assert image.bounding_box()["width"] == before


def demo() -> dict[str, Any]:
    """The names of demos/gallery.py."""
    return runpy.run_path(str(ROOT / "demos" / "gallery.py"), run_name="demos.gallery")


def test_the_demos_headline_is_what_was_measured() -> None:
    headline = demo()["headline"](ROOT / "mmllm" / "mini" / "evaluation.json")
    report = EvaluationReport.load(ROOT / "mmllm" / "mini" / "evaluation.json")
    assert f"draws what is asked: {report.metric('text->image').value:.0%}" in headline
    assert headline.count("%") == 5 * (2 if report.baseline else 1)


def test_the_demos_prompts_are_of_things_that_are_in_its_data() -> None:
    data = ROOT / "mmllm" / "mini" / "data"
    things = json.loads((data / "things.json").read_text(encoding="utf-8"))
    drawn = {name for thing in things for name in (thing["label"], *thing["synonyms"])}
    sounds = {folder.name.replace("-", " ") for folder in (data / "sounds").iterdir()}
    asked = re.compile(
        r"(Draw|Show me|Please draw|Animate|Play the sound of) an? (.*?)(?:\.| and )"
    )
    found = [match.groups() for prompt in demo()["PROMPTS"] if (match := asked.match(prompt))]
    assert len(found) >= 8
    for verb, thing in found:
        known = {"Play the sound of": sounds}.get(verb, drawn)
        assert thing in known or thing.partition(" ")[2] in known  # a colour
