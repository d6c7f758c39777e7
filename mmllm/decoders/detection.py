"""Which decoder type a pipeline's folder needs, by the class that its model_index.json names."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from mmllm.config import COMPONENTS, parse_component
from mmllm.decoders.contract import DecoderContract
from mmllm.errors import AssetError, ConfigError, wrap_errors


def decoder_config(value: Any, key: str) -> Any:
    """Return the Config of a decoder.

    Args:
        value: its entry in a config, `{type: …, weights: …}`, or a pipeline's folder, whose type is
            found by its class.
        key: the decoder's key, for messages.

    Raises:
        AssetError: the folder has no readable model_index.json.
        ConfigError: no decoder type supports its class, or the entry is wrong.
    """
    if isinstance(value, dict):
        return parse_component("decoders", value, f"decoders.{key}")
    file = Path(value).expanduser() / "model_index.json"
    if not file.is_file():
        raise AssetError(
            f"decoders.{key}: {value!r} is no folder with a model_index.json, as save_pretrained "
            f"of a pipeline writes it; give one, or '{key}={{type: TYPE, weights: FOLDER or hub "
            "id}'"
        )
    with wrap_errors(AssetError, file):
        pipeline = json.loads(file.read_text(encoding="utf-8"))["_class_name"]
    families = _families()
    kinds = [kind for kind, names in families.items() if pipeline in names]
    if not kinds:
        raise ConfigError(
            f"decoders.{key}: {value!r} is a {pipeline}, which no decoder type supports; supported "
            f"are {', '.join(sorted(name for names in families.values() for name in names))}"
        )
    entry = {"type": kinds[0], "weights": str(value)}
    return parse_component("decoders", entry, f"decoders.{key}")


def _families() -> dict[str, list[str]]:
    """Type -> the pipeline classes that it supports."""
    families = {}
    for kind, entry in COMPONENTS["decoders"].items():
        module = importlib.import_module(entry.partition(":")[0])
        families[kind] = [
            name
            for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, DecoderContract)
            if value.__module__ == module.__name__
            for name in getattr(value, "pipelines", ())
        ]
    return families
