"""The base class of Image, Audio and Video: the source of a medium or its decoded array.

Legend: H x W pixels, F frames, S samples, C channels.
"""

# Values of users are checked at run time, whatever the annotation.
# pyright: reportUnnecessaryIsInstance=false
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, overload

import numpy as np

from mmllm.errors import MediaError, quoted
from mmllm.media import codecs, display
from mmllm.media.files import Embedded, MediaSource
from mmllm.media.info import MediaContent

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True, eq=False)
class Medium:
    """An image, audio or video: its source, its decoded array, or both.

    Attributes:
        source: a path, the bytes of a file, or a file inside another; opened on first use, within
            the limits of `mmllm.media`. A file that is open for reading is read at once. Decoded
            data (an array, a Pillow image) given as source becomes the `array`, validated as by
            `from_numpy` and `from_pil`.
        array: the decoded content, see `to_numpy`.
        caption: a description of the content; the target of decoder-side alignment.
        provenance: how the medium was generated; written into every saved file.
        max_tokens: how many tokens of the language model it may take at most, where its encoder
            reads media of any size or length; None: as many as the encoder's config says.
    """

    source: MediaSource | None = None
    array: np.ndarray | None = None
    caption: str | None = None
    provenance: Mapping[str, Any] | None = None
    max_tokens: int | None = field(default=None, kw_only=True)

    modality: ClassVar[str]
    """The key of encoders and decoders that this medium belongs to."""

    def __post_init__(self) -> None:
        budget: Any = self.max_tokens
        if budget is not None and (not isinstance(budget, int) or budget < 1):
            raise MediaError(f"max_tokens: expected a whole number from 1, got {quoted(budget)}")
        given: Any = self.source
        if hasattr(given, "read") and not isinstance(given, Embedded):  # an open file, a BytesIO
            object.__setattr__(self, "source", given.read())
        if self.source is not None and not isinstance(self.source, str | Path | bytes | Embedded):
            array = self._check_data(self.source)
            object.__setattr__(self, "source", None)
            object.__setattr__(self, "array", array)

    @classmethod
    def open(cls, source: Any) -> Self:
        """Make a medium of a source, as the constructor does, and decode it.

        Args:
            source: see `source`.

        Raises:
            MediaError: the source cannot be read as this medium.
        """
        medium = cls(source)
        medium.to_numpy()
        return medium

    def _check_data(self, data: Any) -> np.ndarray:
        """Return the array of decoded data that was given as source. Raises TypeError for other
        types, MediaError for invalid data."""
        name = type(self).__name__
        raise TypeError(
            f"{name}: expected a path or the bytes of a file, got {type(data).__name__}; for "
            f"decoded data use {name}.from_numpy(...)"
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return `to_numpy()`, so that `np.asarray(medium)` works."""
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
        """Whether there is a source or an array; False for a medium that is only a caption."""
        return self.source is not None or self.array is not None

    def decoded(self, decode: Callable[[MediaSource, str], MediaContent] = codecs.decode) -> Self:
        """Return the same medium with `array` filled.

        Args:
            decode: decodes a file of a modality; `mmllm.media.isolated.decode` for untrusted files.

        Raises:
            MediaError: see `mmllm.media.decode`.
        """
        if self.array is not None:
            return self
        return replace(self, **self._fields(decode(self.existing_source(), self.modality)))

    def _fields(self, content: MediaContent) -> dict[str, Any]:
        """Return the fields that are set from a file's content."""
        mark = self.provenance if self.provenance is not None else content.provenance
        return {"array": content.array, "provenance": mark}

    def tokens_within(self, limit: int) -> int:
        """Return the budget: `limit`, or less if `max_tokens` says so.

        Args:
            limit: the encoder's.
        """
        return limit if self.max_tokens is None else min(limit, self.max_tokens)

    def existing_source(self) -> MediaSource:
        """Return the source. Raises MediaError if there is none."""
        if self.source is None:
            raise MediaError(
                f"{self!r}: there is nothing to decode; give {type(self).__name__}(...) a path or "
                "the bytes of a file"
            )
        return self.source

    def content(self) -> MediaContent:
        """Return the decoded content, as it would be written to a file. Raises MediaError."""
        return MediaContent(self.to_numpy(), provenance=self.provenance)

    def to_numpy(self) -> np.ndarray:
        """Return the decoded array.

        Image: uint8[H, W, 3] RGB. Audio: float32[C, S] in [-1, 1]. Video: uint8[F, H, W, 3].

        Raises:
            MediaError: see `mmllm.media.decode`.
        """
        array = self.decoded().array
        assert array is not None
        return array

    @overload
    def save(self, path: str | Path) -> Path: ...
    @overload
    def save(self, path: BinaryIO, format: str | None = None) -> None: ...
    def save(self, path: str | Path | BinaryIO, format: str | None = None) -> Path | None:  # noqa: A002
        """Write the medium with its provenance; see `media.save`.

        Args:
            path: the file, whose suffix names the format; or a file open for writing, such as a
                BytesIO.
            format: of an open file: png, jpg, wav, mp4, …; by default png, wav or mp4.

        Returns:
            The path, with `~` expanded; None for an open file.

        Raises:
            MediaError: the suffix is unknown, the medium cannot be decoded, or the file cannot be
                written.
        """
        if not isinstance(path, str | Path):
            path.write(self.to_bytes(format.lower() if format else None))
            return None
        if format is not None:
            raise MediaError(f"{path}: the suffix names the format: leave format={format!r} out")
        path = codecs.output_path(path, self.modality)
        return codecs.save(self.decoded().content(), self.modality, path)

    def to_bytes(self, suffix: str | None = None) -> bytes:
        """Return the bytes of the file that `save` writes with this suffix; by default png, wav or
        mp4. Raises MediaError."""
        return display.to_bytes(self, suffix)

    def show(self) -> None:
        """Show the medium below the cell of a notebook, else in the system's viewer."""
        display.show(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """Return the notebook representation: an image or a player."""
        return display.mimebundle([self], repr(self))
