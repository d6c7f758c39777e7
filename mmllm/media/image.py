"""Images and animations, read and written by Pillow.

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
from mmllm.media.rgb import to_mask, to_rgb

if TYPE_CHECKING:
    from PIL import Image as PILImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""The formats that Pillow may open; some of its others run external programs (EPS). HEIC is read by
pi-heif."""
ANIMATED = ("PNG", "WEBP", "GIF", "AVIF")
"""Formats in which several frames are a video. (Phones hide a second image in JPEG files.)"""
SUFFIXES = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF"}
ANIMATION_SUFFIXES = {".webp": "WEBP", ".gif": "GIF"}
_SHORTEST = 10
"""Shortest frame duration in milliseconds: animations have at most 100 frames per second."""
_AVIF = {b"avif", b"avis"}
_HEIF = {b"mif1", b"msf1"} | {b"he" + rest for rest in (b"ic", b"ix", b"im", b"is")}
_HEIF |= {b"hevc", b"hevx", b"hevm", b"hevs"}
"""Brands of still images in MP4-like containers: FFmpeg would decode one tile of the image only."""
_ORIENTATION = 0x0112


@contextmanager
def _pillow(file: BinaryIO, name: str, cost: DecodingCost) -> Iterator[PILImage.Image]:
    """Open an image; any exception inside the block becomes a MediaError, except for
    UnidentifiedImageError, which means that the file is no image."""
    from PIL import UnidentifiedImageError

    try:
        with _open(timed(file, cost), name) as picture:
            yield picture
    except (MediaError, UnidentifiedImageError):
        raise
    except Exception as error:  # Pillow's plugins raise any exception while parsing
        raise _damaged(name, error) from error


def _open(file: Any, name: str) -> PILImage.Image:
    """Open an image, HEIC by pi-heif and other formats by Pillow."""
    from PIL import Image as PILImage
    from PIL import PngImagePlugin

    # Image tools store whole workflows in one text chunk: only the limit of all text applies.
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
    """Return the brands of an ISO base media file; none for other files."""
    head = file.read(256)
    file.seek(0)
    if head[4:8] != b"ftyp":
        return set()
    compatible = head[16 : int.from_bytes(head[:4], "big")]
    return {head[8:12], *(compatible[i : i + 4] for i in range(0, len(compatible), 4))}


def probe(file: BinaryIO, name: str, cost: DecodingCost) -> MediaInfo | None:
    """Read the header of an image or animation with Pillow.

    Args:
        file: the open file, at its beginning.
        name: its name in messages.
        cost: checked at every read.

    Returns:
        Format, size in pixels and number of frames; None if the file is neither.

    Raises:
        MediaError: the file is damaged.
        OversizedMediaError: it exceeds a limit.
    """
    from PIL import UnidentifiedImageError

    try:
        with _pillow(file, name, cost) as picture:
            kind = picture.format or ""
            frames = getattr(picture, "n_frames", 1) if kind in ANIMATED else 1
            if frames == 1:
                return MediaInfo("image", kind, width=picture.width, height=picture.height)
            # Durations are unknown without decoding, so the limits are checked by size first.
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
    """Decode an image with Pillow.

    Args:
        file: the open file, at its beginning.
        name: its name in messages.
        cost: the image counts as one frame.

    Returns:
        The pixels, uint8[H, W, 3], rotated as EXIF says and blended onto white, and the provenance
        metadata or None.

    Raises:
        MediaError: the file is damaged or truncated.
        OversizedMediaError: it exceeds a limit.
    """
    with _pillow(file, name, cost) as picture:
        cost.add_frame(*picture.size)
        mark = _provenance(picture)
        return to_rgb(_upright(picture)), mark


def decode_mask(file: BinaryIO, name: str, cost: DecodingCost) -> np.ndarray:
    """Decode the transparency of an image as a mask.

    Args:
        file: the open file, at its beginning.
        name: its name in messages.
        cost: the image counts as one frame.

    Returns:
        uint8[H, W, 3], white where the image is transparent, black elsewhere.

    Raises:
        MediaError: the image has no transparency, or is damaged.
        OversizedMediaError: it exceeds a limit.
    """
    with _pillow(file, name, cost) as picture:
        cost.add_frame(*picture.size)
        mask = to_mask(_upright(picture))
        if mask is None:
            raise MediaError(
                f"{name}: expected a picture with an alpha channel, which is transparent where the "
                "other one is to change; this one has none"
            )
        return mask


def from_pil(picture: PILImage.Image) -> np.ndarray:
    """Convert a Pillow image as its file would be decoded: uint8[H, W, 3]. Raises MediaError."""
    if not hasattr(picture, "getexif"):
        raise MediaError(
            f"Image.from_pil: expected a picture of Pillow's, got {type(picture).__name__}"
        )
    if 0 in picture.size:
        raise MediaError(f"Image.from_pil: the image is empty (size {picture.size})")
    try:
        return to_rgb(_upright(picture))
    except MediaError:
        raise
    except Exception as error:
        raise _damaged(f"a picture of mode {picture.mode}", error) from error


def read_provenance(file: BinaryIO, name: str, cost: DecodingCost) -> dict[str, Any] | None:
    """Read the provenance metadata of an image or animation from its XMP or its comment.

    Args:
        file: the open file, at its beginning.
        name: its name in messages.
        cost: checked at every read.

    Returns:
        The metadata that `provenance` wrote; None if there is none.

    Raises:
        MediaError: the file is damaged.
    """
    with _pillow(file, name, cost) as picture:
        return _provenance(picture)


def _provenance(picture: PILImage.Image) -> dict[str, Any] | None:
    """Return the provenance in an image's XMP packet or comment (GIF), or None."""
    return provenance.from_xmp(picture.info.get("xmp")) or provenance.from_comment(
        picture.info.get("comment")
    )


def _damaged(name: str, error: object) -> MediaError:
    return MediaError(
        f"{name}: the image is damaged or truncated ({brief(error)}); was it copied completely?"
    )


def save(content: MediaContent, path: Path, suffix: str) -> None:
    """Write an image as PNG, WebP (quality 90), JPEG (quality 92) or GIF (256 colours).

    Args:
        content: the image.
        path: the file to write.
        suffix: a key of SUFFIXES.
    """
    from PIL import Image as PILImage

    quality = {"JPEG": {"quality": 92}, "WEBP": {"quality": 90, "method": 4}}
    kind = SUFFIXES[suffix]
    PILImage.fromarray(content.array).save(
        path, kind, **quality.get(kind, {}), **_mark(content.provenance, suffix)
    )


# --- animations ---------------------------------------------------------------------------------


def durations(file: BinaryIO, name: str, frames: int, cost: DecodingCost) -> list[int]:
    """Return the duration of each frame of an animation in milliseconds.

    Durations that are missing or shorter than 10 ms count as 100, as in browsers.

    Args:
        file: the animation.
        name: its name in messages.
        frames: number of frames.
        cost: counts the work.

    Raises:
        MediaError: the file is damaged, or exceeds the limits.
    """
    stays = []
    with _pillow(file, name, cost) as picture:
        for index in range(frames):
            _show(picture, index, cost)  # the duration of a WebP frame is known once decoded
            stay = round(picture.info.get("duration") or 0)
            stays.append(stay if stay >= _SHORTEST else 100)
    return stays


def frame_rate(stays: list[int]) -> float:
    """Return the constant frame rate, in frames per second, that represents an animation exactly.

    Writers merge equal consecutive frames into one long frame, so the frame duration is the
    greatest common divisor of all durations, or the shortest one if that divisor is below 10 ms.

    Args:
        stays: duration of each frame in milliseconds.
    """
    step = gcd(*stays)
    return 1000.0 / (step if step >= _SHORTEST else min(stays))


def frames_at(
    file: BinaryIO, name: str, stays: Sequence[int], times: Sequence[float], cost: DecodingCost
) -> np.ndarray:
    """Decode the frames of an animation that are displayed at given times.

    Args:
        file: the animation.
        name: its name in messages.
        stays: duration of each frame in milliseconds.
        times: ascending times in seconds.
        cost: counts the work.

    Returns:
        uint8[len(times), H, W, 3] on white, all of the size of the first frame.

    Raises:
        MediaError: the file is damaged, or exceeds the limits.
    """
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
                shown[places] = to_rgb(frame)
    return shown


def _show(picture: PILImage.Image, index: int, cost: DecodingCost) -> None:
    """Decode a frame, which may be larger than the first, and count its cost."""
    picture.seek(index)
    cost.add_frame(*picture.size)
    picture.load()


def save_animation(content: MediaContent, path: Path, suffix: str) -> None:
    """Write a video as animated WebP or GIF.

    Frame durations are rounded to whole milliseconds (WebP) or hundredths of a second (GIF), and
    are 10 ms at least.

    Args:
        content: frames uint8[T, H, W, 3], their rate in frames per second, and provenance metadata.
        path: the file to write.
        suffix: .webp or .gif.
    """
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
    """Return the arguments with which `PIL.Image.save` writes a provenance."""
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
    """Rotate or mirror an image by its EXIF orientation; unreadable EXIF is ignored."""
    from PIL import Image as PILImage

    turn = PILImage.Transpose
    ways = (turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE)
    ways += (turn.ROTATE_270, turn.TRANSVERSE, turn.ROTATE_90)
    if not isinstance(picture.info.get("xmp", b""), bytes):
        del picture.info["xmp"]  # Pillow expects bytes and fails for text
    picture.load()  # PNG and WebP may have their EXIF after the pixels
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's parser raises any exception; the pixels are complete
        orientation = 1
    known = isinstance(orientation, int) and 2 <= orientation <= 8
    return picture.transpose(ways[orientation - 2]) if known else picture
