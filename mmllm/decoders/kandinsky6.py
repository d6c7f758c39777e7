"""Video with audio by Kandinsky 6 (Kandinsky Lab 2026): one DiT over both, conditioned on a
Qwen2.5-VL and, through its modulation, on a CLIP.

Legend: M media, F frames, H x W pixels, T spectrogram frames, B mel bands, A audio latents, P
caption tokens, E their width, E2 the width of CLIP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmllm.conversation import Audio, Medium, Video
from mmllm.decoders.condition import unpadded
from mmllm.decoders.config import InitMediaConfig, SequenceConfig, VideoConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.kandinsky5 import NEGATIVE_PROMPT, KandinskyDecoder
from mmllm.decoders.visual import VideoDecoder, check_frames
from mmllm.errors import ConfigError

_POSITIONS, _SEQUENCE_POSITIONS = 128, 2048
"""The ends of the tables of rotary positions: along each axis of a video; of audio and captions."""


@dataclass(frozen=True)
class Kandinsky6Config(VideoConfig, SequenceConfig, InitMediaConfig):
    """A `Kandinsky6TI2VAPipeline`; the defaults are the pipeline's, the negative prompt included.
    The distilled models take 16 `steps` and a `guidance` of 1."""

    steps: int = 50
    guidance: float = 5.0
    negative_prompt: str = NEGATIVE_PROMPT
    max_caption_tokens: int = 256
    frames: int = 121
    fps: float = 24.0


class Kandinsky6Decoder(KandinskyDecoder, VideoDecoder):
    """Media and latents are flat: all of the frames, then all of the audio. A video without an
    audio track counts as silent.
    """

    pipelines: ClassVar = ["Kandinsky6TI2VAPipeline"]
    caption_positions: ClassVar[int] = _SEQUENCE_POSITIONS
    init_one_by_one = True

    def __init__(self, config: Kandinsky6Config):
        super().__init__(config)
        transformer = self.component_config("transformer")
        if transformer.get("visual_cond", True) and (
            transformer.get("visual_token_type_num_embeddings", 0) >= 2
        ):
            self.init_modality = "image"

    def configure(self) -> None:
        config = self.config
        if self.component_config("scheduler")["_class_name"] == "PiflowScheduler":
            if config.guidance > 1:
                raise ConfigError(
                    f"guidance: {self.folder} is a distilled model, which is made without; "
                    f"expected at most 1, got {config.guidance:g}"
                )
            if config.scheduler is not None:
                raise ConfigError(
                    f"scheduler: {config.scheduler!r} cannot take the place of the distilled "
                    "model's own PiflowScheduler; expected null"
                )
        super().configure()
        if self.audio_length > _SEQUENCE_POSITIONS:
            raise ConfigError(
                f"fps: {config.frames} frames at {config.fps:g} a second have audio of "
                f"{self.audio_length} latents; expected at most {_SEQUENCE_POSITIONS}"
            )

    @property
    def _scales(self) -> tuple[int, int]:
        """Pixels along a side, and frames, of one latent."""
        vae = self.component_config("vae")
        return vae.get("spatial_compression_ratio", 8), vae.get("temporal_compression_ratio", 4)

    @property
    def _patch(self) -> list[int]:
        """Latents in time, height and width of one token."""
        return self.component_config("transformer")["patch_size"]

    @property
    def max_side(self) -> int:
        return _POSITIONS * min(self._patch[1:]) * self._scales[0]

    @property
    def max_frames(self) -> int:
        return (_POSITIONS * self._patch[0] - 1) * self._scales[1] + 1

    @property
    def audio_length(self) -> int:
        """A, as the pipeline counts them."""
        codec, config = self.component_config("audio_vae"), self.config
        hop = 2 * codec["hop_length"]
        return math.ceil(config.frames / config.fps * codec["sample_rate"] / hop)

    def compute_size(self) -> tuple[int, int]:
        space, time = self._scales
        check_frames(self.config.frames, time)
        return self.resolve_size((512, 768), space * max(self._patch[1:]))

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        embeds, pooled, mask, *_ = self.pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_caption_tokens,
            device=self.device,
        )
        if mask is None:  # every caption is as long as P
            mask = embeds.new_ones(embeds.shape[:2])
        return {
            "prompt_embeds": embeds,
            "prompt_embeds_mask": mask,
            "pooled_prompt_embeds": pooled,
        }

    @cached_property
    def _mel(self) -> Any:
        """The audio codec's own spectrogram, which computes in float32 alone."""
        from diffusers.models.autoencoders.autoencoder_mmaudio import MMAudioMelSpectrogram

        codec = self.component_config("audio_vae")
        names = ("sample_rate", "n_fft", "mel_bins", "hop_length")
        return MMAudioMelSpectrogram(*(codec[name] for name in names))

    def to_tensor(self, medium: Video) -> Tensor:
        """Pixels float[3, F, H, W] in [-1, 1] and then log-mels float[B, T], flattened."""
        codec = self.component_config("audio_vae")
        video = medium.decoded()
        assert isinstance(video, Video)
        wave = torch.zeros(1, 2 * codec["hop_length"] * self.audio_length)
        if video.audio is not None:
            track = torch.from_numpy(video.audio.resample(codec["sample_rate"]).to_numpy())
            track = track[:, : wave.shape[1]]
            wave[:, : track.shape[1]] = track
        return torch.cat([super().to_tensor(video).flatten(), self._mel(wave).flatten()])

    def encode_latents(self, samples: Tensor) -> Tensor:
        """Latents [M, ...] that are scaled already, by the factor of each codec."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        vae, audio_vae = self.pipeline.vae, self.pipeline.audio_vae
        mel = (audio_vae.config.mel_bins, 2 * self.audio_length)
        pixels, mels = samples.split([samples.shape[1] - math.prod(mel), math.prod(mel)], dim=1)
        frames = vae.encode(pixels.unflatten(1, (3, self.config.frames, *self.size)))
        audio = DiagonalGaussianDistribution(audio_vae.vae.encode(mels.unflatten(1, mel)))
        scaled = (
            frames.latent_dist.mode() * vae.config.scaling_factor,
            audio.mode() * audio_vae.config.scaling_factor,
        )
        return torch.cat([latents.flatten(1) for latents in scaled], dim=1)

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return latents

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Of one medium. Channels last; a model that can also start from an image is given none."""
        settings, (space, time) = self.pipeline.transformer.config, self._scales
        grid = ((self.config.frames - 1) // time + 1, *(side // space for side in self.size))
        channels, audio_channels = settings.in_visual_dim, settings.in_audio_dim
        num = channels * math.prod(grid)
        frames = noisy[:, :num].unflatten(1, (channels, *grid)).movedim(1, -1)
        audio = noisy[:, num:].unflatten(1, (audio_channels, self.audio_length)).transpose(1, 2)
        if settings.visual_cond:
            no_image = frames.new_zeros(*frames.shape[:-1], channels + 1)
            frames = torch.cat([frames, no_image], dim=-1)
        predicted, predicted_audio = self.pipeline.transformer(
            hidden_states=frames,
            audio_hidden_states=audio,
            encoder_hidden_states=unpadded(
                condition["prompt_embeds"], condition["prompt_embeds_mask"]
            ),
            pooled_projections=condition["pooled_prompt_embeds"],
            timestep=timesteps,
            return_dict=False,
        )
        return torch.cat(
            [predicted.movedim(-1, 1).flatten(1), predicted_audio.transpose(1, 2).flatten(1)], dim=1
        )

    def condition_kwargs(self, condition: Condition) -> dict[str, Any]:
        """Of one medium."""
        ready = self.prepare_condition(condition)
        return {
            "prompt_embeds": unpadded(ready["prompt_embeds"], ready["prompt_embeds_mask"]),
            "pooled_prompt_embeds": ready["pooled_prompt_embeds"],
        }

    def pipeline_kwargs(self) -> dict[str, Any]:
        return {"frame_rate": self.config.fps, **super().pipeline_kwargs()}

    def prepare_img2img(self, media: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """The same pipeline, with the image as its first frame."""
        return self.pipeline, {"image": self.fit(media[0])}

    def to_media(self, output: Any) -> list[Medium]:
        rate = self.component_config("audio_vae")["sample_rate"]
        return [
            replace(video, audio=Audio.from_numpy(wave, sample_rate=rate))  # pyright: ignore
            for video, wave in zip(super().to_media(output), output.audio, strict=True)
        ]


def build(config: Kandinsky6Config) -> Kandinsky6Decoder:
    return Kandinsky6Decoder(config)
