"""The messages of a request -> a conversation, its media fetched and decoded within limits."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence

from mmllm.conversation import MEDIA, ContentPart, Medium, Message, Role, Text
from mmllm.errors import MediaError, quoted
from mmllm.inference.chat import Chat
from mmllm.inference.inputs import within_budget
from mmllm.media import data_uri
from mmllm.server import markdown, remote
from mmllm.server import schemas as api
from mmllm.server.dispatcher import ReplyOptions
from mmllm.server.errors import bad_request, to_api_error
from mmllm.server.generated_files import PATH, GeneratedFiles, is_name
from mmllm.server.media_decoding import DecodeBudget, MediaDecoder
from mmllm.server.reply_options import OptionsParser
from mmllm.server.settings import ServerSettings

_MAX_SCHEME = 64
"""Characters within which a URL must name its scheme."""
_MAX_OWN_URL = 2048
_OWN_URL = re.compile(rf"https?://(?P<host>[^/?#]+){PATH}(?P<name>[^/?#]+)")


class RequestParser:
    """Parses the conversations of requests to one server, for the model of `chat`."""

    def __init__(
        self, settings: ServerSettings, chat: Chat, files: GeneratedFiles, options: OptionsParser
    ):
        self.settings = settings
        self.files = files
        self.options = options
        self.decoder = MediaDecoder(settings)
        counts: list[int | None] = [
            encoder.num_frames  # pyright: ignore[reportAssignmentType]
            for encoder in chat.model.encoders.values()
        ]
        self._frame_counts = {count for count in counts if count}
        """How many frames of a video the encoders look at."""
        self._needs_whole_videos = any(
            encoder.needs_whole_video for encoder in chat.model.encoders.values()
        )

    async def conversation(
        self, messages: Sequence[api.AnyMessage], options: ReplyOptions, paths: Sequence[str] = ()
    ) -> list[Message]:
        """The conversation of a request.

        Args:
            messages: Of the request, checked by `schemas`.
            options: Of its reply; a decoder that starts from a video needs frames of it.
            paths: Of each message in the request, for errors; `messages.N` unless given.

        Raises:
            ApiError: 400, naming the part that is wrong, or 429, too many media at once.
        """
        paths = paths or [f"messages.{number}" for number in range(len(messages))]
        parts = [list(_parts(*entry)) for entry in zip(messages, paths, strict=True)]
        self._check_parts([entry for of_message in parts for entry in of_message])
        budget = self._budget(self._frames(options))
        try:
            parsed = [
                Message(
                    _role(message),
                    tuple([await self._parse_part(*entry, budget) for entry in entries]),
                )
                for message, entries in zip(messages, parts, strict=True)
            ]
            return within_budget(parsed, options.media_tokens)
        finally:
            budget.cancel.set()

    async def upload(self, data: bytes, modality: str, param: str) -> Medium:
        """A medium that was uploaded as a file, decoded.

        Raises:
            ApiError: 400, it is no medium of this modality, or cannot be decoded.
        """
        return (await self.uploads([(data, modality, param)]))[0]

    async def uploads(self, files: Sequence[tuple[bytes, str, str]]) -> list[Medium]:
        """Media that were uploaded as files of one request, decoded.

        Args:
            files: Contents, modality and field of each; the modality "mask" is the transparency of
                an image.

        Raises:
            ApiError: 400, one is no medium of its modality, or cannot be decoded.
        """
        budget, decoded = self._budget([1]), list[Medium]()
        try:
            for data, modality, param in files:
                kind = MEDIA["image" if modality == "mask" else modality]
                open_medium = functools.partial(kind, source=data)
                try:
                    decoded.append(await self.decoder.decode(modality, open_medium, budget))
                except MediaError as error:
                    raise to_api_error(error, param) from error
        finally:
            budget.cancel.set()
        return decoded

    def _budget(self, frame_counts: Sequence[int]) -> DecodeBudget:
        return DecodeBudget(
            self.settings.input_limits.decoded_bytes, frame_counts, self._needs_whole_videos
        )

    def _frames(self, options: ReplyOptions) -> list[int]:
        """The numbers of frames of a video that are decoded: those that the encoders look at, and
        those that a decoder starts from; one, to check the file, if there are none."""
        counts = set(self._frame_counts)
        for modality, decoder in self.options.decoders.items():
            if decoder.init_modality == "video":
                settings = decoder.with_overrides(**options.decoders.get(modality, {})).config
                if settings.init_media == "last":
                    counts.add(settings.frames)
        return sorted(counts) or [1]

    def _check_parts(self, parts: Sequence[tuple[str, api.AnyPart]]) -> None:
        """Check what can be checked before anything is decoded or fetched."""
        text = "".join(part.text for _, part in parts if isinstance(part, api.TextPart))
        self.options.check_text(text, "messages")
        media = [param for param, part in parts if not isinstance(part, api.TextPart)]
        if len(media) > self.settings.max_input_media:
            raise bad_request(
                f"{media[-1]}: {len(media)} pictures, sounds and clips, more than "
                f"{self.settings.max_input_media}",
                media[-1],
            )

    async def _parse_part(self, param: str, part: api.AnyPart, budget: DecodeBudget) -> ContentPart:
        if isinstance(part, api.TextPart):
            return Text(part.text)
        if isinstance(part, api.ImagePart):
            modality, param, where = "image", f"{param}.image_url.url", part.image_url.url
        elif isinstance(part, api.VideoPart):
            modality, param, where = "video", f"{param}.video_url.url", part.video_url.url
        else:
            modality, param, where = "audio", f"{param}.input_audio.data", part.input_audio.data
        inline = data_uri.is_data_uri(where[:_MAX_SCHEME])
        file = None if inline else self._own_file(where, param)
        if not inline and file is None and modality != "audio":
            file = await remote.fetch(where, self.settings, param)

        def open_medium() -> Medium:
            data = file
            if data is None:
                data = (data_uri.parse if inline else data_uri.decode)(where, param)
            return MEDIA[modality](source=data)

        try:
            return await self.decoder.decode(modality, open_medium, budget)
        except MediaError as error:
            problem = to_api_error(error, param)
            if inline and "expected data:" in str(error):
                problem = bad_request(problem.message, param, "invalid_url")
            raise problem from error

    def _own_file(self, url: str, param: str) -> bytes | None:
        """The file behind a URL of this server; None for any other URL.

        Raises:
            ApiError: 400, the file is kept no longer.
        """
        match = _OWN_URL.fullmatch(url[:_MAX_OWN_URL])
        if match is None or not is_name(match["name"]):
            return None
        file = self.files.get(match["name"])
        if file is None:
            if match["host"].lower() in self.settings.allow_urls:
                return None
            raise bad_request(
                f"{param}: {quoted(url)} is kept no longer: leave it out, or send the file itself",
                param,
                "invalid_url",
            )
        return file.data


def _role(message: api.AnyMessage) -> Role:
    return "system" if message.role == "developer" else message.role


def _parts(message: api.AnyMessage, where: str) -> Iterator[tuple[str, api.AnyPart]]:
    """(path in the request, part) of a message, in order."""
    is_answer = isinstance(message, api.AssistantMessage)
    if is_answer and message.parts is not None:
        for number, part in enumerate(message.parts):
            yield f"{where}.parts.{number}", part
        return
    if isinstance(message.content, str):
        text = api.TextPart(type="text", text=message.content)
        yield from _split_markdown(text, f"{where}.content", is_answer)
    else:
        for number, part in enumerate(message.content or ()):
            yield from _split_markdown(part, f"{where}.content.{number}", is_answer)
    if is_answer:
        for number, part in enumerate(message.images or ()):
            yield f"{where}.images.{number}", part
        if message.audio is not None:
            if message.audio.data is None:
                raise bad_request(
                    f"{where}.audio: this server keeps no sounds; send `data` too",
                    f"{where}.audio",
                )
            audio = api.InputAudio(data=message.audio.data)
            yield f"{where}.audio", api.AudioPart(type="input_audio", input_audio=audio)


def _split_markdown(
    part: api.AnyPart, where: str, is_answer: bool
) -> Iterator[tuple[str, api.AnyPart]]:
    """A part; of an answer's text, the texts and media that its Markdown shows."""
    if not is_answer or not isinstance(part, api.TextPart):
        yield where, part
        return
    pieces = list(markdown.split(part.text)) or [(None, "")]
    for modality, value in pieces:
        if modality is None:
            yield where, api.TextPart(type="text", text=value)
        elif modality == "image":
            yield where, api.ImagePart(type="image_url", image_url=api.ImageUrl(url=value))
        elif modality == "video":
            yield where, api.VideoPart(type="video_url", video_url=api.VideoUrl(url=value))
        else:
            audio = api.InputAudio(data=value)
            yield where, api.AudioPart(type="input_audio", input_audio=audio)
