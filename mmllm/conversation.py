"""Conversations as plain data: text and media, in messages, in the order in which they were said.

Nothing here imports torch or opens a file before somebody asks for pixels or samples.
Legend: H x W pixels, F frames, S samples, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from PIL import Image as PILImage

Role: TypeAlias = Literal["system", "user", "assistant"]


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
    within the limits of `mmllm.media`. `caption` says what the medium shows: the target of
    decoder-side alignment.
    `provenance` is filled for generated media and is written into every file that is saved.
    """

    source: str | Path | bytes | Embedded | None = None
    array: np.ndarray | None = None
    caption: str | None = None
    provenance: Mapping[str, Any] | None = None

    modality: ClassVar[str]
    """The key of encoders and decoders that this medium belongs to."""

    def __post_init__(self) -> None:
        if self.source is not None and not isinstance(self.source, str | Path | bytes | Embedded):
            raise TypeError(
                f"{type(self).__name__}: expected a path or the bytes of a file, got "
                f"{type(self.source).__name__}; for decoded data use "
                f"{type(self).__name__}.from_numpy(...)"
            )

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


@dataclass(frozen=True, eq=False, repr=False)
class Image(Medium):
    """A picture; decoded: uint8[H, W, 3], RGB."""

    modality: ClassVar[str] = "image"

    @classmethod
    def from_numpy(cls, array: np.ndarray, **fields: Any) -> Image:
        """uint8[H, W, 3], RGB."""
        return cls(array=_checked(cls, array, ndim=3, dtype=np.uint8), **fields)

    @classmethod
    def from_pil(cls, picture: PILImage.Image, **fields: Any) -> Image:
        return cls.from_numpy(np.asarray(picture.convert("RGB")), **fields)

    def to_pil(self) -> PILImage.Image:
        from PIL import Image as PILImage

        return PILImage.fromarray(self.to_numpy())


@dataclass(frozen=True, eq=False, repr=False)
class Audio(Medium):
    """A sound; decoded: float32[C, S] in [-1, 1] at `sample_rate` Hz."""

    sample_rate: int | None = None
    modality: ClassVar[str] = "audio"

    @classmethod
    def from_numpy(cls, array: np.ndarray, sample_rate: int, **fields: Any) -> Audio:
        """float32[C, S] or float32[S] in [-1, 1], `sample_rate` in Hz."""
        array = _checked(cls, np.atleast_2d(array), ndim=2, dtype=np.float32)
        return cls(array=array, sample_rate=sample_rate, **fields)


@dataclass(frozen=True, eq=False, repr=False)
class Video(Medium):
    """A clip; decoded: uint8[F, H, W, 3], RGB, at `fps` frames per second; may carry a `sound`."""

    fps: float | None = None
    sound: Audio | None = None
    modality: ClassVar[str] = "video"

    @classmethod
    def from_numpy(cls, array: np.ndarray, fps: float, **fields: Any) -> Video:
        """uint8[F, H, W, 3], RGB, `fps` in frames per second."""
        return cls(array=_checked(cls, array, ndim=4, dtype=np.uint8), fps=fps, **fields)

    def to_pil(self) -> list[PILImage.Image]:
        """One picture a frame."""
        from PIL import Image as PILImage

        return [PILImage.fromarray(frame) for frame in self.to_numpy()]


MEDIA: dict[str, type[Medium]] = {kind.modality: kind for kind in (Image, Audio, Video)}
"""Modality -> class. A new modality is one more entry."""

Part: TypeAlias = Text | Medium


@dataclass(frozen=True)
class Message:
    """What one speaker said: text and media in order."""

    role: Role
    parts: tuple[Part, ...] = field(default=())

    @property
    def text(self) -> str:
        """The message's text, its media left out."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def media(self) -> list[Medium]:
        """The message's media, in order."""
        return [part for part in self.parts if isinstance(part, Medium)]

    def with_parts(self, parts: Sequence[Part]) -> Message:
        return replace(self, parts=tuple(parts))


Conversation: TypeAlias = Sequence[Message]


def message(role: Role, *parts: str | Part) -> Message:
    """A message of `role`; strings become Text."""
    typed: list[Part] = []
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


def system(*parts: str | Part) -> Message:
    """`system("Answer in one word.")`."""
    return message("system", *parts)


def user(*parts: str | Part) -> Message:
    """`user("What is this?", Image("cat.png"))`."""
    return message("user", *parts)


def assistant(*parts: str | Part) -> Message:
    """`assistant("Here it is: ", Image("apple.png"))`."""
    return message("assistant", *parts)


def _checked(kind: type, array: np.ndarray, *, ndim: int, dtype: type) -> np.ndarray:
    """The array itself, or an error that names what was expected."""
    array = np.asarray(array)
    if array.ndim != ndim or array.dtype != dtype or 0 in array.shape:
        raise ValueError(
            f"{kind.__name__}.from_numpy: expected a non-empty {np.dtype(dtype)} array with {ndim} "
            f"dimensions, got {array.dtype}{list(array.shape)}"
        )
    return array
