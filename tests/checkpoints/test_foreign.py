"""Checkpoints that others wrote: whatever is wrong with one is a short error of mmllm's, in bounded
time; it runs no code, asks nobody, and reads nothing outside its folder."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mmllm
from mmllm import checkpoints, config, model
from mmllm.config.trusted import TRUSTED
from mmllm.errors import CheckpointError, ConfigError, MmllmError
from tests import processes
from tests.encoders.twins import TWINS
from tests.llm.helpers import adapted

ROOT = Path(__file__).parents[2]
SECONDS = 20.0
"""A tiny checkpoint loads in one or two; machines are busy."""
RUN = "import pathlib; pathlib.Path('ran').touch()"


@pytest.fixture(scope="module")
def whole(system_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint with an adapter, and one whose language model lies inside it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = model.build(config.parse_system(system_tree))
    checkpoints.save(folder / "merged", made, step=2, with_llm=True)
    adapted(made.llm)
    checkpoints.save(folder / "adapted", made, step=1)
    return {"merged": folder / "merged", "adapted": folder / "adapted"}


@pytest.fixture
def foreign(whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`foreign("merged")`: a copy that a test may change, as the working folder."""
    monkeypatch.setattr(TRUSTED, "names", set())

    def copy(kind: str) -> Path:
        folder = shutil.copytree(whole[kind], tmp_path / "foreign")
        (tmp_path / "outside.jinja").write_text("{{ messages[0]['content'] }}")
        (tmp_path / "outside.safetensors").write_bytes(b"secret")
        monkeypatch.chdir(folder)
        return folder

    return copy


def seal(folder: Path) -> None:
    """Update the manifest to match the modified files, as an attacker would."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"] = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in manifest["files"]
        if (folder / name).is_file()
    }
    file.write_text(json.dumps(manifest))


def refused(folder: Path, match: str) -> MmllmError:
    """The error of loading a folder, which must be short, quick and run no code."""
    began = time.monotonic()
    with pytest.raises(MmllmError, match=match) as caught:
        mmllm.load(str(folder), device="cpu", dtype="float32")
    assert time.monotonic() - began < SECONDS
    assert len(str(caught.value)) < 2000
    assert not Path("ran").exists()
    assert "secret" not in str(caught.value)
    return caught.value


def change_config(folder: Path, change: Callable[[dict], Any]) -> None:
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    change(tree["system"])
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    seal(folder)


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


# --- code ---------------------------------------------------------------------------------------


def test_an_intact_checkpoint_loads_and_replies(foreign) -> None:
    for kind in ("merged", "adapted"):
        folder = foreign(kind)
        reply = mmllm.load(str(folder), device="cpu").reply([mmllm.user("hello")], max_new_tokens=2)
        assert reply.message.role == "assistant"
        shutil.rmtree(folder)


def test_its_own_types_are_not_imported(foreign, monkeypatch) -> None:
    monkeypatch.setattr(TRUSTED, "components", set())
    folder = foreign("merged")
    monkeypatch.syspath_prepend(str(folder))
    Path("evil_part.py").write_text(RUN)
    error = refused(folder, "tests.parts:ColourConfig.* --trust tests.parts")
    assert isinstance(error, ConfigError)
    config.trust(["tests"])
    for place in ("encoders", "decoders", "input_projections", "output_projections"):
        before = (folder / "config.yaml").read_text()
        change_config(
            folder, lambda tree, place=place: tree[place]["image"].update(type="evil_part:X")
        )
        refused(folder, rf"{place}: image: type 'evil_part:X' is code .* --trust evil_part")
        (folder / "config.yaml").write_text(before)
    change_config(folder, lambda tree: tree["llm"].update(type="evil_part:X"))
    refused(folder, r"evil_part:X")
    with pytest.raises(ConfigError, match="evil_part"):
        checkpoints.open_checkpoint(folder).system()
    with pytest.raises(ConfigError, match="evil_part"):
        mmllm.load(str(folder / "config.yaml"))
    assert "evil_part" not in sys.modules


def test_nested_types_are_not_imported_either(foreign) -> None:
    folder = foreign("merged")
    Path("evil_part.py").write_text(RUN)
    inner = {"type": "frames", "encoder": {"type": "evil_part:X"}}
    change_config(folder, lambda tree: tree["encoders"].update(video=inner))
    refused(folder, r"encoders: video: encoder: type 'evil_part:X' is code")


def test_trusted_types_are_loaded(foreign, monkeypatch) -> None:
    monkeypatch.setattr(TRUSTED, "components", set())
    folder = foreign("merged")
    for names in (["tests.parts"], ["tests"], ["tests.parts:ColourConfig"]):
        TRUSTED.clear()
        assert mmllm.load(str(folder), device="cpu", trust=names).model.encoders
    TRUSTED.clear()
    refused_names = ["tests.part", "parts", "ests.parts"]
    with pytest.raises(ConfigError, match="code that does not belong"):
        mmllm.load(str(folder), device="cpu", trust=refused_names)
    with pytest.raises(ConfigError, match="expected a list of names"):
        mmllm.load(str(folder), trust="tests")


def test_the_command_line_runs_no_foreign_code(foreign, tmp_path) -> None:
    folder = foreign("merged")
    (folder / "jinja2.py").write_text(RUN)
    (folder / "bitsandbytes.py").write_text(RUN)
    command = ["-m", "mmllm", "chat", "hello", "--model", "."]

    def chat(*arguments: str) -> subprocess.CompletedProcess[str]:
        return processes.run([*command, *arguments], cwd=Path.cwd(), typed="y\n" * 99)

    done = chat()
    assert done.returncode == 2
    assert "--trust tests.parts" in done.stderr
    assert "Traceback" not in done.stderr
    forbidden = ["--forbid", "image", "--forbid", "audio"]
    done = subprocess.run(  # which imports everything where the other files lie
        [sys.executable, *command, "--trust", "tests.parts", *forbidden],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        input="y\n" * 99,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not Path("ran").exists()
    change_json(
        folder / "llm/config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    (folder / "llm/evil.py").write_text(RUN)
    seal(folder)
    done = chat("--trust", "tests.parts")
    assert done.returncode == 2
    assert "it brings code of its own, which is never run here" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not Path("ran").exists()


CODE = {
    "config": lambda llm: change_json(
        llm / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    ),
    "elsewhere": lambda llm: change_json(
        llm / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "owner/name--evil.Config"},
    ),
    "tokenizer": lambda llm: change_json(
        llm / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
    ),
}


@pytest.mark.parametrize("change", CODE.values(), ids=CODE)
def test_code_in_the_folder_of_a_language_model_is_not_run(foreign, change, monkeypatch) -> None:
    folder = foreign("merged")
    (folder / "llm/evil.py").write_text(RUN)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    change(folder / "llm")
    seal(folder)
    refused(folder, "code of its own, which is never run here")


def test_kernels_of_a_hub_are_not_fetched(foreign) -> None:
    folder = foreign("merged")
    change_json(folder / "llm/config.json", _attn_implementation="evil/kernel")
    seal(folder)
    refused(folder, r"_attn_implementation: 'evil/kernel' is code from a hub")


def test_no_adapter_is_opened_as_a_pickle(foreign) -> None:
    folder = foreign("adapted")
    adapter = folder / "adapter/adapter_model.safetensors"
    torch.save(load_file(adapter), adapter.with_suffix(".bin"))
    adapter.unlink()
    seal(folder)
    refused(folder, r"adapter_model\.safetensors: absent .*adapter_model\.bin.* no pickle is")


def test_no_weights_are_opened_as_a_pickle(foreign) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return exec, (RUN,)

    folder = foreign("merged")
    (folder / "llm/model.safetensors").unlink()
    (folder / "llm/pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    seal(folder)
    refused(folder, r"only pytorch_model\.bin, a pickle, which is not read here")


def test_an_adapter_in_place_of_a_model_does_not_lead_to_another_one(foreign) -> None:
    folder = foreign("merged")
    (folder / "llm/adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"})
    )
    refused(folder, "is the folder of an adapter, which names another model")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["mmllm.cli", "App"], "not of diffusers or transformers"),
        (["evil.part", "X"], "not of diffusers or transformers"),
        (["evil", "X"], r"brings evil\.py"),
        (["os", "PathLike"], "cannot be loaded"),
        (["transformers", "AutoTokenizer"], "cannot be loaded"),
    ],
)
def test_libraries_that_a_pipeline_names_are_not_imported(
    foreign, system_tree, tmp_path, entry, message, monkeypatch
) -> None:
    folder = foreign("merged")
    weights = Path(system_tree["decoders"]["image"]["weights"])
    pipeline = shutil.copytree(weights, tmp_path / "pipeline")
    change_config(folder, lambda tree: tree["decoders"]["image"].update(weights=str(pipeline)))
    index = json.loads((pipeline / "model_index.json").read_text())
    name = next(name for name, part in index.items() if part == index.get("tokenizer"))
    change_json(pipeline / "model_index.json", **{name: entry})
    change_json(
        pipeline / name / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.X", None]}
    )
    (pipeline / name / "evil.py").write_text(RUN)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    change_json(folder / "manifest.json", fingerprints={})
    if "cannot" not in message:
        refused(folder, message)
        return
    chat = mmllm.load(str(folder), device="cpu")
    with pytest.raises(MmllmError, match=message):  # a pipeline is opened when it is used
        chat.model.decoders["image"].encode_captions(["a"])


# --- files elsewhere ----------------------------------------------------------------------------


def _link(name: str, target: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def _names(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": 6, "sha256": ""}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return make


def _template(name: str) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, lambda tree: tree["llm"].update(chat_template=name))


def _config(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.yaml").write_text(text)
        seal(folder)

    return write


OUTSIDE = {
    "system": _config("system: /etc/passwd"),
    "system, relative": _config("system: ../outside.safetensors"),
    "template": _template("../outside.jinja"),
    "template, absolute": _template("/etc/outside.jinja"),
    "template, at home": _template("~/outside.jinja"),
    "rows": _link("rows.safetensors", "../outside.safetensors"),
    "config": _link("config.yaml", "../outside.safetensors"),
    "card": _link("README.md", "/etc/passwd"),
    "folder": _link("more", "/etc"),
    "device": _link("more", "/dev/zero"),
    "pipe": lambda folder: os.mkfifo(folder / "llm" / "generation_config2.json"),
    "manifest": _names("../outside.safetensors"),
    "manifest, absolute": _names("/etc/passwd"),
    "manifest, nul": _names("a\0b"),
    "manifest, long": _names("x" * 100_000),
}


@pytest.mark.parametrize("spoil", OUTSIDE.values(), ids=OUTSIDE)
def test_nothing_outside_of_its_folder_is_read(foreign, spoil) -> None:
    folder = foreign("merged")
    spoil(folder)
    error = refused(folder, "leads out of|links to a folder outside|has no file|is no file")
    assert "root:" not in str(error)


def test_a_link_to_a_template_and_one_that_is_trusted(foreign, tmp_path) -> None:
    folder = foreign("merged")
    _link("own.jinja", "../outside.jinja")(folder)
    _template("own.jinja")(folder)
    refused(folder, "leads out of")
    (folder / "own.jinja").unlink()
    outside = str(tmp_path / "outside.jinja")
    _template(outside)(folder)
    refused(folder, "leads out of .*--trust")
    chat = mmllm.load(str(folder), device="cpu", trust=[outside])
    assert chat.model.llm.chat_template == "{{ messages[0]['content'] }}"


def test_shards_that_lie_elsewhere_are_not_read(foreign) -> None:
    folder = foreign("merged")
    index = {"weight_map": {"model.norm.weight": "../../outside.safetensors"}}
    (folder / "llm/model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "leads out of")


def test_the_hubs_cache_of_links_is_read(whole, tmp_path) -> None:
    """snapshots/REVISION/NAME -> ../../blobs/HASH"""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(whole["merged"].rglob("*"))):
        if file.is_file():
            place = snapshot / file.relative_to(whole["merged"])
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blobs / str(number))
            place.symlink_to(blobs / str(number))
    assert mmllm.load(str(snapshot), device="cpu").model.num_input_tokens == {
        "image": 4,
        "audio": 2,
        "video": 3,
    }


def test_a_template_that_is_a_file_goes_along(make_model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    Path("mine.jinja").write_text(text)
    tree = {**make_model().config.llm.__dict__, "chat_template": "mine.jinja"}
    checkpoints.save(tmp_path / "trained", make_model(llm=tree), step=1)
    Path("mine.jinja").unlink()
    found = checkpoints.open_checkpoint((tmp_path / "trained").rename(tmp_path / "moved"))
    assert checkpoints.load_model(found).llm.chat_template == text
    checkpoints.export(found, tmp_path / "given")
    given = yaml.safe_load((tmp_path / "given/config.yaml").read_text())
    assert given["system"]["llm"]["chat_template"] == "chat_template.jinja"


# --- damage -------------------------------------------------------------------------------------


def _deep(depth: int = 100_000) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def _header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


TENSORS = {
    "nothing": b"",
    "garbage": b"\x07" * 1000,
    "a length without end": (2**63).to_bytes(8, "little") + b"{}",
    "no object": _header("[1, 2]"),
    "deep": _header(_deep(20_000)),
    "offsets beyond": _header(
        '{"rows": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 324]}}'
    ),
    "a shape without end": _header(
        '{"rows": {"dtype": "F32", "shape": [99999999999, 99999999999], "data_offsets": [0, 0]}}'
    ),
    "no text": _header("\ud800".encode("utf-8", "surrogatepass").decode("latin-1")),
    "a page of the web": b"<!DOCTYPE html><html>",
    "a pointer of git": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
}
FILES = ("rows.safetensors", "input_projections.safetensors", "llm/model.safetensors")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", TENSORS.values(), ids=TENSORS)
def test_damaged_tensors_are_reported_with_their_file(foreign, file, content) -> None:
    folder = foreign("merged")
    (folder / file).write_bytes(content)
    seal(folder)
    refused(folder, Path(file).name.replace(".", r"\."))


NUMBERS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nan": (lambda value: value.fill_(torch.nan), "holds NaN or infinite values"),
    "inf": (lambda value: value.fill_(-torch.inf), "holds NaN or infinite values"),
    "bool": (lambda value: value > 0, r"expected real numbers, got torch\.bool"),
    "complex": (
        lambda value: value.to(torch.complex64),
        r"expected real numbers, got torch\.compl",
    ),
    "int": (lambda value: value.to(torch.int32), r"expected real numbers, got torch\.int32"),
    "longer": (lambda value: value.repeat(2, *[1] * (value.ndim - 1)), r"expected \[.*, got \["),
}


@pytest.mark.parametrize(
    "file",
    [
        "rows.safetensors",
        "input_projections.safetensors",
        "output_projections.safetensors",
        "adapter/adapter_model.safetensors",
    ],
)
@pytest.mark.parametrize(("change", "message"), NUMBERS.values(), ids=NUMBERS)
def test_invalid_values_are_reported_by_name(foreign, file, change, message) -> None:
    folder = foreign("adapted")
    last = sorted(load_file(folder / file))[-1]
    change_tensors(folder / file, lambda all_: all_.update({last: change(all_[last]).contiguous()}))
    seal(folder)
    refused(folder, rf"{Path(file).name}: entry '{last[:20]}.*{message}")


def test_unexpected_and_missing_tensors(foreign) -> None:
    folder = foreign("adapted")
    change_tensors(folder / "rows.safetensors", lambda all_: all_.update(x=torch.zeros(1)))
    seal(folder)
    refused(folder, r"rows\.safetensors: entry 'x': expected absent, got \[1\]")
    change_tensors(folder / "rows.safetensors", lambda all_: (all_.pop("x"), all_.pop("rows")))
    seal(folder)
    refused(folder, "rows: the config describes 384 numbers, but the checkpoint holds 0")


MANIFESTS = {
    "no text": (b"\xff\xfe", "manifest.json"),
    "cut": (b'{"format": 1, ', "manifest.json"),
    "a list": (b"[1]", "checkpoint format"),
    "null": (b"null", "checkpoint format"),
    "deep": (_deep().encode(), "manifest.json"),
    "another format": (b'{"format": 99}', "checkpoint format 99"),
    "nothing more": (b'{"format": 1}', "manifest.json: step: expected int"),
    "types": (
        b'{"format": 1, "step": 1, "fingerprints": {}, "chosen": {}, '
        b'"files": {"rows.safetensors": 3}}',
        r"files: 'rows\.safetensors': expected bytes and sha256",
    ),
    "a step that is none": (
        b'{"format": 1, "step": "one", "files": {}, "fingerprints": {}, "chosen": {}}',
        "step: expected int, got 'one'",
    ),
    "digits": (b'{"format": ' + b"9" * 10_000 + b"}", "manifest.json"),
}


@pytest.mark.parametrize(("content", "message"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_damaged_manifest(foreign, content, message) -> None:
    folder = foreign("merged")
    (folder / "manifest.json").write_bytes(content)
    assert isinstance(refused(folder, message), CheckpointError)


def test_a_damaged_checkpoint_of_a_run_is_passed_over(foreign, tmp_path, whole) -> None:
    for number, (content, _) in enumerate(MANIFESTS.values()):
        place = tmp_path / f"run/checkpoints/step-{number + 2:06d}"
        shutil.copytree(whole["merged"], place)
        (place / "manifest.json").write_bytes(content)
    first = shutil.copytree(whole["merged"], tmp_path / "run/checkpoints/step-000001")
    found = checkpoints.latest(tmp_path / "run")
    assert found is not None
    assert found.folder == first


CONFIGS = {
    "empty": "",
    "a list": "- 1",
    "no system": "name: x",
    "system is null": "system:",
    "system is a list": "system: [1, 2]",
    "llm is a number": "system: {name: x, llm: 5}",
    "llm is null": "system: {name: x, llm: null}",
    "no weights": "system: {name: x, llm: {}}",
    "encoders is a text": "system: {name: x, llm: {weights: y}, encoders: z}",
    "an encoder is null": "system: {name: x, llm: {weights: y}, encoders: {image: null}}",
    "a type is a number": "system: {name: x, llm: {weights: y}, encoders: {image: {type: 4}}}",
    "itself": "system: config.yaml",
    "a cycle": "a: &a {b: *a}\nsystem: *a",
    "aliases": "a0: &a0 [x, x]\n"
    + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    + "system: *a59",
    "aliases, few": "a0: &a0 [" + "x, " * 100 + "]\na1: &a1 [" + "*a0, " * 100 + "]\nsystem: *a1",
    "deep": "system: " + "[" * 20_000,
    "long": "system: {name: '" + "x" * 10_000_000 + "'}",
    "tags": "system: !!python/object/apply:os.system ['touch ran']",
    "no text": "\0\1",
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_a_damaged_config(foreign, text) -> None:
    folder = foreign("merged")
    (folder / "config.yaml").write_text(text)
    seal(folder)
    refused(folder, r"config\.yaml|system|llm|encoders|input_projections")


PARTS: dict[str, tuple[str, Callable[[dict], Any]]] = {
    "no such weights": (
        "llm|does not exist",
        lambda tree: tree["encoders"].update(image={"type": "whisper", "weights": "./absent"}),
    ),
    "weights are a hub's id that is none": (
        "owner/name|does not exist|hub",
        lambda tree: tree["decoders"]["image"].update(weights="a b/../c d"),
    ),
    "a key that is none": ("unknown key", lambda tree: tree["decoders"]["image"].update(x=1)),
    "no head fits": (
        "joined|heads|divi",
        lambda tree: tree["output_projections"]["image"].update(heads=3),
    ),
    "a pattern without end": (
        "pattern .* computing",
        lambda tree: tree["llm"].update(lora={"rank": 4, "targets": "(.+)+x"}),
    ),
    "a pattern that is none": ("pattern", lambda tree: tree["llm"].update(lora={"targets": "("})),
    "a width without end": (
        "output_projections: the config describes",
        lambda tree: tree["output_projections"]["image"].update(width=2**20),
    ),
    "a length without end": (
        "output_projections: the config describes|joined",
        lambda tree: tree["decoders"]["image"].update(max_caption_tokens=2**30),
    ),
    "tokens without end": (
        "the config describes",
        lambda tree: tree["output_projections"]["image"].update(signal_tokens=2**40),
    ),
    "a hidden width without end": (
        "input_projections: the config describes",
        lambda tree: tree["input_projections"]["audio"].update(hidden=2**36),
    ),
    "patterns of ranks": (
        "pattern .* computing",
        lambda tree: tree["llm"]["lora"].update(options={"rank_pattern": {"(.+)+x": 3}}),
    ),
}


@pytest.mark.parametrize(("message", "change"), PARTS.values(), ids=PARTS)
def test_invalid_parts_are_refused(foreign, change, message, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = foreign("adapted")
    change_config(folder, change)
    seal(folder)
    refused(folder, message)


# --- the language model -------------------------------------------------------------------------

TOKENIZER: dict[str, Callable[[dict], Any]] = {
    "a pattern without end": lambda tree: tree.update(
        pre_tokenizer={
            "type": "Split",
            "pattern": {
                "Regex": "(?:(?:a|a|\\n)+)+(?:(?:a|a|\\n)+)+\\z(?<=b)|((?:.|\\n)*)*(?=c)\\1{9}"
            },
            "behavior": "Isolated",
            "invert": False,
        }
    ),
    "a pattern that is none": lambda tree: tree.update(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(((("},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
    "no model": lambda tree: tree.pop("model"),
    "another model": lambda tree: tree["model"].update(type="Evil"),
    "a vocabulary of lists": lambda tree: tree["model"].update(vocab=[[1]]),
    "merges of nothing": lambda tree: tree["model"].update(merges=[["zz", "qq"]]),
    "ids beyond": lambda tree: tree["model"]["vocab"].update(x=2**31),
}


@pytest.mark.parametrize("change", TOKENIZER.values(), ids=TOKENIZER)
def test_an_invalid_tokenizer_is_a_short_error_or_works(foreign, change) -> None:
    folder = foreign("merged")
    tree = json.loads((folder / "llm/tokenizer.json").read_text())
    change(tree)
    (folder / "llm/tokenizer.json").write_text(json.dumps(tree))
    seal(folder)
    began = time.monotonic()
    try:
        chat = mmllm.load(str(folder), device="cpu")
        chat.reply([mmllm.user("aaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 3)], max_new_tokens=1)
    except MmllmError as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 2000
    assert time.monotonic() - began < SECONDS


def replaced(string: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"String": string}, "content": content}


@pytest.mark.parametrize(
    ("key", "step"),
    [
        ("normalizer", replaced("", "a" * 10**7)),
        ("normalizer", {"type": "Sequence", "normalizers": [replaced("a", "a" * 10)] * 9}),
        ("decoder", {"type": "Sequence", "decoders": [replaced("a", "a" * 10)] * 9}),
    ],
)
def test_a_tokenizer_whose_replacements_explode_is_refused(foreign, key, step) -> None:
    folder = foreign("merged")
    change_json(folder / "llm/tokenizer.json", **{key: step})
    seal(folder)
    refused(folder, f"tokenizer.json: {key}: its replacements make texts 1e\\+0[79] times as long")


def test_a_tokenizer_with_usual_replacements_is_accepted(foreign) -> None:
    """As Llama's first, Gemma's and ALBERT's do."""
    folder = foreign("merged")
    steps = [replaced("``", '"'), {"type": "Prepend", "prepend": "▁"}, replaced(" ", "▁")]
    change_json(
        folder / "llm/tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps}
    )
    seal(folder)
    assert mmllm.load(str(folder), device="cpu").model.renderer.tokenizer("a b")["input_ids"]


TEXTS = {
    "no text": b"\xff\xfe\xff",
    "no JSON": b"{",
    "a list": b"[]",
    "deep": _deep().encode(),
    "a number": b"3",
    "nothing": b"",
}


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_damaged_json_of_a_language_model(foreign, file, content) -> None:
    folder = foreign("merged")
    (folder / "llm" / file).write_bytes(content)
    seal(folder)
    refused(folder, r"llm\.weights|llm")


MODELS = {
    "layers without end": {"num_hidden_layers": 1_000_000},
    "words without end": {"vocab_size": 10**9},
    "another width": {"hidden_size": 64},
    "a width without end": {"hidden_size": 10**7},
    "a negative width": {"hidden_size": -4},
    "a width that is none": {"hidden_size": "wide"},
    "no heads": {"num_attention_heads": 0},
    "labels without end": {"num_labels": 10**8},
    "layers of thousands of digits": {"num_hidden_layers": 10**4200},
    "more layers than there are": {"num_hidden_layers": 3},
    "a type that is none": {"model_type": "evil"},
    "a type that is a list": {"model_type": ["llama"]},
    "a model that speaks nothing": {"model_type": "vit"},
    "an activation that is none": {"hidden_act": "evil"},
    "positions that are none": {"rope_parameters": {"rope_type": "evil"}},
    "a quantisation that is none": {"quantization_config": [1]},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_language_model_config_that_does_not_match_its_weights(foreign, changes) -> None:
    folder = foreign("merged")
    change_json(folder / "llm/config.json", **changes)
    seal(folder)
    refused(folder, "llm")


def test_an_embedding_of_nan(foreign) -> None:
    folder = foreign("merged")
    change_tensors(
        folder / "llm/model.safetensors",
        lambda all_: all_["model.embed_tokens.weight"].fill_(torch.nan),
    )
    seal(folder)
    refused(folder, "embedding holds NaN|differs|logits")


LOOPS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}"
    "{% endif %}{% endmacro %}{{ f(60) }}",
    "a power": "{% set x = 99999999 %}{{ x ** x }}",
    "doubling": "{% set n = namespace(s='a') %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "a product": "{{ 'a' * 10 ** 10 }}",
    "a width": "{{ '%0999999999d' % 1 }}",
    "words": "{{ lipsum(n=10 ** 7) }}",
}


@pytest.mark.parametrize("template", LOOPS.values(), ids=LOOPS)
def test_a_template_that_does_not_terminate_is_refused(foreign, template) -> None:
    folder = foreign("merged")
    (folder / "llm/chat_template.jinja").write_text(template)
    seal(folder)
    error = refused(folder, "the chat template cannot be used: it takes more than")
    assert isinstance(error, CheckpointError)


def test_an_invalid_template_is_refused(foreign) -> None:
    folder = foreign("merged")
    (folder / "llm/chat_template.jinja").write_text("{% for %}")
    seal(folder)
    refused(folder, "the chat template is no jinja: Expected an expression")


def test_a_template_that_terminates_only_for_short_conversations(foreign) -> None:
    folder = foreign("merged")
    kept = (folder / "llm/chat_template.jinja").read_text()
    (folder / "llm/chat_template.jinja").write_text(
        "{% if messages|length > 2 %}" + LOOPS["loops"] + "{% endif %}" + kept
    )
    seal(folder)
    chat = mmllm.load(str(folder), device="cpu")
    talk = [mmllm.user("a"), mmllm.assistant("b"), mmllm.user("c")]
    with pytest.raises(ConfigError, match="the chat template cannot be used"):
        chat.reply(talk, max_new_tokens=1)
    assert chat.reply(talk[:1], max_new_tokens=1).message.role == "assistant"


# --- encoders -----------------------------------------------------------------------------------

ENCODERS: dict[str, Callable[[Path], Any]] = {
    "code": lambda folder: change_json(
        folder / "preprocessor_config.json",
        image_processor_type="Evil",
        feature_extractor_type="Evil",
        auto_map={"AutoImageProcessor": "evil.Evil", "AutoFeatureExtractor": "evil.Evil"},
    ),
    "kernels": lambda folder: change_json(folder / "config.json", _attn_implementation="a/b"),
    "layers": lambda folder: change_json(
        folder / "config.json", num_hidden_layers=10**6, encoder_layers=10**6
    ),
    "width": lambda folder: change_json(folder / "config.json", hidden_size=2**20, d_model=2**20),
    "deep": lambda folder: (folder / "config.json").write_text(_deep()),
    "a list": lambda folder: (folder / "config.json").write_text("[]"),
    "tensors": lambda folder: (folder / "model.safetensors").write_bytes(b"\x07" * 99),
    "no tensors": lambda folder: (folder / "model.safetensors").write_bytes(b""),
}


@pytest.mark.parametrize("kind", ["dinov2", "whisper"])
@pytest.mark.parametrize("change", ENCODERS.values(), ids=ENCODERS)
def test_a_manipulated_folder_of_an_encoder(tmp_path, monkeypatch, kind, change) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    twin = TWINS[kind]
    twin.write(tmp_path)
    assert twin.build(tmp_path).feature_shape
    (tmp_path / "evil.py").write_text(RUN)
    change(tmp_path)
    began = time.monotonic()
    if change is ENCODERS["code"] and kind == "whisper":
        twin.build(tmp_path)  # its class is mmllm's choice
    else:
        with pytest.raises(MmllmError) as caught:
            twin.build(tmp_path)
        assert len(str(caught.value)) < 2000
    assert time.monotonic() - began < SECONDS
    assert not Path("ran").exists()
