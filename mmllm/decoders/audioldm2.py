"""Sounds by AudioLDM2 (Liu et al. 2023b): a UNet over mel spectrograms that attends to T5 and to
what a small language model continues CLAP and T5 with.

Legend: M sounds, P tokens of T5, E their width, K continued states, E2 their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.decoders.base import Condition, SequenceConfig
from mmllm.decoders.mel import MelConfig, MelDecoder


@dataclass(frozen=True)
class AudioLDM2Config(MelConfig, SequenceConfig):
    """An `AudioLDM2Pipeline`."""

    steps: int = 50
    guidance: float = 3.5
    max_caption_tokens: int = 64


class AudioLDM2Decoder(MelDecoder):
    """Condition: `prompt_embeds` [P, E], `attention_mask` [P], `generated_prompt_embeds` [K, E2].

    The language model sees how long its neighbours in a batch are, for the pipeline pads between
    the parts of its input. So every caption is read alone: its target is its own.
    """

    pipelines: ClassVar = ["AudioLDM2Pipeline"]
    masks: ClassVar = {"prompt_embeds": "attention_mask"}

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens, writer = self.config.max_caption_tokens, self.component_config("language_model")
        return {
            "prompt_embeds": (tokens, self.component_config("text_encoder_2")["d_model"]),
            "attention_mask": (tokens,),
            "generated_prompt_embeds": (writer["max_new_tokens"], writer["n_embd"]),
        }

    def _loaded(self, pipeline: Any) -> None:
        """The published folders hold a bare GPT2Model, which transformers 5 no longer teaches the
        steps of generation that the pipeline asks of it."""
        from transformers import GPT2LMHeadModel, GPT2Model

        model = pipeline.language_model
        if isinstance(model, GPT2Model):
            writer: Any = GPT2LMHeadModel(model.config)
            writer.transformer = model
            pipeline.language_model = writer.to(model.device, model.dtype)
            writer.requires_grad_(False).eval()

    def _read(self, captions: Sequence[str]) -> Condition:
        names, rows = tuple(self.condition_shapes), []
        for caption in captions:
            words, mask, written = self.pipeline.encode_prompt([caption], self.device, 1, False)
            spare = self.config.max_caption_tokens - words.shape[1]  # cuts where negative
            rows.append((F.pad(words, (0, 0, 0, spare)), F.pad(mask, (0, spare)), written))
        return dict(zip(names, map(torch.cat, zip(*rows, strict=True)), strict=True))

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.pipeline.unet(
            noisy,
            timesteps,
            encoder_hidden_states=condition["generated_prompt_embeds"],
            encoder_hidden_states_1=condition["prompt_embeds"],
            encoder_attention_mask_1=condition["attention_mask"],
            return_dict=False,
        )[0]


def build(config: AudioLDM2Config) -> AudioLDM2Decoder:
    return AudioLDM2Decoder(config)
