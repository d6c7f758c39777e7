"""Strict configuration: every shipped YAML parses, and errors name the invalid key."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from mmllm import config
from mmllm.checkpoints import open_checkpoint
from mmllm.errors import ConfigError, MmllmError
from mmllm.utils import literals

ROOT = Path(__file__).parent.parent
STAGES = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if "stage" in yaml.safe_load(path.open())
)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.name)
def test_every_shipped_stage_parses_and_survives_a_round_trip(path: Path) -> None:
    run = config.load_run(path)
    assert run.stage.learning_rates
    assert config.parse_run(config.dump(run)) == run
    assert "accelerate launch" in path.read_text()[:400], "headed with its launch command"


def test_the_three_stages_of_mini_follow_each_other() -> None:
    runs = [config.load_run(path) for path in STAGES if path.parent.name == "mini"]
    assert [run.stage.init_from for run in runs] == [None, *(run.stage.output for run in runs[:-1])]
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
        ("stage.gradient_accumulation_steps", 5, r"not a multiple of"),
        ("system.encoders.image.type", "efficentnet", r"did you mean 'efficientnet'"),
        ("system.llm.lora.rnak", 4, r"llm\.lora: unknown key 'rnak'; did you mean 'rank'"),
        ("stage.data.pictures.type", "pear", r"did you mean 'pairs'"),
        ("sytem", {}, r"unknown key 'sytem'; did you mean 'system'"),
    ],
)
def test_invalid_values_are_refused(path: str, value: object, message: str) -> None:
    tree = config.read_yaml(ROOT / "configs/mini/1_encoder_alignment.yaml")
    config.override(tree, f"{path}={yaml.safe_dump(value).strip().removesuffix('...').strip()}")
    with pytest.raises(ConfigError, match=message):
        config.parse_run(tree)


def test_overrides_are_checked_like_the_yaml() -> None:
    path = ROOT / "configs/mini/1_encoder_alignment.yaml"
    run = config.load_run(
        path, ["stage.steps=7", "stage.learning_rates={input_projections.*: 1e-4}"]
    )
    assert run.stage.steps == 7
    assert run.stage.learning_rates == {"input_projections.*": 1e-4}
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


@dataclass(frozen=True)
class Everything:
    """A field of every type that configs have."""

    word: str = ""
    choice: Literal["auto", "no", "on", "4bit", "null"] = "auto"
    maybe: Literal["no", "yes"] | None = None
    count: int = 0
    share: float = 0.0
    switch: bool = False
    words: tuple[str, ...] = ()
    either: tuple[str, ...] | str = ()
    pair: tuple[float, float] = (0.0, 0.0)
    rates: Mapping[str, float] = field(default_factory=dict)
    places: Mapping[str, int | str] | str | None = None
    anything: Mapping[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("word: no", "no"),
        ("word: True", "True"),
        ("word: 1.10", "1.10"),
        ("word: 010", "010"),
        ("word: 0x1F", "0x1F"),
        ("word: 2026-01-02", "2026-01-02"),
        ("word: 2026-13-45", "2026-13-45"),
        ("word: 1:30", "1:30"),
        ("word: 1e-4", "1e-4"),
        ("word: =", "="),
        ("word: 'null'", "null"),
        ("choice: no", "no"),
        ("choice: No", "no"),
        ("choice: on", "on"),
        ("choice: 4bit", "4bit"),
        ("maybe: no", "no"),
        ("maybe: null", None),
        ("maybe: ~", None),
        ("maybe:", None),
        ("count: 1_000", 1000),
        ("count: 1e3", 1000),
        ("count: 010", 10),
        ("count: 0o17", 15),
        ("count: 0x10", 16),
        ("share: 1e-4", 1e-4),
        ("share: 1E5", 1e5),
        ("share: -.5e+3", -500.0),
        ("share: 3", 3.0),
        ("share: .inf", float("inf")),
        ("switch: off", False),
        ("switch: Yes", True),
        ("switch: y", True),
        ("switch: 1", True),
        ("words: [no, 1.10, 2026-01-02, on]", ("no", "1.10", "2026-01-02", "on")),
        ("either: [off, x]", ("off", "x")),
        ("either: off", "off"),
        ("pair: [1e-1, 1]", (0.1, 1.0)),
        ("rates: {no: 1e-4, 2: 5}", {"no": 1e-4, "2": 5.0}),
        ("places: {a: 0, b: cpu, c: no}", {"a": 0, "b": "cpu", "c": "no"}),
        ("places: null", None),
        ("anything: {a: no, b: 1e-4, c: [on, '1'], d: 1:30}", None),
    ],
)
def test_a_literal_is_read_by_the_type_of_its_field(text: str, value: object) -> None:
    read = config.parse(Everything, literals.load(text), "x")
    (name,) = literals.load(text)
    if name == "anything":
        assert read.anything == {"a": False, "b": 1e-4, "c": [True, "1"], "d": "1:30"}
        assert type(read.anything["a"]) is bool
        return
    assert getattr(read, name) == value
    assert type(getattr(read, name)) is type(value)
    assert config.parse(Everything, literals.load(literals.dump(config.dump(read))), "x") == read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("word: null", r"x\.word: .*string, got None; .* put quotes round a text"),
        ("word:", r"x\.word: .*got None"),
        ("count: yes", r"x\.count: .*integer.*'yes'"),
        ("count: 1:30", r"x\.count: .*'1:30'"),
        ("count: 2026-01-02", r"x\.count: .*'2026-01-02'"),
        ("count: 1.5", r"x\.count: .*1\.5"),
        ("share: on", r"x\.share: .*'on'"),
        ("share: .nan", r"x\.share: .*nan"),
        ("rates: {a: .NaN}", r"x\.rates: .*nan"),
        ("switch: 2", r"x\.switch: .*2"),
        ("switch: maybe", r"x\.switch: .*'maybe'"),
        ("choice: off", r"x\.choice: .*'off'"),
        ("choice: 4", r"x\.choice: .*'4'"),
        ("words: no", r"x\.words: .*'no'"),
    ],
)
def test_a_literal_that_does_not_fit_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.parse(Everything, literals.load(text), "x")


def test_overrides_are_read_by_the_type_of_their_field() -> None:
    path = ROOT / "configs/mini/1_encoder_alignment.yaml"
    stage = config.load_run(
        path,
        [
            "stage.precision=no",
            "stage.liger_loss=on",
            "stage.name=1e5",
            "stage.max_grad_norm=1e-1",
            "stage.pack=no",
        ],
    ).stage
    assert (stage.precision, stage.liger_loss, stage.name) == ("no", "on", "1e5")
    assert (stage.max_grad_norm, stage.pack) == (0.1, False)
    with pytest.raises(ConfigError, match=r"stage\.output: .*got None; YAML reads null"):
        config.load_run(path, ["stage.output=null"])
    for broken in ("stage.name=[1", "stage.name=@x", "stage.name=!!python/name:os.system", "a=*b"):
        with pytest.raises(ConfigError, match="the value is no YAML"):
            config.load_run(path, [broken])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' is there twice"),
        ("a: &x [*x]", "contains itself"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("a: !!timestamp 2026-13-45", "could not determine a constructor"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("[a, b]: c", "unhashable"),
        ("a: x\0y", "unacceptable character"),
        ("a: '" + "x" * 200_000 + "'", "more than 131072 characters"),
        ("\xff", "expected a mapping"),
        ("system: run.yaml", "missing key|unknown key|mapping"),
        (
            "a0: &a0 [x, x]\n"
            + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 50)),
            "when aliases are written out",
        ),
        (
            "a0: &a0 {k: 1}\n"
            + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 50)),
            "when aliases are written out",
        ),
    ],
    ids=lambda text: text[:20],
)
def test_a_hostile_document_is_refused_with_a_short_error(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        config.load_run(tmp_path / "run.yaml")
    assert len(str(caught.value)) < 1000


def test_invalid_utf8_is_refused_and_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run\.yaml: cannot be read as YAML"):
        config.load_run(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbfa: no")
    assert literals.without_spelling(config.read_yaml(tmp_path / "run.yaml")) == {"a": False}


def test_a_huge_value_is_cut_in_its_message() -> None:
    tree = config.read_yaml(ROOT / "configs/mini/1_encoder_alignment.yaml")
    for place in ("steps", "schedule", "data", "learning_rates", "x" * 100_000):
        for value in ("y" * 100_000, [["z"] * 1000] * 1000):
            with pytest.raises(MmllmError) as caught:
                config.parse_run({**tree, "stage": {**tree["stage"], place: value}})
            assert len(str(caught.value)) < 1500


OWN = """
from dataclasses import dataclass

@dataclass(frozen=True)
class {name}Config:
    size: int = 1

class NoConfig: pass
"""


def test_custom_types_are_found_in_the_working_folder_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    Path("own_part_of_a_test.py").write_text(OWN.format(name="Own"))
    Path("own_broken_part.py").write_text("raise RuntimeError('boom')")
    Path("jinja2.py").write_text("raise SystemExit('must not be found')")
    found = config.parse_component(
        "encoders", {"type": "own_part_of_a_test:OwnConfig", "size": 3}, "encoders.x"
    )
    assert config.dump(found) == {"type": "own_part_of_a_test:OwnConfig", "size": 3}
    assert sys.path[-1] == str(tmp_path)
    for kind, message in (
        ("own_broken_part:X", "RuntimeError: boom"),
        ("own_absent_part:X", "own_absent_part"),
        ("own_part_of_a_test:AbsentConfig", "AbsentConfig"),
        ("own_part_of_a_test:NoConfig", "is no dataclass"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.parse_component("encoders", {"type": kind}, "encoders.x")


def test_former_names_of_a_stages_keys_are_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = ROOT / "configs/mini/3_instruction_tuning.yaml"
    expected = config.load_run(path)
    text = path.read_text()
    for old, new in config.RENAMED.items():
        text = re.sub(rf"\b{new}:", f"{old}:", text)
    for old, new in config.RENAMED_PARAMETERS.items():
        text = text.replace(f"{new}:", f"{old}:")
    assert all(f"{old}:" in text for old in ("train", "start", "retain", "checkpoint_every"))
    own = tmp_path / path.name
    own.write_text(text)
    (tmp_path / "system.yaml").write_text((path.parent / "system.yaml").read_text())
    assert config.load_run(own) == expected
    assert "stage.train is now called learning_rates" in caplog.text
    assert "stage.losses.retain is now called kl" in caplog.text
    assert "stage.learning_rates.llm.rows is now called llm.signal_embeddings" in caplog.text
    caplog.clear()
    (tmp_path / "manifest.json").write_text("{}")
    assert config.load_run(own) == expected
    assert not caplog.text, "a checkpoint keeps the names that it was trained with"


def test_former_names_of_a_decoders_keys_are_read_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    entry = {"type": "flux", "weights": "w", "negative": "blurry", "true_guidance": 2.0}
    read = config.parse_component("decoders", entry, "decoders.image")
    assert (read.negative_prompt, read.true_cfg_scale) == ("blurry", 2.0)
    assert "decoders.image.negative is now called negative_prompt" in caplog.text
    assert "decoders.image.true_guidance is now called true_cfg_scale" in caplog.text
    caplog.clear()
    assert config.parse_component("decoders", entry, "decoders.image", warn=False) == read
    assert not caplog.records
    with pytest.raises(ConfigError, match="negative is now called negative_prompt, and both"):
        config.parse_component("decoders", entry | {"negative_prompt": "x"}, "decoders.image")


def test_an_override_may_use_a_former_name() -> None:
    path = ROOT / "configs/mini/3_instruction_tuning.yaml"
    run = config.load_run(path, ["stage.checkpoint_every=7", "stage.losses.retain=2"])
    assert (run.stage.save_steps, run.stage.losses["kl"]) == (7, 2.0)


def test_a_key_under_both_names_is_refused() -> None:
    tree = config.read_yaml(ROOT / "configs/mini/3_instruction_tuning.yaml")
    tree["stage"]["start"] = "elsewhere"
    with pytest.raises(ConfigError, match="start is now called init_from, and both are given"):
        config.parse_run(tree)


def test_a_checkpoint_keeps_the_former_names_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(open_checkpoint("mini").folder, tmp_path / "old")
    settings = tmp_path / "old" / "config.yaml"
    text = settings.read_text(encoding="utf-8")
    assert "negative_prompt: ''" in text
    settings.write_text(
        text.replace("negative_prompt: ''", "negative: 'blurred'"), encoding="utf-8"
    )
    decoders: Any = open_checkpoint(tmp_path / "old").system().decoders
    assert decoders["image"].negative_prompt == "blurred"
    assert "is now called" not in caplog.text
