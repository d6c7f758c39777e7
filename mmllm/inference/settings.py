"""The options of one call, checked against the model before anything is computed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from mmllm.conversation import Medium, Message
from mmllm.errors import ConfigError, quoted
from mmllm.inference.options import (
    DecoderOptions,
    Modalities,
    ModalityChoice,
    modality_choices,
    modality_key,
    sampling_options,
)
from mmllm.inference.sampling import Sampling
from mmllm.model import AnyToAny

_SAMPLING_OPTIONS = [
    field.name for field in dataclasses.fields(Sampling) if field.name != "modalities"
]


@dataclass(frozen=True)
class RequestSettings:
    """How one call is answered.

    Attributes:
        sampling: of the text.
        decoders: output key -> options of `decoder.sample`.
        init_media: (conversation, output key) -> the medium that its media start from.
        seeds: one for each conversation.
        previews: whether Progress carries previews.
        render_media: whether media are made; else they are left without data.
    """

    sampling: Sampling
    decoders: Mapping[str, Mapping[str, Any]]
    init_media: Mapping[tuple[int, str], Medium]
    seeds: Sequence[int]
    previews: bool = False
    render_media: bool = True


def resolve_settings(
    model: AnyToAny,
    conversations: Sequence[Sequence[Message]],
    *,
    modalities: Modalities | None = None,
    seeds: Sequence[int] | None = None,
    decoders: DecoderOptions | None = None,
    sampling: Mapping[str, Any],
    previews: bool = False,
    render_media: bool = True,
) -> RequestSettings:
    """Check the options of `Chat.reply_many`, and fill in what is not given.

    Args:
        model: the model, whose modalities and decoders can be named.
        conversations: the conversations to be answered.
        modalities: as in `Chat.reply`.
        seeds: one for each conversation, 0 to 2**63 - 1; None draws them.
        decoders: modality -> settings of its decoder.
        sampling: further keyword arguments, fields of Sampling.
        previews: whether the events have previews of media.
        render_media: whether media are made; otherwise they have no data.

    Raises:
        ConfigError: for an unknown option or modality, a value out of range, and another number of
            seeds than of conversations.
    """
    choices = _choices(model, modalities)
    options = _decoder_options(model, choices, decoders or {})
    settings = Sampling(modalities=choices, **sampling_options(sampling, _SAMPLING_OPTIONS))
    if seeds is None:
        seeds = [random.randrange(2**31) for _ in conversations]
    if len(seeds) != len(conversations):
        raise ConfigError(f"{len(conversations)} conversations but {len(seeds)} seeds")
    for seed in seeds:
        if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
            raise ConfigError(
                f"seed: expected a whole number from 0 to 2**63 - 1, got {quoted(seed)}"
            )
    init_media = _init_media(model, conversations, options)
    return RequestSettings(settings, options, init_media, seeds, previews, render_media)


def _choices(model: AnyToAny, modalities: Modalities | None) -> dict[str, ModalityChoice]:
    """Modality -> choice. A list that leaves out what the model cannot make anyway forbids none of
    it."""
    choices = modality_choices(modalities)
    if isinstance(modalities, Mapping):
        return choices
    keys = model.renderer.output_keys
    return {name: choice for name, choice in choices.items() if choice != "forbid" or name in keys}


def _decoder_options(
    model: AnyToAny, choices: Mapping[str, ModalityChoice], decoders: DecoderOptions
) -> dict[str, dict[str, Any]]:
    """Output key -> options of `decoder.sample`."""
    decoders = {modality_key(name): options for name, options in decoders.items()}
    keys = model.renderer.output_keys
    for modality in {**choices, **decoders}:
        if modality not in keys:
            raise ConfigError(
                f"unknown modality {modality!r}; this model makes "
                f"{', '.join(sorted(keys)) or 'text only'}"
            )
    resolved = {keys[modality]: dict(options) for modality, options in decoders.items()}
    for key, options in resolved.items():
        model.decoders[key].with_overrides(**options)
    return resolved


def _init_media(
    model: AnyToAny,
    conversations: Sequence[Sequence[Message]],
    options: Mapping[str, Mapping[str, Any]],
) -> dict[tuple[int, str], Medium]:
    """(conversation, output key) -> the newest medium that the decoder can start from, for decoders
    whose `init_media` is "last"."""
    resolved: dict[tuple[int, str], Medium] = {}
    for key, decoder in model.decoders.items():
        if not decoder.init_modality:
            continue
        if decoder.with_overrides(**options.get(key, {})).config.init_media != "last":
            continue
        for number, messages in enumerate(conversations):
            media = [medium for message in messages for medium in message.media]
            for medium in media:  # the last one remains
                if medium.modality == decoder.init_modality:
                    resolved[number, key] = medium
    return resolved
