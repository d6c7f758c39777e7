"""Tables of activations whose rows are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmllm.data.rendering import Rendered
from mmllm.insight.activations import Activations


def activations(states: Tensor, **changes: Any) -> Activations:
    """Activations with these states, float[N, D]: row i has the kind i % 5, and is the position
    i % 4 of conversation i // 4. `changes`: other fields."""
    number = torch.arange(len(states))
    none = torch.full((len(states),), -1, dtype=torch.int16)
    fields: dict[str, Any] = {
        "site": "layers.1",
        "model": "m",
        "kinds": (number % 5).to(torch.uint8),
        "tokens": number.int(),
        "items": number // 4,
        "positions": number % 4,
        "media": none,
        "concepts": none,
        "conversations": [Rendered(ids=[index]) for index in range(len(states) // 4)],
    }
    return Activations(states=states, **{**fields, **changes})


def table(num: int = 400) -> Activations:
    """`activations` whose row i has the state (i, i)."""
    number = torch.arange(num)
    return activations(torch.stack([number, number], dim=1).bfloat16(), max_norm=300.0)
