"""Music by ACE-Step 1.5 (ACE Studio and StepFun 2026): a rectified-flow DiT over the latents of a
waveform, conditioned on a text, on lyrics and on a timbre.

Legend: M media, C channels, N waveform samples, T latents, P caption tokens, E their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmllm.conversation import Audio
from mmllm.decoders.audio import AudioDecoder
from mmllm.decoders.condition import encode_each, padded, unpadded
from mmllm.decoders.config import SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.errors import ConfigError

_TIMBRE_SECONDS = 30
"""Of silence, which the pipeline reads in place of a recording whose timbre it takes."""


@dataclass(frozen=True)
class AceStepConfig(SequenceConfig):
    """An `AceStepPipeline`. Its turbo models take 8 `steps` and a `guidance` of 1, the others more
    `steps` and a `guidance` of 7.

    Attributes:
        seconds: duration.
        shift: moves the noise levels of the steps towards noise.
        lyrics: what is sung, with marks such as `[verse]` and `[chorus]`.
        vocal_language: the language of the lyrics, as a code.
    """

    steps: int = 8
    guidance: float = 1.0
    max_caption_tokens: int = 256
    seconds: float = 60.0
    shift: float = 3.0
    lyrics: str = ""
    vocal_language: str = "en"


class _EncodedPrompt(list[str]):
    """Stands for prompts in a call of the pipeline, and brings what `encode_prompt` makes of
    them."""

    def __init__(self, states: tuple[Tensor, ...]):
        super().__init__([""] * len(states[0]))
        self.states = states


class AceStepDecoder(AudioDecoder):
    """Condition: `prompt_embeds` [P, E] of the caption in the pipeline's template, which also names
    the duration, and `prompt_embeds_mask` [P].

    The transformer attends to all positions that it is given, and knows no mask. So captions are
    read, and media made, one by one, each with its caption's own length.
    """

    pipelines: ClassVar = ["AceStepPipeline"]
    masks: ClassVar = {"prompt_embeds": "prompt_embeds_mask"}
    passes_sigmas: ClassVar[bool] = True
    samples_one_by_one: ClassVar[bool] = True
    _lyrics: tuple[object, Tensor, Tensor] | None = None
    """What the lyrics were encoded for, their states and mask: every step asks for the same."""

    def configure(self) -> None:
        config, transformer = self.config, self.component_config("transformer")
        if config.negative_prompt:
            raise ConfigError(
                "negative_prompt: ACE-Step is guided away from a vector that it has learned, and "
                "takes no negative prompt"
            )
        if config.text_encoder == "llm":
            raise ConfigError(
                "text_encoder: ACE-Step reads Qwen3-Embedding, which is no language model that "
                "answers; expected own"
            )
        is_turbo = transformer.get("is_turbo") or transformer.get("model_version") == "turbo"
        if is_turbo and config.guidance > 1:
            raise ConfigError(
                f"guidance: {self.folder} is a turbo model, which is made without; expected at "
                f"most 1, got {config.guidance:g}"
            )
        if config.guidance < 0:
            raise ConfigError(f"guidance: expected at least 0, got {config.guidance:g}")
        if config.shift <= 0:
            raise ConfigError(f"shift: expected more than 0, got {config.shift:g}")
        latents, rate = self._num_latents, self._latents_per_second
        if math.ceil(latents / rate * rate) != latents:  # as the pipeline counts them again
            raise ConfigError(
                f"seconds: the pipeline rounds {config.seconds:g} in two ways; "
                f"{math.ceil(config.seconds)} would do"
            )

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.config.max_caption_tokens
        width = self.component_config("condition_encoder")["text_hidden_dim"]
        return {"prompt_embeds": (tokens, width), "prompt_embeds_mask": (tokens,)}

    @property
    def sample_rate(self) -> int:
        return self.component_config("vae")["sampling_rate"]

    @property
    def _samples_per_latent(self) -> int:
        return math.prod(self.component_config("vae")["downsampling_ratios"])

    @property
    def _latents_per_second(self) -> float:
        return self.sample_rate / self._samples_per_latent

    @property
    def _num_latents(self) -> int:
        return math.ceil(self.seconds * self._latents_per_second)

    def on_loaded(self, pipeline: Any) -> None:
        """The pipeline takes prompts as text only: let its `encode_prompt` pass on a condition."""
        read: Callable[..., Any] = pipeline.encode_prompt

        def encode_prompt(prompt: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(prompt, _EncodedPrompt):
                return prompt.states
            return read(prompt, *args, **kwargs)

        pipeline.encode_prompt = encode_prompt

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        return encode_each(captions, self._encode_one)

    def _encode_one(self, caption: str) -> Condition:
        tokens = self.config.max_caption_tokens
        embeds = self.pipeline.encode_prompt(
            [caption], [""], self.device, audio_duration=self.seconds, max_text_length=tokens
        )[0]
        embeds, mask = padded(embeds, tokens)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def to_tensor(self, medium: Audio) -> Tensor:
        """Padded to whole latents: float[C, N]."""
        channels = self.component_config("vae")["audio_channels"]
        return self.fit_wave(medium, channels, self._num_latents * self._samples_per_latent)

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return latents

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Of one medium: [1, C, T]. The transformer takes [1, T, C], next to the latents of silence
        and of what is to be made, which is all."""
        pipeline, inputs = self.pipeline, noisy.transpose(1, 2)
        text, text_mask, lyrics, lyrics_mask = self._states(condition)
        silence = pipeline.condition_encoder.silence_latent.to(inputs)
        context, _ = pipeline.condition_encoder(
            text_hidden_states=text,
            text_attention_mask=text_mask,
            lyric_hidden_states=lyrics,
            lyric_attention_mask=lyrics_mask,
            refer_audio_acoustic_hidden_states_packed=silence[
                :, : math.ceil(_TIMBRE_SECONDS * self._latents_per_second)
            ],
            refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=inputs.device),
        )
        source, _ = pipeline.prepare_src_latents(
            inputs.device, inputs.dtype, latent_length=inputs.shape[1]
        )
        times = timesteps.to(inputs.dtype)
        return pipeline.transformer(
            hidden_states=inputs,
            timestep=times,
            timestep_r=times,
            encoder_hidden_states=context,
            context_latents=torch.cat([source, torch.ones_like(source)], dim=-1),
            return_dict=False,
        )[0].transpose(1, 2)

    def pipeline_kwargs(self) -> dict[str, Any]:
        return {"audio_duration": self.seconds, "shift": self.config.shift}

    def condition_kwargs(self, condition: Condition) -> dict[str, Any]:
        return {"prompt": _EncodedPrompt(self._states(self.prepare_condition(condition)))}

    def guidance_kwargs(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        return {"guidance_scale": scale}

    def _states(self, condition: Condition) -> tuple[Tensor, ...]:
        """What `encode_prompt` returns of one medium: the text's states and mask, the lyrics'."""
        text = unpadded(condition["prompt_embeds"], condition["prompt_embeds_mask"])
        key = (self.config.lyrics, self.config.vocal_language, self.device)
        if self._lyrics is None or self._lyrics[0] != key:
            with torch.no_grad():
                _, _, *encoded = self.pipeline.encode_prompt(
                    [""], [key[0]], self.device, vocal_language=key[1]
                )
            self._lyrics = (key, *encoded)
        _, lyrics, lyrics_mask = self._lyrics
        return text, lyrics_mask.new_ones(text.shape[:2]), lyrics.to(text.dtype), lyrics_mask


def build(config: AceStepConfig) -> AceStepDecoder:
    return AceStepDecoder(config)
