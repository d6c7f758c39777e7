"""Sounds -> patches of a spectrogram, by the Audio Spectrogram Transformer in transformers.

Gong et al. 2021 (arXiv 2104.01778).
Legend: M sounds, T frames of 10 ms, B mel bands, f x t patches, L tokens, C channels.
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

_WHERE = "ast"
_PREFIX = 2
"""The class token and the distillation token stand before the patches."""


@dataclass(frozen=True)
class AstConfig:
    """Which weights, what of their answer."""

    weights: str
    """A folder or a hub id."""
    modality: Literal["audio"] = "audio"
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    layer: int = -1
    """Output of which block; -1 is the last, with the model's final norm."""
    tokens: int | None = None
    """Means of so many equal parts of the time; None keeps all patches, band after band."""
    class_token: bool = False
    """Keep the class token, first."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights; tokens are float32."""


class AstEncoder(ModalityEncoder):
    """Log-mel frames float[M, T, B] -> float[M, L, C]; the window is padded as in training."""

    modality: ClassVar[str] = "audio"

    def __init__(self, config: AstConfig) -> None:
        """Opens and loads the weights; raises AssetError and ConfigError."""
        super().__init__()
        import transformers

        self.config = config
        source = pretrained.Source(config.weights, config.revision, where=_WHERE)
        source.family(["audio-spectrogram-transformer"])
        self.extractor = source.preprocessor(transformers.ASTFeatureExtractor)
        self.network = source.load(transformers.ASTModel, config.dtype)
        of: Any = self.network.config
        block = pretrained.block_number(config.layer, of.num_hidden_layers, where=_WHERE)
        self._after = None if block == of.num_hidden_layers else block
        self.sample_shape = (self.extractor.max_length, self.extractor.num_mel_bins)
        if self.sample_shape != (of.max_length, of.num_mel_bins):
            raise AssetError(
                f"{_WHERE}.weights: {source.folder}: the model hears {of.max_length} frames of "
                f"{of.num_mel_bins} bands, but preprocessor_config.json makes "
                f"{self.sample_shape[0]} of {self.sample_shape[1]}; are both of the same model?"
            )
        self._map: tuple[int, int] = self.network.embeddings.get_shape(of)  # f, t
        pretrained.check_parts("tokens", config.tokens, self._map[1], where=_WHERE)
        tokens = config.tokens or self._map[0] * self._map[1]
        self.feature_shape = (tokens + config.class_token, of.hidden_size)
        self._fingerprint = pretrained.fingerprint(
            {
                "component": _WHERE,
                "weights": source.hash,
                "preprocessing": self.extractor.to_dict(),
                "layer": block,
                "tokens": config.tokens,
                "class_token": config.class_token,
                "dtype": config.dtype,
            }
        )
        self.freeze()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def _preprocess(self, medium: Audio) -> Tensor:
        """A sound -> float[T, B]; of a longer one the beginning."""
        made = pretrained.prepared(self.extractor, medium, where=_WHERE)
        return made["input_values"][0].float()

    def forward(self, samples: Tensor) -> Features:
        """float[M, T, B] -> float[M, L, C]."""
        samples = pretrained.placed(samples, self.network)
        found = pretrained.hidden(self.network, self._after, input_values=samples)
        tokens = found[:, _PREFIX:]
        if self.config.tokens is not None:
            steps = tokens.unflatten(1, self._map).mean(dim=1)  # [M, t, C]
            tokens = pretrained.pool_time(steps, self.config.tokens)
        if self.config.class_token:
            tokens = torch.cat([found[:, :1], tokens], dim=1)
        return Features(tokens.float())


def build(config: AstConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    return AstEncoder(config)
