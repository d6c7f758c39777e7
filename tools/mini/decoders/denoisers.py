"""One forward pass of each denoiser, as its diffusers pipeline makes it.

Dimensions: B samples, T caption tokens, E width of the text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor


def denoise_image(pipe: Any, noisy: Tensor, times: Tensor, text: EncodedCaptions) -> Tensor:
    """PixArt's prediction of the clean latents."""
    return pipe.transformer(
        noisy,
        encoder_hidden_states=text.states,
        encoder_attention_mask=text.mask,
        timestep=times,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]


def denoise_video(pipe: Any, noisy: Tensor, times: Tensor, text: EncodedCaptions) -> Tensor:
    """Wan's prediction of the clean latents."""
    states = text.states * text.mask[..., None]  # Wan pads with zeros and masks nothing
    return pipe.transformer(noisy, times, states, return_dict=False)[0]


def denoise_audio(pipe: Any, noisy: Tensor, times: Tensor, text: EncodedCaptions) -> Tensor:
    """Stable Audio's prediction of the clean latents."""
    size = len(noisy)
    seconds = noisy.shape[-1] * pipe.vae.hop_length / pipe.vae.sampling_rate
    projected = pipe.projection_model(text.states, torch.zeros(size), torch.full((size,), seconds))
    start, end = projected.seconds_start_hidden_states, projected.seconds_end_hidden_states
    words = projected.text_hidden_states * text.mask[..., None]
    # Without a caption this pipeline zeroes the whole sequence, durations included.
    condition = torch.cat([words, start, end], dim=1) * ~text.empty[:, None, None]
    rotary = get_1d_rotary_pos_embed(
        pipe.rotary_embed_dim, noisy.shape[-1] + 1, use_real=True, repeat_interleave_real=False
    )
    return pipe.transformer(
        noisy,
        times,
        encoder_hidden_states=condition,
        global_hidden_states=torch.cat([start, end], dim=2),
        rotary_embedding=rotary,
        return_dict=False,
    )[0]


@dataclass(frozen=True)
class EncodedCaptions:
    """Captions as the denoiser's condition."""

    states: Tensor  # float[B, T, E]
    mask: Tensor  # [B, T], 1 at words
    empty: Tensor  # bool[B], captions left out for guidance
