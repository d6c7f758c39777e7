"""Options of a call, by whatever name they are given: modalities, sampling. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeAlias, TypedDict, cast, get_args

from mmllm.conversation import MEDIA
from mmllm.errors import ConfigError
from mmllm.utils.hints import did_you_mean

ModalityChoice = Literal["auto", "force", "forbid"]
"""Whether a reply may, must or must not hold media of a modality."""
MODALITY_CHOICES: tuple[ModalityChoice, ...] = get_args(ModalityChoice)

Modalities: TypeAlias = Mapping[str, ModalityChoice] | Collection[str] | str
"""What a reply may or must hold, as `modality_choices` reads it."""

DecoderOptions: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Modality -> options of its decoder."""


class SamplingOptions(TypedDict, total=False):
    """Keywords of `Chat.reply`: see mmllm.inference.sampling.Sampling. `max_tokens` is OpenAI's
    name of `max_new_tokens`."""

    max_new_tokens: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_media: int
    stop: Sequence[str] | str
    num_draft_tokens: int


class ChatOptions(SamplingOptions, total=False):
    """Keywords of one conversation: those of `SamplingOptions`, and parts of the conversation (see
    mmllm.inference.inputs.as_messages)."""

    system: str
    image: Any
    images: Sequence[Any]
    audio: Any
    audios: Sequence[Any]
    video: Any
    videos: Sequence[Any]
    media_tokens: int


INPUT_OPTIONS = frozenset(ChatOptions.__annotations__) - frozenset(SamplingOptions.__annotations__)
"""Keywords that are parts of the conversation."""


SYNONYMS = {
    **dict.fromkeys(("picture", "pictures", "images", "photo"), "image"),
    **dict.fromkeys(("sound", "sounds", "audios", "speech"), "audio"),
    **dict.fromkeys(("clip", "clips", "videos", "animation"), "video"),
}
"""Other words for a modality -> the modality."""

ALIASES: dict[str, str] = {
    **dict.fromkeys(["max_tokens", "max_completion_tokens", "max_output_tokens"], "max_new_tokens"),
    **dict.fromkeys(["prompt_lookup_num_tokens", "prompt_lookup"], "num_draft_tokens"),
}
"""Option names of OpenAI, transformers and earlier versions -> fields of `Sampling`."""

_PARTS = 'media are parts of a message: user("What is this?", Image("cat.png"))'
_DECODER_OPTIONS = {
    **{name: name for name in ("steps", "guidance", "negative_prompt", "scheduler", "cache")},
    **{name: name for name in ("init_media", "strength", "mask", "references", "noise", "keep")},
    **{name: name for name in ("height", "width")},
    **{name: name for name in ("seconds", "frames", "fps")},
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "negative": "negative_prompt",
    "num_frames": "frames",
}
"""Names of decoder options here and in diffusers -> their names here."""
_ELSEWHERE = {
    **dict.fromkeys(("image", "images", "audio", "video", "videos", "media", "files"), _PARTS),
    **{
        name: f"it belongs to a decoder: decoders={{'image': {{'{option}': …}}}}"
        for name, option in _DECODER_OPTIONS.items()
    },
    "size": "decoders={'image': {'height': …, 'width': …}}, where the decoder has more than one",
    "system": 'a conversation begins with it: [system("Be brief."), user("Hi")]',
    "system_prompt": 'chat.reply("Hi", system="Be brief.")',
    "history": "turns are messages: chat.reply([*history, user('…')]), or chat.conversation()",
    "messages": "they are the first argument: chat.reply(messages)",
    "prompt": "it is the first argument: chat.reply(prompt)",
    "stream": "it has a method of its own: for event in chat.stream(…)",
    "n": "chat.reply_many([conversation] * n, seeds=[…]) gives n replies",
    "seeds": "one conversation has one: seed=0; reply_many takes seeds",
    "seed": "several conversations have one each: seeds=[0, 1, …]",
    "do_sample": "temperature=0 is greedy, and temperature=0.7 samples",
    "generator": "seed=0 repeats a reply",
    "device": "it is chosen when the model is loaded: mmllm.load(…, device=…)",
}
"""Keywords that `Chat.reply` does not take -> how to give them."""


def modality_choices(modalities: Modalities | None) -> dict[str, ModalityChoice]:
    """Modality -> auto, force or forbid. Words such as picture, sound and clip are understood.

    Args:
        modalities: a mapping; or a list of what a reply may hold, or, without "text" in it, must
            hold; other modalities are forbidden. None leaves all to the model.

    Example:
        >>> modality_choices(["image"])["image"]
        'force'
        >>> modality_choices(["text", "image"])["audio"]
        'forbid'
    """
    if modalities is None:
        return {}
    if isinstance(modalities, Mapping):
        by_name = cast("Mapping[str, ModalityChoice]", modalities)
        return {modality_key(name): choice for name, choice in by_name.items()}
    names = [modalities] if isinstance(modalities, str) else list(modalities)
    wanted = [modality_key(name) for name in names]
    choice: ModalityChoice = "auto" if "text" in wanted else "force"
    choices: dict[str, ModalityChoice] = {name: choice for name in wanted if name != "text"}
    for name in MEDIA.keys() - set(wanted):
        choices[name] = "forbid"
    return choices


def modality_key(name: Any) -> str:
    """The modality that a word stands for: `image` for `picture`; other words stay as they are."""
    return SYNONYMS.get(name, name) if isinstance(name, str) else str(name)


def sampling_options(keywords: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Keywords of a call -> fields of `Sampling`.

    Args:
        keywords: name or alias -> value.
        known: the fields.

    Raises:
        ConfigError: for another keyword, with the way to give it, if there is one.
    """
    options: dict[str, Any] = {}
    for name, value in keywords.items():
        key = ALIASES.get(name, name)
        if key not in known:
            _refuse(name, known)
        if key in options:
            raise ConfigError(f"{name} and {key} mean the same: give one")
        options[key] = (value,) if key == "stop" and isinstance(value, str) else value
    return options


def pop_inputs(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the keywords of INPUT_OPTIONS from `options` and return them."""
    return {name: options.pop(name) for name in INPUT_OPTIONS & options.keys()}


def _refuse(name: str, known: Sequence[str]) -> NoReturn:
    if name in _ELSEWHERE:
        raise ConfigError(f"unknown option {name!r}: {_ELSEWHERE[name]}")
    hint = did_you_mean(name, [*known, *ALIASES], cutoff=0.6)
    raise ConfigError(f"unknown sampling option {name!r}{hint}; known are {', '.join(known)}")
