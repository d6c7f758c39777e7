"""Pictures by Z-Image (Z-Image Team 2025): a DiT that takes a Qwen3's states among its tokens.

Legend: M pictures, P caption tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmllm.decoders.base import Condition, Img2ImgConfig, SequenceConfig
from mmllm.decoders.visual import ImageConfig, ImageDecoder, shifted, vae_scale_factor
from mmllm.kernels.devices import to_device


@dataclass(frozen=True)
class ZImageConfig(ImageConfig, SequenceConfig, Img2ImgConfig):
    """A `ZImagePipeline`. Its Turbo takes 9 `steps` and a `guidance` of 0."""

    steps: int = 50
    guidance: float = 5.0
    max_caption_tokens: int = 512


class ZImageDecoder(ImageDecoder):
    """Condition: `prompt_embeds` [P, E] and `prompt_mask` [P]. The pipeline itself takes captions
    of different lengths, which the mask tells."""

    pipelines: ClassVar = ["ZImagePipeline"]
    masks: ClassVar = {"prompt_embeds": "prompt_mask"}
    passes_sigmas: ClassVar[bool] = True
    img2img_class = "ZImageImg2ImgPipeline"
    init_modality = "image"

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.config.max_caption_tokens
        width = self.component_config("transformer")["cap_feat_dim"]
        return {"prompt_embeds": (tokens, width), "prompt_mask": (tokens,)}

    @property
    def max_side(self) -> int:
        """The table of rotary positions ends there."""
        _, *sides = self.component_config("transformer").get("axes_lens", (1024, 512, 512))
        return 2 * vae_scale_factor(self) * min(sides)

    def _size(self) -> tuple[int, int]:
        return self._chosen((1024, 1024), 2 * vae_scale_factor(self))

    def _read(self, captions: Sequence[str]) -> Condition:
        tokens, _ = self.condition_shapes["prompt_embeds"]
        words, _ = self.pipeline.encode_prompt(
            list(captions), self.device, False, max_sequence_length=tokens
        )
        longest = words[0].new_zeros(tokens, words[0].shape[1])  # pads all to P
        return {
            "prompt_embeds": pad_sequence([*words, longest], batch_first=True)[:-1],
            "prompt_mask": torch.stack(
                [torch.arange(tokens, device=self.device) < len(each) for each in words]
            ),
        }

    def _normalise(self, latents: Tensor) -> Tensor:
        return shifted(self.pipeline.vae, latents)

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The transformer's clock runs from noise to picture, its velocity too."""
        predicted = self.pipeline.transformer(
            list(noisy[:, :, None]),
            1 - timesteps / 1000,
            _captions(condition),
            return_dict=False,
        )[0]
        return -torch.stack(predicted)[:, :, 0]

    def _arguments(self, condition: Condition) -> dict[str, Any]:
        return {"prompt_embeds": _captions(self._ready(condition))}

    def _guidance(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        """This pipeline counts from 0: it adds `scale` times the difference."""
        return {"guidance_scale": scale, **(self._guided(negative()) if scale > 0 else {})}


def _captions(condition: Condition) -> list[Tensor]:
    """Each caption's own positions; its mask stays tied to them by a gradient of zero."""
    embeds, mask = condition["prompt_embeds"], condition["prompt_mask"]
    kept = embeds * mask[..., None]
    shown = (mask > 0.5).cpu()  # the device is waited for once, not once a caption
    places = [to_device(here.nonzero()[:, 0], kept.device) for here in shown]
    return [row.index_select(0, its) for row, its in zip(kept, places, strict=True)]


def build(config: ZImageConfig) -> ZImageDecoder:
    return ZImageDecoder(config)
