"""Video from a picture by Wan (Wan Team 2025): the picture is the first frame, and a second one the
last.

Legend: F frames, H x W pixels, R pictures (1 or 2), S shape of the latents of one video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image as PILImage
from torch import Tensor

from mmllm.decoders.config import ReferenceConfig, SequenceConfig, VideoConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.loading import read_model_index
from mmllm.decoders.visual import to_uint8
from mmllm.decoders.wan import ExpertsConfig, WanReferenceBase
from mmllm.errors import ConfigError

_CAPTION_TOKENS = 512
"""Where the tokens of a picture precede those of the caption, its transformer counts on these."""


@dataclass(frozen=True)
class WanI2VConfig(ExpertsConfig, VideoConfig, SequenceConfig, ReferenceConfig):
    """A `WanImageToVideoPipeline`: Wan 2.1 with an image encoder, for a first frame or for a first
    and a last one, and Wan 2.2. The defaults are the pipeline's."""

    max_caption_tokens: int = _CAPTION_TOKENS
    frames: int = 81
    fps: float = 16.0
    height: int = 480
    width: int = 832


class WanI2VDecoder(WanReferenceBase):
    """References are the frames that are given, in the order of time."""

    pipelines: ClassVar = ["WanImageToVideoPipeline"]
    needs_references = True

    def __init__(self, config: WanI2VConfig):
        super().__init__(config)
        transformer = self.component_config("transformer")
        if read_model_index(self.folder).get("expand_timesteps"):
            self.max_references = 1
        elif transformer.get("image_dim") is None:
            self.max_references = 2
        else:  # one or two pictures have been read by the image encoder in training
            num = 1 if transformer.get("pos_embed_seq_len") is None else 2
            self.min_references = self.max_references = num

    def configure(self) -> None:
        tokens = self.config.max_caption_tokens
        if (
            self.component_config("transformer").get("added_kv_proj_dim") is not None
            and tokens != _CAPTION_TOKENS
        ):
            raise ConfigError(
                f"max_caption_tokens: the transformer in {self.folder} finds a picture's tokens in "
                f"front of {_CAPTION_TOKENS} of the caption; expected {_CAPTION_TOKENS}, got "
                f"{tokens}"
            )
        super().configure()

    def reference_kwargs(self, references: Sequence[Any], name: str) -> dict[str, Any]:
        frames = [self.fit_reference(reference) for reference in references]
        return dict(zip((name, "last_image"), frames, strict=False))

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        raise ConfigError(
            f"{self.modality}: {self.pipeline_class} makes a video from its first frame, and a "
            "conversation of the training data has no picture in front of a video; put one into "
            "the user's message, set references to auto, or train without the loss 'denoise'"
        )

    def denoise_with_references(
        self, condition: Condition, noisy: Tensor, timesteps: Tensor, references: Tensor
    ) -> Tensor:
        """The latents of a video of the given frames, grey elsewhere, and a mask of which they are,
        are further channels.

        Args:
            condition: as `prepare_condition` returns it, of one row.
            noisy: [1, *S].
            timesteps: [1].
            references: float[R, 3, H, W] in [-1, 1].

        Returns:
            The raw prediction [1, *S].
        """
        self.check_trainable()
        pipeline = self.pipeline
        with torch.no_grad():
            given, embeds = self._given_frames(noisy, references), None
            if pipeline.transformer.config.image_dim is not None:
                embeds = pipeline.encode_image([_to_pil(each) for each in references], self.device)
                embeds = embeds.to(noisy.dtype)
        return pipeline.transformer(
            hidden_states=torch.cat([noisy, given.to(noisy.dtype)], dim=1),
            timestep=timesteps,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_hidden_states_image=embeds,
            return_dict=False,
        )[0]

    def _given_frames(self, noisy: Tensor, references: Tensor) -> Tensor:
        """The mask and the latents of the given frames, by the pipeline: [1, C', *S[1:]]."""
        first, *last = references.float().split(1)
        _, given = self.pipeline.prepare_latents(
            first,
            1,
            noisy.shape[1],
            *self.size,
            self.config.frames,
            torch.float32,
            noisy.device,
            latents=noisy,
            last_image=last[0] if last else None,
        )
        return given


def _to_pil(pixels: Tensor) -> PILImage.Image:
    """float[3, H, W] in [-1, 1] as the image encoder's preprocessing takes it."""
    return PILImage.fromarray(to_uint8((pixels.float().permute(1, 2, 0).cpu().numpy() + 1) / 2))


def build(config: WanI2VConfig) -> WanI2VDecoder:
    return WanI2VDecoder(config)
