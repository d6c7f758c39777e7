"""A run that began before parameters got their present names is resumed as if they had always had
them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from mmllm import checkpoints, config
from mmllm.training.trainer import train
from mmllm.utils.hashing import sha256_file

RATES = {"output_projections.*": 1e-3, "llm.signal_embeddings": 1e-3, "llm.signal_head": 1e-3}


def with_former_names(folder: Path) -> None:
    """Rewrite a checkpoint as it was written when the signal tables were `rows` and `head_rows`."""
    former = {new: old for old, new in config.RENAMED_PARAMETERS.items()}
    file, settings = folder / "training/optimizer.safetensors", folder / "config.yaml"
    tensors = load_file(file)
    renamed = {}
    for entry, value in tensors.items():
        kind, _, name = entry.partition("/")
        renamed[f"{kind}/{former.get(name, name)}"] = value
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file)
    text = settings.read_text()
    for new, old in former.items():
        assert f"{new}:" in text
        text = text.replace(f"{new}:", f"{old}:")
    settings.write_text(text)
    manifest = json.loads((folder / "manifest.json").read_text())
    for changed in (file, settings):
        entry = {"bytes": changed.stat().st_size, "sha256": sha256_file(changed)}
        manifest["files"][str(changed.relative_to(folder))] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_with_former_names_is_resumed_exactly(make_run, tmp_path: Path) -> None:
    run = make_run(learning_rates=RATES, steps=2, save_steps=1, batch_size=2)
    train(run, progress=False)
    last = checkpoints.step_folder(tmp_path / "run", 2)
    expected = {path.name: load_file(path) for path in last.rglob("*.safetensors")}
    shutil.rmtree(last)
    with_former_names(checkpoints.step_folder(tmp_path / "run", 1))
    train(run, resume=True, progress=False)
    for path in last.rglob("*.safetensors"):
        tensors = load_file(path)
        assert tensors.keys() == expected[path.name].keys()
        assert all(value.equal(expected[path.name][name]) for name, value in tensors.items())
