"""Decoders against diffusers' own pipelines on captions, and against themselves in other orders."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from diffusers.utils import logging as diffusers_logging

from mmllm import config
from mmllm.conversation import Audio, Image, Video
from mmllm.decoders.config import DecoderConfig
from mmllm.decoders.contract import Cancelled
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.errors import AssetError, ConfigError, MediaError
from tests.decoders import tiny
from tests.decoders.comparing import (
    CALL,
    CAPTIONS,
    OUTPUT,
    OUTPUTS,
    QUOTING,
    arrays,
    close,
    own_outputs,
    seeded,
    training_inputs,
)

ALL = pytest.mark.parametrize("family", tiny.FAMILIES)


class Calls(list):
    """Arguments of each call of a transformer; noisy samples and times are separate."""

    def __init__(self):
        super().__init__()
        self.clock = ""  # the denoiser's name for its times
        self.noisy: list[dict[str, torch.Tensor]] = []
        self.times: list[torch.Tensor] = []


def spy(family: str, decoder: ModalityDecoder, monkeypatch) -> Calls:
    denoiser, names = tiny.denoiser(decoder.pipeline), tiny.dialect(family).noisy
    forward, calls = denoiser.forward, Calls()
    signature = inspect.signature(forward)

    def recording_forward(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        calls.noisy.append({name: given.pop(name) for name in names or [next(iter(given))]})
        calls.clock = "timestep" if "timestep" in given else "t"
        calls.times.append(given.pop(calls.clock))
        for name in ("return_dict", "kv_cache", "kv_cache_mode"):  # of Qwen-Image 2.1
            given.pop(name, None)
        calls.append(given)
        return forward(*args, **kwargs)

    monkeypatch.setattr(denoiser, "forward", recording_forward)
    return calls


def same(a, b) -> bool:
    """Compare through dicts and tuples, tensors within rounding; None is no argument."""
    if isinstance(a, dict):
        a, b = ({k: v for k, v in each.items() if v is not None} for each in (a, b))
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b)
    return a == b


@ALL
@pytest.mark.parametrize(
    ("guidance", "negative"), [(3.0, ""), (3.0, "a dog"), (1.0, ""), (0.0, "")]
)
def test_sampling_from_encoded_captions_is_the_pipeline_on_captions(
    make, family, guidance, negative
):
    captions = CAPTIONS
    if family == "audioldm2":  # reads all captions of a call as if they were equally long
        captions, negative = ["a red apple", "a blue dog"], "a dog ." if guidance > 1 else ""
    if family == "hunyuan_video15":  # and without quotation marks in the negative prompt
        captions = QUOTING
    if family in ("flux", "flux2", "ace_step"):  # guided by an input or a learned vector
        negative = ""
    decoder = make(family, guidance=guidance, negative_prompt=negative)
    media = decoder.sample(decoder.encode_captions(captions), generators=seeded(1, 2))
    outputs = own_outputs(family, decoder, captions, [1, 2], guidance=guidance, negative=negative)
    name = OUTPUTS.get(family, OUTPUT[decoder.modality])
    close(media, np.concatenate([getattr(output, name) for output in outputs]))
    if family in ("ltx2", "kandinsky6"):
        sounds = np.concatenate([np.asarray(output.audio) for output in outputs])
        close([clip.audio for clip in media], sounds)
        assert np.ptp(arrays([clip.audio for clip in media])) > 0.01
    assert np.ptp(arrays(media)) > 0.01  # not all of one value, which would equal anything


@ALL
def test_a_caption_and_guidance_change_what_is_made(make, family):
    decoder = make(family)
    conditions = [decoder.encode_captions([caption]) for caption in CAPTIONS]
    first, second = (arrays(decoder.sample(each, generators=seeded(0))) for each in conditions)
    unguided = arrays(
        decoder.sample(conditions[0], generators=seeded(0), options={"guidance": 1.0})
    )
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(first - unguided).max() > 1e-3


@ALL
def test_a_batch_equals_singles(make, family):
    decoder = make(family)
    condition = decoder.encode_captions(CAPTIONS)
    batch = arrays(decoder.sample(condition, generators=seeded(3, 4)))
    for row, seed in enumerate((3, 4)):
        single = {name: value[row : row + 1] for name, value in condition.items()}
        alone = arrays(decoder.sample(single, generators=seeded(seed)))
        # 1e-4, and one byte where a value lies on the edge between two.
        np.testing.assert_allclose(alone[0], batch[row], rtol=0, atol=1e-4 + 1 / 255)


@ALL
def test_media_have_their_kind_size_and_rate(make, family):
    decoder = make(family)
    medium = decoder.sample(decoder.encode_captions(["a dog"]), generators=seeded(0))[0]
    if isinstance(medium, Image):
        assert medium.to_numpy().shape == (*decoder.size, 3)
    elif isinstance(medium, Video):
        assert medium.to_numpy().shape == (tiny.FRAMES, *decoder.size, 3)
        assert medium.fps == 4.0
    else:
        assert isinstance(medium, Audio)
        assert medium.to_numpy().shape == (1, 2048)
        assert medium.sample_rate == 8000
    assert medium.modality == decoder.modality


@ALL
def test_condition_shapes_need_no_weights_and_are_those_of_captions(make, family):
    decoder = make(family)
    shapes = decoder.condition_shapes
    assert not decoder.is_loaded
    condition = decoder.encode_captions(CAPTIONS)
    assert {name: tuple(value.shape[1:]) for name, value in condition.items()} == shapes
    assert {value.dtype for value in condition.values()} == {torch.float32}
    assert {name: len(value) for name, value in decoder.unconditional(3).items()} == dict.fromkeys(
        shapes, 3
    )
    for sequence, mask in decoder.masks.items():
        assert shapes[mask] == shapes[sequence][:1]
        assert not condition[sequence][condition[mask] == 0].any()
        # Audioldm2: one end token; others: a template before, or after.
        words = {"audioldm2": [4, 6], "qwen_image": [35, 37], "krea2": [9, 11]}
        words |= {
            "qwen_image21": [8, 10],
            "ace_step": [50, 52],
            "nucleus_image": [66, 68],
        }  # the first: of the duration, too
        if mask == "glyph_mask":  # nothing between quotation marks
            words[family] = [0, 0]
        assert condition[mask].sum(1).tolist() == words.get(family, [5, 7])  # a token on each side


@ALL
def test_generation_reads_no_caption(make, family, monkeypatch):
    decoder = make(family)
    condition = decoder.encode_captions(["a dog"])
    monkeypatch.setattr(ModalityDecoder, "encode_captions", None)
    assert len(decoder.sample(condition, generators=seeded(0))) == 1


@ALL
def test_the_loss_calls_the_transformer_as_the_pipeline_does(make, family, monkeypatch):
    decoder = make(family, guidance=0.0)
    calls = spy(family, decoder, monkeypatch)
    condition = decoder.encode_captions(CAPTIONS)
    decoder.sample(condition, generators=seeded(0, 1))
    latents, noising = training_inputs(decoder)
    decoder.denoising_loss(condition, latents, **noising)
    num = 2 if decoder.samples_one_by_one else 1
    assert len(calls) == 5 * num
    for call, times in zip(calls, calls.times, strict=True):
        for twice in ("sigma", "timestep_r"):  # of LTX-2 and ACE-Step
            assert torch.equal(call.pop(twice, times), times)
    assert all(map(same, calls[4 * num :], calls[: 4 * num : 4]))


@ALL
def test_the_loss_is_the_training_formula_of_diffusers(make, family, monkeypatch):
    decoder, dialect = make(family), tiny.dialect(family)
    pipeline, scheduler = decoder.pipeline, decoder.pipeline.scheduler
    calls = spy(family, decoder, monkeypatch)
    condition = decoder.encode_captions(CAPTIONS)
    latents, noising = training_inputs(decoder)
    losses = decoder.denoising_loss(condition, latents, **noising)
    noise, times = noising.values()
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas"):
        wide = times.view(-1, *[1] * (latents.ndim - 1))
        noisy, clock = torch.lerp(latents, noise, wide), times * 1000
        targets = {"flow_prediction": noise - latents, "sample": latents}
    else:
        if "CogVideoX" not in type(scheduler).__name__:  # Euler's own are another path
            scheduler = DDPMScheduler.from_config(scheduler.config)
        clock = (times * 1000).long()
        noisy = scheduler.add_noise(latents, noise, clock)
        targets = {
            "epsilon": noise,
            "v_prediction": scheduler.get_velocity(latents, noise, clock),
            "sample": latents,
        }
    inputs = torch.cat([dialect.read(*given.values()) for given in calls.noisy])
    time = torch.cat([dialect.clock(times) for times in calls.times])
    torch.testing.assert_close(inputs, dialect.pack(pipeline, noisy))
    torch.testing.assert_close(time.view(2, -1)[:, 0].float(), clock.float())
    model = tiny.denoiser(pipeline)
    answers = []
    for call, given, times in zip(list(calls), list(calls.noisy), list(calls.times), strict=True):
        answered = model(**call, **given, **{calls.clock: times}, return_dict=False)
        answers.append(dialect.answer(*answered[: len(given)]))
    predicted = torch.cat(answers)
    errors = (predicted - dialect.pack(pipeline, targets[kind])).square()
    torch.testing.assert_close(losses, errors.flatten(1).mean(1))


def test_large_pixart_models_get_their_resolution_and_predict_a_variance(
    make, tmp_path, monkeypatch
):
    """PixArt-XL at 1024 px: `sample_size` 128 adds two conditions, half the channels are variance,
    the noise path is an ordinary one."""
    pipeline = tiny.pixart_pipeline()
    settings = dict(pipeline.transformer.config) | {
        "sample_size": 128,
        "attention_head_dim": 12,  # three embeddings share the width of 2 heads
        "cross_attention_dim": 24,
        "patch_size": 32,
        "out_channels": 6,
        "use_additional_conditions": True,
    }
    pipeline.transformer = PixArtTransformer2DModel.from_config(settings)
    pipeline.scheduler = DPMSolverMultistepScheduler()
    pipeline.save_pretrained(tmp_path)
    decoder = config.build(dataclasses.replace(make("image").config, weights=str(tmp_path)))
    calls = spy("image", decoder, monkeypatch)
    condition = decoder.encode_captions(["a dog"])
    media = decoder.sample(condition, generators=seeded(0), options={"guidance": 1.0})
    assert media[0].to_numpy().shape == (256, 256, 3)
    latents, noising = training_inputs(decoder, 1)
    losses = decoder.denoising_loss(condition, latents, **noising)
    assert same(calls[-1], calls[0])
    added = calls[-1]["added_cond_kwargs"]
    assert added["resolution"].tolist() == [[256.0, 256.0]]
    assert added["aspect_ratio"].tolist() == [[1.0]]
    predicted = decoder.pipeline.transformer(
        **calls[-1], **calls.noisy[-1], timestep=calls.times[-1], return_dict=False
    )[0]
    torch.testing.assert_close(losses[0], (predicted[:, :3] - noising["noise"]).square().mean())


@ALL
def test_half_precision_samples_and_trains(make, family):
    decoder = make(family).to("cpu", torch.bfloat16)
    exact = make(family)
    latents, noising = training_inputs(exact)
    condition = decoder.encode_captions(CAPTIONS)
    losses = decoder.denoising_loss(condition, latents, **noising)
    assert losses.dtype == condition["prompt_embeds"].dtype == torch.float32
    torch.testing.assert_close(
        losses, exact.denoising_loss(condition, latents, **noising), rtol=0.05, atol=0.02
    )
    made = arrays(decoder.sample(condition, generators=seeded(0, 1)))
    assert np.isfinite(made).all()
    assert made.shape == arrays(exact.sample(condition, generators=seeded(0, 1))).shape


@ALL
def test_loading_shows_nothing_and_hides_no_other_warning(make, family, capfd, caplog):
    assert make(family).pipeline is not None
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert not caplog.records
    assert diffusers_logging.is_progress_bar_enabled()


@ALL
def test_the_gradient_reaches_the_condition_and_no_weight(make, family):
    decoder = make(family)
    latents, noising = training_inputs(decoder)
    condition = {
        name: value.clone().requires_grad_()
        for name, value in decoder.encode_captions(QUOTING).items()
    }
    losses = decoder.denoising_loss(condition, latents, **noising)
    assert losses.shape == (2,)
    losses[0].backward()
    for name in condition.keys() - set(decoder.masks.values()):
        embeds = condition[name].grad
        assert embeds[0].abs().max() > 0
        assert not embeds[1].any()  # the losses are per sample
    for mask in decoder.masks.values():
        assert condition[mask].grad is not None
        assert not condition[mask].grad.any()
    parts = [part for part in decoder.pipeline.components.values() if hasattr(part, "parameters")]
    parameters = [parameter for part in parts for parameter in part.parameters()]
    assert len(parameters) > 20
    assert all(p.grad is None and not p.requires_grad for p in parameters)


@ALL
def test_the_loss_trains_after_a_pipeline_was_loaded_in_inference_mode(make, family):
    decoder = make(family)
    with torch.inference_mode():
        decoder.sample(decoder.encode_captions(["a dog"]), generators=seeded(0))
    latents, noising = training_inputs(decoder)
    condition = {name: torch.randn(2, *s) for name, s in decoder.condition_shapes.items()}
    condition["prompt_embeds"].requires_grad_()
    decoder.denoising_loss(condition, latents, **noising).sum().backward()
    assert condition["prompt_embeds"].grad.any()


@ALL
def test_losses_of_a_batch_are_those_of_its_items(make, family):
    decoder = make(family)
    latents, noising = training_inputs(decoder)
    condition = decoder.encode_captions(CAPTIONS)
    together = decoder.denoising_loss(condition, latents, **noising)
    alone = [
        decoder.denoising_loss(
            {name: value[row : row + 1] for name, value in condition.items()},
            latents[row : row + 1],
            **{name: value[row : row + 1] for name, value in noising.items()},
        )
        for row in range(2)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


@ALL
def test_a_cancelled_run_leaves_the_decoder_as_new(make, family):
    decoder = make(family, steps=5)
    condition = decoder.encode_captions(["a dog"])
    seen = []

    def stop_at_two(step: int, steps: int) -> None:
        seen.append((step, steps))
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        decoder.sample(condition, generators=seeded(0), on_step=stop_at_two)
    assert seen == [(1, 5), (2, 5)]
    again = decoder.sample(condition, generators=seeded(0), on_step=lambda *at: seen.append(at))
    assert seen[2:] == [(step, 5) for step in range(1, 6)]
    fresh = make(family, steps=5).sample(condition, generators=seeded(0))
    assert np.array_equal(arrays(again), arrays(fresh))


@pytest.mark.parametrize("family", ["image", "audio"])
def test_predicted_masks_count_as_zero_or_one(make, family):
    decoder = make(family)
    mask = decoder.masks["prompt_embeds"]
    soft = decoder.encode_captions(["a dog"])
    hard = dict(soft)
    soft[mask] = torch.tensor([[0.6, 0.9, 0.4, 0.7, 0.1, -0.3, 0.2, 0.5]])
    hard[mask] = torch.tensor([[1.0, 1, 0, 1, 0, 0, 0, 0]])
    empty, single = dict(soft), dict(soft)
    empty[mask], single[mask] = soft[mask] / 10, torch.tensor([[0.0, 1, 0, 0, 0, 0, 0, 0]])
    latents, noising = training_inputs(decoder, 1)
    for predicted, expected in ((soft, hard), (empty, single)):
        assert np.array_equal(
            arrays(decoder.sample(predicted, generators=seeded(0))),
            arrays(decoder.sample(expected, generators=seeded(0))),
        )
        assert torch.equal(
            decoder.denoising_loss(predicted, latents, **noising),
            decoder.denoising_loss(expected, latents, **noising),
        )


def test_ltx2_fills_a_predicted_mask_up_to_the_end(make):
    """Its pipeline takes captions that are padded on the left, and reads wrong ones otherwise."""
    decoder = make("ltx2")
    holes = decoder.encode_captions(["a blue dog runs ."])
    filled = dict(holes)
    holes["prompt_attention_mask"] = torch.tensor([[0.0, 0, 1, 0, 0, 1, 0, 0]])
    filled["prompt_attention_mask"] = torch.tensor([[0.0, 0, 1, 1, 1, 1, 1, 1]])
    latents, noising = training_inputs(decoder, 1)
    losses = [decoder.denoising_loss(each, latents, **noising) for each in (holes, filled)]
    torch.testing.assert_close(*losses)


def test_ltx2_hears_the_sound_of_a_clip(make):
    decoder, clip = make("ltx2"), tiny.medium("video")
    tone = Audio.from_numpy(tiny.medium("audio").to_numpy().repeat(5, axis=1), 8000)
    wrong = dataclasses.replace(clip, audio=tone)
    silent, loud = (decoder.encode_media(decoder.preprocess(c)[None]) for c in (clip, wrong))
    assert torch.equal(silent[:, :384], loud[:, :384])  # the pictures
    assert (silent[:, 384:] - loud[:, 384:]).abs().max() > 1e-3
    assert silent.shape[1] - 384 == decoder.audio_length * 4


def test_kinds_of_guidance_of_ltx2_are_its_pipelines(make):
    changes = {"audio_guidance_scale": 2.0, "modality_scale": 1.0, "stg_scale": 0.0}
    decoder = make("ltx2", **changes)
    media = decoder.sample(decoder.encode_captions(CAPTIONS), generators=seeded(1, 2))
    call = {**CALL["ltx2"], "generator": seeded(1, 2), "num_inference_steps": 4}
    scales = {"guidance_scale": 3.0, "audio_guidance_scale": 2.0, "modality_scale": 1.0}
    scales |= {"audio_modality_scale": 1.0, "stg_scale": 0.0, "audio_stg_scale": 0.0}
    close(media, decoder.pipeline(CAPTIONS, **scales, **call, output_type="np").frames)
    plain = make("ltx2").sample(decoder.encode_captions(CAPTIONS), generators=seeded(1, 2))
    assert np.abs(arrays(media) - arrays(plain)).max() > 1e-3
    with pytest.raises(ConfigError, match=r"stg_block: expected .* 0 to 1, got 28"):
        make("ltx2", stg_block=28)
    with pytest.raises(ConfigError, match="max_caption_tokens: expected a multiple of 8"):
        make("ltx2", max_caption_tokens=12)


def test_published_audioldm2_folders_hold_a_bare_gpt2(make, tmp_path):
    decoder = make("audioldm2")
    pipeline = tiny.load(decoder.folder)
    pipeline.language_model = pipeline.language_model.transformer
    pipeline.save_pretrained(tmp_path)
    bare = make("audioldm2", weights=str(tmp_path))
    assert bare.component_config("language_model")["architectures"] == ["GPT2Model"]
    expected = decoder.encode_captions(CAPTIONS)
    for name, value in bare.encode_captions(CAPTIONS).items():
        torch.testing.assert_close(value, expected[name])


def test_true_guidance_of_flux_is_its_pipelines(make):
    decoder = make("flux", true_cfg_scale=2.0, negative_prompt="a dog")
    media = decoder.sample(decoder.encode_captions(CAPTIONS), generators=seeded(1, 2))
    call = {**CALL["flux"], "negative_prompt": ["a dog"] * 2, "generator": seeded(1, 2)}
    call |= {"guidance_scale": 3.5, "num_inference_steps": 4, "output_type": "np"}
    close(media, decoder.pipeline(CAPTIONS, true_cfg_scale=2.0, **call).images)
    plain = make("flux").sample(decoder.encode_captions(CAPTIONS), generators=seeded(1, 2))
    assert np.abs(arrays(media) - arrays(plain)).max() > 1e-3


def test_a_shorter_sound_caption_is_padded_as_its_pipeline_pads(make):
    decoder = make("audio", max_caption_tokens=5)
    caption = "a red apple"  # five tokens of the eight that the pipeline reads
    media = decoder.sample(decoder.encode_captions([caption]), generators=seeded(1))
    pipeline = decoder.pipeline
    expected = pipeline([caption], guidance_scale=3.0, num_inference_steps=4, generator=seeded(1))
    close(media, expected.audios.numpy())


def test_a_sound_has_the_seconds_that_were_configured(folders):
    settings = tiny.configs(folders)["audio"]
    decoder = config.build(dataclasses.replace(settings, seconds=0.1))
    sound = decoder.sample(decoder.encode_captions(["a dog"]), generators=seeded(0))[0]
    assert sound.to_numpy().shape == (1, 800)
    samples = decoder.preprocess(tiny.medium("audio"))
    assert samples.shape == (1, 2048)
    assert samples[:, :800].any()
    assert not samples[:, 800:].any()


def test_preprocessing_brings_media_to_the_codecs_size(make):
    wide = np.zeros((20, 40, 3), dtype=np.uint8)
    wide[:, 10:30] = 255  # the central square is white, all else black
    picture = make("image").preprocess(Image.from_numpy(wide))
    assert picture.shape == (3, tiny.SIZE, tiny.SIZE)
    assert torch.equal(picture[:, :, 1:-1], torch.ones(3, tiny.SIZE, tiny.SIZE - 2))
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.full((20, 40, 3), 20, np.uint8)
    clip = make("video").preprocess(Video.from_numpy(frames, fps=8))
    assert clip.shape == (3, tiny.FRAMES, tiny.SIZE, tiny.SIZE)
    levels = (clip[0, :, 0, 0] + 1) * 127.5 / 20
    torch.testing.assert_close(levels, torch.tensor([1.0, 3, 5, 7, 9]))
    stereo = np.stack([np.full(16_000, 0.5), np.zeros(16_000)]).astype(np.float32)
    wave = make("audio").preprocess(Audio.from_numpy(stereo, 16_000))
    assert wave.shape == (1, 2048)
    torch.testing.assert_close(wave[0, 500:1500], torch.full((1000,), 0.25), atol=0.01, rtol=0)


def test_fingerprints_follow_content_not_place(folders, tmp_path):
    decoders = {key: config.build(entry) for key, entry in tiny.configs(folders).items()}
    prints = {key: decoder.fingerprint for key, decoder in decoders.items()}
    assert len(set(prints.values())) == 3
    moved = tmp_path / "elsewhere"
    moved.symlink_to(folders["image"], target_is_directory=True)
    entry = tiny.configs(folders, steps=9)["image"]
    entry = dataclasses.replace(entry, weights=str(moved))
    assert config.build(entry).fingerprint == prints["image"]
    longer = dataclasses.replace(entry, max_caption_tokens=7)
    assert config.build(longer).fingerprint != prints["image"]


def test_each_bad_input_has_its_own_error(make, folders, tmp_path):
    decoder = make("image")
    condition = decoder.encode_captions(CAPTIONS)
    with pytest.raises(ValueError, match="a generator missing"):
        decoder.sample(condition, generators=seeded(0))
    with pytest.raises(ValueError, match="no captions"):
        decoder.encode_captions([])
    with pytest.raises(MediaError, match="image decoder cannot take"):
        decoder.preprocess(tiny.medium("audio"))
    with pytest.raises(AssetError, match="model_index"):
        _ = config.build(dataclasses.replace(decoder.config, weights=str(tmp_path))).pipeline
    with pytest.raises(ConfigError, match="steps"):
        DecoderConfig("weights", steps=0)
    video = tiny.configs(folders)["video"]
    with pytest.raises(ConfigError, match="9 would do"):
        config.build(dataclasses.replace(video, frames=10))
    with pytest.raises(ConfigError, match="height: expected a multiple of 16"):
        config.build(dataclasses.replace(video, height=20))


@ALL
def test_a_folder_of_another_pipeline_is_refused(make, folders, family):
    other = folders["sana" if family == "stable_diffusion" else "stable_diffusion"]
    found = json.loads((other / "model_index.json").read_text())["_class_name"]
    expected = json.loads((folders[family] / "model_index.json").read_text())["_class_name"]
    with pytest.raises(AssetError, match=f"holds a {found}, .* takes .*{expected}"):
        make(family, weights=str(other))


def test_an_incomplete_or_pickled_folder_is_refused(make, folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "sdxl")
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(AssetError, match=r"text_encoder_2 \(CLIPTextModel.*\) is missing"):
        make("sdxl", weights=str(folder))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": [None, None]}))
    with pytest.raises(AssetError, match="needs the pipeline's text_encoder_2"):
        _ = make("sdxl", weights=str(folder)).condition_shapes

    folder = shutil.copytree(folders["sd3"], tmp_path / "sd3")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(AssetError, match="transformer: holds pickled weights only"):
        make("sd3", weights=str(folder))
    weights.with_suffix(".bin").rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(AssetError, match="cannot be loaded"):
        _ = make("sd3", weights=str(folder)).pipeline


@ALL
def test_a_condition_of_another_shape_is_refused_with_both_shapes(make, family):
    decoder = make(family)
    condition = decoder.encode_captions(CAPTIONS)
    right = tuple(condition["prompt_embeds"].shape)
    wrong = condition | {"prompt_embeds": condition["prompt_embeds"][..., :-1]}
    message = rf"{re.escape(str(right))}.*{re.escape(str(decoder.folder))}.*{right[-1] - 1}\)"
    with pytest.raises(ValueError, match=message):
        decoder.sample(wrong, generators=seeded(0, 1))
    latents, noising = training_inputs(decoder)
    with pytest.raises(ValueError, match=message):
        decoder.denoising_loss(wrong, latents, **noising)


def test_settings_that_a_pipeline_would_not_keep_are_refused(make):
    for family, unit in {"stable_diffusion": 8, "sd3": 4, "flux": 4, "ltx": 32, "sana": 32}.items():
        with pytest.raises(ConfigError, match=f"height: expected a multiple of {unit}, got 19"):
            make(family, height=19)
    for family, would in {"ltx": 9, "cogvideox": 11}.items():
        with pytest.raises(ConfigError, match=f"{would} would do"):
            make(family, frames=10)
    with pytest.raises(ConfigError, match="seconds: expected more than 0"):
        make("audioldm", seconds=0.0)
    with pytest.raises(ConfigError, match="seconds: expected at least 0"):
        make("audioldm", seconds=0.001)
    with pytest.raises(ConfigError, match="fps: expected more than 0"):
        make("text_to_video", fps=0.0)
    with pytest.raises(ConfigError, match=r"'lcm' cannot take the place of .* euler, dpm"):
        make("sd3", scheduler="lcm")
    for family in ("flux", "flux2"):
        with pytest.raises(ConfigError, match="negative_prompt: "):
            make(family, negative_prompt="a dog")
    with pytest.raises(ConfigError, match=r"those that can: dpm.., unipc$"):
        make("image", scheduler="euler")  # predicts samples, which Euler's flow solver cannot take
    with pytest.raises(ConfigError, match=r"those that can: euler$"):
        make("ltx", scheduler="unipc")
    with pytest.raises(ConfigError, match=r"CogVideoXDDIMScheduler .* ddim, dpm"):
        make("cogvideox", scheduler="euler")


@pytest.mark.parametrize("family", ["audioldm", "audioldm2"])
def test_mel_spectrograms_are_those_of_librosas_formula(make, family):
    """A second of a sine, by numpy: Hann, reflected borders, Slaney's mel scale and areas."""
    decoder = make(family, seconds=1.0)
    times = np.arange(8000) / 8000
    wave = 0.25 * np.sin(2 * np.pi * 440 * times).astype(np.float32)
    mel = decoder.preprocess(Audio.from_numpy(wave, 8000))
    assert mel.shape == (1, decoder.frames, 8) == (1, 126, 8)
    padded = np.pad(2 * wave, (0, 126 * 64 - 8000))  # its peak at 0.5, then whole latents
    padded = np.pad(padded, 128, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    frames = np.stack([padded[at : at + 256] * hann for at in range(0, 126 * 64, 64)])
    magnitudes = np.abs(np.fft.rfft(frames))
    top = 15 + 27 * np.log(4000 / 1000) / np.log(6.4)  # Slaney: linear to 1 kHz, then by ratio
    marks = np.linspace(0, top, 10)
    edges = np.where(marks < 15, marks * 200 / 3, 1000 * np.exp((marks - 15) * np.log(6.4) / 27))
    bins = np.arange(129) * 8000 / 256
    bank = np.stack(
        [
            np.clip(np.minimum((bins - a) / (b - a), (c - bins) / (c - b)), 0, None) * 2 / (c - a)
            for a, b, c in zip(edges, edges[1:], edges[2:], strict=False)
        ]
    )
    expected = np.log(np.clip(magnitudes @ bank.T, 1e-5, None))
    np.testing.assert_allclose(mel[0].numpy(), expected, atol=0.02)


def test_a_hub_id_is_downloaded_as_safetensors(folders, monkeypatch):
    import diffusers

    asked = []

    def download(name: str, **options: object) -> str:
        asked.append((name, options))
        return str(folders["image"])

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    settings = dataclasses.replace(tiny.configs(folders)["image"], weights="someone/pictures")
    assert config.build(settings).condition_shapes["prompt_embeds"] == (tiny.TOKENS, tiny.WIDTH)
    assert asked == [("someone/pictures", {"use_safetensors": True})]


def test_configs_survive_yaml(folders):
    for family in tiny.FAMILIES:
        entry = tiny.entry(family, folders[family])
        assert config.parse_component("decoders", config.dump(entry), "decoders.test") == entry


@pytest.mark.parametrize(("family", "steps"), [("image", 1), ("audio", 0), ("video", 0)])
def test_too_few_steps_are_refused(make, family: str, steps: int) -> None:
    decoder = make(family)
    condition = decoder.encode_captions(["a"])
    with pytest.raises(ConfigError, match="steps: expected at least"):
        decoder.sample(condition, generators=[torch.Generator()], options={"steps": steps})


@pytest.mark.parametrize("family", ["video", "sd3", "z_image"])
def test_a_picture_may_be_as_wide_as_the_table_of_positions(make, family):
    """The largest width works; a larger one is refused by name."""
    decoder = make(family, steps=2)
    widest = decoder.max_side
    unit = math.gcd(widest, *decoder.size)
    condition = decoder.encode_captions(CAPTIONS[:1])
    options = {"height": unit, "frames": 1} if family == "video" else {"height": unit}
    (medium,) = decoder.sample(
        condition, generators=seeded(0), options={"width": widest, **options}
    )
    assert medium.to_numpy().shape[-3:-1] == (unit, widest)
    assert decoder.with_overrides(width=widest).output_spec()["width"] == widest
    for name in ("width", "height"):
        with pytest.raises(ConfigError, match=f"{name}: expected at most {widest}, got"):
            decoder.with_overrides(**{name: widest + unit})


def test_a_clip_may_be_as_long_as_the_table_of_positions(make):
    decoder = make("video", steps=2)
    most = decoder.max_frames
    condition = decoder.encode_captions(CAPTIONS[:1])
    size = {"height": 32, "width": 32}
    (clip,) = decoder.sample(condition, generators=seeded(0), options={"frames": most, **size})
    assert len(clip.to_numpy()) == most
    with pytest.raises(ConfigError, match=f"frames: expected at most {most}, got {most + 4}"):
        decoder.with_overrides(frames=most + 4)


@pytest.mark.parametrize("family", ["audioldm", "audioldm2", "audio"])
def test_sounds_are_as_long_as_a_call_asks(make, family):
    decoder = make(family, steps=2)
    condition = decoder.encode_captions(CAPTIONS[:1])
    own = decoder.output_spec()["seconds"]
    for seconds in (own, own / 2):
        assert decoder.with_overrides(seconds=seconds).output_spec()["seconds"] == seconds
        (sound,) = decoder.sample(condition, generators=seeded(0), options={"seconds": seconds})
        samples = sound.to_numpy().shape[1]
        assert samples == pytest.approx(seconds * sound.sample_rate, rel=0.3)
    assert decoder.output_spec()["seconds"] == own, "the call is over"
    for seconds, message in ((1e-9, "at least"), (601.0, "at most"), (float("nan"), "finite")):
        with pytest.raises(ConfigError, match=f"seconds: expected (a )?{message}"):
            decoder.with_overrides(seconds=seconds)


def test_a_call_that_is_being_made_changes_no_other(make):
    """Its settings are those of the config, not of another call that runs."""
    decoder = make("video", steps=2)
    own, condition = decoder.config, decoder.encode_captions(CAPTIONS[:1])
    seen = []
    decoder.sample(
        condition,
        generators=seeded(0),
        on_step=lambda *_: seen.append((decoder.config, decoder.output_spec())),
        options={"guidance": 7.0, "frames": 5, "height": 32, "width": 64},
    )
    assert seen == [(own, decoder.output_spec())] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0.01}, "at most 120 s"),
        ({"fps": 1000.0, "frames": 1}, "0 latents"),
        ({"steps": 2.5}, "steps: expected a whole number"),
        ({"steps": "3"}, "steps: expected a whole number"),
        ({"guidance": float("nan")}, "guidance: expected a finite number"),
        ({"frames": 4097}, "frames: expected at most 4096"),
        ({"width": 8224}, "width: expected at most 8192"),
    ],
)
def test_numbers_at_the_edge_are_refused_before_anything_is_made(make, options, message):
    with pytest.raises(ConfigError, match=message):
        make("ltx2").with_overrides(**options)


def test_the_example_of_a_family(make, folders, monkeypatch, tmp_path):
    """The file and the entry that docs/decoders.md shows, against the family in the package."""
    page = (Path(__file__).parents[2] / "docs" / "decoders.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:python|yaml)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (source,) = (block for block in blocks if "my_decoder.py" in block)
    (entry,) = (yaml.safe_load(block) for block in blocks if "my_decoder:MyConfig" in block)
    (tmp_path / "my_decoder.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    entry = entry["decoders"]["image"] | {"weights": str(folders["stable_diffusion"])}
    own = config.build(config.parse_component("decoders", entry, "decoders.image"))
    shipped = make("stable_diffusion", steps=4, guidance=7.5)
    assert own.condition_shapes == shipped.condition_shapes
    conditions = [decoder.encode_captions(CAPTIONS) for decoder in (own, shipped)]
    torch.testing.assert_close(*conditions)
    init = [tiny.medium("image", seed) for seed in range(2)]
    for media in (None, init):
        made, expected = (
            arrays(decoder.sample(conditions[1], generators=seeded(1, 2), init_media=media))
            for decoder in (own, shipped)
        )
        assert np.array_equal(made, expected)
    latents, noising = training_inputs(own)
    losses = [each.denoising_loss(conditions[1], latents, **noising) for each in (own, shipped)]
    assert torch.equal(*losses)


def test_a_call_may_bring_its_scheduler_before_anything_is_loaded(make):
    condition = make("stable_diffusion").encode_captions(CAPTIONS[:1])
    fresh, configured = make("stable_diffusion"), make("stable_diffusion", scheduler="dpm++")
    made = fresh.sample(condition, generators=seeded(0), options={"scheduler": "dpm++"})
    assert np.array_equal(arrays(made), arrays(configured.sample(condition, generators=seeded(0))))
    assert type(fresh.pipeline.scheduler) is type(make("stable_diffusion").pipeline.scheduler)


def test_former_names_of_options_are_understood(make, caplog):
    decoder = make("stable_diffusion").with_overrides(negative="blurry", source="last")
    assert (decoder.config.negative_prompt, decoder.config.init_media) == ("blurry", "last")
