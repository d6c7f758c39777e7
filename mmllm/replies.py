"""A reply, and the events by which it comes: plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from mmllm.conversation import Audio, Image, Medium, Message, Text, Video
from mmllm.errors import MediaError

M = TypeVar("M", bound=Medium)


@dataclass(frozen=True)
class Usage:
    """Tokens of a turn. `prompt`: of the whole conversation, its media's placeholders included;
    `cached`: how many of these were read before, as an earlier turn's or as the opening of all
    (the template's and the system prompt); `text` and `signals`: of the reply."""

    prompt: int = 0
    cached: int = 0
    text: int = 0
    signals: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds since the request came (waiting for others included) to the first token, the end of
    the text and the end; `media`: seconds that each decoder took, by its key."""

    first_token: float = 0.0
    text: float = 0.0
    total: float = 0.0
    media: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Reply:
    """What the model answered: `message` holds text and media in order. `seed` repeats it; `notes`
    tells what the caller should know; `finish`: "end", "length" (the limit of tokens) or "stop" (a
    stop string)."""

    message: Message
    seed: int
    ids: list[int]
    finish: str = "end"
    notes: tuple[str, ...] = ()
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings, compare=False)

    def __repr__(self) -> str:
        media = f", media={self.media}" if self.media else ""
        return f"Reply({self.text!r}{media}, seed={self.seed}, finish={self.finish!r})"

    def __str__(self) -> str:
        """The text, with the kind of each medium in brackets where it stands."""
        parts = self.message.parts
        return " ".join(p.text.strip() if isinstance(p, Text) else f"[{p.modality}]" for p in parts)

    @property
    def text(self) -> str:
        """The text, the media left out."""
        return self.message.text

    @property
    def media(self) -> list[Medium]:
        """All media, in order."""
        return self.message.media

    @property
    def images(self) -> list[Image]:
        """The pictures, in order."""
        return self._all(Image)

    @property
    def audios(self) -> list[Audio]:
        """The sounds, in order."""
        return self._all(Audio)

    @property
    def videos(self) -> list[Video]:
        """The clips, in order."""
        return self._all(Video)

    @property
    def image(self) -> Image | None:
        """The first picture; None without one."""
        return next(iter(self.images), None)

    @property
    def audio(self) -> Audio | None:
        """The first sound; None without one."""
        return next(iter(self.audios), None)

    @property
    def video(self) -> Video | None:
        """The first clip; None without one."""
        return next(iter(self.videos), None)

    def save(self, path: str | Path) -> list[Path]:
        """Write the media: into the file `path`, if it has a suffix and there is one medium; into a
        folder otherwise, as image-1.png, audio-2.wav, video-3.mp4.

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
        """What a notebook shows: the text, pictures and players, in order."""
        from mmllm.media import display

        return display.mimebundle(self.message.parts, repr(self))

    def _all(self, kind: type[M]) -> list[M]:
        return [medium for medium in self.media if isinstance(medium, kind)]


@dataclass(frozen=True)
class TextDelta:
    """More text of part `part_index` of the message."""

    part_index: int
    text: str


@dataclass(frozen=True)
class MediumStarted:
    """Part `part_index` will be a medium; it is made while the text goes on."""

    part_index: int
    modality: str


@dataclass(frozen=True)
class Progress:
    """Denoising step `step` of `steps` is done; `preview` now and then, where there is one."""

    part_index: int
    modality: str
    step: int
    steps: int
    preview: Image | None = None


@dataclass(frozen=True)
class MediumReady:
    """Part `part_index` of the message."""

    part_index: int
    medium: Medium


@dataclass(frozen=True)
class Done:
    """The last event: the reply as `Chat.reply` gives it."""

    reply: Reply


Event: TypeAlias = TextDelta | MediumStarted | Progress | MediumReady | Done
