"""A check before training: media of replies that chat will read, and that training never shows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from mmllm.conversation import Medium, Message
from mmllm.data.protocol import DataSource
from mmllm.data.rendering import Renderer
from mmllm.errors import MediaError

logger = logging.getLogger(__name__)
_ROWS = 16  # of a dataset that are looked at


def warn_of_unread_media(renderer: Renderer, sources: Mapping[str, DataSource]) -> None:
    """Warn of datasets whose later turns lack what chat puts in front of them.

    Chat encodes the media of a reply for the next request. A dataset whose replies have captions
    alone never shows such a turn, and a model trained on it takes its own media for new ones.

    Args:
        renderer: that of the model.
        sources: datasets by name.
    """
    if not renderer.rereads_media:
        return
    for name, source in sources.items():
        for index in range(min(len(source), _ROWS)):
            try:
                messages = source.conversation(index, np.random.default_rng(index))
            except MediaError:  # training skips and names it
                continue
            if medium := unread_medium(messages, renderer):
                logger.warning(
                    "data.%s: replies have captions without their %s, which chat reads in front of "
                    "the next request; give the data the media, or set system.rereads_media to "
                    "false (docs/configs.md)",
                    name,
                    medium.modality,
                )
                break


def unread_medium(messages: Sequence[Message], renderer: Renderer) -> Medium | None:
    """A medium of a reply that has no data, though the model could read it in a later turn.

    Args:
        messages: the conversation.
        renderer: that of the model.
    """
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=0)
    media = (m for message in messages[:last] if message.role == "assistant" for m in message.media)
    return next((m for m in media if m.modality in renderer.input_keys and not m.has_data), None)
