"""Checks of weights that somebody else wrote: nothing leads out of their folder, no code of theirs
runs, and no config makes a process allocate more than the files hold."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.errors import CheckpointError, brief_reason, quoted
from mmllm.weights.tensors import tensor_shapes

if TYPE_CHECKING:
    from torch import nn

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of weights that could run code when they are read."""

_LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"),
    *("num_experts", "num_local_experts", "n_routed_experts"),
)
"""Keys of a config.json that say how many modules are made: no more than there are tensors."""

_MAX_LABELS = 1_000_000
"""Classes that a config.json may count: transformers gives a name to each, whatever the model."""


def resolve_inside(folder: Path, name: str, where: str, *, follow: bool = False) -> Path:
    """Resolve a file name within a folder that somebody else filled.

    Args:
        folder: The folder.
        name: A relative or absolute path.
        where: What names the file, for messages.
        follow: Whether a symbolic link may lead out of the folder. (The hub's cache links into its
            blobs, which is always allowed.)

    Returns:
        The path of a regular file.

    Raises:
        CheckpointError: The name leads out of the folder, or there is no such file.
    """
    root = folder.resolve()
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    try:
        file = (root / name).resolve()
        exists = file.is_file()
        if follow:
            file = Path(os.path.normpath(root / name))
    except (OSError, ValueError, RuntimeError) as error:
        reason = brief_reason(error)
        raise CheckpointError(f"{where}: {quoted(name)} is no file: {reason}") from error
    if not any(file.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise CheckpointError(
            f"{where}: {quoted(name)} leads out of {folder}; a checkpoint reads no other files: "
            "copy it into the folder, or allow it by name with --trust or trust=[…]"
        )
    if not exists:
        raise CheckpointError(f"{where}: {folder} has no file {quoted(name)}")
    return root / name


def check_links(folder: Path) -> None:
    """Check every entry of a folder, recursively. Raises CheckpointError if one links out of it, or
    is neither file nor folder."""
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            if path.is_symlink() and path.is_dir():
                if not path.resolve().is_relative_to(folder.resolve()):
                    raise CheckpointError(f"{path}: links to a folder outside {folder}")
            elif not path.is_dir():
                resolve_inside(folder, str(path.absolute()), str(folder))


@contextmanager
def remote_code_disabled() -> Iterator[None]:
    """Keep transformers from running code that lies with weights, and from asking whether it
    should: also for nested parts, to which `trust_remote_code=False` is not passed on. It has no
    argument for that: its time limit for an answer is a global, and 0 makes it raise ValueError."""
    from transformers import dynamic_module_utils as library

    seconds = library.TIME_OUT_REMOTE_CODE
    library.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        library.TIME_OUT_REMOTE_CODE = seconds


def check_parameter_count(
    config: Path, files: Sequence[Path], build: Callable[[], nn.Module]
) -> None:
    """Compare what a config.json describes with what its weights hold, because transformers
    allocates missing tensors before it reports them. Quantised weights are not counted.

    Args:
        config: The config.json.
        files: The safetensors.
        build: Builds the module of the config; called on the meta device.

    Raises:
        CheckpointError: It describes much more than the weights hold, or names code of a hub.
    """
    import torch
    from transformers.initialization import no_init_weights

    tree = json.loads(config.read_text(encoding="utf-8"))
    check_attention(tree, config)
    shapes = [shape for file in files for shape in tensor_shapes(file).values()]
    nested = [part for part in tree.values() if isinstance(part, dict)]
    for part in (tree, *nested):
        for key in _LAYER_COUNTS:
            count = part.get(key)
            if isinstance(count, int) and count > len(shapes):
                raise CheckpointError(
                    f"{config}: {key} is {quoted(count)}, but the weights hold {len(shapes)} "
                    "tensors"
                )
        labels = part.get("num_labels")
        if isinstance(labels, int) and labels > _MAX_LABELS:
            raise CheckpointError(
                f"{config}: num_labels is {quoted(labels)}, more than {_MAX_LABELS:,}"
            )
    if "quantization_config" in tree:
        return
    with torch.device("meta"), no_init_weights():
        described = sum(parameter.numel() for parameter in build().parameters())
    held = sum(map(math.prod, shapes))
    if described > 2 * held:
        raise CheckpointError(
            f"{config} describes {described:,} parameters, but the weights hold {held:,}; is the "
            "copy whole?"
        )


def check_attention(config: Any, where: object) -> None:
    """Raise CheckpointError for a config.json that names an attention kernel of a hub.

    transformers would fetch and run it.

    Args:
        config: the contents of config.json.
        where: the file, for messages.
    """
    for key, value in config.items() if isinstance(config, dict) else ():
        check_attention(value, where)
        if key in ("attn_implementation", "_attn_implementation") and "/" in str(value):
            raise CheckpointError(
                f"{where}: {key}: {quoted(value)} is code from a hub, which is not run here; "
                "take it out of the config"
            )
