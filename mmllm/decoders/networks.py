"""The networks of a pipeline's folder without their weights, for plans."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from mmllm.decoders.loading import OWN_MODULES, pipeline_components, read_model_index
from mmllm.errors import AssetError


def meta_components(folder: Path) -> dict[str, torch.nn.Module]:
    """Every network of a pipeline's folder by name, on the meta device: configs are read, weights
    are not. (mmllm's codecs, which are small, compute tables in their constructors: they are on the
    CPU.) Raises AssetError for a component that its config does not build."""
    import diffusers
    import transformers

    networks: dict[str, torch.nn.Module] = {}
    name = "model_index.json"
    if not (folder / name).is_file():
        name = f"modular_{name}"
    components = pipeline_components(read_model_index(folder, name), folder)
    for name, (library, class_name) in components.items():
        cls: Any
        if library in OWN_MODULES:
            cls = getattr(importlib.import_module(library), class_name)
        elif library == "transformers":
            cls = getattr(transformers, class_name)
        else:  # some components are named by the package of their pipeline
            cls = getattr(diffusers, class_name, None) or getattr(
                importlib.import_module(f"diffusers.pipelines.{library}"), class_name
            )
        if not issubclass(cls, torch.nn.Module):
            continue
        try:
            with torch.device("cpu" if library in OWN_MODULES else "meta"):
                networks[name] = _from_config(cls, str(folder / name))
        except (OSError, ValueError, TypeError) as error:
            raise AssetError(f"{folder / name}: makes no {class_name}: {error}") from error
    return networks


def _from_config(cls: Any, folder: str) -> torch.nn.Module:
    """An untrained network of a transformers or diffusers class, from a folder's config."""
    if hasattr(cls, "config_class"):
        return cls(cls.config_class.from_pretrained(folder))
    try:
        return cls.from_config(cls.load_config(folder))
    except RuntimeError:  # it computes a table by the values of tensors, which meta tensors lack
        from accelerate import init_empty_weights

        with torch.device("cpu"), init_empty_weights():
            return cls.from_config(cls.load_config(folder))
