"""Loading a checkpoint: the model, its trained weights, and the state of training."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmllm import licences
from mmllm import model as models
from mmllm.checkpoints.contents import fingerprints, lora_file, saved_parameters, saved_sizes
from mmllm.checkpoints.manifest import Checkpoint, verify
from mmllm.config import SystemConfig
from mmllm.errors import CheckpointError, quoted, wrap_errors
from mmllm.model import AnyToAny
from mmllm.weights import copy_tensors

logger = logging.getLogger(__name__)

_REMEDY = "was it trained with another LLM, encoder, decoder or projection?"


def load_model(
    source: Checkpoint,
    system: SystemConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> AnyToAny:
    """Build the checkpoint's system and load what was trained.

    Args:
        source: The checkpoint.
        system: Its system with other options of how it runs; None: its own.
        dtype: Of the frozen language model.
        device: Where the model goes.

    Raises:
        CheckpointError: A file is damaged, or does not fit the config.
        ConfigError: The config does not fit what is installed or trusted, or a licence is not
            accepted.
    """
    with wrap_errors(CheckpointError, source.folder):
        system, sizes = system or source.system(), saved_sizes(source)
        licences.check(system)
        model = models.build(system, dtype=dtype, device=device, sizes=sizes)
        load_weights(model, source)
        return model.eval()


def load_whole_model(source: Checkpoint) -> AnyToAny:
    """The model in float32 on the CPU, its weights neither quantised nor spread over devices,
    whatever the config says. Raises ConfigError for a licence that is not accepted."""
    system = source.system()
    licences.check(system)
    llm = replace(system.llm, quantization=None, device_map=None, dtype=None)
    with wrap_errors(CheckpointError, source.folder):
        model = models.build(replace(system, llm=llm), sizes=saved_sizes(source))
        load_weights(model, source)
        return model.eval()


def load_weights(model: AnyToAny, source: Checkpoint, *, replaced: Collection[str] = ()) -> None:
    """Load what was trained into a model that is built already; names, shapes, frozen parts and
    hashes have to match.

    Args:
        model: of the checkpoint's system.
        source: the checkpoint.
        replaced: frozen parts ("decoders.image") that may differ from the checkpoint's, since what
            feeds them is about to be trained.

    Raises:
        CheckpointError: says what differs.
    """
    saved = source.manifest["fingerprints"]
    for part, own in fingerprints(model).items():
        if part not in saved or saved[part] == own:
            continue
        if part in replaced:
            logger.warning("%s is not the checkpoint's; its projection is trained anew", part)
            continue
        trained = part.replace("decoders.", "output_projections.") + ".*"
        remedy = f", or train {trained} in this stage" if part.startswith("decoders.") else ""
        raise CheckpointError(
            f"{source.folder}: {part} differs: the checkpoint was trained with "
            f"{quoted(saved[part])}, this system has {own}; use the same weights and "
            f"preprocessing{remedy}"
        )
    for key in model.decoders:
        if (source.folder / lora_file(key)).is_file() and f"decoders.{key}" not in replaced:
            model.attach_decoder_lora(key)
    for file, parameters in saved_parameters(model).items():
        copy_tensors(parameters, source.folder / file, remedy=_REMEDY)
    if (source.folder / "adapter").is_dir():
        model.llm.load_lora(source.folder / "adapter")
    with torch.no_grad(), wrap_errors(CheckpointError, source.folder):
        for projection in model.input_projections.values():
            projection.embed_names(model.llm.embed)  # pyright: ignore[reportCallIssue]
    verify(source, without=("llm", "training"))  # last: an error that names a tensor says more


def training_state(source: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `training` and `tensors` that `save` was given. Raises CheckpointError if absent."""
    from safetensors.torch import load_file

    folder = source.folder / "training"
    if not folder.is_dir():
        raise CheckpointError(f"{source.folder}: holds no training state; it cannot be resumed")
    with wrap_errors(CheckpointError, folder):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return dict(state), load_file(folder / "optimizer.safetensors")
