"""Swap a decoder of a trained system: only the output projection in front of it is fitted anew.

The language model runs once over the conversations, and the new decoder's text encoder once over
their captions; the projection then learns from what was kept, in minutes. What the language
model has learned, signal tokens included, stays as it is. Layers of the former projection whose
shapes fit are the beginning of the new one.

Legend: M media, K signal tokens, D LLM width.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm import checkpoints
from mmllm import config as configs
from mmllm.config import PrealignConfig, StageConfig
from mmllm.data.rendering import Rendered
from mmllm.errors import ConfigError, TrainingError
from mmllm.features.cache import FeatureCache
from mmllm.kernels.devices import to_device
from mmllm.losses import Denoise, alignment_distance
from mmllm.model import AnyToAny
from mmllm.projections.base import OutputProjection
from mmllm.projections.connector import Connector
from mmllm.training.feed import open_sources, render_all_items
from mmllm.training.projection_fit import (
    ProjectionFit,
    SignalStates,
    collect_states,
    evaluating,
)

_HELD_OUT = 64
"""Most captions that are held out to measure."""
_DRAWS = 4
"""Noise levels at which each held-out medium is denoised."""


@dataclass(frozen=True)
class SwapOptions:
    """How the new projection is fitted.

    Attributes:
        steps: of alignment with the captions' embeddings.
        denoise_steps: of the new decoder's denoising loss, after those; needs the media.
        batch_size: media of a step.
        learning_rate: the peak of the schedule.
        variants: phrasings of each item.
        keep: begin with the former projection's tensors where names and shapes are the same.
        seed: of what is held out, the order and the noise.
    """

    steps: int = 1500
    denoise_steps: int = 0
    batch_size: int = 128
    learning_rate: float = 1e-3
    variants: int = 2
    keep: bool = True
    seed: int = 0


@dataclass(frozen=True)
class ConditionQuality:
    """How good conditions from the language model are for a decoder, on held-out media.

    Attributes:
        explained: the share of the variance of captions' embeddings that the conditions explain; 1
            are the decoder's own.
        own: the denoising loss under the captions' own conditions; None without the media.
        projected: under the conditions from the language model.
        empty: under the condition of the empty caption.
    """

    explained: float
    own: float | None = None
    projected: float | None = None
    empty: float | None = None

    @property
    def share(self) -> float | None:
        """What the conditions take off the loss, as a share of what captions take off it."""
        if self.own is None or self.projected is None or self.empty is None:
            return None
        return (self.empty - self.projected) / max(self.empty - self.own, 1e-12)


@dataclass(frozen=True)
class Swap:
    """What a swap did to one decoder.

    Attributes:
        key: of the decoder.
        before: type and weights of the former decoder.
        after: those of the new one.
        num_media: media that the projection was fitted to.
        num_held_out: media that were measured.
        former: quality of the former projection for the former decoder.
        unfitted: of the new projection before it was fitted; `fitted`: after.
        seconds: that fitting took, the language model's pass and captions included.
    """

    key: str
    before: str
    after: str
    num_media: int
    num_held_out: int
    former: ConditionQuality
    unfitted: ConditionQuality
    fitted: ConditionQuality
    seconds: float


def swap_decoders(
    source: checkpoints.Checkpoint,
    decoders: Mapping[str, Any],
    output: Path,
    *,
    stage: StageConfig | None = None,
    options: SwapOptions | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> list[Swap]:
    """Replace decoders of a checkpoint, fit their output projections, and save the result.

    Args:
        source: the checkpoint.
        decoders: Config of the new decoder by the key of the former one.
        output: folder of the new checkpoint; one that is there is replaced.
        stage: whose data are used; None: the stage that wrote the checkpoint.
        options: of the fit.
        device: where everything runs.
        progress: show progress bars.

    Raises:
        ConfigError: no decoder of a key, another modality, or no data with such media.
        CheckpointError: the checkpoint is damaged, or the new one cannot be written.
    """
    options = options or SwapOptions()
    has_stage = "stage" in source.config()
    if stage is None:
        stage = source.run().stage
    model = checkpoints.load_model(source, device=device)
    for key in decoders:
        if key not in model.decoders:
            raise ConfigError(
                f"{source.folder}: no decoder {key!r} to swap; it has "
                f"{', '.join(sorted(model.decoders)) or 'none'}"
            )
    sources = open_sources(stage.data, "stage.data")
    items = list(render_all_items(model.renderer, sources, options.variants))
    swaps = [
        _swap(model, key, decoder, items, options, progress=progress)
        for key, decoder in decoders.items()
    ]
    checkpoints.save(
        output,
        model,
        step=source.step,
        stage=source.run().stage if has_stage else None,
        resolved_settings=source.resolved_settings,
    )
    return swaps


def _swap(
    model: AnyToAny,
    key: str,
    config: Any,
    items: Sequence[Rendered],
    options: SwapOptions,
    *,
    progress: bool,
) -> Swap:
    train, held_out = _split(items, key, options.seed)
    fit = ProjectionFit(
        PrealignConfig(options.steps, options.batch_size, options.learning_rate),
        options.seed,
        nullcontext,
        progress,
    )
    model.requires_grad_(False)
    before = _name(model.config.decoders[key])
    known = _collect(model, key, held_out, fit, denoise=True)
    former = measure(model, key, known)

    shapes = model.output_projection(key).condition_shapes if options.keep else {}
    began = time.perf_counter()
    replace_decoder(model, key, config, keep=options.keep, seed=options.seed)
    states = _collect(model, key, train, fit, denoise=options.denoise_steps > 0)
    measured = _collect(model, key, held_out, fit, denoise=True)
    projection = model.output_projection(key)
    _begin(model, key, states, shapes)
    unfitted = measure(model, key, measured)
    projection.requires_grad_(True)
    _align(model, key, states, fit)
    if options.denoise_steps:
        rest = replace(fit, options=replace(fit.options, steps=options.denoise_steps))
        _denoise(model, key, states, rest)
    projection.requires_grad_(False)
    return Swap(
        key,
        before,
        _name(config),
        len(states.states),
        len(measured.states),
        former,
        unfitted,
        measure(model, key, measured),
        time.perf_counter() - began,
    )


def replace_decoder(
    model: AnyToAny, key: str, config: Any, *, keep: bool = True, seed: int = 0
) -> None:
    """Put another decoder into a model, with a projection of the same kind in front of it.

    Args:
        model: changed in place.
        key: of the decoder.
        config: of the new decoder.
        keep: begin with the former projection's tensors where names and shapes are the same.
        seed: of the new tensors.

    Raises:
        ConfigError: the new decoder makes another modality.
    """
    decoder = configs.build(config)
    former = model.output_projection(key)
    if decoder.modality != model.decoders[key].modality:
        raise ConfigError(
            f"decoders.{key}: it makes {model.decoders[key].modality}, the new one "
            f"{decoder.modality}; a decoder can take the place of one of its modality only"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projection: OutputProjection = configs.build(
            model.config.output_projections[key],
            condition_shapes=decoder.condition_shapes,
            width=model.llm.width,
        )
    own = dict(projection.named_parameters())
    with torch.no_grad():
        for name, value in former.named_parameters():
            if keep and name in own and own[name].shape == value.shape:
                own[name].copy_(value)
    decoder.to(model.device).share_text_encoder(model.llm, f"decoders.{key}")
    model.decoders[key].release()
    model.decoders[key] = decoder
    model.output_projections[key] = projection.to(model.device).requires_grad_(False).eval()
    model.config = replace(model.config, decoders={**model.config.decoders, key: config})


@torch.no_grad()
def measure(model: AnyToAny, key: str, known: SignalStates) -> ConditionQuality:
    """Measure the conditions that a projection makes of kept states.

    Args:
        model: has projection and decoder.
        key: of both.
        known: states, the captions' own conditions and, perhaps, latents.
    """
    projection, decoder = model.output_projection(key), model.decoders[key]
    targets = {name: value.to(known.states.device) for name, value in known.targets.items()}
    with evaluating(projection):
        condition = projection.conditions(known.states, targets)
    explained = _explained(condition, targets, decoder.masks)
    if known.latents is None:
        return ConditionQuality(explained)
    num = len(known.states)
    loss = Denoise(key, 1.0, decoder, projection)
    latents = known.latents.to(known.states.device)

    def loss_under(own: Mapping[str, Tensor]) -> float:
        values = {name: value.float() for name, value in own.items()}
        with evaluating(projection):
            seeds = [range(draw * num, (draw + 1) * num) for draw in range(_DRAWS)]
            draws = [loss.of_media(values, latents, each, known.references) for each in seeds]
        return torch.stack(draws).mean().item()

    empty = decoder.unconditional(num)
    return ConditionQuality(
        explained, loss_under(targets), loss_under(condition), loss_under(empty)
    )


def _split(items: Sequence[Rendered], key: str, seed: int) -> tuple[list[Rendered], list[Rendered]]:
    """Conversations with media of a decoder, to train on and to measure on, without a caption in
    both. Raises ConfigError for fewer than two captions."""
    by_caption: dict[str, list[Rendered]] = {}
    for item in items:
        for span in item.outputs:
            if span.key == key:
                by_caption.setdefault(span.medium.caption or "", []).append(item)
                break
    if len(by_caption) < 2:
        raise ConfigError(
            f"stage.data: {len(by_caption)} captions of media of decoders.{key}, expected two or "
            "more; name a stage with such data (--config)"
        )
    captions = sorted(by_caption)
    random.Random(seed).shuffle(captions)
    count = max(1, min(_HELD_OUT, math.ceil(len(captions) / 10)))
    held_out = [by_caption[caption][0] for caption in captions[:count]]
    train = [item for caption in captions[count:] for item in by_caption[caption]]
    return train, held_out


def _collect(
    model: AnyToAny, key: str, items: list[Rendered], fit: ProjectionFit, *, denoise: bool
) -> SignalStates:
    return collect_states(model, items, FeatureCache(model, denoise=denoise), [key], fit)[key]


def _begin(
    model: AnyToAny, key: str, states: SignalStates, former: Mapping[str, tuple[int, ...]]
) -> None:
    """Standardise a fresh connector; heads that the former had not begin at the captions' mean."""
    projection = model.output_projection(key)
    if not isinstance(projection, Connector):
        return
    if projection.is_new:
        projection.standardize(states.states)
    projection.start_at_captions(
        {
            name: value
            for name, value in states.targets.items()
            if name not in former or former[name][-1] != value.shape[-1]
        }
    )
    if projection.condition_dropout:
        projection.set_null_condition(model.decoders[key].unconditional(1))


def _align(model: AnyToAny, key: str, states: SignalStates, fit: ProjectionFit) -> None:
    projection, masks = model.output_projection(key), model.decoders[key].masks

    def loss(chosen: Tensor) -> Tensor:
        chosen = to_device(chosen, states.states.device)
        targets = {name: value[chosen] for name, value in states.targets.items()}
        condition = projection.conditions(states.states[chosen], targets)
        return alignment_distance(condition, targets, masks, "mse") / len(chosen)

    fit(f"decoders.{key}", projection, len(states.states), loss)


def _denoise(model: AnyToAny, key: str, states: SignalStates, fit: ProjectionFit) -> None:
    projection, latents = model.output_projection(key), states.latents
    if latents is None:
        raise TrainingError(
            f"decoders.{key}: some media of the data are captions alone, so that nothing can be "
            "denoised; leave out --denoise-steps, or name a stage whose data have the media"
        )
    loss_of = Denoise(key, 1.0, model.decoders[key], projection)

    def loss(chosen: Tensor) -> Tensor:
        seeds = torch.randint(2**40, (len(chosen),)).tolist()
        chosen = to_device(chosen, states.states.device)
        captions = {name: value[chosen] for name, value in states.targets.items()}
        values = projection.conditions(states.states[chosen], captions)
        condition = {name: value.float() for name, value in values.items()}
        given = condition, latents[chosen], seeds, states.references_of(chosen)
        return loss_of.of_media(*given).mean()

    fit(f"decoders.{key}, denoising", projection, len(states.states), loss)


def _explained(
    condition: Mapping[str, Tensor], targets: Mapping[str, Tensor], masks: Mapping[str, str]
) -> float:
    """The share of the variance of the targets that a condition explains, over used positions."""
    shares = []
    for name, target in targets.items():
        if name.endswith("mask"):
            continue
        used = targets[masks[name]][..., None] if name in masks else torch.ones_like(target)
        weight = used.sum(0).clamp_min(1.0)
        mean = (target * used).sum(0) / weight
        error = ((condition[name] - target).square() * used).sum()
        spread = ((target - mean).square() * used).sum().clamp_min(1e-12)
        shares.append(1 - (error / spread).item())
    return sum(shares) / max(len(shares), 1)


def _name(config: Any) -> str:
    """Type and weights of a decoder."""
    tree = configs.dump(config)
    return f"{tree.get('type', type(config).__name__)} {tree.get('weights', '')}".strip()
