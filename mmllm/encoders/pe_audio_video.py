"""A clip with its sound -> joint tokens in time, by Perception Encoder Audiovisual of transformers
(Meta 2025), which reads frames and track together.

Legend: M media, F frames, H x W pixels, S samples of the track, L tokens, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mmllm.conversation import Medium, Video
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.encoders.loading import ModelFolder, ModelPart
from mmllm.encoders.pooling import check_parts, pool_time
from mmllm.encoders.pretrained import PretrainedConfig, TransformersEncoder
from mmllm.errors import ConfigError, MediaError


@dataclass(frozen=True)
class PeAudioVideoConfig(PretrainedConfig):
    """Which weights, how much is read, and how it is pooled."""

    modality: Literal["video"] = "video"
    frames: int = 16
    """F: the middles of so many equal parts of the clip."""
    seconds: float = 30.0
    """The window; of a longer clip the beginning (`type: windows` reads all of it)."""
    tokens: int | None = None
    """Means of so many equal parts of the clip; None keeps every token of the track."""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ConfigError(f"frames: expected at least 1, got {self.frames}")
        if not 0 < self.seconds <= 3600:
            raise ConfigError(f"seconds: expected more than 0, at most 3600, got {self.seconds}")


class PeAudioVideoEncoder(TransformersEncoder):
    """float[M, 1 + F * 3 * H * W + S] -> float[M, L, C]; the first number of a sample is the length
    of its track. A clip without a track is silent."""

    component = "pe_audio_video"
    modality: ClassVar[str] = "video"
    needs_whole_video = True
    model_classes: ClassVar = {
        "pe_audio_video": "PeAudioVideoEncoder",
        "pe_audio_video_encoder": "PeAudioVideoEncoder",
    }
    parts: ClassVar = {
        "pe_audio_video": ModelPart(
            "audio_video_config",
            {
                "audio_video_encoder.": "",
                "audio_model.audio_encoder.": "embedder.audio_encoder.",
                "video_model.video_encoder.": "embedder.video_encoder.",
            },
        )
    }
    processor_class = "AutoVideoProcessor"
    fingerprint_fields = ("frames", "seconds", "tokens")

    def configure(self, source: ModelFolder, model_type: str, model: Any) -> None:
        from transformers import AutoFeatureExtractor

        self._frame_processor = self.processor
        self._extractor = source.processor(AutoFeatureExtractor)
        self._hop = model.audio_config.dac_config.hop_length
        blank = np.zeros((1, 48, 64, 3), np.uint8)
        self._frame_shape = tuple(self._pixels(Video.from_numpy(blank, 1.0)).shape)
        window = round(self.config.seconds * self._extractor.sampling_rate)
        length = math.ceil(window / self._hop)
        check_parts("tokens", self.config.tokens, length, where=self.component)
        self.sample_shape = (1 + math.prod(self._frame_shape) + length * self._hop,)
        self.feature_shape = (self.config.tokens or length, model.hidden_size)
        if self.config.tokens is None:
            self.layout = ("", "", self._measure, False)

    def preprocessing(self) -> Any:
        return [self._frame_processor.to_dict(), self._extractor.to_dict(), "middles"]

    def to_tensor(self, medium: Video) -> Tensor:
        """A clip -> float[1 + F * 3 * H * W + S], zeros behind the track."""
        clip = self._window(medium)
        pixels, wave = self._pixels(clip).flatten(), self._wave(clip)
        sample = torch.zeros(self.sample_shape)
        sample[0] = len(wave)
        sample[1 : 1 + len(pixels)] = pixels
        sample[1 + len(pixels) : 1 + len(pixels) + len(wave)] = wave
        return sample

    def forward(self, samples: Tensor) -> Features:
        """float[M, 1 + F * 3 * H * W + S] -> float[M, L, C], with a mask unless pooled."""
        lengths = samples[:, 0].round().long()
        numbers = math.prod(self._frame_shape)
        tokens = samples.new_zeros(len(samples), *self.feature_shape, dtype=torch.float32)
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=samples.device)
        for length in lengths.unique().tolist():  # each has the tokens that it has alone
            rows = (lengths == length).nonzero().squeeze(1)
            inputs = self.on_network(samples[rows, 1:])
            found = self.network(
                input_values=inputs[:, None, numbers : numbers + length],
                pixel_values_videos=inputs[:, :numbers].unflatten(1, self._frame_shape),
            )
            states = pool_time(found.last_hidden_state, self.config.tokens)
            tokens[rows, : states.shape[1]] = states.to(tokens)
            mask[rows, : states.shape[1]] = True
        return Features(tokens, mask if self.config.tokens is None else None)

    def _window(self, medium: Video) -> Video:
        """The beginning of a clip that the encoder reads, decoded."""
        clip = medium.decoded()
        assert clip.fps
        count = max(round(self.config.seconds * clip.fps), 1)
        return Video(array=clip.to_numpy()[:count], fps=clip.fps, audio=clip.audio)

    def _pixels(self, clip: Video) -> Tensor:
        inputs = self._frame_processor(
            videos=clip.sample_frames(self.config.frames),
            do_sample_frames=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )
        return inputs["pixel_values_videos"][0].float()

    def _wave(self, clip: Video) -> Tensor:
        """float[S] of whole tokens, as long as the frames last."""
        rate = self._extractor.sampling_rate
        limit = max(round(min(clip.seconds, self.config.seconds) * rate), 1)
        track = np.zeros((1, limit), "f4")
        if clip.audio is not None:
            track = clip.audio.resample(rate).to_numpy()[:, :limit]
        if track.shape[1] < 2:
            raise MediaError(f"{self.component}: {clip!r} is too short for a token")
        inputs = self._extractor(np.array(track[0]), sampling_rate=rate, return_tensors="pt")
        return inputs["input_values"].flatten().float()

    def _measure(self, medium: Medium) -> tuple[int, None]:
        """The tokens of a clip, and no grid."""
        assert isinstance(medium, Video)
        return len(self._wave(self._window(medium))) // self._hop, None


def build(config: PeAudioVideoConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    return PeAudioVideoEncoder(config)
