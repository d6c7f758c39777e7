"""What Kandinsky 5 has of its own: sizes, limits, what is refused, a batch of its pipeline."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from mmllm import config
from mmllm.decoders.kandinsky5 import IMAGE_SIZES, Kandinsky5VideoConfig
from mmllm.errors import AssetError, ConfigError
from tests.decoders import tiny
from tests.decoders.comparing import (
    CALL,
    CAPTIONS,
    arrays,
    close,
    lora_gradients,
    seeded,
    training_inputs,
)


def test_a_picture_has_one_of_the_pipelines_own_sizes(folders):
    """Without weights: these sizes are large."""
    pipeline = diffusers.Kandinsky5T2IPipeline(*[None] * 7)
    assert sorted(IMAGE_SIZES) == sorted((height, width) for width, height in pipeline.resolutions)

    def build(**size: int):
        return config.build(tiny.entry("kandinsky5", folders["kandinsky5"], **size))

    assert build().size == (1024, 1024)
    assert build(height=768, width=1280).size == (768, 1280)
    with pytest.raises(ConfigError, match=r"expected one of .* 768x1280, .* got 1024x768"):
        build(width=768)


def test_settings_that_the_pipelines_would_not_keep_are_refused(make):
    decoder = make("kandinsky5_video")
    assert (decoder.max_side, decoder.max_frames) == (2 * 128 * 4, 127 * 4 + 1)
    with pytest.raises(ConfigError, match="height: expected a multiple of 16, got 24"):
        make("kandinsky5_video", height=24)
    with pytest.raises(ConfigError, match="9 would do"):
        make("kandinsky5_video", frames=10)
    with pytest.raises(ConfigError, match="frames: expected at most 509, got 513"):
        make("kandinsky5_video", frames=513)
    with pytest.raises(ConfigError, match="width: expected at most 1024, got 1040"):
        make("kandinsky5_video", width=1040)
    with pytest.raises(ConfigError, match=r"'unipc' .* that can: euler, dpm\+\+$"):
        decoder.with_overrides(scheduler="unipc")
    for family in ("kandinsky5", "kandinsky5_video"):
        with pytest.raises(
            ConfigError, match="max_caption_tokens: expected at most 1024, got 1025"
        ):
            make(family, max_caption_tokens=1025)
        with pytest.raises(ConfigError, match=r"'lcm' cannot .* euler, dpm"):
            make(family, scheduler="lcm")


@pytest.mark.parametrize("kind", ["I2I", "I2V"])
def test_pipelines_that_make_nothing_without_a_picture_are_refused_by_name(make, tmp_path, kind):
    family = "kandinsky5" if kind == "I2I" else "kandinsky5_video"
    own = tiny.load(make(family).folder)
    other = getattr(diffusers, f"Kandinsky5{kind}Pipeline")(**own.components)
    other.save_pretrained(tmp_path)
    with pytest.raises(AssetError, match=f"holds a Kandinsky5{kind}Pipeline, .* Kandinsky5T2"):
        make(family, weights=str(tmp_path))


def test_the_default_negative_prompt_is_the_pipelines_own(make):
    prompt = Kandinsky5VideoConfig("weights").negative_prompt
    options = {"guidance": 3.0, "max_caption_tokens": 64}
    decoder = make("kandinsky5_video", negative_prompt=prompt, **options)
    made = decoder.sample(decoder.encode_captions(CAPTIONS[:1]), generators=seeded(1))
    call = CALL["kandinsky5_video"] | {"max_sequence_length": 64, "guidance_scale": 3.0}
    call |= {"num_inference_steps": 4, "generator": seeded(1), "output_type": "np"}
    close(made, decoder.pipeline(CAPTIONS[:1], **call).frames)
    empty = decoder.sample(
        decoder.encode_captions(CAPTIONS[:1]),
        generators=seeded(1),
        negative=make("kandinsky5_video", max_caption_tokens=64).unconditional(1),
    )
    assert np.abs(arrays(made) - arrays(empty)).max() > 1e-3


def test_captions_of_one_length_may_go_into_one_call_of_the_pipeline(make):
    captions = ["a red apple", "a blue dog"]
    for family in ("kandinsky5", "kandinsky5_video"):
        decoder = make(family, guidance=3.0)
        made = decoder.sample(decoder.encode_captions(captions), generators=seeded(1, 2))
        call = {"guidance_scale": 3.0, "negative_prompt": [""] * 2, "num_inference_steps": 4}
        output = decoder.pipeline(
            captions, **call, **CALL[family], generator=seeded(1, 2), output_type="np"
        )
        close(made, output.image if family == "kandinsky5" else output.frames)


def test_predicted_masks_count_as_zero_or_one_and_their_holes_are_closed(make):
    decoder = make("kandinsky5_video")
    soft = decoder.encode_captions(["a dog"])
    short = {name: value.clone() for name, value in soft.items()}
    mask = torch.zeros(1, 16)
    mask[0, [0, 2, 3]] = torch.tensor([0.6, 0.9, 0.7])
    soft["prompt_embeds_mask"] = mask
    short["prompt_embeds"][:, :3] = soft["prompt_embeds"][:, [0, 2, 3]]
    short["prompt_embeds_mask"] = (torch.arange(16) < 3).float()[None]
    latents, noising = training_inputs(decoder, 1)
    losses = [decoder.denoising_loss(each, latents, **noising) for each in (soft, short)]
    torch.testing.assert_close(*losses)
    made = [arrays(decoder.sample(each, generators=seeded(0))) for each in (soft, short)]
    assert np.array_equal(*made)


def test_sparse_attention_is_refused_by_name(make, tmp_path):
    pipeline = tiny.load(make("kandinsky5_video").folder)
    pipeline.transformer.register_to_config(attention_type="nabla")
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"attention_type 'nabla'.*expected 'regular'"):
        make("kandinsky5_video", weights=str(tmp_path))


def test_a_lora_trains_on_the_layers_that_the_docs_name(make):
    layers = ["to_query", "to_key", "to_value"]
    decoder = make("kandinsky5_video", train_lora={"rank": 2, "targets": layers})
    gradients = lora_gradients(decoder)
    assert len(gradients) == len(layers) * 3  # attention to words, to pixels, of pixels to words
    assert all(gradients)
