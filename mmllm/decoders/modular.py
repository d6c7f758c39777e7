"""Images and video by any modular pipeline of diffusers whose text block hands tensors to the
denoiser: the text block is replaced by the condition, whose tensors are read from the block itself.

Legend: M media, P caption tokens, E their width, all layers of the text encoder side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Medium
from mmllm.decoders.config import DecoderConfig, ImageConfig, SequenceConfig, VideoConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.decoders.modular_loading import (
    TextlessPipeline,
    check_modular_folder,
    load_modular,
    pipeline_of_shapes,
)
from mmllm.decoders.options import apply_options
from mmllm.decoders.visual import ImageDecoder, VideoDecoder
from mmllm.errors import ConfigError

_UNIT = 32
"""Pixels of which the sides are multiples, for every pipeline."""


@dataclass(frozen=True)
class ModularImageConfig(ImageConfig, SequenceConfig):
    """A modular pipeline of images, by its folder with `modular_model_index.json`.

    `guidance` is the scale of its guider; distilled models take none.
    """

    steps: int = 28
    guidance: float = 1.0
    max_caption_tokens: int = 512
    height: int = 1024
    width: int = 1024


@dataclass(frozen=True)
class ModularVideoConfig(VideoConfig, SequenceConfig):
    """A modular pipeline of video, by its folder with `modular_model_index.json`."""

    steps: int = 50
    guidance: float = 1.0
    max_caption_tokens: int = 512
    frames: int = 121
    fps: float = 24.0
    height: int = 480
    width: int = 832


@dataclass(frozen=True)
class TextOutput:
    """One tensor that the text block makes of one prompt.

    Attributes:
        name: the block's.
        shape: of one condition, trailing dimensions flattened: (P, E), (P,) or (E,).
        trailing: the dimensions that are flattened in E; () for a mask.
        dtype: of a mask.
        is_list: whether the block gives a list with one tensor a prompt.
        varies: whether P depends on the prompt; then the condition is cut to it.
    """

    name: str
    shape: tuple[int, ...]
    trailing: tuple[int, ...]
    dtype: torch.dtype
    is_list: bool
    varies: bool


class ModularDecoder(ModalityDecoder):
    """Condition: the tensors of the text block, by names that end in `_mask` where they are masks.
    A sequence whose length depends on the prompt, and which comes without a mask, gets one.

    Media are made one by one, as the block reads prompts, so that a length is a caption's own.
    """

    samples_one_by_one = True
    passes_sigmas = True

    def __init__(self, config: DecoderConfig):
        if config.text_encoder != "own" or config.offload != "none":
            raise ConfigError(
                f"{self.modality}: a modular pipeline is loaded whole: expected text_encoder own "
                f"and offload none, got {config.text_encoder} and {config.offload}"
            )
        super().__init__(config)

    def check_folder(self) -> str:
        return check_modular_folder(self.folder)

    def load_folder(self, dtype: torch.dtype, _text_encoder: Any) -> TextlessPipeline:
        pipeline = load_modular(self.folder, dtype)
        apply_options(pipeline, self.config, self.lora)
        return pipeline

    # --- The condition -----------------------------------------------------------------------

    @cached_property
    def layout(self) -> dict[str, TextOutput]:
        """Name in the condition -> what the text block gives, read without weights."""
        pipeline, tokens = pipeline_of_shapes(self.folder), self.config.max_caption_tokens
        try:
            probes = [
                pipeline.encode(prompt, max_sequence_length=tokens)
                for prompt in ("a", "a " * 4 * tokens)
            ]
        except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{self.modality}: {self.folder}: the text block of a {self.pipeline_class} cannot "
                f"be read from its configs alone: {type(error).__name__}: {error}"
            ) from error
        return _read_layout(*probes)

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {key: part.shape for key, part in self.layout.items()}
        added = {mask: shapes[key][:1] for key, mask in self.masks.items() if mask not in shapes}
        return shapes | added

    @property
    def masks(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Sequence -> its mask: the block's own, or ours where the length varies."""
        parts = self.layout
        masks = {key: key for key, part in parts.items() if not part.trailing}
        found = {}
        for key, part in parts.items():
            if not part.trailing or len(part.shape) < 2:
                continue
            own = [mask for mask in masks if parts[mask].shape == part.shape[:1]]
            named = [mask for mask in own if mask.startswith(key)]
            if own:
                found[key] = (named or own)[0]
            elif part.varies:
                found[key] = f"{key}_mask"
        return found

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        rows = [
            self.pipeline.encode(caption, max_sequence_length=self.config.max_caption_tokens)
            for caption in captions
        ]
        condition = {
            key: torch.stack([_to_row(row[part.name], part) for row in rows])
            for key, part in self.layout.items()
        }
        for key, mask in self.masks.items():
            if mask not in condition:
                (positions, _), part = self.condition_shapes[key], self.layout[key]
                lengths = [_strip(row[part.name]).shape[0] for row in rows]
                condition[mask] = torch.stack(
                    [(torch.arange(positions) < length).float() for length in lengths]
                ).to(self.device)
        return condition

    def condition_kwargs(self, condition: Condition) -> dict[str, Any]:
        ready, kwargs = self.prepare_condition(condition), {}
        lengths = {}
        for key, mask in self.masks.items():
            lengths[key] = lengths[mask] = int((ready[mask][0] > 0.5).nonzero().max()) + 1
        for key, part in self.layout.items():
            value = ready[key][:, : lengths[key]] if part.varies else ready[key]
            if part.trailing:
                value = value.unflatten(-1, part.trailing)
                kwargs[part.name] = [value[0]] if part.is_list else value
            else:
                kwargs[part.name] = (value > 0.5).to(part.dtype)
        return kwargs

    def guidance_kwargs(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        """The scale is one of the guider, a component, or an input where there is one."""
        pipeline = self.pipeline
        guides = pipeline.guider is not None and scale > pipeline.neutral_guidance
        kwargs: dict[str, Any] = {"guidance_scale": scale}
        if guides or pipeline.needs_negative:
            kwargs |= self.negative_kwargs(negative())
        if pipeline.guider is not None:  # last: encoding a prompt switches guidance off
            pipeline.guider.guidance_scale = max(scale, pipeline.neutral_guidance)
        return kwargs

    # --- What needs a model of the pipeline's own latents ----------------------------------------

    def encode_latents(self, samples: Tensor) -> Tensor:
        raise ConfigError(self._no_loss)

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        raise ConfigError(self._no_loss)

    @property
    def _no_loss(self) -> str:
        return (
            f"{self.modality}: the denoising loss is not defined for modular pipelines, whose "
            f"blocks ({self.pipeline_class}) take no gradients; train the output projection by "
            "alignment (losses without 'denoise')"
        )


class ModularImageDecoder(ModularDecoder, ImageDecoder):
    """A modular decoder of images."""

    pipelines = ()

    def compute_size(self) -> tuple[int, int]:
        return self.resolve_size((1024, 1024), _UNIT if self.config.height > _UNIT else 16)

    def to_media(self, output: Any) -> list[Medium]:
        images = np.asarray(output.images)
        if images.shape[-1] == 4:  # transparent parts are white
            colours, opacity = images[..., :3], images[..., 3:]
            output.images = colours * opacity + (1 - opacity)
        return super().to_media(output)


class ModularVideoDecoder(ModularDecoder, VideoDecoder):
    """A modular decoder of video."""

    pipelines = ()

    def compute_size(self) -> tuple[int, int]:
        return self.resolve_size((480, 832), _UNIT if self.config.height > _UNIT else 16)

    def pipeline_kwargs(self) -> dict[str, Any]:
        return {"frame_rate": self.config.fps, **super().pipeline_kwargs()}


def _read_layout(short: dict[str, Any], long: dict[str, Any]) -> dict[str, TextOutput]:
    """The tensors of the text block, from its outputs for a short and a long prompt."""
    layout = {}
    for name, value in long.items():
        row, other = _strip(value), _strip(short[name])
        is_mask = "mask" in name
        key = name.replace("_mask", "") + "_mask" if is_mask else name
        if is_mask:
            shape, trailing = (row.shape[0],), ()
        elif row.ndim == 1:
            shape, trailing = (row.shape[0],), (row.shape[0],)
        else:
            shape, trailing = (row.shape[0], math.prod(row.shape[1:])), tuple(row.shape[1:])
        layout[key] = TextOutput(
            name,
            shape,
            trailing,
            row.dtype,
            isinstance(value, list),
            row.ndim + is_mask > 1 and row.shape[0] != other.shape[0],
        )
    return layout


def _strip(value: Any) -> Tensor:
    """What the block gives for one prompt, without the dimension of prompts."""
    return value[0]


def _to_row(value: Any, part: TextOutput) -> Tensor:
    """One row of a condition: flattened, and padded with zeros to the length of `part`."""
    row, (length, *width) = _strip(value).float(), part.shape
    missing = length - len(row)
    return F.pad(row.flatten(1), (0, 0, 0, missing)) if width else F.pad(row, (0, missing))


def build(config: ModularImageConfig | ModularVideoConfig) -> ModularDecoder:
    if isinstance(config, ModularVideoConfig):
        return ModularVideoDecoder(config)
    return ModularImageDecoder(config)
