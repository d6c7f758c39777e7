"""Pictures -> patch tokens, by a vision model of transformers: CLIP, SigLIP, SigLIP2, DINOv2/v3.

One class for all: upstream's image processor prepares, upstream's model runs, and what is left is
where the patches stand. Legend: M pictures, P patches, L tokens, C channels, S sample shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mmllm.conversation import Image
from mmllm.encoders import pretrained
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.errors import AssetError, ConfigError

_WHERE = "transformers_vision"
_MODELS = {
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
}
"""`model_type` of a folder -> the class of transformers that reads its vision tower."""


@dataclass(frozen=True)
class TransformersVisionConfig:
    """Which weights, what of their answer."""

    weights: str
    """A folder or a hub id."""
    modality: Literal["image"] = "image"
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    layer: int = -1
    """Output of which block; -1 is the last, with the model's final norm where it has one."""
    grid: int | None = None
    """Patches are averaged to grid x grid tokens; None keeps them all."""
    class_token: bool = False
    """Keep the class token, first; registers are always left out."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights; tokens are float32."""


class TransformersVisionEncoder(ModalityEncoder):
    """float[M, *S] -> float[M, L, C]: patches row by row from the top left."""

    modality: ClassVar[str] = "image"

    def __init__(self, config: TransformersVisionConfig) -> None:
        """Opens and loads the weights; raises AssetError and ConfigError."""
        super().__init__()
        import transformers

        self.config = config
        source = pretrained.Source(config.weights, config.revision, where=_WHERE)
        kind = source.family(list(_MODELS))
        self.processor = source.preprocessor(transformers.AutoImageProcessor)
        self.network = source.load(getattr(transformers, _MODELS[kind]), config.dtype)
        of: Any = self.network.config
        self._ragged = _MODELS[kind] == "Siglip2VisionModel"
        convolutional = kind == "dinov3_convnext"
        if config.class_token and "siglip" in kind:
            raise ConfigError(f"{_WHERE}.class_token: a model of type {kind!r} has none")
        # Stages of a convolutional network differ in width and size: only the last is offered.
        blocks = 1 if convolutional else of.num_hidden_layers
        block = pretrained.block_number(config.layer, blocks, where=_WHERE)
        self._after = None if block == blocks else block

        blanks = (Image.from_numpy(np.zeros((*s, 3), np.uint8)) for s in ((48, 64), (64, 48)))
        self.sample_shape = pretrained.one_shape(*map(self.preprocess, blanks), where=_WHERE)
        if self._ragged:
            self._grid = (0, 0)
            patches = self.sample_shape[0] - 1
            if config.grid is not None and config.grid < 1:
                raise ConfigError(f"{_WHERE}.grid: expected at least 1, got {config.grid}")
        else:
            stride = 2 ** (len(of.depths) + 1) if convolutional else of.patch_size
            height, width = self.sample_shape[1:]
            if "clip" in kind or "siglip" in kind:  # their positions are for one size
                _check_size((height, width), of.image_size, source)
            self._grid = (height // stride, width // stride)
            patches = self._grid[0] * self._grid[1]
            pretrained.check_grid(config.grid, self._grid, where=_WHERE)
        tokens = patches if config.grid is None else config.grid**2
        channels = of.hidden_sizes[-1] if convolutional else of.hidden_size
        self.feature_shape = (tokens + config.class_token, channels)
        self._fingerprint = pretrained.fingerprint(
            {
                "component": _WHERE,
                "weights": source.hash,
                "preprocessing": self.processor.to_dict(),
                "layer": block,
                "grid": config.grid,
                "class_token": config.class_token,
                "dtype": config.dtype,
            }
        )
        self.freeze()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def _preprocess(self, medium: Image) -> Tensor:
        """A picture -> float[3, H, W]; for SigLIP2 of any aspect float[1 + P, 3 * side^2], of which
        the first row begins with how many patches are high and wide."""
        made = self.processor(images=medium.to_pil(), return_tensors="pt")
        pixels = made["pixel_values"][0].float()
        if not self._ragged:
            return pixels
        head = torch.zeros(1, pixels.shape[1])
        head[0, :2] = torch.as_tensor(made["spatial_shapes"][0])
        return torch.cat([head, pixels])

    def forward(self, samples: Tensor) -> Features:
        """float[M, *S] -> float[M, L, C]; a mask where pictures have fewer patches than others."""
        if self._ragged:
            return self._forward_ragged(samples)
        tokens = pretrained.hidden(
            self.network, self._after, pixel_values=pretrained.placed(samples, self.network)
        )
        count = self._grid[0] * self._grid[1]
        patches = pretrained.pool_grid(tokens[:, -count:], self._grid, self.config.grid)
        if self.config.class_token:
            patches = torch.cat([tokens[:, :1], patches], dim=1)
        return Features(patches.float())

    def _forward_ragged(self, samples: Tensor) -> Features:
        """The same for patches that come with their own number of rows and columns."""
        shapes = samples[:, 0, :2].round().long()
        patches = pretrained.placed(samples[:, 1:], self.network)
        places = torch.arange(patches.shape[1], device=patches.device)
        mask = places < shapes.prod(dim=1, keepdim=True).to(patches.device)
        tokens = pretrained.hidden(
            self.network,
            self._after,
            pixel_values=patches,
            pixel_attention_mask=mask.long(),
            spatial_shapes=shapes,
        )
        if self.config.grid is None:
            return Features(tokens.float(), mask)
        pooled = [
            pretrained.pool_grid(row[None, : h * w], (h, w), self.config.grid)
            for row, (h, w) in zip(tokens, shapes.tolist(), strict=True)
        ]
        return Features(torch.cat(pooled).float())


def _check_size(made: tuple[int, int], wanted: int, source: pretrained.Source) -> None:
    if made != (wanted, wanted):
        raise AssetError(
            f"{_WHERE}.weights: {source.folder}: the model sees {wanted} x {wanted} pixels, but "
            f"preprocessor_config.json makes {made[0]} x {made[1]}; are both of the same model?"
        )


def build(config: TransformersVisionConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    return TransformersVisionEncoder(config)
