"""Images by Qwen-Image 2.1 (Qwen Team 2026): one causal sequence of text and latents, each latent a
token, conditioned on a Qwen3-VL.

Legend: M media, P caption tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Image, Medium
from mmllm.decoders.condition import encode_each, padded, unpadded
from mmllm.decoders.config import ImageConfig, SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.latents import standardize
from mmllm.decoders.visual import ImageDecoder, to_uint8

_SCALE = 16  # pixels along a side of a latent
_SLOT = 4  # latents to each place that the transformer's mask has for them


@dataclass(frozen=True)
class QwenImage21Config(ImageConfig, SequenceConfig):
    """A `QwenImage21Pipeline`. The authors sample without guidance."""

    steps: int = 40
    guidance: float = 1.0
    max_caption_tokens: int = 256


class QwenImage21Decoder(ImageDecoder):
    """Condition: `prompt_embeds` [P, E] and `prompt_embeds_mask` [P].

    Positions of latents count the text in front of them, padding included. So media are made one by
    one, each with its caption's own length. The pipeline edits pictures only where its text encoder
    reads them between the words of the request; a condition has no place for them, so it takes no
    references.
    """

    pipelines: ClassVar = ["QwenImage21Pipeline"]
    masks: ClassVar = {"prompt_embeds": "prompt_embeds_mask"}
    passes_sigmas: ClassVar[bool] = True
    samples_one_by_one: ClassVar[bool] = True

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.config.max_caption_tokens
        width = self.component_config("transformer")["context_in_dim"]
        return {"prompt_embeds": (tokens, width), "prompt_embeds_mask": (tokens,)}

    def compute_size(self) -> tuple[int, int]:
        return self.resolve_size((1024, 1024), 2 * _SCALE)

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        return encode_each(captions, self._encode_one)

    def _encode_one(self, caption: str) -> Condition:
        embeds, _, _ = self.pipeline.encode_prompt([caption], device=self.device)
        embeds, mask = padded(embeds, self.config.max_caption_tokens)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    # --- Pixels and latents -----------------------------------------------------------------------

    def encode_latents(self, samples: Tensor) -> Tensor:
        """The codec is one of video and takes a fourth channel, opacity: an image is an opaque
        video of one frame."""
        channels = self.pipeline.vae.config.in_channels
        opaque = F.pad(samples, (0, 0, 0, 0, 0, channels - 3), value=1.0)
        return super().encode_latents(opaque[:, :, None])[:, :, 0]

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return standardize(self.pipeline.vae, latents)

    def to_media(self, output: Any) -> list[Medium]:
        return [Image.from_numpy(pixels) for pixels in to_uint8(on_white(output.images))]

    # --- Sampling and the denoising loss ----------------------------------------------------------

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Of one image."""
        pipeline, (height, width) = self.pipeline, noisy.shape[2:]
        embeds = unpadded(condition["prompt_embeds"], condition["prompt_embeds_mask"])
        places = torch.arange(embeds.shape[1] + height * width // _SLOT, device=noisy.device)
        predicted = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy, *noisy.shape),
            timestep=timesteps / pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=None,
            img_shapes=[[(1, height, width)]],
            img_mask=(places >= embeds.shape[1])[None],
            attention_kwargs={},
            return_dict=False,
        )[0]
        size = (height * _SCALE, width * _SCALE)
        return pipeline._unpack_latents(predicted[:, -height * width :], *size, _SCALE)[:, :, 0]

    def condition_kwargs(self, condition: Condition) -> dict[str, Any]:
        ready = self.prepare_condition(condition)
        return {"prompt_embeds": unpadded(ready["prompt_embeds"], ready["prompt_embeds_mask"])}

    def guidance_kwargs(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        return {"true_cfg_scale": scale, **(self.negative_kwargs(negative()) if scale > 1 else {})}


def on_white(pixels: np.ndarray) -> np.ndarray:
    """Pictures with opacity on a white ground: float[..., 4] in 0..1 -> float[..., 3]."""
    colours, opacity = pixels[..., :3], pixels[..., 3:]
    return colours * opacity + (1 - opacity) if opacity.shape[-1] else colours


def build(config: QwenImage21Config) -> QwenImage21Decoder:
    return QwenImage21Decoder(config)
