"""Where a component's weights are (a local folder, an asset of `mini`, or an id of a model hub),
and how tensors are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm.errors import AssetError

if TYPE_CHECKING:
    from torch import Tensor


def locate(weights: str, where: str) -> str:
    """What `from_pretrained` can open.

    `mini:NAME` is shipped inside the package or fetched once by package name (mmllm.mini.assets);
    a path that exists is taken as it is; a path that does not exist but looks like one is an
    error, never a request to a hub.
    """
    if weights.startswith("mini:"):
        from mmllm.mini import locate as locate_mini

        return str(locate_mini(weights.removeprefix("mini:")))
    path = Path(weights).expanduser()
    if path.exists():
        return str(path)
    if weights.startswith((".", "/", "~")) or weights.count("/") != 1:
        raise AssetError(
            f"{where}: {weights!r} does not exist (a folder, or a hub id 'owner/name')"
        )
    return weights


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file that whoever may read its folder can read: the library alone leaves
    it to its owner, and checkpoints and caches are shared."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(mode)
