"""AdamW over the stage's parameter groups: its learning rates, its update and its saved state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmllm.config import RENAMED_PARAMETERS, StageConfig
from mmllm.errors import CheckpointError
from mmllm.training.trainable import ParameterGroup
from mmllm.utils.extras import import_extra


def make_optimizer(stage: StageConfig, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
    """Build the optimizer of a stage: AdamW, torch's own or one of bitsandbytes'.

    Args:
        stage: names the optimizer, its betas and the weight decay.
        groups: the parameters that train, with their learning rates.

    Raises:
        ConfigError: bitsandbytes is asked for and not installed.
    """
    table = [
        {"params": list(group.parameters.values()), "lr": group.learning_rate} for group in groups
    ]
    options: dict[str, Any] = {"betas": stage.betas, "weight_decay": stage.weight_decay}
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(table, fused=True, **options)
    needed_by = f"stage.optimizer: {stage.optimizer}"
    optimizers = import_extra("bitsandbytes", extra="quantization", needed_by=needed_by).optim
    is_paged = stage.optimizer == "paged_adamw_8bit"
    kind = optimizers.PagedAdamW8bit if is_paged else optimizers.AdamW8bit
    return kind(table, **options)


def learning_rate_factor(stage: StageConfig, step: int) -> float:
    """Return the factor of all learning rates at a step.

    It rises linearly in the warm-up, then falls to a tenth (cosine) or to zero (linear), or stays
    1.

    Args:
        stage: the stage with its number of steps, warm-up and schedule.
        step: the optimizer step, from 0.
    """
    warmup = max(round(stage.warmup_ratio * stage.steps), 1)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(stage.steps - warmup, 1)
    if stage.schedule == "cosine":
        return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
    return 1 - done if stage.schedule == "linear" else 1.0


def set_learning_rates(
    optimizer: Any, groups: Sequence[ParameterGroup], stage: StageConfig, step: int
) -> None:
    """Set the learning rate of every parameter group for a step.

    Args:
        optimizer: the optimizer, also as accelerate wraps it.
        groups: its groups in order, with their own learning rates.
        stage: the stage with its schedule.
        step: the optimizer step, from 0.
    """
    factor = learning_rate_factor(stage, step)
    for entry, group in zip(optimizer.param_groups, groups, strict=True):
        entry["lr"] = group.learning_rate * factor


def is_finite(norm: Any, device: torch.device) -> Tensor:
    """Return whether a gradient norm is finite, as bool[] on the device.

    Args:
        norm: the norm, which may be sharded; None, from a launcher that checks by itself, counts as
            finite.
        device: the device of the result without a norm.
    """
    if norm is None:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def update(optimizer: Any, finite: Tensor) -> None:
    """Run the optimizer's step, or skip it if the gradient is not finite.

    The fused AdamW reads the flag on the device, as with a gradient scaler; for other optimizers
    the host waits for it.

    Args:
        optimizer: the optimizer, also as accelerate wraps it.
        finite: bool[].
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if isinstance(inner, torch.optim.AdamW):
        inner.grad_scale, inner.found_inf = None, (~finite).float()  # pyright: ignore
        optimizer.step()
    elif finite:
        optimizer.step()


def state_tensors(optimizer: Any, groups: Sequence[ParameterGroup]) -> dict[str, Tensor]:
    """Return the optimizer's state for safetensors: "KIND/PARAMETER" -> tensor on the CPU.

    Args:
        optimizer: the optimizer, also as accelerate wraps it.
        groups: its groups, which name the parameters.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return {
        f"{kind}/{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for group in groups
        for name, parameter in group.parameters.items()
        for kind, value in optimizer.state[parameter].items()
    }


def load_state_tensors(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[ParameterGroup],
    stage: StageConfig,
    tensors: Mapping[str, Tensor],
    where: object,
) -> None:
    """Load the state that `state_tensors` returned.

    Args:
        optimizer: the optimizer to fill.
        groups: its groups, which name the parameters.
        stage: the stage, which names the kind of optimizer.
        tensors: "KIND/PARAMETER" -> tensor.
        where: the file, for messages.

    Raises:
        CheckpointError: there is state for a parameter that does not train.
    """
    parameters = {name: p for group in groups for name, p in group.parameters.items()}
    for entry, value in tensors.items():
        kind, _, name = entry.partition("/")
        name = RENAMED_PARAMETERS.get(name, name)
        if name not in parameters:
            raise CheckpointError(f"{where}: optimiser state for {name!r}, not in the table")
        # bitsandbytes counts its steps on the host
        is_host_count = kind == "step" and stage.optimizer != "adamw"
        state = int(value) if is_host_count else value.to(parameters[name].device)
        optimizer.state[parameters[name]][kind] = state
