"""Audio -> tokens over time and frequency, by the audio tower of CLAP in transformers.

Wu et al. 2023 (arXiv 2211.06687); the tower is HTS-AT (Chen et al. 2022).
Legend: M media, V views of a spectrogram (1, or 4 that are fused), T frames, B mel bands,
L tokens, C channels, f x t bands and steps of the last feature map.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mmllm.conversation import Audio
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.encoders.loading import ModelFolder
from mmllm.encoders.pooling import check_parts, pool_time
from mmllm.encoders.pretrained import PretrainedConfig, TransformersEncoder
from mmllm.errors import AssetError

_SEEDING = threading.Lock()
"""Held while numpy's global generator is seeded."""


@dataclass(frozen=True)
class ClapConfig(PretrainedConfig):
    """Which weights, and how many tokens represent the audio."""

    modality: Literal["audio"] = "audio"
    tokens: int | None = None
    """Means of so many equal parts of the time; None keeps the feature map, band after band."""


class ClapEncoder(TransformersEncoder):
    """Log-mel views float[M, V, T, B] -> float[M, L, C]. Shorter audio is repeated."""

    component = "clap"
    modality: ClassVar[str] = "audio"
    model_classes: ClassVar = {
        "clap": "ClapAudioModelWithProjection",
        "clap_audio_model": "ClapAudioModelWithProjection",
    }
    processor_class = "ClapFeatureExtractor"
    fingerprint_fields = ("tokens",)

    def select_network(self, model: Any) -> Any:
        return model.audio_model

    def configure(self, source: ModelFolder, model_type: str, model: Any) -> None:
        self._fused = bool(model.enable_fusion)
        if self._fused != (self.processor.truncation == "fusion"):
            raise AssetError(
                f"clap.weights: {source.folder}: enable_fusion is {self._fused} in config.json "
                f"but truncation is {self.processor.truncation!r} in preprocessor_config.json; a "
                "model without fusion needs 'rand_trunc', one with it 'fusion'"
            )
        side = model.spec_size // model.patch_stride[0] // 2 ** (len(model.depths) - 1)
        ratio = model.spec_size // model.num_mel_bins
        self._map = (side // ratio, side * ratio)  # f, t
        check_parts("tokens", self.config.tokens, self._map[1], where=self.component)
        silence = Audio.from_numpy(np.zeros(4800, np.float32), self.processor.sampling_rate)
        self.sample_shape = tuple(self.preprocess(silence).shape)
        channels = model.patch_embeds_hidden_size * 2 ** (len(model.depths) - 1)
        self.feature_shape = (self.config.tokens or self._map[0] * self._map[1], channels)

    def preprocessing(self) -> Any:
        return [self.processor.to_dict(), "draws from seed 0"]

    def to_tensor(self, medium: Audio) -> Tensor:
        """Audio -> float[V, T, B]. Of longer audio upstream crops a part at random, or three parts
        to fuse; here with a fixed seed, so that features are a function of the audio."""
        with _seeded_numpy():
            return self.extract(medium)["input_features"][0].float()

    def forward(self, samples: Tensor) -> Features:
        """float[M, V, T, B] -> float[M, L, C]."""
        samples = self.on_network(samples)
        # Upstream's extractor sets it for all audio that it prepares alone, however short.
        is_longer = torch.ones(len(samples), 1, dtype=torch.bool, device=samples.device)
        output = self.network(samples, is_longer=is_longer if self._fused else None)
        feature_map = output.last_hidden_state  # [M, C, f, t]
        if self.config.tokens is None:
            return Features(feature_map.flatten(2).transpose(1, 2).float())
        steps = feature_map.mean(dim=2).transpose(1, 2)  # [M, t, C]
        return Features(pool_time(steps, self.config.tokens).float())


@contextmanager
def _seeded_numpy() -> Iterator[None]:
    """Seed numpy's global generator, from which transformers' extractor draws, with 0; restore its
    state on exit. One thread at a time: a second one would draw from, and restore, the state of the
    first."""
    with _SEEDING:
        state = np.random.get_state()
        np.random.seed(0)
        try:
            yield
        finally:
            np.random.set_state(state)


def build(config: ClapConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    return ClapEncoder(config)
