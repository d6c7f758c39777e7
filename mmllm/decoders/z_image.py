"""Images by Z-Image (Z-Image Team 2025): a DiT over patches and a Qwen3's states.

Legend: M media, P caption tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmllm.decoders.config import ImageConfig, Img2ImgConfig, SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.latents import shift_and_scale, vae_scale_factor
from mmllm.decoders.visual import ImageDecoder
from mmllm.kernels.devices import to_device


@dataclass(frozen=True)
class ZImageConfig(ImageConfig, SequenceConfig, Img2ImgConfig):
    """A `ZImagePipeline`. Its Turbo takes 9 `steps` and a `guidance` of 0."""

    steps: int = 50
    guidance: float = 5.0
    max_caption_tokens: int = 512


class ZImageDecoder(ImageDecoder):
    """Condition: `prompt_embeds` [P, E] and `prompt_mask` [P]. The pipeline itself takes a list of
    captions of different lengths, given by the mask."""

    pipelines: ClassVar = ["ZImagePipeline"]
    masks: ClassVar = {"prompt_embeds": "prompt_mask"}
    passes_sigmas: ClassVar[bool] = True
    img2img_class = "ZImageImg2ImgPipeline"
    inpaint_class = "ZImageInpaintPipeline"
    init_modality = "image"

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.config.max_caption_tokens
        width = self.component_config("transformer")["cap_feat_dim"]
        return {"prompt_embeds": (tokens, width), "prompt_mask": (tokens,)}

    @property
    def max_side(self) -> int:
        """The end of the table of rotary positions."""
        _, *sides = self.component_config("transformer").get("axes_lens", (1024, 512, 512))
        return 2 * vae_scale_factor(self) * min(sides)

    def compute_size(self) -> tuple[int, int]:
        return self.resolve_size((1024, 1024), 2 * vae_scale_factor(self))

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        tokens, _ = self.condition_shapes["prompt_embeds"]
        embeds, _ = self.pipeline.encode_prompt(
            list(captions), self.device, False, max_sequence_length=tokens
        )
        full_length = embeds[0].new_zeros(tokens, embeds[0].shape[1])  # pads all to P
        return {
            "prompt_embeds": pad_sequence([*embeds, full_length], batch_first=True)[:-1],
            "prompt_mask": torch.stack(
                [torch.arange(tokens, device=self.device) < len(states) for states in embeds]
            ),
        }

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return shift_and_scale(self.pipeline.vae, latents)

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The transformer's time and velocity run from noise to image: both signs are reversed."""
        predicted = self.pipeline.transformer(
            list(noisy[:, :, None]),
            1 - timesteps / 1000,
            _per_caption(condition),
            return_dict=False,
        )[0]
        return -torch.stack(predicted)[:, :, 0]

    def condition_kwargs(self, condition: Condition) -> dict[str, Any]:
        return {"prompt_embeds": _per_caption(self.prepare_condition(condition))}

    def guidance_kwargs(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        """This pipeline adds `scale` times the difference: 0 is the condition alone."""
        return {"guidance_scale": scale, **(self.negative_kwargs(negative()) if scale > 0 else {})}


def _per_caption(condition: Condition) -> list[Tensor]:
    """The unmasked positions of each caption; the mask stays tied to them by a gradient of zero."""
    embeds, mask = condition["prompt_embeds"], condition["prompt_mask"]
    masked = embeds * mask[..., None]
    is_kept = (mask > 0.5).cpu()  # one wait for the device, not one a caption
    indices = [to_device(kept.nonzero()[:, 0], masked.device) for kept in is_kept]
    return [row.index_select(0, kept) for row, kept in zip(masked, indices, strict=True)]


def build(config: ZImageConfig) -> ZImageDecoder:
    return ZImageDecoder(config)
