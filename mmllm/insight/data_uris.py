"""Files inside a page, as data: URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image as PILImage

_FRAME_MS = 120


def data_uri(kind: str, data: bytes) -> str:
    """A data: URI.

    Args:
        kind: MIME type.
        data: content.
    """
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def webp_uri(frames: Sequence[PILImage.Image]) -> str:
    """A data: URI of a WebP file, animated if there are several frames.

    Args:
        frames: of one size.
    """
    file = io.BytesIO()
    options: dict[str, Any] = {"quality": 70, "method": 4}
    if len(frames) > 1:
        options |= {
            "save_all": True,
            "append_images": frames[1:],
            "duration": _FRAME_MS,
            "loop": 0,
        }
    frames[0].save(file, "WEBP", **options)
    return data_uri("image/webp", file.getvalue())
