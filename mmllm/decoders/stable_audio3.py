"""Audio by Stable Audio 3 (Stability AI 2026): a rectified-flow DiT over the latents of a waveform.

Legend: M media, C channels, N waveform samples, T latents, P caption tokens, E their width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Audio
from mmllm.decoders.audio import AudioDecoder
from mmllm.decoders.config import SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.prompts import encode_with_t5
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class StableAudio3Config(SequenceConfig):
    """A `StableAudio3Pipeline`. Its distilled models take 8 `steps` and a `guidance` of 1, the base
    model 100 `steps` and a `guidance` above 1.

    Attributes:
        seconds: duration.
    """

    steps: int = 8
    guidance: float = 1.0
    max_caption_tokens: int = 256
    seconds: float = 10.0


class StableAudio3Decoder(AudioDecoder):
    """Condition: `prompt_embeds` [P, E] and `encoder_attention_mask` [P]; the pipeline adds the
    duration, and reads all its positions: those that are masked are one learned vector."""

    pipelines: ClassVar = ["StableAudio3Pipeline"]
    masks: ClassVar = {"prompt_embeds": "encoder_attention_mask"}
    passes_sigmas: ClassVar[bool] = True

    def configure(self) -> None:
        if self.config.max_caption_tokens > self._positions:
            raise ConfigError(
                f"max_caption_tokens: expected at most {self._positions}, the positions that the "
                f"pipeline reads, got {self.config.max_caption_tokens}"
            )
        if self.config.seconds > (most := self.component_config("duration_embedder")["max_val"]):
            raise ConfigError(f"seconds: expected at most {most:g}, got {self.config.seconds:g}")
        if int(self.config.seconds * self.sample_rate) < 1:
            raise ConfigError(
                f"seconds: expected at least {1 / self.sample_rate:.3g}, one sample, got "
                f"{self.config.seconds:g}"
            )

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.config.max_caption_tokens
        width = self.component_config("transformer")["cond_token_dim"]
        return {"prompt_embeds": (tokens, width), "encoder_attention_mask": (tokens,)}

    @property
    def _positions(self) -> int:
        """As StableAudio3Pipeline.encode_prompt reads it."""
        return min(self.component_config("tokenizer").get("model_max_length", 256), 256)

    @property
    def sample_rate(self) -> int:
        return self.component_config("vae")["sampling_rate"]

    @property
    def _num_latents(self) -> int:
        vae = self.component_config("vae")
        ratio = vae["patch_size"] * math.prod(vae["encoder_strides"])
        return math.ceil(self.seconds * self.sample_rate / ratio)

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        return encode_with_t5(self, captions)

    def to_tensor(self, medium: Audio) -> Tensor:
        """Padded to whole latents: float[C, N]."""
        vae = self.component_config("vae")
        ratio = vae["patch_size"] * math.prod(vae["encoder_strides"])
        return self.fit_wave(medium, vae["audio_channels"], self._num_latents * ratio)

    def encode_latents(self, samples: Tensor) -> Tensor:
        return self.pipeline.vae.encode(samples).latents  # its codec has no distribution

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return latents

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        pipeline, mask = self.pipeline, condition["encoder_attention_mask"]
        duration = pipeline.duration_embedder(noisy.new_full((len(noisy),), self.seconds).float())
        context, context_mask = pipeline.prepare_cross_attention(
            condition["prompt_embeds"] * mask[..., None], mask, duration
        )
        return pipeline.transformer(
            noisy,
            timesteps,
            encoder_hidden_states=context,
            global_hidden_states=duration,
            encoder_attention_mask=context_mask,
            return_dict=False,
        )[0]

    def pipeline_kwargs(self) -> dict[str, Any]:
        return {"duration": self.seconds}

    def prepare_condition(self, condition: Condition) -> Condition:
        """Padded to the pipeline's own length."""
        ready = super().prepare_condition(condition)
        missing = self._positions - self.config.max_caption_tokens
        return {
            "prompt_embeds": F.pad(ready["prompt_embeds"], (0, 0, 0, missing)),
            "encoder_attention_mask": F.pad(ready["encoder_attention_mask"], (0, missing)),
        }


def build(config: StableAudio3Config) -> StableAudio3Decoder:
    return StableAudio3Decoder(config)
