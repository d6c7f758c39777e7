"""The table of the three decoders: everything in which their trainings differ.

Dimensions: B samples, N waveform samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
from diffusers import (
    DiffusionPipeline,
)
from torch import Tensor
from torch.nn import functional

from tools.mini.codec import frames_of
from tools.mini.decoders.denoisers import denoise_audio, denoise_image, denoise_video
from tools.mini.decoders.pipelines import audio_pipeline, image_pipeline, video_pipeline
from tools.mini.decoders.text_encoder import TEXT_LENGTH


def read_image(path: Path) -> Tensor:
    """An image file as uint8[3, 64, 64]."""
    return frames_of(path)[:, 0]


def read_audio(path: Path) -> Tensor:
    """An audio file as float[1, 32768] at 16 kHz, cut or padded with silence."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    if rate != 16_000:
        raise ValueError(f"{path} is sampled at {rate} Hz; 16,000 expected: resample it first")
    wave = torch.from_numpy(wave.mean(axis=1))[None, :32_768]
    return functional.pad(wave, (0, 32_768 - wave.shape[-1]))


def augment_audio(samples: Tensor, generator: torch.Generator) -> Tensor:
    """float[B, 1, N] -> the same, up to 20 ms later and 3 dB louder or softer."""
    draw = torch.rand(len(samples), 2, generator=generator)
    gains = 10 ** ((draw[:, 0] * 6 - 3) / 20)
    moved = [
        functional.pad(wave, (int(delay * 320), 0))[..., : wave.shape[-1]]
        for wave, delay in zip(samples, draw[:, 1], strict=True)
    ]
    return torch.stack(moved) * gains[:, None, None]


@dataclass(frozen=True)
class DecoderRecipe:
    """One row of the table: all that differs between the three trainings."""

    build: Callable[[list[str], Path, Path | None], DiffusionPipeline]
    denoise: Callable[..., Tensor]  # (pipe, noisy, times, text) -> clean
    read: Callable[[Path], Tensor]
    scale: Callable[[Any], float]  # of latents, from the codec's config
    output: str  # the field of the pipeline's result
    call: dict  # further arguments of the pipeline's call
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    batch: int = 32
    steps: int = 100_000
    learning_rate: float = 1e-3
    # Mean of logit(s) at the start and at the end, and its spread: the content is decided at high
    # noise, by the caption alone, so that is learned first.
    noise: tuple[float, float, float] = (1.0, 0.2, 1.2)


DECODERS: dict[str, DecoderRecipe] = {
    "image": DecoderRecipe(
        build=image_pipeline,
        denoise=denoise_image,
        read=read_image,
        scale=lambda vae: vae.config.scaling_factor,
        output="images",
        call={
            "height": 64,
            "width": 64,
            "num_inference_steps": 20,
            "guidance_scale": 3.0,
            "use_resolution_binning": False,
            "clean_caption": False,
            "max_sequence_length": TEXT_LENGTH,
        },
        batch=64,
    ),
    "video": DecoderRecipe(
        build=video_pipeline,
        denoise=denoise_video,
        read=frames_of,
        scale=lambda vae: 1 / vae.config.latents_std[0],
        output="frames",
        call={
            "height": 64,
            "width": 64,
            "num_frames": 9,
            "num_inference_steps": 20,
            "guidance_scale": 3.0,
            "max_sequence_length": TEXT_LENGTH,
        },
        noise=(1.5, 0.6, 1.2),  # nine alike frames hide noise from each other
    ),
    "audio": DecoderRecipe(
        build=audio_pipeline,
        denoise=denoise_audio,
        read=read_audio,
        scale=lambda vae: 1.0,
        augment=augment_audio,
        output="audios",
        call={"num_inference_steps": 20, "guidance_scale": 3.0},
        noise=(2.0, 0.9, 1.2),
    ),
}
