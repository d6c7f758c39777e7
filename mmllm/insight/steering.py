"""Steering: a direction added to the states of a site while the model replies.

    to_dog = difference(chat, "layers.24", ["Draw a dog."], ["Draw a ship."], media="image")
    with steer(chat, to_dog, strength=1.0, positions="signal"):
        chat.reply("Draw a ship.").image            # shows a dog

What is drawn, played or animated depends on the hidden states of the signal span alone, so that a
few positions of the LLM steer all of it. A direction is the difference of two means (Marks and
Tegmark 2023), or any vector: that of a feature of a sparse autoencoder, say.

Legend: P positions, K signal tokens of a medium, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.conversation import MEDIA
from mmllm.errors import ConfigError
from mmllm.insight.heads import token_losses
from mmllm.insight.hooks import Edit, edit, look
from mmllm.insight.positions import GROUPS, Positions
from mmllm.insight.sites import model_of

MAX_NEW_TOKENS = 40
"""Of replies whose states are recorded: those that are steered have to be as long at most, because
a medium that is forced comes behind the text."""
_DEPTH = 0.8
"""Concepts stand in the states of signal tokens only late."""


@dataclass(frozen=True)
class Direction:
    """What is added to states.

    Attributes:
        site: where.
        vector: float[D], the same at every position; or float[K, D], one for each position of a
            medium.
    """

    site: str
    vector: Tensor

    def random(self, seed: int = 0) -> Direction:
        """A random direction of the same size, to compare with.

        Args:
            seed: of the draw.
        """
        noise = torch.randn(self.vector.shape, generator=torch.Generator().manual_seed(seed))
        scale = self.vector.float().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return Direction(self.site, noise * scale)


def late_site(chat: Any) -> str:
    """The residual stream behind four fifths of the layers, where replies are steered best.

    Args:
        chat: what `mmllm.load` gives, or a model.
    """
    num_layers = len(model_of(chat).llm.backbone.layers)
    return f"layers.{min(round(num_layers * _DEPTH), num_layers - 1)}"


def reply_states(chat: Any, site: str, conversations: Sequence[Any], *, media: str) -> list[Tensor]:
    """Record the states of the signal span of the medium that is made in each reply.

    No medium is rendered; the replies are greedy.

    Args:
        chat: what `mmllm.load` gives.
        site: a site of the LLM with one vector per position.
        conversations: as `Chat.reply_many` takes them, all different.
        media: the modality that every reply has to hold.

    Returns:
        float32[K, D] for each conversation.
    """
    modalities: Any = dict.fromkeys(model_of(chat).renderer.output_keys, "forbid")
    modalities[media] = "force"
    with look(chat, site) as seen:
        chat.reply_many(
            conversations,
            modalities=modalities,
            render_media=False,
            temperature=0.0,
            max_new_tokens=MAX_NEW_TOKENS,
            seeds=[0] * len(conversations),
        )
    at, states = seen.positions, seen[site].float()
    is_signal = at.select("signal")
    numbers = np.unique(at.conversation)
    if len(numbers) != len(conversations):
        raise ConfigError("the conversations have to differ: equal ones get one reply")
    return [states[torch.from_numpy(is_signal & (at.conversation == n))] for n in numbers]


def difference(
    chat: Any, site: str, towards: Sequence[Any], away: Sequence[Any], *, media: str
) -> Direction:
    """Compute the difference of the mean states of two kinds of replies, position by position of
    their signal spans.

    Args:
        chat: what `mmllm.load` gives.
        site: a site of the LLM, one of its last layers: earlier, the states of signal tokens do not
            tell yet what is asked for.
        towards: conversations whose replies hold what is wanted.
        away: conversations whose replies hold what is not.
        media: the modality that is made.

    Raises:
        ConfigError: the site does not exist, or the model does not make the modality.
    """
    states = reply_states(chat, site, [*towards, *away], media=media)
    means = [torch.stack(part).mean(0) for part in (states[: len(towards)], states[len(towards) :])]
    return Direction(site, means[0] - means[1])


@contextmanager
def steer(
    chat: Any,
    direction: Direction | Iterable[Direction],
    *,
    strength: float = 1.0,
    positions: str = "signal",
) -> Iterator[None]:
    """Add a direction to the states of its site, inside the context.

    Args:
        chat: what `mmllm.load` gives, or a model.
        direction: one, or several, which are all added.
        strength: what it is multiplied by; 1 is the difference itself, or one unit of a feature.
        positions: "all", "text", "media" (what is read), "signal", or a modality, for what is read
            or made of it.

    Raises:
        ConfigError: an unknown group of positions, or a direction that does not fit its site.
    """
    directions = [direction] if isinstance(direction, Direction) else list(direction)
    with ExitStack() as stack:
        for one in directions:
            stack.enter_context(edit(chat, one.site, steering(chat, one, strength, positions)))
        yield


def steering(chat: Any, direction: Direction, strength: float, positions: str) -> Edit:
    """The edit that adds a direction (mmllm.insight.edit).

    Args:
        chat: what `mmllm.load` gives, or a model.
        direction: the direction.
        strength: what it is multiplied by.
        positions: as for `steer`.

    Raises:
        ConfigError: as by `steer`.
    """
    known = [*GROUPS, *MEDIA]
    if positions not in known:
        raise ConfigError(f"positions: expected one of {', '.join(known)}, got {positions!r}")
    vector = direction.vector.detach()
    width = model_of(chat).llm.width
    if vector.ndim not in (1, 2) or vector.shape[-1] != width:
        raise ConfigError(
            f"direction at {direction.site}: expected a vector of {width} numbers, or one for each "
            f"position of a medium, got the shape {list(vector.shape)}"
        )
    if vector.ndim == 2 and positions in ("all", "text"):
        raise ConfigError(
            f"a direction of {len(vector)} positions of a medium cannot be added to positions of "
            f"{positions!r}; average it: Direction(site, vector.mean(0))"
        )

    def add(states: Tensor, at: Positions) -> Tensor:
        rows = np.flatnonzero(at.select(positions))
        if not len(rows):
            return states
        added = vector.to(states) * strength
        if added.ndim == 2:
            added = added[_offsets(at[rows], len(added))]
        where = torch.from_numpy(rows).to(states.device)
        return states.index_add(0, where, added.expand(len(rows), -1))

    return add


def perplexity_rise(
    chat: Any,
    direction: Direction | Iterable[Direction],
    ids: Tensor,
    *,
    strength: float = 1.0,
    positions: str = "all",
) -> float:
    """Compute by what factor steering raises the perplexity of plain text: what it costs the text.
    About 1 costs nothing; from 2 on replies begin to repeat themselves and to break.

    Args:
        chat: what `mmllm.load` gives, or a model.
        direction: as for `steer`.
        ids: int[W, S], windows of plain text.
        strength: as for `steer`.
        positions: as for `steer`.
    """
    plain = token_losses(chat, ids).mean()
    with steer(chat, direction, strength=strength, positions=positions):
        steered = token_losses(chat, ids).mean()
    return (steered - plain).exp().item()


def _offsets(at: Positions, length: int) -> np.ndarray:
    """The place of each position within its medium: int[P], at most length - 1."""
    offsets = np.zeros(len(at), dtype=np.int64)
    for number, (conversation, medium) in enumerate(zip(at.conversation, at.medium, strict=True)):
        own = (at.conversation[:number] == conversation) & (at.medium[:number] == medium)
        offsets[number] = own.sum()
    return offsets.clip(max=length - 1)
