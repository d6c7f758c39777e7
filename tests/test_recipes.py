"""The recipes, built on the meta device: each shape where parts join, and the counts that papers
and published files tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mmllm import config, console, licences, planning
from mmllm import model as models
from mmllm.encoders.backbone import BackboneEncoder
from mmllm.model import AnyToAny
from mmllm.planning import Plan

ROOT = Path(__file__).parents[1]
RECIPES = ("nextgpt-7b", "modern-8b", "query-1b", "omni-8b")
OF_OPEN_CLIP = ("timm/", "laion/CLIP-")
"""Weights whose sizes are in open_clip's own list."""
WITH_LORA = {"nextgpt-7b", "modern-8b", "omni-8b"}
"""Recipes whose third stage trains LoRA; query-1b leaves the LLM as it is."""
DENOISING = {"query-1b": "image", "omni-8b": "image"}
"""Recipes whose last stage trains one connector by its decoder's own loss."""
PARTS = ROOT / "configs" / "parts"


@pytest.fixture(scope="module", params=RECIPES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {name: planning.plan(ROOT / "configs" / name) for name in RECIPES}


@pytest.fixture(scope="module")
def recipes() -> dict[str, AnyToAny]:
    return {
        name: models.build(
            config.parse_system(config.read_yaml(ROOT / "configs" / name / "system.yaml")),
            dtype=torch.bfloat16,
            meta=True,
        )
        for name in RECIPES
    }


def test_every_shape_where_parts_join(name: str, recipes: dict[str, AnyToAny]) -> None:
    model = recipes[name]
    width = model.llm.width
    for key, encoder in model.encoders.items():
        features = torch.empty(2, *encoder.feature_shape, device="meta")  # pyright: ignore
        placed = model.input_projections[key](features)
        is_tower = isinstance(encoder, BackboneEncoder)
        layers = features.shape[-1] // width if is_tower else 1  # DeepStack's behind
        assert placed.shape == (2, model.num_input_tokens[key], width * layers)
    for key, decoder in model.decoders.items():
        projection = model.output_projection(key)
        read = width * max(len(projection.llm_layers), 1)
        length = projection.num_words + model.num_signal_tokens[key]
        condition = projection(torch.empty(2, length, read, device="meta"))
        assert {n: tuple(v.shape[1:]) for n, v in condition.items()} == decoder.condition_shapes
    assert len(model.llm.signal_embeddings) == sum(model.num_signal_tokens.values())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_papers_shapes(recipes: dict[str, AnyToAny]) -> None:
    paper = recipes["nextgpt-7b"]
    assert paper.num_signal_tokens == {"image": 4, "audio": 8, "video": 24}
    assert paper.encoders["image"].feature_shape == (256, 1024)
    assert paper.encoders["video"].feature_shape == (256, 1024)
    assert {key: decoder.condition_shapes for key, decoder in paper.decoders.items()} == {
        "image": {"prompt_embeds": (77, 768)},
        "audio": {"prompt_embeds": (512,)},
        "video": {"prompt_embeds": (77, 1024)},
    }
    modern = recipes["modern-8b"].decoders
    assert modern["image"].condition_shapes["prompt_embeds"] == (128, 2560)
    assert modern["audio"].condition_shapes["prompt_embeds"] == (128, 768)
    assert modern["video"].condition_shapes == {"prompt_embeds": (512, 4096)}
    queries = recipes["query-1b"]
    assert set(queries.num_signal_tokens.values()) == {64}
    shapes = {key: decoder.condition_shapes for key, decoder in queries.decoders.items()}
    assert shapes["image"]["prompt_embeds"] == (64, 2304)
    assert shapes["audio"]["prompt_embeds"] == (64, 768)
    assert shapes["video"]["prompt_embeds"] == (64, 4096)


PUBLISHED = {
    ("nextgpt-7b", "llm"): (13.48e9 / 2, 0.01),  # bytes of its float16 files
    ("nextgpt-7b", "llm.lora"): (33e6, 0.02),  # Wu et al. 2023, table 1
    ("nextgpt-7b", "output_projections.image"): (31.5e6, 0.02),  # there: 31-32 M
    ("nextgpt-7b", "output_projections.audio"): (31.5e6, 0.02),
    ("nextgpt-7b", "output_projections.video"): (31.5e6, 0.02),
    ("nextgpt-7b", "encoders.image"): (304e6, 0.01),  # page of timm's copy
    ("nextgpt-7b", "decoders.audio"): (975e6, 0.01),  # its README.md
    ("nextgpt-7b", "decoders.audio", "unet"): (739e6, 0.01),  # Liu et al. 2023, by its README.md
    ("modern-8b", "decoders.video", "transformer"): (5.68e9 / 4, 0.01),  # bytes of its files
    ("modern-8b", "decoders.video", "text_encoder"): (5.30e9, 0.08),  # bytes of an 8-bit copy
    ("modern-8b", "encoders.image"): (428e6, 0.01),  # page of SigLIP's tower of the same sizes
    ("query-1b", "decoders.image", "transformer"): (1648e6, 0.03),  # Sana_1600M_1024px's page
    ("query-1b", "decoders.video", "transformer"): (1.9e9, 0.02),  # HaCohen et al. 2024
    ("omni-8b", "llm"): (8.77e9, 0.001),  # a page that lists its sizes
}
"""(recipe, part[, network]) -> parameters that were published, and how near these must be."""


@pytest.mark.parametrize("place", PUBLISHED, ids="-".join)
def test_parameters_are_the_published_ones(place: tuple[str, ...], plans: dict[str, Plan]) -> None:
    part = next(part for part in plans[place[0]].parts if part.name == place[1])
    count = part.networks[place[2]] if len(place) == 3 else part.parameters
    expected, near = PUBLISHED[place]
    assert count == pytest.approx(expected, rel=near)


def test_the_table_is_printed(name: str, plans: dict[str, Plan]) -> None:
    lines = list(planning.render(plans[name], flops=2e14))
    for line in lines:
        console.echo(line)
    assert any(re.match(r"  output_projections\.video +[\d,]+  trained", line) for line in lines)
    assert sum(line.startswith("stage ") for line in lines) == len(plans[name].stages)


def test_a_stage_fits_the_gpu_that_its_header_names(name: str, plans: dict[str, Plan]) -> None:
    for stage in plans[name].stages:
        (file,) = (ROOT / "configs" / name).glob(f"[0-9]_{stage.stage.name}.yaml")
        gigabytes = re.search(r"one GPU of (\d+) GB", file.read_text())
        assert gigabytes, f"{file}: the header names no memory"
        # A tenth is left to the allocator, to kernels and to what the estimate does not see.
        for needed in (stage.memory, stage.filling):
            assert sum(needed.values()) < 0.9e9 * int(gigabytes[1]), (file, needed)


def test_a_quantised_model_trains_in_24_gigabytes_once_the_cache_is_filled() -> None:
    for file in sorted((ROOT / "configs" / "modern-8b").glob("[0-9]_*.yaml")):
        (added,) = re.findall(r"QLoRA on 24 GB: add ([^,\n]+)", file.read_text())
        found = planning.plan(file, added.split())
        llm = next(part for part in found.parts if part.name == "llm")
        # Embedding and head stay in 16 bits, the rest has about half a byte a weight.
        assert 0.5 * llm.parameters < llm.bytes < 0.75 * llm.parameters
        for stage in found.stages:
            assert not stage.filling
            assert sum(stage.memory.values()) < 0.9 * 24e9


def test_the_largest_medium_fits_the_rows_of_a_stage(name: str, plans: dict[str, Plan]) -> None:
    for planned in plans[name].stages:
        for entry in planned.stage.data.values():
            if getattr(entry, "direction", None) == "understand":
                read = plans[name].media
                key = getattr(entry, "modality", None)
                tokens = read[key][0] if key else max(num for num, _ in read.values())
                assert tokens + 64 <= planned.stage.max_length, (planned.stage.name, entry)


def test_the_new_rows_and_projections_train_and_nothing_else_before_stage_three(
    name: str, plans: dict[str, Plan]
) -> None:
    first, second, *later = plans[name].stages
    assert {n.partition(".")[0] for g in first.groups for n in g.parameters} == {
        "input_projections"
    }
    names = {n for g in second.groups for n in g.parameters}
    assert {n for n in names if n.startswith("llm.")} == {
        "llm.signal_embeddings",
        "llm.signal_head",
    }
    assert not any(n.startswith("input_projections") for n in names)
    trains_lora = [
        any(n.startswith("llm.lora") for g in s.groups for n in g.parameters) for s in later
    ]
    assert trains_lora == [name in WITH_LORA] + [False] * (len(later) - 1)
    before = [None, *(s.stage.output for s in plans[name].stages[:-1])]
    assert [s.stage.init_from for s in plans[name].stages] == before


@pytest.mark.parametrize("name", DENOISING, indirect=True)
def test_the_last_stage_trains_one_connector_with_its_decoder_alone(
    name: str, plans: dict[str, Plan]
) -> None:
    stage, key = plans[name].stages[-1], DENOISING[name]
    assert set(stage.stage.losses) == {"denoise"}
    trained = {n for g in stage.groups for n in g.parameters}
    assert {".".join(n.split(".")[:2]) for n in trained} == {
        f"output_projections.{key}",
        "llm.signal_embeddings",
    }
    parts = {part.name: part for part in plans[name].parts}
    assert stage.memory["decoders"] == parts[f"decoders.{key}"].bytes
    assert plans[name].stages[1].memory["decoders"] == 0


def test_every_part_has_a_licence_and_a_source(name: str, plans: dict[str, Plan]) -> None:
    for entry in plans[name].licences:
        assert entry.licence in licences.LICENCES, entry
    text = (PARTS / "README.md").read_text()
    for entry in plans[name].licences:
        assert f"`{entry.weights}`" in text or entry.weights.startswith(OF_OPEN_CLIP), entry


def test_every_folder_of_configs_says_where_it_is_from() -> None:
    text = (PARTS / "README.md").read_text()
    folders = {str(path.relative_to(PARTS)) for path in PARTS.glob("*/*") if path.is_dir()}
    assert folders == set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
