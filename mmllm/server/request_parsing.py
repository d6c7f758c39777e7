"""A request -> a conversation and options, its media checked and decoded within limits.

Media are decoded here, in processes that are ended with what takes too long or is waited for no
more: a bad one is told at once, and a slow one holds nobody up. Of clips those frames are decoded
that the model looks at.
"""

from __future__ import annotations

import asyncio
import contextvars
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from mmllm import media
from mmllm.chat import Chat
from mmllm.conversation import MEDIA, Medium, Message, Role, Text, Video
from mmllm.conversation import ContentPart as Said
from mmllm.errors import ConfigError, MediaError, quoted
from mmllm.generation import Choice, Sampling
from mmllm.media import data_uri, isolated
from mmllm.server import markdown, remote
from mmllm.server import schemas as api
from mmllm.server.dispatcher import ReplyOptions
from mmllm.server.errors import ApiError, bad_request, to_api_error
from mmllm.server.generated_files import PATH, GeneratedFiles, is_name
from mmllm.server.settings import ServerSettings

T = TypeVar("T")

_GRACE = 2.0
"""Seconds in which a process may say itself that the time is up, before it is ended."""
_SCHEME = 64
"""Characters in which a scheme must come."""
_LONGEST_URL = 2048
_OWN_URL = re.compile(rf"https?://(?P<host>[^/?#]+){PATH}(?P<name>[^/?#]+)")


class RequestParser:
    """Reads the requests of one server for the model of `chat`."""

    def __init__(self, settings: ServerSettings, chat: Chat, kept: GeneratedFiles):
        self.settings = settings
        self.files = kept
        model = chat.model
        self.decoders = {
            modality: model.decoders[key] for modality, key in model.renderer.output_keys.items()
        }
        """Modality that the model can make -> its decoder."""
        looks: list[int | None] = [encoder.num_frames for encoder in model.encoders.values()]  # pyright: ignore
        self.frames = sorted({num for num in looks if num})
        """How many frames of a clip the model looks at."""
        self._tokens = min(Sampling.max_new_tokens, settings.max_tokens)
        self._lanes = {
            name: (asyncio.Semaphore(num), ThreadPoolExecutor(num, f"mmllm-{name}"))
            for name, num in isolated.PROCESSES.items()
        }
        self._held = _Held(settings.max_total_decoded_bytes)

    async def conversation(
        self, messages: Sequence[api.AnyMessage], options: ReplyOptions
    ) -> list[Message]:
        """Raises ApiError (400) that names the part, and (429) when there is too much already."""
        parts = [list(_parts(message, f"messages.{n}")) for n, message in enumerate(messages)]
        self._check([entry for of_message in parts for entry in of_message])
        reading = _Reading(self.settings.input_limits.decoded_bytes, self._frames(options))
        try:
            return [
                Message(
                    _role(message), tuple([await self._read(*entry, reading) for entry in found])
                )
                for message, found in zip(messages, parts, strict=True)
            ]
        finally:
            reading.over.set()

    def _frames(self, options: ReplyOptions) -> list[int]:
        """How many frames of a clip are looked at, by the model and by decoders that start from a
        clip; one, so that it is known to be good, if none are."""
        found = set(self.frames)
        for modality, decoder in self.decoders.items():
            if decoder.init_modality == "video":
                settings = decoder.with_overrides(**options.decoders.get(modality, {})).config
                if settings.init_media == "last":
                    found.add(settings.frames)
        return sorted(found) or [1]

    def check_text(self, text: str, param: str) -> None:
        if len(text) > self.settings.max_characters:
            raise bad_request(
                f"{param}: {len(text)} characters of text, more than "
                f"{self.settings.max_characters}",
                param,
                "context_length_exceeded",
            )

    def chat_options(self, body: api.ChatRequest) -> ReplyOptions:
        """What `Chat.reply` is called with."""
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise bad_request(
                "max_tokens and max_completion_tokens mean the same: give one", "max_tokens"
            )
        tokens = body.max_completion_tokens or body.max_tokens
        self._bound("max_tokens", tokens, self.settings.max_tokens)
        self._bound("max_media", body.max_media, self.settings.max_output_media)
        sampling = {
            "max_new_tokens": tokens or self._tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "repetition_penalty": body.repetition_penalty,
            "max_media": body.max_media,
            "stop": [body.stop] if isinstance(body.stop, str) else body.stop,
        }
        named = body.decoders or {}
        for param, names in (("decoders", named), ("modalities", body.modalities or ())):
            for name in names:
                if name not in self.decoders and (name, param) != ("text", "modalities"):
                    made = ", ".join(["text", *self.decoders])
                    raise bad_request(
                        f"{param}: unknown {quoted(name)}; this model makes {made}", param
                    )
        decoders = {
            modality: self.decoder_options(modality, given, f"decoders.{modality}")
            for modality, given in named.items()
        }
        return ReplyOptions(
            modalities=self._choices(body.modalities),
            decoders=decoders,
            sampling={name: value for name, value in sampling.items() if value is not None},
        )

    async def picture(self, data: bytes, param: str) -> Medium:
        """A picture that was sent as a file, decoded. Raises ApiError (400)."""
        reading = _Reading(self.settings.input_limits.decoded_bytes, [1])
        try:
            medium = await self._beside(
                "others", lambda: self._decoded(MEDIA["image"](source=data), reading)
            )
        except MediaError as error:
            raise to_api_error(error, param) from error
        finally:
            reading.over.set()
        self._held.add(medium)
        return medium

    def edit_options(self, body: api.EditRequest) -> ReplyOptions:
        """ReplyOptions of a picture that starts from the one in the conversation."""
        decoder = self.decoders.get("image")
        if decoder is None or decoder.init_modality != "image":
            raise bad_request(
                "this model cannot start from a picture: its image decoder has no `init_media` "
                "(see /v1/models)",
                "image",
                "not_supported",
            )
        if body.strength is not None and "strength" not in decoder.request_options:
            raise bad_request("strength: this model's image decoder does not take it", "strength")
        given = api.DecoderOptions(init_media="last", strength=body.strength)
        return self.single_medium_options("image", given, size=body.size, ignored=body.ignored)

    def single_medium_options(
        self,
        modality: str,
        given: api.DecoderOptions | None,
        *,
        size: str | None = None,
        seconds: str | float | None = None,
        ignored: list[str] | None = None,
    ) -> ReplyOptions:
        """ReplyOptions of a request for one medium of one modality."""
        if modality not in self.decoders:
            made = ", ".join(["text", *self.decoders])
            raise bad_request(
                f"this model makes no {modality}; it makes {made}", code="not_supported"
            )
        options = self.decoder_options(
            modality, given, "decoder", size=size, seconds=seconds, ignored=ignored
        )
        choices: dict[str, Choice] = dict.fromkeys(self.decoders, "forbid")
        return ReplyOptions(
            modalities={**choices, modality: "force"},
            decoders={modality: options} if options else {},
            sampling={"max_media": 1, "max_new_tokens": self._tokens},
        )

    def decoder_options(
        self,
        modality: str,
        given: api.DecoderOptions | None,
        param: str,
        *,
        size: str | None = None,
        seconds: str | float | None = None,
        ignored: list[str] | None = None,
    ) -> dict[str, Any]:
        """The options that were given, `size` (WIDTHxHEIGHT) and `seconds` among them, as far as
        they change anything. A size or a length that the decoder cannot make is an error, or is
        added to `ignored` of a lenient server."""
        dropped = ignored if self.settings.lenient else None
        decoder = self.decoders[modality]
        options = given.model_dump(exclude_none=True) if given else {}
        wished: dict[str, dict[str, float]] = {}
        if size is not None and size != "auto":
            width, height = size.split("x")
            wished["size"] = {"width": int(width), "height": int(height)}
        if seconds is not None:
            wished["seconds"] = {"seconds": float(seconds)}
        for field_name, values in wished.items():
            if twice := sorted(values.keys() & options.keys()):
                raise bad_request(f"{param}.{twice[0]}: given twice, by {field_name} too", param)
            self._check_bounds(values, param, said=field_name)
        self._check_bounds(options, param)
        try:
            measures = decoder.with_overrides(**options).output_spec()
        except ConfigError as error:
            raise bad_request(f"{param}: {error}", param) from error
        for field_name, values in wished.items():
            if values.keys() <= set(decoder.request_options):
                self._check_bounds(options | values, param, said=field_name)
                try:
                    decoder.with_overrides(**options | values)
                except ConfigError as error:
                    if dropped is None:
                        raise bad_request(f"{field_name}: {error}", field_name) from error
                    dropped.append(field_name)
                else:
                    options |= values
                continue
            comes = {name: measures.get(name) for name in values}
            if any(_differs(comes[name], value) for name, value in values.items()):
                if dropped is not None:
                    dropped.append(field_name)
                    continue
                usual = "x".join(f"{comes[name]:.4g}" for name in values if comes[name] is not None)
                known = ", ".join(decoder.request_options)
                raise bad_request(
                    f"{field_name}: this model's {modality} decoder takes {known}; without "
                    f"{field_name} it makes {usual or 'what it makes'}",
                    field_name,
                )
        if {"width", "height", "frames"} & options.keys():
            made = decoder.with_overrides(**options).output_spec()
            frames = getattr(decoder.with_overrides(**options).config, "frames", 1)
            volume = made["width"] * made["height"] * frames
            most = self.settings.max_output_volume
            self._bound(f"{param}: width x height x frames", volume, most)
        return options

    def _check_bounds(self, options: Mapping[str, Any], param: str, said: str = "") -> None:
        """What the server allows of one decoder; `said`: the field that the client knows."""
        allowed = self.settings
        for name, most in (
            ("steps", allowed.max_steps),
            ("seconds", allowed.max_output_seconds),
            ("frames", allowed.max_output_frames),
        ):
            self._bound(said or f"{param}.{name}", options.get(name), most)
        pixels = options.get("width", 1) * options.get("height", 1)
        self._bound(said or f"{param}: width x height", pixels, allowed.max_output_pixels)
        self.check_text(options.get("negative_prompt", ""), f"{param}.negative_prompt")

    def _choices(self, given: list[str] | Mapping[str, Choice] | None) -> dict[str, Choice]:
        if not isinstance(given, list):
            if "text" in (given or {}):
                raise bad_request(
                    "modalities: text is in every reply; name media only", "modalities"
                )
            return dict(given or {})
        if "text" not in given:
            raise bad_request('modalities: a reply always may hold text; add "text"', "modalities")
        return {name: "auto" if name in given else "forbid" for name in self.decoders}

    def _bound(self, param: str, value: float | None, most: float) -> None:
        if value is not None and value > most:
            raise bad_request(f"{param}: expected at most {most:g}, got {quoted(value)}", param)

    def _check(self, parts: Sequence[tuple[str, api.AnyPart]]) -> None:
        """What can be said before anything is decoded or fetched."""
        self.check_text(
            "".join(part.text for _, part in parts if isinstance(part, api.TextPart)), "messages"
        )
        shown = [param for param, part in parts if not isinstance(part, api.TextPart)]
        if len(shown) > self.settings.max_input_media:
            raise bad_request(
                f"{shown[-1]}: {len(shown)} pictures, sounds and clips, more than "
                f"{self.settings.max_input_media}",
                shown[-1],
            )

    async def _read(self, param: str, part: api.AnyPart, reading: _Reading) -> Said:
        if isinstance(part, api.TextPart):
            return Text(part.text)
        if isinstance(part, api.ImagePart):
            modality, param, where = "image", f"{param}.image_url.url", part.image_url.url
        elif isinstance(part, api.VideoPart):
            modality, param, where = "video", f"{param}.video_url.url", part.video_url.url
        else:
            modality, param, where = "audio", f"{param}.input_audio.data", part.input_audio.data
        inline = data_uri.is_data_uri(where[:_SCHEME])
        file = None
        if not inline:
            file = self._kept(where, param)
        if not inline and file is None and modality != "audio":
            file = await remote.fetch(where, self.settings, param)

        def read() -> Medium:
            data = file
            if data is None:
                data = (data_uri.parse if inline else data_uri.decode)(where, param)
            return self._decoded(MEDIA[modality](source=data), reading)

        try:
            medium = await self._beside("clips" if modality == "video" else "others", read)
        except MediaError as error:
            code = "invalid_url" if inline and "expected data:" in str(error) else None
            problem = to_api_error(error, param)
            raise problem if code is None else bad_request(problem.message, param, code) from error
        self._held.add(medium)
        return medium

    def _kept(self, url: str, param: str) -> bytes | None:
        """A file that this server made and named by a URL; None for anything else. Raises
        ApiError (400) when it is forgotten."""
        found = _OWN_URL.fullmatch(url[:_LONGEST_URL])
        if found is None or not is_name(found["name"]):
            return None
        file = self.files.get(found["name"])
        if file is None:
            if found["host"].lower() in self.settings.allow_urls:
                return None
            raise bad_request(
                f"{param}: {quoted(url)} is kept no longer: leave it out, or send the file itself",
                param,
                "invalid_url",
            )
        return file.data

    async def _beside(self, lane: str, work: Callable[[], T]) -> T:
        """Do it in a thread of its own, within the limits of what is given."""
        free, pool = self._lanes[lane]
        async with free:
            with media.limits(self.settings.input_limits):
                context = contextvars.copy_context()
            return await asyncio.get_running_loop().run_in_executor(pool, context.run, work)

    def _decoded(self, medium: Medium, reading: _Reading) -> Medium:
        """A medium as the model looks at it, decoded in a process that can be ended."""
        if reading.over.is_set():
            raise isolated.DecodingCancelledError("nobody waits for it any more")
        limits = replace(media.current_limits(), decoded_bytes=reading.left)
        seconds = limits.decoding_seconds + _GRACE
        how: dict[str, Any] = {"seconds": seconds, "cancel": reading.over}
        with media.limits(limits):
            if isinstance(medium, Video):
                medium = isolated.presample(medium, reading.frames, **how)
            else:
                medium = isolated.decode(medium, **how)
        reading.left = max(reading.left - sum(array.nbytes for array in _arrays(medium)), 0)
        return medium


@dataclass
class _Reading:
    """One request that is being read: `left` bytes that its media may still take when they are
    decoded, and the `frames` of clips that are decoded. `over`: it was read, or given up."""

    left: int
    frames: Sequence[int]
    over: threading.Event = field(default_factory=threading.Event)


class _Held:
    """The decoded arrays of all requests, which may take `most` bytes; each counts until nobody
    has it any more."""

    def __init__(self, most: int):
        self._most = most
        self._arrays: list[weakref.ref[np.ndarray]] = []

    def add(self, medium: Medium) -> None:
        """Raises ApiError (429) when it is too much."""
        alive = [array for entry in self._arrays if (array := entry()) is not None]
        added = _arrays(medium)
        if alive and sum(array.nbytes for array in [*alive, *added]) > self._most:
            raise ApiError(
                429, "too many large media at the same time; try again soon", code="busy"
            )
        self._arrays = [weakref.ref(array) for array in [*alive, *added]]


def _arrays(medium: Medium) -> list[np.ndarray]:
    """What was decoded of a medium."""
    if isinstance(medium, media.SampledVideo):
        return list(medium.sampled.values())
    return [] if medium.array is None else [medium.array]


def _differs(comes: float | None, wished: float) -> bool:
    return comes is None or abs(comes - wished) > 0.01 * wished


def _role(message: api.AnyMessage) -> Role:
    return "system" if message.role == "developer" else message.role


def _parts(message: api.AnyMessage, where: str) -> Iterator[tuple[str, api.AnyPart]]:
    """(the path of a part in the request, the part), in order."""
    if isinstance(message, api.AssistantMessage) and message.parts is not None:
        for number, part in enumerate(message.parts):
            yield f"{where}.parts.{number}", part
        return
    answer = isinstance(message, api.AssistantMessage)
    if isinstance(message.content, str):
        text = api.TextPart(type="text", text=message.content)
        yield from _unfolded(text, f"{where}.content", answer)
    else:
        for number, part in enumerate(message.content or ()):
            yield from _unfolded(part, f"{where}.content.{number}", answer)
    if isinstance(message, api.AssistantMessage):
        for number, part in enumerate(message.images or ()):
            yield f"{where}.images.{number}", part
        if message.audio is not None:
            if message.audio.data is None:
                raise bad_request(
                    f"{where}.audio: this server keeps no sounds; send `data` too",
                    f"{where}.audio",
                )
            sound = api.InputAudio(data=message.audio.data)
            yield f"{where}.audio", api.AudioPart(type="input_audio", input_audio=sound)


def _unfolded(part: api.AnyPart, where: str, answer: bool) -> Iterator[tuple[str, api.AnyPart]]:
    """A part, or in an answer's text those that it shows as Markdown."""
    if not answer or not isinstance(part, api.TextPart):
        yield where, part
        return
    found = list(markdown.split(part.text)) or [(None, "")]
    for modality, said in found:
        if modality is None:
            yield where, api.TextPart(type="text", text=said)
        elif modality == "image":
            yield where, api.ImagePart(type="image_url", image_url=api.ImageUrl(url=said))
        elif modality == "video":
            yield where, api.VideoPart(type="video_url", video_url=api.VideoUrl(url=said))
        else:
            sound = api.InputAudio(data=said)
            yield where, api.AudioPart(type="input_audio", input_audio=sound)
