"""A request -> a conversation and options, its media checked and decoded within limits.

Pictures and sounds are decoded here, beside the engine, so that a bad one is told at once and a
slow one holds nobody up; of clips one frame is read, and the encoders take the frames they want.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmllm import media
from mmllm.conversation import MEDIA, Medium, Message, Role, Text, Video
from mmllm.conversation import Part as Said
from mmllm.errors import MediaError
from mmllm.generation import Choice, Sampling
from mmllm.server import remote
from mmllm.server import schemas as api
from mmllm.server.engine import Options
from mmllm.server.errors import bad, told
from mmllm.server.settings import Settings

_DATA = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.+-]+=[\w.+\"-]*)*;base64,", re.ASCII)
_AT_ONCE = 4
"""Media that are decoded at the same time, of all requests."""


class Intake:
    """Reads the requests of one server. `makes`: modality that its model can make -> the options
    of the decoder."""

    def __init__(self, settings: Settings, makes: Mapping[str, Sequence[str]]):
        self.settings = settings
        self.makes = makes
        self._tokens = min(Sampling.max_new_tokens, settings.tokens)
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def conversation(self, messages: Sequence[api.AnyMessage]) -> list[Message]:
        """Raises ApiError (400) that names the part."""
        parts = [list(_parts(message, f"messages.{n}")) for n, message in enumerate(messages)]
        self._check([entry for of_message in parts for entry in of_message])
        budget = _Budget(self.settings.given.decoded_bytes)
        return [
            Message(_role(message), tuple([await self._read(*entry, budget) for entry in found]))
            for message, found in zip(messages, parts, strict=True)
        ]

    def check_text(self, text: str, param: str) -> None:
        if len(text) > self.settings.characters:
            raise bad(
                f"{param}: {len(text)} characters of text, more than {self.settings.characters}",
                param,
                "context_length_exceeded",
            )

    def chat_options(self, body: api.ChatRequest) -> Options:
        """What `Chat.reply` is called with."""
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise bad("max_tokens and max_completion_tokens mean the same: give one", "max_tokens")
        tokens = body.max_completion_tokens or body.max_tokens
        self._bound("max_tokens", tokens, self.settings.tokens)
        self._bound("max_media", body.max_media, self.settings.made)
        sampling = {
            "max_new_tokens": tokens or self._tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "repetition_penalty": body.repetition_penalty,
            "max_media": body.max_media,
            "stop": [body.stop] if isinstance(body.stop, str) else body.stop,
        }
        decoders = {
            modality: self.decoder_options(given, f"decoders.{modality}")
            for modality, given in (body.decoders or {}).items()
        }
        for param, names in (("decoders", decoders), ("modalities", body.modalities or ())):
            for name in names:
                if name not in self.makes and (name, param) != ("text", "modalities"):
                    made = ", ".join(["text", *self.makes])
                    raise bad(f"{param}: unknown {name!r}; this model makes {made}", param)
        return Options(
            modalities=self._choices(body.modalities),
            decoders=decoders,
            sampling={name: value for name, value in sampling.items() if value is not None},
        )

    def only(self, modality: str, given: Mapping[str, Any]) -> Options:
        """Options of a request for one medium of one modality."""
        if modality not in self.makes:
            made = ", ".join(["text", *self.makes])
            raise bad(f"this model makes no {modality}; it makes {made}", code="not_supported")
        for name in given.keys() - set(self.makes[modality]):
            known = ", ".join(self.makes[modality])
            raise bad(f"{name}: this model's {modality} decoder takes {known}", f"decoder.{name}")
        choices: dict[str, Choice] = dict.fromkeys(self.makes, "forbid")
        return Options(
            modalities={**choices, modality: "force"},
            decoders={modality: given} if given else {},
            sampling={"max_media": 1, "max_new_tokens": self._tokens},
        )

    def decoder_options(
        self,
        given: api.DecoderOptions | None,
        param: str,
        *,
        size: str | None = None,
        seconds: str | float | None = None,
    ) -> dict[str, Any]:
        """The options that were given, `size` (WIDTHxHEIGHT) and `seconds` among them."""
        options = given.model_dump(exclude_none=True) if given else {}
        extra: dict[str, Any] = {} if seconds is None else {"seconds": float(seconds)}
        if size is not None and size != "auto":
            width, height = size.split("x")
            extra |= {"width": int(width), "height": int(height)}
        if twice := sorted(extra.keys() & options.keys()):
            raise bad(f"{param}.{twice[0]}: given twice, by another field too", param)
        options |= extra
        allowed = self.settings
        self._bound(f"{param}.steps", options.get("steps"), allowed.steps)
        self._bound(f"{param}.seconds", options.get("seconds"), allowed.made_seconds)
        self._bound(f"{param}.frames", options.get("frames"), allowed.made_frames)
        pixels = options.get("width", 1) * options.get("height", 1)
        self._bound(f"{param}: width x height", pixels, allowed.made_pixels)
        volume = pixels * options.get("frames", 1)
        self._bound(f"{param}: width x height x frames", volume, allowed.made_volume)
        self.check_text(options.get("negative", ""), f"{param}.negative")
        if options.get("seconds") == 0:
            raise bad(f"{param}.seconds: expected more than 0", param)
        return options

    def _choices(self, given: list[str] | Mapping[str, Choice] | None) -> dict[str, Choice]:
        if not isinstance(given, list):
            if "text" in (given or {}):
                raise bad("modalities: text is in every reply; name media only", "modalities")
            return dict(given or {})
        if "text" not in given:
            raise bad('modalities: a reply always may hold text; add "text"', "modalities")
        return {name: "auto" if name in given else "forbid" for name in self.makes}

    def _bound(self, param: str, value: float | None, most: float) -> None:
        if value is not None and value > most:
            raise bad(f"{param}: expected at most {most:g}, got {value:g}", param)

    def _check(self, parts: Sequence[tuple[str, api.AnyPart]]) -> None:
        """What can be said before anything is decoded or fetched."""
        self.check_text(
            "".join(part.text for _, part in parts if isinstance(part, api.TextPart)), "messages"
        )
        shown = [param for param, part in parts if not isinstance(part, api.TextPart)]
        if len(shown) > self.settings.media:
            raise bad(
                f"{shown[-1]}: {len(shown)} pictures, sounds and clips, more than "
                f"{self.settings.media}",
                shown[-1],
            )

    async def _read(self, param: str, part: api.AnyPart, budget: _Budget) -> Said:
        if isinstance(part, api.TextPart):
            return Text(part.text)
        if isinstance(part, api.ImagePart):
            modality, param, where = "image", f"{param}.image_url.url", part.image_url.url
        elif isinstance(part, api.VideoPart):
            modality, param, where = "video", f"{param}.video_url.url", part.video_url.url
        else:
            modality, param = "audio", f"{param}.input_audio.data"
            where = f"data:;base64,{part.input_audio.data}"
        if found := _DATA.match(where):
            data = self._decoded(where[found.end() :], param)
        elif where.startswith("data:"):
            raise bad(f"{param}: expected data:TYPE;base64,…", param, "invalid_url")
        else:
            data = await remote.fetch(where, self.settings, param)
        async with self._slots:
            try:
                return await asyncio.to_thread(
                    _checked, MEDIA[modality](source=data), self.settings, budget
                )
            except MediaError as error:
                raise told(error, param) from error

    def _decoded(self, text: str, param: str) -> bytes:
        """Base64 -> bytes."""
        most = self.settings.given.bytes
        if len(text) * 3 // 4 > most + 2:
            raise bad(f"{param}: more than {most} bytes", param)
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise bad(f"{param}: not base64 ({error})", param) from error


class _Budget:
    """Bytes that the media of one request may still take when they are decoded."""

    def __init__(self, left: int):
        self.left = left


def _checked(medium: Medium, settings: Settings, budget: _Budget) -> Medium:
    """A medium that can be decoded, and is unless it is a clip."""
    with media.limits(replace(settings.given, decoded_bytes=budget.left)):
        if isinstance(medium, Video):
            media.sample_frames(medium, 1)
            return medium
        medium = media.decode(medium)
    assert medium.array is not None
    budget.left -= medium.array.nbytes
    return medium


def _role(message: api.AnyMessage) -> Role:
    return "system" if message.role == "developer" else message.role


def _parts(message: api.AnyMessage, where: str) -> Iterator[tuple[str, api.AnyPart]]:
    """(the path of a part in the request, the part), in order."""
    if isinstance(message, api.AssistantMessage) and message.parts is not None:
        for number, part in enumerate(message.parts):
            yield f"{where}.parts.{number}", part
        return
    if isinstance(message.content, str):
        yield f"{where}.content", api.TextPart(type="text", text=message.content)
    else:
        for number, part in enumerate(message.content or ()):
            yield f"{where}.content.{number}", part
    if isinstance(message, api.AssistantMessage):
        for number, part in enumerate(message.images or ()):
            yield f"{where}.images.{number}", part
        if message.audio is not None:
            if message.audio.data is None:
                raise bad(
                    f"{where}.audio: this server keeps no sounds; send `data` too",
                    f"{where}.audio",
                )
            sound = api.InputAudio(data=message.audio.data)
            yield f"{where}.audio", api.AudioPart(type="input_audio", input_audio=sound)
