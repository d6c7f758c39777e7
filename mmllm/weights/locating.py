"""Where the weights of a part are: a local folder, an asset of `mini`, or an id of a model hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from mmllm.errors import AssetError

_PACKAGE = Path(__file__).parents[1]
CONFIG_FOLDERS = (_PACKAGE.parent / "configs" / "parts", _PACKAGE / "configs" / "parts")
"""JSON configs of the recipes' parts, in a checkout and in an installed package."""

_skipping: ContextVar[bool] = ContextVar("skip_weights", default=False)
_on_first_use: ContextVar[bool] = ContextVar("load_on_first_use", default=False)


@contextmanager
def skip_weights() -> Iterator[None]:
    """Build parts without their weights: within it nothing is downloaded, `locate` finds JSON
    configs alone, and loaders build the same modules on the meta device. A plan (mmllm.planning)
    thus runs the very code that training runs."""
    token = _skipping.set(True)
    try:
        yield
    finally:
        _skipping.reset(token)


@contextmanager
def load_on_first_use() -> Iterator[None]:
    """Build frozen parts that check their files now and read the weights when they first compute,
    where a part can do so. A reply without media thus waits for no encoder."""
    token = _on_first_use.set(True)
    try:
        yield
    finally:
        _on_first_use.reset(token)


def are_weights_deferred() -> bool:
    """Whether weights are to be read on first use."""
    return _on_first_use.get()


def are_weights_skipped() -> bool:
    """Whether modules are to be built on the meta device instead of loaded."""
    return _skipping.get()


def locate(weights: str, where: str, revision: str | None = None) -> str:
    """Resolve `weights` of a config to what `from_pretrained` opens.

    A path that does not exist but looks like one is an error, never a request to a hub. Within
    `skip_weights()` the result is a folder with the part's JSON configs.

    Args:
        weights: `mini:NAME`, an asset that is shipped inside the package or fetched once by package
            name (mmllm.mini.assets); a path; or a hub id "owner/name".
        where: The key of the config, for messages.
        revision: Of the hub's repository.

    Returns:
        A path, or the hub id.

    Raises:
        AssetError: There is no such path, or the config of the part is not on this machine.
    """
    if weights.startswith("mini:"):
        name = weights.removeprefix("mini:")
        if are_weights_skipped():
            return str(_config_folder(f"mini/{name}", where, shipped=_PACKAGE / "mini" / name))
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
        return str(_config_folder(weights, where, shipped=_cached_snapshot(weights, revision)))
    return weights


def _config_folder(name: str, where: str, *, shipped: Path | None) -> Path:
    """The folder with a part's JSON configs. Raises AssetError where there is none."""
    folders = [*([shipped] if shipped else []), *(folder / name for folder in CONFIG_FOLDERS)]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise AssetError(
        f"{where}: the configs of {name!r} are not at hand: neither in the hub's cache nor in "
        f"configs/parts; fetch its JSON files alone (hf download {name} --include '*.json'), or "
        "give a folder"
    )


def _cached_snapshot(weights: str, revision: str | None) -> Path | None:
    """The snapshot of a hub id in the hub's cache, complete or not."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(weights, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None
