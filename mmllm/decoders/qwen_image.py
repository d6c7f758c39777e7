"""Images by Qwen-Image (Qwen Team 2025): a DiT over packed latents, conditioned on a Qwen2.5-VL.

Legend: M media, P caption tokens, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.decoders.config import ImageConfig, Img2ImgConfig, ReferenceConfig, SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.latents import standardize
from mmllm.decoders.visual import ImageDecoder
from mmllm.errors import ConfigError

_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class QwenImageConfig(ImageConfig, SequenceConfig, Img2ImgConfig, ReferenceConfig):
    """A `QwenImagePipeline`, a `QwenImageEditPipeline` (one reference) or a
    `QwenImageEditPlusPipeline` (up to three). The authors guide away from a negative prompt of one
    space."""

    steps: int = 50
    guidance: float = 4.0
    negative_prompt: str = " "
    max_caption_tokens: int = 256


class QwenCodec(ImageDecoder):
    """A decoder of images whose codec is Qwen-Image's, one of video: an image is a video of one
    frame. A family also says how many latents its tokens have on a side."""

    @property
    def patch_size(self) -> int:
        """Latents along a side of one token."""
        return 2

    def compute_size(self) -> tuple[int, int]:
        scale = 2 ** len(self.component_config("vae")["temperal_downsample"])
        return self.resolve_size((128 * scale, 128 * scale), self.patch_size * scale)

    def encode_latents(self, samples: Tensor) -> Tensor:
        return super().encode_latents(samples[:, :, None])[:, :, 0]

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return standardize(self.pipeline.vae, latents)


class QwenCaptions(QwenCodec):
    """A decoder of images that reads captions as Qwen-Image does. Condition: `prompt_embeds` [P, E]
    and `prompt_embeds_mask` [P]."""

    masks: ClassVar = {"prompt_embeds": "prompt_embeds_mask"}

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.config.max_caption_tokens
        width = self.component_config("transformer")["joint_attention_dim"]
        return {"prompt_embeds": (tokens, width), "prompt_embeds_mask": (tokens,)}

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        tokens = self.config.max_caption_tokens
        embeds, mask = self.pipeline.encode_prompt(
            list(captions), device=self.device, max_sequence_length=tokens
        )
        if mask is None:  # every caption is as long as the longest
            mask = embeds.new_ones(embeds.shape[:2])
        padding = tokens - embeds.shape[1]  # below 0: the pipelines for editing cut nothing
        return {
            "prompt_embeds": F.pad(embeds, (0, 0, 0, padding)),
            "prompt_embeds_mask": F.pad(mask, (0, padding)),
        }


class QwenImageDecoder(QwenCaptions):
    """Condition: `prompt_embeds` [P, E] and `prompt_embeds_mask` [P].

    The text encoder of the pipelines for editing also reads the references. Here it reads captions
    alone, as the condition is the system's to predict, whose encoder has read the pictures; their
    latents reach the transformer.
    """

    pipelines: ClassVar = [
        *("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    ]
    passes_sigmas: ClassVar[bool] = True
    img2img_class = "QwenImageImg2ImgPipeline"
    inpaint_class = "QwenImageInpaintPipeline"
    init_modality = "image"

    def __init__(self, config: QwenImageConfig):
        super().__init__(config)
        if self.pipeline_class != "QwenImagePipeline":
            self.img2img_class = self.inpaint_class = self.init_modality = ""
            self.needs_references = True
            self.max_references = 3 if self.pipeline_class == "QwenImageEditPlusPipeline" else 1

    def on_loaded(self, pipeline: Any) -> None:
        """Take the picture out of the template of `QwenImageEditPipeline`: captions have none."""
        if self.pipeline_class == "QwenImageEditPipeline":
            template = pipeline.prompt_template_encode
            pipeline.prompt_template_encode = template.replace(_PICTURE, "")

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.denoise_with_references(condition, noisy, timesteps, noisy[:0])

    def denoise_with_references(
        self, condition: Condition, noisy: Tensor, timesteps: Tensor, references: Tensor
    ) -> Tensor:
        if len(references):
            self._check_reference_size()
        pipeline, (height, width) = self.pipeline, noisy.shape[2:]
        tokens = pipeline._pack_latents(noisy, *noisy.shape)
        num = tokens.shape[1]
        for reference in references:
            tokens = torch.cat([tokens, pipeline._pack_latents(reference, 1, *noisy.shape[1:])], 1)
        mask = condition["prompt_embeds_mask"]
        predicted = pipeline.transformer(
            hidden_states=tokens,
            timestep=timesteps / 1000,
            encoder_hidden_states_mask=mask,  # read as booleans: the product ties it to the loss
            encoder_hidden_states=condition["prompt_embeds"] * mask[..., None],
            img_shapes=[[(1, height // 2, width // 2)] * (1 + len(references))] * len(noisy),
            attention_kwargs={},
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(predicted[:, :num], height, width, 1)[:, :, 0]

    def reference_kwargs(self, references: Sequence[Any], name: str) -> dict[str, Any]:
        pictures = [self.fit(reference) for reference in references]
        return {name: pictures if self.max_references > 1 else pictures[0]}

    def _check_reference_size(self) -> None:
        """Raise ConfigError if the pipeline would scale references to another size than ours."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit

        height, width = self.size
        made = edit.calculate_dimensions(edit.VAE_IMAGE_SIZE, width / height)
        if tuple(made[:2]) != (width, height):
            raise ConfigError(
                f"image: {self.pipeline_class} scales references to {made[0]}x{made[1]} pixels; to "
                f"train with them, expected this width and height, got {width}x{height}"
            )

    def guidance_kwargs(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        return {"true_cfg_scale": scale, **(self.negative_kwargs(negative()) if scale > 1 else {})}


def build(config: QwenImageConfig) -> QwenImageDecoder:
    return QwenImageDecoder(config)
