"""The three untrained diffusers pipelines.

Their parts are passed as `Any`: diffusers annotates each slot with the class that was released, but
takes others (a Bert tokenizer, the codecs of mini).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from mmllm.mini.codecs import ClipAutoencoder, MelAutoencoder
from tools.mini.decoders.text_encoder import TEXT_WIDTH, text_encoder

TEXT_PATH = r"caption_projection|text_embedder|cross_attention_proj|attn2\.(to_v|to_out)"


def initialise_text_path(transformer: nn.Module, gain: float) -> nn.Module:
    """Re-initialise the layers through which the caption reaches the denoiser, at unit gain.

    With diffusers' initialisation they pass on a thousandth of the difference of two captions:
    after 1,400 steps of 32 images the caption still had no effect.
    """
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and re.search(TEXT_PATH, name):
            nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return transformer


def scheduler(shift: float) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ on the flow path, for a denoiser that predicts the clean sample."""
    return DPMSolverMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero"
    )


def image_pipeline(texts: list[str], folder: Path, codec: Path | None) -> PixArtAlphaPipeline:
    """PixArt over the latents of the image codec."""
    vae: Any = AutoencoderKL.from_pretrained(codec)
    tokenizer, encoder = text_encoder(T5EncoderModel, T5Config, texts, folder, 2600)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=5,
        cross_attention_dim=192,
        sample_size=8,
        patch_size=2,
        caption_channels=TEXT_WIDTH,
    )
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "vae": vae,
        "transformer": initialise_text_path(transformer, 1.0),
        "scheduler": scheduler(1.0),
    }
    return PixArtAlphaPipeline(**parts)


def video_pipeline(texts: list[str], folder: Path, codec: Path | None) -> WanPipeline:
    """Wan over the latents of the image codec, frames folded in groups of four."""
    vae: Any = ClipAutoencoder.around(AutoencoderKL.from_pretrained(codec))
    tokenizer, encoder = text_encoder(UMT5EncoderModel, UMT5Config, texts, folder, 1600)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=vae.config.z_dim,
        out_channels=vae.config.z_dim,
        text_dim=TEXT_WIDTH,
        ffn_dim=576,
        num_layers=5,
        rope_max_seq_len=32,
    )
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "vae": vae,
        "transformer": initialise_text_path(transformer, 1.2),
        "scheduler": scheduler(2.0),
    }
    return WanPipeline(**parts)


def audio_pipeline(texts: list[str], folder: Path, _: Path | None) -> StableAudioPipeline:
    """Stable Audio over stacked log-mel frames."""
    tokenizer, encoder = text_encoder(T5EncoderModel, T5Config, texts, folder, 1600)
    codec: Any = MelAutoencoder()
    channels = codec.config.n_mels * codec.config.frames_per_token
    transformer = StableAudioDiTModel(
        sample_size=64,
        in_channels=channels,
        out_channels=channels,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=5,
        num_key_value_attention_heads=5,
        cross_attention_dim=160,
        cross_attention_input_dim=TEXT_WIDTH,
        global_states_input_dim=2 * TEXT_WIDTH,
        time_proj_dim=128,
    )
    # The class expects times of 0..1; this pipeline's scheduler counts to 1000.
    frequencies = torch.logspace(-1, 1.2, 64) / 1000
    transformer.time_proj.weight.data.copy_(frequencies.half())  # as it is shipped
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "projection_model": StableAudioProjectionModel(TEXT_WIDTH, TEXT_WIDTH, 0, 4),
        "vae": codec,
        "transformer": initialise_text_path(transformer, 1.2),
        "scheduler": scheduler(1.0),
    }
    return StableAudioPipeline(**parts)
