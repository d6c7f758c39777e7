"""Low-rank adapters (LoRA, Hu et al. 2021) of a language model, by peft and in peft's own format.

Nothing but the adapters' two matrices trains: options of peft that would train other weights are
refused, because no checkpoint holds those.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmllm.errors import CheckpointError, ConfigError, quoted
from mmllm.llm.auto_classes import has_towers, language_modules, stacked_experts
from mmllm.utils import sandbox
from mmllm.utils.hints import did_you_mean
from mmllm.utils.imports import deferred_imports
from mmllm.weights import copy_tensors, save_tensors

WEIGHTS_NAME = "adapter_model.safetensors"
"""File name that peft uses."""

_REFUSED_OPTIONS = {
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "target_modules"), "has a key of its own"),
    **dict.fromkeys(("task_type", "peft_type", "inference_mode"), "is always the same"),
    **dict.fromkeys(
        ("bias", "modules_to_save", "trainable_token_indices", "target_parameters"),
        "would train what no checkpoint of mmllm holds",
    ),
}
"""Options of peft that `llm.lora.options` cannot have -> the reason."""


@dataclass(frozen=True)
class LoraOptions:
    """Settings of low-rank adapters (Hu et al. 2021), by peft.

    Attributes:
        rank: R, the rank of an adapter.
        alpha: adapters are scaled by alpha / rank.
        dropout: dropout of an adapter's input.
        targets: names of the modules that get one, or "all-linear".
        options: more of peft's `LoraConfig` by its names (use_rslora, use_dora, rank_pattern, …).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = "all-linear"
    options: Mapping[str, Any] = field(default_factory=dict)


def attach_lora(
    model: Any,
    options: LoraOptions,
    *,
    base_name: str,
    layers: Mapping[type[nn.Module], type[nn.Module]],
) -> Any:
    """Wrap a transformers model into a peft model with fresh, frozen adapters.

    They change nothing until they are trained, and are the same in every process and run. Towers of
    other modalities and the stacked weights of experts get none.

    Args:
        model: The transformers model.
        options: `llm.lora` of the config.
        base_name: The name of the base model to record: what the config calls its weights, not the
            folder that they were loaded from.
        layers: What to use in place of peft's own layers, by the layer that is adapted.

    Raises:
        ConfigError: peft does not have, or refuses, an option; or a target is an expert.
    """
    with deferred_imports("bitsandbytes"):  # which takes longer than peft
        from peft import get_peft_model

    config = _peft_config(options)
    _check_patterns(options, model)
    experts = stacked_experts(model)
    if experts:
        _check_experts(options, model, experts)
    if has_towers(model):
        config.exclude_modules = _outside(model, config.exclude_modules)
    if layers:
        config._register_custom_module(dict(layers))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            with _without_bitsandbytes(), _without_expert_targets(experts):
                adapted: Any = get_peft_model(model, config)
        except (ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"llm.lora: peft refuses it: {error}") from error
    adapted.peft_config["default"].base_model_name_or_path = base_name
    for _, parameter in lora_parameters(adapted):
        parameter.requires_grad_(False)
    return adapted


def find_adapter(folder: Path) -> Path:
    """The adapters' safetensors in a folder of peft's format. Raises CheckpointError if there are
    none; a pickle, which peft would take, is never read."""
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{file}: absent ({names}); adapters are read from safetensors alone, no pickle is"
        )
    return file


def load_adapter(model: Any, file: Path) -> None:
    """Load the weights of a peft model's adapters; peft's config in their folder is not read.

    Args:
        model: the peft model.
        file: safetensors in peft's format.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)  # shares memory
    remedy = "do llm.weights, llm.lora.rank and llm.lora.targets match the checkpoint?"
    copy_tensors(state, file, remedy=remedy)


def save_adapter(model: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a peft model's adapters and their config; nothing of the base model is written.

    Args:
        model: the peft model.
        folder: receives adapter_model.safetensors and adapter_config.json.
        dtype: what the weights are converted to; None keeps theirs.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_tensors(
        {name: value.to(dtype or value.dtype) for name, value in state.items()},
        folder / WEIGHTS_NAME,
    )
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def lora_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and matrix of every adapter of a peft model."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            yield name, parameter


@contextmanager
def adapters_disabled(model: Any) -> Iterator[None]:
    """Run a peft model as its base model. On exit those adapters train that trained before, where
    peft would make all of them train."""
    before = [(weight, weight.requires_grad) for _, weight in lora_parameters(model)]
    try:
        with model.disable_adapter():
            yield
    finally:
        for weight, requires_grad in before:
            weight.requires_grad_(requires_grad)


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Keep peft from importing bitsandbytes to see whether a layer is of it: as long as nothing has
    imported it, none is."""
    from peft.tuners.lora import model as library

    probes = ("is_bnb_available", "is_bnb_4bit_available")
    with ExitStack() as stack:
        if "bitsandbytes" not in sys.modules:
            for probe in probes:
                stack.callback(setattr, library, probe, getattr(library, probe))
                setattr(library, probe, lambda: False)
        yield


@contextmanager
def _without_expert_targets(experts: list[str]) -> Iterator[None]:
    """Keep peft from adapting the stacked weights of experts where a target has the name that an
    expert's linear layer had in transformers 4: an update of all experts would be multiplied out in
    every forward pass, and "all-linear" means linear layers."""
    from peft.utils import transformers_weight_conversion as library

    name = "convert_peft_config_for_transformers"
    with ExitStack() as stack:
        if experts:
            stack.callback(setattr, library, name, getattr(library, name))
            setattr(library, name, lambda *_, **__: None)
        yield


def _check_experts(options: LoraOptions, model: nn.Module, experts: list[str]) -> None:
    """Raise ConfigError for a target that is no linear layer of a mixture of experts."""
    if isinstance(options.targets, str):
        return
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in options.targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"llm.lora.targets: {quoted(target)} is no linear layer of this mixture of experts "
                f"({', '.join(known)}); the weights of its experts are stacked "
                f"({experts[0]}, …), get no adapters, and stay frozen"
            )


def _outside(model: Any, excluded: Any) -> str:
    """A pattern of all modules of a model with towers that are not its language part, and of those
    that peft's `exclude_modules` names: a pattern, or names."""
    language = "|".join(map(re.escape, language_modules(model)))
    patterns = [rf"(?!(?:{language})(?:\.|$)).*"]
    if isinstance(excluded, str):
        patterns.append(excluded)
    elif excluded:
        patterns.append(rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(excluded)))})")
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def _check_patterns(options: LoraOptions, model: nn.Module) -> None:
    """Match every pattern of module names in the sandbox. Raises ConfigError for one that is no
    regular expression, or that takes too long."""
    more = options.options
    patterns = [
        options.targets if isinstance(options.targets, str) else None,
        *(more.get(key) for key in ("exclude_modules", "layers_pattern")),
        *(name for key in ("rank_pattern", "alpha_pattern") for name in more.get(key) or ()),
    ]
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if isinstance(pattern, str) and pattern != "all-linear":
            try:
                sandbox.full_matches(pattern, names)
            except (sandbox.InputRejected, sandbox.ResourcesExhausted) as error:
                raise ConfigError(f"llm.lora: the pattern {quoted(pattern)}: {error}") from error


def _peft_config(options: LoraOptions) -> Any:
    """peft's LoraConfig. Raises ConfigError for an option that it does not have or mmllm keeps."""
    from peft import LoraConfig

    known = {entry.name for entry in fields(LoraConfig)} - _REFUSED_OPTIONS.keys()
    for name in options.options:
        if name in _REFUSED_OPTIONS:
            raise ConfigError(f"llm.lora.options: {name!r} {_REFUSED_OPTIONS[name]}")
        if name not in known:
            hint = did_you_mean(name, known, cutoff=0.5)
            raise ConfigError(f"llm.lora.options: peft's LoraConfig has no {name!r}{hint}")
    targets = options.targets
    try:
        return LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType] - floats work
            lora_dropout=options.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
            **options.options,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"llm.lora: peft refuses it: {error}") from error
