"""Strict configuration: every shipped YAML parses, and what cannot be meant is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mmllm import config
from mmllm.errors import ConfigError

ROOT = Path(__file__).parent.parent
STAGES = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if "stage" in yaml.safe_load(path.open())
)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.name)
def test_every_shipped_stage_parses_and_survives_a_round_trip(path: Path) -> None:
    run = config.load_run(path)
    assert run.stage.train
    assert config.parse_run(config.dump(run)) == run
    assert "accelerate launch" in path.read_text()[:400], "headed with its launch command"


def test_the_three_stages_of_mini_follow_each_other() -> None:
    runs = [config.load_run(path) for path in STAGES if path.parent.name == "mini"]
    assert [run.stage.start for run in runs] == [None, *(run.stage.output for run in runs[:-1])]
    assert len({config.dump(run.system)["name"] for run in runs}) == 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("system.encoders.image.wieghts", "x", r"encoders\.image: unknown key 'wieghts'; did you"),
        ("stage.batchsize", 8, r"stage: unknown key 'batchsize'; did you mean 'batch_size'"),
        ("stage.steps", "many", r"stage\.steps: .*integer.*'many'"),
        ("stage.steps", 0, r"stage\.steps: expected at least 1"),
        ("stage.losses.txt", 1.0, r"unknown loss \['txt'\]"),
        ("stage.schedule", "cosin", r"stage\.schedule: "),
        ("stage.accumulation", 5, r"not a multiple of"),
        ("system.encoders.image.type", "efficentnet", r"did you mean 'efficientnet'"),
        ("system.llm.lora.rnak", 4, r"llm\.lora: unknown key 'rnak'; did you mean 'rank'"),
        ("stage.data.pictures.type", "pear", r"did you mean 'pairs'"),
        ("sytem", {}, r"unknown key 'sytem'; did you mean 'system'"),
    ],
)
def test_what_cannot_be_meant_is_refused(path: str, value: object, message: str) -> None:
    tree = config.read_yaml(ROOT / "configs/mini/1_encoder_alignment.yaml")
    config._override(tree, f"{path}={yaml.safe_dump(value).strip().removesuffix('...').strip()}")
    with pytest.raises(ConfigError, match=message):
        config.parse_run(tree)


def test_overrides_are_checked_like_the_yaml() -> None:
    path = ROOT / "configs/mini/1_encoder_alignment.yaml"
    run = config.load_run(path, ["stage.steps=7", "stage.train={input_projections.*: 1e-4}"])
    assert run.stage.steps == 7
    assert run.stage.train == {"input_projections.*": 1e-4}
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        config.load_run(path, ["stage.step=7"])
    with pytest.raises(ConfigError, match=r"expected dotted\.key=value"):
        config.load_run(path, ["stage.steps"])


def test_each_part_needs_its_projection() -> None:
    tree = config.read_yaml(ROOT / "configs/mini/1_encoder_alignment.yaml")
    del tree["system"]["input_projections"]["audio"]
    with pytest.raises(ConfigError, match="input_projections: expected the keys of"):
        config.parse_run(tree)


def test_a_missing_file_and_broken_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        config.load_run(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"broken\.yaml: cannot be read as YAML"):
        config.load_run(tmp_path / "broken.yaml")
