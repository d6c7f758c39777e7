"""Step caching: enabled for one call, and nothing of it reaches the next."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmllm.decoders.caching import CACHES, PIPELINES, step_cache
from mmllm.decoders.contract import Cancelled
from mmllm.errors import ConfigError
from tests.decoders import tiny
from tests.decoders.comparing import CAPTIONS, arrays, seeded, training_inputs

CACHED = {
    "first_block": ("flux", "qwen_image", "ltx", "cogvideox", "video"),
    "pyramid_attention": ("flux", "ltx", "cogvideox"),
    "taylorseer": ("flux", "flux2_klein", "qwen_image"),
    "text_kv": ("nucleus_image",),
}
"""Cache -> the families in tests that have it."""
PAIRS = [
    (name, family)
    for name, families in CACHED.items()
    for family in families
    if name != "text_kv"  # which changes nothing that is made
]


@pytest.mark.parametrize("name", CACHES)
def test_these_are_the_families_that_have_a_cache(make, name):
    kinds = {family: make(family).pipeline_class for family in tiny.FAMILIES}
    assert {family for family in kinds if kinds[family] in PIPELINES[name]} == set(CACHED[name])
    for family in tiny.FAMILIES.keys() - set(CACHED[name]):
        with pytest.raises(
            ConfigError, match=f"cache: '{name}' does not work in a {kinds[family]}"
        ):
            make(family, cache=name)


@pytest.mark.parametrize("family", CACHED["first_block"])
def test_a_cache_without_tolerance_changes_nothing(make, family):
    plain = make(family, steps=6)
    strict = make(family, steps=6, cache="first_block", cache_threshold=0.0)
    condition = plain.encode_captions(CAPTIONS)
    first, second = (
        arrays(each.sample(condition, generators=seeded(0, 1))) for each in (plain, strict)
    )
    np.testing.assert_allclose(first, second, rtol=0, atol=1.01 / 255)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_cache_does_something_and_reaches_no_later_call(make, name, family):
    decoder = make(family, steps=10, cache=name, cache_threshold=1e9)
    plain = make(family, steps=10)
    condition = decoder.encode_captions(["a dog"])
    first = arrays(decoder.sample(condition, generators=seeded(0)))
    assert not np.array_equal(first, arrays(plain.sample(condition, generators=seeded(0))))
    second_condition = decoder.encode_captions(["a red apple"])

    def stop(step: int, steps: int) -> None:
        if step == 5:
            raise Cancelled

    with pytest.raises(Cancelled):
        decoder.sample(second_condition, generators=seeded(5), on_step=stop)
    assert not decoder.pipeline.transformer.is_cache_enabled
    assert np.array_equal(arrays(decoder.sample(condition, generators=seeded(0))), first)

    latents, noising = training_inputs(plain, 1)
    losses = [each.denoising_loss(condition, latents, **noising) for each in (decoder, plain)]
    assert torch.equal(*losses)
    assert decoder.fingerprint == plain.fingerprint


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_keys_and_values_of_captions_are_computed_once(make, monkeypatch, guidance):
    """What is made is the same; each caption and negative caption passes each block once a call."""
    decoder = make("nucleus_image", guidance=guidance, cache="text_kv")
    plain = make("nucleus_image", guidance=guidance)
    block, calls = decoder.pipeline.transformer.transformer_blocks[0], []
    block.encoder_proj.register_forward_hook(lambda *_: calls.append(1))
    for captions in (CAPTIONS, CAPTIONS[::-1], ["a dog", "a"]):
        calls.clear()
        condition = plain.encode_captions(captions)
        made, expected = (
            arrays(each.sample(condition, generators=seeded(0, 1))) for each in (decoder, plain)
        )
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-4 + 1 / 255)
        assert (made != expected).mean() < 0.01
        assert len(calls) == (2 if guidance > 1 else 1)
    assert not decoder.pipeline.transformer.is_cache_enabled
    latents, noising = training_inputs(plain)
    losses = [each.denoising_loss(condition, latents, **noising) for each in (decoder, plain)]
    assert torch.equal(*losses)
    calls.clear()
    decoder.sample(condition, generators=seeded(0, 1), options={"steps": 6})
    assert len(calls) == (2 if guidance > 1 else 1)
    call = plain.sample(condition, generators=seeded(0, 1), options={"cache": "text_kv"})
    np.testing.assert_allclose(arrays(call), expected, rtol=0, atol=1e-4 + 1 / 255)


@pytest.mark.parametrize("name", ["pyramid_attention", "taylorseer"])
def test_a_cache_is_diffusers_own(make, name):
    decoder = make("flux", steps=10, cache=name)
    condition = decoder.encode_captions(["a dog"])
    made = arrays(decoder.sample(condition, generators=seeded(0)))
    pipeline = tiny.load(decoder.folder)
    pipeline.transformer.enable_cache(CACHES[name](pipeline, 0.05))
    call = {**tiny.SQUARE, "num_inference_steps": 10, "guidance_scale": 3.5, "output_type": "np"}
    call["max_sequence_length"] = tiny.TOKENS
    expected = pipeline(["a dog"], generator=seeded(0), **call).images
    np.testing.assert_allclose(made, expected, rtol=0, atol=1.01 / 255)
    free = arrays(make("flux", steps=10).sample(condition, generators=seeded(0)))
    assert not np.array_equal(made, free)


def test_a_cache_that_a_pipeline_cannot_use_is_refused(make):
    with pytest.raises(ConfigError, match=r"work in a LTXPipeline; .* first_block or pyramid_att"):
        make("ltx", cache="taylorseer")
    with pytest.raises(ConfigError, match=r"for two steps.*true_cfg_scale"):
        make("flux", cache="pyramid_attention", true_cfg_scale=2.0)
    with pytest.raises(ConfigError, match=r"cache: input should be 'first_block'.*'second_block'"):
        make("flux", cache="second_block")
    decoder = make("flux", cache="first_block")
    condition = decoder.encode_captions(["a dog"])
    with pytest.raises(ConfigError, match="work in a FluxImg2ImgPipeline"):
        decoder.sample(condition, generators=seeded(0), init_media=[tiny.medium("image")])
    with step_cache(decoder.pipeline, None, 0.05):
        assert not decoder.pipeline.transformer.is_cache_enabled


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [("flux", "cache", "first_block"), ("stable_diffusion", "scheduler", "dpm++")],
)
def test_a_call_may_bring_its_cache_and_its_scheduler(make, family, option, value):
    decoder = make(family, steps=6, cache_threshold=1e9)
    condition = decoder.encode_captions(["a dog"])

    def made(decoder, **changes):
        (medium,) = decoder.sample(condition, generators=[torch.manual_seed(0)], options=changes)
        return medium.to_numpy()

    before = made(decoder)
    changed = made(decoder, **{option: value})
    configured = make(family, steps=6, cache_threshold=1e9, **{option: value})
    np.testing.assert_array_equal(changed, made(configured))
    assert (changed != before).any()
    np.testing.assert_array_equal(made(decoder), before)  # the next call has its own again
    with pytest.raises(ConfigError, match=option):
        decoder.with_overrides(**{option: "taylorism"})


def test_a_source_is_followed_by_the_scheduler_of_the_call(make):
    decoder, configured = make("sdxl", steps=6), make("sdxl", steps=6, scheduler="dpm++")
    condition, source = decoder.encode_captions(["a dog"]), tiny.medium("image", 1)

    def made(decoder, **changes):
        (medium,) = decoder.sample(
            condition, generators=[torch.manual_seed(0)], init_media=[source], options=changes
        )
        return medium.to_numpy()

    before = made(decoder)
    np.testing.assert_array_equal(made(decoder, scheduler="dpm++"), made(configured))
    np.testing.assert_array_equal(made(decoder), before)
