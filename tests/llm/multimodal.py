"""Tiny random twins of vision-language, audio and omni models, each as a folder of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.llm.families import CHATML, SIZES, WINDOW, byte_level

MARKS = (
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
    *("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
    *("<img>", "<IMG_CONTEXT>", "</img>"),
)
"""Tokens of the processors of these families."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PATCH = 4
"""Pixels of a patch."""
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 64,
    "out_hidden_size": 32,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.2,
}
_QWEN3_VISION = {**_QWEN_VISION, "num_position_embeddings": 16}
_DEEPSTACK = {**_QWEN3_VISION, "depth": 3, "deepstack_visual_indexes": [0, 1]}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": PATCH,
}
_QWEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(section)}
    return {"rope_parameters": {**rope, **more}}


@dataclass(frozen=True)
class Multimodal:
    """`config`: class of transformers; `parts`: its sub-configs, `text_config` on top of SIZES;
    `ids`: its keys that name a token; `recurrent`: whether layers carry a state; `sliding`: whether
    its cache forgets."""

    config: str
    text: dict[str, Any]
    parts: dict[str, dict[str, Any]]
    ids: Mapping[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    recurrent: bool = False
    sliding: bool = False


FAMILIES = {
    "qwen2_5_vl": Multimodal(
        "Qwen2_5_VLConfig",
        _mrope(2, 1, 1),
        {"vision_config": {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}},
        _QWEN_IDS,
    ),
    "qwen3_vl": Multimodal(
        "Qwen3VLConfig",
        {"head_dim": 16, **_mrope(4, 2, 2, mrope_interleaved=True)},
        {"vision_config": _DEEPSTACK},
        _QWEN_IDS,
    ),
    "qwen3_vl_moe": Multimodal(
        "Qwen3VLMoeConfig",
        {"head_dim": 16, **EXPERTS, **_mrope(4, 2, 2, mrope_interleaved=True)},
        {"vision_config": _DEEPSTACK},
        _QWEN_IDS,
    ),
    "qwen3_5": Multimodal(
        "Qwen3_5Config",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            **_mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.5),
        },
        {"vision_config": _QWEN3_VISION},
        _QWEN_IDS,
        recurrent=True,
    ),
    "gemma3": Multimodal(
        "Gemma3Config",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {"vision_config": _SIGLIP},
        {
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        {"mm_tokens_per_image": 4},
        sliding=True,
    ),
    "gemma4": Multimodal(
        "Gemma4Config",
        {
            "head_dim": 16,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 0,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 5.0,
        },
        {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "patch_size": PATCH,
            }
        },
        {
            "image_token_id": "<image_soft_token>",
            "video_token_id": "<|video_pad|>",
            "audio_token_id": "<|AUDIO|>",
        },
        sliding=True,
    ),
    "internvl": Multimodal(
        "InternVLConfig",
        {"model_type": "qwen2"},
        {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 16,
                "patch_size": PATCH,
            }
        },
        {"image_token_id": "<IMG_CONTEXT>"},
        {"image_seq_length": 4},
    ),
    "qwen2_audio": Multimodal(
        "Qwen2AudioConfig",
        {"model_type": "qwen2"},
        {
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "d_model": 32,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 64,
                "encoder_layers": 2,
                "num_mel_bins": 16,
                "max_source_positions": 40,
            }
        },
        {"audio_token_index": "<|AUDIO|>"},
    ),
    "qwen3_omni_thinker": Multimodal(
        "Qwen3OmniMoeThinkerConfig",
        {"head_dim": 16, **EXPERTS, **_mrope(4, 2, 2, mrope_interleaved=True)},
        {
            "vision_config": _DEEPSTACK,
            "audio_config": {
                "d_model": 32,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 64,
                "encoder_layers": 2,
                "num_mel_bins": 16,
                "max_source_positions": 40,
                "output_dim": 32,
                "downsample_hidden_size": 16,
            },
        },
        _QWEN_IDS | {"audio_token_id": "<|AUDIO|>", "audio_start_token_id": "<|audio_bos|>"},
    ),
}


def config_of(name: str, tokenizer: Any, *, tied: bool = False) -> Any:
    """The family's config, for a tokenizer that has MARKS."""
    import transformers

    family = FAMILIES[name]
    text = {
        **SIZES,
        **family.text,
        "vocab_size": len(tokenizer) + 5,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    return getattr(transformers, family.config)(
        text_config=text,
        **family.parts,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in family.ids.items()},
        **family.options,
        tie_word_embeddings=tied,
    )


def write(name: str, folder: Path, *, tied: bool = False) -> Path:
    """A model of the family and its tokenizer."""
    from transformers import AutoModelForMultimodalLM

    tokenizer = byte_level(folder, CHATML, "<|im_end|>")
    tokenizer.add_special_tokens({"extra_special_tokens": list(MARKS)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model: Any = AutoModelForMultimodalLM.from_config(config_of(name, tokenizer, tied=tied))
    with torch.no_grad():
        for parameter in model.parameters():  # towers and routers begin at zero, or nearly
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return folder


def plain(folder: Path) -> Any:
    """The same weights as transformers alone loads them."""
    from transformers import AutoModelForMultimodalLM

    return AutoModelForMultimodalLM.from_pretrained(folder).eval()
