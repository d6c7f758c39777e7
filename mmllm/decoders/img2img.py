"""Starting from a medium: checks of the initial media, and the strength of image-to-image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmllm.conversation import Medium
from mmllm.decoders.contract import DecoderContract
from mmllm.errors import ConfigError


def check_init_media(decoder: DecoderContract, media: Sequence[Medium], num: int) -> None:
    """Check the media that sampling is to start from.

    Args:
        decoder: the decoder.
        media: one initial medium for each condition.
        num: the number of conditions.

    Raises:
        ConfigError: the decoder cannot start from media, or their number or a modality is wrong.
    """
    if not decoder.init_modality:
        raise ConfigError(
            f"{decoder.modality}: {decoder.pipeline_class} makes media from noise alone; leave out "
            "the initial media, or take a decoder that can start from them"
        )
    wrong = [medium for medium in media if medium.modality != decoder.init_modality]
    if wrong or len(media) != num:
        raise ConfigError(
            f"{decoder.modality}: expected {num} initial media of modality "
            f"{decoder.init_modality}, got {list(media)}"
        )


def check_strength(modality: str, config: Any) -> None:
    """Raise ConfigError if `strength` leaves less than one of the steps.

    Args:
        modality: the decoder's modality, for the message.
        config: the decoder's config, with `steps` and `strength`.
    """
    if int(config.steps * config.strength) < 1:
        raise ConfigError(
            f"{modality}: a strength of {config.strength:g} of {config.steps} steps is less than "
            f"one; expected at least {1 / config.steps:.2g}, or more steps"
        )
