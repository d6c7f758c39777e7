"""Conversations as plain data: text and media, in messages, in the order in which they were said.

Nothing here imports torch or opens a file before somebody asks for pixels or samples.
Legend: H x W pixels, F frames, S samples, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np

from mmllm.errors import MediaError, quoted

if TYPE_CHECKING:
    from PIL import Image as PILImage

Role: TypeAlias = Literal["system", "user", "assistant"]
MediaSource: TypeAlias = "str | Path | bytes | Embedded"
"""Where a medium is kept: a path, the bytes of a file, or a file inside another."""


@dataclass(frozen=True)
class Text:
    """A run of text. What it spells stays text: a special token in it is never parsed."""

    text: str


@dataclass(frozen=True)
class Embedded:
    """A file inside another one (of a tar, of a Parquet file): `read` gets its bytes, each time
    that they are needed; `name` says where it is and means nothing else."""

    name: str
    read: Callable[[], bytes] = field(compare=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Medium:
    """One picture, sound or clip: where it is kept (`source`), or its decoded `array`, or both.

    `source` is a path, the bytes of a file, or a file inside another; it is opened on first use,
    within the limits of `mmllm.media`. Decoded data in its place (an array, a picture of Pillow's)
    becomes the `array`, checked as `from_numpy` and `from_pil` do. `caption` says what the medium
    shows: the target of decoder-side alignment.
    `provenance` is filled for generated media and is written into every file that is saved.
    """

    source: MediaSource | None = None
    array: np.ndarray | None = None
    caption: str | None = None
    provenance: Mapping[str, Any] | None = None

    modality: ClassVar[str]
    """The key of encoders and decoders that this medium belongs to."""

    def __post_init__(self) -> None:
        if self.source is not None and not isinstance(self.source, str | Path | bytes | Embedded):
            array = self._decoded_data(self.source)
            object.__setattr__(self, "source", None)
            object.__setattr__(self, "array", array)

    def _decoded_data(self, data: Any) -> np.ndarray:
        """The array of data that is decoded and was given in place of a file."""
        name = type(self).__name__
        raise TypeError(
            f"{name}: expected a path or the bytes of a file, got {type(data).__name__}; for "
            f"decoded data use {name}.from_numpy(...)"
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """`np.asarray(medium)` is `medium.to_numpy()`."""
        array = self.to_numpy()
        array = array if dtype is None else array.astype(dtype, copy=False)
        return array.copy() if copy else array

    def __repr__(self) -> str:
        if self.array is not None:
            what = f"array {tuple(self.array.shape)}"
        elif isinstance(self.source, bytes):
            what = f"{len(self.source)} bytes"
        else:
            what = repr(str(self.source)) if self.source is not None else "no data"
        caption = f", caption={self.caption!r}" if self.caption else ""
        return f"{type(self).__name__}({what}{caption})"

    @property
    def has_data(self) -> bool:
        """False for a medium that is only described by its caption."""
        return self.source is not None or self.array is not None

    def decoded(self) -> Medium:
        """The same medium with `array` filled (read and checked by `mmllm.media`)."""
        if self.array is not None:
            return self
        from mmllm import media

        return media.decode(self)

    def to_numpy(self) -> np.ndarray:
        """Image: uint8[H, W, 3] RGB. Audio: float32[C, S] in [-1, 1]. Video: uint8[F, H, W, 3]."""
        array = self.decoded().array
        assert array is not None
        return array

    def save(self, path: str | Path) -> Path:
        """Write the medium in the format of the suffix, with its provenance mark; see media."""
        from mmllm import media

        return media.save(self, path)

    def to_bytes(self, suffix: str | None = None) -> bytes:
        """The bytes of the file that `save` writes with this suffix; png, wav or mp4 unless
        given."""
        from mmllm.media import display

        return display.to_bytes(self, suffix)

    def show(self) -> None:
        """Show it: below the cell in a notebook, else by the program that the system has for it."""
        from mmllm.media import display

        display.show(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """What a notebook shows: a picture or a player."""
        from mmllm.media import display

        return display.mimebundle([self], repr(self))


@dataclass(frozen=True, eq=False, repr=False)
class Image(Medium):
    """A picture; decoded: uint8[H, W, 3], RGB."""

    modality: ClassVar[str] = "image"

    if TYPE_CHECKING:  # what `Medium.__post_init__` takes

        def __init__(
            self,
            source: MediaSource | np.ndarray | PILImage.Image | None = None,
            array: np.ndarray | None = None,
            caption: str | None = None,
            provenance: Mapping[str, Any] | None = None,
        ) -> None: ...

    @classmethod
    def from_numpy(cls, array: np.ndarray, **fields: Any) -> Image:
        """uint8[H, W, 3], RGB."""
        return cls(array=_pixels(cls, array, "H, W, 3"), **fields)

    @classmethod
    def from_pil(cls, picture: PILImage.Image, **fields: Any) -> Image:
        """A picture of Pillow's as its file would be read: upright by EXIF, on white where it is
        transparent, deep grey scaled to 8 bits."""
        from mmllm.media import image

        return cls(array=image.from_pil(picture), **fields)

    def to_pil(self) -> PILImage.Image:
        from PIL import Image as PILImage

        return PILImage.fromarray(self.to_numpy())

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as Pillow has them."""
        height, width, _ = self.to_numpy().shape
        return width, height

    def _decoded_data(self, data: Any) -> np.ndarray:
        if isinstance(data, np.ndarray):
            return _pixels(type(self), data, "H, W, 3")
        if not hasattr(data, "getexif"):  # no picture of Pillow's
            return super()._decoded_data(data)
        from mmllm.media import image

        return image.from_pil(data)


@dataclass(frozen=True, eq=False, repr=False)
class Audio(Medium):
    """A sound; decoded: float32[C, S] in [-1, 1] at `sample_rate` Hz."""

    sample_rate: int | None = None
    modality: ClassVar[str] = "audio"

    if TYPE_CHECKING:

        def __init__(
            self,
            source: MediaSource | np.ndarray | None = None,
            array: np.ndarray | None = None,
            caption: str | None = None,
            provenance: Mapping[str, Any] | None = None,
            sample_rate: int | None = None,
        ) -> None: ...

    @classmethod
    def from_numpy(cls, array: np.ndarray, sample_rate: int, **fields: Any) -> Audio:
        """float32[C, S] or float32[S] in [-1, 1], `sample_rate` in Hz. A little more is clipped."""
        return cls(array=_samples(array), sample_rate=_rate(sample_rate), **fields)

    @property
    def seconds(self) -> float:
        """How long it is."""
        decoded = self.decoded()
        assert isinstance(decoded, Audio)
        assert decoded.array is not None
        return decoded.array.shape[-1] / _rate(decoded.sample_rate)

    def _decoded_data(self, data: Any) -> np.ndarray:
        if not isinstance(data, np.ndarray):
            return super()._decoded_data(data)
        if self.sample_rate is None:
            raise MediaError("Audio(array): of which sample_rate? Audio(array, sample_rate=16000)")
        object.__setattr__(self, "sample_rate", _rate(self.sample_rate))
        return _samples(data)


@dataclass(frozen=True, eq=False, repr=False)
class Video(Medium):
    """A video; decoded: uint8[F, H, W, 3], RGB, at `fps` frames per second, maybe with `audio`."""

    fps: float | None = None
    audio: Audio | None = None
    modality: ClassVar[str] = "video"

    if TYPE_CHECKING:

        def __init__(
            self,
            source: MediaSource | np.ndarray | None = None,
            array: np.ndarray | None = None,
            caption: str | None = None,
            provenance: Mapping[str, Any] | None = None,
            fps: float | None = None,
            audio: Audio | None = None,
        ) -> None: ...

    @classmethod
    def from_numpy(cls, array: np.ndarray, fps: float, **fields: Any) -> Video:
        """uint8[F, H, W, 3], RGB, `fps` in frames per second."""
        array = _pixels(cls, array, "F, H, W, 3")
        if not _is_number(fps) or fps <= 0:
            raise MediaError(f"Video.from_numpy: expected fps > 0, got {quoted(fps)}")
        return cls(array=array, fps=float(fps), **fields)

    def to_pil(self) -> list[PILImage.Image]:
        """One picture a frame."""
        from PIL import Image as PILImage

        return [PILImage.fromarray(frame) for frame in self.to_numpy()]

    @property
    def seconds(self) -> float:
        """How long it is."""
        decoded = self.decoded()
        assert isinstance(decoded, Video)
        assert decoded.array is not None
        assert decoded.fps
        return len(decoded.array) / decoded.fps

    def _decoded_data(self, data: Any) -> np.ndarray:
        if not isinstance(data, np.ndarray):
            return super()._decoded_data(data)
        if not _is_number(self.fps):
            raise MediaError("Video(array): how many frames a second? Video(array, fps=8)")
        return Video.from_numpy(data, self.fps).to_numpy()  # pyright: ignore[reportArgumentType]


MEDIA: dict[str, type[Medium]] = {kind.modality: kind for kind in (Image, Audio, Video)}
"""Modality -> class. A new modality is one more entry."""

ContentPart: TypeAlias = Text | Medium


@dataclass(frozen=True)
class Message:
    """What one speaker said: text and media in order."""

    role: Role
    parts: tuple[ContentPart, ...] = field(default=())

    @property
    def text(self) -> str:
        """The message's text, its media left out."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def media(self) -> list[Medium]:
        """The message's media, in order."""
        return [part for part in self.parts if isinstance(part, Medium)]

    def with_parts(self, parts: Sequence[ContentPart]) -> Message:
        return replace(self, parts=tuple(parts))


Conversation: TypeAlias = Sequence[Message]


def message(role: Role, *parts: str | ContentPart) -> Message:
    """A message of `role`; strings become Text."""
    typed: list[ContentPart] = []
    for part in parts:
        if isinstance(part, str):
            typed.append(Text(part))
        elif isinstance(part, Text | Medium):
            typed.append(part)
        else:
            raise TypeError(
                f"{role}(...): expected str, Text, Image, Audio or Video, got {type(part).__name__}"
            )
    return Message(role, tuple(typed))


def system(*parts: str | ContentPart) -> Message:
    """`system("Answer in one word.")`."""
    return message("system", *parts)


def user(*parts: str | ContentPart) -> Message:
    """`user("What is this?", Image("cat.png"))`."""
    return message("user", *parts)


def assistant(*parts: str | ContentPart) -> Message:
    """`assistant("Here it is: ", Image("apple.png"))`."""
    return message("assistant", *parts)


HIGHEST_RATE = 1_000_000
"""Samples per second that any recorder takes."""
_MOST_CHANNELS = 64
_LOUDEST = 2.0
"""Of floats that are meant for [-1, 1]: resampling and mixing go a little beyond."""


def _array(where: str, data: Any) -> np.ndarray:
    """Data as an array, or a MediaError: lists may be ragged, and tensors of torch may have a
    gradient, lie on a device or be of a type that numpy has not."""
    try:
        return np.asarray(data)
    except (TypeError, ValueError, RuntimeError) as error:
        remedy = "; of a tensor of torch give .detach().float().cpu().numpy()"
        raise MediaError(
            f"{where}: expected an array, got {type(data).__name__} ({error})"
            f"{remedy if hasattr(data, 'detach') else ''}"
        ) from error


def _pixels(kind: type, array: np.ndarray, layout: str) -> np.ndarray:
    """The array itself, or a MediaError that names what was expected."""
    array = _array(f"{kind.__name__}.from_numpy", array)
    ndim = layout.count(",") + 1
    if array.ndim == ndim and array.dtype == np.uint8 and array.shape[-1] == 3 and array.size:
        return array
    remedy = ""
    if array.dtype != np.uint8:
        remedy = "; scale it to 0 … 255 and cast it: .astype(np.uint8)"
    elif array.ndim == ndim and array.shape[-1] == 4:
        remedy = "; lay what is transparent on a background, as Image.from_pil(...) does"
    elif array.ndim == ndim and array.shape[-3] == 3:
        remedy = "; move the channels to the end: np.moveaxis(array, -3, -1)"
    elif array.ndim == ndim - 1 or (array.ndim == ndim and array.shape[-1] == 1):
        remedy = "; of grey make three equal channels: np.repeat(array, 3, axis=-1)"
    raise MediaError(
        f"{kind.__name__}.from_numpy: expected a non-empty uint8[{layout}], RGB, got "
        f"{array.dtype}{list(array.shape)}{remedy}"
    )


def _samples(array: np.ndarray) -> np.ndarray:
    """float32[C, S] in [-1, 1], or a MediaError that names what was expected."""
    where = "Audio.from_numpy: "
    array = np.atleast_2d(_array("Audio.from_numpy", array))
    if array.ndim != 2 or array.dtype != np.float32 or not array.size:
        remedy = ""
        if np.issubdtype(array.dtype, np.integer):
            remedy = "; scale it to [-1, 1]: int16 is .astype(np.float32) / 32768"
        elif array.dtype != np.float32:
            remedy = "; cast it: .astype(np.float32)"
        raise MediaError(
            f"{where}expected a non-empty float32[C, S] or float32[S], got "
            f"{array.dtype}{list(array.shape)}{remedy}"
        )
    channels, samples = array.shape
    if channels > min(samples, _MOST_CHANNELS):
        raise MediaError(
            f"{where}expected float32[C, S], got {channels} channels of {samples} samples; "
            "transpose it: array.T"
        )
    lowest, highest = float(array.min()), float(array.max())
    if not np.isfinite([lowest, highest]).all():
        raise MediaError(f"{where}expected finite values, got NaN or infinity among them")
    loudest = max(-lowest, highest)
    if loudest > _LOUDEST:
        raise MediaError(
            f"{where}expected values in [-1, 1], got up to {loudest:.6g}; divide by the largest "
            "value of the format, such as 32768 for 16 bits"
        )
    return array if loudest <= 1 else array.clip(-1, 1)


def _rate(rate: Any) -> int:
    """A sampling rate as an int, of which libraries make floats and numpy's numbers."""
    if not _is_number(rate) or rate != int(rate) or not 0 < rate <= HIGHEST_RATE:
        raise MediaError(
            f"Audio.from_numpy: expected a sample_rate of at most {HIGHEST_RATE}, in whole Hz > 0, "
            f"got {quoted(rate)}"
        )
    return int(rate)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float | np.number | Fraction)
        and not isinstance(value, bool)
        and bool(np.isfinite(float(value)))
    )
