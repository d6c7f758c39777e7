"""Pictures and picture animations, by Pillow.

Legend: H x W pixels, F frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mmllm.conversation import Image, Video
from mmllm.errors import MediaError
from mmllm.media import provenance
from mmllm.media.facts import Facts

if TYPE_CHECKING:
    from PIL import Image as PILImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is opened; Pillow knows more, some of which run other programs (EPS)."""
ANIMATED = ("PNG", "WEBP", "GIF", "AVIF")
"""Of these, a file with several frames is a clip. (Phones hide a second picture in JPEG.)"""
SUFFIXES = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
ANIMATION_SUFFIXES = {".webp": "WEBP", ".gif": "GIF"}
_SHORTEST = 10
"""Milliseconds: animations are not read at more than 100 frames per second."""


@contextmanager
def _pillow(file: BinaryIO, name: str) -> Iterator[PILImage.Image]:
    """The opened picture; whatever Pillow finds wrong with it is a MediaError."""
    from PIL import Image as PILImage
    from PIL import UnidentifiedImageError

    try:
        with PILImage.open(file, formats=FORMATS) as picture:
            yield picture
    except UnidentifiedImageError:
        raise
    except PILImage.DecompressionBombError as error:
        raise MediaError(f"{name}: far too many pixels to open ({error})") from error
    # Pillow's plugins raise all of these on damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(
            f"{name}: the picture is damaged or truncated ({error}); was it copied completely?"
        ) from error


def probe(file: BinaryIO, name: str) -> Facts | None:
    """What the header says, or None when this is no picture."""
    from PIL import UnidentifiedImageError

    try:
        with _pillow(file, name) as picture:
            kind = picture.format or ""
            frames = getattr(picture, "n_frames", 1) if kind in ANIMATED else 1
            if frames == 1:
                return Facts("image", kind, width=picture.width, height=picture.height)
            # Milliseconds a frame; reading them decodes, so limits get a first look by size alone.
            return Facts("video", kind, width=picture.width, height=picture.height, frames=frames)
    except UnidentifiedImageError:
        return None


def decode(file: BinaryIO, name: str) -> tuple[np.ndarray, dict[str, Any] | None]:
    """uint8[H, W, 3] upright and on white, and the provenance that the file carries."""
    from PIL import ImageOps

    with _pillow(file, name) as picture:
        mark = provenance.from_xmp(picture.info.get("xmp"))
        picture.load()
        return _rgb(ImageOps.exif_transpose(picture)), mark


def read_provenance(file: BinaryIO, name: str) -> dict[str, Any] | None:
    """The mark of a picture or an animation."""
    with _pillow(file, name) as picture:
        return provenance.from_xmp(picture.info.get("xmp")) or provenance.from_comment(
            picture.info.get("comment")
        )


def save(image: Image, path: Path, suffix: str) -> None:
    """Write a PNG, a WebP (quality 90) or a JPEG (quality 92)."""
    from PIL import Image as PILImage

    quality = {".png": {}, ".webp": {"quality": 90, "method": 4}}.get(suffix, {"quality": 92})
    PILImage.fromarray(image.to_numpy()).save(
        path, SUFFIXES[suffix], **quality, **_mark(image.provenance, suffix)
    )


# --- animations ---------------------------------------------------------------------------------


def durations(file: BinaryIO, name: str, frames: int) -> list[int]:
    """Milliseconds that each of the frames stays; a missing or absurd one counts as 100."""
    stays = []
    with _pillow(file, name) as picture:
        for index in range(frames):
            picture.seek(index)
            picture.load()  # WebP knows the duration only then
            stay = round(picture.info.get("duration") or 0)
            stays.append(stay if stay >= _SHORTEST else 100)
    return stays


def frame_rate(stays: list[int]) -> float:
    """Frames per second of a steady clip that shows the same at the same time.

    Writers merge equal neighbours into one long frame, so the step is the greatest common divisor,
    or the shortest stay where the durations share none.
    """
    step = gcd(*stays)
    return 1000.0 / (step if step >= _SHORTEST else min(stays))


def frames(file: BinaryIO, name: str, stays: list[int]) -> Iterator[tuple[float, np.ndarray]]:
    """(start in seconds, uint8[H, W, 3] on white) of each stored frame."""
    start = 0
    with _pillow(file, name) as picture:
        for index, stay in enumerate(stays):
            picture.seek(index)
            yield start / 1000, _rgb(picture)
            start += stay


def save_animation(video: Video, path: Path, suffix: str) -> None:
    """Write an animated WebP (whole milliseconds a frame) or GIF (whole hundredths)."""
    from PIL import Image as PILImage

    pictures = [PILImage.fromarray(frame) for frame in video.to_numpy()]
    assert video.fps
    unit = 10 if suffix == ".gif" else 1
    stay = max(_SHORTEST, unit * round(1000 / video.fps / unit))
    options: dict[str, Any] = {"quality": 85, "method": 3} if suffix == ".webp" else {}
    pictures[0].save(
        path,
        ANIMATION_SUFFIXES[suffix],
        save_all=True,
        append_images=pictures[1:],
        duration=stay,
        loop=0,
        **options,
        **_mark(video.provenance, suffix),
    )


# --- shared -------------------------------------------------------------------------------------


def _mark(mark: Any, suffix: str) -> dict[str, Any]:
    """What `PIL.Image.save` needs to write a provenance."""
    if mark is None:
        return {}
    if suffix == ".gif":
        return {"comment": provenance.to_comment(mark)}
    if suffix == ".png":
        from PIL.PngImagePlugin import PngInfo

        chunks = PngInfo()
        chunks.add_itxt("XML:com.adobe.xmp", provenance.to_xmp(mark).decode())
        return {"pnginfo": chunks}
    return {"xmp": provenance.to_xmp(mark)}


def _rgb(picture: PILImage.Image) -> np.ndarray:
    """uint8[H, W, 3]: transparency laid on white, deep grey scaled (Pillow would clip it)."""
    from PIL import Image as PILImage

    if picture.mode.startswith("I"):
        grey = np.asarray(picture).astype(np.float64) / 257
        return np.repeat(grey.clip(0, 255).round().astype(np.uint8)[..., None], 3, axis=2)
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        white = PILImage.new("RGBA", clear.size, "white")
        picture = PILImage.alpha_composite(white, clear)
    return np.array(picture.convert("RGB"))
