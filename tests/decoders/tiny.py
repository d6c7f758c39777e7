"""Tiny random pipelines of all families, each complete with its text encoder and tokenizer.

They are made in a second, saved with `save_pretrained`, and know nothing: what they are good for
is that our code and diffusers' own must agree on them. Other tests take them too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import BertTokenizer

from mmllm import config
from mmllm.conversation import Audio, Image, Medium, Video
from mmllm.mini.codecs import ClipAutoencoder, MelAutoencoder

TOKENS = 8
WIDTH = 16
SIZE = 16
FRAMES = 5
UNET: dict[str, Any] = {
    "sample_size": SIZE // 2,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "apple", "dog", "runs", "."]


def picture_codec(**changes: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=3,
        mid_block_add_attention=False,
        **{"scaling_factor": 0.5, **changes},
    )


def pixart_pipeline() -> diffusers.PixArtAlphaPipeline:
    tokenizer, encoder = _text(transformers.T5EncoderModel, transformers.T5Config)
    transformer = diffusers.PixArtTransformer2DModel(
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
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=picture_codec(),
        transformer=transformer,
        scheduler=flow_scheduler(),
    )


def wan_pipeline() -> diffusers.WanPipeline:
    tokenizer, encoder = _text(transformers.UMT5EncoderModel, transformers.UMT5Config)
    transformer = diffusers.WanTransformer3DModel(
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
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=codec,
        transformer=transformer,
        scheduler=flow_scheduler(),
    )


def stable_audio_pipeline() -> diffusers.StableAudioPipeline:
    tokenizer, encoder = _text(transformers.T5EncoderModel, transformers.T5Config)
    codec = MelAutoencoder(
        sampling_rate=8000, n_fft=256, frame_hop=64, n_mels=8, frames_per_token=2, iterations=8
    )
    transformer = diffusers.StableAudioDiTModel(
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
    return diffusers.StableAudioPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        # Another width than the text encoder's: a projection of words that is more than nothing.
        projection_model=diffusers.StableAudioProjectionModel(WIDTH, 12, 0, 4),
        vae=codec,
        transformer=transformer,
        scheduler=flow_scheduler(),
    )


def stable_diffusion_pipeline() -> Any:
    tokenizer, encoder = _clip()
    return diffusers.StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=picture_codec(),
        unet=diffusers.UNet2DConditionModel(**UNET, cross_attention_dim=WIDTH),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline() -> Any:
    tokenizer, encoder = _clip()
    tokenizer_2, encoder_2 = _clip("CLIPTextModelWithProjection", projection_dim=12)
    return diffusers.StableDiffusionXLPipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        vae=picture_codec(),
        unet=diffusers.UNet2DConditionModel(
            **UNET,
            cross_attention_dim=2 * WIDTH,
            transformer_layers_per_block=1,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )


def audioldm_pipeline() -> Any:
    width = 12
    encoder = transformers.ClapTextModelWithProjection(
        transformers.ClapTextConfig(
            vocab_size=len(WORDS),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=WIDTH + 2,
            projection_dim=width,
            pad_token_id=0,
        )
    )
    unet = {**UNET, "sample_size": 16, "block_out_channels": (8, 16), "attention_head_dim": 4}
    return diffusers.AudioLDMPipeline(
        tokenizer=_tokenizer(),
        text_encoder=encoder,
        vae=picture_codec(in_channels=1, out_channels=1, scaling_factor=8.0),
        unet=diffusers.UNet2DConditionModel(
            **unet,
            cross_attention_dim=(8, 16),
            class_embed_type="simple_projection",
            projection_class_embeddings_input_dim=width,
            class_embeddings_concat=True,
        ),
        vocoder=vocoder(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


def text_to_video_pipeline() -> Any:
    tokenizer, encoder = _clip()
    unet = {**UNET, "block_out_channels": (8, 16), "attention_head_dim": 4}
    return diffusers.TextToVideoSDPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=picture_codec(),
        unet=diffusers.UNet3DConditionModel(
            **unet
            | {
                "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"),
                "up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D"),
            },
            cross_attention_dim=WIDTH,
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


def sd3_pipeline() -> Any:
    kind = "CLIPTextModelWithProjection"
    tokenizer, encoder = _clip(kind, hidden_size=8, projection_dim=8)
    tokenizer_2, encoder_2 = _clip(kind, hidden_size=6, projection_dim=6)
    tokenizer_3, encoder_3 = _text(transformers.T5EncoderModel, transformers.T5Config)
    return diffusers.StableDiffusion3Pipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        text_encoder_3=encoder_3,
        vae=picture_codec(shift_factor=0.1),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=SIZE // 2,
            in_channels=3,
            out_channels=3,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=14,
            pos_embed_max_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux_pipeline() -> Any:
    tokenizer, encoder = _clip()
    tokenizer_2, encoder_2 = _text(transformers.T5EncoderModel, transformers.T5Config)
    return diffusers.FluxPipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        vae=picture_codec(shift_factor=0.1),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=12,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def vocoder() -> Any:
    return transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=8,
            sampling_rate=8000,
            upsample_initial_channel=8,
            upsample_rates=[8, 8],
            upsample_kernel_sizes=[16, 16],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1]],
            normalize_before=False,
            initializer_range=0.3,
        )
    )


CAPTIONS = {"max_caption_tokens": TOKENS}
SQUARE = {"height": SIZE, "width": SIZE}
CLIPS = {"frames": FRAMES, "fps": 4.0, **SQUARE}
FAMILIES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "image": ("pixart", pixart_pipeline, CAPTIONS),
    "video": ("wan", wan_pipeline, CAPTIONS | CLIPS),
    "audio": ("stable_audio", stable_audio_pipeline, CAPTIONS),
    "stable_diffusion": ("stable_diffusion", stable_diffusion_pipeline, {}),
    "sdxl": ("sdxl", sdxl_pipeline, {}),
    "audioldm": ("audioldm", audioldm_pipeline, {"window": 256}),
    "text_to_video": ("text_to_video", text_to_video_pipeline, CLIPS),
    "sd3": ("sd3", sd3_pipeline, CAPTIONS),
    "flux": ("flux", flux_pipeline, CAPTIONS | SQUARE),
}
"""Key in tests -> type in a config, how its pipeline is made, its own settings."""
MODALITIES = ("image", "video", "audio")
"""The keys that other tests build their systems of."""


def flow_scheduler(**changes: Any) -> diffusers.DPMSolverMultistepScheduler:
    """As the decoders of mini have it."""
    settings = {"prediction_type": "sample", "use_flow_sigmas": True, "final_sigmas_type": "zero"}
    return diffusers.DPMSolverMultistepScheduler(**(settings | changes))


@dataclass(frozen=True)
class Dialect:
    """How a pipeline speaks to its denoiser, for tests that listen: latents are packed by the
    pipeline's own function, times come on the scheduler's clock, arguments may be lists."""

    pack: Callable[[Any, Tensor], Tensor] = lambda _pipeline, latents: latents
    clock: Callable[[Tensor], Tensor] = lambda times: times
    read: Callable[[Any], Tensor] = lambda given: given
    write: Callable[[Tensor], Any] = lambda answer: answer


DIALECTS = {
    "flux": Dialect(
        pack=lambda pipeline, latents: pipeline._pack_latents(latents, *latents.shape),
        clock=lambda times: times * 1000,
    ),
}


def dialect(family: str) -> Dialect:
    return DIALECTS.get(family, Dialect())


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """One complete diffusers folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FAMILIES[family][1]()
    pipeline.save_pretrained(folder)
    return folder


def save_pipelines(folder: Path, seed: int = 0) -> dict[str, Path]:
    """One folder per modality: "image", "video", "audio"."""
    return {modality: save(modality, folder / modality, seed) for modality in MODALITIES}


def entry(family: str, folder: Path, **changes: Any) -> Any:
    """The decoder config of what `save` saved."""
    kind, _, settings = FAMILIES[family]
    tree = {"weights": str(folder), "steps": 4, **settings, **changes}
    return config.parse_component("decoders", {"type": kind, **tree}, family)


def configs(folders: Mapping[str, Path], **changes: Any) -> dict[str, Any]:
    """The decoder configs of what `save_pipelines` saved."""
    return {modality: entry(modality, folders[modality], **changes) for modality in MODALITIES}


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


def denoiser(pipeline: Any) -> Any:
    return pipeline.components.get("transformer") or pipeline.unet


def _tokenizer() -> BertTokenizer:
    return BertTokenizer(
        vocab={word: index for index, word in enumerate(WORDS)}, model_max_length=TOKENS
    )


def _text(kind: type, settings: type) -> tuple[BertTokenizer, Any]:
    encoder = kind(
        settings(
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
    return _tokenizer(), encoder


def _clip(kind: str = "CLIPTextModel", **changes: Any) -> tuple[BertTokenizer, Any]:
    settings = transformers.CLIPTextConfig(
        vocab_size=len(WORDS),
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        **{"hidden_size": WIDTH, **changes},
    )
    return _tokenizer(), getattr(transformers, kind)(settings)
