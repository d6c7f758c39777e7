"""Sounds -> tokens over time and frequency, by the audio tower of CLAP in transformers.

Wu et al. 2023 (arXiv 2211.06687); the tower is HTS-AT (Chen et al. 2022).
Legend: M sounds, V views of a spectrogram (1, or 4 that are fused), T frames, B mel bands,
L tokens, C channels, f x t bands and steps of the last feature map.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mmllm.conversation import Audio
from mmllm.encoders import pretrained
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.errors import AssetError

_WHERE = "clap"
_FAMILIES = ("clap", "clap_audio_model")


@dataclass(frozen=True)
class ClapConfig:
    """Which weights, and how many tokens tell of the sound."""

    weights: str
    """A folder or a hub id."""
    modality: Literal["audio"] = "audio"
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokens: int | None = None
    """Means of so many equal parts of the time; None keeps the feature map, band after band."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights; tokens are float32."""


class ClapEncoder(ModalityEncoder):
    """Log-mel views float[M, V, T, B] -> float[M, L, C]. A shorter sound is repeated."""

    modality: ClassVar[str] = "audio"

    def __init__(self, config: ClapConfig) -> None:
        """Opens and loads the weights; raises AssetError and ConfigError."""
        super().__init__()
        import transformers

        self.config = config
        source = pretrained.Source(config.weights, config.revision, where=_WHERE)
        source.family(_FAMILIES)
        self.extractor = source.preprocessor(transformers.ClapFeatureExtractor)
        whole = source.load(transformers.ClapAudioModelWithProjection, config.dtype)
        self.network = whole.audio_model
        of: Any = self.network.config
        self._fused = bool(of.enable_fusion)
        if self._fused != (self.extractor.truncation == "fusion"):
            raise AssetError(
                f"{_WHERE}.weights: {source.folder}: enable_fusion is {self._fused} in config.json "
                f"but truncation is {self.extractor.truncation!r} in preprocessor_config.json; a "
                "model without fusion needs 'rand_trunc', one with it 'fusion'"
            )
        side = of.spec_size // of.patch_stride[0] // 2 ** (len(of.depths) - 1)
        ratio = of.spec_size // of.num_mel_bins
        self._map = (side // ratio, side * ratio)  # f, t
        pretrained.check_parts("tokens", config.tokens, self._map[1], where=_WHERE)
        silence = Audio.from_numpy(np.zeros(4800, np.float32), self.extractor.sampling_rate)
        self.sample_shape = tuple(self.preprocess(silence).shape)
        channels = of.patch_embeds_hidden_size * 2 ** (len(of.depths) - 1)
        self.feature_shape = (config.tokens or self._map[0] * self._map[1], channels)
        self._fingerprint = pretrained.fingerprint(
            {
                "component": _WHERE,
                "weights": source.hash,
                "preprocessing": [self.extractor.to_dict(), "draws from seed 0"],
                "layer": "last",
                "tokens": config.tokens,
                "dtype": config.dtype,
            }
        )
        self.freeze()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def _preprocess(self, medium: Audio) -> Tensor:
        """A sound -> float[V, T, B]. Of one that is too long upstream draws a part, or three parts
        to fuse, at random; drawn from a fixed seed, so that a sound has one answer."""
        with _fixed_draws():
            made = pretrained.prepared(self.extractor, medium, where=_WHERE)
        return made["input_features"][0].float()

    def forward(self, samples: Tensor) -> Features:
        """float[M, V, T, B] -> float[M, L, C]."""
        samples = pretrained.placed(samples, self.network)
        # Upstream's extractor says so of every sound that it prepares alone, however short.
        longer = torch.ones(len(samples), 1, dtype=torch.bool, device=samples.device)
        said = self.network(samples, is_longer=longer if self._fused else None)
        found = said.last_hidden_state  # [M, C, f, t]
        if self.config.tokens is None:
            return Features(found.flatten(2).transpose(1, 2).float())
        steps = found.mean(dim=2).transpose(1, 2)  # [M, t, C]
        return Features(pretrained.pool_time(steps, self.config.tokens).float())


@contextmanager
def _fixed_draws() -> Iterator[None]:
    """numpy's global generator from seed 0, and then as it was."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        yield
    finally:
        np.random.set_state(state)


def build(config: ClapConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    return ClapEncoder(config)
