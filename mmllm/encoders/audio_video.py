"""A clip and its sound track -> tokens of both, by an encoder of video and one of audio.

Legend: M media, L and l tokens, C and c channels of the video and of the audio encoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmllm.conversation import Medium, Video
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.encoders.pieces import build_inner, join_pieces, tokens_of
from mmllm.utils.hashing import fingerprint


@dataclass(frozen=True)
class AudioVideoConfig:
    """Which two encoders."""

    modality: Literal["video"] = "video"
    video: Mapping[str, Any] = field(default_factory=lambda: {"type": "frames"})
    """A video encoder as a system's `encoders` has it: its `type` and its keys."""
    audio: Mapping[str, Any] = field(default_factory=lambda: {"type": "aisfx"})
    """An audio encoder, which reads the clip's track."""


class AudioVideoEncoder(ModalityEncoder):
    """float[M, S] -> float[M, L + l, C + c] and its mask: the clip's tokens, with zeros in the last
    c channels, and behind them the track's, with zeros in the first C, so that a linear map of
    both is a linear map of each. A clip without a track has the tokens of its frames alone."""

    modality: ClassVar[str] = "video"
    needs_whole_video = True

    def __init__(self, video: ModalityEncoder, audio: ModalityEncoder):
        super().__init__()
        self.video_encoder, self.audio_encoder = video, audio
        (frames, wide), (sounds, narrow) = video.feature_shape, audio.feature_shape
        self.feature_shape = (frames + sounds, wide + narrow)
        self._numbers = math.prod(video.sample_shape), math.prod(audio.sample_shape)
        self.sample_shape = (1 + sum(self._numbers),)
        self.layout = ("", "", self._measure, False)
        self.freeze()

    @property
    def fingerprint(self) -> str:
        inner = [self.video_encoder.fingerprint, self.audio_encoder.fingerprint]
        return fingerprint(["audio_video", *inner])

    def load(self) -> None:
        self.video_encoder.load()
        self.audio_encoder.load()

    def to_tensor(self, medium: Video) -> Tensor:
        """A clip -> float[S]: whether it has a track, its frames, its track or zeros."""
        clip = medium.decoded()
        frames = self.video_encoder.preprocess(clip).flatten()
        if clip.audio is None:
            return torch.cat([torch.zeros(1), frames, torch.zeros(self._numbers[1])])
        track = self.audio_encoder.preprocess(clip.audio).flatten()
        return torch.cat([torch.ones(1), frames, track])

    def forward(self, samples: Tensor) -> Features:
        """float[M, S] -> float[M, L + l, C + c] and bool[M, L + l]."""
        first, frames, track = samples.split([1, *self._numbers], dim=1)
        video, audio = self.video_encoder, self.audio_encoder
        seen = video(frames.unflatten(1, video.sample_shape))
        ones = [1] * len(samples)
        seen = join_pieces(video, seen, ones, video.feature_shape[0])
        tokens = pad(seen.tokens, (0, audio.feature_shape[1]))
        sounds = tokens.new_zeros(len(samples), audio.feature_shape[0], tokens.shape[2])
        mask = torch.zeros(sounds.shape[:2], dtype=torch.bool, device=samples.device)
        has_track = first[:, 0] > 0.5
        if has_track.any():
            found = audio(track[has_track].unflatten(1, audio.sample_shape))
            sounds[has_track, :, video.feature_shape[1] :] = found.tokens.to(tokens)
            mask[has_track] = True if found.mask is None else found.mask
        return self._compact(tokens, seen.mask, sounds, mask, has_track)

    def _compact(
        self, tokens: Tensor, seen: Tensor | None, sounds: Tensor, audible: Tensor, track: Tensor
    ) -> Features:
        """Both kinds of tokens, those that have a position first."""
        assert seen is not None
        placed_frames = seen if self.video_encoder.layout else torch.ones_like(seen)
        placed_sounds = audible if self.audio_encoder.layout else track[:, None].expand_as(audible)
        placed = torch.cat([placed_frames, placed_sounds], dim=1)
        order = (~placed).int().argsort(dim=1, stable=True)
        joined = torch.cat([tokens, sounds], dim=1)
        mask = torch.cat([seen, audible], dim=1)
        return Features(joined.gather(1, order[..., None].expand_as(joined)), mask.gather(1, order))

    def _measure(self, medium: Medium) -> tuple[int, None]:
        """The tokens of a clip, and no grid."""
        assert isinstance(medium, Video)
        clip = medium.decoded()
        tokens = tokens_of(self.video_encoder, clip)
        if clip.audio is not None:
            tokens += tokens_of(self.audio_encoder, clip.audio)
        return tokens, None


def build(config: AudioVideoConfig) -> ModalityEncoder:
    """The frozen encoder with both inside. Raises ConfigError and AssetError."""
    return AudioVideoEncoder(
        build_inner(config.video, "audio_video.video", "video"),
        build_inner(config.audio, "audio_video.audio", "audio"),
    )
