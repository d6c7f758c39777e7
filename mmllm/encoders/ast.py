"""Audio -> patches of a spectrogram, by the Audio Spectrogram Transformer in transformers.

Gong et al. 2021 (arXiv 2104.01778).
Legend: M media, T frames of 10 ms, B mel bands, f x t patches, L tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmllm.conversation import Audio
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.encoders.loading import ModelFolder
from mmllm.encoders.pooling import check_parts, pool_time
from mmllm.encoders.pretrained import PretrainedConfig, TransformersEncoder
from mmllm.errors import AssetError

_NUM_PREFIX = 2
"""The class token and the distillation token come before the patches."""


@dataclass(frozen=True)
class AstConfig(PretrainedConfig):
    """Which weights, and how their output is pooled."""

    modality: Literal["audio"] = "audio"
    layer: int = -1
    """Output of which block; -1 is the last, with the model's final norm."""
    tokens: int | None = None
    """Means of so many equal parts of the time; None keeps all patches, band after band."""
    class_token: bool = False
    """Keep the class token, first."""


class AstEncoder(TransformersEncoder):
    """Log-mel frames float[M, T, B] -> float[M, L, C]; the window is padded as in training."""

    component = "ast"
    modality: ClassVar[str] = "audio"
    model_classes: ClassVar = {"audio-spectrogram-transformer": "ASTModel"}
    processor_class = "ASTFeatureExtractor"
    fingerprint_fields = ("tokens", "class_token")

    def configure(self, source: ModelFolder, model_type: str, model: Any) -> None:
        config = self.config
        self.choose_layer(model.num_hidden_layers)
        self.sample_shape = (self.processor.max_length, self.processor.num_mel_bins)
        if self.sample_shape != (model.max_length, model.num_mel_bins):
            raise AssetError(
                f"ast.weights: {source.folder}: the model takes {model.max_length} frames of "
                f"{model.num_mel_bins} bands, but preprocessor_config.json makes "
                f"{self.sample_shape[0]} of {self.sample_shape[1]}; are both of the same model?"
            )
        self._map: tuple[int, int] = self.network.embeddings.get_shape(model)  # f, t
        check_parts("tokens", config.tokens, self._map[1], where=self.component)
        tokens = config.tokens or self._map[0] * self._map[1]
        self.feature_shape = (tokens + config.class_token, model.hidden_size)

    def to_tensor(self, medium: Audio) -> Tensor:
        """Audio -> float[T, B]; of longer audio the beginning."""
        return self.extract(medium)["input_values"][0].float()

    def forward(self, samples: Tensor) -> Features:
        """float[M, T, B] -> float[M, L, C]."""
        states = self.hidden_states(input_values=self.on_network(samples))
        tokens = states[:, _NUM_PREFIX:]
        if self.config.tokens is not None:
            steps = tokens.unflatten(1, self._map).mean(dim=1)  # [M, t, C]
            tokens = pool_time(steps, self.config.tokens)
        if self.config.class_token:
            tokens = torch.cat([states[:, :1], tokens], dim=1)
        return Features(tokens.float())


def build(config: AstConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    return AstEncoder(config)
