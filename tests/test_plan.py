"""The plan: what it counts is what is built; its formulas hold against autograd and torch's own
counter; licences are shown, and must be accepted before anything is loaded."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from mmllm import checkpoints, config, licences, planning, weights
from mmllm import model as models
from mmllm.cli import FAILED, main
from mmllm.config import RunConfig
from mmllm.errors import AssetError, ConfigError
from mmllm.kernels import packed_attention
from mmllm.llm import loading
from mmllm.llm.adapters import LoraOptions
from mmllm.llm.loading import CausalLMConfig
from mmllm.model import AnyToAny
from mmllm.training import trainer
from mmllm.training.trainable import ParameterGroup, choose_trainable
from tests import parts
from tests.decoders import tiny
from tests.encoders.twins import TWINS

ROOT = Path(__file__).parents[1]
MINI = sorted((ROOT / "configs" / "mini").glob("[0-9]_*.yaml"))


@pytest.fixture
def run(system_tree: dict, tmp_path: Path) -> RunConfig:
    """A stage of the tiny system that trains everything, on captions alone."""
    rows = [{"caption": f"a red apple {n}", "modality": m} for n in range(4) for m in parts.KEYS]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    data = {
        modality: {
            "type": "pairs",
            "file": str(tmp_path / "captions.json"),
            "modality": modality,
            "direction": "generate",
            "prompts": ["draw"],
        }
        for modality in parts.KEYS
    }
    stage = {
        "name": "everything",
        "output": str(tmp_path / "run"),
        "learning_rates": {
            "input_projections.*": 1e-3,
            "output_projections.*": 1e-3,
            "llm.signal_embeddings": 1e-3,
            "llm.signal_head": 1e-3,
            "llm.lora.*": 1e-4,
        },
        "losses": {"text": 1.0, "align": 1.0},
        "data": data,
        "steps": 1,
        "batch_size": 2,
        "precision": "no",
    }
    return config.parse_run({"system": system_tree, "stage": stage})


def test_the_plan_counts_what_training_prints_and_what_it_writes(
    run: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = planning.plan_stage(models.build(run.system, meta=True), run)
    caplog.set_level(logging.INFO, "mmllm")
    trainer.train(run, progress=False)
    printed = dict(re.findall(r"trains (\S+) +\d+ tensors +([\d,]+) parameters", caplog.text))
    assert {g.pattern: f"{g.size:,}" for g in found.groups} == printed
    assert f"in all {found.trained:,} parameters" in caplog.text

    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    written = sum(f.stat().st_size for f in checkpoint.rglob("*.safetensors"))
    headers = 200 * sum(len(group.parameters) for group in found.groups) * 3
    assert found.checkpoint <= written <= found.checkpoint + headers


Built = Callable[[config.SystemConfig], tuple[models.AnyToAny, models.AnyToAny]]


@pytest.fixture(scope="module")
def built() -> Built:
    """A system without weights and with them; both are built once, for all stages have the same."""
    made: dict[str, tuple[models.AnyToAny, models.AnyToAny]] = {}

    def build(system: config.SystemConfig) -> tuple[models.AnyToAny, models.AnyToAny]:
        if repr(system) not in made:
            made[repr(system)] = models.build(system, meta=True), models.build(system)
        return made[repr(system)]

    return build


@pytest.mark.parametrize("path", MINI, ids=lambda path: path.stem)
def test_the_plan_of_mini_counts_its_real_parts(path: Path, built: Built) -> None:
    run = config.load_run(path)
    meta, real = built(run.system)
    for model in (meta, real):
        with torch.device(model.llm.embedding.weight.device):
            choose_trainable(model, run.stage.learning_rates)
    own = {name: p.shape for name, p in real.named_parameters()}
    assert {name: p.shape for name, p in meta.named_parameters()} == own
    trained = [
        {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        for model in (meta, real)
    ]
    assert trained[0] == trained[1]
    assert all(p.is_meta for p in meta.parameters())
    decoders = {part.name: part for part in planning.parts_of(meta)}
    for key, decoder in real.decoders.items():
        loaded = decoder.pipeline.components.values()
        networks = [part for part in loaded if isinstance(part, torch.nn.Module)]
        count = sum(p.numel() for network in networks for p in network.parameters())
        assert decoders[f"decoders.{key}"].parameters == count


@pytest.mark.parametrize("name", TWINS)
def test_an_encoder_without_weights_has_the_shapes_of_the_loaded_one(
    name: str, tmp_path: Path
) -> None:
    TWINS[name].write(tmp_path)
    loaded = TWINS[name].build(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with weights.skip_weights():
        meta = TWINS[name].build(tmp_path)
    assert meta.feature_shape == loaded.feature_shape
    assert meta.sample_shape == loaded.sample_shape
    shapes = {name: (p.shape, p.dtype) for name, p in loaded.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in meta.named_parameters()} == shapes
    assert all(p.is_meta for p in meta.parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pipeline_without_weights_has_the_parameters_of_the_loaded_one(
    family: str, tmp_path: Path
) -> None:
    from mmllm.decoders.loading import load_pipeline
    from mmllm.decoders.networks import meta_components

    folder = tiny.save(family, tmp_path / family)
    loaded = {
        name: {key: p.shape for key, p in part.named_parameters()}
        for name, part in load_pipeline(folder).components.items()
        if isinstance(part, torch.nn.Module)
    }
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    meta = meta_components(folder)
    assert {n: {k: p.shape for k, p in m.named_parameters()} for n, m in meta.items()} == loaded


def test_a_packed_decoder_is_planned_as_it_is_loaded(system_tree: dict, tmp_path: Path) -> None:
    folder = tiny.save("flux", tmp_path / "flux")
    packed = tiny.entry("flux", folder, quantization="8bit")
    tree = {**system_tree, "decoders": {**system_tree["decoders"], "image": packed}}
    model = models.build(config.parse_system(tree))
    parts_of_system = {part.name: part for part in planning.parts_of(model)}
    loaded = model.decoders["image"].pipeline.components.values()
    weights_of = [
        p for each in loaded if isinstance(each, torch.nn.Module) for p in each.parameters()
    ]
    assert parts_of_system["decoders.image"].bytes == sum(p.nbytes for p in weights_of)


def test_a_decoder_loads_in_the_dtype_of_its_config(tmp_path: Path) -> None:
    folder = tiny.save("image", tmp_path / "image")
    half = config.build(tiny.entry("image", folder, dtype="bfloat16"))
    full = config.build(tiny.entry("image", folder))
    assert half.pipeline.transformer.dtype == torch.bfloat16
    assert half.to("cpu").pipeline.transformer.dtype == torch.bfloat16
    assert full.pipeline.transformer.dtype == torch.float32
    assert half.fingerprint != full.fingerprint
    assert half.encode_captions(["a red apple"])["prompt_embeds"].dtype == torch.float32


# --- estimates ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.write_llm(tmp_path_factory.mktemp("llama"), width=256)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        None,
        LoraOptions(4, 8.0, 0.1, ("q_proj", "k_proj", "v_proj", "o_proj")),
        LoraOptions(4, 8.0, 0.1, "all-linear"),
        LoraOptions(4, 8.0, 0.0, "all-linear"),
    ],
    ids=["none", "attention", "all", "without-dropout"],
)
def test_activations_are_what_autograd_keeps(
    llama: Path,
    run: RunConfig,
    lora: LoraOptions | None,
    recompute: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the layers alone: what stands for the logits is taken off."""
    monkeypatch.setattr(packed_attention, "MAX_MATH_KEYS", 0)  # the fused kernel, as on GPUs
    llm = loading.build(CausalLMConfig(str(llama), lora), dtype=torch.bfloat16)
    if lora:
        llm.attach_lora()
        for _, parameter in llm.lora_parameters():
            parameter.requires_grad_(True)
    stage = replace(run.stage, precision="bf16", max_length=64, gradient_checkpointing=recompute)
    if recompute:
        llm.train().gradient_checkpointing_enable()
    group = ParameterGroup(
        "llm.signal_embeddings", 1.0, {"llm.signal_embeddings": llm.signal_embeddings}
    )
    embeds = torch.randn(2, 64, 256, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        kept, _ = planning.measure(llm, embeds)
    logits = 12 * len(llm.embedding.weight) * 2 * 64
    planned = planning.activations(llm, stage, [group], rows=2) - logits
    if recompute:  # one layer at a time is there again in the backward pass, which is not seen here
        whole = (
            planning.activations(llm, replace(stage, gradient_checkpointing=False), [group], 2)
            - logits
        )
        planned -= (whole - 4 * 256 * 2 * 64) / 2
    assert 0.75 < planned / kept < 1.25
    assert planning.activations(llm, stage, [], rows=2) == logits, "nothing reaches the LLM"


def test_operations_are_what_torch_counts(llama: Path, run: RunConfig) -> None:
    options = LoraOptions(4, 8.0, 0.0, "all-linear")
    llm = loading.build(CausalLMConfig(str(llama), options), dtype=torch.float32)
    llm.attach_lora()
    for _, parameter in llm.lora_parameters():
        parameter.requires_grad_(True)
    group = ParameterGroup("llm.lora.*", 1.0, dict(llm.lora_parameters()))
    group = replace(group, parameters={f"llm.lora.{n}": p for n, p in group.parameters.items()})
    embeds = torch.randn(2, 64, 256, requires_grad=True)
    labels = torch.zeros(128, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = llm(embeds).flatten(0, 1)
        torch.nn.functional.cross_entropy(llm.head(hidden), labels).backward()
    stage = replace(run.stage, max_length=64)
    planned = planning.operations(llm, stage, [group], rows=2)
    assert planned / counter.get_total_flops() == pytest.approx(1, abs=0.1)


def test_time_disk_and_processes_follow_the_stage(run: RunConfig) -> None:
    model = models.build(run.system, dtype=torch.bfloat16, meta=True)
    one = planning.plan_stage(model, run)
    more = replace(run, stage=replace(run.stage, steps=10, batch_size=4))
    two = planning.plan_stage(model, more, processes=2)
    assert two.rows == one.rows == 2
    assert two.flops == pytest.approx(20 * one.flops)
    assert two.memory == one.memory
    assert one.items == dict.fromkeys(parts.KEYS, 4), "counted in the file"
    with pytest.raises(ConfigError, match="cannot be divided among 3 processes"):
        planning.plan_stage(model, run, processes=3)


def test_the_cache_is_counted_in_its_type_for_the_items_that_there_are(run: RunConfig) -> None:
    model = models.build(run.system, dtype=torch.bfloat16, meta=True)
    missing = {name: replace(entry, file="not/here.json") for name, entry in run.stage.data.items()}
    stage = replace(run.stage, cache="folder", steps=100, data=missing)
    drawn = planning.plan_stage(model, replace(run, stage=stage))
    some = planning.plan_stage(model, replace(run, stage=stage), num_items=10)
    assert all(count > 10 for count in drawn.items.values())
    assert some.items == dict.fromkeys(parts.KEYS, 10)
    rounded = replace(run, stage=replace(stage, cache_dtype="bfloat16"))
    assert 2 * planning.plan_stage(model, rounded, num_items=10).cache == some.cache


def test_the_system_of_one_backbone_in_the_docs_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "decoders.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(system:.*?)```", page, re.DOTALL)
    (block,) = [block for block in blocks if "text_encoder: llm" in block]
    (tmp_path / "system.yaml").write_text(block)
    assert main(["plan", str(tmp_path / "system.yaml")]) == 0
    (saved,) = re.findall(r"([\d.]+ GiB) saved: its text encoder", capsys.readouterr().out)
    assert f"shows what is saved: {saved} for the system above" in page


def test_what_a_stage_does_not_need_is_not_counted(run: RunConfig) -> None:
    model = models.build(run.system, dtype=torch.bfloat16, meta=True)
    complete = replace(run.stage, cache="folder", cache_complete=True)
    found = planning.plan_stage(model, replace(run, stage=complete))
    assert found.memory["encoders"] == 0 == found.memory["decoders"]
    assert not found.filling
    denoise = replace(run.stage, losses={**run.stage.losses, "denoise": 1.0})
    found = planning.plan_stage(model, replace(run, stage=denoise))
    assert found.memory["decoders"] > 0


# --- the command --------------------------------------------------------------------------------


def test_the_command_shows_all_of_it(
    run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "1_stage.yaml"
    path.write_text(yaml.safe_dump(config.dump(run)))
    assert main(["plan", str(path), "stage.steps=3", "--flops", "1e9"]) == 0
    shown, warnings = capsys.readouterr()
    assert warnings == ""
    for word in (
        "decoders.video",
        "transformer",
        "licences",
        "unknown",
        "3 steps of 2",
        "optimizer",
    ):
        assert word in shown
    assert re.search(r"time +[\d.]+ minutes at 1e\+09", shown)
    assert main(["plan", str(tmp_path)]) == 0, "a folder of stages"
    assert "\nstage everything" in capsys.readouterr().out
    (tmp_path / "system.yaml").write_text(yaml.safe_dump(config.dump(run.system)))
    assert main(["plan", str(tmp_path / "system.yaml")]) == 0, "a system alone"
    assert "\nstage" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["system.llm.weights=nobody/nothing"], "the configs of 'nobody/nothing' are not at hand"),
        (["--flops", "0"], "--flops: expected more than 0"),
        (["--num-processes", "0"], "--num-processes: expected at least 1"),
        (["--items", "0"], "--items: expected at least 1"),
        (["stage.stpes=1"], "did you mean 'steps'"),
    ],
)
def test_an_invalid_plan_is_one_error_message(
    arguments: list[str],
    message: str,
    run: RunConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "1_stage.yaml"
    path.write_text(yaml.safe_dump(config.dump(run)))
    assert main(["plan", str(path), *arguments]) == FAILED
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no stages there"):
        planning.plan(ROOT / "docs")


def test_the_hubs_cache_is_read_and_nothing_is_fetched(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub's library lays a snapshot out, and with the configs alone in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked a network"))
    with weights.skip_weights(), pytest.raises(AssetError, match="not at hand"):
        weights.locate("owner/name", "llm")
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
    shutil.copy(llama / "config.json", snapshot)
    with weights.skip_weights():
        assert weights.locate("owner/name", "llm") == str(snapshot)


# --- licences -----------------------------------------------------------------------------------


@pytest.fixture
def paper() -> dict:
    return config.read_yaml(ROOT / "configs" / "nextgpt-7b" / "system.yaml")


def test_a_licence_that_forbids_commerce_must_be_accepted(paper: dict) -> None:
    with pytest.raises(ConfigError) as refused:
        licences.check(config.parse_system(paper))
    for word in (
        "decoders.audio (cvssp/audioldm-l-full): CC-BY-NC-SA-4.0",
        "decoders.video (cerspense/zeroscope_v2_576w): CC-BY-NC-4.0",
        "accept_licences: [CC-BY-NC-SA-4.0, CC-BY-NC-4.0]",
    ):
        assert word in str(refused.value)
    one = config.parse_system({**paper, "accept_licences": ["CC-BY-NC-4.0"]})
    with pytest.raises(ConfigError, match=r"audioldm-l-full\): CC-BY-NC-SA-4\.0") as refused:
        licences.check(one)
    assert "zeroscope" not in str(refused.value)
    both = ["CC-BY-NC-4.0", "CC-BY-NC-SA-4.0"]
    licences.check(config.parse_system({**paper, "accept_licences": both}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"accept_licences": ["CC-BY-NC"]},
            "unknown licence 'CC-BY-NC'; did you mean 'CC-BY-NC-4.0'",
        ),
        (
            {"licences": {"encoders.imge": "MIT"}},
            "no part 'encoders.imge'; did you mean 'encoders.im",
        ),
        ({"licences": {"llm": "OpenMind-NC-1"}}, r"llm \(.*\): OpenMind-NC-1"),
    ],
)
def test_licences_are_strict(system_tree: dict, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        licences.check(config.parse_system({**system_tree, **changes}))


def test_custom_parts_declare_their_licence(system_tree: dict) -> None:
    changes = {"licences": {"encoders.image": "CC-BY-NC-SA-4.0"}}
    with pytest.raises(ConfigError, match=r"encoders\.image"):
        licences.check(config.parse_system({**system_tree, **changes}))
    changes["accept_licences"] = ["CC-BY-NC-SA-4.0"]
    system = config.parse_system({**system_tree, **changes})
    licences.check(system)
    assert config.parse_system(config.dump(system)) == system, "a checkpoint keeps it"
    shown = {entry.part: entry for entry in licences.of_parts(system)}
    assert shown["encoders.image"].source == "the config"
    assert shown["encoders.audio"].licence == licences.UNKNOWN


def test_mini_needs_no_acceptance_and_each_of_its_parts_is_known() -> None:
    from mmllm.mini.assets import ASSETS

    system = config.load_run(MINI[0]).system
    licences.check(system)
    for entry in licences.of_parts(system):
        assert entry.licence in licences.LICENCES, entry
        name = entry.weights.removeprefix("mini:")
        assert name not in ASSETS or ASSETS[name].licence == entry.licence


def test_a_checkpoint_is_not_loaded_or_exported_without_acceptance(
    make_model: Callable[..., AnyToAny], tmp_path: Path
) -> None:
    model = make_model(licences={"llm": "OpenMind-NC-1"})
    saved = checkpoints.open_checkpoint(checkpoints.save(tmp_path / "saved", model, step=0))
    with pytest.raises(ConfigError, match="OpenMind-NC-1"):
        checkpoints.load_model(saved)
    with pytest.raises(ConfigError, match="OpenMind-NC-1"):
        checkpoints.merge(saved, tmp_path / "merged", dtype=torch.float32)
    assert not (tmp_path / "merged").exists()


def test_training_and_chat_stop_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = ROOT / "configs" / "nextgpt-7b"
    stage = [str(recipe / "1_encoder_alignment.yaml"), "stage.precision='no'"]
    assert main(["train", *stage]) == FAILED
    assert main(["cache", *stage, f"stage.cache={tmp_path / 'cache'}"]) == FAILED
    assert main(["chat", "hello", "--model", str(recipe / "system.yaml")]) == FAILED
    assert capsys.readouterr().err.count("may not be used commercially") == 3
    assert not (tmp_path / "runs").exists()
