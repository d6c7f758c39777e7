"""Masks and references, against diffusers' own pipelines that take them."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from mmllm import config
from mmllm.conversation import Image
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.errors import ConfigError, MediaError
from tests.decoders import tiny
from tests.decoders.comparing import CALL, CAPTIONS, arrays, close, guiding, seeded

INPAINTING = {
    "stable_diffusion": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLInpaintPipeline",
    "sd3": "StableDiffusion3InpaintPipeline",
    "flux": "FluxInpaintPipeline",
    "flux_kontext": "FluxKontextInpaintPipeline",
    "flux2_klein": "Flux2KleinInpaintPipeline",
    "qwen_image": "QwenImageInpaintPipeline",
    "z_image": "ZImageInpaintPipeline",
}
"""Family in tests -> what repaints a part of a picture in diffusers."""
REFERRING = ("flux_kontext", "flux2", "flux2_klein")
"""Families that take references."""
MASKED = pytest.mark.parametrize("family", [*INPAINTING, "image"])
SIDE = 64
"""Of pictures of FLUX.2, which takes no smaller ones."""


CHANNELS = {"stable_diffusion": 4, "sdxl": 4, "sd3": 16}
"""Of latents, which these pipelines for inpainting count."""


@pytest.fixture(scope="session")
def special(tmp_path_factory):
    """Folders of a FLUX.1 Kontext, which has the parts of a FLUX.1, and of pipelines with as many
    channels of latents as published ones have."""
    root = tmp_path_factory.mktemp("special")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = tiny.flux_pipeline().components
        diffusers.FluxKontextPipeline(**parts).save_pretrained(root / "flux_kontext")
        for family, num in CHANNELS.items():
            pipeline = tiny.FAMILIES[family][1]()
            name = "transformer" if family == "sd3" else "unet"
            denoiser = getattr(pipeline, name)
            changes = {"in_channels": num, "out_channels": num}
            wide = {
                name: type(denoiser).from_config(denoiser.config, **changes),
                "vae": type(pipeline.vae).from_config(pipeline.vae.config, latent_channels=num),
            }
            pipeline.register_modules(**wide)
            pipeline.save_pretrained(root / family)
    return root


@pytest.fixture
def build(make, special):
    def build(family: str, **changes) -> ModalityDecoder:
        if family.startswith("flux2"):
            changes = {"height": SIDE, "width": SIDE, **changes}
        if family not in (*CHANNELS, "flux_kontext"):
            return make(family, **changes)
        kind = "flux" if family == "flux_kontext" else family
        return config.build(tiny.entry(kind, special / family, **changes))

    return build


def picture(decoder: ModalityDecoder, seed: int = 0) -> Image:
    """Smooth colours in the decoder's size."""
    height, width = decoder.size
    coarse = np.random.default_rng(seed).integers(20, 235, (4, 4, 3), dtype=np.uint8)
    return Image.from_numpy(coarse.repeat(height // 4, axis=0).repeat(width // 4, axis=1))


def left_half(picture: Image) -> Image:
    """A mask of it."""
    pixels = np.zeros_like(picture.to_numpy())
    pixels[:, : picture.width // 2] = 255
    return Image.from_numpy(pixels)


def own_call(decoder: ModalityDecoder, family: str, guidance: float) -> dict:
    """Arguments of the pipeline's own call for one caption."""
    base = "flux" if family == "flux_kontext" else family
    guide = guiding(base, decoder.pipeline, guidance, "")
    for name in guide.keys() & {"negative_prompt"}:
        guide[name] = guide[name][:1]
    call = {**CALL.get(base, {}), **guide}
    if family.startswith("flux2"):
        call |= {"height": SIDE, "width": SIDE}
    if family == "flux_kontext":
        call |= {"max_area": tiny.SIZE**2, "_auto_resize": False}
    return call


@pytest.mark.parametrize("family", INPAINTING)
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_a_mask_is_the_pipelines_own_and_the_rest_is_kept(build, family, guidance):
    decoder = build(family, guidance=guidance)
    pictures = [picture(decoder, seed) for seed in range(2)]
    strength = {"strength": 0.7} if "strength" in decoder.request_options else {}
    made = decoder.sample(
        decoder.encode_captions(CAPTIONS),
        generators=seeded(1, 2),
        init_media=pictures,
        masks=[left_half(each) for each in pictures],
        options=strength,
    )
    own = getattr(diffusers, INPAINTING[family]).from_pipe(tiny.load(decoder.folder))
    for row, (caption, original) in enumerate(zip(CAPTIONS, pictures, strict=True)):
        expected = own(
            prompt=[caption],
            image=original.to_pil(),
            mask_image=left_half(original).to_pil(),
            **{"strength": 1.0, **strength},
            **own_call(decoder, family, guidance),
            num_inference_steps=4,
            generator=seeded(row + 1)[0],
            output_type="np",
        ).images.copy()
        half = original.width // 2
        expected[0, :, half:] = original.to_numpy()[:, half:] / 255
        close(made[row : row + 1], expected)


@MASKED
def test_what_is_masked_changes_and_the_rest_does_not(build, family):
    decoder = build(family)
    original = picture(decoder)
    (made,) = decoder.sample(
        decoder.encode_captions(["a dog"]),
        generators=seeded(0),
        init_media=[original],
        masks=[left_half(original)],
    )
    half = original.width // 2
    before, after = original.to_numpy().astype(int), made.to_numpy().astype(int)
    assert np.array_equal(before[:, half:], after[:, half:])
    assert np.abs(before - after)[:, :half].mean() > 5


@MASKED
def test_a_batch_of_masks_equals_singles(build, family):
    decoder = build(family)
    pictures = [picture(decoder, seed) for seed in range(2)]
    condition = decoder.encode_captions(CAPTIONS)
    whole = Image.from_numpy(np.full_like(pictures[1].to_numpy(), 255))
    masks = [left_half(pictures[0]), whole]
    batch = decoder.sample(condition, generators=seeded(1, 2), init_media=pictures, masks=masks)
    for row in range(2):
        alone = decoder.sample(
            {name: value[row : row + 1] for name, value in condition.items()},
            generators=seeded(row + 1),
            init_media=pictures[row : row + 1],
            masks=masks[row : row + 1],
        )
        np.testing.assert_allclose(
            arrays(alone)[0], arrays(batch)[row], rtol=0, atol=1e-4 + 1 / 255
        )


def test_pixart_keeps_the_latents_of_what_is_not_masked(make, monkeypatch):
    """What its codec decodes, before the pixels of the original are put over."""
    decoder = make("image")
    original, decoded = picture(decoder), []
    decode = decoder.pipeline.vae.decode
    monkeypatch.setattr(
        decoder.pipeline.vae,
        "decode",
        lambda latents, **options: decoded.append(latents) or decode(latents, **options),
    )
    decoder.sample(
        decoder.encode_captions(["a dog"]),
        generators=seeded(0),
        init_media=[original],
        masks=[left_half(original)],
        options={"strength": 1.0},
    )
    with torch.no_grad():
        own = decoder.pipeline.vae.encode(decoder.preprocess(original)[None]).latent_dist.mode()
    away = (decoded[0] - own).abs()
    half = own.shape[-1] // 2
    assert away[..., half:].max() < 1e-5
    assert away[..., :half].mean() > 0.01


@pytest.mark.parametrize("family", REFERRING)
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_references_are_the_pipelines_own(build, family, guidance):
    """Of two media with different numbers of references, where the pipeline takes several."""
    decoder = build(family, guidance=guidance)
    pictures = [picture(decoder, seed) for seed in range(3)]
    references = [pictures[:1], pictures[1 : 1 + min(decoder.max_references, 2)]]
    made = decoder.sample(
        decoder.encode_captions(CAPTIONS), generators=seeded(1, 2), references=references
    )
    own = tiny.load(decoder.folder)
    for row, (caption, given) in enumerate(zip(CAPTIONS, references, strict=True)):
        expected = own(
            prompt=[caption],
            image=[each.to_pil() for each in given],
            **own_call(decoder, family, guidance),
            num_inference_steps=4,
            generator=seeded(row + 1)[0],
            output_type="np",
        )
        close(made[row : row + 1], expected.images)


@pytest.mark.parametrize("family", REFERRING)
def test_each_reference_changes_what_is_made(build, family):
    decoder = build(family)
    condition = decoder.encode_captions(["a dog"])
    first, second = picture(decoder, 0), picture(decoder, 1)
    choices = [None, [[first]], [[second]]]
    choices += [[[first, second]], [[second, first]]] if decoder.max_references > 1 else []
    made = [
        arrays(decoder.sample(condition, generators=seeded(0), references=choice))
        for choice in choices
    ]
    for index, one in enumerate(made):
        assert all(np.abs(one - other).max() > 1e-3 for other in made[:index])


def recorded_calls(decoder, monkeypatch):
    """What the transformer is given from now on, and its answers."""
    transformer, calls = decoder.pipeline.transformer, []
    forward = transformer.forward

    def recorded(**given):
        answer = forward(**given)
        calls.append((given, answer[0]))
        return answer

    monkeypatch.setattr(transformer, "forward", recorded)
    return calls


@pytest.mark.parametrize("family", REFERRING)
def test_the_denoising_loss_conditions_on_references_as_sampling_does(build, family, monkeypatch):
    """The pipeline's first call of its transformer, and ours with the same noise and time."""
    decoder = build(family, guidance=1.0)
    references = [picture(decoder, seed) for seed in range(min(decoder.max_references, 2))]
    condition = decoder.encode_captions(["a dog"])
    calls = recorded_calls(decoder, monkeypatch)
    decoder.sample(condition, generators=seeded(0), references=[references])
    given, answer = calls[0]
    latents = decoder.encode_media(torch.stack([decoder.preprocess(each) for each in references]))
    shape = latents[:1].shape
    noise = torch.randn(shape, generator=seeded(0)[0])
    calls.clear()
    with torch.no_grad():
        made = decoder.denoise_with_references(
            decoder.prepare_condition(condition), noise, given["timestep"] * 1000, latents
        )
    again, other = calls[0]
    for name in ("hidden_states", "img_ids", "txt_ids"):
        torch.testing.assert_close(again[name].float(), given[name].float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(other, answer, rtol=0, atol=1e-4)
    assert made.shape == shape


@pytest.mark.parametrize("family", REFERRING)
def test_the_denoising_loss_of_a_batch_is_that_of_its_media(build, family):
    decoder = build(family)
    samples = torch.stack([decoder.preprocess(picture(decoder, seed)) for seed in range(3)])
    latents = decoder.encode_media(samples)
    noise = torch.randn(latents[:2].shape, generator=seeded(0)[0])
    times = torch.tensor([0.3, 0.7])
    condition = {
        name: value.clone().requires_grad_()
        for name, value in decoder.encode_captions(CAPTIONS).items()
    }

    def loss(row: slice, references):
        return decoder.denoising_loss(
            {name: value[row] for name, value in condition.items()},
            latents[row],
            noise=noise[row],
            times=times[row],
            references=references,
        )

    given = [latents[2:], latents[:0]]
    batch = loss(slice(2), given)
    singles = [loss(slice(0, 1), given[:1]), loss(slice(1, 2), None)]
    torch.testing.assert_close(batch, torch.cat(singles), rtol=0, atol=1e-5)
    assert (batch[0] - loss(slice(0, 1), None)[0]).abs() > 1e-5
    batch.sum().backward()
    assert condition["prompt_embeds"].grad.abs().max() > 0


def test_what_cannot_be_taken_is_refused_by_name(build):
    decoder = build("stable_diffusion")
    condition, one = decoder.encode_captions(["a dog"]), picture(decoder)
    call = {"generators": seeded(0)}
    with pytest.raises(ConfigError, match="StableDiffusionPipeline takes no references"):
        decoder.sample(condition, references=[[one]], **call)
    with pytest.raises(ConfigError, match="unknown option 'references'"):
        decoder.with_overrides(references="auto")
    with pytest.raises(ValueError, match="expected 1 masks of as many initial images"):
        decoder.sample(condition, masks=[left_half(one)], **call)
    small = Image.from_numpy(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(MediaError, match="size of its picture, 16x16, got 8x8"):
        decoder.sample(condition, init_media=[one], masks=[small], **call)
    dev = build("flux2")
    one = picture(dev)
    with pytest.raises(ConfigError, match="Flux2Pipeline takes no mask"):
        dev.sample(dev.encode_captions(["a dog"]), init_media=[one], masks=[left_half(one)], **call)
    with pytest.raises(ConfigError, match="takes at most 10 reference"):
        dev.sample(dev.encode_captions(["a dog"]), references=[[one] * 11], **call)
    with pytest.raises(ValueError, match="at least one reference for each"):
        dev.sample(dev.encode_captions(["a dog"]), references=[[]], **call)
    with pytest.raises(ConfigError, match="init_media and references both"):
        dev.with_overrides(init_media="last", references="auto")
    with pytest.raises(ConfigError, match="references: expected none, auto or all, got 'some'"):
        dev.with_overrides(references="some")
    klein = build("flux2_klein")
    with pytest.raises(ConfigError, match="takes a mask or references, not both"):
        klein.sample(
            klein.encode_captions(["a dog"]),
            init_media=[one],
            masks=[left_half(one)],
            references=[[one]],
            **call,
        )


def test_kontext_takes_a_mask_and_a_reference(build):
    decoder = build("flux_kontext")
    original, reference = picture(decoder, 0), picture(decoder, 1)
    made = decoder.sample(
        decoder.encode_captions(CAPTIONS[:1]),
        generators=seeded(1),
        init_media=[original],
        masks=[left_half(original)],
        references=[[reference]],
    )
    own = diffusers.FluxKontextInpaintPipeline.from_pipe(tiny.load(decoder.folder))
    expected = own(
        prompt=CAPTIONS[:1],
        image=original.to_pil(),
        mask_image=left_half(original).to_pil(),
        image_reference=reference.to_pil(),
        strength=0.6,
        **own_call(decoder, "flux_kontext", decoder.config.guidance),
        num_inference_steps=4,
        generator=seeded(1)[0],
        output_type="np",
    ).images.copy()
    half = original.width // 2
    expected[0, :, half:] = original.to_numpy()[:, half:] / 255
    close(made, expected)


EDITING = {"plus": "QwenImageEditPlusPipeline", "one": "QwenImageEditPipeline"}


@pytest.fixture(scope="session")
def qwen_edit(tmp_path_factory):
    """Folders of both pipelines of Qwen-Image for editing."""
    special = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = dict(tiny.qwen_image_pipeline().components)
    encoder = parts["text_encoder"]
    tokenizer = parts["tokenizer"]
    tokenizer.add_tokens(special, special_tokens=True)
    encoder.resize_token_embeddings(len(tokenizer))
    encoder.config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    encoder.config.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    encoder.config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    parts["processor"] = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(patch_size=14, min_pixels=784, max_pixels=784),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(),
    )
    root = tmp_path_factory.mktemp("qwen_edit")
    for name, kind in EDITING.items():
        getattr(diffusers, kind)(**parts).save_pretrained(root / name)
    return root


@pytest.fixture(params=EDITING)
def editor(request, qwen_edit, monkeypatch) -> ModalityDecoder:
    """A decoder whose pipeline scales pictures to 32 x 32 pixels instead of 1024 x 1024."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        size = (32, 32) if module is pipeline_qwenimage_edit_plus else (32, 32, None)
        monkeypatch.setattr(module, "calculate_dimensions", lambda *_, size=size: size)
    entry = tiny.entry("qwen_image", qwen_edit / request.param, height=32, width=32)
    return config.build(entry)


def test_qwen_edits_by_its_own_pipeline(editor):
    """Under the conditions of its own text encoder, which has read the pictures, too."""
    pictures = [picture(editor, seed) for seed in range(editor.max_references)]
    given = [each.to_pil() for each in pictures]
    own = tiny.load(editor.folder)
    images = given if editor.max_references > 1 else given[0]
    call = {"height": 32, "width": 32, "num_inference_steps": 4, "output_type": "np"}
    expected = own(
        image=images, prompt=["a dog"], negative_prompt=" ", true_cfg_scale=4.0,
        generator=seeded(1)[0], **call,
    )  # fmt: skip
    tokens = editor.config.max_caption_tokens
    conditions = []
    for prompt in ("a dog", " "):
        embeds, mask = own.encode_prompt(prompt=[prompt], image=images)
        assert embeds.shape[1] <= tokens
        mask = embeds.new_ones(embeds.shape[:2]) if mask is None else mask
        padding = tokens - embeds.shape[1]
        conditions.append(
            {
                "prompt_embeds": torch.nn.functional.pad(embeds, (0, 0, 0, padding)),
                "prompt_embeds_mask": torch.nn.functional.pad(mask.float(), (0, padding)),
            }
        )
    made = editor.sample(
        conditions[0], negative=conditions[1], generators=seeded(1), references=[pictures]
    )
    close(made, expected.images)


def test_qwens_captions_are_read_without_pictures(editor):
    own = diffusers.QwenImageEditPlusPipeline(**tiny.load(editor.folder).components)
    embeds, _ = own.encode_prompt(prompt=["a red apple"])
    condition = editor.encode_captions(["a red apple"])
    num = int(condition["prompt_embeds_mask"].sum())
    assert 0 < num == embeds.shape[1]
    torch.testing.assert_close(condition["prompt_embeds"][:, :num], embeds, rtol=0, atol=1e-4)


def test_qwens_references_are_of_consequence_and_needed(editor):
    condition = editor.encode_captions(["a dog"])
    first, second = (
        arrays(editor.sample(condition, generators=seeded(0), references=[[picture(editor, seed)]]))
        for seed in range(2)
    )
    assert np.abs(first - second).max() > 1e-3
    with pytest.raises(ConfigError, match="needs a picture, and there is none"):
        editor.sample(condition, generators=seeded(0))
    with pytest.raises(ConfigError, match="makes media from noise alone"):
        editor.sample(condition, generators=seeded(0), init_media=[picture(editor)])


def test_qwen_trains_with_references_as_it_samples(editor, monkeypatch):
    references = [picture(editor, seed) for seed in range(editor.max_references)]
    condition = editor.encode_captions(["a dog"])
    calls = recorded_calls(editor, monkeypatch)
    options = {"guidance": 1.0}
    editor.sample(condition, generators=seeded(0), references=[references], options=options)
    given, answer = calls[0]
    latents = editor.encode_media(torch.stack([editor.preprocess(each) for each in references]))
    noise = torch.randn(latents[:1].shape, generator=seeded(0)[0])
    with torch.no_grad():
        editor.denoise_with_references(
            editor.prepare_condition(condition), noise, given["timestep"] * 1000, latents
        )
    again, other = calls[-1]
    torch.testing.assert_close(again["hidden_states"], given["hidden_states"], rtol=0, atol=1e-4)
    assert again["img_shapes"] == given["img_shapes"]
    torch.testing.assert_close(other, answer, rtol=0, atol=1e-4)
    monkeypatch.undo()  # at its own size
    with pytest.raises(ConfigError, match="scales references to 1024x1024 pixels"):
        editor.denoise_with_references(condition, noise, given["timestep"], latents)
