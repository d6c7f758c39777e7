"""What Kandinsky 6 has of its own: sound with its frames, distilled models, a picture to begin
with."""

from __future__ import annotations

import dataclasses

import diffusers
import numpy as np
import pytest
import torch

from mmllm.conversation import Audio
from mmllm.decoders.kandinsky6 import Kandinsky6Config
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

FRAMES = 128
"""Latents of the frames of a clip: 4 channels of 2 x 4 x 4 places."""


def clip(seed: int = 0):
    """Frames with 1.28 s of a tone; a clip of the decoder has 1.25 s, its sound 1.264 s."""
    tone = Audio.from_numpy(tiny.medium("audio", seed).to_numpy().repeat(5, axis=1), 8000)
    return dataclasses.replace(tiny.medium("video", seed), audio=tone)


def test_latents_are_those_of_both_codecs(make):
    decoder, video = make("kandinsky6"), clip()
    latents = decoder.encode_media(decoder.preprocess(video)[None])
    pipeline = decoder.pipeline
    pixels = torch.from_numpy(video.to_numpy()).permute(3, 0, 1, 2)[None] / 127.5 - 1
    wave = torch.from_numpy(video.audio.to_numpy())[:, : 79 * 128]
    with torch.no_grad():
        frames = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        sound = pipeline.audio_vae.encode(wave).latent_dist.mode()
    sound = sound * pipeline.audio_vae.config.scaling_factor
    torch.testing.assert_close(latents[:, :FRAMES], frames.flatten(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents[:, FRAMES:], sound.flatten(1), rtol=0, atol=1e-4)
    silent = decoder.encode_media(decoder.preprocess(tiny.medium("video"))[None])
    assert torch.equal(silent[:, :FRAMES], latents[:, :FRAMES])
    assert (silent[:, FRAMES:] - latents[:, FRAMES:]).abs().max() > 1e-3
    half = make("kandinsky6").to("cpu", torch.bfloat16)
    rounded = half.encode_media(half.preprocess(video)[None])
    torch.testing.assert_close(rounded, latents, rtol=0.1, atol=0.1)


def test_sound_is_made_with_the_frames(make):
    decoder = make("kandinsky6")
    (made,) = decoder.sample(decoder.encode_captions(CAPTIONS[:1]), generators=seeded(1))
    assert made.audio.sample_rate == 8000
    assert made.audio.to_numpy().shape == (1, decoder.audio_length * 128)
    assert np.ptp(made.audio.to_numpy()) > 1e-3


def test_the_default_negative_prompt_is_the_pipelines_own(make):
    prompt = Kandinsky6Config("weights").negative_prompt
    decoder = make("kandinsky6", negative_prompt=prompt, max_caption_tokens=64)
    made = decoder.sample(decoder.encode_captions(CAPTIONS[:1]), generators=seeded(1))
    call = CALL["kandinsky6"] | {"max_sequence_length": 64, "guidance_scale": 5.0}
    call |= {"num_inference_steps": 4, "generator": seeded(1), "output_type": "np"}
    close(made, decoder.pipeline(CAPTIONS[:1], **call).frames)


def test_captions_of_the_full_length_have_a_full_mask(make):
    decoder = make("kandinsky6", max_caption_tokens=5)
    condition = decoder.encode_captions(CAPTIONS[:1])
    assert condition["prompt_embeds_mask"].tolist() == [[1.0] * 5]
    made = decoder.sample(condition, generators=seeded(1))
    call = CALL["kandinsky6"] | {"max_sequence_length": 5, "guidance_scale": 5.0}
    call |= {"negative_prompt": [""], "num_inference_steps": 4, "generator": seeded(1)}
    close(made, decoder.pipeline(CAPTIONS[:1], **call, output_type="np").frames)


@pytest.mark.parametrize("scheduler", ["dpm++", "unipc"])
def test_other_solvers_are_the_pipelines(make, scheduler):
    """Frames and sound each have a copy; the pipeline overwrites no latents that it reads later."""
    decoder = make("kandinsky6", scheduler=scheduler)
    condition, made = decoder.encode_captions(CAPTIONS[:1]), []
    own = type(decoder.pipeline.scheduler).step
    for copied in (False, True):
        if copied:

            def step(self, output, time, sample, **options):
                return own(self, output, time, sample.clone(), **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(decoder.pipeline.scheduler), "step", step)
                made.append(decoder.sample(condition, generators=seeded(0)))
        else:
            made.append(decoder.sample(condition, generators=seeded(0)))
    assert np.array_equal(*map(arrays, made))
    plain = make("kandinsky6").sample(condition, generators=seeded(0))
    assert not np.array_equal(arrays(plain), arrays(made[0]))


def test_settings_that_the_pipeline_would_not_keep_are_refused(make):
    decoder = make("kandinsky6")
    assert (decoder.max_side, decoder.max_frames) == (128 * 2 * 4, 127 * 4 + 1)
    for options, message in (
        ({"height": 20}, "height: expected a multiple of 8, got 20"),
        ({"frames": 10}, "9 would do"),
        ({"frames": 513}, "frames: expected at most 509, got 513"),
        ({"width": 1032}, "width: expected at most 1024, got 1032"),
        ({"max_caption_tokens": 2049}, "max_caption_tokens: expected at most 2048, got 2049"),
        ({"frames": 509, "fps": 15.0}, "have audio of 2121 latents; expected at most 2048"),
    ):
        with pytest.raises(ConfigError, match=message):
            make("kandinsky6", **options)


def test_a_distilled_model_samples_and_has_no_loss(make, tmp_path):
    """It predicts several steps at once, by a scheduler of its own."""
    pipeline = tiny.load(make("kandinsky6").folder)
    wider = dict(pipeline.transformer.config) | {"out_visual_dim": 8, "out_audio_dim": 8}
    torch.manual_seed(0)
    pipeline.transformer = diffusers.Kandinsky6Transformer3DModel.from_config(wider)
    pipeline.scheduler = diffusers.PiflowScheduler(n_grid=2)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"distilled model.*expected at most 1, got 5"):
        make("kandinsky6", weights=str(tmp_path))
    with pytest.raises(ConfigError, match="scheduler: 'ddim' cannot take the place"):
        make("kandinsky6", weights=str(tmp_path), guidance=1.0, scheduler="ddim")
    decoder = make("kandinsky6", weights=str(tmp_path), guidance=1.0)
    condition = decoder.encode_captions(CAPTIONS[:1])
    made = decoder.sample(condition, generators=seeded(1))
    call = {"guidance_scale": 1.0, "num_inference_steps": 4, "generator": seeded(1)}
    output = decoder.pipeline(CAPTIONS[:1], **CALL["kandinsky6"], **call, output_type="np")
    close(made, output.frames)
    close([made[0].audio], output.audio)
    latents, noising = training_inputs(decoder, 1)
    with pytest.raises(ConfigError, match="PiflowScheduler: no training target is known"):
        decoder.denoising_loss(condition, latents, **noising)


def test_a_model_that_takes_no_picture_starts_from_noise(make, tmp_path):
    pipeline = tiny.load(make("kandinsky6").folder)
    pipeline.transformer.register_to_config(visual_token_type_num_embeddings=1)
    pipeline.save_pretrained(tmp_path)
    assert make("kandinsky6").init_modality == "image"
    assert make("kandinsky6", weights=str(tmp_path)).init_modality == ""


def test_a_lora_trains_on_the_layers_that_the_docs_name(make):
    targets = ["to_query", "to_key", "to_value"]
    decoder = make("kandinsky6", train_lora={"rank": 2, "targets": targets})
    assert any(lora_gradients(decoder))
