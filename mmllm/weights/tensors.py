"""Reading and writing safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm.errors import CheckpointError, quoted, wrap_errors

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that everybody may read who may read its folder: the library makes
    one for its owner alone, but checkpoints and caches are shared.

    Args:
        tensors: By name.
        path: The file.
        metadata: Goes into its header.

    Raises:
        OSError: The disk does not take it. (The library's own error is no OSError.)
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    values = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(values, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
    path.chmod(mode)


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor of a safetensors file, by its header. Raises
    CheckpointError."""
    from safetensors import safe_open

    with wrap_errors(CheckpointError, file), safe_open(file, framework="pt") as saved:
        return {name: saved.get_slice(name).get_shape() for name in saved.keys()}  # noqa: SIM118


def copy_tensors(targets: Mapping[str, Tensor], file: Path, *, remedy: str) -> None:
    """Fill tensors in place from a safetensors file.

    All are checked before the first is changed, and a file whose names or shapes differ is not read
    beyond its header.

    Args:
        targets: The tensors to fill, by name.
        file: Holds the same names and shapes, of finite real numbers, or of whole numbers where
            the target has them.
        remedy: The end of the message where they differ.

    Raises:
        CheckpointError: Names the file, what differs, and the remedy.
    """
    import torch
    from safetensors import safe_open

    values: dict[str, Tensor] = {}
    with wrap_errors(CheckpointError, file), safe_open(file, framework="pt") as saved:
        names = set(saved.keys())
        for name in sorted(targets.keys() | names):
            expected = list(targets[name].shape) if name in targets else "absent"
            got = saved.get_slice(name).get_shape() if name in names else "absent"
            if expected != got:
                raise CheckpointError(
                    f"{file}: entry {quoted(name)}: expected {expected}, got {got}; {remedy}"
                )
        for name in targets:
            tensor = saved.get_tensor(name)
            real = targets[name].is_floating_point()
            if tensor.is_floating_point() != real or tensor.is_complex():
                raise CheckpointError(
                    f"{file}: entry {quoted(name)}: expected {'real' if real else 'whole'} "
                    f"numbers, got {tensor.dtype}"
                )
            if not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"{file}: entry {quoted(name)} holds NaN or infinite values; take a checkpoint "
                    "from before training diverged, or another copy of the file"
                )
            values[name] = tensor
    for name, target in targets.items():
        target.data.copy_(values[name])
