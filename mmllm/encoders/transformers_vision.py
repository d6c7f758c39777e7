"""Images -> patch tokens, by a vision model of transformers: CLIP, SigLIP(2), DINOv2/v3, RADIO.

One class for all: upstream's image processor and model run; what differs is where the patches are
in the output.
Legend: M media, P patches, h x w a grid of patches, L tokens, C channels, S sample shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mmllm.conversation import Image, Medium
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.encoders.loading import ModelFolder
from mmllm.encoders.pooling import check_grid, pool_grid
from mmllm.encoders.pretrained import PretrainedConfig, TransformersEncoder
from mmllm.errors import AssetError, ConfigError


@dataclass(frozen=True)
class TransformersVisionConfig(PretrainedConfig):
    """Which weights, and how their output is pooled."""

    modality: Literal["image"] = "image"
    layer: int = -1
    """Output of which block; -1 is the last, with the model's final norm where it has one."""
    grid: int | None = None
    """Patches are averaged to grid x grid tokens; None keeps them all."""
    class_token: bool = False
    """Keep the class token, first; registers are always left out."""
    max_tokens: int | None = None
    """Of a model that sees patches in an image's own aspect (SigLIP 2, NaFlex): the patches of an
    image at most, which then takes as many tokens as it has; None: those of its processor, in as
    many tokens for every image."""


class TransformersVisionEncoder(TransformersEncoder):
    """float[M, *S] -> float[M, L, C]: patches row by row from the top left."""

    component = "transformers_vision"
    modality: ClassVar[str] = "image"
    model_classes: ClassVar = {
        "clip": "CLIPVisionModel",
        "clip_vision_model": "CLIPVisionModel",
        "siglip": "SiglipVisionModel",
        "siglip_vision_model": "SiglipVisionModel",
        "siglip2": "Siglip2VisionModel",
        "siglip2_vision_model": "Siglip2VisionModel",
        "dinov2": "Dinov2Model",
        "dinov2_with_registers": "Dinov2WithRegistersModel",
        "dinov3_vit": "DINOv3ViTModel",
        "dinov3_convnext": "DINOv3ConvNextModel",
        "radio": "RadioModel",
    }
    processor_class = "AutoImageProcessor"
    fingerprint_fields = ("grid", "class_token")

    def configure(self, source: ModelFolder, model_type: str, model: Any) -> None:
        config = self.config
        self._is_ragged = self.model_classes[model_type] == "Siglip2VisionModel"
        is_convolutional = model_type == "dinov3_convnext"
        if config.class_token and "siglip" in model_type:
            raise ConfigError(
                f"{self.component}.class_token: a model of type {model_type!r} has none"
            )
        if config.max_tokens is not None:
            self._set_budget(config.max_tokens, model_type)
        # Stages of a convolutional network differ in width and size: only the last is offered.
        self.choose_layer(1 if is_convolutional else model.num_hidden_layers)
        wide, high = (
            Image.from_numpy(np.zeros((*size, 3), np.uint8)) for size in ((48, 64), (64, 48))
        )
        self.sample_shape = self.probe_sample_shape(wide, high)
        if self._is_ragged:
            self._grid = (0, 0)
            patches = self.sample_shape[0] - 1
            if config.grid is not None and config.grid < 1:
                raise ConfigError(f"{self.component}.grid: expected at least 1, got {config.grid}")
        else:
            stride = 2 ** (len(model.depths) + 1) if is_convolutional else model.patch_size
            height, width = self.sample_shape[1:]
            if "clip" in model_type or "siglip" in model_type:  # their positions fit one size
                self._check_size((height, width), model.image_size, source)
            self._grid = (height // stride, width // stride)
            patches = self._grid[0] * self._grid[1]
            check_grid(config.grid, self._grid, where=self.component)
        tokens = patches if config.grid is None else config.grid**2
        channels = model.hidden_sizes[-1] if is_convolutional else model.hidden_size
        self.feature_shape = (tokens + config.class_token, channels)

    def to_tensor(self, medium: Image) -> Tensor:
        """An image -> float[3, H, W]; for SigLIP2 of any aspect float[1 + P, 3 * side^2], whose
        first row begins with the numbers of rows and columns of patches."""
        if not self._is_ragged:
            inputs = self.processor(images=medium.to_pil(), return_tensors="pt")
            return inputs["pixel_values"][0].float()
        most = self.processor.max_num_patches
        inputs = self.processor(
            images=medium.to_pil(), max_num_patches=medium.tokens_within(most), return_tensors="pt"
        )
        pixels = inputs["pixel_values"][0].float()
        sample = torch.zeros(1 + most, pixels.shape[1])
        sample[0, :2] = torch.as_tensor(inputs["spatial_shapes"][0])
        sample[1 : 1 + len(pixels)] = pixels
        return sample

    def forward(self, samples: Tensor) -> Features:
        """float[M, *S] -> float[M, L, C]; a mask where images differ in their number of patches."""
        if self._is_ragged:
            return self._forward_ragged(samples)
        states = self.hidden_states(pixel_values=self.on_network(samples))
        num_patches = self._grid[0] * self._grid[1]
        tokens = pool_grid(states[:, -num_patches:], self._grid, self.config.grid)
        if self.config.class_token:
            tokens = torch.cat([states[:, :1], tokens], dim=1)
        return Features(tokens.float())

    def _forward_ragged(self, samples: Tensor) -> Features:
        """`forward` of patches that come with their own number of rows and columns."""
        shapes = samples[:, 0, :2].round().long()
        patches = self.on_network(samples[:, 1:])
        positions = torch.arange(patches.shape[1], device=patches.device)
        mask = positions < shapes.prod(dim=1, keepdim=True).to(patches.device)
        states = self.hidden_states(
            pixel_values=patches, pixel_attention_mask=mask.long(), spatial_shapes=shapes
        )
        if self.config.grid is None:
            return Features(states.float(), mask)
        pooled = [
            pool_grid(row[None, : h * w], (h, w), self.config.grid)
            for row, (h, w) in zip(states, shapes.tolist(), strict=True)
        ]
        return Features(torch.cat(pooled).float())

    def _set_budget(self, max_tokens: int, model_type: str) -> None:
        """Let images take as many tokens as they have patches."""
        where = f"{self.component}.max_tokens"
        if not self._is_ragged:
            raise ConfigError(
                f"{where}: a model of type {model_type!r} sees images of one size; for larger ones "
                "wrap it in an encoder of type tiles, with its max_tokens"
            )
        if max_tokens < 1 or self.config.grid is not None:
            raise ConfigError(
                f"{where}: expected at least 1, and no grid, got {max_tokens}"
                f"{'' if self.config.grid is None else f' with grid {self.config.grid}'}"
            )
        self.processor.max_num_patches = max_tokens
        self.layout = ("", "", self._measure, False)

    def _measure(self, medium: Medium) -> tuple[int, None]:
        """The patches of an image, as the processor resizes it, and no grid."""
        from transformers.models.siglip2.image_processing_siglip2 import (
            get_image_size_for_max_num_patches,
        )

        assert isinstance(medium, Image)
        height, width = get_image_size_for_max_num_patches(
            image_height=medium.height,
            image_width=medium.width,
            patch_size=self.processor.patch_size,
            max_num_patches=medium.tokens_within(self.processor.max_num_patches),
        )
        return (height // self.processor.patch_size) * (width // self.processor.patch_size), None

    def _check_size(self, got: tuple[int, int], expected: int, source: ModelFolder) -> None:
        if got != (expected, expected):
            raise AssetError(
                f"{self.component}.weights: {source.folder}: the model sees {expected} x "
                f"{expected} pixels, but preprocessor_config.json makes {got[0]} x {got[1]}; are "
                "both of the same model?"
            )


def build(config: TransformersVisionConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    return TransformersVisionEncoder(config)
