"""What decoders of pictures and of clips share: sizes, pixels in, pixels out.

Legend: M media, F frames, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor

from mmllm.conversation import Image, Medium, Video
from mmllm.decoders.base import Condition, DecoderConfig, ModalityDecoder
from mmllm.errors import ConfigError
from mmllm.media import sample_frames


@dataclass(frozen=True)
class ImageConfig(DecoderConfig):
    """`height` and `width` in pixels; None is what the pipeline makes by itself."""

    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class VideoConfig(DecoderConfig):
    """`frames` of `height` x `width` pixels (None: what the pipeline makes by itself), shown at
    `fps`."""

    frames: int = 16
    fps: float = 8.0
    height: int | None = None
    width: int | None = None


class VisualDecoder(ModalityDecoder):
    """Media of a size that is known, and known to be possible, before weights are loaded."""

    def __init__(self, config: DecoderConfig):
        super().__init__(config)
        self.size = self._possible_size()
        """H, W"""

    def _configure(self, config: DecoderConfig) -> None:
        super()._configure(config)
        self.size = self._possible_size()

    def _possible_size(self) -> tuple[int, int]:
        size = self._size()
        for name, value in zip(("height", "width"), size, strict=True):
            if value > self.max_side:
                raise ConfigError(f"{name}: expected at most {self.max_side}, got {value}")
        return size

    def _measures(self) -> dict[str, float]:
        height, width = self.size
        return {"height": height, "width": width}

    @property
    def max_side(self) -> int:
        """Pixels that the pipeline can make in a row or a column, as far as its configs say."""
        return 8192

    def _size(self) -> tuple[int, int]:
        """H, W from the configs; ConfigError for a size that the pipeline would not make."""
        raise NotImplementedError

    def _chosen(self, own: tuple[int, int], unit: int) -> tuple[int, int]:
        """The config's size where it gives one, the pipeline's own elsewhere."""
        size = (self.config.height or own[0], self.config.width or own[1])
        check_size(size, (unit, unit))
        return size

    def _options(self) -> dict[str, Any]:
        height, width = self.size
        return {"height": height, "width": width}

    def _start_from(self, sources: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """M pictures, or clips that are lists of pictures, in our size; of one alone, itself."""
        given: list[Any] = [self._fitted(source) for source in sources]
        start: dict[str, Any] = {self.init_modality: given[0] if self.init_one_by_one else given}
        if "strength" in self.request_options:
            start["strength"] = self.config.strength
        return self._sharing(), start

    def _fitted(self, medium: Any) -> Any:
        """A picture, or a list of as many as we make: the centre, in our size."""
        if isinstance(medium, Image):
            return PILImage.fromarray(self._pixels(medium.to_pil()))
        frames = sample_frames(medium, self.config.frames)
        return [PILImage.fromarray(self._pixels(PILImage.fromarray(frame))) for frame in frames]

    def _pixels(self, picture: PILImage.Image) -> np.ndarray:
        """The centre, in our size: uint8[H, W, 3]."""
        height, width = self.size
        return np.array(ImageOps.fit(picture, (width, height), PILImage.Resampling.LANCZOS))


class ImageDecoder(VisualDecoder):
    modality = "image"

    def _preprocess(self, medium: Image) -> Tensor:
        """The centre -> float[3, H, W] in [-1, 1]."""
        return torch.from_numpy(self._pixels(medium.to_pil())).permute(2, 0, 1) / 127.5 - 1

    def _media(self, output: Any) -> list[Medium]:
        return [Image.from_numpy(picture) for picture in _bytes(output.images)]


class VideoDecoder(VisualDecoder):
    modality = "video"

    def _measures(self) -> dict[str, float]:
        return {**super()._measures(), "seconds": self.config.frames / self.config.fps}

    @property
    def max_frames(self) -> int:
        """Frames that the pipeline can make, as far as its configs say."""
        return 4096

    def _possible_size(self) -> tuple[int, int]:
        if self.config.frames > self.max_frames:
            raise ConfigError(
                f"frames: expected at most {self.max_frames}, got {self.config.frames}"
            )
        return super()._possible_size()

    def _preprocess(self, medium: Video) -> Tensor:
        """Frames even in time, their centre -> float[3, F, H, W] in [-1, 1]."""
        frames = sample_frames(medium, self.config.frames)
        pixels = np.stack([self._pixels(PILImage.fromarray(frame)) for frame in frames])
        return torch.from_numpy(pixels).permute(3, 0, 1, 2) / 127.5 - 1

    def _options(self) -> dict[str, Any]:
        return {"num_frames": self.config.frames, **super()._options()}

    def _media(self, output: Any) -> list[Medium]:
        return [Video.from_numpy(clip, fps=self.config.fps) for clip in _bytes(output.frames)]


class UNetDecoder(VisualDecoder):
    """A UNet that attends to all P positions of CLIP's text encoder, and halves with its codec."""

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.component_config("tokenizer")["model_max_length"]
        return {"prompt_embeds": (tokens, self.component_config("text_encoder")["hidden_size"])}

    def _size(self) -> tuple[int, int]:
        side = self.component_config("unet")["sample_size"] * vae_scale_factor(self)
        return self._chosen((side, side), 8)

    def _read(self, captions: list[str]) -> Condition:
        return {"prompt_embeds": self.pipeline.encode_prompt(captions, self.device, 1, False)[0]}

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.pipeline.unet(
            noisy, timesteps, encoder_hidden_states=condition["prompt_embeds"], return_dict=False
        )[0]


class MaskedCaptions(VisualDecoder):
    """A transformer that projects the words of a text encoder itself, with a mask over them."""

    masks: ClassVar = {"prompt_embeds": "prompt_attention_mask"}

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.config.max_caption_tokens
        width = self.component_config("transformer")["caption_channels"]
        return {"prompt_embeds": (tokens, width), "prompt_attention_mask": (tokens,)}


def vae_scale_factor(decoder: ModalityDecoder) -> int:
    """Pixels on a side of one latent, of codecs that halve from level to level."""
    return 2 ** (len(decoder.component_config("vae")["block_out_channels"]) - 1)


def shifted(vae: Any, latents: Tensor) -> Tensor:
    """Normalised latents of the codecs that came with flow matching."""
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def check_size(size: tuple[int, int], units: tuple[int, int]) -> None:
    """Pipelines round silently, and then latents and samples would differ in size."""
    for name, value, unit in zip(("height", "width"), size, units, strict=True):
        if value % unit:
            raise ConfigError(f"{name}: expected a multiple of {unit}, got {value}")


def check_frames(frames: int, group: int) -> None:
    """A codec that is causal in time makes one latent of the first frame, then one of `group`."""
    if frames % group != 1 % group:
        raise ConfigError(
            f"frames: expected 1 + {group}k, got {frames}; {frames // group * group + 1} would do"
        )


def _bytes(pixels: np.ndarray) -> np.ndarray:
    """float[…, 3] in [0, 1] -> uint8."""
    return (pixels * 255).round().astype(np.uint8)
