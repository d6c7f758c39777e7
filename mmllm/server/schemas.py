"""What requests and responses look like; the OpenAPI document is made of it.

A field that is not here and would change the answer is an error (a lenient server drops it);
fields of OpenAI's that change nothing here (`user`, `metadata` …), or that say what is the case
anyway (`n: 1`), are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mmllm.inference.options import ModalityChoice
from mmllm.server.settings import MediaFormat

T = TypeVar("T")
MOST_PARTS = 1024
"""Of one message."""
MOST_MESSAGES = 512
_MOST_FIELDS = 64
"""Of one object; those that change nothing here are not looked into."""
_MOST_NAMES = 16
"""Modalities that a request names."""


def few(most: int) -> BeforeValidator:
    """Refuses a list or an object of more than `most` entries before it looks at one: pydantic
    would collect what is wrong with each of millions."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > most:
            raise PydanticCustomError(
                "too_long",
                "expected at most {most} entries, got {num}",
                {"most": most, "num": len(value)},
            )
        return value

    return BeforeValidator(check)


Parts = Annotated[list[T], Field(max_length=MOST_PARTS, fail_fast=True), few(MOST_PARTS)]
Names = Annotated[list[str], Field(max_length=_MOST_NAMES, fail_fast=True), few(_MOST_NAMES)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Size = Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")]
Seconds = Annotated[str, Field(pattern=r"^[0-9]{1,4}(\.[0-9]{1,3})?$")]
AudioFormat = Literal["wav", "flac", "mp3"]
StopString = Annotated[str, Field(min_length=1, max_length=256)]

_ANY = object()
ANY = (_ANY,)
"""In `no_op_values`: any value changes nothing."""
IGNORED_FIELDS: dict[str, tuple[Any, ...]] = dict.fromkeys(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    ),
    ANY,
)
"""Fields of every request that change nothing here -> the values that are accepted."""


class Strict(BaseModel):
    """A model that converts no types and refuses unknown fields. Of the fields in `no_op_values`,
    the values listed there (and null) change nothing: they are accepted and dropped."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    no_op_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > _MOST_FIELDS:
            raise PydanticCustomError(
                "too_long",
                "expected at most {most} fields, got {num}",
                {"most": _MOST_FIELDS, "num": len(data)},
            )
        return {
            name: value
            for name, value in data.items()
            if name not in cls.no_op_values
            or (value is not None and not any(_same(value, one) for one in cls.no_op_values[name]))
        }


def _same(value: Any, no_op_values: Any) -> bool:
    return no_op_values is _ANY or (type(value) is type(no_op_values) and value == no_op_values)


# --- parts and messages -------------------------------------------------------------------------


class RequestPart(Strict):
    index: int | None = Field(default=None, description="Ignored: deltas of a stream carry it.")


class TextPart(RequestPart):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    no_op_values = {"detail": ANY}
    url: str = Field(description="data:image/png;base64,… or, where allowed, an http(s) URL.")


class ImagePart(RequestPart):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Strict):
    data: str = Field(description="A WAV, FLAC, MP3, OGG … file in base64.")
    format: str | None = Field(default=None, description="Ignored: the file says what it is.")


class AudioPart(RequestPart):
    type: Literal["input_audio"]
    input_audio: InputAudio


class VideoUrl(Strict):
    url: str = Field(description="data:video/mp4;base64,… or, where allowed, an http(s) URL.")


class VideoPart(RequestPart):
    type: Literal["video_url"]
    video_url: VideoUrl


AnyPart = Annotated[TextPart | ImagePart | AudioPart | VideoPart, Field(discriminator="type")]


class SystemMessage(Strict):
    no_op_values = {"name": ANY}
    role: Literal["system", "developer"]
    content: str | Parts[TextPart]


class UserMessage(Strict):
    no_op_values = {"name": ANY}
    role: Literal["user"]
    content: str | Parts[AnyPart]


class AssistantAudio(Strict):
    """`message.audio` of an earlier response, sent back."""

    no_op_values = {"id": ANY, "expires_at": ANY, "transcript": ANY}
    data: str | None = None


class AssistantMessage(Strict):
    """An earlier response, sent back as it came: then `parts` say it all. Without them: `content`,
    then `images`, then `audio`."""

    no_op_values = {
        "name": ANY,
        "refusal": ("",),
        "annotations": ([],),
        "tool_calls": ([],),
        "function_call": (),
    }
    role: Literal["assistant"]
    content: str | Parts[AnyPart] | None = None
    parts: Parts[AnyPart] | None = None
    images: Parts[ImagePart] | None = None
    audio: AssistantAudio | None = None


AnyMessage = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


# --- requests -----------------------------------------------------------------------------------


class DecoderOptions(Strict):
    """Of one decoder and one request; a decoder knows some of them, /v1/models says which."""

    steps: int | None = Field(default=None, ge=1, description="Denoising steps.")
    guidance: float | None = Field(default=None, ge=0, le=100)
    negative_prompt: str | None = Field(
        default=None,
        validation_alias=AliasChoices("negative_prompt", "negative"),
        description="A caption of what there should not be.",
    )
    scheduler: str | None = Field(default=None, description="Another solver: dpm++, lcm, ...")
    cache: str | None = Field(default=None, description="A cache of steps: first_block, ...")
    init_media: Literal["none", "last"] | None = Field(
        default=None,
        validation_alias=AliasChoices("init_media", "source"),
        description="last: start from the newest medium in the conversation.",
    )
    strength: float | None = Field(
        default=None, gt=0, le=1, description="How far from the source; 1 leaves little of it."
    )
    references: Literal["none", "auto", "all"] | None = Field(
        default=None,
        description="auto: the pictures of the last message, or else the newest one, condition it.",
    )
    noise: Literal["new", "last"] | None = Field(
        default=None, description="last: begin with the noise of the newest medium it has made."
    )
    keep: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The share of the condition of the newest medium it has made that is kept.",
    )
    seconds: float | None = Field(default=None, gt=0)
    frames: int | None = Field(default=None, ge=1)
    fps: float | None = Field(default=None, ge=0.1, le=240)
    height: int | None = Field(default=None, ge=1, description="Pixels.")
    width: int | None = Field(default=None, ge=1, description="Pixels.")


class ApiRequest(Strict):
    """The body of a request. `ignored`: paths of what a lenient server dropped of it."""

    _ignored: list[str] = PrivateAttr(default_factory=list)

    @property
    def ignored(self) -> list[str]:
        return self._ignored


class AudioOptions(Strict):
    no_op_values = {"voice": ANY}
    format: AudioFormat = "wav"


class StreamOptions(Strict):
    no_op_values = {"include_obfuscation": ANY}
    include_usage: bool | None = None


class RequestExtras(Strict):
    """What OpenAI's requests have no place for."""

    media: MediaFormat | None = Field(
        default=None, description="How `content` shows media; the server's own way unless given."
    )


Modalities = Annotated[
    Names | Annotated[dict[str, ModalityChoice], few(_MOST_NAMES)],
    Field(
        description=(
            'OpenAI\'s list of what a reply may hold (["text", "image"]), or what is auto, force '
            'or forbid ({"image": "force"}); all is auto unless given.'
        )
    ),
]
DecoderOptionsByModality = Annotated[
    dict[str, DecoderOptions],
    few(_MOST_NAMES),
    Field(description='By modality: {"image": {"steps": 30}}.'),
]


class ChatRequest(ApiRequest):
    no_op_values = {
        **IGNORED_FIELDS,
        "logprobs": (False,),
        "top_logprobs": (0,),
        "frequency_penalty": (0, 0.0),
        "presence_penalty": (0, 0.0),
        "logit_bias": ({},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
    }
    model: str | None = None
    messages: Annotated[
        list[AnyMessage],
        Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True),
        few(MOST_MESSAGES),
    ]
    modalities: Modalities | None = None
    audio: AudioOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="0, greedy, unless given."
    )
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    max_media: int | None = Field(default=None, ge=0, description="Of one reply; 4 unless given.")
    media_tokens: int | None = Field(
        default=None, ge=1, le=2**31, description="Tokens that a medium of the request may take."
    )
    stop: (
        StopString
        | Annotated[list[StopString], Field(max_length=16, fail_fast=True), few(16)]
        | None
    ) = None
    n: int | None = Field(
        default=None, ge=1, le=8, description="Choices; their seeds count up from `seed`."
    )
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    decoders: DecoderOptionsByModality | None = None
    mmllm: RequestExtras | None = None


class ImageRequest(ApiRequest):
    no_op_values = {
        **IGNORED_FIELDS,
        "quality": ("auto", "standard"),
        "style": (),
        "background": ("auto", "opaque"),
        "moderation": ANY,
        "output_compression": (100,),
        "partial_images": (0,),
        "stream": (False,),
    }
    model: str | None = None
    prompt: str = Field(min_length=1)
    n: int | None = Field(default=None, ge=1, le=8)
    size: Size | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "webp", "jpeg"] | None = None
    seed: Seed | None = Field(
        default=None, description="Of the first picture; the next ones count on."
    )
    decoder: DecoderOptions | None = None


class EditRequest(ImageRequest):
    """The fields of the form, in addition to the files: `image`, one or several, and `mask`."""

    strength: float | None = Field(
        default=None, gt=0, le=1, description="How far from the picture; 1 leaves little of it."
    )


TRANSCRIPTION_PROMPT = "What do you hear?"


class TranscriptionRequest(ApiRequest):
    """The fields of the form, in addition to `file`, the audio."""

    no_op_values = {
        **IGNORED_FIELDS,
        "language": ANY,
        "timestamp_granularities[]": ANY,
    }
    model: str | None = None
    prompt: str | None = Field(
        default=None, min_length=1, description=f"What is asked: {TRANSCRIPTION_PROMPT}"
    )
    response_format: Literal["json", "text"] | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)


class SpeechRequest(ApiRequest):
    no_op_values = {
        **IGNORED_FIELDS,
        "voice": ANY,
        "instructions": ("",),
        "speed": (1, 1.0),
        "stream_format": ("audio",),
    }
    model: str | None = None
    input: str = Field(min_length=1, description="What sounds, described; it is not read aloud.")
    response_format: AudioFormat | None = None
    seed: Seed | None = None
    decoder: DecoderOptions | None = None


class VideoRequest(ApiRequest):
    no_op_values = IGNORED_FIELDS
    model: str | None = None
    prompt: str = Field(min_length=1)
    seconds: Seconds | Annotated[float, Field(gt=0)] | None = None
    size: Size | None = None
    seed: Seed | None = None
    decoder: DecoderOptions | None = None


# --- responses ----------------------------------------------------------------------------------


class ReplyTimings(BaseModel):
    """Seconds since the engine took the request up; `media`: by decoder."""

    first_token: float
    text: float
    total: float
    media: dict[str, float]


class ReplyExtras(BaseModel):
    """What OpenAI's shapes have no place for. `seed` repeats the answer."""

    seed: int
    notes: list[str]
    timings: ReplyTimings
    ignored: list[str] | None = Field(
        default=None, description="Fields that a lenient server dropped, by their paths."
    )


class CachedTokens(BaseModel):
    cached_tokens: int


class CompletionUsage(BaseModel):
    """Tokens; those of a medium count as those of text do."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class GeneratedAudio(BaseModel):
    id: str
    data: str
    expires_at: int
    transcript: str


class ReplyMessage(BaseModel):
    """`parts`: text and media in the order of the reply, in the shapes of a request's parts.
    `content`, `images` and `audio` (the first sound) are views of it."""

    role: Literal["assistant"]
    content: str
    refusal: None
    parts: list[dict[str, Any]]
    images: list[dict[str, Any]] | None
    audio: GeneratedAudio | None


class ReplyChoice(BaseModel):
    index: int
    message: ReplyMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ReplyChoice]
    usage: CompletionUsage
    mmllm: ReplyExtras


class ResponsesUsage(BaseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int


class ResponsesResponse(BaseModel):
    """`output`: messages with `output_text`, and `image_generation_call`s whose `result` is a PNG
    in base64. Audio and video are in `mmllm.media`."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: ResponsesUsage
    mmllm: dict[str, Any]


class GeneratedImage(BaseModel):
    """`url`: where `response_format` asks for it."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImageResponse(BaseModel):
    created: int
    data: list[GeneratedImage]
    output_format: str


class TranscriptionResponse(BaseModel):
    text: str
    mmllm: ReplyExtras


class VideoError(BaseModel):
    code: str
    message: str


class VideoResponse(BaseModel):
    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    prompt: str
    seed: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    seconds: str
    size: str
    error: VideoError | None


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"]
    deleted: bool


class ModelCard(BaseModel):
    """`reads`: modalities of parts; `makes`: modality -> the decoder options that it knows."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context: int
    reads: list[str]
    makes: dict[str, list[str]]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"]
    waiting: int
