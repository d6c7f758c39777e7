"""The options of one call, checked against the model before anything is computed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from mmllm.conversation import Message
from mmllm.errors import ConfigError, quoted
from mmllm.inference.conditions import ConditionMemory
from mmllm.inference.editing import EditSources, resolve_sources, split_options
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
        sources: (conversation, output key) -> what its media are made from.
        seeds: one for each conversation.
        previews: whether Progress carries previews.
        render_media: whether media are made; else they are left without data.
    """

    sampling: Sampling
    decoders: Mapping[str, Mapping[str, Any]]
    sources: Mapping[tuple[int, str], EditSources]
    seeds: Sequence[int]
    previews: bool = False
    render_media: bool = True

    def impossible(self, conversation: int) -> list[str]:
        """Return the keys of the decoders that can make nothing in a conversation.

        Args:
            conversation: its number.
        """
        return [
            key
            for (number, key), sources in self.sources.items()
            if number == conversation and sources.lacks_references
        ]


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
    conditions: ConditionMemory | None = None,
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
        conditions: those of media that were made.

    Raises:
        ConfigError: for an unknown option or modality, a value out of range, another number of
            seeds than of conversations, and media that a decoder does not take.
        MediaError: for a mask that has not the size of its picture.
    """
    choices = _choices(model, modalities)
    given = _decoder_options(model, choices, decoders or {})
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
    sources: dict[tuple[int, str], EditSources] = {}
    for key, decoder in model.decoders.items():
        choice = choices.get(decoder.modality, "auto")
        if choice == "forbid" or not render_media:
            sources |= {(number, key): EditSources() for number in range(len(conversations))}
            continue
        values, media = given.get(key, ({}, {}))
        current, named = decoder.with_overrides(**values), "references" in values
        for number, messages in enumerate(conversations):
            sources[number, key] = resolve_sources(
                current,
                key,
                model.config.name,
                messages,
                media,
                conditions=conditions,
                names_references=named,
                is_forced=choice == "force",
            )
    options = {key: values for key, (values, _) in given.items()}
    return RequestSettings(settings, options, sources, seeds, previews, render_media)


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
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Output key -> options of `decoder.sample`, and media among them."""
    decoders = {modality_key(name): options for name, options in decoders.items()}
    keys = model.renderer.output_keys
    for modality in {**choices, **decoders}:
        if modality not in keys:
            raise ConfigError(
                f"unknown modality {modality!r}; this model makes "
                f"{', '.join(sorted(keys)) or 'text only'}"
            )
    resolved: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for modality, options in decoders.items():
        decoder = model.decoders[keys[modality]]
        values, media = split_options(modality, options)
        if "mask" in media and "strength" in decoder.request_options:
            values.setdefault("strength", 1.0)  # what is masked is made anew
        decoder.with_overrides(**values)
        resolved[keys[modality]] = values, media
    return resolved
