"""Pictures -> a grid of tokens, by EfficientNet-Lite with ImageNet weights.

Tan and Le 2019 (EfficientNet); Liu 2020 (Lite: no squeeze-and-excitation, ReLU6). The architecture
is timm's, the weights come as an asset or from a folder.
Legend: M pictures, L = grid x grid tokens, C = 1280 channels.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Image
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.errors import AssetError, ConfigError
from mmllm.weights import are_weights_skipped

_ARCHITECTURE = "tf_efficientnet_{variant}"
_CHANNELS = 1280
_STRIDE = 32
_MEAN, _SCALE = 127.0, 128.0
"""Of the Lite models; timm's own default (127.5, 127.5) is for the weights it hosts itself."""
_LARGEST_SQUARE = 8192
"""Pixels of a side that are letterboxed as they are: a long thin picture's square is huge."""


@dataclass(frozen=True)
class EfficientNetConfig:
    """Which weights, how large the picture, how many tokens."""

    modality: Literal["image"] = "image"
    weights: str = "mini:efficientnet-lite0"
    """An asset, or a folder with `model.safetensors` (timm's names)."""
    variant: Literal["lite0", "lite1", "lite2"] = "lite0"
    """The architecture that the weights are for."""
    grid: int = 2
    """The last feature map is averaged to grid x grid tokens; 1 is the global mean."""
    size: int = 224
    """Side of the picture in pixels, a multiple of 32."""

    def __post_init__(self) -> None:
        if self.size < _STRIDE or self.size % _STRIDE:
            raise ConfigError(f"size: expected a multiple of {_STRIDE}, got {self.size}")
        if not 1 <= self.grid <= self.size // _STRIDE:
            raise ConfigError(
                f"grid: expected 1 to {self.size // _STRIDE} (size {self.size} / {_STRIDE}), got "
                f"{self.grid}"
            )


class EfficientNetEncoder(ModalityEncoder):
    """float[M, 3, size, size] -> float[M, grid * grid, 1280], row by row from the top left."""

    modality: ClassVar[str] = "image"

    def __init__(self, config: EfficientNetConfig, folder: Path | None) -> None:
        """Reads `model.safetensors` of the folder; raises AssetError when it does not fit. Without
        a folder the network is on the meta device."""
        super().__init__()
        import timm

        self.config = config
        self.sample_shape = (3, config.size, config.size)
        self.feature_shape = (config.grid**2, _CHANNELS)
        architecture = _ARCHITECTURE.format(variant=config.variant)
        with torch.device("meta" if folder is None else "cpu"):
            self.network = timm.create_model(architecture, pretrained=False, num_classes=0)
        self._weights = "left out"
        self.freeze()
        if folder is None:
            return
        file = folder / "model.safetensors"
        try:
            weights = load_file(file)
            self.network.load_state_dict(
                {key: value for key, value in weights.items() if not key.startswith("classifier.")}
            )
        except (OSError, SafetensorError, RuntimeError) as error:
            raise AssetError(f"{file}: not the weights of {architecture}: {error}") from error
        self._weights = hashlib.sha256(file.read_bytes()).hexdigest()

    @property
    def fingerprint(self) -> str:
        what = {key: value for key, value in asdict(self.config).items() if key != "weights"}
        what |= {"component": "efficientnet", "weights": self._weights, "layer": "conv_head"}
        what["preprocessing"] = f"letterbox white, bicubic, (x-{_MEAN})/{_SCALE}"
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def _preprocess(self, medium: Image) -> Tensor:
        """A picture -> float[3, size, size]: whole, centred on a white square."""
        return to_square(medium, self.config.size)

    def forward(self, samples: Tensor) -> Features:
        """float[M, 3, size, size] -> float[M, grid * grid, 1280]."""
        samples = samples.to(next(self.parameters()).dtype)
        features = self.network.forward_features(samples)  # pyright: ignore[reportCallIssue]
        pooled = F.adaptive_avg_pool2d(features, self.config.grid)  # [M, C, h, w] -> [M, C, g, g]
        return Features(pooled.flatten(2).transpose(1, 2))


def to_square(image: Image, size: int) -> Tensor:
    """uint8[H, W, 3] -> float[3, size, size]: letterboxed on white, bicubic, (x - 127) / 128."""
    from PIL import Image as PILImage
    from PIL import ImageOps

    picture = image.to_pil()
    if max(picture.size) > _LARGEST_SQUARE:
        picture = ImageOps.contain(
            picture, (_LARGEST_SQUARE, _LARGEST_SQUARE), PILImage.Resampling.BICUBIC
        )
    side = max(picture.size)
    if picture.size != (side, side):
        square = PILImage.new("RGB", (side, side), "white")
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    picture = picture.resize((size, size), PILImage.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return (pixels.view(size, size, 3).permute(2, 0, 1).float() - _MEAN) / _SCALE


def build(config: EfficientNetConfig) -> ModalityEncoder:
    """The frozen encoder; fetches its weights at first use. Raises AssetError."""
    from mmllm.mini import assets

    if are_weights_skipped():
        return EfficientNetEncoder(config, None)
    return EfficientNetEncoder(config, assets.resolve(config.weights))
