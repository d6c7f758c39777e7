"""States of a site at many positions, each with its kind, token, medium and concept.

Most positions of conversations are text, so that batches are drawn by kind (`Activations.sampler`).

Legend: N positions, D width, B positions of a batch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from mmllm.conversation import Medium
from mmllm.data.rendering import Rendered
from mmllm.errors import ConfigError

KINDS = ("text", "image", "audio", "video", "signal")
"""Kinds of positions: text; placeholders of an input medium, by its modality; signal tokens."""
BALANCE = {"text": 0.4, "image": 0.2, "audio": 0.1, "video": 0.1, "signal": 0.2}
"""Share of each kind in a batch."""
MASSIVE = 10.0
"""States of more than this many times the median norm are left out of training and of measures of
variance: a handful of them would decide both (Sun et al. 2024)."""
_HELD_OUT = 0.1
NONE = -1
"""In the columns `media` and `concepts`."""


@dataclass(frozen=True)
class Activations:
    """States of one site, and what each position is.

    Attributes:
        site: name of the site.
        model: fingerprint of the model.
        states: bfloat16[N, D].
        kinds: uint8[N], indices of KINDS.
        tokens: int32[N], token ids.
        items: int32[N], indices of `conversations`.
        positions: int32[N], positions in the conversation.
        media: int16[N], index among the conversation's media (inputs, then outputs), or -1.
        concepts: int16[N], indices of `concept_names`, or -1.
        conversations: the rendered conversations.
        concept_names: names of concepts.
        max_norm: states that are longer are massive (`norm_limit`).
    """

    site: str
    model: str
    states: Tensor
    kinds: Tensor
    tokens: Tensor
    items: Tensor
    positions: Tensor
    media: Tensor
    concepts: Tensor
    conversations: Sequence[Rendered]
    concept_names: Sequence[str] = ()
    max_norm: float = math.inf

    def __len__(self) -> int:
        return len(self.states)

    def select(self, where: Tensor) -> Activations:
        """The positions that a mask bool[N] or indices int[M] name."""
        names = ("states", "kinds", "tokens", "items", "positions", "media", "concepts")
        return replace(self, **{name: getattr(self, name)[where] for name in names})

    def of_kind(self, kind: str) -> Tensor:
        """Which positions are of a kind: bool[N]."""
        return self.kinds == KINDS.index(kind)

    def counts(self) -> dict[str, int]:
        """Number of positions of each kind that there is."""
        counts = torch.bincount(self.kinds.long(), minlength=len(KINDS)).tolist()
        return {kind: count for kind, count in zip(KINDS, counts, strict=True) if count}

    @cached_property
    def is_massive(self) -> Tensor:
        """Which states are massive: bool[N]."""
        return self.states.float().norm(dim=-1) > self.max_norm

    def split(self) -> tuple[Activations, Activations]:
        """Training and held-out positions: a tenth of the conversations, by a hash of their
        token ids: equal texts with different media are in the same part."""
        held_out = torch.tensor(
            [
                zlib.crc32(repr(each.ids).encode()) % 1000 < 1000 * _HELD_OUT
                for each in self.conversations
            ]
        )[self.items.long()]
        return self.select(~held_out), self.select(held_out)

    def medium(self, row: int) -> Medium | None:
        """The medium that a position is of, or None."""
        index = int(self.media[row])
        if index == NONE:
            return None
        conversation = self.conversations[int(self.items[row])]
        return [*conversation.inputs, *conversation.outputs][index].medium

    def sampler(
        self,
        batch_size: int,
        *,
        balance: Mapping[str, float] = BALANCE,
        seed: int = 0,
        target: Activations | None = None,
    ) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Return the function `step -> (inputs, targets)` of batches that `train_dictionary` takes:
        each kind has its share, as far as the kind exists; massive states are left out.

        Args:
            batch_size: B.
            balance: share of each kind.
            seed: of the draws.
            target: states of another site at the same positions, for a transcoder.

        Raises:
            ConfigError: an unknown kind, or no positions.
        """
        for kind in balance:
            if kind not in KINDS:
                raise ConfigError(f"balance: unknown kind {kind!r}; known are {', '.join(KINDS)}")
        rows, sizes = [], []
        for kind, share in balance.items():
            found = (self.of_kind(kind) & ~self.is_massive).nonzero()[:, 0]
            if len(found) and share > 0:
                rows.append(found)
                sizes.append(share)
        if not rows:
            raise ConfigError(f"{self.site}: no positions of {', '.join(balance)}")
        bounds = [round(batch_size * part / sum(sizes)) for part in accumulate(sizes, initial=0)]
        targets = self.states if target is None else target.states

        def batch(step: int) -> tuple[Tensor, Tensor]:
            rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
            drawn = torch.cat(
                [
                    found[torch.randint(len(found), (end - start,), generator=rng)]
                    for found, start, end in zip(rows, bounds, bounds[1:], strict=False)
                ]
            )
            inputs = self.states[drawn]
            return inputs, inputs if target is None else targets[drawn]

        return batch


def norm_limit(states: Tensor) -> float:
    """The norm from which states are massive: MASSIVE times the median of float[N, D]."""
    return MASSIVE * states.float().norm(dim=-1).median().item() if len(states) else math.inf
