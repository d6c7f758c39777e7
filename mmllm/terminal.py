"""Pictures on a terminal: by the protocol that the terminal has, else as coloured half blocks.

kitty:  https://sw.kovidgoyal.net/kitty/graphics-protocol/
iTerm2: https://iterm2.com/documentation-images.html
"""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Literal

import numpy as np

from mmllm.conversation import Image, Medium, Video

if TYPE_CHECKING:
    from PIL import Image as PILImage

Protocol = Literal["kitty", "iterm2", "blocks"]

_CELLS = (64, 24)
"""Columns and rows that half blocks take at most."""
_PIXELS = (256, 480)
"""Sides that a picture has at least, enlarged pixel by pixel, and at most."""
_CHUNK = 4096
"""Bytes of base64 in one escape sequence of kitty's protocol."""
_KITTY = {"xterm-kitty", "xterm-ghostty"}
_ITERM2 = {"iTerm.app", "WezTerm", "mintty"}


def protocol(stream: IO[str], environment: Mapping[str, str] = os.environ) -> Protocol | None:
    """Return the protocol for images on a stream; None for files, pipes and other terminals.

    Args:
        stream: where images are to be shown, for example stdout.
        environment: the environment variables, by which terminals are recognised.
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if not stream.isatty() or term == "dumb":
        return None
    # A multiplexer passes neither protocol on, but its windows inherit the variables of both.
    if "TMUX" not in environment and not term.startswith(("screen", "tmux")):
        if "KITTY_WINDOW_ID" in environment or term in _KITTY or program == "ghostty":
            return "kitty"
        if program in _ITERM2 or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
    coloured = environment.get("COLORTERM") in ("truecolor", "24bit") or "WT_SESSION" in environment
    if not coloured or environment.get("NO_COLOR"):
        return None
    return "blocks" if "utf" in (getattr(stream, "encoding", None) or "").lower() else None


def preview(medium: Medium, how: Protocol) -> str:
    """Return the text that shows an image, or the first frame of a video, when it is written.

    Args:
        medium: the medium; audio gives an empty text.
        how: the protocol.

    Raises:
        MediaError: the medium cannot be read.
    """
    if isinstance(medium, Image):
        pixels = medium.to_numpy()
    elif isinstance(medium, Video):
        pixels = medium.to_numpy()[0]
    else:
        return ""
    from PIL import Image as PILImage

    picture = PILImage.fromarray(pixels)
    if how == "blocks":
        return _blocks(picture)
    data = _png(picture)
    return _kitty(data) if how == "kitty" else _iterm2(data)


def _png(picture: PILImage.Image) -> bytes:
    from PIL import Image as PILImage

    least, most = _PIXELS
    if (times := least // max(picture.size)) > 1:
        width, height = picture.size
        picture = picture.resize((width * times, height * times), PILImage.Resampling.NEAREST)
    picture.thumbnail((most, most))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _kitty(png: bytes) -> str:
    text = base64.b64encode(png).decode()
    chunks = [text[at : at + _CHUNK] for at in range(0, len(text), _CHUNK)]
    pieces = []
    for number, chunk in enumerate(chunks):
        keys = "a=T,f=100,q=2," if number == 0 else ""  # q=2: the terminal answers nothing
        pieces.append(f"\x1b_G{keys}m={int(number < len(chunks) - 1)};{chunk}\x1b\\")
    return "".join(pieces) + "\n"


def _iterm2(png: bytes) -> str:
    return (
        f"\x1b]1337;File=inline=1;size={len(png)};preserveAspectRatio=1:"
        f"{base64.b64encode(png).decode()}\x07\n"
    )


def _blocks(picture: PILImage.Image) -> str:
    """Two pixels a cell: the upper one is the colour of a half block, the lower one what is behind
    it. A last row of its own leaves the background as it is."""
    columns, lines = shutil.get_terminal_size()
    width, height = min(columns - 1, _CELLS[0]), 2 * min(max(lines - 4, 4), _CELLS[1])
    picture.thumbnail((max(width, 1), height))
    return "".join(f"{line}\x1b[0m\n" for line in _lines(np.asarray(picture)))


def _lines(pixels: np.ndarray) -> Iterator[str]:
    for top in range(0, len(pixels), 2):
        upper = [f"\x1b[38;2;{r};{g};{b}m" for r, g, b in pixels[top]]
        lower = [""] * len(upper)
        if top + 1 < len(pixels):
            lower = [f"\x1b[48;2;{r};{g};{b}m" for r, g, b in pixels[top + 1]]
        yield "".join(f"{above}{below}▀" for above, below in zip(upper, lower, strict=True))
