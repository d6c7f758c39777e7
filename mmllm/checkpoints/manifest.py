"""The manifest of a checkpoint: what it holds, of which step, and the hash of every file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmllm import config as configs
from mmllm.config import RunConfig, StageConfig, SystemConfig
from mmllm.errors import CheckpointError, quoted, wrap_errors
from mmllm.utils.hashing import sha256_file
from mmllm.version import __version__
from mmllm.weights import check_links, resolve_inside

FORMAT = 1
"""Of the folder's layout; a checkpoint of another format is refused."""
_FILE = "manifest.json"
_PACKAGES = ("torch", "transformers", "peft", "diffusers", "accelerate", "safetensors")
"""Packages whose versions are recorded."""
_REQUIRED = {"step": int, "files": dict, "fingerprints": dict, "chosen": dict}
"""Keys that are read, and their types. `chosen`: the settings that were resolved by measurement."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, its manifest read and its files' sizes checked.

    Attributes:
        folder: the checkpoint's folder.
        manifest: the contents of manifest.json.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of optimizer steps taken."""
        return int(self.manifest["step"])

    @property
    def resolved_settings(self) -> dict[str, Any]:
        """The settings that were chosen by measurement when its training began."""
        return self.manifest["chosen"]

    @property
    def holds_llm(self) -> bool:
        """Whether the language model lies in the checkpoint."""
        return (self.folder / "llm").is_dir()

    def config(self) -> dict[str, Any]:
        """config.yaml as plain data. The path of a language model in the folder is absolute."""
        with self._errors_of_config():
            tree = configs.read_yaml(self.folder / "config.yaml")
            if self.holds_llm:
                tree["system"]["llm"]["weights"] = str(self.folder / "llm")
            return tree

    def system(self) -> SystemConfig:
        """The system. Raises CheckpointError or ConfigError."""
        with self._errors_of_config():
            return configs.parse_system(self.config()["system"], warn=False)

    def run(self) -> RunConfig:
        """System and stage. Raises CheckpointError for a checkpoint that no stage wrote."""
        tree = self.config()
        if "stage" not in tree:
            raise CheckpointError(f"{self.folder}: holds a model but no stage of training")
        with self._errors_of_config():
            return configs.parse_run(tree, str(self.folder / "config.yaml"), warn=False)

    def stage(self) -> StageConfig | None:
        """The stage that wrote the checkpoint, if one did."""
        return self.run().stage if "stage" in self.config() else None

    def _errors_of_config(self) -> AbstractContextManager[None]:
        return wrap_errors(CheckpointError, self.folder / "config.yaml")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint itself, not a run with several."""
    return (folder / _FILE).is_file()


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the manifest of a checkpoint folder and compare the sizes of its files.

    Raises:
        CheckpointError: The manifest is missing or malformed, a file is missing or has another
            size, or something in the folder leads out of it.
    """
    file = folder / _FILE
    with wrap_errors(CheckpointError, f"{file}: no readable manifest"):
        check_links(folder)
        manifest = json.loads(resolve_inside(folder, file.name, "manifest").read_text("utf-8"))
        _check_manifest(manifest, file)
    for name, entry in manifest["files"].items():
        file = resolve_inside(folder, name, str(folder / _FILE))
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{file}: expected {entry['bytes']} bytes, got {size}")
    return Checkpoint(folder, manifest)


def verify(source: Checkpoint, *, without: Sequence[str] = ()) -> None:
    """Compare the files of a checkpoint with their hashes in its manifest.

    Args:
        source: the checkpoint.
        without: names of subfolders whose files are not compared.

    Raises:
        CheckpointError: a file is missing or differs.
    """
    for name, entry in source.manifest["files"].items():
        if name.partition("/")[0] in without:
            continue
        file = source.folder / name
        with wrap_errors(CheckpointError, file):
            digest = sha256_file(file)
        if digest != entry["sha256"]:
            raise CheckpointError(
                f"{file}: damaged: its SHA-256 is {digest[:12]}…, the manifest has "
                f"{quoted(entry['sha256'][:12])}; use another checkpoint, or copy this one again"
            )


def write_manifest(draft: Path, *, step: int, **facts: Any) -> None:
    """Write the manifest of a checkpoint, the last file of its draft: it lists and hashes the
    others.

    Args:
        draft: the folder, complete but for the manifest.
        step: the number of optimizer steps taken.
        **facts: further entries, which JSON can hold.
    """
    manifest = {
        "format": FORMAT,
        "step": step,
        **facts,
        "versions": {"mmllm": _own_version(), **{name: version(name) for name in _PACKAGES}},
        "files": {
            str(file.relative_to(draft)): {
                "bytes": file.stat().st_size,
                "sha256": sha256_file(file),
            }
            for file in sorted(draft.rglob("*"))
            if file.is_file()
        },
    }
    (draft / _FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _check_manifest(manifest: Any, file: Path) -> None:
    """Raise CheckpointError unless it holds everything that is read of it."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise CheckpointError(f"{file}: checkpoint format {quoted(got)}, expected {FORMAT}")
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind):
            got = quoted(manifest.get(key))
            raise CheckpointError(f"{file}: {key}: expected {kind.__name__}, got {got}")
    for name, entry in manifest["files"].items():
        facts = entry if isinstance(entry, dict) else {}
        if not isinstance(facts.get("bytes"), int) or not isinstance(facts.get("sha256"), str):
            raise CheckpointError(
                f"{file}: files: {quoted(name)}: expected bytes and sha256, got {quoted(entry)}"
            )


def _own_version() -> str:
    try:
        return version("mmllm")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return __version__
