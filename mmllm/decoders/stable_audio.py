"""Audio by Stable Audio pipelines (Evans et al. 2024): a DiT over the latent tokens of a waveform.

Legend: M media, C channels, N waveform samples, P caption tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Audio
from mmllm.decoders.audio import AudioDecoder
from mmllm.decoders.config import SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.prompts import encode_with_t5
from mmllm.errors import ConfigError
from mmllm.kernels.devices import to_device


@dataclass(frozen=True)
class StableAudioConfig(SequenceConfig):
    """A `StableAudioPipeline`.

    Attributes:
        seconds: duration; None: the longest that the pipeline can make.
    """

    seconds: float | None = None


class StableAudioDecoder(AudioDecoder):
    """Condition: `prompt_embeds` [P, E] and `attention_mask` [P]; the pipeline's projection model
    adds the duration."""

    pipelines: ClassVar = ["StableAudioPipeline"]
    masks: ClassVar = {"prompt_embeds": "attention_mask"}

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.config.max_caption_tokens
        width = self.component_config("projection_model")["text_encoder_dim"]
        return {"prompt_embeds": (tokens, width), "attention_mask": (tokens,)}

    @property
    def default_seconds(self) -> float:
        """The most that the transformer can make."""
        return self._num_samples / self.sample_rate

    @property
    def sample_rate(self) -> int:
        return self.pipeline.vae.config.sampling_rate

    def with_overrides(self, **options: Any) -> Self:
        decoder = super().with_overrides(**options)
        if options.get("seconds"):
            most, least, seconds = self.default_seconds, 1 / self.sample_rate, decoder.seconds
            if seconds > most:
                raise ConfigError(f"seconds: expected at most {most:g}, got {seconds:g}")
            if seconds < least:  # not a single sample
                raise ConfigError(f"seconds: expected at least {least:.3g}, got {seconds:g}")
        return decoder

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        return encode_with_t5(self, captions)

    def unconditional(self, num: int) -> Condition:
        """Zeros under an empty mask without a negative prompt: then `negative_kwargs` is empty, and
        the pipeline uses zeros of its own, in place of the durations, too."""
        if self.config.negative_prompt:
            return super().unconditional(num)
        return self.zero_condition(num)

    def to_tensor(self, medium: Audio) -> Tensor:
        """Padded to the codec's length: float[C, N]."""
        channels = self.pipeline.vae.config.audio_channels
        return self.fit_wave(medium, channels, self._num_samples)

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return latents

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        pipeline, num = self.pipeline, len(noisy)
        embeds = pipeline.encode_prompt(None, self.device, False, **condition)
        # The pipeline computes durations and rotation on the CPU, and waits for each copy.
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
            encoder_hidden_states=torch.cat([embeds, start, end], dim=1),
            global_hidden_states=torch.cat([start, end], dim=2),
            rotary_embedding=rotary,
            return_dict=False,
        )[0]

    def pipeline_kwargs(self) -> dict[str, Any]:
        return {"audio_end_in_s": self.config.seconds}

    def negative_kwargs(self, negative: Condition) -> dict[str, Tensor]:
        return super().negative_kwargs(negative) if negative["attention_mask"].any() else {}

    def prepare_condition(self, condition: Condition) -> Condition:
        """Padded with zeros to the pipeline's own length, which the transformer attends to."""
        ready = super().prepare_condition(condition)
        missing = self.pipeline.tokenizer.model_max_length - self.config.max_caption_tokens
        if missing > 0:
            ready["prompt_embeds"] = F.pad(ready["prompt_embeds"], (0, 0, 0, missing))
            ready["attention_mask"] = F.pad(ready["attention_mask"], (0, missing))
        return ready

    @property
    def _num_samples(self) -> int:
        """N of the codec's input: the transformer has a fixed number of latent tokens."""
        return self.pipeline.transformer.config.sample_size * self.pipeline.vae.hop_length


def build(config: StableAudioConfig) -> StableAudioDecoder:
    return StableAudioDecoder(config)
