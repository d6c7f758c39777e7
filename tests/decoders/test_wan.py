"""Wan from pictures and videos: all kinds of `WanImageToVideoPipeline`, and `WanVACEPipeline`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mmllm import config
from mmllm.conversation import Image, Video, user
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.decoders.networks import meta_components
from mmllm.decoders.schedules import add_training_noise
from mmllm.errors import ConfigError, MediaError
from mmllm.inference.editing import resolve_sources
from tests.decoders import tiny
from tests.decoders.comparing import CALL, CAPTIONS, arrays, as_taken, close, seeded

I2V = {
    "2.1": {"with_image_encoder": True},
    "2.1 with a last frame": {"with_image_encoder": True, "num_pictures": 2},
    "one transformer": {},
    "2.2": {"boundary_ratio": 0.9},
    "2.2 with times per token": {"expand_timesteps": True},
}
"""Kind of folder in tests -> how its pipeline is made."""
KINDS = pytest.mark.parametrize("kind", I2V)
TRAINED = ("2.1", "2.1 with a last frame", "one transformer")
"""Those that have a denoising loss."""


@pytest.fixture(scope="session")
def i2v_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("i2v")
    with torch.random.fork_rng(devices=[]):
        for number, options in enumerate(I2V.values()):
            torch.manual_seed(0)
            tiny.wan_i2v_pipeline(**options).save_pretrained(root / str(number))
    return {kind: root / str(number) for number, kind in enumerate(I2V)}


@pytest.fixture
def animate(i2v_folders):
    def build(kind: str, **changes) -> ModalityDecoder:
        tokens = 512 if "with_image_encoder" in I2V[kind] else tiny.TOKENS
        tree = {**tiny.CLIPS, "max_caption_tokens": tokens, "steps": 4, **changes}
        tree |= {"type": "wan_i2v", "weights": str(i2v_folders[kind])}
        return config.build(config.parse_component("decoders", tree, "decoders.video"))

    return build


def pictures(*seeds: int) -> list[Image]:
    return [tiny.medium("image", seed) for seed in seeds]


def given(decoder: ModalityDecoder) -> list[list[Image]]:
    """Of two videos as few and as many pictures as the decoder takes."""
    return [
        pictures(*range(decoder.min_references)),
        pictures(*range(2, 2 + decoder.max_references)),
    ]


def recorded(decoder: ModalityDecoder, monkeypatch) -> list:
    """Arguments and answers of the transformer from now on."""
    transformer, calls = decoder.pipeline.transformer, []
    forward = transformer.forward

    def recording(**arguments):
        calls.append((arguments, *forward(**arguments)))
        return calls[-1][1:]

    monkeypatch.setattr(transformer, "forward", recording)
    return calls


def as_latents(decoder: ModalityDecoder, references: list[Image]) -> torch.Tensor:
    return decoder.encode_media(torch.stack([decoder.preprocess(each) for each in references]))


def noisy_clips(decoder: ModalityDecoder, num: int = 2) -> tuple[torch.Tensor, dict]:
    clips = [decoder.preprocess(tiny.medium("video", seed)) for seed in range(num)]
    latents = decoder.encode_media(torch.stack(clips))
    noise = torch.randn(latents.shape, generator=seeded(0)[0])
    return latents, {"noise": noise, "times": torch.linspace(0.2, 0.8, num)}


@KINDS
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_a_video_from_pictures_is_the_pipelines_own(animate, kind, guidance):
    decoder = animate(kind, guidance=guidance)
    references = given(decoder)
    condition = decoder.encode_captions(CAPTIONS)
    made = decoder.sample(condition, generators=seeded(1, 2), references=references)
    own = tiny.load(decoder.folder)
    call = CALL["video"] | {"max_sequence_length": decoder.config.max_caption_tokens}
    for row, (caption, frames) in enumerate(zip(CAPTIONS, references, strict=True)):
        images = dict(
            zip(("image", "last_image"), [each.to_pil() for each in frames], strict=False)
        )
        expected = own(
            prompt=[caption],
            **images,
            **call,
            guidance_scale=guidance,
            num_inference_steps=4,
            generator=seeded(row + 1)[0],
            output_type="np",
        ).frames
        close(made[row : row + 1], expected)
        single = {name: value[row : row + 1] for name, value in condition.items()}
        alone = decoder.sample(single, generators=seeded(row + 1), references=[frames])
        assert np.array_equal(arrays(alone)[0], arrays(made)[row])
    assert np.ptp(arrays(made)) > 0.01


def test_the_second_transformer_has_a_guidance_of_its_own(animate):
    """The steps of 4 that the second of two transformers makes are guided as diffusers does."""
    decoder = animate("2.2", guidance=3.0, guidance_2=1.5)
    (picture,) = pictures(0)
    condition = decoder.encode_captions(["a dog"])
    made = decoder.sample(condition, generators=seeded(0), references=[[picture]])
    calls = CALL["video"] | {"guidance_scale": 3.0, "num_inference_steps": 4}
    own = tiny.load(decoder.folder)
    expected = own(
        picture.to_pil(),
        "a dog",
        **calls,
        guidance_scale_2=1.5,
        generator=seeded(0)[0],
        output_type="np",
    )
    close(made, expected.frames)
    alike = animate("2.2", guidance=3.0).sample(
        condition, generators=seeded(0), references=[[picture]]
    )
    assert np.abs(arrays(alike)[0] - arrays(made)[0]).max() > 1e-3
    with pytest.raises(ConfigError, match=r"guidance_2: the pipeline in .* has one transformer"):
        animate("2.1", guidance_2=1.5)


@KINDS
def test_each_picture_changes_the_video(animate, kind):
    decoder = animate(kind)
    condition, num = decoder.encode_captions(["a dog"]), decoder.max_references
    chosen = [pictures(*range(num)), pictures(*range(1, num + 1)), pictures(*range(num))[::-1]]
    made = [
        arrays(decoder.sample(condition, generators=seeded(0), references=[each]))
        for each in (chosen if num > 1 else chosen[:2])
    ]
    for index, one in enumerate(made):
        assert all(np.abs(one - other).max() > 1e-3 for other in made[:index])


@KINDS
def test_without_a_picture_nothing_is_made_and_the_error_names_it(animate, kind):
    decoder = animate(kind)
    condition = decoder.encode_captions(["a dog"])
    missing = "WanImageToVideoPipeline needs a picture, and there is none: put one into"
    with pytest.raises(ConfigError, match=missing):
        decoder.sample(condition, generators=seeded(0))
    with pytest.raises(ConfigError, match="makes media from noise alone"):
        decoder.sample(condition, generators=seeded(0), init_media=pictures(0))
    num = decoder.max_references
    with pytest.raises(ConfigError, match=rf"takes at most {num} reference\(s\), got {num + 1}"):
        decoder.sample(condition, generators=seeded(0), references=[pictures(*range(num + 1))])
    if decoder.min_references > 1:
        with pytest.raises(ConfigError, match=r"takes at least 2 references by the .* got 1"):
            decoder.sample(condition, generators=seeded(0), references=[pictures(0)])


def test_the_picture_is_that_of_the_conversation(animate):
    """By the rule of all references; without one the reply is text, unless it must be a video."""
    decoder = animate("2.1")
    (first,) = pictures(0)
    turn = [user("make it run", first)]
    sources = resolve_sources(decoder, "video", "tiny", turn, {})
    assert np.array_equal(sources.references[0].to_numpy(), first.to_numpy())
    nothing = resolve_sources(decoder, "video", "tiny", [user("a dog")], {})
    assert nothing.lacks_references
    assert nothing.notes == (
        "the decoder needs a picture, and there is none: it could make nothing",
    )
    with pytest.raises(ConfigError, match="needs a picture, and there is none"):
        resolve_sources(decoder, "video", "tiny", [user("a dog")], {}, is_forced=True)
    assert "references" in decoder.request_options
    assert {"init_media", "strength", "mask"}.isdisjoint(decoder.request_options)


@pytest.mark.parametrize("kind", TRAINED)
def test_the_loss_gives_the_frames_as_sampling_does(animate, kind, monkeypatch):
    """The pipeline's first call of its transformer, and ours with the same noise and time."""
    decoder = animate(kind, guidance=1.0)
    references = given(decoder)[1]
    condition = decoder.encode_captions(["a dog"])
    calls = recorded(decoder, monkeypatch)
    decoder.sample(condition, generators=seeded(0), references=[references])
    (arguments, answer), *_ = calls
    noise = arguments["hidden_states"][:, :4]
    with torch.no_grad():
        made = decoder.denoise_with_references(
            decoder.prepare_condition(condition),
            noise,
            arguments["timestep"],
            as_latents(decoder, references),
        )
    again, other = calls[-1]
    assert len(calls) == 5
    for name in ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_image"):
        assert (again[name] is None) == (arguments[name] is None)
        if again[name] is not None:
            torch.testing.assert_close(again[name], arguments[name], rtol=0, atol=1e-4)
    assert (again["encoder_hidden_states_image"] is None) == (kind == "one transformer")
    torch.testing.assert_close(other, answer, rtol=0, atol=1e-4)
    assert made.shape == noise.shape


@pytest.mark.parametrize("kind", TRAINED)
def test_the_loss_of_a_batch_is_that_of_its_videos_by_the_formula(animate, kind, monkeypatch):
    decoder = animate(kind)
    latents, noising = noisy_clips(decoder)
    references = [as_latents(decoder, each) for each in given(decoder)]
    condition = {
        name: value.clone().requires_grad_()
        for name, value in decoder.encode_captions(CAPTIONS).items()
    }
    calls = recorded(decoder, monkeypatch)
    losses = decoder.denoising_loss(condition, latents, **noising, references=references)
    predicted = torch.cat([answer for _, answer in calls])
    errors = (predicted - (noising["noise"] - latents)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, errors)
    single = decoder.denoising_loss(
        {name: value[1:] for name, value in condition.items()},
        latents[1:],
        **{name: value[1:] for name, value in noising.items()},
        references=references[1:],
    )
    torch.testing.assert_close(single, losses[1:], rtol=0, atol=1e-5)
    losses[0].backward()
    gradient = condition["prompt_embeds"].grad
    assert gradient[0].abs().max() > 0
    assert not gradient[1].any()


def test_what_has_no_loss_says_so(animate):
    decoder = animate("2.1")
    latents, noising = noisy_clips(decoder, 1)
    condition = decoder.encode_captions(["a dog"])
    with pytest.raises(ConfigError, match="training data has no picture in front of a video"):
        decoder.denoising_loss(condition, latents, **noising)
    for kind in set(I2V) - set(TRAINED):
        decoder = animate(kind)
        latents, noising = noisy_clips(decoder, 1)
        references = [as_latents(decoder, pictures(0))]
        with pytest.raises(ConfigError, match="one transformer and one time per video"):
            decoder.denoising_loss(
                decoder.encode_captions(["a dog"]), latents, **noising, references=references
            )


def test_settings_that_the_weights_do_not_allow_are_refused(animate):
    with pytest.raises(ConfigError, match=r"max_caption_tokens: .* expected 512, got 8"):
        animate("2.1", max_caption_tokens=8)
    with pytest.raises(ConfigError, match="9 would do"):
        animate("2.2", frames=10)
    with pytest.raises(ConfigError, match="height: expected a multiple of 16"):
        animate("2.2", height=20)
    with pytest.raises(ConfigError, match="cache: 'taylorseer' does not work in a WanImageToVideo"):
        animate("2.2", cache="taylorseer")


@KINDS
def test_a_plan_counts_every_network(animate, kind):
    decoder = animate(kind)
    planned = meta_components(decoder.folder)
    networks = {
        name: part
        for name, part in decoder.pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    assert {name: count(part) for name, part in planned.items()} == {
        name: count(part) for name, part in networks.items()
    }
    assert ("image_encoder" in planned) == ("with_image_encoder" in I2V[kind])
    assert ("transformer_2" in planned) == (kind == "2.2")


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@KINDS
def test_a_cache_without_tolerance_and_half_precision(animate, kind):
    decoder = animate(kind)
    condition, references = decoder.encode_captions(CAPTIONS), given(decoder)
    plain = arrays(decoder.sample(condition, generators=seeded(0, 1), references=references))
    strict = animate(kind, cache="first_block", cache_threshold=0.0)
    cached = strict.sample(condition, generators=seeded(0, 1), references=references)
    np.testing.assert_allclose(arrays(cached), plain, rtol=0, atol=1.01 / 255)
    half = animate(kind).to("cpu", torch.bfloat16)
    made = arrays(half.sample(condition, generators=seeded(0, 1), references=references))
    assert np.isfinite(made).all()
    if kind in TRAINED:
        latents, noising = noisy_clips(decoder)
        losses = [
            each.denoising_loss(
                condition,
                latents,
                **noising,
                references=[as_latents(each, own) for own in references],
            )
            for each in (half, decoder)
        ]
        torch.testing.assert_close(*losses, rtol=0.05, atol=0.02)


# --- VACE ----------------------------------------------------------------------------------------


def mask_of_left_half() -> Image:
    pixels = np.zeros((tiny.SIZE, tiny.SIZE, 3), np.uint8)
    pixels[:, : tiny.SIZE // 2] = 255
    return Image.from_numpy(pixels)


def grey_on_the_left(video: Video) -> list:
    frames = video.to_numpy().copy()
    frames[:, :, : tiny.SIZE // 2] = 128
    return Video.from_numpy(frames, 4.0).to_pil()


@pytest.mark.parametrize("num", [0, 1, 2])
@pytest.mark.parametrize("start", ["", "video", "mask"])
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_vace_is_the_pipelines_own(make, num, start, guidance):
    decoder = make("wan_vace", guidance=guidance, conditioning_scale=0.8)
    references, video = pictures(*range(num)), tiny.medium("video", 3)
    made = decoder.sample(
        decoder.encode_captions(CAPTIONS[:1]),
        generators=seeded(1),
        references=[references] if num else None,
        init_media=[video] if start else None,
        masks=[mask_of_left_half()] if start == "mask" else None,
    )
    media: dict = {"reference_images": [each.to_pil() for each in references] or None}
    if start == "video":
        media["video"] = video.to_pil()
    elif start == "mask":
        media["video"] = grey_on_the_left(video)
        media["mask"] = [mask_of_left_half().to_pil().convert("L")] * tiny.FRAMES
    expected = tiny.load(decoder.folder)(
        **as_taken("wan_vace", prompt=CAPTIONS[:1], generator=seeded(1)),
        **media,
        **CALL["wan_vace"],
        conditioning_scale=0.8,
        guidance_scale=guidance,
        num_inference_steps=4,
        output_type="np",
    ).frames.copy()
    if start == "mask":
        half = tiny.SIZE // 2
        expected[0, :, :, half:] = video.to_numpy()[:, :, half:] / 255
        assert np.array_equal(made[0].to_numpy()[:, :, half:], video.to_numpy()[:, :, half:])
    close(made, expected)


def test_vace_puts_the_whole_picture_on_white_as_its_pipeline_does(make):
    decoder = make("wan_vace")
    wide = Image.from_numpy(np.random.default_rng(0).integers(0, 200, (8, 16, 3), dtype=np.uint8))
    *_, own = decoder.pipeline.preprocess_conditions(
        None, None, [wide.to_pil()], 1, *decoder.size, tiny.FRAMES, torch.float32, decoder.device
    )
    torch.testing.assert_close(decoder.preprocess(wide), own[0][0])


def test_a_batch_of_vace_equals_singles(make):
    decoder = make("wan_vace")
    condition, references = decoder.encode_captions(CAPTIONS), [pictures(0), pictures(1, 2)]
    batch = arrays(decoder.sample(condition, generators=seeded(1, 2), references=references))
    for row in range(2):
        single = {name: value[row : row + 1] for name, value in condition.items()}
        alone = decoder.sample(
            single, generators=seeded(row + 1), references=references[row : row + 1]
        )
        assert np.array_equal(arrays(alone)[0], batch[row])


@pytest.mark.parametrize("num", [1, 2])
def test_vace_trains_with_references_as_it_samples(make, num, monkeypatch):
    decoder = make("wan_vace", guidance=1.0)
    references = pictures(*range(num))
    condition = decoder.encode_captions(["a dog"])
    calls = recorded(decoder, monkeypatch)
    decoder.sample(condition, generators=seeded(0), references=[references])
    arguments, answer = calls[0]
    with torch.no_grad():
        decoder.denoise_with_references(
            decoder.prepare_condition(condition),
            arguments["hidden_states"],
            arguments["timestep"],
            as_latents(decoder, references),
        )
    again, other = calls[-1]
    for name in ("control_hidden_states", "control_hidden_states_scale", "encoder_hidden_states"):
        torch.testing.assert_close(again[name], arguments[name], rtol=0, atol=1e-4)
    torch.testing.assert_close(other, answer, rtol=0, atol=1e-4)


def test_the_loss_of_vace_is_of_the_references_too(make, monkeypatch):
    """They stand in front, the last one first, as noisy as the video."""
    decoder = make("wan_vace")
    latents, noising = noisy_clips(decoder)
    given = [as_latents(decoder, pictures(0, 1)), as_latents(decoder, pictures(2))[:0]]
    condition = {
        name: value.clone().requires_grad_()
        for name, value in decoder.encode_captions(CAPTIONS).items()
    }
    calls = recorded(decoder, monkeypatch)
    losses = decoder.denoising_loss(condition, latents, **noising, references=given)
    (arguments, predicted), _ = calls
    noisy = arguments["hidden_states"]
    own = add_training_noise(decoder.pipeline.scheduler, latents, *noising.values())
    torch.testing.assert_close(noisy[:, :, 2:], own.inputs[:1])
    with torch.no_grad():
        clean = [
            decoder.normalize_latents(decoder.encode_latents(picture[None, :, None]))
            for picture in given[0].flip(0)
        ]
    clean = torch.cat([*clean, latents[:1]], dim=2)
    noise = (noisy - 0.8 * clean) / 0.2
    torch.testing.assert_close(noise[:, :, 2:], noising["noise"][:1], rtol=0, atol=1e-4)
    assert 0.5 < noise[:, :, :2].std() < 1.5
    errors = (predicted - (noise - clean)).square().mean()
    torch.testing.assert_close(losses[0], errors, rtol=0, atol=1e-4)
    plain = decoder.denoising_loss(condition, latents, **noising)
    torch.testing.assert_close(losses[1], plain[1], rtol=0, atol=1e-5)
    again = decoder.denoising_loss(condition, latents, **noising, references=given)
    assert torch.equal(again, losses)
    losses.sum().backward()
    assert all(row.abs().max() > 0 for row in condition["prompt_embeds"].grad)


def test_the_loss_of_vace_encodes_no_video_twice(make, monkeypatch):
    decoder = make("wan_vace")
    latents, noising = noisy_clips(decoder)
    condition = decoder.encode_captions(CAPTIONS)
    codec, encoded = decoder.pipeline.vae, []
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda x: (encoded.append(x.shape), encode(x))[1])
    first = decoder.denoising_loss(condition, latents, **noising)
    assert len(encoded) == 2  # of the empty video, what is kept and what is not
    assert torch.equal(decoder.denoising_loss(condition, latents, **noising), first)
    assert len(encoded) == 2


def test_what_vace_does_not_take_is_refused_by_name(make):
    decoder = make("wan_vace")
    condition, video = decoder.encode_captions(["a dog"]), tiny.medium("video")
    call = {"generators": seeded(0)}
    with pytest.raises(ConfigError, match="expected 1 initial media of modality video"):
        decoder.sample(condition, init_media=pictures(0), **call)
    small = Image.from_numpy(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(MediaError, match="mask: expected the size of its video, 16x16, got 8x8"):
        decoder.sample(condition, init_media=[video], masks=[small], **call)
    with pytest.raises(ConfigError, match=r"takes at most 2 reference\(s\), got 3"):
        decoder.sample(condition, references=[pictures(0, 1, 2)], **call)
    with pytest.raises(ConfigError, match="'first_block' does not work in a WanVACEPipeline"):
        make("wan_vace", cache="first_block")
    with pytest.raises(ConfigError, match="mask: there is no video in the conversation"):
        resolve_sources(
            decoder, "video", "tiny", [user("a", *pictures(0))], {"mask": mask_of_left_half()}
        )
    assert "strength" not in decoder.request_options
    with pytest.raises(
        ConfigError, match=r"unknown option 'strength'; this decoder takes .*, mask"
    ):
        decoder.with_overrides(strength=0.5)


def test_the_longest_video_of_vace_has_positions_for_its_references(make):
    """The table of positions has 16 latents in time."""
    frames = {5: 2, 29: 8, 33: 7, 61: 0}
    assert {n: make("wan_vace", frames=n).max_references for n in frames} == frames
    decoder = make("wan_vace", frames=33, steps=2)
    (made,) = decoder.sample(
        decoder.encode_captions(["a dog"]), generators=seeded(0), references=[pictures(*range(7))]
    )
    assert len(made.to_numpy()) == 33


def test_vace_takes_a_video_and_pictures_of_the_conversation(make):
    decoder = make("wan_vace", init_media="last")
    (picture,), video = pictures(0), tiny.medium("video")
    turns = [user("look", video), user("put this in", picture)]
    sources = resolve_sources(decoder, "video", "tiny", turns, {})
    assert sources.init is video
    assert len(sources.references) == 1
    masked = resolve_sources(decoder, "video", "tiny", turns, {"mask": mask_of_left_half()})
    assert masked.kind == (True, True, True)
    plain = resolve_sources(decoder, "video", "tiny", [user("a dog")], {})
    assert plain.kind == (False, False, False)
    assert not plain.lacks_references
    named = dataclasses.replace(decoder.config, references="none")
    assert config.build(named).config.references == "none"
