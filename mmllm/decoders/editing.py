"""What media are made from besides their condition: a medium to start from, a mask, references.

Legend: M media, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm.conversation import Image, Medium, Video
from mmllm.decoders.contract import Condition, DecoderContract
from mmllm.decoders.img2img import check_init_media, check_strength
from mmllm.errors import ConfigError, MediaError


@dataclass(frozen=True)
class EditMedia:
    """What M media are made from; None: none of them has any.

    Attributes:
        init: M media to start from.
        masks: M masks of what is to change in them, white on black.
        references: of each of the M media those that it is conditioned on.
    """

    init: Sequence[Medium] | None = None
    masks: Sequence[Image] | None = None
    references: Sequence[Sequence[Medium]] | None = None

    def row(self, row: int) -> EditMedia:
        """Return what one medium is made from.

        Args:
            row: its place, from 0.
        """
        one = slice(row, row + 1)
        return EditMedia(
            self.init and self.init[one],
            self.masks and self.masks[one],
            self.references and self.references[one],
        )

    def is_one_by_one(self, decoder: DecoderContract) -> bool:
        """Return whether the pipeline takes these for one medium a call.

        Args:
            decoder: the decoder.
        """
        starts_one_by_one = self.init is not None and decoder.init_one_by_one
        return decoder.samples_one_by_one or self.references is not None or starts_one_by_one

    def check(self, decoder: DecoderContract, num: int) -> None:
        """Check that a decoder can make media from these.

        Args:
            decoder: the decoder.
            num: M.

        Raises:
            ConfigError: the decoder takes no such media, not as many, or not together.
            MediaError: a mask has another size than its picture.
            ValueError: there are not M of them.
        """
        if self.init is not None:
            check_init_media(decoder, self.init, num)
            if "strength" in decoder.request_options:
                check_strength(decoder.modality, decoder.config)
        if self.masks is not None:
            self._check_masks(decoder, self.masks, num)
        if self.references is not None:
            _check_references(decoder, self.references, num)
        elif decoder.needs_references:
            raise ConfigError(
                f"{decoder.modality}: {decoder.pipeline_class} needs a picture, and there is none: "
                "put one into the conversation, or give it as references"
            )
        if self.init is None or self.references is None:
            return
        has_mask = self.masks is not None
        if not (decoder.masks_references if has_mask else decoder.starts_with_references):
            given = "a mask" if has_mask else f"an initial {named(decoder.init_modality)}"
            raise ConfigError(
                f"{decoder.modality}: {decoder.pipeline_class} takes {given} or references, not "
                "both; leave one of them out"
            )

    def prepare(self, decoder: DecoderContract) -> tuple[Any, dict[str, Any]]:
        """Return the pipeline that makes media from these, and the arguments of its call that hold
        them.

        Args:
            decoder: the decoder.
        """
        pipeline, kwargs = decoder.pipeline, {}
        if self.init is not None and self.masks is not None:
            pipeline, kwargs = decoder.prepare_inpainting(self.init, self.masks)
        elif self.init is not None:
            pipeline, kwargs = decoder.prepare_img2img(self.init)
        if self.references is not None:
            name = "image" if self.masks is None else "image_reference"
            kwargs |= decoder.reference_kwargs(self.references[0], name)
        return pipeline, kwargs

    def _check_masks(self, decoder: DecoderContract, masks: Sequence[Image], num: int) -> None:
        check_takes_mask(decoder)
        if self.init is None or len(masks) != num:
            raise ValueError(
                f"{decoder.modality}: expected {num} masks of as many initial images, got "
                f"{len(masks)} of {len(self.init or ())}"
            )
        for mask, medium in zip(masks, self.init, strict=True):
            if not isinstance(mask, Image) or not isinstance(medium, Image | Video):
                raise ConfigError(
                    f"{decoder.modality}: expected a mask and a picture, got {mask!r} of {medium!r}"
                )
            if mask.size != (size := _size_of(medium)):
                raise MediaError(
                    "mask: expected the size of its {}, {}x{}, got {}x{}".format(
                        named(medium.modality), *size, *mask.size
                    )
                )


def _check_references(
    decoder: DecoderContract, references: Sequence[Sequence[Medium]], num: int
) -> None:
    most = decoder.max_references
    if not most:
        raise ConfigError(
            f"{decoder.modality}: {decoder.pipeline_class} takes no references; leave them out, or "
            "take a decoder that does (docs/editing.md)"
        )
    if len(references) != num or not all(references):
        raise ValueError(
            f"{decoder.modality}: expected at least one reference for each of {num} media, got "
            f"{[len(each) for each in references]}"
        )
    least = decoder.min_references
    for each in references:
        if len(each) < least:
            raise ConfigError(
                f"{decoder.modality}: {decoder.pipeline_class} takes at least {least} references "
                f"by the configs in {decoder.folder}, got {len(each)}"
            )
        if len(each) > most:
            raise ConfigError(
                f"{decoder.modality}: {decoder.pipeline_class} takes at most {most} reference(s), "
                f"got {len(each)}"
            )
        if wrong := [medium for medium in each if medium.modality != "image"]:
            raise ConfigError(f"{decoder.modality}: expected images as references, got {wrong}")


def named(modality: str) -> str:
    """Return what messages call a medium of a modality.

    Args:
        modality: such as `image`.
    """
    return "picture" if modality == "image" else modality


def _size_of(medium: Image | Video) -> tuple[int, int]:
    """Width and height in pixels; of a video by one frame, so that it is not decoded whole."""
    if isinstance(medium, Image):
        return medium.size
    height, width = medium.sample_frames(1).shape[1:3]
    return width, height


def check_takes_mask(decoder: DecoderContract) -> None:
    """Raise ConfigError if a decoder cannot repaint a part of a picture.

    Args:
        decoder: the decoder.
    """
    if not decoder.takes_mask:
        raise ConfigError(
            f"{decoder.modality}: {decoder.pipeline_class} takes no mask; leave it out, or take a "
            "decoder that does (docs/editing.md)"
        )


def mask_of(mask: Image) -> np.ndarray:
    """Return which pixels of a mask are white, those that are to change: bool[H, W].

    Args:
        mask: white on black; values from 128 on count as white.
    """
    return mask.to_numpy().max(axis=-1) >= 128


def denoise_each(
    decoder: DecoderContract,
    condition: Condition,
    noisy: Tensor,
    timesteps: Tensor,
    references: Sequence[Tensor] | None,
) -> Tensor:
    """Call the denoiser for one medium after the other: each has its own number of references.

    Args:
        decoder: the decoder.
        condition: as `prepare_condition` returns it, of M rows.
        noisy: [M, *S].
        timesteps: [M].
        references: of each medium float[R, *S], R may be 0; None: no medium has any.

    Returns:
        [M, *S], the raw predictions.
    """
    rows: list[Tensor] = []
    for row, latents in enumerate(references or [noisy[:0]] * len(noisy)):
        one = slice(row, row + 1)
        ready = {name: value[one] for name, value in condition.items()}
        call = (ready, noisy[one], timesteps[one])
        if len(latents):
            given = latents.to(noisy.device, noisy.dtype)
            rows.append(decoder.denoise_with_references(*call, given))
        else:
            rows.append(decoder.denoise(*call))
    return torch.cat(rows)
