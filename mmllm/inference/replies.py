"""A reply with its usage and timings: plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmllm.conversation import Audio, Image, Medium, Message, Text, Video
from mmllm.errors import MediaError

if TYPE_CHECKING:
    from mmllm.reasoning.verified import Verification

M = TypeVar("M", bound=Medium)


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens of one turn.

    Attributes:
        prompt: of the whole conversation, the placeholders of its media included.
        cached: how many of these came from a key-value cache, of an earlier turn or of the prefix
            that all conversations share (the template's beginning and the system prompt).
        text: text tokens of the reply.
        signals: signal tokens of the reply.
    """

    prompt: int = 0
    cached: int = 0
    text: int = 0
    signals: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds since the call came, waiting for other calls included.

    Attributes:
        first_token: to the first token.
        text: to the end of the text.
        total: to the end.
        media: output key -> seconds that its media took.
    """

    first_token: float = 0.0
    text: float = 0.0
    total: float = 0.0
    media: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, repr=False)
class Reply:
    """A reply of the model.

    Attributes:
        message: text and media in order.
        seed: repeats the reply.
        ids: ids of the text tokens.
        finish: "end", "length" (the limit of tokens) or "stop" (a stop string).
        notes: what the caller should know, e.g. that the context was full.
        usage: numbers of tokens.
        timings: seconds.
        verification: how many tries `reply(…, verify=…)` took, and why; None without it.
    """

    message: Message
    seed: int
    ids: list[int]
    finish: str = "end"
    notes: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings, compare=False)
    verification: Verification | None = None

    def __repr__(self) -> str:
        media = f", media={self.media}" if self.media else ""
        return f"Reply({self.text!r}{media}, seed={self.seed}, finish={self.finish!r})"

    def __str__(self) -> str:
        """The text, with the modality of each medium in brackets where it stands."""
        parts = self.message.parts
        return " ".join(p.text.strip() if isinstance(p, Text) else f"[{p.modality}]" for p in parts)

    @property
    def text(self) -> str:
        """The text, without the media."""
        return self.message.text

    @property
    def media(self) -> list[Medium]:
        """All media, in order."""
        return self.message.media

    @property
    def images(self) -> list[Image]:
        """The images, in order."""
        return self._all(Image)

    @property
    def audios(self) -> list[Audio]:
        """The audios, in order."""
        return self._all(Audio)

    @property
    def videos(self) -> list[Video]:
        """The videos, in order."""
        return self._all(Video)

    @property
    def image(self) -> Image | None:
        """The first image; None without one."""
        return next(iter(self.images), None)

    @property
    def audio(self) -> Audio | None:
        """The first audio; None without one."""
        return next(iter(self.audios), None)

    @property
    def video(self) -> Video | None:
        """The first video; None without one."""
        return next(iter(self.videos), None)

    def save(self, path: str | Path) -> list[Path]:
        """Write the media to files.

        Args:
            path: a file, if it has a suffix, for the one medium of the reply; else a folder, in
                which the media are image-1.png, audio-2.wav, video-3.mp4.

        Returns:
            The files that were written.

        Raises:
            MediaError: for a reply without media, for several of them and a single file, and as
                `Medium.save`.
        """
        if not self.media:
            raise MediaError("the reply holds no media to save; reply.text is its text")
        path = Path(path)
        if path.suffix:
            if len(self.media) > 1:
                raise MediaError(
                    f"{path}: the reply holds {len(self.media)} media; give a folder, or save "
                    "each: reply.media[0].save(…)"
                )
            return [self.media[0].save(path)]
        suffixes = {"image": "png", "audio": "wav", "video": "mp4"}
        return [
            medium.save(path / f"{medium.modality}-{number}.{suffixes[medium.modality]}")
            for number, medium in enumerate(self.media, start=1)
        ]

    def show(self) -> None:
        """Show every medium; see `Medium.show`."""
        for medium in self.media:
            medium.show()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """What a notebook shows: the text, images and players, in order."""
        from mmllm.media import display

        return display.mimebundle(self.message.parts, repr(self))

    def _all(self, kind: type[M]) -> list[M]:
        return [medium for medium in self.media if isinstance(medium, kind)]
