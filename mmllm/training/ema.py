"""An exponential moving average of what trains, by diffusers' EMAModel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.config import EMAConfig
from mmllm.errors import CheckpointError
from mmllm.training.trainable import ParameterGroup

_PREFIX = "trained/"
"""Of the trained values among the tensors of a training state."""


class MovingAverage:
    """The averages of all parameters that train. A checkpoint holds them as its model, and the
    trained values in its training state.

    Args:
        options: the decay.
        groups: the parameters, which are the averages of `step` steps when this is made.
        step: optimizer steps taken.
    """

    def __init__(self, options: EMAConfig, groups: Sequence[ParameterGroup], *, step: int = 0):
        from diffusers.training_utils import EMAModel

        self.parameters: dict[str, nn.Parameter] = {}
        for group in groups:
            self.parameters.update(group.parameters)
        self._average: Any = EMAModel(self.parameters.values(), decay=options.decay)
        self._average.optimization_step = step

    def update(self) -> None:
        """Take the parameters after one more optimizer step into the averages."""
        self._average.step(self.parameters.values())

    def trained_tensors(self) -> dict[str, Tensor]:
        """The trained values on the CPU, for a training state."""
        return {
            f"{_PREFIX}{name}": parameter.detach().cpu().clone()
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def load_trained(self, tensors: Mapping[str, Tensor], where: object) -> None:
        """Set the parameters to the trained values of a training state.

        Args:
            tensors: what `trained_tensors` returned, among others.
            where: the checkpoint, for messages.

        Raises:
            CheckpointError: a value is missing.
        """
        for name, parameter in self.parameters.items():
            if _PREFIX + name not in tensors:
                raise CheckpointError(
                    f"{where}: the training state has no trained value of {name!r}, though its "
                    "stage averages weights (stage.ema); use another checkpoint of the run"
                )
            parameter.copy_(tensors[_PREFIX + name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the parameters are the averages."""
        parameters = self.parameters.values()
        trained = [parameter.detach().clone() for parameter in parameters]
        self._average.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, trained, strict=True):
                    parameter.copy_(value)


def without_trained(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a training state that are the optimizer's."""
    return {name: value for name, value in tensors.items() if not name.startswith(_PREFIX)}
