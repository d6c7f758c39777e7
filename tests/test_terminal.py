"""Images on a terminal, by each protocol."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image as PILImage

from mmllm import console, terminal
from mmllm.conversation import Audio, Image, Video

COLOURS = np.array(
    [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]], [[13, 14, 15], [16, 17, 18]]], np.uint8
)
"""A picture of two columns and three rows."""


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "how"),
    [
        ({}, None),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm-256color", "COLORTERM": "24bit"}, "blocks"),
        ({"TERM": "xterm", "COLORTERM": "truecolor", "NO_COLOR": "1"}, None),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, None),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "COLORTERM": "truecolor"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "screen", "TERM_PROGRAM": "iTerm.app"}, None),
        ({"TERM": "xterm", "TMUX": "/t", "TERM_PROGRAM": "iTerm.app"}, None),
    ],
)
def test_the_protocol_is_known_by_the_environment(
    environment: dict[str, str], how: str | None
) -> None:
    assert terminal.protocol(Tty(), environment) == how
    assert terminal.protocol(io.StringIO(), environment) is None, "a pipe or a file"


def test_half_blocks_are_the_pixels() -> None:
    """Two rows of pixels a line; the last row of an odd number has no background."""
    assert terminal.preview(Image(COLOURS), "blocks") == (
        "\x1b[38;2;1;2;3m\x1b[48;2;7;8;9m▀\x1b[38;2;4;5;6m\x1b[48;2;10;11;12m▀\x1b[0m\n"
        "\x1b[38;2;13;14;15m▀\x1b[38;2;16;17;18m▀\x1b[0m\n"
    )


@pytest.mark.parametrize(("height", "width"), [(2000, 3), (3, 2000), (900, 1600), (1, 1)])
def test_half_blocks_fit_into_the_terminal(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "20")
    shown = terminal.preview(Image(np.zeros((height, width, 3), np.uint8)), "blocks")
    lines = [line.count("▀") for line in shown.splitlines()]
    assert 1 <= len(lines) <= 16
    assert 1 <= max(lines) <= 39


@pytest.mark.parametrize("size", [(8, 6), (300, 20), (2000, 1000)])
def test_kitty_and_iterm2_are_given_the_picture(size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (size[1], size[0], 3), np.uint8)
    kitty = terminal.preview(Image(pixels), "kitty")
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", kitty)
    assert all(len(data) <= 4096 for _, data in pieces)
    assert pieces[0][0].startswith("a=T,f=100,q=2,")
    assert [keys[-1] for keys, _ in pieces] == ["1"] * (len(pieces) - 1) + ["0"]
    png = base64.b64decode("".join(data for _, data in pieces))
    shown = PILImage.open(io.BytesIO(png))
    assert max(shown.size) <= 480
    if size == (8, 6):  # enlarged 32 times, pixel by pixel
        assert (np.asarray(shown)[::32, ::32] == pixels).all()
        assert shown.size == (256, 192)

    iterm2 = terminal.preview(Image(pixels), "iterm2")
    assert iterm2 == (
        f"\x1b]1337;File=inline=1;size={len(png)};preserveAspectRatio=1:"
        f"{base64.b64encode(png).decode()}\x07\n"
    )


def test_a_clip_is_shown_by_its_first_frame_and_a_sound_not_at_all() -> None:
    clip = Video(np.stack([COLOURS, COLOURS[::-1]]), fps=8)
    for how in ("kitty", "iterm2", "blocks"):
        assert terminal.preview(clip, how) == terminal.preview(Image(COLOURS), how)
        assert terminal.preview(Audio(np.zeros(160, np.float32), sample_rate=16000), how) == ""


def test_foreign_text_cannot_steer_the_terminal() -> None:
    assert console.strip_controls("a\x1b]0;x\x07b\x9b2Jc\r\n\td é 画") == "a]0;xb2Jc\n\td é 画"
