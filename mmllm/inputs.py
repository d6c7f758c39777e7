"""What people pass to a chat -> messages and options: strings, files, pictures of Pillow, arrays,
OpenAI's dicts, and the names that other libraries give to an option.

    as_messages("Draw a cat.")                                     one message of the user's
    as_messages("What is this?", Path("cat.png"))                  with a picture
    as_messages([{"role": "user", "content": "Draw a cat."}])      OpenAI's messages

Servers and datasets do not come here: their strings are words, never the names of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from mmllm.conversation import (
    MEDIA,
    ContentPart,
    Image,
    Medium,
    Message,
    Text,
    message,
)
from mmllm.errors import ConfigError, quoted
from mmllm.replies import Reply
from mmllm.utils.hints import did_you_mean

Choice = Literal["auto", "force", "forbid"]

SYNONYMS = {
    **dict.fromkeys(("picture", "pictures", "images", "photo"), "image"),
    **dict.fromkeys(("sound", "sounds", "audios", "speech"), "audio"),
    **dict.fromkeys(("clip", "clips", "videos", "animation"), "video"),
}
"""What people call a modality -> its key."""

ALIASES: dict[str, str] = {
    **dict.fromkeys(["max_tokens", "max_completion_tokens", "max_output_tokens"], "max_new_tokens"),
    **dict.fromkeys(["prompt_lookup_num_tokens", "prompt_lookup"], "num_draft_tokens"),
}
"""Names of options of `Sampling` in OpenAI, transformers and earlier versions -> their names."""

_PARTS = 'media are parts of a message: chat.reply("What is this?", Image("cat.png"))'
_DECODER_OPTIONS = {
    **{name: name for name in ("steps", "guidance", "negative_prompt", "scheduler", "cache")},
    **{name: name for name in ("init_media", "strength", "height", "width")},
    **{name: name for name in ("seconds", "frames", "fps")},
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "negative": "negative_prompt",
    "num_frames": "frames",
}
"""Options of decoders by their names and by those that diffusers gives them -> their names."""
_ELSEWHERE = {
    **dict.fromkeys(("image", "images", "audio", "video", "videos", "media", "files"), _PARTS),
    **{
        name: f"it belongs to a decoder: decoders={{'image': {{'{option}': …}}}}"
        for name, option in _DECODER_OPTIONS.items()
    },
    "size": "decoders={'image': {'height': …, 'width': …}}, where the decoder has more than one",
    "system": 'the conversation begins with it: chat.reply([system("Be brief."), user("Hi")])',
    "system_prompt": 'the conversation begins with it: chat.reply([system("…"), user("Hi")])',
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
"""Options that are given in another way -> the way."""


def as_messages(given: Any, *more: Any) -> list[Message]:
    """One conversation, however it is written: a list of messages (Message, Reply, OpenAI's dicts),
    a single one of them, or the parts of one message of the user's (see `as_part`).

    Raises ConfigError for what cannot be understood, MediaError for a file that is not there.
    """
    if not more:
        if isinstance(given, Message):
            return [given]
        if isinstance(given, Reply):
            return [given.message]
        if _is_message_dict(given):
            return [_from_dict(given)]
        if isinstance(given, Iterable) and not isinstance(
            given, str | bytes | Mapping | np.ndarray
        ):
            entries = list(given)
            if not entries:
                raise ConfigError("the conversation is empty: give a message such as user('Hi')")
            if any(_is_message(entry) for entry in entries):
                return [_as_message(entry) for entry in entries]
            given, *more = entries  # pyright: ignore[reportAssignmentType]
    return [Message("user", tuple(as_part(part) for part in (given, *more)))]


def as_part(value: Any) -> ContentPart:
    """A part of a message: Text or a str, a Medium, the Path or the bytes of a media file, a
    picture of Pillow's, an array uint8[H, W, 3], or a part as OpenAI and transformers write them.

    A str that names a media file which exists raises ConfigError that asks what is meant.
    """
    if isinstance(value, Text | Medium):
        return value
    if isinstance(value, str):
        _ask_about_file(value)
        return Text(value)
    if isinstance(value, Path | bytes):
        from mmllm import media

        return MEDIA[media.probe(value).modality](value)
    if _is_pillow(value):
        return Image.from_pil(value)
    if isinstance(value, np.ndarray):
        return Image.from_numpy(value)
    if isinstance(value, Mapping) and isinstance(value.get("type"), str):
        return _part_from_dict(value)
    raise ConfigError(
        "expected text, a picture, a sound or a clip (str, Path, Image, Audio, Video, PIL.Image), "
        f"got {type(value).__name__} {quoted(value)}; a conversation is a list of messages such as "
        "user('…')"
    )


def modality_choices(given: Any) -> dict[str, Choice]:
    """Modality -> auto, force or forbid. A list names what a reply may hold; without "text" in it,
    what it must hold. `picture`, `sound` and `clip` are understood."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {modality_key(name): choice for name, choice in given.items()}
    names = [given] if isinstance(given, str) else list(given)
    wanted = [modality_key(name) for name in names]
    choice: Choice = "auto" if "text" in wanted else "force"
    chosen: dict[str, Choice] = {name: choice for name in wanted if name != "text"}
    for name in MEDIA.keys() - set(wanted):
        chosen[name] = "forbid"
    return chosen


def modality_key(name: Any) -> str:
    """`image` for `picture`, and so on; anything else stays as it is."""
    return SYNONYMS.get(name, name) if isinstance(name, str) else str(name)


def sampling_options(given: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Options by their names in `Sampling`; raises ConfigError that names the way for others."""
    options: dict[str, Any] = {}
    for name, value in given.items():
        key = ALIASES.get(name, name)
        if key not in known:
            _refuse(name, known)
        if key in options:
            raise ConfigError(f"{name} and {key} mean the same: give one")
        options[key] = value
    return options


def _refuse(name: str, known: Sequence[str]) -> NoReturn:
    if name in _ELSEWHERE:
        raise ConfigError(f"unknown option {name!r}: {_ELSEWHERE[name]}")
    meant = did_you_mean(name, [*known, *ALIASES], cutoff=0.6)
    raise ConfigError(f"unknown sampling option {name!r}{meant}; known are {', '.join(known)}")


# --- messages -----------------------------------------------------------------------------------


def _is_message(value: Any) -> bool:
    return isinstance(value, Message | Reply) or _is_message_dict(value)


def _is_message_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _as_message(value: Any) -> Message:
    """A message in a list of them; bare words or media are the user's."""
    if isinstance(value, Message):
        return value
    if isinstance(value, Reply):
        return value.message
    if _is_message_dict(value):
        return _from_dict(value)
    return Message("user", (as_part(value),))


def _from_dict(given: Mapping[str, Any]) -> Message:
    role = "system" if given["role"] == "developer" else given["role"]
    if role not in ("system", "user", "assistant"):
        raise ConfigError(f"role: expected system, user or assistant, got {quoted(role)}")
    content = given.get("content")
    if content is None or isinstance(content, Mapping):
        content = [] if content is None else [content]
    parts = [content] if isinstance(content, str) else list(content)
    return message(role, *(Text(p) if isinstance(p, str) else as_part(p) for p in parts))


def _part_from_dict(part: Mapping[str, Any]) -> ContentPart:
    """`{type: text, text}`, `{type: image_url, image_url: {url}}`, `{type: image, image: …}`,
    `{type: input_audio, input_audio: {data}}`, and so for every modality."""
    kind: str = part["type"]
    name = kind.removeprefix("input_").removeprefix("output_").removesuffix("_url")
    if name == "text":
        return Text(str(part.get("text", "")))
    modality = modality_key(name)
    if modality not in MEDIA:
        raise ConfigError(f"a part's type: expected text, {', '.join(MEDIA)}, got {quoted(kind)}")
    for key in (kind, name, f"{name}_url", "url", "path", "data", "file"):
        if part.get(key) is not None:
            return _medium(modality, part[key], f"a part {kind!r}")
    raise ConfigError(f"a part {kind!r} without {kind!r} or {name!r}, got {quoted(dict(part))}")


def _medium(modality: str, value: Any, where: str) -> Medium:
    from mmllm.media import data_uri

    if isinstance(value, Mapping):
        if isinstance(value.get("data"), str) and not data_uri.is_data_uri(value["data"]):
            return MEDIA[modality](data_uri.decode(value["data"], where))
        found = next((value[k] for k in ("url", "data", "path", "bytes") if value.get(k)), None)
        return _medium(modality, found, where)
    if isinstance(value, str) and data_uri.is_data_uri(value):
        return MEDIA[modality](data_uri.parse(value, where))
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ConfigError(f"{where}: nothing is fetched; download {quoted(value)}, give its path")
    if isinstance(value, str):
        return MEDIA[modality](value.removeprefix("file://"))
    if isinstance(value, Path | bytes):
        return MEDIA[modality](value)
    found = as_part(value)
    if isinstance(found, MEDIA[modality]):
        return found
    raise ConfigError(f"{where}: expected {MEDIA[modality].__name__}, got {quoted(value)}")


def _is_pillow(value: Any) -> bool:
    """Whether it is a picture of Pillow's, which is not imported to find out."""
    return any(
        cls.__module__ == "PIL.Image" and cls.__name__ == "Image" for cls in type(value).mro()
    )


def _ask_about_file(text: str) -> None:
    """Raise ConfigError for the name of a media file that exists."""
    suffix = text[text.rfind(".") :].lower() if "." in text[-6:] else ""
    if suffix not in SUFFIXES or len(text) > 1000 or "\n" in text:
        return
    try:
        is_file = Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return
    if is_file:
        kind = SUFFIXES[suffix]
        raise ConfigError(
            f"{text!r} is the name of a file: write {kind}({text!r}) for what it holds, or "
            f"Text({text!r}) for the words"
        )


SUFFIXES = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".heic"), "Image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".mp3", ".m4a", ".aac", ".opus"), "Audio"),
    **dict.fromkeys((".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif"), "Video"),
}
"""Suffixes by which a name is taken for a media file's -> the class of what is likely in it."""


def user(*parts: Any) -> Message:
    """A message of the user's: `user("What is this?", Image("cat.png"))`.

    Args:
        parts: text, media, Paths of media files, pictures of Pillow's (see `as_part`).

    Raises:
        ConfigError: for a part of another kind, and for a str that names a media file that exists.
    """
    return Message("user", tuple(as_part(part) for part in parts))


def assistant(*parts: Any) -> Message:
    """A message of the model's: `assistant("Here it is: ", Image("apple.png"))`; see `user`."""
    return Message("assistant", tuple(as_part(part) for part in parts))


def system(*parts: Any) -> Message:
    """What the model is told beforehand: `system("Answer in one word.")`; see `user`."""
    return Message("system", tuple(as_part(part) for part in parts))
