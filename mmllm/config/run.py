"""A stage's YAML file with overrides -> RunConfig: a system and one stage of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.config import trusted
from mmllm.config.parse import as_mapping, check_keys
from mmllm.config.renamed import RENAMED, with_current_names
from mmllm.config.stage import StageConfig, parse_stage
from mmllm.config.system import SystemConfig, parse_system
from mmllm.errors import ConfigError, quoted
from mmllm.utils import literals
from mmllm.weights import resolve_inside


@dataclass(frozen=True)
class RunConfig:
    """What one YAML of `configs/` contains.

    Attributes:
        system: the parts of the model.
        stage: one stage of its training.
    """

    system: SystemConfig
    stage: StageConfig


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a stage's YAML.

    Args:
        path: the file; its `system:` may name another file next to it.
        overrides: `dotted.key=value` each, checked like the YAML itself.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.

    Example:
        >>> load_run("configs/mini/1_encoder_alignment.yaml", ["stage.steps=7"]).stage.steps
        7
    """
    tree = read_yaml(path)
    is_saved = (Path(path).parent / "manifest.json").is_file()  # a checkpoint's, as it was trained
    tree["stage"] = with_current_names(tree.get("stage"), warn=not is_saved)
    for entry in overrides:
        override(tree, entry)
    return parse_run(tree, Path(path).name, warn=not is_saved)


def parse_run(tree: Mapping[str, Any], where: str = "config", *, warn: bool = True) -> RunConfig:
    """Plain data {system, stage} -> RunConfig.

    Args:
        tree: the data.
        where: names the data in errors.
        warn: log former names of a decoder's keys.

    Raises:
        ConfigError: a key or value is wrong.
    """
    check_keys(RunConfig, tree, where)
    return RunConfig(
        system=parse_system(tree["system"], warn=warn),
        stage=parse_stage(tree["stage"]),
    )


def override(tree: dict[str, Any], entry: str) -> None:
    """Set one value of a config, in place.

    Args:
        tree: the config as plain data.
        entry: `dotted.key=value`, the value in YAML; former names of stage keys are accepted.

    Raises:
        ConfigError: no `=`, a parent that is not a mapping, or a value that is not YAML.
    """
    key, equals, value = entry.partition("=")
    if not equals:
        raise ConfigError(f"override {quoted(entry)}: expected dotted.key=value")
    names = key.split(".")
    for depth, parents in ((1, ["stage"]), (2, ["stage", "losses"])):
        if names[:depth] == parents and len(names) > depth:
            names[depth] = RENAMED.get(names[depth], names[depth])
    *parents, last = names
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {quoted(entry)}: {quoted(parent)} is not a mapping")
    try:
        node[last] = literals.load(value)
    except ValueError as error:
        raise ConfigError(
            f"override {quoted(entry)}: the value is no YAML: {error}; put quotes round a text: "
            f"{key}='\"…\"'"
        ) from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; a `system:` that names a file is replaced by the content of that file.

    A file in a checkpoint's folder may come from others and is checked (mmllm.config.trusted); any
    other file is the user's own.

    Raises:
        ConfigError: the file cannot be read, is no mapping, or names what is not trusted.
    """
    path = Path(path)
    folder = trusted.enclosing_checkpoint(path)
    if folder is not None:
        resolve_inside(folder, str(path.absolute()), str(path))
    tree = _read_mapping(path)
    included = tree.get("system")
    if isinstance(included, str):
        file = path.parent / included
        if folder is not None and included not in trusted.TRUSTED.names:
            file = resolve_inside(folder, str(file.absolute()), f"{path}: system")
        tree["system"] = _read_mapping(file)
        folder = folder or trusted.enclosing_checkpoint(file)
    if folder is not None:
        trusted.check_foreign(tree, folder, str(path))
    return tree


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            tree = literals.load(stream.read(literals.MAX_CHARACTERS + 1))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    return dict(as_mapping(tree, str(path)))
