"""Images and animations, by Pillow.

Legend: H x W pixels, F frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mmllm.errors import MediaError
from mmllm.media import provenance
from mmllm.media.files import brief, timed
from mmllm.media.info import MediaContent, MediaInfo
from mmllm.media.limits import DecodingCost

if TYPE_CHECKING:
    from PIL import Image as PILImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is opened; Pillow knows more, some of which run other programs (EPS). HEIC comes beside."""
ANIMATED = ("PNG", "WEBP", "GIF", "AVIF")
"""Of these, a file with several frames is a clip. (Phones hide a second picture in JPEG.)"""
SUFFIXES = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
ANIMATION_SUFFIXES = {".webp": "WEBP", ".gif": "GIF"}
_SHORTEST = 10
"""Milliseconds: animations are not read at more than 100 frames per second."""
_AVIF = {b"avif", b"avis"}
_HEIF = {b"mif1", b"msf1"} | {b"he" + rest for rest in (b"ic", b"ix", b"im", b"is")}
_HEIF |= {b"hevc", b"hevx", b"hevm", b"hevs"}
"""Brands of stills in a container that is MP4's, too: FFmpeg would show one tile of the picture."""
_ORIENTATION = 0x0112
_STRIP = 1 << 22
"""Pixels that are converted at once: large pictures are not held in three forms at a time."""


@contextmanager
def _pillow(file: BinaryIO, name: str, cost: DecodingCost) -> Iterator[PILImage.Image]:
    """The opened picture. Whatever Pillow raises about it is a MediaError, except for
    UnidentifiedImageError: this is no picture."""
    from PIL import UnidentifiedImageError

    try:
        with _open(timed(file, cost), name) as picture:
            yield picture
    except (MediaError, UnidentifiedImageError):
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsing meets
        raise _damaged(name, error) from error


def _open(file: Any, name: str) -> PILImage.Image:
    from PIL import Image as PILImage
    from PIL import PngImagePlugin

    # Image tools keep whole workflows in a PNG's text. What all of it may take stays as it is.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    brands = _brands(file)
    if brands & _HEIF and not brands & _AVIF:
        try:
            from pi_heif import HeifImageFile
        except ImportError as error:
            raise MediaError(
                f"{name}: HEIC is not read here; install pi-heif, or convert it to JPEG"
            ) from error
        return HeifImageFile(file)
    return PILImage.open(file, formats=FORMATS)


def _brands(file: Any) -> set[bytes]:
    """The brands of an ISO base media file, or none."""
    head = file.read(256)
    file.seek(0)
    if head[4:8] != b"ftyp":
        return set()
    compatible = head[16 : int.from_bytes(head[:4], "big")]
    return {head[8:12], *(compatible[i : i + 4] for i in range(0, len(compatible), 4))}


def probe(file: BinaryIO, name: str, cost: DecodingCost) -> MediaInfo | None:
    """What the header says, or None when this is no picture."""
    from PIL import UnidentifiedImageError

    try:
        with _pillow(file, name, cost) as picture:
            kind = picture.format or ""
            frames = getattr(picture, "n_frames", 1) if kind in ANIMATED else 1
            if frames == 1:
                return MediaInfo("image", kind, width=picture.width, height=picture.height)
            # Milliseconds a frame; reading them decodes, so limits get a first look by size alone.
            return MediaInfo(
                "video", kind, width=picture.width, height=picture.height, frames=frames
            )
    except UnidentifiedImageError as error:
        file.seek(0)
        if _brands(file) & (_AVIF | _HEIF):
            raise _damaged(name, "a still in no coding that is known") from error
        return None


def decode(
    file: BinaryIO, name: str, cost: DecodingCost
) -> tuple[np.ndarray, dict[str, Any] | None]:
    """uint8[H, W, 3] upright and on white, and the provenance that the file carries."""
    with _pillow(file, name, cost) as picture:
        cost.add_frame(*picture.size)
        mark = provenance.from_xmp(picture.info.get("xmp"))
        return _rgb(_upright(picture)), mark


def from_pil(picture: PILImage.Image) -> np.ndarray:
    """uint8[H, W, 3]: what the file of this picture is decoded to."""
    if not hasattr(picture, "getexif"):
        raise MediaError(
            f"Image.from_pil: expected a picture of Pillow's, got {type(picture).__name__}"
        )
    if 0 in picture.size:
        raise MediaError(f"Image.from_pil: the image is empty (size {picture.size})")
    try:
        return _rgb(_upright(picture))
    except MediaError:
        raise
    except Exception as error:
        raise _damaged(f"a picture of mode {picture.mode}", error) from error


def read_provenance(file: BinaryIO, name: str, cost: DecodingCost) -> dict[str, Any] | None:
    """The mark of a picture or an animation."""
    with _pillow(file, name, cost) as picture:
        return provenance.from_xmp(picture.info.get("xmp")) or provenance.from_comment(
            picture.info.get("comment")
        )


def _damaged(name: str, error: object) -> MediaError:
    return MediaError(
        f"{name}: the image is damaged or truncated ({brief(error)}); was it copied completely?"
    )


def save(content: MediaContent, path: Path, suffix: str) -> None:
    """Write a PNG, a WebP (quality 90) or a JPEG (quality 92)."""
    from PIL import Image as PILImage

    quality = {".png": {}, ".webp": {"quality": 90, "method": 4}}.get(suffix, {"quality": 92})
    PILImage.fromarray(content.array).save(
        path, SUFFIXES[suffix], **quality, **_mark(content.provenance, suffix)
    )


# --- animations ---------------------------------------------------------------------------------


def durations(file: BinaryIO, name: str, frames: int, cost: DecodingCost) -> list[int]:
    """Milliseconds that each of the frames stays; a missing or absurd one counts as 100."""
    stays = []
    with _pillow(file, name, cost) as picture:
        for index in range(frames):
            _show(picture, index, cost)  # WebP knows the duration only then
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


def frames_at(
    file: BinaryIO, name: str, stays: Sequence[int], times: Sequence[float], cost: DecodingCost
) -> np.ndarray:
    """uint8[len(times), H, W, 3] on white: what is shown at each of the ascending times, in
    seconds, of frames that stay so many milliseconds. All have the size of the first."""
    starts = np.cumsum([0, *stays[:-1]]) / 1000
    wanted = np.searchsorted(starts, np.asarray(times) + 1e-6, side="right") - 1
    with _pillow(file, name, cost) as picture:
        width, height = picture.size
        shown = np.empty((len(times), height, width, 3), np.uint8)
        for index in range(int(wanted[-1]) + 1):
            _show(picture, index, cost)
            places = np.flatnonzero(wanted == index)
            if len(places):
                same = picture.size == (width, height)
                frame = picture if same else picture.crop((0, 0, width, height))
                shown[places] = _rgb(frame)
    return shown


def _show(picture: PILImage.Image, index: int, cost: DecodingCost) -> None:
    """Decode a frame, which may be larger than the first."""
    picture.seek(index)
    cost.add_frame(*picture.size)
    picture.load()


def save_animation(content: MediaContent, path: Path, suffix: str) -> None:
    """Write an animated WebP (whole milliseconds a frame) or GIF (whole hundredths)."""
    from PIL import Image as PILImage

    pictures = [PILImage.fromarray(frame) for frame in content.array]
    assert content.fps
    unit = 10 if suffix == ".gif" else 1
    stay = max(_SHORTEST, unit * round(1000 / content.fps / unit))
    options: dict[str, Any] = {"quality": 85, "method": 3} if suffix == ".webp" else {}
    pictures[0].save(
        path,
        ANIMATION_SUFFIXES[suffix],
        save_all=True,
        append_images=pictures[1:],
        duration=stay,
        loop=0,
        **options,
        **_mark(content.provenance, suffix),
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


def _upright(picture: PILImage.Image) -> PILImage.Image:
    """The picture as its EXIF orientation wants it; EXIF that cannot be read wants nothing."""
    from PIL import Image as PILImage

    turn = PILImage.Transpose
    ways = (turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE)
    ways += (turn.ROTATE_270, turn.TRANSVERSE, turn.ROTATE_90)
    if not isinstance(picture.info.get("xmp", b""), bytes):
        del picture.info["xmp"]  # a text in its place, which Pillow searches as bytes
    picture.load()  # PNG and WebP may have their EXIF behind the pixels
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's parser raises whatever it meets; the pixels are whole
        orientation = 1
    known = isinstance(orientation, int) and 2 <= orientation <= 8
    return picture.transpose(ways[orientation - 2]) if known else picture


def _rgb(picture: PILImage.Image) -> np.ndarray:
    """uint8[H, W, 3]: transparency laid on white, deep grey scaled (Pillow would clip it)."""
    if picture.mode.startswith(("I", "F")):
        return _deep_grey(picture)
    width, height = picture.size
    array = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP // max(1, width))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        array[top:bottom] = _strip(picture.crop((0, top, width, bottom)))
    return array


def _strip(strip: PILImage.Image) -> np.ndarray:
    """uint8[H, W, 3] of a part of a picture of 8 bits a channel."""
    from PIL import Image as PILImage

    if not strip.has_transparency_data:
        return np.asarray(strip.convert("RGB"))
    clear = strip.info.get("transparency")
    if strip.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        # Of a picture of 16 bits a channel Pillow keeps the upper 8, of its clear colour all.
        strip.info["transparency"] = tuple(value >> 8 for value in clear)
    if strip.mode == "La":
        strip = strip.convert("LA")
    layer = strip.convert("RGBA")
    white = PILImage.new("RGBA", layer.size, "white")
    return np.asarray(PILImage.alpha_composite(white, layer).convert("RGB"))


def _deep_grey(picture: PILImage.Image) -> np.ndarray:
    """uint8[H, W, 3] of 16- and 32-bit integers or floats, by the range that their values need."""
    values = np.asarray(picture)
    if not np.isfinite(values).all():
        raise MediaError("the image holds values that are not numbers (NaN or infinity)")
    scale = 1 / 257 if picture.mode.startswith("I;16") else _scale(picture.mode, values.max())
    clear = picture.info.get("transparency")
    array = np.empty((*values.shape, 3), np.uint8)
    rows = max(1, _STRIP // max(1, values.shape[1]))
    for top in range(0, len(values), rows):
        part = values[top : top + rows]
        grey = (part * np.float64(scale)).clip(0, 255).round().astype(np.uint8)
        if isinstance(clear, int):
            grey[part == clear] = 255
        array[top : top + rows] = grey[..., None]
    return array


def _scale(mode: str, largest: float) -> float:
    """What 32-bit grey is multiplied with: floats may be of 0 to 1, both of 8 or of 16 bits."""
    if mode == "F" and largest <= 1:
        return 255.0
    if largest <= 255:
        return 1.0
    return 1 / 257 if largest <= 65535 else 255 / float(largest)
