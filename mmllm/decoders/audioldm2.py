"""Audio by AudioLDM2 (Liu et al. 2023b): a UNet over mel spectrograms that attends to T5 and to the
states with which a small language model continues CLAP and T5.

Legend: M media, P tokens of T5, E their width, K generated states, E2 their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from mmllm.decoders.condition import encode_each
from mmllm.decoders.config import SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.mel import MelConfig, MelDecoder


@dataclass(frozen=True)
class AudioLDM2Config(MelConfig, SequenceConfig):
    """An `AudioLDM2Pipeline`."""

    steps: int = 50
    guidance: float = 3.5
    max_caption_tokens: int = 64


class AudioLDM2Decoder(MelDecoder):
    """Condition: `prompt_embeds` [P, E], `attention_mask` [P], `generated_prompt_embeds` [K, E2].

    The pipeline pads between the parts of the language model's input, so the states of a caption
    depend on the lengths of the others in its batch. Captions are therefore encoded one by one.
    """

    pipelines: ClassVar = ["AudioLDM2Pipeline"]
    masks: ClassVar = {"prompt_embeds": "attention_mask"}

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens, gpt2 = self.config.max_caption_tokens, self.component_config("language_model")
        return {
            "prompt_embeds": (tokens, self.component_config("text_encoder_2")["d_model"]),
            "attention_mask": (tokens,),
            "generated_prompt_embeds": (gpt2["max_new_tokens"], gpt2["n_embd"]),
        }

    def on_loaded(self, pipeline: Any) -> None:
        """Wrap the bare GPT2Model of published folders: since transformers 5 it lacks the
        generation methods that the pipeline calls."""
        from transformers import GPT2LMHeadModel, GPT2Model

        model = pipeline.language_model
        if isinstance(model, GPT2Model):
            with_head: Any = GPT2LMHeadModel(model.config)
            with_head.transformer = model
            pipeline.language_model = with_head.to(model.device, model.dtype)
            with_head.requires_grad_(False).eval()

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        return encode_each(captions, self._encode_one)

    def _encode_one(self, caption: str) -> Condition:
        embeds, mask, generated = self.pipeline.encode_prompt([caption], self.device, 1, False)
        padding = self.config.max_caption_tokens - embeds.shape[1]  # if negative, it truncates
        tensors = F.pad(embeds, (0, 0, 0, padding)), F.pad(mask, (0, padding)), generated
        return dict(zip(self.condition_shapes, tensors, strict=True))

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
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
