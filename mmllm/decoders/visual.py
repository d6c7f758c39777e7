"""Image and video decoders: sizes, pixels in, pixels out.

Legend: M media, F frames, H x W pixels, P caption tokens, E width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor

from mmllm.conversation import Image, Medium, Video
from mmllm.decoders.contract import Condition
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.decoders.editing import mask_of
from mmllm.decoders.latents import vae_scale_factor
from mmllm.errors import ConfigError


class VisualDecoder(ModalityDecoder):
    """A decoder whose size is known, and known to be possible, before weights are loaded.

    A family also writes `compute_size`; `max_side` where positions end.
    """

    size: tuple[int, int]
    """(H, W) in pixels of what is generated, by the current config."""

    def configure(self) -> None:
        super().configure()
        size = self.compute_size()
        for name, value in zip(("height", "width"), size, strict=True):
            if value > self.max_side:
                raise ConfigError(f"{name}: expected at most {self.max_side}, got {value}")
        self.size = size

    def output_spec(self) -> dict[str, float]:
        height, width = self.size
        return {"height": height, "width": width}

    @property
    def max_side(self) -> int:
        """The largest height or width that the pipeline can generate, if its configs limit it."""
        return 8192

    def compute_size(self) -> tuple[int, int]:
        """H, W by the configs; raises ConfigError for a size that the pipeline would not make."""
        raise NotImplementedError

    def resolve_size(self, default: tuple[int, int], unit: int) -> tuple[int, int]:
        """Return the size (H, W) of media: the config's, or the pipeline's default.

        Args:
            default: (H, W) of the pipeline.
            unit: both sides must be multiples of this many pixels.

        Raises:
            ConfigError: a side is not.
        """
        size = (self.config.height or default[0], self.config.width or default[1])
        check_size(size, (unit, unit))
        return size

    def pipeline_kwargs(self) -> dict[str, Any]:
        height, width = self.size
        return {"height": height, "width": width}

    def prepare_img2img(self, media: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """M images, or videos as lists of images, in our size; with `init_one_by_one` the only
        one."""
        fitted: list[Any] = [self.fit(medium) for medium in media]
        kwargs: dict[str, Any] = {self.init_modality: fitted[0] if self.init_one_by_one else fitted}
        if "strength" in self.request_options:
            kwargs["strength"] = self.config.strength
        return self.runtime.sibling(self.img2img_class), kwargs

    def prepare_inpainting(
        self, media: Sequence[Any], masks: Sequence[Any]
    ) -> tuple[Any, dict[str, Any]]:
        """M images and masks in our size; with `init_one_by_one` the only ones."""
        kwargs: dict[str, Any] = {
            "image": [self.fit(medium) for medium in media],
            "mask_image": [PILImage.fromarray(self.fit_mask(mask)) for mask in masks],
        }
        if self.init_one_by_one:
            kwargs = {name: values[0] for name, values in kwargs.items()}
        if "strength" in self.request_options:
            kwargs["strength"] = self.config.strength
        return self.runtime.sibling(self.inpaint_class), kwargs

    def fit_mask(self, mask: Any) -> np.ndarray:
        """A mask cropped as `fit` crops its picture, in our size: bool[H, W]."""
        height, width = self.size
        picture = PILImage.fromarray(mask_of(mask))
        return np.array(ImageOps.fit(picture, (width, height), PILImage.Resampling.NEAREST))

    def keep_unmasked(
        self, made: Sequence[Medium], media: Sequence[Any] | None, masks: Sequence[Any]
    ) -> list[Medium]:
        """Byte by byte: a codec changes every pixel a little, also where latents were kept."""
        return [
            Image.from_numpy(
                np.where(
                    self.fit_mask(mask)[..., None],
                    image.to_numpy(),
                    self.center_crop(medium.to_pil()),
                )
            )
            for image, medium, mask in zip(made, media or (), masks, strict=True)
        ]

    def fit(self, medium: Any) -> Any:
        """An image cropped to our size; of a video a list of them, as many as we generate."""
        if isinstance(medium, Image):
            return PILImage.fromarray(self.center_crop(medium.to_pil()))
        frames = medium.sample_frames(self.config.frames)
        return [PILImage.fromarray(self.center_crop(PILImage.fromarray(frame))) for frame in frames]

    def center_crop(self, image: PILImage.Image) -> np.ndarray:
        """The largest centred part of our aspect ratio, in our size: uint8[H, W, 3]."""
        height, width = self.size
        return np.array(ImageOps.fit(image, (width, height), PILImage.Resampling.LANCZOS))


class ImageDecoder(VisualDecoder):
    """A decoder of images."""

    modality = "image"

    def to_tensor(self, medium: Image) -> Tensor:
        """The centre of the image -> float[3, H, W] in [-1, 1]."""
        return torch.from_numpy(self.center_crop(medium.to_pil())).permute(2, 0, 1) / 127.5 - 1

    def to_media(self, output: Any) -> list[Medium]:
        return [Image.from_numpy(image) for image in to_uint8(output.images)]


class VideoDecoder(VisualDecoder):
    """A decoder of videos; `max_frames` where positions end."""

    modality = "video"

    def configure(self) -> None:
        if self.config.frames > self.max_frames:
            raise ConfigError(
                f"frames: expected at most {self.max_frames}, got {self.config.frames}"
            )
        super().configure()

    def output_spec(self) -> dict[str, float]:
        return {**super().output_spec(), "seconds": self.config.frames / self.config.fps}

    @property
    def max_frames(self) -> int:
        """The most frames that the pipeline can generate, if its configs limit it."""
        return 4096

    def to_tensor(self, medium: Video) -> Tensor:
        """Frames evenly spaced in time, their centre -> float[3, F, H, W] in [-1, 1]."""
        frames = medium.sample_frames(self.config.frames)
        pixels = np.stack([self.center_crop(PILImage.fromarray(frame)) for frame in frames])
        return torch.from_numpy(pixels).permute(3, 0, 1, 2) / 127.5 - 1

    def pipeline_kwargs(self) -> dict[str, Any]:
        return {"num_frames": self.config.frames, **super().pipeline_kwargs()}

    def to_media(self, output: Any) -> list[Medium]:
        videos = to_uint8(output.frames)
        return [Video.from_numpy(frames, fps=self.config.fps) for frames in videos]


class UNetDecoder(VisualDecoder):
    """A UNet that attends to all P positions of CLIP's text encoder."""

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.component_config("tokenizer")["model_max_length"]
        return {"prompt_embeds": (tokens, self.component_config("text_encoder")["hidden_size"])}

    def compute_size(self) -> tuple[int, int]:
        side = self.component_config("unet")["sample_size"] * vae_scale_factor(self)
        return self.resolve_size((side, side), 8)

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        embeds = self.pipeline.encode_prompt(list(captions), self.device, 1, False)[0]
        return {"prompt_embeds": embeds}

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.pipeline.unet(
            noisy, timesteps, encoder_hidden_states=condition["prompt_embeds"], return_dict=False
        )[0]


class MaskedPrompt(VisualDecoder):
    """A transformer with a text projection of its own, and a mask over the caption's positions."""

    masks: ClassVar = {"prompt_embeds": "prompt_attention_mask"}

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.config.max_caption_tokens
        width = self.component_config("transformer")["caption_channels"]
        return {"prompt_embeds": (tokens, width), "prompt_attention_mask": (tokens,)}


def check_size(size: tuple[int, int], units: tuple[int, int]) -> None:
    """Raise ConfigError unless both sides are multiples of the codec's units.

    Pipelines round silently, and then latents and samples would differ in size.

    Args:
        size: (H, W) in pixels.
        units: the pixels that height and width must be multiples of.
    """
    for name, value, unit in zip(("height", "width"), size, units, strict=True):
        if value % unit:
            raise ConfigError(f"{name}: expected a multiple of {unit}, got {value}")


def check_frames(frames: int, group: int) -> None:
    """Raise ConfigError unless the number of frames is 1 + k `group`.

    A codec that is causal in time makes one latent of the first frame, then one of every group.

    Args:
        frames: frames of a video.
        group: frames that share a latent.
    """
    if frames % group != 1 % group:
        raise ConfigError(
            f"frames: expected 1 + {group}k, got {frames}; {frames // group * group + 1} would do"
        )


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Round the pixels that a pipeline returned to bytes.

    Args:
        pixels: float[..., 3] in [0, 1].

    Returns:
        uint8[..., 3].
    """
    return (pixels * 255).round().astype(np.uint8)
