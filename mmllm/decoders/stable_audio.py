"""Sounds by Stable Audio pipelines (Evans et al. 2024): a DiT over latent tokens of a waveform.

Legend: M sounds, C channels, N waveform samples, P caption tokens, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Audio, Medium
from mmllm.decoders.base import Condition, ModalityDecoder, SequenceConfig
from mmllm.errors import ConfigError
from mmllm.kernels.devices import to_device
from mmllm.media import resample


@dataclass(frozen=True)
class StableAudioConfig(SequenceConfig):
    """A `StableAudioPipeline`. `seconds`: how long sounds are; None is the pipeline's longest."""

    seconds: float | None = None


class StableAudioDecoder(ModalityDecoder):
    """Condition: `prompt_embeds` [P, E] and `attention_mask` [P]; the pipeline's projection model
    adds the duration."""

    modality = "audio"
    pipelines: ClassVar = ["StableAudioPipeline"]
    masks: ClassVar = {"prompt_embeds": "attention_mask"}

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.config.max_caption_tokens
        width = self.component_config("projection_model")["text_encoder_dim"]
        return {"prompt_embeds": (tokens, width), "attention_mask": (tokens,)}

    @property
    def seconds(self) -> float:
        """How long a sound is."""
        return self.config.seconds or self.longest

    def _measures(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    @property
    def longest(self) -> float:
        """Seconds of the longest sound that the transformer can make."""
        return self._samples / self.pipeline.vae.config.sampling_rate

    def settings(self, **changes: Any) -> StableAudioConfig:
        settings = super().settings(**changes)
        if changes.get("seconds"):
            longest, least = self.longest, 1 / self.pipeline.vae.config.sampling_rate
            if settings.seconds > longest:
                raise ConfigError(
                    f"seconds: expected at most {longest:g}, got {settings.seconds:g}"
                )
            if settings.seconds < least:  # not a single sample
                raise ConfigError(
                    f"seconds: expected at least {least:.3g}, got {settings.seconds:g}"
                )
        return settings

    def unconditional(self, num: int) -> Condition:
        """Without a negative caption: zeros under an empty mask, which `sample` leaves to the
        pipeline's own absence of a caption (zeros in place of the durations, too)."""
        if self.config.negative_prompt:
            return super().unconditional(num)
        return self._zeros(num)

    def _preprocess(self, medium: Audio) -> Tensor:
        """Resampled, cut to `seconds`, padded with silence to the codec's length -> float[C, N]."""
        codec = self.pipeline.vae.config
        rate, channels = codec.sampling_rate, codec.audio_channels
        wave = torch.from_numpy(resample(medium, rate, mono=channels == 1).to_numpy())
        if len(wave) < channels:
            wave = wave[:1].expand(channels, -1)
        wave = wave[:channels, : int(self.seconds * rate)]
        return F.pad(wave, (0, self._samples - wave.shape[-1]))

    def _normalise(self, latents: Tensor) -> Tensor:
        return latents

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        pipeline, num = self.pipeline, len(noisy)
        words = pipeline.encode_prompt(None, self.device, False, **condition)
        # The pipeline makes durations and rotation on the CPU, where each copy would be waited for.
        durations = pipeline.projection_model(
            start_seconds=noisy.new_zeros(num, dtype=torch.float32),
            end_seconds=noisy.new_full((num,), self.seconds, dtype=torch.float32),
        )
        start = durations.seconds_start_hidden_states
        end = durations.seconds_end_hidden_states
        rotary = get_1d_rotary_pos_embed(
            pipeline.rotary_embed_dim,
            noisy.shape[-1] + 1,  # the durations are one more token in front
            use_real=True,
            repeat_interleave_real=False,
        )
        rotary = tuple(to_device(part, self.device) for part in rotary)
        return pipeline.transformer(
            noisy,
            timesteps,
            encoder_hidden_states=torch.cat([words, start, end], dim=1),
            global_hidden_states=torch.cat([start, end], dim=2),
            rotary_embedding=rotary,
            return_dict=False,
        )[0]

    def _options(self) -> dict[str, Any]:
        return {"audio_end_in_s": self.config.seconds}

    def _guided(self, negative: Condition) -> dict[str, Tensor]:
        return super()._guided(negative) if negative["attention_mask"].any() else {}

    def _ready(self, condition: Condition) -> Condition:
        """The transformer attends to padding too: as many zeros as the pipeline itself pads."""
        ready = super()._ready(condition)
        missing = self.pipeline.tokenizer.model_max_length - self.config.max_caption_tokens
        if missing > 0:
            ready["prompt_embeds"] = F.pad(ready["prompt_embeds"], (0, 0, 0, missing))
            ready["attention_mask"] = F.pad(ready["attention_mask"], (0, missing))
        return ready

    def _media(self, output: Any) -> list[Medium]:
        rate = self.pipeline.vae.config.sampling_rate
        waves = output.audios.clip(-1, 1)  # float32[M, C, N]
        return [Audio.from_numpy(wave, sample_rate=rate) for wave in waves]

    @property
    def _samples(self) -> int:
        """N of what the codec encodes: the transformer has a fixed number of latent tokens."""
        return self.pipeline.transformer.config.sample_size * self.pipeline.vae.hop_length


def build(config: StableAudioConfig) -> StableAudioDecoder:
    return StableAudioDecoder(config)
