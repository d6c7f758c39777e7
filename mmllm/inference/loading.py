"""Load a model to talk to: a name, a checkpoint or run folder, or a YAML."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from mmllm import checkpoints, licences
from mmllm import config as configs
from mmllm import model as models
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
    trust: Collection[str] = (),
) -> Chat:
    """Load a model to talk to; see `mmllm.load`, which imports torch only when it is called.

    Args:
        source: a name ("mini"), a checkpoint or run folder, or a YAML, whose model is untrained.
        device: cpu, cuda, mps or auto; None: as `auto`.
        dtype: float32, bfloat16 or float16; None: what `fast_dtype` chooses for the device.
        prefixes: how many conversations' key-value caches are kept.
        trust: modules and template files that a checkpoint may use.
    """
    device = best_device() if device in (None, "auto") else parse_device(device)
    auto = dtype in (None, "auto")
    precision = fast_dtype(device.partition(":")[0]) if auto else parse_dtype(dtype)
    configs.trust(trust)
    with quiet_libraries("transformers"):
        model = _load_model(source, precision, device)
    return Chat(model, prefixes=prefixes)


def _load_model(source: str | Path, precision: torch.dtype, device: str) -> AnyToAny:
    if str(source).endswith((".yaml", ".yml")):
        tree = configs.read_yaml(source)
        system = configs.parse_system(tree.get("system", tree))
        licences.check(system)
        return models.build(system, dtype=precision, device=device)
    checkpoint = checkpoints.open_checkpoint(source)
    # What its encoders are is compared with the checkpoint by the hashes of their files.
    with load_on_first_use():
        return checkpoints.load_model(checkpoint, dtype=precision, device=device)
