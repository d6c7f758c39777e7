"""Media that start from a medium, against diffusers' own pipelines that do."""

from __future__ import annotations

import dataclasses

import diffusers
import numpy as np
import pytest
import torch

from mmllm import config
from mmllm.conversation import Image, Video
from mmllm.decoders.contract import Cancelled
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.errors import ConfigError
from tests.decoders import tiny
from tests.decoders.comparing import (
    CALL,
    CAPTIONS,
    OUTPUT,
    arrays,
    as_taken,
    close,
    guiding,
    seeded,
)

PIPELINES = {
    "stable_diffusion": "StableDiffusionImg2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux": "FluxImg2ImgPipeline",
    "qwen_image": "QwenImageImg2ImgPipeline",
    "z_image": "ZImageImg2ImgPipeline",
    "flux2": "Flux2Pipeline",
    "flux2_klein": "Flux2KleinPipeline",
    "ltx": "LTXImageToVideoPipeline",
    "ltx2": "LTX2ImageToVideoPipeline",
    "kandinsky6": "Kandinsky6TI2VAPipeline",
    "wan_image": "WanImageToVideoPipeline",
    "video": "WanVideoToVideoPipeline",
    "wan_vace": "WanVACEPipeline",
    "cogvideox": "CogVideoXVideoToVideoPipeline",
    "text_to_video": "VideoToVideoSDPipeline",
}
"""Family in tests -> what starts from a medium in diffusers."""
NO_SOURCE = (
    *("audio", "audioldm", "audioldm2", "sana", "krea2", "sana_video", "stable_audio3"),
    *("hunyuan_video15", "latte", "kandinsky5", "kandinsky5_video", "ace_step"),
    *("nucleus_image", "qwen_image21"),
)
STARTING = pytest.mark.parametrize("family", [*PIPELINES, "image"])


@pytest.fixture
def build(make, folders, tmp_path):
    """`make`, and of a Wan 2.2 that can hold its first frame still."""

    def build(family: str, **changes) -> ModalityDecoder:
        if family.startswith("flux2"):  # it takes no smaller pictures
            changes = {"height": 64, "width": 64, **changes}
        if family != "wan_image":
            return make(family, **changes)
        if not (tmp_path / "wan_image").is_dir():
            pipeline = tiny.load(folders["video"])
            pipeline.register_to_config(expand_timesteps=True)
            pipeline.save_pretrained(tmp_path / "wan_image")
        return config.build(tiny.entry("video", tmp_path / "wan_image", **changes))

    return build


def source(decoder: ModalityDecoder, seed: int = 0) -> Image | Video:
    """Smooth colours in the decoder's size."""
    rng = np.random.default_rng(seed)
    frames = tiny.FRAMES if decoder.init_modality == "video" else 1
    coarse = rng.integers(20, 235, (frames, 4, 4, 3), dtype=np.uint8)
    height, width = decoder.size
    fine = coarse.repeat(height // 4, axis=1).repeat(width // 4, axis=2)
    return Video.from_numpy(fine, 4.0) if frames > 1 else Image.from_numpy(fine[0])


def test_these_are_all_families_that_start_from_a_medium(make):
    sourced = {family for family in tiny.FAMILIES if make(family).init_modality}
    assert sourced == {*PIPELINES, "image"} - {"wan_image"}
    assert {family for family in tiny.FAMILIES if family not in sourced} == set(NO_SOURCE)


@pytest.mark.parametrize("family", PIPELINES)
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_a_source_is_the_pipelines_own(build, family, guidance):
    decoder = build(family, guidance=guidance)
    media = [source(decoder, seed) for seed in range(2)]
    condition = decoder.encode_captions(CAPTIONS)
    made = decoder.sample(
        condition, generators=seeded(1, 2), init_media=media, options=strong(decoder, 0.7)
    )
    text = tiny.load(decoder.folder)
    # Named, because ours is no class that the pipeline expects.
    pipeline = getattr(diffusers, PIPELINES[family]).from_pipe(text, vae=text.vae)
    for row, (caption, medium) in enumerate(zip(CAPTIONS, media, strict=True)):
        call = dict(CALL.get(family, CALL["video"] if family == "wan_image" else {}))
        call |= {decoder.init_modality: medium.to_pil(), **strong(decoder, 0.7)}
        if family in ("sdxl", "stable_diffusion", "video", "cogvideox", "text_to_video"):
            call.pop("num_frames", None)  # what the source has
        guide = guiding(family, decoder.pipeline, guidance, "")
        for name in guide.keys() & {"negative_prompt"}:
            guide[name] = guide[name][:1]
        if family == "cogvideox":
            call |= tiny.SQUARE
        if family.startswith("flux2"):
            call |= {"height": 64, "width": 64}
        expected = pipeline(
            **as_taken(family, prompt=[caption], **guide),
            **call,
            num_inference_steps=4,
            generator=seeded(row + 1)[0],
            output_type="np",
        )
        close(made[row : row + 1], getattr(expected, OUTPUT[decoder.modality]))
    assert np.ptp(arrays(made)) > 0.01


def strong(decoder: ModalityDecoder, strength: float) -> dict[str, float]:
    """The strength, where the decoder has one."""
    return {"strength": strength} if "strength" in decoder.request_options else {}


@STARTING
def test_a_source_changes_what_is_made_and_no_later_call(build, family):
    decoder = build(family)
    condition = decoder.encode_captions(["a dog"])
    before = arrays(decoder.sample(condition, generators=seeded(0)))
    first, second = (
        arrays(decoder.sample(condition, generators=seeded(0), init_media=[source(decoder, seed)]))
        for seed in range(2)
    )
    assert not np.array_equal(first, second)
    again = arrays(decoder.sample(condition, generators=seeded(0)))
    assert np.array_equal(before, again)


@STARTING
def test_a_batch_of_sources_equals_singles(build, family):
    decoder = build(family)
    condition, media = decoder.encode_captions(CAPTIONS), [source(decoder, 3), source(decoder, 4)]
    batch = arrays(decoder.sample(condition, generators=seeded(3, 4), init_media=media))
    for row in range(2):
        single = {name: value[row : row + 1] for name, value in condition.items()}
        alone = decoder.sample(single, generators=seeded(row + 3), init_media=media[row : row + 1])
        np.testing.assert_allclose(arrays(alone)[0], batch[row], rtol=0, atol=1e-4 + 1 / 255)


@STARTING
def test_a_cancelled_start_leaves_the_decoder_as_new(build, family):
    decoder, seen = build(family, steps=5), []
    condition, start = decoder.encode_captions(["a dog"]), [source(decoder)]

    def stop(step: int, steps: int) -> None:
        seen.append((step, steps))
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        decoder.sample(condition, generators=seeded(0), init_media=start, on_step=stop)
    steps = 3 if strong(decoder, 0.6) else 5
    assert seen == [(1, steps), (2, steps)]
    again = decoder.sample(condition, generators=seeded(0), init_media=start)
    fresh = build(family, steps=5).sample(condition, generators=seeded(0), init_media=start)
    assert np.array_equal(arrays(again), arrays(fresh))


@STARTING
def test_the_second_pipeline_has_no_second_weights(build, family):
    decoder = build(family)
    start = decoder.prepare_img2img([source(decoder)])[0]
    if family == "image":  # its second pipeline is a method of ours
        assert start == decoder.img2img
        return
    own = decoder.pipeline.components
    networks = [n for n, part in start.components.items() if isinstance(part, torch.nn.Module)]
    assert {"vae", "text_encoder"} < set(networks)
    assert all(start.components[name] is own[name] for name in networks)


def test_pixart_at_full_strength_is_text_to_image(make):
    """On a flow path, whose first step is noise alone; for the pipeline itself, see its parity."""
    for changes in ({}, {"scheduler": "unipc"}, {"guidance": 1.0}):
        decoder = make("image", **changes)
        condition = decoder.encode_captions(CAPTIONS)
        plain = decoder.sample(condition, generators=seeded(1, 2))
        media = [source(decoder, seed) for seed in range(2)]
        options = {"strength": 1.0}
        made = decoder.sample(condition, generators=seeded(1, 2), init_media=media, options=options)
        np.testing.assert_allclose(arrays(made), arrays(plain), rtol=0, atol=1.01 / 255)


def test_pixart_at_little_strength_is_its_codec(make, monkeypatch):
    """One step of a hundred, by a denoiser that returns its input: next to no noise is added."""
    decoder = make("image", guidance=1.0)
    transformer = decoder.pipeline.transformer
    monkeypatch.setattr(transformer, "forward", lambda noisy, **_: (noisy,))
    start = source(decoder)
    made = decoder.sample(
        decoder.encode_captions(["a dog"]), generators=seeded(0), init_media=[start],
        options={"steps": 100, "strength": 0.01},
    )  # fmt: skip
    pipeline = decoder.pipeline
    with torch.no_grad():
        latents = pipeline.vae.encode(decoder.preprocess(start)[None]).latent_dist.mode()
        through = pipeline.vae.decode(latents).sample
    expected = (through / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(arrays(made) - expected).max() < 0.05


def test_more_strength_keeps_less_of_the_source(make, monkeypatch):
    """With a denoiser that returns its input, so that the noise stays; fewer steps are run."""
    decoder = make("image", steps=20, guidance=1.0)
    transformer = decoder.pipeline.transformer
    monkeypatch.setattr(transformer, "forward", lambda noisy, **_: (noisy,))
    condition, start = decoder.encode_captions(["a dog"]), source(decoder)
    reported = []
    kept = {"on_step": lambda step, steps: reported.append(steps)}
    made = [
        arrays(
            decoder.sample(
                condition,
                generators=seeded(0),
                init_media=[start],
                options={"strength": strength},
                **kept,
            )
        )
        for strength in (0.1, 0.5, 1.0)
    ]
    assert reported == [2] * 2 + [10] * 10 + [20] * 20
    with torch.no_grad():
        latents = decoder.pipeline.vae.encode(decoder.preprocess(start)[None]).latent_dist.mode()
        through = decoder.pipeline.vae.decode(latents).sample.permute(0, 2, 3, 1) / 2 + 0.5
    away = [np.abs(each - through.clamp(0, 1).numpy()).mean() for each in made]
    assert away[0] < away[1] < away[2]


@pytest.mark.parametrize("family", NO_SOURCE)
def test_what_starts_from_nothing_says_so(make, family):
    decoder = make(family)
    condition = decoder.encode_captions(["a dog"])
    with pytest.raises(ConfigError, match="Pipeline makes media from noise alone"):
        decoder.sample(condition, generators=seeded(0), init_media=[tiny.medium(decoder.modality)])
    with pytest.raises(ConfigError, match="unknown option 'init_media'"):
        decoder.with_overrides(init_media="last")


def test_wrong_sources_are_refused(build):
    decoder = build("stable_diffusion")
    condition = decoder.encode_captions(["a dog"])
    with pytest.raises(ValueError, match=r"expected 1 initial media of modality image.*Audio"):
        decoder.sample(condition, generators=seeded(0), init_media=[tiny.medium("audio")])
    with pytest.raises(ValueError, match="expected 1 initial media"):
        decoder.sample(condition, generators=seeded(0), init_media=[])
    for strength in (0.0, 1.5):
        with pytest.raises(ConfigError, match="strength: expected more than 0, at most 1"):
            decoder.with_overrides(strength=strength)
    with pytest.raises(ConfigError, match=r"0\.2 of 4 steps is less than one; .* at least 0.25"):
        decoder.with_overrides(init_media="last", strength=0.2)
    with pytest.raises(ConfigError, match="init_media: expected none or last, got 'first'"):
        decoder.with_overrides(init_media="first")
    still = build("wan_image")
    assert "strength" not in still.request_options  # its first frame is the picture as it is
    assert dataclasses.replace(still.config, init_media="last").init_media == "last"
