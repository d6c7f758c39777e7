"""Load a model to talk to: a name, a checkpoint or run folder, or a YAML."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from mmllm import checkpoints, licences
from mmllm import config as configs
from mmllm import model as models
from mmllm.config import SystemConfig
from mmllm.inference.chat import Chat
from mmllm.kernels.devices import best_device, parse_device
from mmllm.kernels.precision import fast_dtype, parse_dtype
from mmllm.model import AnyToAny
from mmllm.utils.quiet import quiet_libraries
from mmllm.weights import load_on_first_use


def load(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    prefixes: int = 0,
    memory: bool | Mapping[str, int] | None = None,
    trust: Collection[str] = (),
) -> Chat:
    """Load a model to talk to; see `mmllm.load`, which imports torch only when it is called.

    Args:
        source: a name ("mini"), a checkpoint or run folder, or a YAML, whose model is untrained.
        device: cpu, cuda, mps or auto; None: as `auto`.
        dtype: float32, bfloat16 or float16; None: what `fast_dtype` chooses for the device.
        prefixes: how many conversations' key-value caches are kept.
        memory: True, or options of `llm.memory`, in place of the config's; False: none.
        trust: modules and template files that a checkpoint may use.
    """
    device = best_device() if device in (None, "auto") else parse_device(device)
    auto = dtype in (None, "auto")
    precision = fast_dtype(device.partition(":")[0]) if auto else parse_dtype(dtype)
    configs.trust(trust)
    with quiet_libraries("transformers"):
        model = _load_model(source, precision, device, memory)
    return Chat(model, prefixes=prefixes)


def _load_model(
    source: str | Path,
    precision: torch.dtype,
    device: str,
    memory: bool | Mapping[str, int] | None,
) -> AnyToAny:
    if str(source).endswith((".yaml", ".yml")):
        tree = configs.read_yaml(source)
        system = _with_memory(configs.parse_system(tree.get("system", tree)), memory)
        licences.check(system)
        return models.build(system, dtype=precision, device=device)
    checkpoint = checkpoints.open_checkpoint(source)
    system = _with_memory(checkpoint.system(), memory)
    # What its encoders are is compared with the checkpoint by the hashes of their files.
    with load_on_first_use():
        return checkpoints.load_model(checkpoint, system, dtype=precision, device=device)


def _with_memory(system: SystemConfig, memory: bool | Mapping[str, int] | None) -> SystemConfig:
    """The system with other options of `llm.memory`. Raises ConfigError for options that it has
    not."""
    if memory is None:
        return system
    tree = configs.dump(system)
    tree["llm"]["memory"] = dict(memory) if isinstance(memory, Mapping) else {} if memory else None
    return configs.parse_system(tree, warn=False)
