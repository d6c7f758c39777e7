"""Speech and other audio -> tokens of 20 ms, by the encoder of Whisper in transformers.

Radford et al. 2022 (arXiv 2212.04356). Whisper takes windows of fixed length; padding is masked, or
left out of the means.
Legend: M media, B mel bands, T frames of 10 ms, L tokens, C channels.
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


@dataclass(frozen=True)
class WhisperConfig(PretrainedConfig):
    """Which weights, and how their output is pooled."""

    modality: Literal["audio"] = "audio"
    layer: int = -1
    """Output of which block; -1 is the last, with the encoder's final norm."""
    tokens: int | None = None
    """Means of so many equal parts of the audio; None keeps every 20 ms of the window."""


class WhisperEncoder(TransformersEncoder):
    """float[M, 1 + B, T] -> float[M, L, C]; the first row of a sample is 1 where there is audio."""

    component = "whisper"
    modality: ClassVar[str] = "audio"
    model_classes: ClassVar = {"whisper": "WhisperModel"}
    processor_class = "WhisperFeatureExtractor"
    fingerprint_fields = ("tokens",)

    def select_network(self, model: Any) -> Any:
        return model.get_encoder()

    def configure(self, source: ModelFolder, model_type: str, model: Any) -> None:
        self.choose_layer(model.encoder_layers)
        frames, length = self.processor.nb_max_frames, model.max_source_positions
        if (frames, self.processor.feature_size) != (2 * length, model.num_mel_bins):
            raise AssetError(
                f"whisper.weights: {source.folder}: the model takes {model.num_mel_bins} bands of "
                f"{2 * length} frames, but preprocessor_config.json makes "
                f"{self.processor.feature_size} of {frames}; are both of the same model?"
            )
        check_parts("tokens", self.config.tokens, length, where=self.component)
        self.sample_shape = (1 + model.num_mel_bins, frames)
        self.feature_shape = (self.config.tokens or length, model.d_model)

    def to_tensor(self, medium: Audio) -> Tensor:
        """Audio -> float[1 + B, T], silence after its end; of longer audio the beginning."""
        extracted = self.extract(medium, return_attention_mask=True)
        mask, mels = extracted["attention_mask"], extracted["input_features"][0]
        return torch.cat([mask.float(), mels.float()])

    def forward(self, samples: Tensor) -> Features:
        """float[M, 1 + B, T] -> float[M, L, C], with a mask unless pooled."""
        mask = samples[:, 0, ::2] > 0.5  # the second convolution has a stride of 2
        states = self.hidden_states(input_features=self.on_network(samples[:, 1:]))
        if self.config.tokens is None:
            return Features(states.float(), mask)
        parts = [
            pool_time(row[None, :length], self.config.tokens)
            for row, length in zip(states, mask.sum(dim=1).tolist(), strict=True)
        ]
        return Features(torch.cat(parts).float())


def build(config: WhisperConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    return WhisperEncoder(config)
