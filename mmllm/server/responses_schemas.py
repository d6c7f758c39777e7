"""Requests to the Responses API, and their translation into messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mmllm.server import schemas as api


class ResponseText(api.Strict):
    no_op_values: ClassVar[Mapping[str, Any]] = {"annotations": api.ANY, "logprobs": api.ANY}
    type: Literal["input_text", "output_text", "text"]
    text: str


class ResponseImage(api.Strict):
    no_op_values: ClassVar[Mapping[str, Any]] = {"detail": api.ANY}
    type: Literal["input_image"]
    image_url: str = Field(description="data:image/png;base64,… or, where allowed, a URL.")


class ResponseAudio(api.Strict):
    type: Literal["input_audio"]
    input_audio: api.InputAudio


class ResponseVideo(api.Strict):
    type: Literal["input_video"]
    video_url: str = Field(description="data:video/mp4;base64,… or, where allowed, a URL.")


ResponsePart = Annotated[
    ResponseText | ResponseImage | ResponseAudio | ResponseVideo, Field(discriminator="type")
]


class MessageItem(api.Strict):
    """A message; `type` may be left out. An assistant's message is an earlier output, sent back."""

    no_op_values: ClassVar[Mapping[str, Any]] = {"id": api.ANY, "status": api.ANY, "phase": api.ANY}
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: str | api.Parts[ResponsePart]

    @model_validator(mode="before")
    @classmethod
    def _default_type(cls, data: Any) -> Any:
        return {"type": "message", **data} if isinstance(data, dict) else data


class ImageItem(api.Strict):
    """A generated image of an earlier output, sent back."""

    no_op_values: ClassVar[Mapping[str, Any]] = dict.fromkeys(
        ("id", "status", "background", "output_format", "quality", "size", "revised_prompt"),
        api.ANY,
    ) | {"action": api.ANY}
    type: Literal["image_generation_call"]
    result: str = Field(description="The file in base64.")


class ResponsesRequest(api.ApiRequest):
    """Nothing is stored: the whole conversation is in `input`."""

    no_op_values: ClassVar[Mapping[str, Any]] = {
        **api.IGNORED_FIELDS,
        "background": (False,),
        "include": ([],),
        "max_tool_calls": api.ANY,
        "reasoning": api.ANY,
        "stream_options": api.ANY,
        "text": ({}, {"format": {"type": "text"}}),
        "tool_choice": ("none", "auto"),
        "tools": ([], [{"type": "image_generation"}]),
        "top_logprobs": (0,),
        "truncation": ("auto", "disabled"),
    }
    model: str | None = None
    input: (
        str
        | Annotated[
            list[MessageItem | ImageItem],
            Field(min_length=1, max_length=api.MOST_MESSAGES, fail_fast=True),
            api.few(api.MOST_MESSAGES),
        ]
    )
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: api.Seed | None = None
    stream: bool | None = None
    modalities: api.Modalities | None = None
    max_media: int | None = Field(default=None, ge=0, description="Of one reply; 4 unless given.")
    media_tokens: int | None = Field(default=None, ge=1, le=2**31)
    decoders: api.DecoderOptionsByModality | None = None
    mmllm: api.RequestExtras | None = None

    def to_chat(self) -> api.ChatRequest:
        """The same request to the chat API: message i is item i, after the instructions."""
        messages: list[api.AnyMessage] = []
        if self.instructions is not None:
            messages.append(api.SystemMessage(role="system", content=self.instructions))
        if isinstance(self.input, str):
            messages.append(api.UserMessage(role="user", content=self.input))
        else:
            messages += [_message(item) for item in self.input]
        return api.ChatRequest(
            messages=messages,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            modalities=self.modalities,
            max_media=self.max_media,
            media_tokens=self.media_tokens,
            decoders=self.decoders,
        )


def _message(item: MessageItem | ImageItem) -> api.AnyMessage:
    if isinstance(item, ImageItem):
        url = f"data:image/png;base64,{item.result}"
        part = api.ImagePart(type="image_url", image_url=api.ImageUrl(url=url))
        return api.AssistantMessage(role="assistant", parts=[part])
    content: Any = item.content
    if not isinstance(content, str):
        content = [_part(part) for part in content]
    if item.role == "user":
        return api.UserMessage(role="user", content=content)
    if item.role == "assistant":
        return api.AssistantMessage(role="assistant", content=content)
    if not isinstance(content, str):
        content = [part for part in content if isinstance(part, api.TextPart)]
    return api.SystemMessage(role="system", content=content)


def _part(part: ResponsePart) -> api.AnyPart:
    if isinstance(part, ResponseText):
        return api.TextPart(type="text", text=part.text)
    if isinstance(part, ResponseImage):
        return api.ImagePart(type="image_url", image_url=api.ImageUrl(url=part.image_url))
    if isinstance(part, ResponseVideo):
        return api.VideoPart(type="video_url", video_url=api.VideoUrl(url=part.video_url))
    return api.AudioPart(type="input_audio", input_audio=part.input_audio)
