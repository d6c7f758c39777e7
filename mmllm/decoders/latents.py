"""Scaling of latents as the codecs' configs prescribe it.

Legend: M media, C latent channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def vae_scale_factor(decoder: Any) -> int:
    """Pixels per latent along a side, of codecs that halve the resolution from level to level."""
    return 2 ** (len(decoder.component_config("vae")["block_out_channels"]) - 1)


def shift_and_scale(vae: Any, latents: Tensor) -> Tensor:
    """Scale latents as flow-matching models expect them: (x - shift) * scale.

    Args:
        vae: the codec, whose config gives shift and scale.
        latents: float[M, C, ...] of the codec.
    """
    return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def standardize(vae: Any, latents: Tensor) -> Tensor:
    """Standardise latents by mean and standard deviation per channel.

    Args:
        vae: the codec, whose config gives `latents_mean` and `latents_std`.
        latents: float[M, C, ...] of the codec.
    """
    shape = (-1, *[1] * (latents.ndim - 2))
    mean, std = (
        latents.new_tensor(values).view(shape)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std
