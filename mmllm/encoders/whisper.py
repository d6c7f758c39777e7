"""Speech and other sounds -> tokens of 20 ms, by the encoder of Whisper in transformers.

Radford et al. 2022 (arXiv 2212.04356). Whisper listens to windows of fixed length; what is padded
is masked, or left out of the means.
Legend: M sounds, B mel bands, T frames of 10 ms, L tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmllm.conversation import Audio
from mmllm.encoders import pretrained
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.errors import AssetError

_WHERE = "whisper"


@dataclass(frozen=True)
class WhisperConfig:
    """Which weights, what of their answer."""

    weights: str
    """A folder or a hub id."""
    modality: Literal["audio"] = "audio"
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    layer: int = -1
    """Output of which block; -1 is the last, with the encoder's final norm."""
    tokens: int | None = None
    """Means of so many equal parts of what is heard; None keeps every 20 ms of the window."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights; tokens are float32."""


class WhisperEncoder(ModalityEncoder):
    """float[M, 1 + B, T] -> float[M, L, C]; the first row of a sample is 1 where it sounds."""

    modality: ClassVar[str] = "audio"

    def __init__(self, config: WhisperConfig) -> None:
        """Opens and loads the weights; raises AssetError and ConfigError."""
        super().__init__()
        import transformers

        self.config = config
        source = pretrained.Source(config.weights, config.revision, where=_WHERE)
        source.family(["whisper"])
        self.extractor = source.preprocessor(transformers.WhisperFeatureExtractor)
        self.network = source.load(transformers.WhisperModel, config.dtype).get_encoder()
        of: Any = self.network.config
        block = pretrained.block_number(config.layer, of.encoder_layers, where=_WHERE)
        self._after = None if block == of.encoder_layers else block
        frames, length = self.extractor.nb_max_frames, of.max_source_positions
        if (frames, self.extractor.feature_size) != (2 * length, of.num_mel_bins):
            raise AssetError(
                f"{_WHERE}.weights: {source.folder}: the model hears {of.num_mel_bins} bands of "
                f"{2 * length} frames, but preprocessor_config.json makes "
                f"{self.extractor.feature_size} of {frames}; are both of the same model?"
            )
        pretrained.check_parts("tokens", config.tokens, length, where=_WHERE)
        self.sample_shape = (1 + of.num_mel_bins, frames)
        self.feature_shape = (config.tokens or length, of.d_model)
        self._fingerprint = pretrained.fingerprint(
            {
                "component": _WHERE,
                "weights": source.hash,
                "preprocessing": self.extractor.to_dict(),
                "layer": block,
                "tokens": config.tokens,
                "dtype": config.dtype,
            }
        )
        self.freeze()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def _preprocess(self, medium: Audio) -> Tensor:
        """A sound -> float[1 + B, T], silence after its end; of a longer one the beginning."""
        made = pretrained.prepared(self.extractor, medium, where=_WHERE, return_attention_mask=True)
        return torch.cat([made["attention_mask"].float(), made["input_features"][0].float()])

    def forward(self, samples: Tensor) -> Features:
        """float[M, 1 + B, T] -> float[M, L, C], with a mask unless pooled."""
        heard = samples[:, 0, ::2] > 0.5  # the second convolution has a stride of 2
        mels = pretrained.placed(samples[:, 1:], self.network)
        found = pretrained.hidden(self.network, self._after, input_features=mels)
        if self.config.tokens is None:
            return Features(found.float(), heard)
        parts = [
            pretrained.pool_time(row[None, :count], self.config.tokens)
            for row, count in zip(found, heard.sum(dim=1).tolist(), strict=True)
        ]
        return Features(torch.cat(parts).float())


def build(config: WhisperConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    return WhisperEncoder(config)
