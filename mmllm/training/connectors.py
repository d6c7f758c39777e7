"""Connectors before their first step and after the last: what they read is standardised, the null
condition begins as that of the empty caption, and learned gates are reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mmllm.data.batch import Batch
from mmllm.model import AnyToAny
from mmllm.projections.connector import Connector

logger = logging.getLogger(__name__)

NUM_MEDIA = 256
"""Media of each decoder whose states are measured."""


@torch.no_grad()
def prepare_connectors(
    model: AnyToAny, batches: Iterable[Batch], autocast: Callable[[], AbstractContextManager]
) -> None:
    """Standardise the connectors that train from their beginning, and set their null conditions.

    Args:
        model: its connectors are changed; it is left in evaluation mode.
        batches: training data; as many are taken as have `NUM_MEDIA` media.
        autocast: context of a forward pass.
    """
    connectors = untrained_connectors(model)
    if not connectors:
        return
    states: dict[str, list[Tensor]] = {key: [] for key in connectors}
    targets: dict[str, list[dict[str, Tensor]]] = {key: [] for key in connectors}
    model.eval()
    for batch in batches:
        batch = batch.to(model.device)
        with autocast():
            signals = model.signals(batch)
        for key in connectors:
            if len(signals[key]):
                states[key].append(signals[key])
                targets[key].append(batch.outputs[key].targets)
        if all(sum(map(len, parts)) >= NUM_MEDIA for parts in states.values()):
            break
    for key, connector in connectors.items():
        if parts := states[key]:
            connector.standardize(torch.cat(parts))
            rows = targets[key]
            connector.start_at_captions(
                {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            )
        if connector.condition_dropout:
            connector.set_null_condition(model.decoders[key].unconditional(1))


def untrained_connectors(model: AnyToAny) -> dict[str, Connector]:
    """Return the connectors that train and are as they were built, by decoder key."""
    found = {}
    for key in model.output_projections:
        module = model.output_projection(key)
        if isinstance(module, Connector) and module.is_new and module.shift.requires_grad:
            found[key] = module
    return found


def report_gates(model: AnyToAny) -> None:
    """Log the share of each layer that the connectors have learned to read."""
    for key in model.output_projections:
        module = model.output_projection(key)
        gates = module.layer_gates() if isinstance(module, Connector) else {}
        for what, shares in gates.items():
            logger.info(
                "output_projections.%s reads, at %s, the states after layer %s",
                key,
                what,
                ", ".join(
                    f"{layer}: {share:.2f}"
                    for layer, share in zip(module.llm_layers, shares, strict=True)
                ),
            )
