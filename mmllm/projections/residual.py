"""The residual connector: what the decoder's text encoder says of a caption, plus what a connector
learns to add.

What is added begins as zero, as in ControlNet (Zhang et al. 2023, sec. 3.1), so that an untrained
system draws what the decoder's own pipeline draws from the caption.

Legend: M media, W words, K signal tokens, n layers read, D LLM width, P x E one tensor of the
condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmllm.errors import ConfigError
from mmllm.projections.base import zero_rows
from mmllm.projections.connector import Connector, ConnectorConfig, check_config


@dataclass(frozen=True)
class ResidualConfig(ConnectorConfig):
    """A connector whose output is added to the caption's own condition (docs/connectors.md).

    Attributes:
        caption: what is drawn from in replies: `reply`, the reply's own text in front of the
            medium, or the request where there is none; `request`, the last message of the
            conversation. In training it is the caption that the data give the medium.
        condition_dropout: 0, since guidance is over the decoder's own negative prompt.
    """

    caption: Literal["reply", "request"] = "reply"
    condition_dropout: float = 0.0


class ResidualConnector(Connector):
    """The projection that `ResidualConfig` describes. `forward` computes what is added; masks are
    those of the caption."""

    reads_captions = True

    def __init__(
        self, config: ResidualConfig, condition_shapes: Mapping[str, tuple[int, ...]], width: int
    ):
        added = {name: s for name, s in condition_shapes.items() if not name.endswith("mask")}
        super().__init__(config, added, width)
        self.caption = config.caption
        self._all_shapes = dict(condition_shapes)
        for head in self.heads.values():
            nn.init.zeros_(head.weight)  # pyright: ignore[reportArgumentType]
        # What a head says is in units of the captions' standard deviation (`start_at_captions`).
        self.spread = nn.ParameterDict(
            {name: nn.Parameter(torch.ones(shape[-1])) for name, shape in added.items()}
        )

    def forward(self, signals: Tensor) -> dict[str, Tensor]:
        return {name: value * self.spread[name] for name, value in super().forward(signals).items()}

    def conditions(self, signals: Tensor, captions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if missing := self._all_shapes.keys() - captions.keys():
            raise ValueError(
                f"output projection: the caption's {', '.join(sorted(missing))} is needed, which "
                "type residual adds to; were captions given?"
            )
        added = self(signals)
        return {
            name: captions[name].to(signals.device) + added.get(name, 0.0)
            for name in self._all_shapes
        }

    def no_conditions(self) -> dict[str, Tensor]:
        return {name: zero_rows(self, shape) for name, shape in self._all_shapes.items()}

    def _begin_head(self, name: str, rows: Tensor) -> None:
        self.spread[name].copy_(rows.std(0))


def build(
    config: ResidualConfig, *, condition_shapes: Mapping[str, tuple[int, ...]], width: int
) -> ResidualConnector:
    """Build the residual connector between an LLM's states and a decoder's condition.

    Args:
        config: the settings.
        condition_shapes: (P, E) of each tensor of the condition, or (E,) of a pooled one, by name.
        width: D, the width of the LLM's hidden states.

    Raises:
        ConfigError: a setting is out of range.
        CheckpointError: the language model that it starts from cannot be loaded.
    """
    check_config(config)
    if config.condition_dropout:
        raise ConfigError(
            "output_projections: residual: condition_dropout: expected 0, because guidance is over "
            f"the decoder's own negative prompt, got {config.condition_dropout:g}"
        )
    return ResidualConnector(config, condition_shapes, width)
