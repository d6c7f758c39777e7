"""Modular pipelines of diffusers without their text block, against the whole ones on captions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers

from mmllm import config
from mmllm.decoders.contract import Cancelled
from mmllm.errors import AssetError, ConfigError
from tests.decoders import tiny
from tests.decoders.comparing import CAPTIONS, arrays, close, seeded


def flux3_pipeline() -> Any:
    """FLUX.3, which exists in this form only, without what rewrites prompts."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = {**tiny.language_model(), "num_hidden_layers": 33, "rope_parameters": rope}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": tiny.WIDTH,
        "deepstack_visual_indexes": [0],
    }
    template = "{{ messages[0]['content'] }}"
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tiny.word_tokenizer(),
        video_processor=transformers.Qwen3VLVideoProcessor(),
        chat_template=template,
    )
    pipeline = diffusers.Flux3ModularPipeline(workflow="text2image")
    pipeline.update_components(
        tokenizer=processor,
        text_encoder=transformers.Qwen3VLForConditionalGeneration(
            transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
        ),
        vae=tiny.flux2_codec(),
        transformer=diffusers.Flux3Transformer2DModel(
            in_channels=12,
            cond_in_channels=12,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8 * tiny.WIDTH,
            timestep_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    return pipeline


CLASSIC = {
    "z_image": "ZImageModularPipeline",
    "qwen_image": "QwenImageModularPipeline",
    "flux2_klein": "Flux2KleinModularPipeline",
    "ltx": "LTXModularPipeline",
    "hunyuan_video15": "HunyuanVideo15ModularPipeline",
}
"""Family in tests -> the modular class that takes the same components."""
SETTINGS: dict[str, dict[str, Any]] = {
    "flux3": {"type": "modular", "max_caption_tokens": 160, **tiny.SQUARE},
    "z_image": {"type": "modular", "max_caption_tokens": 16, **tiny.SQUARE},
    "qwen_image": {"type": "modular", "max_caption_tokens": 64, **tiny.SQUARE},
    "flux2_klein": {"type": "modular", "max_caption_tokens": 16, **tiny.SQUARE},
    "ltx": {
        "type": "modular_video",
        "max_caption_tokens": 16,
        **tiny.CLIPS,
        "height": 32,
        "width": 32,
    },
}
ALL = pytest.mark.parametrize("name", SETTINGS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`saved("flux3")`: the folder of a modular pipeline, made once."""
    root = tmp_path_factory.mktemp("modular")

    def save(name: str) -> Path:
        folder = root / name
        if not folder.is_dir():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                if name == "flux3":
                    pipeline = flux3_pipeline()
                else:
                    classic = tiny.FAMILIES[name][1]().components
                    pipeline = getattr(diffusers, CLASSIC[name])(workflow=workflow(name))
                    names = set(pipeline.component_names)
                    pipeline.update_components(
                        **{part: each for part, each in classic.items() if part in names}
                    )
            pipeline.save_pretrained(str(folder))
        return folder

    return save


def workflow(name: str) -> str:
    return "text2video" if SETTINGS[name]["type"] == "modular_video" else "text2image"


@pytest.fixture
def make(saved: Any) -> Any:
    def build(name: str, **changes: Any) -> Any:
        tree = {"weights": str(saved(name)), "steps": 3, **SETTINGS[name], **changes}
        return config.build(config.parse_component("decoders", tree, name))

    return build


@ALL
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, ""), (3.0, "a dog")])
def test_a_medium_of_an_encoded_caption_is_the_whole_pipelines(make, name, guidance, negative):
    if (name, guidance > 1) in {("flux2_klein", True), ("ltx", False)}:
        pytest.skip("distilled, without a guider; or demands a negative prompt")
    decoder = make(name, guidance=guidance, negative_prompt=negative)
    media = decoder.sample(decoder.encode_captions(CAPTIONS), generators=seeded(1, 2))
    settings = {key: SETTINGS[name][key] for key in ("height", "width")}
    if decoder.modality == "video":
        settings |= {"num_frames": tiny.FRAMES, "frame_rate": 4.0}
    settings["max_sequence_length"] = SETTINGS[name]["max_caption_tokens"]
    if negative:
        settings["negative_prompt"] = negative
    pipeline = decoder.pipeline.modular  # the whole one, text block and all
    vars(pipeline)["_blocks"].sub_blocks.pop(
        "prompt_upsampler", None
    )  # FLUX.3's, which rewrites prompts
    if pipeline.components.get("guider") is not None:
        pipeline.guider.guidance_scale = guidance
    for medium, caption, seed in zip(media, CAPTIONS, (1, 2), strict=True):
        made = pipeline(
            prompt=caption,
            **settings,
            num_inference_steps=3,
            generator=seeded(seed)[0],
            output_type="np",
        )
        close([medium], np.asarray(made.get("images", made.get("videos"))))
    assert np.ptp(arrays(media)) > 0.01


@ALL
def test_shapes_are_read_without_weights(make, saved, name, tmp_path):
    shapes = make(name).condition_shapes
    folder = shutil.copytree(saved(name), tmp_path / name)
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")  # no weights at all
    bare = make(name, weights=str(folder))
    assert bare.condition_shapes == shapes
    assert not bare.is_loaded
    condition = make(name).encode_captions(CAPTIONS)
    assert {key: tuple(value.shape[1:]) for key, value in condition.items()} == shapes
    for sequence, mask in bare.masks.items():
        assert not condition[sequence][condition[mask] == 0].any()


@ALL
def test_steps_are_reported_and_a_cancelled_run_leaves_the_decoder_as_new(make, name):
    decoder = make(name)
    condition = decoder.encode_captions(["a dog"])
    expected = arrays(decoder.sample(condition, generators=seeded(0)))
    seen = []

    def stop(step: int, steps: int) -> None:
        seen.append((step, steps))
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        decoder.sample(condition, generators=seeded(0), on_step=stop)
    assert seen == [(1, 3), (2, 3)]
    assert np.array_equal(arrays(decoder.sample(condition, generators=seeded(0))), expected)
    other = arrays(decoder.sample(decoder.encode_captions(["a red apple"]), generators=seeded(0)))
    assert np.abs(other - expected).max() > 1e-3


def test_a_moved_folder_is_read_from_where_it_is(make, saved, tmp_path):
    """The index names the place where it was saved; nothing is read from there."""
    folder = shutil.copytree(saved("z_image"), tmp_path / "moved")
    index = json.loads((folder / "modular_model_index.json").read_text())
    for value in index.values():
        if isinstance(value, list):
            value[2]["pretrained_model_name_or_path"] = "nobody/nothing"
    (folder / "modular_model_index.json").write_text(json.dumps(index))
    moved, first = make("z_image", weights=str(folder)), make("z_image")
    for one, other in zip(
        *(each.encode_captions(CAPTIONS).values() for each in (moved, first)), strict=True
    ):
        assert torch.equal(one, other)


def test_a_text_block_that_cannot_be_read_is_refused(make, saved):
    """Its blocks of diffusers 0.42 demand guidance while they encode; it has a type of its own."""
    SETTINGS["hunyuan_video15"] = {"type": "modular_video", **tiny.CLIPS}
    try:
        with pytest.raises(ConfigError, match="cannot be read from its configs alone"):
            _ = make("hunyuan_video15").condition_shapes
    finally:
        del SETTINGS["hunyuan_video15"]


def test_what_it_cannot_do_is_refused_by_name(make, saved, tmp_path):
    decoder = make("z_image")
    with pytest.raises(ConfigError, match="denoising loss is not defined for modular"):
        decoder.encode_media(torch.zeros(1, 3, tiny.SIZE, tiny.SIZE))
    with pytest.raises(ConfigError, match="text_encoder own and offload none, got llm"):
        make("z_image", text_encoder="llm")
    folder = shutil.copytree(saved("z_image"), tmp_path / "code")
    (folder / "blocks.py").write_text("")
    with pytest.raises(AssetError, match="brings code"):
        make("z_image", weights=str(folder))
    (folder / "blocks.py").unlink()
    index = json.loads((folder / "modular_model_index.json").read_text())
    for kind in ("ModularPipeline", "ZImagePipeline", "MyPipeline"):
        (folder / "modular_model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
        with pytest.raises(AssetError, match=f"holds a {kind}, but"):
            make("z_image", weights=str(folder))
    (folder / "modular_model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(AssetError, match=r"text_encoder .* is missing"):
        make("z_image", weights=str(folder))
