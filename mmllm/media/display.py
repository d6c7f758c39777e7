"""Media and replies where people look at them: in a notebook, or by the system's own programs."""

from __future__ import annotations

import base64
import html
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmllm.conversation import Audio, ContentPart, Image, Medium, Text, Video
from mmllm.errors import MediaError

_FORMATS: dict[type[Medium], str] = {Image: "png", Audio: "wav", Video: "mp4"}
_TYPES = {"png": "image/png", "wav": "audio/wav", "mp4": "video/mp4"}
_LEAST_PIXELS = 256
"""Width to which smaller pictures are shown enlarged, pixel by pixel."""


def to_bytes(medium: Medium, suffix: str | None = None) -> bytes:
    """The bytes of the file that `medium.save` writes with this suffix; png, wav or mp4 unless
    given."""
    with tempfile.TemporaryDirectory() as folder:
        name = f"medium.{(suffix or _default(medium)).removeprefix('.')}"
        return medium.save(Path(folder) / name).read_bytes()


def mimebundle(parts: Sequence[ContentPart], text: str) -> dict[str, str]:
    """MIME type -> what a notebook shows: the parts in order as HTML, and `text` where it cannot.
    A medium that cannot be read is told of in its place."""
    return {"text/plain": text, "text/html": "\n".join(_as_html(part) for part in parts)}


def show(medium: Medium) -> None:
    """Show a medium below the cell of a notebook, else by the program that the system has for its
    kind of file."""
    notebook = sys.modules.get("IPython")
    if notebook is not None and notebook.get_ipython() is not None:
        notebook.display.display(medium)
        return
    path = Path(tempfile.mkdtemp(prefix="mmllm-")) / f"{medium.modality}.{_default(medium)}"
    medium.save(path)
    opener = {"darwin": "open", "win32": "explorer"}.get(sys.platform, "xdg-open")
    try:
        subprocess.Popen([opener, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError as error:
        raise MediaError(f"no program to show {path} with ({opener}): open it yourself") from error


def _default(medium: Medium) -> str:
    return next(name for kind, name in _FORMATS.items() if isinstance(medium, kind))


def _as_html(part: ContentPart) -> str:
    if isinstance(part, Text):
        return f'<div style="white-space: pre-wrap">{html.escape(part.text)}</div>'
    try:
        data = to_bytes(part)
    except MediaError as error:
        return f"<div><em>{html.escape(str(error))}</em></div>"
    kind = _TYPES[_default(part)]
    source = f'src="data:{kind};base64,{base64.b64encode(data).decode()}"'
    if isinstance(part, Image):
        width = max(part.size[0], _LEAST_PIXELS)
        alt = html.escape(part.caption or "picture", quote=True)
        return f'<img {source} alt="{alt}" width="{width}" style="image-rendering: pixelated">'
    if isinstance(part, Audio):
        return f"<audio controls {source}></audio>"
    return f'<video controls loop muted {source} width="{_LEAST_PIXELS}"></video>'
