"""Fingerprints key feature caches and stand in checkpoints: they must never change on their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmllm import config
from tests.decoders import tiny

GOLDEN = {
    "image": "e3d080e80743f7bc",
    "video": "0faa437e0cb081ad",
    "audio": "a77fec8324139b83",
    "stable_diffusion": "8d183a5e821eaac9",
    "sdxl": "6d53dbee7ceb9ce8",
    "audioldm": "bb02d673a294bfed",
    "text_to_video": "cf4579895793a281",
    "sd3": "41f4f13e92dc0bee",
    "flux": "6ee1c15725e5429b",
    "audioldm2": "ba5c90e740696753",
    "ltx": "079fbba0e9814f95",
    "ltx2": "d4b9a4f902e968eb",
    "cogvideox": "c6f5760d76e141df",
    "latte": "d5e978fdd1e5a5e4",
    "sana": "59f2827acaf84388",
    "flux2": "b250594550675f2f",
    "flux2_klein": "b250594550675f2f",
    "z_image": "95f2edba46521159",
    "qwen_image": "7dab00259e61ae7c",
    "qwen_image21": "df09eec918976e92",
    "nucleus_image": "12ccac0368dfb03c",
    "krea2": "9687f66bb579654d",
    "sana_video": "31e47a60e9d8d3bd",
    "stable_audio3": "2929e28b450ba237",
    "hunyuan_video15": "9c557b24afb028cf",
    "wan_vace": "0587e8d8aa42ef4c",
    "ace_step": "e9f83cf3005c5b1f",
    "kandinsky6": "38ebcef8c054bf66",
    "kandinsky5": "0303b3dd9add09d9",
    "kandinsky5_video": "bb82ee324448d886",
}
"""Family in tests -> its fingerprint over an empty folder: the decoder's name and its config."""
MINI = {
    "image": "c6f9594cd8fc7fff",
    "video": "af9e7a36488e3595",
    "audio": "3d101234b330e2c7",
}
"""Modality -> the fingerprint of mini's decoder, whose files are always the same."""
MINI_CONFIGS = {
    "image": {"type": "pixart"},
    "video": {"type": "latte", "frames": 9, "height": 128, "width": 128},
    "audio": {"type": "stable_audio"},
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fingerprints_are_those_of_the_first_release(make, family: str, tmp_path: Path) -> None:
    decoder = make(family)
    decoder.folder = tmp_path
    assert decoder.fingerprint == GOLDEN[family]


@pytest.mark.parametrize("modality", MINI)
def test_fingerprints_of_minis_decoders(modality: str) -> None:
    tree = {"weights": f"mini:decoders/{modality}", "max_caption_tokens": 40}
    entry = config.parse_component("decoders", tree | MINI_CONFIGS[modality], modality)
    assert config.build(entry).fingerprint == MINI[modality]
