"""Where a component's weights are (a local folder, an asset of `mini`, or an id of a model hub),
and how tensors are written.

Within `skip_weights()` components are built without their weights: `locate` then finds the JSON
configs alone, and loaders build the same modules on the meta device. A plan (mmllm.planning) thus
runs the very code that training runs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.errors import AssetError, CheckpointError, brief_reason, quoted, wrap_errors

if TYPE_CHECKING:
    from torch import Tensor, nn

_PACKAGE = Path(__file__).parent
CONFIG_FOLDERS = (_PACKAGE.parent / "configs" / "parts", _PACKAGE / "configs" / "parts")
"""JSON configs of the recipes' parts, in a checkout and in an installed package."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of weights that could run code when they are read."""

_skipping: ContextVar[bool] = ContextVar("skip_weights", default=False)


@contextmanager
def skip_weights() -> Iterator[None]:
    """Within it nothing is downloaded and no weights are read."""
    before = _skipping.set(True)
    try:
        yield
    finally:
        _skipping.reset(before)


def are_weights_skipped() -> bool:
    """Whether modules are to be made on the meta device instead of loaded."""
    return _skipping.get()


def locate(weights: str, where: str, revision: str | None = None) -> str:
    """What `from_pretrained` can open.

    `mini:NAME` is shipped inside the package or fetched once by package name (mmllm.mini.assets);
    a path that exists is taken as it is; a path that does not exist but looks like one is an
    error, never a request to a hub. Within `skip_weights()` it is a folder with the part's configs.
    """
    if weights.startswith("mini:"):
        name = weights.removeprefix("mini:")
        if are_weights_skipped():
            return str(_configs(f"mini/{name}", where, shipped=_PACKAGE / "mini" / name))
        from mmllm.mini import locate as locate_mini

        return str(locate_mini(name))
    path = Path(weights).expanduser()
    if path.exists():
        return str(path)
    if weights.startswith((".", "/", "~")) or weights.count("/") != 1:
        raise AssetError(
            f"{where}: {weights!r} does not exist (a folder, or a hub id 'owner/name')"
        )
    if are_weights_skipped():
        return str(_configs(weights, where, shipped=_cached(weights, revision)))
    return weights


def resolve_inside(folder: Path, name: str, where: str, *, follow: bool = False) -> Path:
    """The regular file `name` of a folder that others filled; raises CheckpointError if it leads
    out of the folder, by its name or by a symbolic link, which `follow` allows. (The hub's cache
    links into its blobs.)"""
    root = folder.resolve()
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    try:
        file = (root / name).resolve()
        found = file.is_file()
        if follow:
            file = Path(os.path.normpath(root / name))
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{where}: {quoted(name)} is no file: {brief_reason(error)}"
        ) from error
    if not any(file.is_relative_to(within) for within in (root, *blobs)):
        raise CheckpointError(
            f"{where}: {quoted(name)} leads out of {folder}; a checkpoint reads no other files: "
            "copy it into the folder, or allow it by name with --trust or trust=[…]"
        )
    if not found:
        raise CheckpointError(f"{where}: {folder} has no file {quoted(name)}")
    return root / name


def check_links(folder: Path) -> None:
    """Raises CheckpointError if anything in a folder that others filled is a link out of it, or is
    neither file nor folder."""
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            if path.is_symlink() and path.is_dir():
                if not path.resolve().is_relative_to(folder.resolve()):
                    raise CheckpointError(f"{path}: links to a folder outside {folder}")
            elif not path.is_dir():
                resolve_inside(folder, str(path.absolute()), str(folder))


@contextmanager
def remote_code_disabled() -> Iterator[None]:
    """Within it transformers runs no code that lies with weights, and asks nobody whether it
    should, for the parts of parts too, which are not told `trust_remote_code=False`."""
    from transformers import dynamic_module_utils as library

    seconds = library.TIME_OUT_REMOTE_CODE
    library.TIME_OUT_REMOTE_CODE = 0  # how long it waits for an answer; 0 raises ValueError
    try:
        yield
    finally:
        library.TIME_OUT_REMOTE_CODE = seconds


def check_parameter_count(
    config: Path, files: Sequence[Path], make: Callable[[], nn.Module]
) -> None:
    """Raises CheckpointError if a config.json describes much more than its weights hold, or code of
    a hub: transformers would make what is missing before it tells. `make`: the module of the
    config, here on the meta device. Quantised weights are not counted."""
    import torch

    told = json.loads(config.read_text(encoding="utf-8"))
    check_attention(told, config)
    shapes = [shape for file in files for shape in tensor_shapes(file).values()]
    parts = [part for part in told.values() if isinstance(part, dict)]
    for part in (told, *parts):
        for key in _LAYERS:
            count = part.get(key)
            if isinstance(count, int) and count > len(shapes):
                raise CheckpointError(
                    f"{config}: {key} is {quoted(count)}, but the weights hold {len(shapes)} "
                    "tensors"
                )
        labels = part.get("num_labels")
        if isinstance(labels, int) and labels > _MOST_LABELS:
            raise CheckpointError(
                f"{config}: num_labels is {quoted(labels)}, more than {_MOST_LABELS:,}"
            )
    if "quantization_config" in told:
        return
    with torch.device("meta"):
        described = sum(parameter.numel() for parameter in make().parameters())
    held = sum(map(math.prod, shapes))
    if described > 2 * held:
        raise CheckpointError(
            f"{config} describes {described:,} parameters, but the weights hold {held:,}; is the "
            "copy whole?"
        )


_LAYERS = (
    *("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"),
    *("num_experts", "num_local_experts", "n_routed_experts"),
)
"""Keys of a config.json that say how many modules are made. No more than there are tensors."""


_MOST_LABELS = 1_000_000
"""Classes that a config.json may count; transformers gives a name to each, whatever the model."""


def check_attention(config: Any, where: object) -> None:
    """Raises CheckpointError for a config.json that names a kernel of a hub, which transformers
    would fetch and run."""
    for key, value in config.items() if isinstance(config, dict) else ():
        check_attention(value, where)
        if key in ("attn_implementation", "_attn_implementation") and "/" in str(value):
            raise CheckpointError(
                f"{where}: {key}: {quoted(value)} is code from a hub, which is not run here; "
                "take it out of the config"
            )


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that whoever may read its folder can read: the library alone leaves
    it to its owner, and checkpoints and caches are shared. `metadata` goes into its header. Raises
    OSError when the disk does not take it; the library's own error is none."""
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
    """Name -> shape of what a safetensors file holds, by its header; raises CheckpointError."""
    from safetensors import safe_open

    with wrap_errors(CheckpointError, file), safe_open(file, framework="pt") as saved:
        return {name: saved.get_slice(name).get_shape() for name in saved.keys()}  # noqa: SIM118


def copy_tensors(own: Mapping[str, Tensor], file: Path, *, remedy: str) -> None:
    """Fill tensors with those of a safetensors file: the same names and shapes, real numbers, all
    finite; raises CheckpointError that names the file, what differs, and the remedy. What does not
    fit is not read."""
    import torch
    from safetensors import safe_open

    read: dict[str, Tensor] = {}
    with wrap_errors(CheckpointError, file), safe_open(file, framework="pt") as saved:
        names = set(saved.keys())
        for name in sorted(own.keys() | names):
            expected = list(own[name].shape) if name in own else "absent"
            got = saved.get_slice(name).get_shape() if name in names else "absent"
            if expected != got:
                raise CheckpointError(
                    f"{file}: entry {quoted(name)}: expected {expected}, got {got}; {remedy}"
                )
        for name in own:
            tensor = saved.get_tensor(name)
            if not tensor.is_floating_point():
                raise CheckpointError(
                    f"{file}: entry {quoted(name)}: expected real numbers, got {tensor.dtype}"
                )
            if not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"{file}: entry {quoted(name)} holds NaN or infinite values; take a checkpoint "
                    "from before training diverged, or another copy of the file"
                )
            read[name] = tensor
    for name, value in own.items():
        value.data.copy_(read[name])


def _configs(name: str, where: str, *, shipped: Path | None) -> Path:
    """The folder with a part's configs; raises AssetError where there is none."""
    folders = [*([shipped] if shipped else []), *(folder / name for folder in CONFIG_FOLDERS)]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise AssetError(
        f"{where}: the configs of {name!r} are not at hand: neither in the hub's cache nor in "
        f"configs/parts; fetch its JSON files alone (hf download {name} --include '*.json'), or "
        "give a folder"
    )


def _cached(weights: str, revision: str | None) -> Path | None:
    """The snapshot of a hub id that lies in the hub's cache, complete or not."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(weights, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
