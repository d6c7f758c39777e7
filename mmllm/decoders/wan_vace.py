"""Video by Wan VACE (Jiang et al. 2025): Wan with a second stream of blocks that reads a video, a
mask of what is to be made anew in it, and pictures of what is to be seen.

Legend: M media, C latent channels, F frames, H x W pixels, R references, S shape of the latents of
one video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor
from torch.nn import functional

from mmllm.conversation import Image, Medium, Video
from mmllm.decoders.condition import check_condition
from mmllm.decoders.config import InitMediaConfig, ReferenceConfig, SequenceConfig, VideoConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.wan import ExpertsConfig, WanReferenceBase

_GREY = 128
"""Of the pixels that are to be made anew, as in the example of diffusers."""


@dataclass(frozen=True)
class WanVACEConfig(ExpertsConfig, VideoConfig, SequenceConfig, InitMediaConfig, ReferenceConfig):
    """A `WanVACEPipeline`; the defaults are the pipeline's.

    Attributes:
        conditioning_scale: of what the second stream adds to the first: 0 is none of the video, the
            mask and the references.
    """

    max_caption_tokens: int = 512
    frames: int = 81
    fps: float = 16.0
    height: int = 480
    width: int = 832
    conditioning_scale: float = 1.0


class WanVACEDecoder(WanReferenceBase):
    """Video from captions alone, or also from a video (`init_media`), from a part of one that is
    kept (`mask`), from references, and from all of these."""

    pipelines: ClassVar = ["WanVACEPipeline"]
    samples_one_by_one: ClassVar[bool] = True
    init_modality = "video"
    masks_references = True
    starts_with_references = True

    def __init__(self, config: WanVACEConfig):
        super().__init__(config)
        self._empty: tuple[tuple[Any, ...], Tensor] | None = None

    @property
    def takes_mask(self) -> bool:
        return True

    def configure(self) -> None:
        super().configure()
        # A reference is one more latent in time; the pipeline makes their masks of a video's.
        free = self.max_latent_frames - self.latent_frames
        self.max_references = min(self.latent_frames, free)

    def fit_reference(self, medium: Image) -> PILImage.Image:
        """The whole picture on white, as the pipeline itself brings it to a size."""
        height, width = self.size
        return ImageOps.pad(
            medium.to_pil(), (width, height), PILImage.Resampling.LANCZOS, color="white"
        )

    def reference_kwargs(self, references: Sequence[Any], name: str) -> dict[str, Any]:
        return {"reference_images": [self.fit_reference(each) for each in references]}

    def pipeline_kwargs(self) -> dict[str, Any]:
        scale = self.config.conditioning_scale
        return {"conditioning_scale": scale, **super().pipeline_kwargs()}

    # --- From a video ----------------------------------------------------------------------------

    def prepare_img2img(self, media: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """The same pipeline, with the only video."""
        return self.pipeline, {"video": self.fit(media[0])}

    def prepare_inpainting(
        self, media: Sequence[Any], masks: Sequence[Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The same pipeline, with the only video, grey where its mask is white."""
        mask = self.fit_mask(masks[0])
        frames = np.where(mask[..., None], np.uint8(_GREY), self._frames(media[0]))
        white = PILImage.fromarray(mask.astype(np.uint8) * 255)
        video = [PILImage.fromarray(frame) for frame in frames]
        return self.pipeline, {"video": video, "mask": [white] * len(video)}

    def keep_unmasked(
        self, made: Sequence[Medium], media: Sequence[Any] | None, masks: Sequence[Any]
    ) -> list[Medium]:
        return [
            Video.from_numpy(
                np.where(self.fit_mask(mask)[..., None], video.to_numpy(), self._frames(medium)),
                fps=self.config.fps,
            )
            for video, medium, mask in zip(made, media or (), masks, strict=True)
        ]

    def _frames(self, medium: Video) -> np.ndarray:
        """A video's frames as we make them: uint8[F, H, W, 3]."""
        return np.stack([np.array(frame) for frame in self.fit(medium)])

    # --- The denoising loss ----------------------------------------------------------------------

    def denoising_loss(
        self,
        condition: Condition,
        latents: Tensor,
        *,
        noise: Tensor,
        times: Tensor,
        min_snr: float | None = None,
        references: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The latents of a video's references stand in front of its own, and get as much noise: the
        pipeline denoises both.

        Args:
            condition: M conditions.
            latents: float[M, *S], normalised.
            noise: float[M, *S].
            times: float[M] in (0, 1), 1 = noise.
            min_snr: gamma of min-SNR weighting; None: no weights.
            references: of each video float[R, 3, H, W] in [-1, 1], R may be 0; None: no video has
                any.

        Returns:
            The loss of each video: float[M].
        """
        loss = partial(super().denoising_loss, min_snr=min_snr)
        if not any(map(len, references or ())):
            return loss(condition, latents, noise=noise, times=times)
        check_condition(self, condition, len(latents))
        rows: list[Tensor] = []
        for row, pictures in enumerate(references or ()):
            one = slice(row, row + 1)
            own = {name: value[one] for name, value in condition.items()}
            clean, noises = latents[one], noise[one]
            if len(pictures):
                front = self._encode_references(pictures).to(clean)
                clean = torch.cat([front, clean], dim=2)
                noises = torch.cat([_more_noise(front, noises), noises], dim=2)
            rows.append(loss(own, clean, noise=noises, times=times[one], references=[pictures]))
        return torch.cat(rows)

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.denoise_with_references(condition, noisy, timesteps, noisy[:0])

    def denoise_with_references(
        self, condition: Condition, noisy: Tensor, timesteps: Tensor, references: Tensor
    ) -> Tensor:
        """Nothing is given of the video itself: all of it is to be made.

        Args:
            condition: as `prepare_condition` returns it, of one row.
            noisy: [1, *S], with R more latents in front.
            timesteps: [1].
            references: float[R, 3, H, W] in [-1, 1].

        Returns:
            The raw prediction, of the shape of `noisy`.
        """
        self.check_trainable()
        transformer = self.pipeline.transformer
        control = self._empty_control(noisy.device)
        if len(references):
            front = self._encode_references(references).to(control)
            more = control.shape[1] - front.shape[1]  # what is kept of a reference, and its mask
            front = functional.pad(front, (0, 0) * 3 + (0, more))
            control = torch.cat([front, control], dim=2)
        control = control.to(noisy.dtype)
        layers = len(transformer.config.vace_layers)
        return transformer(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=condition["prompt_embeds"],
            control_hidden_states=control,
            control_hidden_states_scale=control.new_full([layers], self.config.conditioning_scale),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def _empty_control(self, device: torch.device) -> Tensor:
        """What the second stream reads of no video: float[1, channels, *S without channels]. It is
        the same at every step, so the codec makes it once."""
        size = (*self.size, self.config.frames)
        if self._empty is None or self._empty[0] != (size, device):
            pipeline, no_pictures = self.pipeline, [list[Tensor]()]
            video, mask, _ = pipeline.preprocess_conditions(
                None, None, None, 1, *size, torch.float32, device
            )
            latents = pipeline.prepare_video_latents(video, mask, no_pictures, None, device)
            masks = pipeline.prepare_masks(mask, no_pictures)
            self._empty = (size, device), torch.cat([latents, masks], dim=1)
        return self._empty[1]

    @torch.no_grad()
    def _encode_references(self, pictures: Tensor) -> Tensor:
        """float[R, 3, H, W] -> normalised latents float[1, C, R, ...], the last one first, as the
        pipeline orders them."""
        frames = pictures.to(self.device, self.dtype).flip(0)[:, :, None]
        latents = torch.cat([self.encode_latents(frame[None]) for frame in frames], dim=2)
        return self.normalize_latents(latents.float())


def _more_noise(front: Tensor, noise: Tensor) -> Tensor:
    """Noise for the references, which follows from the video's: equal calls have equal losses."""
    seed = int(noise.double().cpu().sum().view(torch.int64)) & (2**63 - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(front.shape, generator=generator).to(front)


def build(config: WanVACEConfig) -> WanVACEDecoder:
    return WanVACEDecoder(config)
