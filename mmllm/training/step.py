"""The training step: forward, losses, backward, update. And validation, with the same forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mmllm.data.batch import Batch
from mmllm.kernels.devices import to_device
from mmllm.losses import Loss, LossTerm, num_targets, total_loss
from mmllm.losses import compute as compute_losses
from mmllm.training.deferred import DeferredScalars, StepLosses, async_all_reduce
from mmllm.training.feed import StepData, TrainingStepDataset
from mmllm.training.optimizer import is_finite, update


def training_step(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    data: StepData,
    losses: Sequence[Loss],
    max_grad_norm: float,
    *,
    liger_loss: bool = False,
) -> StepLosses:
    """One optimizer step over the micro-batches of this process. No host-device synchronisation
    happens here: scalars are copied asynchronously and waited for when the losses are read.

    Args:
        accelerator: the process group and device.
        model: the model as `accelerator.prepare` returned it.
        optimizer: likewise.
        data: this process's part of the step.
        losses: the stage's losses.
        max_grad_norm: gradients are clipped to this norm.
        liger_loss: compute the head's loss by Liger's kernel, which needs CUDA.
    """
    device = accelerator.device
    local = num_targets(losses, data.microbatches)
    names = sorted(local)
    counts = to_device(torch.tensor([float(local[name]) for name in names]), device)
    totals = async_all_reduce(accelerator, counts)
    sums = {name: torch.zeros((), device=device) for name in names}
    for number, batch in enumerate(data.microbatches):
        last = number == len(data.microbatches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            terms = forward_losses(model, batch.to(device), losses, liger_loss)
            by_name = dict(zip(names, totals().unbind(), strict=True))
            # Gradients are averaged over processes, but each term is divided by its global count.
            loss = total_loss(losses, terms, by_name) * accelerator.num_processes
            accelerator.backward(loss)
        for name, term in terms.items():
            sums[name] += to_device(term.total.detach(), device)
    norm = accelerator.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], max_grad_norm
    )
    finite = is_finite(norm, device)
    update(optimizer, finite)
    optimizer.zero_grad()
    reduced = async_all_reduce(accelerator, torch.stack([sums[name] for name in names]))
    numbers = DeferredScalars(
        lambda: torch.cat([reduced(), totals(), finite[None].float()]),
        on_gpu=device.type == "cuda",
    )
    return StepLosses(names, {loss.name: loss.weight for loss in losses}, numbers)


def forward_losses(
    model: Any, batch: Batch, losses: Sequence[Loss], liger_loss: bool
) -> dict[str, LossTerm]:
    """Run one forward pass and compute its losses by name, in training and in validation.

    Args:
        model: the model, as accelerate wraps it.
        batch: a micro-batch.
        losses: the losses of the stage.
        liger_loss: compute the head's loss by Liger's kernel, which needs CUDA.
    """
    conditions = any(loss.reads_conditions for loss in losses)
    output = model(batch, liger_loss=liger_loss, conditions=conditions)
    return compute_losses(losses, output, batch)


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: Any,
    dataset: TrainingStepDataset,
    losses: Sequence[Loss],
    batches: int,
    *,
    liger_loss: bool = False,
) -> dict[str, float]:
    """Mean losses over the first batches of the validation data, the same ones every time.

    Args:
        accelerator: the process group and device.
        model: the model as `accelerator.prepare` returned it; it is left in evaluation mode.
        dataset: the validation data.
        losses: the stage's losses.
        batches: how many batches.
        liger_loss: compute the head's loss by Liger's kernel, which needs CUDA.
    """
    model.eval()
    totals: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}
    for data in dataset.steps(0, batches):
        for batch in data.microbatches:
            terms = forward_losses(model, batch.to(accelerator.device), losses, liger_loss)
            for name, term in terms.items():
                totals.setdefault(name, []).append(to_device(term.total, accelerator.device))
                counts[name] = counts.get(name, 0) + term.count
    names = sorted(totals)
    rows = [[sum(torch.stack(totals[name]).tolist()), counts[name]] for name in names]
    reduced = accelerator.reduce(torch.tensor(rows, device=accelerator.device)).tolist()  # pyright: ignore
    return {
        name: total / count for name, (total, count) in zip(names, reduced, strict=True) if count
    }
