"""Tiny random pipelines of the three families, each complete with its text encoder and tokenizer.

They are made in a second, saved with `save_pretrained`, and know nothing: what they are good for
is that our code and diffusers' own must agree on them. Other tests take them too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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
from transformers import BertTokenizer, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from mmllm.conversation import Audio, Image, Medium, Video
from mmllm.decoders.pixart import PixArtConfig
from mmllm.decoders.stable_audio import StableAudioConfig
from mmllm.decoders.wan import WanConfig
from mmllm.mini.codecs import ClipAutoencoder, MelAutoencoder

TOKENS = 8
WIDTH = 16
SIZE = 16
FRAMES = 5
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "apple", "dog", "runs", "."]


def picture_codec() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=3,
        mid_block_add_attention=False,
        scaling_factor=0.5,
    )


def pixart_pipeline() -> PixArtAlphaPipeline:
    tokenizer, encoder = _text(T5EncoderModel, T5Config)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=SIZE // 2,
        patch_size=2,
        caption_channels=WIDTH,
    )
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=picture_codec(),
        transformer=transformer,
        scheduler=flow_scheduler(),
    )


def wan_pipeline() -> WanPipeline:
    tokenizer, encoder = _text(UMT5EncoderModel, UMT5Config)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        out_channels=12,
        text_dim=WIDTH,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=16,
    )
    codec = ClipAutoencoder(
        frame_codec={k: v for k, v in picture_codec().config.items() if not k.startswith("_")},
        z_dim=12,
        scale_factor_spatial=2,
        latents_mean=tuple(0.1 * channel - 0.5 for channel in range(12)),
        latents_std=tuple(1 + 0.1 * channel for channel in range(12)),
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=codec,
        transformer=transformer,
        scheduler=flow_scheduler(),
    )


def stable_audio_pipeline() -> StableAudioPipeline:
    tokenizer, encoder = _text(T5EncoderModel, T5Config)
    codec = MelAutoencoder(
        sampling_rate=8000, n_fft=256, frame_hop=64, n_mels=8, frames_per_token=2, iterations=8
    )
    transformer = StableAudioDiTModel(
        sample_size=16,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        cross_attention_input_dim=12,
        global_states_input_dim=24,
        time_proj_dim=8,
    )
    transformer.time_proj.weight.data.div_(1000)  # made for times of 0..1; the scheduler's: 0..1000
    return StableAudioPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        # Another width than the text encoder's: a projection of words that is more than nothing.
        projection_model=StableAudioProjectionModel(WIDTH, 12, 0, 4),
        vae=codec,
        transformer=transformer,
        scheduler=flow_scheduler(),
    )


PIPELINES = {"image": pixart_pipeline, "video": wan_pipeline, "audio": stable_audio_pipeline}


def flow_scheduler(**changes: Any) -> DPMSolverMultistepScheduler:
    """As the decoders of mini have it."""
    settings = {"prediction_type": "sample", "use_flow_sigmas": True, "final_sigmas_type": "zero"}
    return DPMSolverMultistepScheduler(**(settings | changes))


def save_pipelines(folder: Path, seed: int = 0) -> dict[str, Path]:
    """One complete diffusers folder per modality: "image", "video", "audio"."""
    folders = {}
    for modality, make in PIPELINES.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipeline = make()
        folders[modality] = folder / modality
        pipeline.save_pretrained(folders[modality])
    return folders


def configs(folders: dict[str, Path], **changes: Any) -> dict[str, Any]:
    """The decoder configs of what `save_pipelines` saved."""
    common = {"steps": 4, "max_caption_tokens": TOKENS, **changes}
    return {
        "image": PixArtConfig(str(folders["image"]), **common),
        "video": WanConfig(
            str(folders["video"]), **common, frames=FRAMES, fps=4.0, height=SIZE, width=SIZE
        ),
        "audio": StableAudioConfig(str(folders["audio"]), **common),
    }


def medium(modality: str, seed: int = 0) -> Medium:
    """Smooth random content in the decoder's own size, 0.256 s for sounds."""
    rng = np.random.default_rng(seed)
    if modality == "image":
        return Image.from_numpy(rng.integers(20, 235, (SIZE, SIZE, 3), dtype=np.uint8))
    if modality == "video":
        return Video.from_numpy(rng.integers(20, 235, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8), 4.0)
    times = np.arange(2048) / 8000
    wave = 0.5 * np.sin(2 * np.pi * rng.uniform(200, 900) * times)
    return Audio.from_numpy(wave.astype(np.float32), 8000)


def _text(kind: type, config: type) -> tuple[BertTokenizer, Any]:
    tokenizer = BertTokenizer(
        vocab={word: index for index, word in enumerate(WORDS)}, model_max_length=TOKENS
    )
    encoder = kind(
        config(
            vocab_size=len(WORDS),
            d_model=WIDTH,
            d_kv=8,
            num_heads=2,
            d_ff=32,
            num_layers=1,
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=0,
            eos_token_id=3,
        )
    )
    return tokenizer, encoder
