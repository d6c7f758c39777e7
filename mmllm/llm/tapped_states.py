"""States after chosen layers of a language model, in addition to the last ones.

The last hidden state predicts the next token; what a sentence depicts (counts, colours, places) is
often clearer in the middle of the model. Where an output projection asks for layers, each state is
float[..., D * (1 + n)]: the last one, behind the final norm, then those after the tapped layers.

Legend: D width, n tapped layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.errors import ConfigError
from mmllm.kernels.registry import DecoderForward


class TappedStates:
    """The part of a language model that knows which layers' states it returns."""

    width: Any
    decoder_forward: DecoderForward

    @property
    def num_layers(self) -> int:
        """The layers of the model."""
        return int(self.decoder_forward.base_model.config.get_text_config().num_hidden_layers)

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """The layers, from 1, whose states stand behind the last ones."""
        return self.decoder_forward.tapped_layers

    @property
    def state_width(self) -> int:
        """D * (1 + n), the width of what `forward` returns."""
        return self.width * (1 + len(self.tapped_layers))

    def tap_layers(self, layers: Iterable[int]) -> None:
        """Return the states after these layers too, from the next call on. The last layer's are
        always there.

        Raises:
            ConfigError: the model has no such layer.
        """
        last = self.num_layers
        for layer in (layers := sorted(set(layers))):
            if not 1 <= layer <= last:
                raise ConfigError(
                    f"output_projections: llm_layers: expected layers from 1 to {last}, those of "
                    f"the language model, got {layer}"
                )
        self.decoder_forward.tapped_layers = tuple(layer for layer in layers if layer < last)

    def last_states(self, states: Tensor) -> Tensor:
        """Select the last hidden states: float[..., D * (1 + n)] -> float[..., D]."""
        return states[..., : self.width] if self.tapped_layers else states

    def select_layers(self, states: Tensor, layers: Sequence[int]) -> Tensor:
        """Select the states after some of the tapped layers, in their order.

        Args:
            states: float[..., D * (1 + n)], as `forward` returns them.
            layers: the layers; empty: the last one.

        Returns:
            float[..., D * max(layers, 1)].
        """
        if not layers:
            return self.last_states(states)
        stored = (self.num_layers, *self.tapped_layers)
        parts = states.split(self.width, dim=-1)
        return torch.cat([parts[stored.index(layer)] for layer in layers], dim=-1)
