"""Audio of any length up to a window -> tokens, by an audio encoder of transformers: Perception
Encoder (audio), Parakeet, and those of Qwen3-Omni and Qwen3-ASR.

Perception Encoder Audiovisual (Meta 2025); Rekesh et al. 2023 (arXiv 2305.05084); Xu et al. 2025
(arXiv 2509.17765). Audio is not padded: media of one length are computed together, so that each has
the tokens that it has alone.
Legend: M media, B rows of a sample (1 of a wave, or mel bands), T frames, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Audio, Medium
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.encoders.loading import ModelFolder, ModelPart
from mmllm.encoders.pooling import check_parts, pool_time
from mmllm.encoders.pretrained import PretrainedConfig, TransformersEncoder
from mmllm.errors import ConfigError, MediaError


@dataclass(frozen=True)
class TransformersAudioConfig(PretrainedConfig):
    """Which weights, how much is read, and how it is pooled."""

    modality: Literal["audio"] = "audio"
    seconds: float = 30.0
    """The window; of longer audio the beginning (`type: windows` reads all of it)."""
    tokens: int | None = None
    """Means of so many equal parts of the audio; None keeps every token."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise ConfigError(f"seconds: expected more than 0, at most 3600, got {self.seconds}")


def _halved(length: int, times: int) -> int:
    """The length after convolutions of width 3 and stride 2, padded by 1."""
    for _ in range(times):
        length = (length + 1) // 2
    return length


def _chunked(model: Any, frames: int) -> int:
    """Tokens of Qwen's encoders, which convolve chunks of 2 `n_window` frames by themselves."""
    whole, rest = divmod(frames, 2 * model.n_window)
    return whole * _halved(2 * model.n_window, 3) + _halved(rest, 3)


def _run_qwen3_omni(network: Any, features: Tensor) -> Tensor:
    lengths = torch.full((len(features),), features.shape[2], device=features.device)
    packed = features.transpose(0, 1).flatten(1)  # [B, M * T]
    states = network(packed, feature_lens=lengths).last_hidden_state
    return states.unflatten(0, (len(features), -1))


def _run_qwen3_asr(network: Any, features: Tensor) -> Tensor:
    more = -features.shape[2] % (2 * network.n_window)
    mask = F.pad(torch.ones_like(features[:, 0], dtype=torch.long), (0, more))
    states = network(F.pad(features, (0, more)), input_features_mask=mask).last_hidden_state
    return states.unflatten(0, (len(features), -1))


@dataclass(frozen=True)
class _Family:
    """How one encoder is called.

    Attributes:
        count: its config, frames -> tokens.
        channels: its config -> C.
        bands: its config -> B.
        run: the network, float[M, B, T] of one length -> float[M, tokens, C].
        options: further arguments of its feature extractor.
    """

    count: Callable[[Any, int], int]
    channels: Callable[[Any], int]
    bands: Callable[[Any], int]
    run: Callable[[Any, Tensor], Tensor]
    options: dict[str, Any]


_QWEN3_OMNI = "transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe:Qwen3OmniMoeAudioEncoder"
_FAMILIES = {
    "PeAudioEncoder": _Family(
        count=lambda model, frames: frames // model.dac_config.hop_length,
        channels=lambda model: model.hidden_size,
        bands=lambda _: 1,
        run=lambda network, features: network(features).last_hidden_state,
        options={},
    ),
    "ParakeetEncoder": _Family(
        count=lambda model, frames: _halved(frames, model.subsampling_factor.bit_length() - 1),
        channels=lambda model: model.hidden_size,
        bands=lambda model: model.num_mel_bins,
        run=lambda network, features: network(features.transpose(1, 2)).last_hidden_state,
        options={},
    ),
    _QWEN3_OMNI: _Family(
        count=_chunked,
        channels=lambda model: model.output_dim,
        bands=lambda model: model.num_mel_bins,
        run=_run_qwen3_omni,
        options={"padding": "longest", "truncation": False, "return_attention_mask": True},
    ),
    "Qwen3ASREncoder": _Family(
        count=_chunked,
        channels=lambda model: model.d_model,
        bands=lambda model: model.num_mel_bins,
        run=_run_qwen3_asr,
        options={"padding": "longest", "return_attention_mask": True, "n_window": 0},
    ),
}


class TransformersAudioEncoder(TransformersEncoder):
    """float[M, 1 + B, T] -> float[M, L, C]; the first row of a sample is 1 where there is audio."""

    component = "transformers_audio"
    modality: ClassVar[str] = "audio"
    model_classes: ClassVar = {
        "pe_audio": "PeAudioEncoder",
        "pe_audio_encoder": "PeAudioEncoder",
        "pe_audio_video": "PeAudioEncoder",
        "parakeet_encoder": "ParakeetEncoder",
        "parakeet_ctc": "ParakeetEncoder",
        "parakeet_rnnt": "ParakeetEncoder",
        "parakeet_tdt": "ParakeetEncoder",
        "qwen3_omni_moe": _QWEN3_OMNI,
        "qwen3_omni_moe_thinker": _QWEN3_OMNI,
        "qwen3_omni_moe_audio_encoder": _QWEN3_OMNI,
        "qwen3_asr": "Qwen3ASREncoder",
        "qwen3_asr_encoder": "Qwen3ASREncoder",
    }
    parts: ClassVar = {
        "pe_audio": ModelPart("audio_config", {"audio_encoder.": ""}),
        "pe_audio_video": ModelPart(
            "audio_video_config.audio_config", {"audio_model.audio_encoder.": ""}
        ),
        **dict.fromkeys(
            ("parakeet_ctc", "parakeet_rnnt", "parakeet_tdt"),
            ModelPart("encoder_config", {"encoder.": ""}),
        ),
        "qwen3_omni_moe": ModelPart("thinker_config.audio_config", {"thinker.audio_tower.": ""}),
        "qwen3_omni_moe_thinker": ModelPart("audio_config", {"audio_tower.": ""}),
        "qwen3_asr": ModelPart("audio_config", {"model.audio_tower.": "", "audio_tower.": ""}),
    }
    processor_class = "AutoFeatureExtractor"
    fingerprint_fields = ("seconds", "tokens")

    def configure(self, source: ModelFolder, model_type: str, model: Any) -> None:
        self._family = _FAMILIES[self.model_classes[model_type]]
        self._model = model
        rate = self.processor.sampling_rate
        silence = Audio.from_numpy(np.zeros((1, round(self.config.seconds * rate)), "f4"), rate)
        self._num_frames = self._extract(silence).shape[1]
        length = self._family.count(model, self._num_frames)
        check_parts("tokens", self.config.tokens, length, where=self.component)
        self.sample_shape = (1 + self._family.bands(model), self._num_frames)
        self.feature_shape = (self.config.tokens or length, self._family.channels(model))
        if self.config.tokens is None:
            self.layout = ("", "", self._measure, False)

    def to_tensor(self, medium: Audio) -> Tensor:
        """Audio -> float[1 + B, T], zeros behind its end; of longer audio the beginning."""
        features = self._extract(medium)
        sample = torch.zeros(self.sample_shape)
        sample[0, : features.shape[1]] = 1
        sample[1:, : features.shape[1]] = features
        return sample

    def forward(self, samples: Tensor) -> Features:
        """float[M, 1 + B, T] -> float[M, L, C], with a mask unless pooled."""
        lengths = (samples[:, 0] > 0.5).sum(dim=1)
        tokens = samples.new_zeros(len(samples), *self.feature_shape, dtype=torch.float32)
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=samples.device)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(1)
            inputs = self.on_network(samples[rows, 1:, :length])
            states = pool_time(self._family.run(self.network, inputs), self.config.tokens)
            tokens[rows, : states.shape[1]] = states.to(tokens)
            mask[rows, : states.shape[1]] = True
        return Features(tokens, mask if self.config.tokens is None else None)

    def _extract(self, medium: Audio) -> Tensor:
        """float[B, T] of the part in the window. Raises MediaError for audio without a token."""
        rate = self.processor.sampling_rate
        wave = medium.resample(rate)
        limit = round(self.config.seconds * rate)
        cut = Audio.from_numpy(wave.to_numpy()[:, :limit], rate)
        found = self.extract(cut, **self._family.options)
        features = found["input_values" if "input_values" in found else "input_features"][0]
        if features.shape[0] != self._family.bands(self._model):
            features = features.T
        if (mask := found.get("attention_mask")) is not None:
            features = features[:, : int(mask[0].sum())]
        tokens = self._family.count(self._model, features.shape[1])
        if tokens < 1 or not features.isfinite().all():
            raise MediaError(f"{self.component}: {medium!r} is too short for a token")
        return features.float()

    def _measure(self, medium: Medium) -> tuple[int, None]:
        """The tokens of audio, and no grid."""
        assert isinstance(medium, Audio)
        return self._family.count(self._model, self._extract(medium).shape[1]), None


def build(config: TransformersAudioConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    return TransformersAudioEncoder(config)
