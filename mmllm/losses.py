"""The losses: text, alignment, denoising, retention. Each is a sum and a count, never a mean.

A mean over zero rows is not a number, and a mean per process weighs tokens wrongly when processes
hold different numbers of them: one place, `total_loss`, divides by the count over all of them.
Legend: P supervised positions, M media of one key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.data.batch import Batch
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.kernels.devices import to_device
from mmllm.model import Output


@dataclass(frozen=True)
class LossTerm:
    """One loss over one batch: `total` is a scalar tensor, `count` what it was summed over."""

    total: Tensor
    count: int


def text(token_nll: Tensor) -> LossTerm:
    """Cross-entropy over supervised positions: float32[P] of -log p."""
    return LossTerm(token_nll.sum(), len(token_nll))


def align(
    condition: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    masks: Mapping[str, str],
    distance: str,
) -> LossTerm:
    """Distance of the projected condition to the caption's own: a mean per medium and tensor,
    summed over media. Where a sequence has a mask, only its real positions count; the mask itself
    is one more tensor to meet."""
    media = len(next(iter(condition.values())))
    total = torch.zeros((), device=next(iter(condition.values())).device)
    for name, value in condition.items():
        if media == 0:
            total = total + value.sum()
            continue
        each = _distance(value.float(), targets[name].float(), distance, name)  # [M] or [M, P]
        if name in masks:
            real = targets[masks[name]].float()
            each = (each * real).sum(-1) / real.sum(-1).clamp_min(1.0)
        total = total + each.flatten(1).mean(1).sum() if each.ndim > 1 else total + each.sum()
    return LossTerm(total, media)


def denoise(
    decoder: ModalityDecoder,
    condition: dict[str, Tensor],
    latents: Tensor | None,
    seeds: Sequence[int],
) -> LossTerm:
    """The frozen decoder's own training loss under the projected condition, per sample.

    Noise and time are drawn for each medium from its own seed, so the loss of an item does not
    depend on the batch or the process that it is in.
    """
    media = len(next(iter(condition.values())))
    if latents is None:
        return LossTerm(
            sum((value.sum() * 0.0 for value in condition.values()), torch.zeros(())), 0
        )
    noise, times = draw_noise(latents, seeds)
    each = decoder.denoising_loss(condition, latents, noise=noise, times=times)
    return LossTerm(each.sum(), media)


def kl(kl_to_base: Tensor) -> LossTerm:
    """Kullback-Leibler divergence of the adapted LLM from the base LLM, over all positions of
    plain text, float32[P] (learning without forgetting, Li and Hoiem 2016). What the adapted one
    would rather draw than say counts against it."""
    return LossTerm(kl_to_base.sum(), len(kl_to_base))


def draw_noise(latents: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Noise like `latents` and times float[M] in (0, 1), each row from its own seed."""
    noise, times = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(latents.shape[1:], generator=generator))
        times.append(torch.rand((), generator=generator))
    return (
        to_device(torch.stack(noise), latents.device).to(latents.dtype),
        to_device(torch.stack(times).clamp(1e-3, 1 - 1e-3), latents.device),
    )


def compute(
    output: Output,
    batch: Batch,
    weights: Mapping[str, float],
    *,
    decoders: Mapping[str, ModalityDecoder],
    distance: str = "mse",
) -> dict[str, LossTerm]:
    """Every loss of a stage: `text`, `kl`, `align/KEY`, `denoise/KEY`."""
    terms: dict[str, LossTerm] = {"text": text(output.token_nll)} if "text" in weights else {}
    if output.kl_to_base is not None:
        terms["kl"] = kl(output.kl_to_base)
    for key, condition in output.conditions.items():
        media = batch.outputs[key]
        if "align" in weights:
            terms[f"align/{key}"] = align(condition, media.targets, decoders[key].masks, distance)
        if weights.get("denoise"):
            condition = {name: value.float() for name, value in condition.items()}
            terms[f"denoise/{key}"] = denoise(decoders[key], condition, media.latents, media.seeds)
    return terms


def num_targets(batch: Batch, weights: Mapping[str, float]) -> dict[str, int]:
    """What `compute` will count, known before the forward pass."""
    found = {"text": len(batch.labels)} if "text" in weights else {}
    if batch.text_windows is not None:
        found["kl"] = batch.text_windows.numel()
    for key, media in batch.outputs.items():
        if "align" in weights:
            found[f"align/{key}"] = len(media.token_indices)
        if weights.get("denoise"):
            found[f"denoise/{key}"] = 0 if media.latents is None else len(media.token_indices)
    return found


def total_loss(
    terms: Mapping[str, LossTerm], weights: Mapping[str, float], totals: Mapping[str, int | Tensor]
) -> Tensor:
    """One scalar to differentiate. `totals` are the terms' counts over all processes and
    accumulation steps, on the host or on the device; a modality that is absent everywhere adds a
    zero with a gradient."""
    loss = torch.zeros(())
    for name, term in terms.items():
        total = totals.get(name, term.count)
        count = total.clamp_min(1) if isinstance(total, Tensor) else max(total, 1)
        loss = loss + weights[name.partition("/")[0]] * term.total / count
    return loss


def _distance(value: Tensor, target: Tensor, distance: str, name: str) -> Tensor:
    """Per position, over the last axis; a mask's positions are compared one by one."""
    if value.shape != target.shape:
        raise ValueError(
            f"{name}: projected condition {list(value.shape)} but target {list(target.shape)}; was "
            "the output projection trained for another decoder?"
        )
    if name.endswith("mask"):
        return (value - target).square()
    if distance == "cosine":
        return 1 - F.cosine_similarity(value, target, dim=-1)
    loss = F.smooth_l1_loss if distance == "smooth_l1" else F.mse_loss
    return loss(value, target, reduction="none").mean(-1)
