"""The losses of a stage: text, KL to the base LLM, alignment, denoising. Each is a sum and a count.

A mean over zero rows is not a number, and a mean per process weights tokens wrongly when processes
hold different numbers of them. So a loss returns its sum and the number of its targets, and
`total_loss` alone divides, by the number over all processes and accumulation steps.

Legend: P supervised positions, M media of one key, L positions of a condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.config import DenoiseConfig
from mmllm.data.batch import Batch
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.decoders.times import UNIFORM, TimeDistribution, time_distribution
from mmllm.kernels.devices import to_device
from mmllm.model import AnyToAny, Output
from mmllm.projections.base import OutputProjection


@dataclass(frozen=True)
class LossTerm:
    """One loss over one micro-batch.

    Attributes:
        total: a scalar tensor, the sum over the targets.
        count: the number of targets.
    """

    total: Tensor
    count: int


class Loss(Protocol):
    """One loss of a stage."""

    @property
    def name(self) -> str:
        """The name of its metric, such as `align/image`."""
        ...

    @property
    def weight(self) -> float:
        """The factor of this loss in the sum that is minimised."""
        ...

    @property
    def reads_conditions(self) -> bool:
        """Whether it reads the conditions of output media."""
        ...

    def num_targets(self, batch: Batch) -> int:
        """Return how many targets `compute` sums over; known before the forward pass."""
        ...

    def compute(self, output: Output, batch: Batch) -> LossTerm:
        """Sum the loss over the targets of a micro-batch.

        Args:
            output: what the model's forward pass returned.
            batch: the micro-batch.

        Returns:
            The sum and the number of targets; where there are none, a zero with a gradient.
        """
        ...


@dataclass(frozen=True)
class TextNLL:
    """Cross-entropy of the supervised tokens, those of signals included."""

    weight: float
    name: str = "text"
    reads_conditions: bool = False

    def num_targets(self, batch: Batch) -> int:
        return len(batch.labels)

    def compute(self, output: Output, batch: Batch) -> LossTerm:
        return LossTerm(output.token_nll.sum(), self.num_targets(batch))


@dataclass(frozen=True)
class FirstTokenNLL(TextNLL):
    """Cross-entropy of the tokens that begin a reply or follow a medium, in addition to `text`.

    They decide what a reply is: an answer or a refusal, one medium or two. Among the twenty or so
    tokens of a reply they have little weight in `text`.
    """

    name: str = "first_token"

    def num_targets(self, batch: Batch) -> int:
        return len(batch.first_tokens)

    def compute(self, output: Output, batch: Batch) -> LossTerm:
        return LossTerm(output.token_nll[batch.first_tokens].sum(), self.num_targets(batch))


@dataclass(frozen=True)
class KLToBase:
    """KL(base LLM || adapted LLM) over all positions of plain text, as in learning without
    forgetting (Li and Hoiem 2016). The base LLM gives signal tokens no probability, so what the
    adapted one gives them adds to the divergence."""

    weight: float
    name: str = "kl"
    reads_conditions: bool = False

    def num_targets(self, batch: Batch) -> int:
        return 0 if batch.text_windows is None else batch.text_windows.numel()

    def compute(self, output: Output, batch: Batch) -> LossTerm:
        if output.kl_to_base is None:
            return LossTerm(torch.zeros(()), 0)
        return LossTerm(output.kl_to_base.sum(), self.num_targets(batch))


@dataclass(frozen=True)
class Align:
    """Distance of the projected condition of one output to the caption's own.

    Attributes:
        key: the output.
        masks: name of a condition tensor -> name of the mask of its positions.
        distance: mse, smooth_l1 or cosine.
    """

    key: str
    weight: float
    masks: Mapping[str, str]
    distance: str = "mse"
    reads_conditions: bool = True

    @property
    def name(self) -> str:
        return f"align/{self.key}"

    def num_targets(self, batch: Batch) -> int:
        return len(batch.outputs[self.key].token_indices)

    def compute(self, output: Output, batch: Batch) -> LossTerm:
        condition, targets = output.conditions[self.key], batch.outputs[self.key].targets
        total = alignment_distance(condition, targets, self.masks, self.distance)
        return LossTerm(total, self.num_targets(batch))


@dataclass(frozen=True)
class Denoise:
    """The frozen decoder's own training loss under the projected condition of one output.

    Noise and time are drawn for each medium from its own seed, so that the loss of an item does not
    depend on its batch or process; so is, in training, which media get the projection's null
    condition in place of their own.

    Attributes:
        key: the output.
        decoder: of the output.
        projection: of the output.
        times: the distribution of noise levels.
        min_snr: gamma of min-SNR weighting; None: all noise levels count alike.
    """

    key: str
    weight: float
    decoder: ModalityDecoder
    projection: OutputProjection
    times: TimeDistribution = UNIFORM
    min_snr: float | None = None
    reads_conditions: bool = True

    @property
    def name(self) -> str:
        return f"denoise/{self.key}"

    def num_targets(self, batch: Batch) -> int:
        media = batch.outputs[self.key]
        return 0 if media.latents is None else len(media.token_indices)

    def compute(self, output: Output, batch: Batch) -> LossTerm:
        media = batch.outputs[self.key]
        condition = {name: value.float() for name, value in output.conditions[self.key].items()}
        if media.latents is None:
            zeros = (value.sum() * 0.0 for value in condition.values())
            return LossTerm(sum(zeros, torch.zeros(())), 0)
        losses = self.of_media(condition, media.latents, media.seeds, media.references)
        return LossTerm(losses.sum(), self.num_targets(batch))

    def of_media(
        self,
        condition: dict[str, Tensor],
        latents: Tensor,
        seeds: Sequence[int],
        references: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Compute the loss of each medium: float[M].

        Args:
            condition: float32[M, …] by name.
            latents: float[M, …].
            seeds: M seeds of noise, time and dropped conditions.
            references: of each medium the latents of its references, float[R, …]; None: no medium
                has any.
        """
        noise, times = draw_noise(latents, seeds, self.times)
        return self.decoder.denoising_loss(
            self._drop(condition, seeds),
            latents,
            noise=noise,
            times=times,
            min_snr=self.min_snr,
            references=references,
        )

    def _drop(self, condition: dict[str, Tensor], seeds: Sequence[int]) -> dict[str, Tensor]:
        """Put the null condition in place of that of a share of the media, in training."""
        null = self.projection.null_condition(len(seeds))
        if null is None or not self.projection.training:
            return condition
        is_dropped = draw_dropped(seeds, self.projection.condition_dropout)
        rows = {
            name: to_device(is_dropped, value.device).view(-1, *[1] * (value.ndim - 1))
            for name, value in condition.items()
        }
        return {
            name: null[name].float().where(rows[name], value) for name, value in condition.items()
        }


def build_losses(
    model: AnyToAny,
    weights: Mapping[str, float],
    *,
    align_loss: str = "mse",
    denoise: DenoiseConfig | None = None,
) -> list[Loss]:
    """The losses of a stage.

    Args:
        model: its outputs are what `align` and `denoise` are computed for.
        weights: name -> weight, as in `StageConfig.losses`.
        align_loss: distance of `align`: mse, smooth_l1 or cosine.
        denoise: noise levels of `denoise`; None: drawn uniformly, and all count alike.
    """
    of_text = {"text": TextNLL, "first_token": FirstTokenNLL, "kl": KLToBase}
    losses: list[Loss] = [of_text[name](weights[name]) for name in of_text if name in weights]
    for key in model.num_signal_tokens:
        decoder = model.decoders[key]
        if "align" in weights:
            losses.append(Align(key, weights["align"], decoder.masks, align_loss))
        if weights.get("denoise"):
            times, min_snr = UNIFORM, None
            if denoise:
                times, min_snr = time_distribution(decoder, denoise), denoise.min_snr
            projection = model.output_projection(key)
            losses.append(
                Denoise(key, weights["denoise"], decoder, projection, times, min_snr=min_snr)
            )
    return losses


def num_targets(losses: Sequence[Loss], batches: Sequence[Batch]) -> dict[str, int]:
    """Count the targets of each loss, by name.

    Args:
        losses: the losses of the stage.
        batches: micro-batches.
    """
    return {loss.name: sum(loss.num_targets(batch) for batch in batches) for loss in losses}


def compute(losses: Sequence[Loss], output: Output, batch: Batch) -> dict[str, LossTerm]:
    """Compute every loss of one forward pass, by name.

    Args:
        losses: the losses of the stage.
        output: what the model's forward pass returned.
        batch: the micro-batch.
    """
    return {loss.name: loss.compute(output, batch) for loss in losses}


def total_loss(
    losses: Sequence[Loss],
    terms: Mapping[str, LossTerm],
    counts: Mapping[str, int | Tensor],
) -> Tensor:
    """The weighted sum of the mean losses: one scalar to differentiate.

    Args:
        losses: the stage's losses.
        terms: `compute` of one batch.
        counts: targets by name, over all processes and accumulation steps, on the host or on the
            device. A modality that is absent everywhere adds a zero with a gradient.
    """
    total = torch.zeros(())
    for loss in losses:
        term = terms[loss.name]
        count = counts[loss.name]
        count = count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)
        total = total + loss.weight * term.total / count
    return total


def alignment_distance(
    condition: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    masks: Mapping[str, str],
    distance: str,
) -> Tensor:
    """Distance of a projected condition to its target: a mean per medium and tensor, summed.

    Where a sequence has a mask, only its real positions count; the mask itself is one more tensor
    to predict.

    Args:
        condition: name -> float[M, …] of the projection.
        targets: name -> float[M, …] of the caption.
        masks: name of a tensor -> name of the mask of its positions.
        distance: mse, smooth_l1 or cosine.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes of a tensor and its target differ.
    """
    first = next(iter(condition.values()))
    total = torch.zeros((), device=first.device)
    for name, value in condition.items():
        if len(first) == 0:
            total = total + value.sum()
            continue
        each = _distance(value.float(), targets[name].float(), distance, name)  # [M] or [M, L]
        if name in masks:
            real = targets[masks[name]].float()
            each = (each * real).sum(-1) / real.sum(-1).clamp_min(1.0)
        total = total + each.flatten(1).mean(1).sum() if each.ndim > 1 else total + each.sum()
    return total


def draw_noise(
    latents: Tensor, seeds: Sequence[int], distribution: TimeDistribution = UNIFORM
) -> tuple[Tensor, Tensor]:
    """Draw the noise and the time of each row from its own seed, whatever the batch.

    Args:
        latents: float[M, ...], whose shape, dtype and device the noise has.
        seeds: one for each row.
        distribution: of times.

    Returns:
        Noise like `latents`, and times float[M] in (0, 1).
    """
    noise: list[Tensor] = []
    times: list[Tensor] = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(latents.shape[1:], generator=generator))
        times.append(distribution.draw(generator))
    return (
        to_device(torch.stack(noise), latents.device).to(latents.dtype),
        to_device(torch.stack(times).clamp(1e-3, 1 - 1e-3), latents.device),
    )


def draw_dropped(seeds: Sequence[int], share: float) -> Tensor:
    """Draw which rows lose their condition, each from its own seed: bool[M].

    Args:
        seeds: one for each row.
        share: the probability.
    """
    draws = [torch.rand((), generator=torch.Generator().manual_seed(~seed)) for seed in seeds]
    return torch.stack(draws) < share


def _distance(value: Tensor, target: Tensor, distance: str, name: str) -> Tensor:
    """Per position, over the last axis; the positions of a mask are compared one by one."""
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
