"""Apply and assert the table `learning_rates`, which names the trainable parameters of a stage."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from mmllm.errors import ConfigError
from mmllm.model import AnyToAny


@dataclass(frozen=True)
class ParameterGroup:
    """The parameters that one pattern of a stage's learning rates matched.

    Attributes:
        pattern: the pattern of names.
        learning_rate: their learning rate.
        parameters: the parameters by name.
    """

    pattern: str
    learning_rate: float
    parameters: dict[str, nn.Parameter]

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def replaceable_decoders(model: AnyToAny, table: Mapping[str, float]) -> list[str]:
    """Return the decoders that may differ from those of the checkpoint that a stage starts from.

    These are the ones, as "decoders.image", whose output projections the stage trains wholly.

    Args:
        model: the model.
        table: the stage's learning rates: pattern of parameter names -> learning rate.
    """
    return [
        f"decoders.{key}"
        for key, projection in model.output_projections.items()
        if all(
            _matches_any(f"output_projections.{key}.{name}", table)
            for name, _ in projection.named_parameters()
        )
    ]


def choose_trainable(model: AnyToAny, table: Mapping[str, float]) -> list[ParameterGroup]:
    """Unfreeze exactly the parameters that the table names.

    Args:
        model: its trainable candidates are matched; LoRA of the language model and of decoders is
            attached if a pattern asks for it.
        table: pattern of parameter names (shell wildcards) -> learning rate.

    Returns:
        The parameters of each pattern.

    Raises:
        ConfigError: a pattern matches nothing, or two patterns match the same parameter.
    """
    if _matches_any("llm.lora.", table):
        model.llm.attach_lora()
    for key in model.decoders:
        if _matches_any(f"decoders.{key}.lora.", table):
            model.attach_decoder_lora(key)
    candidates = dict(model.trainable_candidates())
    owner: dict[str, str] = {}
    groups = []
    for pattern, learning_rate in table.items():
        matched = {n: p for n, p in candidates.items() if fnmatch.fnmatchcase(n, pattern)}
        if not matched:
            known = sorted({".".join(name.split(".")[:2]) for name in candidates})
            raise ConfigError(
                f"stage.learning_rates: pattern {pattern!r} matches no parameter; there are "
                f"{', '.join(known)}"
            )
        for name in matched:
            if name in owner:
                raise ConfigError(
                    f"stage.learning_rates: {name} is matched by {owner[name]!r} and by {pattern!r}"
                )
            owner[name] = pattern
        groups.append(ParameterGroup(pattern, learning_rate, matched))
    model.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    assert_trainable(model, groups)
    return groups


def _matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def assert_trainable(model: AnyToAny, groups: list[ParameterGroup]) -> None:
    """Raise ConfigError unless the model's trainable tensors are exactly those of the groups.

    Args:
        model: the model.
        groups: the parameters that the stage's table selected.
    """
    expected = {id(p) for group in groups for p in group.parameters.values()}
    actual = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if expected != actual.keys():
        odd = [name for key, name in actual.items() if key not in expected]
        raise ConfigError(
            f"stage.learning_rates: the trainable set differs from the table: {len(expected)} "
            f"tensors expected, {len(actual)} found; not in the table: {odd[:5]}"
        )
