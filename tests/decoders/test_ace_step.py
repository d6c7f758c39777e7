"""What ACE-Step has of its own: a condition in the place of a text, lyrics, lengths, loudness."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmllm.errors import ConfigError
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

LYRICS = "[verse] a red apple runs"


def own(decoder, caption: str, **call) -> np.ndarray:
    """What the pipeline makes of a caption by the seed 1."""
    call = {**CALL["ace_step"], "guidance_scale": 3.0, "num_inference_steps": 4, **call}
    return decoder.pipeline(caption, **call, generator=seeded(1)[0], output_type="np").audios


@pytest.mark.parametrize(
    "options", [{"lyrics": LYRICS, "vocal_language": "a"}, {"shift": 1.0}, {"seconds": 0.5}]
)
def test_lyrics_shift_and_duration_are_the_pipelines(make, options):
    decoder = make("ace_step", **options)
    made = decoder.sample(decoder.encode_captions(CAPTIONS[:1]), generators=seeded(1))
    call = dict(options)
    if "seconds" in call:
        call = {"audio_duration": call["seconds"]}
    close(made, own(decoder, CAPTIONS[0], **call))
    plain = make("ace_step")
    other = arrays(plain.sample(plain.encode_captions(CAPTIONS[:1]), generators=seeded(1)))
    assert arrays(made).shape != other.shape or np.abs(arrays(made) - other).max() > 1e-3
    if "lyrics" in options:
        latents, noising = training_inputs(decoder, 1)
        condition = decoder.encode_captions(CAPTIONS[:1])
        losses = [each.denoising_loss(condition, latents, **noising) for each in (decoder, plain)]
        assert not torch.allclose(*losses)
        assert decoder.fingerprint == plain.fingerprint  # captions and media are encoded alike


def test_a_duration_is_a_part_of_the_caption(make):
    short, long = make("ace_step"), make("ace_step", seconds=31.0)
    embeds = [each.encode_captions(CAPTIONS[:1])["prompt_embeds"] for each in (short, long)]
    assert not torch.allclose(*embeds)
    assert short.fingerprint != long.fingerprint


def test_the_pipeline_still_reads_text_and_one_call_has_one_prompt(make):
    decoder = make("ace_step")
    before = own(decoder, CAPTIONS[1])
    decoder.sample(decoder.encode_captions(CAPTIONS[:1]), generators=seeded(1))
    assert np.array_equal(before, own(decoder, CAPTIONS[1]))


def test_settings_that_the_pipeline_would_not_keep_are_refused(make, tmp_path):
    for options, message in (
        ({"negative_prompt": "a dog"}, "negative_prompt: ACE-Step is guided away from a vector"),
        ({"text_encoder": "llm"}, "text_encoder: ACE-Step reads Qwen3-Embedding"),
        ({"guidance": -1.0}, "guidance: expected at least 0, got -1"),
        ({"shift": 0.0}, "shift: expected more than 0, got 0"),
        ({"scheduler": "unipc"}, "those that can: euler$"),
    ):
        with pytest.raises(ConfigError, match=message):
            make("ace_step", **options)
    pipeline = tiny.load(make("ace_step").folder)
    pipeline.transformer.register_to_config(is_turbo=True)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"turbo model.*expected at most 1, got 3"):
        make("ace_step", weights=str(tmp_path))
    turbo = make("ace_step", weights=str(tmp_path), guidance=1.0)
    close(
        turbo.sample(turbo.encode_captions(CAPTIONS[:1]), generators=seeded(1)),
        own(turbo, CAPTIONS[0], guidance_scale=1.0),
    )


def test_a_duration_that_the_pipeline_counts_in_two_ways_is_refused(make, monkeypatch):
    """Of 25 latents a second, 0.27 s are seven, these are 0.28 s, and 0.28 s are eight."""
    decoder = make("ace_step")
    codec = {**decoder.component_config("vae"), "sampling_rate": 6400}  # 256 samples a latent
    read = type(decoder).component_config
    monkeypatch.setattr(
        type(decoder),
        "component_config",
        lambda self, name: codec if name == "vae" else read(self, name),
    )
    with pytest.raises(ConfigError, match=r"rounds 0\.27 in two ways; 1 would do"):
        decoder.with_overrides(seconds=0.27)
    assert decoder.with_overrides(seconds=1.0).output_spec() == {"seconds": 1.0}


def test_a_sound_is_cut_or_padded_to_whole_latents(make):
    decoder = make("ace_step", seconds=0.25)
    wave = decoder.preprocess(tiny.medium("audio"))
    assert wave.shape == (1, 2048)  # 7.8 latents of 256 samples
    assert wave[:, :2000].any()
    assert not wave[:, 2000:].any()


def test_a_lora_trains(make):
    decoder = make("ace_step", train_lora={"rank": 2})
    assert all(lora_gradients(decoder))
