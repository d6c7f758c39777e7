"""Fingerprints key feature caches and stand in checkpoints: they must never change on their own.

The golden values are of encoders without weights, whose hash is then that of no file, so that they
hold on every machine. They depend on the pinned versions of transformers and open_clip, whose
preprocessors are a part of what is hashed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmllm import config
from mmllm.weights import skip_weights
from tests.encoders.twins import TWINS

GOLDEN = {
    "open_clip": ("d3af88937cc268c2", "3813c5d8a6d35001"),
    "open_clip_quick_gelu": ("d3af88937cc268c2", "3813c5d8a6d35001"),
    "open_clip_resnet": ("cf3136c3f79daef2", "4e54bbb036b9b97f"),
    "open_clip_timm_vit": ("b6128c53fdd56b97", "65f91a068c1f31ba"),
    "open_clip_timm_convnext": ("46ebaedef1fc209b", "090b5a4bbf4c40e1"),
    "clip": ("46c4bdbbb08e8453", "00de164b14dea3cc"),
    "siglip": ("7af93c44c9bec3d4", "be41d2a6bb397325"),
    "siglip2": ("2ce7406b1937e7bc", "389c5ba79a489c6e"),
    "dinov2": ("8d57e63afc36d8f0", "95d0ef774f8c6c7a"),
    "dinov2_with_registers": ("141eeabd9f1c36d3", "06e165ccc3fc3ea5"),
    "dinov3_vit": ("617a42d454da98d2", "321239fd1706a18c"),
    "dinov3_convnext": ("471e1ff454f1e4d5", "303ddd2c3fbb4ed8"),
    "clap": ("01e40113b9e0e4b1", "0f53e43b97a4206b"),
    "clap_fused": ("75229652238c2ae9", "3a4d14507fc6c424"),
    "whisper": ("28e1683ca3135793", "be6b075fe89ab361"),
    "ast": ("28fab2006d664417", "3afad0207fe41ad1"),
    "videomae": ("472286ecee78d4e6", "662219ea56c2552a"),
    "vjepa2": ("0782ec1de50192c3", "6e5b5febea1daed2"),
    "aisfx": ("a4b4f16d91698cc3", "d5e71a947f251df6"),
    "efficientnet": ("743222bbeda222b0", "8c68ae9b35d34d3c"),
    "frames": ("e425b13e9a6d790d", "7ec932e47f4a07f4"),
    "radio": ("604512f34c887dd5", "7462c548c8498df0"),
    "pe_audio": ("a4044c5be82d4426", "13f2f819b8a08c9a"),
    "parakeet": ("cfda45a020d67110", "3de278ac03e22d48"),
    "qwen3_omni": ("e9f817c968faee63", "edb1bc689ebd9266"),
    "qwen3_asr": ("003544d031a52ea5", "8b40b251af6b7093"),
    "pe_video": ("040959e50a6cf632", "d8a59f8dd6e51c1f"),
    "pe_audio_video": ("27b73730927dc441", "9cdbe854692d6a3f"),
    "videoprism": ("2e1f120d5791dea9", "9da5a9b52a923fb1"),
    "tiles": ("c7e8e5a671b8e934", "4beb6611b719fb6b"),
    "windows": ("62381173e63b9422", "65f26c0a00b472a0"),
    "audio_video": ("3fc682feef90c9b5", "cee6e9c0f5a719dc"),
}
"""Encoder -> its fingerprint by default, and with other options."""
OPTIONS: dict[str, dict[str, Any]] = {
    "aisfx": {"tokens": 2},
    "efficientnet": {"grid": 1},
    "frames": {"frames": 3},
    "clap": {"dtype": "bfloat16"},
    "clap_fused": {"dtype": "bfloat16"},
    "open_clip_timm_convnext": {"dtype": "bfloat16"},
    "dinov3_convnext": {"dtype": "bfloat16"},
    "pe_audio": {"dtype": "bfloat16"},
    "pe_video": {"dtype": "bfloat16"},
    "pe_audio_video": {"dtype": "bfloat16"},
    "parakeet": {"dtype": "bfloat16"},
    "qwen3_omni": {"dtype": "bfloat16"},
    "qwen3_asr": {"dtype": "bfloat16"},
    "videoprism": {"dtype": "bfloat16"},
    "tiles": {"max_tokens": 512},
    "windows": {"seconds": 5.0},
    "audio_video": {"audio": {"type": "aisfx", "tokens": 2}},
}
WITH_WEIGHTS = {
    "aisfx": "9111acc617464ce0",
    "efficientnet": "d7120acdb0a779d6",
    "frames": "0a5bbd48d71875ed",
}
"""The same of the encoders of mini, whose weights are always the same."""


def build(name: str, folder: Path, **options: Any) -> Any:
    if name in TWINS:
        return TWINS[name].build(folder, **options)
    return config.build(config.parse_component("encoders", {"type": name, **options}, "encoder"))


@pytest.mark.parametrize("name", GOLDEN)
def test_fingerprints_are_those_of_the_first_release(name: str, tmp_path: Path) -> None:
    if name in TWINS:
        TWINS[name].write(tmp_path)
    options = OPTIONS.get(name, {"dtype": "bfloat16", "layer": 1})
    with skip_weights():
        prints = tuple(build(name, tmp_path, **given).fingerprint for given in ({}, options))
    assert prints == GOLDEN[name]


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_fingerprints_of_minis_encoders_with_their_weights(name: str, tmp_path: Path) -> None:
    assert build(name, tmp_path).fingerprint == WITH_WEIGHTS[name]


def test_every_encoder_has_a_golden_fingerprint() -> None:
    types = {TWINS[name].type if name in TWINS else name for name in GOLDEN}
    types.add("backbone")  # a part of a language model: test_backbone.py
    assert types == config.COMPONENTS["encoders"].keys()
