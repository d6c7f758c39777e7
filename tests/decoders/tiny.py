"""Tiny random pipelines of all families, each complete with its text encoder and tokenizer.

They are made in a second, saved with `save_pretrained`, and know nothing: what they are good for
is that our code and diffusers' own must agree on them. Other tests take them too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from torch import Tensor
from transformers import BertTokenizer

from mmllm import config
from mmllm.conversation import Audio, Image, Medium, Video
from mmllm.mini.codecs import MelAutoencoder

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
KANDINSKY_VIDEO = ["post", "##process", "##ing", "trans", "##ition", "##s", "engine", "##er"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "apple", "dog", "runs", "."]


def picture_codec(channels: tuple[int, ...] = (4, 8), **changes: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        norm_num_groups=2,
        mid_block_add_attention=False,
        **{"scaling_factor": 0.5, "latent_channels": 3, **changes},
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
    parts = _wan_parts() | {"scheduler": flow_scheduler()}
    return diffusers.WanPipeline(
        **parts, transformer=_wan_transformer(diffusers.WanTransformer3DModel, 4)
    )


def _wan_parts() -> dict[str, Any]:
    """All but the transformer of a Wan whose codec is causal: 4 channels, 4 frames and 4 x 4 pixels
    a latent."""
    tokenizer, encoder = _text(transformers.UMT5EncoderModel, transformers.UMT5Config)
    return {
        "tokenizer": tokenizer,
        "text_encoder": encoder,
        "vae": diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.1, 0.0, -0.1, 0.2],
            latents_std=[0.5, 1.0, 0.8, 0.6],
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        ),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def _wan_transformer(kind: type, in_channels: int, **changes: Any) -> Any:
    return kind(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=WIDTH,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=16,
        **changes,
    )


def wan_i2v_pipeline(
    *, with_image_encoder: bool = False, num_pictures: int = 1, **settings: Any
) -> diffusers.WanImageToVideoPipeline:
    """Of Wan 2.1 with an image encoder, for one or two pictures; else of Wan 2.2, whose `settings`
    are `boundary_ratio` or `expand_timesteps`."""
    parts, images = _wan_parts(), dict[str, Any]()
    if with_image_encoder:
        vision = transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            image_size=8, patch_size=4,
        )  # fmt: skip
        parts["image_encoder"] = transformers.CLIPVisionModel(vision)
        side = {"height": 8, "width": 8}
        parts["image_processor"] = transformers.CLIPImageProcessor(size=side, crop_size=side)
        images = {"image_dim": 8, "added_kv_proj_dim": 24}
        images["pos_embed_seq_len"] = 2 * 5 if num_pictures > 1 else None
    channels = 4 if settings.get("expand_timesteps") else 4 + 4 + 4  # noise, mask, given frames
    for name in ("transformer", "transformer_2"):
        if name == "transformer" or settings.get("boundary_ratio"):
            parts[name] = _wan_transformer(diffusers.WanTransformer3DModel, channels, **images)
    return diffusers.WanImageToVideoPipeline(**parts, **settings)


def wan_vace_pipeline() -> diffusers.WanVACEPipeline:
    control = 2 * 4 + 4 * 4  # what is kept, what is not, and a mask of 4 x 4 pixels
    transformer = _wan_transformer(
        diffusers.WanVACETransformer3DModel, 4, vace_layers=[0, 1], vace_in_channels=control
    )
    return diffusers.WanVACEPipeline(**_wan_parts(), transformer=transformer)


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
        tokenizer=word_tokenizer(),
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
        vae=picture_codec(shift_factor=0.1, latent_channels=4, scaling_factor=2.0),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=SIZE // 2,
            in_channels=4,
            out_channels=4,
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
        vae=picture_codec(shift_factor=0.1, latent_channels=4),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
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


def audioldm2_pipeline() -> Any:
    bert = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2}
    clap = transformers.ClapConfig(
        text_config={
            **bert,
            "vocab_size": 40,
            "num_hidden_layers": 1,
            "max_position_embeddings": 40,
            "pad_token_id": 1,
        },
        audio_config={
            "num_mel_bins": 16,
            "spec_size": 64,
            "patch_embeds_hidden_size": 8,
            "depths": [1],
            "num_attention_heads": [1],
            "hidden_size": 8,
            "num_hidden_layers": 1,
        },
        projection_dim=12,
    )
    letters = "abcdefghijklmnopqrstuvwxyz."
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "\u0120": 5}
    tokenizer = transformers.RobertaTokenizer(
        vocab={**special, **{letter: 6 + place for place, letter in enumerate(letters)}},
        merges=[],
        model_max_length=32,
    )
    words = ["<pad>", "</s>", "<unk>", *(f"\u2581{w}" for w in WORDS[4:]), "\u2581", *letters[1:]]
    tokenizer_2 = transformers.T5Tokenizer(
        vocab=[(word, -float(place)) for place, word in enumerate(words)],
        extra_ids=0,
        model_max_length=32,
    )
    encoder_2 = _text(
        transformers.T5EncoderModel, transformers.T5Config, vocab_size=48, eos_token_id=1
    )[1]
    language_model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=8,
            n_embd=WIDTH,
            n_layer=1,
            n_head=2,
            n_positions=64,
            max_new_tokens=3,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    return diffusers.AudioLDM2Pipeline(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder=transformers.ClapModel(clap),
        text_encoder_2=encoder_2,
        projection_model=diffusers.AudioLDM2ProjectionModel(12, WIDTH, WIDTH),
        language_model=language_model,
        feature_extractor=transformers.ClapFeatureExtractor(),
        vae=picture_codec(in_channels=1, out_channels=1, scaling_factor=8.0),
        unet=diffusers.AudioLDM2UNet2DConditionModel(
            **{**UNET, "sample_size": 16, "block_out_channels": (8, 16), "attention_head_dim": 4},
            cross_attention_dim=([None, WIDTH, WIDTH], [None, WIDTH, WIDTH]),
        ),
        vocoder=vocoder(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


def ltx_pipeline() -> Any:
    tokenizer, encoder = _text(transformers.T5EncoderModel, transformers.T5Config)
    codec = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=1,
    )
    codec.latents_mean.copy_(torch.linspace(-0.5, 0.5, 8))
    codec.latents_std.copy_(torch.linspace(0.5, 1, 8))
    return diffusers.LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=codec,
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=WIDTH,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def ltx2_pipeline() -> Any:
    text = {**language_model(), "model_type": "gemma3_text", "num_hidden_layers": 1}
    encoder = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=text,
            vision_config={
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
                "model_type": "siglip_vision_model",
            },
        )
    )
    codec = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        downsample_type=("spatial", "temporal"),  # so it halves each once, not twice
        spatial_compression_ratio=8,
        temporal_compression_ratio=2,
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=4,
        decoder_spatial_padding_mode="zeros",
    )
    codec.latents_mean.copy_(torch.linspace(-0.5, 0.5, 8))
    codec.latents_std.copy_(torch.linspace(0.5, 1, 8))
    audio_codec = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        latent_channels=1,
        sample_rate=8000,
        mel_hop_length=80,
        mel_bins=16,
    )
    audio_codec.latents_mean.copy_(torch.linspace(-0.5, 0.5, 4))
    audio_codec.latents_std.copy_(torch.linspace(0.5, 1, 4))
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    parts = {f"{kind}_connector_{k}": v for kind in ("video", "audio") for k, v in heads.items()}
    registers = dict.fromkeys(
        (f"{kind}_connector_num_learnable_registers" for kind in ("video", "audio")), TOKENS
    )
    return diffusers.LTX2Pipeline(
        tokenizer=word_tokenizer(padding_side="left"),
        text_encoder=encoder,
        vae=codec,
        audio_vae=audio_codec,
        connectors=LTX2TextConnectors(
            caption_channels=WIDTH, text_proj_in_factor=2, **parts, **registers
        ),
        transformer=diffusers.LTX2VideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            vae_scale_factors=(2, 8, 8),
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            audio_sampling_rate=8000,
            audio_hop_length=80,
            num_layers=2,
            caption_channels=WIDTH,
            cross_attn_mod=True,
            audio_cross_attn_mod=True,
            perturbed_attn=True,
        ),
        vocoder=LTX2Vocoder(
            in_channels=32,
            hidden_channels=8,
            upsample_kernel_sizes=[16, 10],
            upsample_factors=[8, 10],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1]],
            output_sampling_rate=8000,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def cogvideox_pipeline() -> Any:
    tokenizer, encoder = _text(transformers.T5EncoderModel, transformers.T5Config)
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 2,
            up_block_types=("CogVideoXUpBlock3D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=2,
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=1,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=4,
            text_embed_dim=WIDTH,
            num_layers=2,
            sample_width=SIZE // 2,
            sample_height=SIZE // 2,
            sample_frames=FRAMES,
            temporal_compression_ratio=2,
            max_text_seq_length=TOKENS,
            use_rotary_positional_embeddings=True,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="linear",
            prediction_type="v_prediction",
            clip_sample=False,
        ),
    )


def latte_pipeline() -> Any:
    tokenizer, encoder = _text(transformers.T5EncoderModel, transformers.T5Config)
    return diffusers.LattePipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=picture_codec(),
        transformer=diffusers.LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=3,
            out_channels=6,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=SIZE // 2,
            patch_size=2,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            attention_bias=True,
            caption_channels=WIDTH,
            video_length=FRAMES,
        ),
        scheduler=flow_scheduler(),
    )


def _gemma() -> Any:
    return transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=len(WORDS),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=0,
        )
    )


def sana_pipeline() -> Any:
    encoder = _gemma()
    blocks = {"block_types": ("ResBlock", "ResBlock"), "block_out_channels": (8, 8)}
    codec = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        **{f"encoder_{name}": value for name, value in blocks.items()},
        **{f"decoder_{name}": value for name, value in blocks.items()},
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        scaling_factor=0.5,
    )
    return diffusers.SanaPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=encoder,
        vae=codec,
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=SIZE,
        ),
        scheduler=flow_scheduler(prediction_type="flow_prediction"),
    )


def z_image_pipeline() -> Any:
    return diffusers.ZImagePipeline(
        tokenizer=word_tokenizer(chat_template="{{ messages[0]['content'] }}"),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**language_model())),
        vae=picture_codec(shift_factor=0.1, latent_channels=4),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def qwen_image_pipeline() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = {**language_model(), "rope_scaling": rope}
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=_QWEN3_VISION)
    )
    return diffusers.QwenImagePipeline(
        tokenizer=word_tokenizer(),
        text_encoder=encoder,
        vae=qwen_codec(),
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def qwen_codec() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, 0.0, -0.1, 0.2],
        latents_std=[0.5, 1.0, 0.8, 0.6],
    )


_QWEN3_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
}


def krea2_pipeline() -> Any:
    # The template is as long as Qwen's: 34 tokens before the caption, 5 after it.
    words = [*WORDS, "rel", "##ation", "##ships"]
    tokenizer = word_tokenizer(words, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = {**language_model(), "vocab_size": len(tokenizer), "rope_parameters": rope}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "deepstack_visual_indexes": [0],
    }
    return diffusers.Krea2Pipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Qwen3VLModel(
            transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
        ),
        vae=qwen_codec(),
        transformer=diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=8,
            text_hidden_dim=WIDTH,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        ),
        text_encoder_select_layers=(1, 2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def qwen_image21_pipeline() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = {**language_model(), "rope_parameters": rope}
    vision = {**_QWEN3_VISION, "deepstack_visual_indexes": [0]}
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    special = [f"<|{name}|>" for name in names]
    words = word_tokenizer(
        [*WORDS, *special], additional_special_tokens=special, model_max_length=512
    )
    text["vocab_size"] = len(words)
    channels = 4
    return diffusers.QwenImage21Pipeline(
        processor=transformers.Qwen3VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(),
            tokenizer=words,
            video_processor=transformers.Qwen3VLVideoProcessor(),
            chat_template=_CHATML,
        ),
        text_encoder=transformers.Qwen3VLForConditionalGeneration(
            transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
        ),
        vae=diffusers.AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, 0.0, -0.1, 0.2],
            latents_std=[0.5, 1.0, 0.8, 0.6],
        ),
        transformer=diffusers.QwenImage21Transformer2DModel(
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def nucleus_image_pipeline() -> Any:
    # The pipeline reads the last layer but seven. Words of its instruction are unknown ones.
    words = [*WORDS, "user", "assistant", "system"]
    special = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]
    special += ["<|vision_start|>", "<|vision_end|>"]
    tokenizer = word_tokenizer(words, additional_special_tokens=special, model_max_length=1024)
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }} "
        "{% for part in message['content'] %}{{ part if part is string else part['text'] }}"
        "{% endfor %}<|im_end|>{% endfor %}<|im_start|>assistant"
    )
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = {**language_model(), "vocab_size": len(tokenizer), "rope_parameters": rope}
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        dense_moe_strategy="all_moe",
        num_experts=2,
        moe_intermediate_dim=8,
        capacity_factors=1.0,
    )
    for name, parameter in transformer.named_parameters():
        if ".experts." in name:  # which are left empty
            torch.nn.init.normal_(parameter, std=0.2)
    return diffusers.NucleusMoEImagePipeline(
        processor=transformers.Qwen3VLProcessor(
            transformers.Qwen2VLImageProcessor(patch_size=16, min_pixels=1024, max_pixels=1024),
            tokenizer,
            transformers.Qwen3VLVideoProcessor(),
            chat_template=template,
        ),
        text_encoder=transformers.Qwen3VLForConditionalGeneration(
            transformers.Qwen3VLConfig(
                text_config=text | {"num_hidden_layers": 8}, vision_config=_QWEN3_VISION
            )
        ),
        vae=qwen_codec(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def sana_video_pipeline() -> Any:
    return diffusers.SanaVideoPipeline(
        tokenizer=word_tokenizer(),
        text_encoder=_gemma(),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.1, 0.0, -0.1, 0.2],
            latents_std=[0.5, 1.0, 0.8, 0.6],
            scale_factor_temporal=2,
            scale_factor_spatial=2,
        ),
        transformer=diffusers.SanaVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=WIDTH,
            rope_max_seq_len=64,
        ),
        scheduler=flow_scheduler(prediction_type="flow_prediction"),
    )


def stable_audio3_pipeline() -> Any:
    from transformers.models.t5gemma import T5GemmaConfig, T5GemmaEncoderModel
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

    parts = {part: T5GemmaModuleConfig(**language_model()) for part in ("encoder", "decoder")}
    transformer = diffusers.StableAudio3DiTModel(
        io_channels=8,
        embed_dim=16,
        depth=1,
        num_heads=2,
        cond_token_dim=WIDTH,
        global_cond_dim=WIDTH,
        local_add_cond_dim=9,
        timestep_features_dim=8,
        num_memory_tokens=2,
    )
    torch.nn.init.normal_(transformer.prompt_padding_embedding)
    codec = diffusers.AutoencoderSAME(
        audio_channels=1,
        patch_size=8,
        encoder_channels=8,
        encoder_c_mults=[2],
        encoder_strides=[4],
        encoder_transformer_depths=[1],
        latent_dim=8,
        dim_heads=8,
        sampling_rate=8000,
    )
    for name, weight in codec.named_parameters():
        if name.endswith(("_out.weight", "new_tokens")):  # zeros, which let nothing through
            torch.nn.init.normal_(weight, std=0.2)
    return diffusers.StableAudio3Pipeline(
        tokenizer=word_tokenizer(),
        text_encoder=T5GemmaEncoderModel(T5GemmaConfig(**parts, is_encoder_decoder=False)),
        duration_embedder=diffusers.StableAudio3DurationEmbedder(WIDTH, 8),
        vae=codec,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
    )


def hunyuan_video15_pipeline() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    encoder_config = transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig(
        **language_model() | {"num_hidden_layers": 3}, rope_parameters=rope
    )
    glyphs = _text(transformers.T5EncoderModel, transformers.T5Config, vocab_size=384, d_model=12)
    # The template is as long as the real one: 108 tokens before the caption.
    template = "a " * 108 + "{{ messages[-1]['content'] }} . ."
    return diffusers.HunyuanVideo15Pipeline(
        tokenizer=word_tokenizer(chat_template=template),
        text_encoder=transformers.Qwen2_5_VLTextModel(encoder_config),
        tokenizer_2=transformers.ByT5Tokenizer(),
        text_encoder_2=glyphs[1],
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            spatial_compression_ratio=2,
            temporal_compression_ratio=2,
            scaling_factor=0.5,
        ),
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_refiner_layers=1,
            text_embed_dim=WIDTH,
            text_embed_2_dim=12,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def ace_step_pipeline() -> Any:
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 4,
    }
    encoder = AceStepConditionEncoder(
        **sizes,
        text_hidden_dim=WIDTH,
        timbre_hidden_dim=8,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    )
    torch.nn.init.normal_(encoder.silence_latent)  # zeros, which a converter fills
    words = [*WORDS, "0", "31"]  # durations
    text = {**language_model(), "vocab_size": len(words)}
    return diffusers.AceStepPipeline(
        tokenizer=word_tokenizer(words),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**text)),
        condition_encoder=encoder,
        vae=diffusers.AutoencoderOobleck(
            encoder_hidden_size=16,
            downsampling_ratios=[4, 8, 8],
            channel_multiples=[1, 1, 1],
            decoder_channels=8,
            decoder_input_channels=8,
            audio_channels=1,
            sampling_rate=8000,
        ),
        transformer=diffusers.AceStepTransformer1DModel(
            **sizes, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
    )


def kandinsky5_pipeline() -> Any:
    words = [*WORDS, "rel", "##ation", "##ships"]
    codec = picture_codec((4, 4, 4, 8), latent_channels=4)
    return diffusers.Kandinsky5T2IPipeline(vae=codec, **_kandinsky5(words))


def kandinsky5_video_pipeline() -> Any:
    parts = _kandinsky5([*WORDS, *KANDINSKY_VIDEO], visual_cond=True)
    return diffusers.Kandinsky5T2VPipeline(vae=hunyuan_codec(), **parts)


def hunyuan_codec() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(4, 4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        scaling_factor=0.5,
    )


def _kandinsky5(words: Sequence[str], **changes: Any) -> dict[str, Any]:
    """All but the codec. The templates are as long as the real ones, which have 40 and 128 tokens
    before the caption (Kandinsky 6's 129): with these words, of which some are several tokens."""
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=12,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
        **changes,
    )
    for name, weight in transformer.named_parameters():
        if "modulation" in name:  # zeros, which let nothing through
            torch.nn.init.normal_(weight, std=0.2)
    processor, encoders = _kandinsky_text(words)
    return {
        "tokenizer": transformers.Qwen2VLProcessor(**processor),
        **encoders,
        "transformer": transformer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    }


def kandinsky6_pipeline() -> Any:
    words = [*WORDS, *KANDINSKY_VIDEO, "dynam", "##ism"]
    processor, encoders = _kandinsky_text(words)
    audio_codec = diffusers.MMAudioVAE(
        mel_bins=16,
        latent_channels=4,
        hidden_channels=16,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        sample_rate=8000,
        n_fft=256,
        hop_length=64,
    )
    vocoder = diffusers.MMAudioVocoder(
        num_mels=16,
        upsample_initial_channel=16,
        upsample_rates=(8, 8),
        upsample_kernel_sizes=(16, 16),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
    )
    return diffusers.Kandinsky6TI2VAPipeline(
        tokenizer=transformers.Qwen2_5_VLProcessor(**processor),
        **encoders,
        vae=hunyuan_codec(),
        audio_vae=audio_codec,
        vocoder=vocoder,
        transformer=diffusers.Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=WIDTH,
            in_text_dim2=12,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            in_audio_dim=4,
            out_audio_dim=4,
            ca_rope=True,
            cross_gates=True,
            fix_modulation=True,
            visual_token_type_num_embeddings=2,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def _kandinsky_text(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts of a processor, and the text encoders with a tokenizer."""
    special = [f"<|{name}|>" for name in ("im_start", "im_end", "image_pad", "video_pad")]
    tokenizer = word_tokenizer(words, additional_special_tokens=special, model_max_length=1024)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = {**language_model(), "vocab_size": len(tokenizer), "rope_scaling": rope}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    _, clip = _clip(hidden_size=12, max_position_embeddings=77)
    processor = {
        "image_processor": transformers.Qwen2VLImageProcessor(),
        "tokenizer": tokenizer,
        "video_processor": transformers.Qwen2VLVideoProcessor(),
    }
    return processor, {
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ),
        "tokenizer_2": word_tokenizer(model_input_names=["input_ids", "attention_mask"]),
        "text_encoder_2": clip,
    }


def flux2_pipeline() -> Any:
    text = {**language_model(), "num_hidden_layers": 30, "hidden_size": 8, "head_dim": 4}
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    encoder = transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config={**text, "model_type": "mistral"},
            vision_config={**vision, "model_type": "pixtral"},
        )
    )
    # Behind the system's message, which is as long as it is.
    tokenizer = word_tokenizer(chat_template="{{ messages[-1]['content'][0]['text'] }}")
    return diffusers.Flux2Pipeline(tokenizer=tokenizer, text_encoder=encoder, **_flux2(True))


def flux2_klein_pipeline() -> Any:
    text = {**language_model(), "num_hidden_layers": 27, "hidden_size": 8, "head_dim": 4}
    return diffusers.Flux2KleinPipeline(
        tokenizer=word_tokenizer(chat_template="{{ messages[0]['content'] }}"),
        text_encoder=transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text)),
        **_flux2(False),
    )


def flux2_codec() -> Any:
    codec = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=3,
    )
    codec.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 12))
    codec.bn.running_var.copy_(torch.linspace(0.2, 1, 12))
    return codec


def _flux2(guided: bool) -> dict[str, Any]:
    return {
        "vae": flux2_codec(),
        "transformer": diffusers.Flux2Transformer2DModel(
            in_channels=12,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guided,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


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
    "audioldm2": ("audioldm2", audioldm2_pipeline, {"window": 256, "max_caption_tokens": 16}),
    "ltx": ("ltx", ltx_pipeline, CAPTIONS | CLIPS | {"height": 32, "width": 32}),
    "ltx2": (
        "ltx2",
        ltx2_pipeline,
        CAPTIONS | CLIPS | {"height": 32, "width": 32, "stg_block": 1},
    ),
    "cogvideox": ("cogvideox", cogvideox_pipeline, {"frames": FRAMES, "fps": 4.0}),
    "latte": ("latte", latte_pipeline, {"frames": FRAMES, "fps": 4.0}),
    "sana": ("sana", sana_pipeline, CAPTIONS),
    "flux2": ("flux2", flux2_pipeline, CAPTIONS | SQUARE),
    "flux2_klein": ("flux2", flux2_klein_pipeline, CAPTIONS | SQUARE),
    "z_image": ("z_image", z_image_pipeline, CAPTIONS | SQUARE),
    "qwen_image": ("qwen_image", qwen_image_pipeline, {"max_caption_tokens": 64, **SQUARE}),
    "qwen_image21": (
        "qwen_image21",
        qwen_image21_pipeline,
        {"max_caption_tokens": 24, "guidance": 4.0, "height": 32, "width": 64},
    ),
    "nucleus_image": (
        "nucleus_image",
        nucleus_image_pipeline,
        {"max_caption_tokens": 96, **SQUARE},
    ),
    "krea2": ("krea2", krea2_pipeline, {"max_caption_tokens": 16, **SQUARE}),
    "sana_video": (
        "sana_video",
        sana_video_pipeline,
        CAPTIONS | CLIPS | {"height": 32, "width": 32},
    ),
    "stable_audio3": (
        "stable_audio3",
        stable_audio3_pipeline,
        CAPTIONS | {"seconds": 0.256, "guidance": 3.0},
    ),
    "hunyuan_video15": (
        "hunyuan_video15",
        hunyuan_video15_pipeline,
        CLIPS | {"max_caption_tokens": 16},
    ),
    "kandinsky5": ("kandinsky5", kandinsky5_pipeline, {"max_caption_tokens": 16}),
    "kandinsky5_video": (
        "kandinsky5_video",
        kandinsky5_video_pipeline,
        CLIPS | {"max_caption_tokens": 16, "negative_prompt": ""},
    ),
    "kandinsky6": (
        "kandinsky6",
        kandinsky6_pipeline,
        CLIPS | {"max_caption_tokens": 16, "negative_prompt": ""},
    ),
    "wan_vace": ("wan_vace", wan_vace_pipeline, CAPTIONS | CLIPS),
    "ace_step": (
        "ace_step",
        ace_step_pipeline,
        {"max_caption_tokens": 96, "seconds": 0.256, "guidance": 3.0},
    ),
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
    noisy: tuple[str, ...] = ()  # arguments; none named: the first
    read: Callable[..., Tensor] = lambda given: given
    write: Callable[[Tensor], Any] = lambda answer: Transformer2DModelOutput(sample=answer)
    answer: Callable[..., Tensor] = lambda written: written


def _both_packed(pipeline: Any, latents: Tensor) -> Tensor:
    """LTX-2's latents as its transformer has them: 3 x 4 x 4 tokens of pictures, 31 of sound."""
    pictures = pipeline._pack_latents(latents[:, :384].unflatten(1, (8, 3, 4, 4)))
    return torch.cat([pictures.flatten(1), latents[:, 384:]], dim=1)


def _channels_last(_pipeline: Any, latents: Tensor) -> Tensor:
    """Kandinsky 6's latents: 4 channels of 2 x 4 x 4 places in a clip, of 79 in its sound."""
    pictures = latents[:, :128].unflatten(1, (4, 2, 4, 4)).movedim(1, -1)
    return _joined(pictures, latents[:, 128:].unflatten(1, (4, 79)).transpose(1, 2))


def _joined(pictures: Tensor, sound: Tensor) -> Tensor:
    return torch.cat([pictures.flatten(1), sound.flatten(1)], dim=1)


PACKED_IN_UNITS = Dialect(
    pack=lambda pipeline, latents: pipeline._pack_latents(latents),
    clock=lambda times: times * 1000,
)
DIALECTS = {
    "flux2": PACKED_IN_UNITS,
    "flux2_klein": PACKED_IN_UNITS,
    "z_image": Dialect(
        clock=lambda times: 1000 * (1 - times),
        read=lambda given: torch.stack(given)[:, :, 0],
        write=lambda answer: (list(-answer[:, :, None]),),
        answer=lambda written: -torch.stack(written)[:, :, 0],
    ),
    "qwen_image": Dialect(
        pack=lambda pipeline, latents: pipeline._pack_latents(latents, *latents.shape),
        clock=lambda times: times * 1000,
    ),
    "ltx2": Dialect(
        pack=_both_packed,
        noisy=("hidden_states", "audio_hidden_states"),
        read=_joined,
        write=lambda answer: (
            answer[:, :384].unflatten(1, (48, 8)),
            answer[:, 384:].unflatten(1, (31, 4)),
        ),
        answer=_joined,
    ),
    "nucleus_image": Dialect(
        pack=lambda pipeline, latents: pipeline._pack_latents(latents, *latents.shape, 2),
        clock=lambda times: times * 1000,
        write=lambda answer: (-answer,),
        answer=lambda written: -written,
    ),
    "qwen_image21": Dialect(
        pack=lambda pipeline, latents: pipeline._pack_latents(latents, *latents.shape),
        clock=lambda times: times * 1000,
        answer=lambda tokens: tokens[:, -8:],  # without those of the text
    ),
    "krea2": Dialect(
        pack=lambda pipeline, latents: pipeline._pack_latents(latents, *latents.shape),
        clock=lambda times: times * 1000,
    ),
    "stable_audio3": Dialect(clock=lambda times: times * 1000),
    "kandinsky6": Dialect(
        pack=_channels_last,
        noisy=("hidden_states", "audio_hidden_states"),
        read=lambda pictures, sound: _joined(pictures[..., :4], sound),
        write=lambda answer: (
            answer[:, :128].unflatten(1, (2, 4, 4, 4)),
            answer[:, 128:].unflatten(1, (79, 4)),
        ),
        answer=_joined,
    ),
    "ace_step": Dialect(
        pack=lambda _pipeline, latents: latents.transpose(1, 2),
        clock=lambda times: times * 1000,
    ),
    "kandinsky5": Dialect(
        pack=lambda _pipeline, latents: latents[:, :, None].movedim(1, -1),
        answer=lambda frames: frames[None],  # a tensor, which was unpacked
    ),
    "kandinsky5_video": Dialect(
        pack=lambda _pipeline, latents: latents.movedim(1, -1),
        read=lambda given: given[..., :4],
        answer=lambda frames: frames[None],
    ),
    "hunyuan_video15": Dialect(read=lambda given: given[:, :4]),
    "ltx": Dialect(pack=lambda pipeline, latents: pipeline._pack_latents(latents)),
    "latte": Dialect(  # the second half is a variance
        write=lambda answer: Transformer2DModelOutput(sample=torch.cat([answer, answer], 1)),
        answer=lambda written: written.chunk(2, 1)[0],
    ),
    "cogvideox": Dialect(pack=lambda _pipeline, latents: latents.transpose(1, 2)),
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


def load(folder: Path) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder)


def entry(family: str, folder: Path, **changes: Any) -> Any:
    """The decoder config of what `save` saved."""
    kind, _, settings = FAMILIES[family]
    tree: dict[str, Any] = {"weights": str(folder), "steps": 4, **settings, **changes}
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


def word_tokenizer(words: Sequence[str] = WORDS, **changes: Any) -> BertTokenizer:
    vocab = {word: index for index, word in enumerate(words)}
    return BertTokenizer(vocab=vocab, **{"model_max_length": TOKENS, **changes})


def language_model() -> dict[str, Any]:
    return {
        "vocab_size": len(WORDS),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }


def _text(kind: type, settings: type, **changes: Any) -> tuple[BertTokenizer, Any]:
    encoder = kind(
        settings(
            **{
                "vocab_size": len(WORDS),
                "d_model": WIDTH,
                "d_kv": 8,
                "num_heads": 2,
                "d_ff": 32,
                "num_layers": 1,
                "is_encoder_decoder": False,
                "use_cache": False,
                "pad_token_id": 0,
                "eos_token_id": 3,
                **changes,
            }
        )
    )
    return word_tokenizer(), encoder


def _clip(kind: str = "CLIPTextModel", **changes: Any) -> tuple[BertTokenizer, Any]:
    settings = transformers.CLIPTextConfig(
        vocab_size=len(WORDS),
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        **{"hidden_size": WIDTH, "max_position_embeddings": TOKENS, **changes},
    )
    return word_tokenizer(), getattr(transformers, kind)(settings)
