"""Display of media and messages in a notebook, or by the system's viewer."""

from __future__ import annotations

import base64
import html
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from mmllm.errors import MediaError

_FORMATS = {"image": "png", "audio": "wav", "video": "mp4"}
_TYPES = {"png": "image/png", "wav": "audio/wav", "mp4": "video/mp4"}
_MIN_WIDTH = 256
"""Minimum displayed width in pixels; smaller images are enlarged without smoothing."""


class SavableMedium(Protocol):
    """The part of Image, Audio and Video that display needs."""

    modality: ClassVar[str]

    @property
    def caption(self) -> str | None:
        """A description of the content, or None."""
        ...

    def save(self, path: str | Path) -> Path:
        """Write the medium to a file, whose suffix selects the format; return the path."""
        ...


def to_bytes(medium: SavableMedium, suffix: str | None = None) -> bytes:
    """Return the bytes of the file that `medium.save` writes.

    Args:
        medium: an image, audio or video.
        suffix: the format, as "png" or ".png"; by default png, wav or mp4.

    Raises:
        MediaError: the medium cannot be read, or not saved in this format.
    """
    with tempfile.TemporaryDirectory() as folder:
        name = f"medium.{(suffix or _FORMATS[medium.modality]).removeprefix('.')}"
        return medium.save(Path(folder) / name).read_bytes()


def mimebundle(parts: Sequence[Any], text: str) -> dict[str, str]:
    """Return the notebook representation of texts and media, by MIME type.

    Args:
        parts: texts and media in order, shown as HTML; a medium that cannot be read is replaced by
            its error.
        text: the representation without HTML.
    """
    return {"text/plain": text, "text/html": "\n".join(_as_html(part) for part in parts)}


def show(medium: SavableMedium) -> None:
    """Show a medium below the cell of a notebook, else in the system's viewer. Raises MediaError if
    there is no viewer."""
    notebook = sys.modules.get("IPython")
    if notebook is not None and notebook.get_ipython() is not None:
        notebook.display.display(medium)
        return
    path = (
        Path(tempfile.mkdtemp(prefix="mmllm-")) / f"{medium.modality}.{_FORMATS[medium.modality]}"
    )
    medium.save(path)
    opener = {"darwin": "open", "win32": "explorer"}.get(sys.platform, "xdg-open")
    try:
        subprocess.Popen([opener, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError as error:
        raise MediaError(f"no program to show {path} with ({opener}): open it yourself") from error


def _as_html(part: Any) -> str:
    """Return a text or a medium as HTML, with the medium's file as a data: URI."""
    if not hasattr(part, "modality"):
        return f'<div style="white-space: pre-wrap">{html.escape(part.text)}</div>'
    try:
        data = to_bytes(part)
    except MediaError as error:
        return f"<div><em>{html.escape(str(error))}</em></div>"
    kind = _TYPES[_FORMATS[part.modality]]
    source = f'src="data:{kind};base64,{base64.b64encode(data).decode()}"'
    if part.modality == "image":
        width = max(part.size[0], _MIN_WIDTH)
        alt = html.escape(part.caption or "image", quote=True)
        return f'<img {source} alt="{alt}" width="{width}" style="image-rendering: pixelated">'
    if part.modality == "audio":
        return f"<audio controls {source}></audio>"
    return f'<video controls loop muted {source} width="{_MIN_WIDTH}"></video>'
