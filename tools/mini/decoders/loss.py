"""The denoising loss of one batch.

Dimensions: B samples, S latent shape.
"""

from __future__ import annotations

import torch
from diffusers import (
    DiffusionPipeline,
)
from torch import Tensor

from tools.mini.decoders.denoisers import EncodedCaptions
from tools.mini.decoders.table import DecoderRecipe
from tools.mini.decoders.text_encoder import TEXT_LENGTH


def read_captions(pipe: DiffusionPipeline, captions: list[str]) -> EncodedCaptions:
    inputs = pipe.tokenizer(
        captions,
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        return_tensors="pt",
    )
    states = pipe.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask)[0]
    empty = torch.tensor([not caption for caption in captions])
    return EncodedCaptions(states, inputs.attention_mask.to(states.dtype), empty)


def denoising_loss(
    recipe: DecoderRecipe,
    pipe: DiffusionPipeline,
    clean: Tensor,
    captions: list[str],
    generator: torch.Generator,
    share: float,
) -> Tensor:
    """Squared error of the clean sample / s^2, the error of the velocity; s from a logit normal."""
    first, last, spread = recipe.noise
    mean = first + (last - first) * share
    # One draw from each slice of the distribution: less noise in the gradient than free draws.
    place = torch.randperm(len(clean), generator=generator) + torch.rand(1, generator=generator)
    level = torch.sigmoid(mean + spread * torch.special.ndtri(place.clamp(min=1e-3) / len(clean)))
    noise = torch.randn(clean.shape, generator=generator)
    wide = level.view(-1, *[1] * (clean.ndim - 1))
    noisy = (1 - wide) * clean + wide * noise
    predicted = recipe.denoise(pipe, noisy, 1000 * level, read_captions(pipe, captions))
    error = (predicted.float() - clean).square().flatten(1).mean(1)
    return (error / level.clamp(min=0.1).square()).mean()
