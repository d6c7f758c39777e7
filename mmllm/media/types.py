"""The public types of media: Image, Audio, Video.

Legend: H x W pixels, F frames, S samples, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, cast

import numpy as np

from mmllm.errors import MediaError, quoted
from mmllm.media import arrays, codecs, image
from mmllm.media.audio import resample
from mmllm.media.files import MediaSource
from mmllm.media.info import MediaContent
from mmllm.media.medium import Medium

if TYPE_CHECKING:
    from PIL import Image as PILImage


@dataclass(frozen=True, eq=False, repr=False)
class Image(Medium):
    """An image; decoded: uint8[H, W, 3], RGB."""

    modality: ClassVar[str] = "image"

    if TYPE_CHECKING:  # the types that `Medium.__post_init__` accepts

        def __init__(
            self,
            source: MediaSource | BinaryIO | np.ndarray | PILImage.Image | None = None,
            array: np.ndarray | None = None,
            caption: str | None = None,
            provenance: Mapping[str, Any] | None = None,
            *,
            max_tokens: int | None = None,
        ) -> None: ...

    @classmethod
    def from_numpy(cls, array: np.ndarray, **fields: Any) -> Image:
        """Create an image from uint8[H, W, 3], RGB.

        Args:
            array: the pixels.
            **fields: other fields, such as `caption`.

        Raises:
            MediaError: another dtype or shape; the message names the remedy.
        """
        return cls(array=arrays.check_pixels(array, "H, W, 3", cls.__name__), **fields)

    @classmethod
    def from_pil(cls, picture: PILImage.Image, **fields: Any) -> Image:
        """Create an image from a Pillow image, converted as its file would be decoded: rotated by
        EXIF, on white where it is transparent, scaled to 8 bits.

        Args:
            picture: the Pillow image.
            **fields: other fields, such as `caption`.

        Raises:
            MediaError: the image is empty or damaged.
        """
        return cls(array=image.from_pil(picture), **fields)

    def to_pil(self) -> PILImage.Image:
        """Return the image as a Pillow image."""
        from PIL import Image as PILImage

        return PILImage.fromarray(self.to_numpy())

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, in Pillow's order."""
        height, width, _ = self.to_numpy().shape
        return width, height

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.size[1]

    def _check_data(self, data: Any) -> np.ndarray:
        if isinstance(data, np.ndarray):
            return arrays.check_pixels(data, "H, W, 3", type(self).__name__)
        if not hasattr(data, "getexif"):  # no Pillow image
            return super()._check_data(data)
        return image.from_pil(data)


@dataclass(frozen=True, eq=False, repr=False)
class Audio(Medium):
    """Audio; decoded: float32[C, S] in [-1, 1] at `sample_rate` Hz."""

    sample_rate: int | None = None
    modality: ClassVar[str] = "audio"

    if TYPE_CHECKING:

        def __init__(
            self,
            source: MediaSource | BinaryIO | np.ndarray | None = None,
            array: np.ndarray | None = None,
            caption: str | None = None,
            provenance: Mapping[str, Any] | None = None,
            sample_rate: int | None = None,
            *,
            max_tokens: int | None = None,
        ) -> None: ...

    @classmethod
    def from_numpy(cls, array: np.ndarray, sample_rate: int, **fields: Any) -> Audio:
        """Create audio from float32[C, S] or float32[S] in [-1, 1]; slightly larger values are
        clipped.

        Args:
            array: the samples.
            sample_rate: in Hz.
            **fields: other fields, such as `caption`.

        Raises:
            MediaError: another dtype, shape, range or sample rate; the message names the remedy.
        """
        samples, rate = arrays.check_samples(array), arrays.check_sample_rate(sample_rate)
        return cls(array=samples, sample_rate=rate, **fields)

    @property
    def seconds(self) -> float:
        """The duration in seconds."""
        audio = self.decoded()
        assert audio.array is not None
        return audio.array.shape[-1] / arrays.check_sample_rate(audio.sample_rate)

    def content(self) -> MediaContent:
        """Return the decoded content, as it would be written to a file. Raises MediaError."""
        audio = self.decoded()
        if not audio.sample_rate or audio.sample_rate <= 0:
            raise MediaError(
                f"{audio!r}: expected a positive sample rate, got {audio.sample_rate}; pass "
                "sample_rate=..."
            )
        return replace(super().content(), sample_rate=audio.sample_rate)

    def resample(self, rate: int, mono: bool = True) -> Audio:
        """Return the same audio at another sample rate.

        Args:
            rate: the new sample rate in Hz.
            mono: whether to average the channels into one.

        Raises:
            MediaError: see `mmllm.media.decode` and `mmllm.media.resample`.
        """
        audio = self.decoded()
        content = audio.content()
        assert content.sample_rate
        samples = resample(content.array, content.sample_rate, rate, mono=mono, name=repr(audio))
        return replace(audio, source=None, array=samples, sample_rate=rate)

    def _fields(self, content: MediaContent) -> dict[str, Any]:
        return {**super()._fields(content), "sample_rate": content.sample_rate}

    def _check_data(self, data: Any) -> np.ndarray:
        if not isinstance(data, np.ndarray):
            return super()._check_data(data)
        if self.sample_rate is None:
            raise MediaError("Audio(array): of which sample_rate? Audio(array, sample_rate=16000)")
        object.__setattr__(self, "sample_rate", arrays.check_sample_rate(self.sample_rate))
        return arrays.check_samples(data)


@dataclass(frozen=True, eq=False, repr=False)
class Video(Medium):
    """A video; decoded: uint8[F, H, W, 3], RGB, at `fps` frames per second, maybe with `audio`."""

    fps: float | None = None
    audio: Audio | None = None
    modality: ClassVar[str] = "video"

    if TYPE_CHECKING:

        def __init__(
            self,
            source: MediaSource | BinaryIO | np.ndarray | None = None,
            array: np.ndarray | None = None,
            caption: str | None = None,
            provenance: Mapping[str, Any] | None = None,
            fps: float | None = None,
            audio: Audio | None = None,
            *,
            max_tokens: int | None = None,
        ) -> None: ...

    @classmethod
    def from_numpy(cls, array: np.ndarray, fps: float, **fields: Any) -> Video:
        """Create a video from uint8[F, H, W, 3], RGB.

        Args:
            array: the frames.
            fps: frames per second.
            **fields: other fields, such as `caption` or `audio`.

        Raises:
            MediaError: another dtype, shape or frame rate; the message names the remedy.
        """
        array = arrays.check_pixels(array, "F, H, W, 3", cls.__name__)
        if not arrays.is_number(fps) or fps <= 0:
            raise MediaError(f"Video.from_numpy: expected fps > 0, got {quoted(fps)}")
        return cls(array=array, fps=float(fps), **fields)

    def to_pil(self) -> list[PILImage.Image]:
        """Return the frames as Pillow images."""
        from PIL import Image as PILImage

        return [PILImage.fromarray(frame) for frame in self.to_numpy()]

    @property
    def seconds(self) -> float:
        """The duration in seconds."""
        video = self.decoded()
        assert video.array is not None
        assert video.fps
        return len(video.array) / video.fps

    def content(self) -> MediaContent:
        """Return the decoded content, as it would be written to a file. Raises MediaError."""
        video = self.decoded()
        track = video.audio.content() if video.audio is not None else None
        return replace(super().content(), fps=video.fps, audio=track)

    def sample_frames(
        self, num: int, sample: Callable[[MediaSource, int], np.ndarray] = codecs.sample_frames
    ) -> np.ndarray:
        """Return `num` evenly spaced frames: uint8[num, H, W, 3].

        The frames are the middles of `num` equal parts; a video of fewer frames repeats them. A
        file is read frame by frame, so that a video too long to be decoded whole
        (`Limits.decoded_bytes`) can still be sampled.

        Args:
            num: number of frames, at least 1.
            sample: reads frames of a file; `mmllm.media.isolated.sample_frames` for untrusted
                files.

        Raises:
            MediaError: see `mmllm.media.decode`.
        """
        if num < 1:
            raise ValueError(f"sample_frames: expected num >= 1, got {num}")
        if self.array is not None:
            count = len(self.array)
            return self.array[[int((i + 0.5) * count / num) for i in range(num)]]
        return sample(self.existing_source(), num)

    def presampled(
        self,
        nums: Iterable[int],
        sample: Callable[[MediaSource, int], np.ndarray] = codecs.sample_frames,
    ) -> Video:
        """Return the same video with its sampled frames in memory, so that later calls of
        `sample_frames` do not read the file again.

        Args:
            nums: the values of `num` with which `sample_frames` will be called.
            sample: see `sample_frames`.

        Raises:
            MediaError: see `mmllm.media.decode`.
        """
        if self.array is not None:
            return self
        return SampledVideo(
            source=self.source,
            caption=self.caption,
            provenance=self.provenance,
            fps=self.fps,
            audio=self.audio,
            max_tokens=self.max_tokens,
            sampled={num: self.sample_frames(num, sample) for num in nums},
        )

    def _fields(self, content: MediaContent) -> dict[str, Any]:
        track = content.audio
        audio = self.audio
        if track is not None:
            audio = Audio(array=track.array, sample_rate=track.sample_rate)
        return {**super()._fields(content), "fps": content.fps, "audio": audio}

    def _check_data(self, data: Any) -> np.ndarray:
        if not isinstance(data, np.ndarray):
            return super()._check_data(data)
        if not arrays.is_number(self.fps):
            raise MediaError("Video(array): how many frames a second? Video(array, fps=8)")
        return Video.from_numpy(cast("np.ndarray", data), self.fps).to_numpy()  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, eq=False, repr=False)
class SampledVideo(Video):
    """A video with sampled frames in memory.

    Attributes:
        sampled: num -> the result of `sample_frames(num)`, uint8[num, H, W, 3].
    """

    sampled: Mapping[int, np.ndarray] = field(default_factory=dict[int, np.ndarray])

    def sample_frames(
        self, num: int, sample: Callable[[MediaSource, int], np.ndarray] = codecs.sample_frames
    ) -> np.ndarray:
        """As of Video; frames in `sampled` are not read again."""
        if self.array is None and num in self.sampled:
            return self.sampled[num]
        return super().sample_frames(num, sample)


MEDIA: dict[str, type[Medium]] = {kind.modality: kind for kind in (Image, Audio, Video)}
"""Modality -> class of its media. A new modality is a new entry."""
