"""The networks that denoise images, clips and sounds, and the pipelines around them.

Each reads a caption as states of the language model. `predict` computes what the network takes for
the clean sample; that is its target (Li & He 2025, "Back to basics").

Dimensions: B samples, T caption tokens, D channels of their states, C channels of a latent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    LattePipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn
from torch.nn import functional

from mmllm.mini.clip_transformer import ClipTransformer
from tools.mini.world.pipelines import scheduler
from tools.mini.world.text import MAX_TOKENS

TEXT_PATH = (
    r"caption_projection|text_embedder|text_projection|cross_attention_proj|attn2\.(to_v|to_out)"
)
"""Layers through which the caption reaches the denoiser."""
SOUND_CONDITION = 192
"""Channels of a caption token and of a duration in the pipeline of sounds."""

Text = tuple[Tensor, Tensor]
"""Standardised states float[B, T, D] and their mask [B, T], 0 at padding."""


@dataclass(frozen=True)
class Denoiser:
    """One row of the table: all in which the networks and their trainings differ.

    Attributes:
        build: (shape of a latent, D) -> the untrained network; a ModuleDict of a pipeline's parts.
        predict: (network, noisy, level float[B], text) -> the clean sample.
        pipeline: the class of its pipeline.
        call: further arguments of the pipeline's call.
        batch: samples of a step.
        noise: mean of logit(level) at the start and at the end, and its spread. The more numbers a
            latent has, the higher the noise at which it still tells what it shows; only above
            that does the caption decide (Esser et al. 2024, sec. 5.3.2).
    """

    build: Callable[[torch.Size, int], nn.ModuleDict]
    predict: Callable[[nn.ModuleDict, Tensor, Tensor, Text], Tensor]
    pipeline: type[DiffusionPipeline]
    call: dict[str, Any]
    batch: int
    noise: tuple[float, float, float]


def initialised(network: nn.Module) -> nn.Module:
    """The network with a text path of unit gain: with diffusers' initialisation a caption has no
    effect for thousands of steps."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and re.search(TEXT_PATH, name):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network


def _patch(shape: torch.Size) -> int:
    """Latents in width and height of a token: an image has 16 tokens, whatever its size."""
    return shape[-1] // 4


def _pixart(shape: torch.Size, width: int) -> nn.ModuleDict:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=shape[0],
        out_channels=shape[0],
        num_layers=6,
        cross_attention_dim=256,
        sample_size=shape[-1],
        patch_size=_patch(shape),
        caption_channels=width,
    )
    return nn.ModuleDict({"transformer": initialised(transformer)})


def finer(weights: Tensor, shape: torch.Size) -> Tensor:
    """Weights of a transformer for images of half the size, for tokens of twice as many latents in
    width and height: each is repeated over the latents of its place.

    Args:
        weights: of the first layer, float[D, C, p, p], of the last, float[p * p * C, ...], or of
            any other layer, which stay as they are.
        shape: what they have in the larger transformer.
    """
    if len(shape) == 4 and shape[-1] == 2 * weights.shape[-1]:
        return weights.repeat_interleave(2, -1).repeat_interleave(2, -2) / 4
    if shape and shape[0] == 4 * weights.shape[0]:
        places = weights.unflatten(0, (2, 2, -1))  # a token of an image of 64 pixels is 2 x 2
        return places.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten(0, 2)
    return weights


def _predict_image(network: nn.ModuleDict, noisy: Tensor, level: Tensor, text: Text) -> Tensor:
    states, mask = text
    return network["transformer"](
        noisy,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        timestep=1000 * level,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]


def _clip_transformer(shape: torch.Size, width: int) -> nn.ModuleDict:
    transformer: Any = ClipTransformer.from_config(
        {
            "num_attention_heads": 4,
            "attention_head_dim": 64,
            "in_channels": shape[0],
            "num_layers": 6,
            "cross_attention_dim": 256,
            "sample_size": shape[-1],
            "patch_size": _patch(shape),
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "attention_bias": True,
            "caption_channels": width,
            "video_length": shape[1],
        }
    )
    for block in transformer.temporal_transformer_blocks:  # at first they do nothing
        for layer in (block.attn1.to_out[0], block.ff.net[2]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.ModuleDict({"transformer": initialised(transformer)})


def _predict_clip(network: nn.ModuleDict, noisy: Tensor, level: Tensor, text: Text) -> Tensor:
    made = network["transformer"](noisy, 1000 * level, text[0], return_dict=False)[0]
    return made[:, : noisy.shape[1]]


def predict_frames(network: nn.ModuleDict, noisy: Tensor, level: Tensor, text: Text) -> Tensor:
    """What the denoiser of clips takes for clean images, float[B, C, h, w], each by itself."""
    made = network["transformer"](
        noisy[:, :, None], 1000 * level, text[0], enable_temporal_attentions=False
    ).sample
    return made[:, : noisy.shape[1], 0]


def _stable_audio(shape: torch.Size, width: int) -> nn.ModuleDict:
    transformer = StableAudioDiTModel(
        sample_size=shape[-1],
        in_channels=shape[0],
        out_channels=shape[0],
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        num_key_value_attention_heads=6,
        cross_attention_dim=192,
        cross_attention_input_dim=SOUND_CONDITION,
        global_states_input_dim=2 * SOUND_CONDITION,
        time_proj_dim=128,
    )
    # The class expects times of 0..1; this pipeline's scheduler counts to 1000.
    frequencies = torch.logspace(-1, 1.2, 64) / 1000
    transformer.time_proj.weight.data.copy_(frequencies.half())  # as it is shipped
    projection = StableAudioProjectionModel(width, SOUND_CONDITION, 0, 4)
    parts = {"transformer": transformer, "projection_model": projection}
    return nn.ModuleDict({name: initialised(part) for name, part in parts.items()})


def _predict_sound(network: nn.ModuleDict, noisy: Tensor, level: Tensor, text: Text) -> Tensor:
    states, mask = text
    size, missing = len(noisy), MAX_TOKENS - states.shape[1]
    seconds = torch.full((size,), SOUND_SECONDS)
    projected = network["projection_model"](states, torch.zeros(size), seconds)
    start, end = projected.seconds_start_hidden_states, projected.seconds_end_hidden_states
    words = functional.pad(projected.text_hidden_states * mask[..., None], (0, 0, 0, missing))
    # Without a caption this pipeline zeroes the whole sequence, durations included.
    empty = (states == 0).all(-1).all(-1)
    condition = torch.cat([words, start, end], dim=1) * ~empty[:, None, None]
    rotary = get_1d_rotary_pos_embed(
        16, noisy.shape[-1] + 1, use_real=True, repeat_interleave_real=False
    )
    return network["transformer"](
        noisy,
        1000 * level,
        encoder_hidden_states=condition,
        global_hidden_states=torch.cat([start, end], dim=2),
        rotary_embedding=rotary,
        return_dict=False,
    )[0]


SOUND_SECONDS = 2.048
_COMMON = {"num_inference_steps": 20, "guidance_scale": 3.0}
DENOISERS = {
    "image": Denoiser(
        _pixart,
        _predict_image,
        PixArtAlphaPipeline,
        _COMMON
        | {
            "height": 128,
            "width": 128,
            "use_resolution_binning": False,
            "clean_caption": False,
            "max_sequence_length": MAX_TOKENS,
        },
        batch=64,
        noise=(1.8, 1.2, 1.2),
    ),
    "video": Denoiser(
        _clip_transformer,
        _predict_clip,
        LattePipeline,
        _COMMON | {"height": 128, "width": 128, "video_length": 9, "clean_caption": False},
        batch=8,
        noise=(2.8, 2.2, 1.3),  # nine alike frames hide noise from each other
    ),
    "audio": Denoiser(
        _stable_audio,
        _predict_sound,
        StableAudioPipeline,
        dict(_COMMON),
        batch=48,
        noise=(2.6, 1.5, 1.3),
    ),
}
"""Modality -> its row."""


def pipeline(modality: str, network: nn.ModuleDict, codec: nn.Module, text: Any) -> Any:
    """A pipeline of diffusers around a trained network.

    Args:
        modality: a key of DENOISERS.
        network: what `build` made.
        codec: what encoded its latents.
        text: tokenizer and text encoder (tools.mini.world.pipelines.text_parts).
    """
    parts = {**text, **network, "vae": codec, "scheduler": scheduler()}
    return DENOISERS[modality].pipeline(**parts)
