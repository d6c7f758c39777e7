"""Options by diffusers' own means: what they promise of results, and what is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from mmllm.decoders import options
from mmllm.errors import AssetError, ConfigError
from tests.decoders import tiny
from tests.decoders.comparing import CAPTIONS, arrays, seeded, training_inputs


def sampled(decoder: Any) -> np.ndarray:
    return arrays(decoder.sample(decoder.encode_captions(CAPTIONS), generators=seeded(1, 2)))


@pytest.mark.parametrize("family", ["stable_diffusion", "sd3", "flux", "video", "z_image"])
def test_fp8_computes_with_weights_that_were_rounded(make, family):
    """Not near the pipeline's own results, but exactly those of the rounded weights, and the
    gradient to the condition, too."""
    stored, plain = make(family, quantization="fp8"), make(family)
    (part,) = options.denoisers(stored.pipeline)
    (own,) = options.denoisers(plain.pipeline)
    weights = dict(part.named_parameters())
    small = [each for each in weights.values() if each.dtype == torch.float8_e4m3fn]
    assert sum(map(torch.numel, small)) > 0.1 * sum(map(torch.numel, weights.values()))
    before = sampled(plain)
    own.load_state_dict({name: value.float() for name, value in part.state_dict().items()})
    rounded = sampled(plain)
    np.testing.assert_allclose(sampled(stored), rounded, rtol=0, atol=1e-4 + 1 / 255)
    assert np.abs(rounded - before).max() > 0
    if family == "stable_diffusion":
        latents, noising = training_inputs(plain)
        with pytest.raises(ConfigError, match="'fp8' casts conv_in, a convolution, back before"):
            stored.denoising_loss(plain.encode_captions(CAPTIONS), latents, **noising)
        return
    gradients = []
    for decoder in (stored, plain):
        latents, noising = training_inputs(plain)
        condition = plain.encode_captions(CAPTIONS)
        condition["prompt_embeds"].requires_grad_()
        decoder.denoising_loss(condition, latents, **noising).sum().backward()
        gradients.append(condition["prompt_embeds"].grad)
    assert gradients[1].any()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def unpacked(layer: Any) -> torch.Tensor:
    """The weights that a layer of bitsandbytes computes with."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if hasattr(layer.weight, "quant_state"):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).float()


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_packed_weights_are_computed_with(make, family, bits):
    """Exactly those of the unpacked weights in 4 bits; in 8 bits the inputs are rounded, too."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    stored, plain = make(family, quantization=bits), make(family)
    (part,), (own,) = options.denoisers(stored.pipeline), options.denoisers(plain.pipeline)
    before = sampled(plain)
    packed = {n: m for n, m in part.named_modules() if isinstance(m, (Linear4bit, Linear8bitLt))}
    assert len(packed) > 0.5 * sum(isinstance(m, torch.nn.Linear) for m in own.modules())
    for name, layer in packed.items():
        weight = own.get_submodule(name).weight
        weight.data.copy_(unpacked(layer).reshape(weight.shape))
    rounded = sampled(plain)
    assert np.abs(rounded - before).max() > 0
    difference = np.abs(sampled(stored) - rounded)
    assert difference.max() < 1e-3 if bits == "4bit" else difference.mean() < 0.05
    latents, noising = training_inputs(plain)
    condition = plain.encode_captions(CAPTIONS)
    condition["prompt_embeds"].requires_grad_()
    stored.denoising_loss(condition, latents, **noising).sum().backward()
    assert condition["prompt_embeds"].grad.any()


@pytest.mark.parametrize("offload", ["group", "sequential"])
def test_packed_weights_are_not_moved_layer_by_layer(make, offload):
    with pytest.raises(ConfigError, match=f"offload {offload} moves single layers"):
        make("flux", quantization="4bit", offload=offload)


def test_without_bitsandbytes_the_remedy_is_named(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'mmllm\[quantization\]'"):
        make("flux", quantization="4bit")


@pytest.mark.parametrize("family", ["sd3", "flux", "sana"])
def test_group_offload_makes_the_same(make, family):
    grouped = make(family)
    options.enable_offload(grouped.pipeline, "group", torch.device("cpu"))
    np.testing.assert_allclose(sampled(grouped), sampled(make(family)), rtol=0, atol=1e-4)


def test_a_codec_in_slices_makes_the_same_and_one_in_tiles_nearly(make):
    plain = sampled(make("sd3"))
    np.testing.assert_allclose(sampled(make("sd3", vae_slicing=True)), plain, rtol=0, atol=1e-4)
    tiled = make("sd3", vae_tiling=True)
    codec = tiled.pipeline.vae
    assert codec.use_tiling
    codec.tile_sample_min_size, codec.tile_latent_min_size = tiny.SIZE // 2, tiny.SIZE // 4
    made = sampled(tiled)
    assert made.shape == plain.shape
    assert 0 < np.abs(made - plain).mean() < 0.2
    assert make("sd3").fingerprint == make("sd3", vae_slicing=True).fingerprint
    assert make("sd3").fingerprint != tiled.fingerprint  # it encodes media otherwise


def test_a_codec_without_tiles_is_refused(make):
    with pytest.raises(ConfigError, match="vae_tiling: a MelAutoencoder has no tiling"):
        _ = make("audio", vae_tiling=True).pipeline


def test_compiled_blocks_make_the_same(make, monkeypatch):
    monkeypatch.setattr(options, "COMPILE_OPTIONS", {"backend": "eager"})  # no C++ compiler
    compiled = make("flux", compile=True)
    block = compiled.pipeline.transformer.transformer_blocks[0]
    assert block._compiled_call_impl is not None
    np.testing.assert_allclose(sampled(compiled), sampled(make("flux")), rtol=0, atol=1e-4)


# --- LoRA -------------------------------------------------------------------------------------


def adapted(make: Any, family: str, folder: Path, targets: list[str]) -> tuple[Any, Path]:
    """diffusers' pipeline with a random LoRA that changes something, and its file."""
    pipeline = tiny.load(make(family).folder)
    (part,) = options.denoisers(pipeline)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        part.add_adapter(
            LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
        )
    kind = "unet" if hasattr(pipeline, "unet") else "transformer"
    layers = {f"{kind}_lora_layers": get_peft_model_state_dict(part)}
    pipeline.save_lora_weights(folder, **layers, safe_serialization=True)
    return pipeline, folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "sd3", "flux", "video", "z_image"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_merged_lora_is_the_one_that_diffusers_adds(make, family, scale, tmp_path):
    pipeline, file = adapted(make, family, tmp_path, ["to_q", "to_v"])
    (part,) = options.denoisers(pipeline)
    part.set_adapters(["default"], [scale])
    decoder, plain = make(family, lora=str(file), lora_scale=scale), make(family)
    merged = sampled(decoder)
    assert np.abs(merged - sampled(plain)).max() > 1e-3
    (own,) = options.denoisers(decoder.pipeline)
    assert not any("lora" in name for name, _ in own.named_parameters())
    assert not any(each.requires_grad for each in own.parameters())
    unmerged = make(family)
    setattr(unmerged.pipeline, "unet" if hasattr(pipeline, "unet") else "transformer", part)
    np.testing.assert_allclose(merged, sampled(unmerged), rtol=0, atol=1e-4 + 1 / 255)
    assert decoder.fingerprint == plain.fingerprint


def test_a_lora_that_does_not_fit_is_refused(make, tmp_path):
    _, file = adapted(make, "flux", tmp_path, ["to_q"])
    with pytest.raises(AssetError, match=r"lora: .* StableDiffusion3Pipeline"):
        _ = make("sd3", lora=str(file)).pipeline
    with pytest.raises(ConfigError, match="diffusers loads none into a StableAudioPipeline"):
        _ = make("audio", lora=str(file)).pipeline
    for path in (tmp_path / "nothing.safetensors", tmp_path / "weights.bin"):
        with pytest.raises(AssetError, match=r"is no .safetensors file"):
            _ = make("flux", lora=str(path)).pipeline


def test_a_lora_of_the_text_encoder_is_refused(make, tmp_path):
    pipeline = tiny.load(make("stable_diffusion").folder)
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    layers = get_peft_model_state_dict(pipeline.text_encoder)
    pipeline.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    with pytest.raises(ConfigError, match="also changes the text encoder"):
        _ = make(
            "stable_diffusion", lora=str(tmp_path / "pytorch_lora_weights.safetensors")
        ).pipeline
