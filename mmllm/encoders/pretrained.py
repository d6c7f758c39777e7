"""What encoders of public libraries share: opening their weights, choosing a layer, pooling.

A hub id becomes a local folder first, so that one piece of code checks, loads and fingerprints
both. Only safetensors are read, and no code from a repository runs.
Legend: M media, L tokens, C channels, h x w a grid of patches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.conversation import Audio
from mmllm.errors import AssetError, ConfigError, MediaError
from mmllm.utils.hints import did_you_mean
from mmllm.weights import (
    PICKLE_SUFFIXES,
    are_weights_skipped,
    check_parameter_count,
    locate,
    remote_code_disabled,
)

_TRANSFORMERS_FILES = ("*.json", "model*.safetensors")
_UNTOLD = ("_name_or_path", "_commit_hash", "transformers_version")
"""Keys of a config.json that say nothing of what the model computes."""
_CONVERT = (
    "import torch; from safetensors.torch import save_file; "
    "s = torch.load({source!r}, map_location='cpu', weights_only=True); "
    "save_file({{k: v.clone().contiguous() for k, v in s.get('state_dict', s).items()}}, "
    "{target!r}, {{'format': 'pt'}})"
)


def open_folder(
    weights: str,
    *,
    where: str,
    revision: str | None = None,
    files: Sequence[str] = _TRANSFORMERS_FILES,
) -> Path:
    """The local folder behind `weights`: itself, an asset of `mini`, or the downloaded (or cached)
    `files` of a hub id at `revision`. `where` names the encoder in messages; raises AssetError."""
    source = Path(locate(weights, f"{where}.weights", revision))
    if source.is_dir():
        return source
    if source.exists():
        raise AssetError(f"{where}.weights: expected a folder, got the file {source}")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(weights, revision=revision, allow_patterns=list(files))
    except (OSError, ValueError) as error:
        raise AssetError(
            f"{where}.weights: {weights!r} is no folder here and cannot be fetched from the hub: "
            f"{_first_line(error)}; give a folder, correct the id or the revision, or log "
            "in with `hf auth login` if it is gated"
        ) from error
    return Path(folder)


def read_json(folder: Path, name: str, *, where: str) -> dict[str, Any]:
    """A JSON file of the folder; raises AssetError that says what is there instead."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise AssetError(
            f"{where}.weights: {folder} has no readable {name} ({there}); is it the right folder?"
        ) from error


def weight_files(folder: Path, pattern: str, *, where: str) -> list[Path]:
    """The safetensors of a folder; raises AssetError, with the remedy where there is a pickle.
    None where weights are left out."""
    if are_weights_skipped():
        return []
    found = sorted(folder.glob(pattern))
    if found:
        return found
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if not pickles:
        raise AssetError(
            f"{where}.weights: {folder} has no {pattern}; is it the right folder? (Of a hub id "
            "only safetensors are fetched: where it has none, download its pickle into a folder "
            "and give that, to be told how to convert it)"
        )
    target = folder / pattern.replace("*", "")
    program = _CONVERT.format(source=str(pickles[0]), target=str(target))
    raise AssetError(
        f"{where}.weights: {folder} has no {pattern}, only {pickles[0].name}, a pickle, which is "
        f"not read here; if you trust it, convert it once:\n  python -c {shlex.quote(program)}"
    )


def digest(files: Sequence[Path]) -> str:
    """One hash over the contents of files."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def fingerprint(what: Any) -> str:
    """The hash of plain data."""
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Source:
    """A folder as transformers saves it: its config, its weights, and the hash of both."""

    def __init__(self, weights: str, revision: str | None, *, where: str) -> None:
        """Opens the folder and checks that safetensors are there; raises AssetError."""
        self.where = where
        self.folder = open_folder(weights, where=where, revision=revision)
        self.config = read_json(self.folder, "config.json", where=where)
        self.files = files = weight_files(self.folder, "model*.safetensors", where=where)
        told = {key: value for key, value in self.config.items() if key not in _UNTOLD}
        self.hash = fingerprint([digest(files), told])

    def family(self, known: Sequence[str]) -> str:
        """The `model_type`, which must be one of `known`; raises AssetError."""
        kind = str(self.config.get("model_type"))
        if kind not in known:
            hint = did_you_mean(kind, list(known))
            raise AssetError(
                f"{self.where}.weights: {self.folder} holds a model of type {kind!r}{hint}; this "
                f"encoder reads {', '.join(known)}"
            )
        return kind

    def load(self, cls: Any, dtype: str) -> Any:
        """The model of a transformers class; a weight that it lacks is an AssetError. On the meta
        device where weights are left out."""
        if are_weights_skipped():
            of = cls.config_class.from_pretrained(str(self.folder))
            with torch.device("meta"):
                return cls(of).to(getattr(torch, dtype))
        try:
            with quiet(), remote_code_disabled():
                of = cls.config_class.from_pretrained(str(self.folder))
                check_parameter_count(self.folder / "config.json", self.files, lambda: cls(of))
                model, report = cls.from_pretrained(
                    str(self.folder),
                    dtype=getattr(torch, dtype),
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except Exception as error:  # whatever a reader of foreign files raises
            raise AssetError(
                f"{self.where}.weights: {self.folder} cannot be loaded as {cls.__name__}: "
                f"{_first_line(error)}"
            ) from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise AssetError(
                f"{self.where}.weights: {self.folder} lacks {len(missing)} weights of "
                f"{cls.__name__}, first {missing[0]!r}; was it saved completely?"
            )
        return model

    def preprocessor(self, cls: Any) -> Any:
        """The image, video or audio preprocessor that upstream saved with the model."""
        try:
            # Others would keep it as a setting of theirs.
            options = {"trust_remote_code": False} if cls.__name__.startswith("Auto") else {}
            with quiet(), remote_code_disabled():
                return cls.from_pretrained(str(self.folder), **options)
        except Exception as error:
            raise AssetError(
                f"{self.where}.weights: {self.folder} has no usable preprocessor for "
                f"{cls.__name__}: {_first_line(error)}; copy preprocessor_config.json of "
                "the published model next to its weights"
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, and its list of the weights of unused towers."""
    from transformers.utils import logging as library

    shown, level = library.is_progress_bar_enabled(), library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        library.set_verbosity(level)
        if shown:
            library.enable_progress_bar()


def block_number(layer: int, blocks: int, *, where: str) -> int:
    """Which block's output a `layer` means, 1 to `blocks`; negative ones count from the last."""
    number = layer if layer > 0 else blocks + 1 + layer
    if layer == 0 or not 1 <= number <= blocks:
        raise ConfigError(
            f"{where}.layer: expected 1 to {blocks}, or -{blocks} to -1 counted from the last "
            f"(the model has {blocks}), got {layer}"
        )
    return number


def check_grid(grid: int | None, shape: tuple[int, int], *, where: str) -> None:
    """Raises ConfigError unless h x w patches can be averaged to grid x grid."""
    if grid is not None and not 1 <= grid <= min(shape):
        raise ConfigError(
            f"{where}.grid: expected 1 to {min(shape)} (the picture is {shape[0]} x {shape[1]} "
            f"patches), got {grid}"
        )


def check_parts(key: str, parts: int | None, most: int, *, where: str) -> None:
    """Raises ConfigError unless `most` steps of time can be averaged to so many parts."""
    if parts is not None and not 1 <= parts <= most:
        raise ConfigError(f"{where}.{key}: expected 1 to {most}, got {parts}")


def pool_grid(tokens: Tensor, shape: tuple[int, int], grid: int | None) -> Tensor:
    """float[..., h * w, C] -> float[..., grid * grid, C], averaged; None leaves them."""
    if grid is None:
        return tokens
    flat = tokens.flatten(0, -3).transpose(1, 2).unflatten(2, shape)  # [M, C, h, w]
    pooled = F.adaptive_avg_pool2d(flat, grid).flatten(2).transpose(1, 2)
    return pooled.unflatten(0, tokens.shape[:-2])


def pool_time(tokens: Tensor, parts: int | None) -> Tensor:
    """float[M, T, ...] -> float[M, parts, ...]: means of equal parts; None leaves them."""
    if parts is None:
        return tokens
    flat = tokens.flatten(2).transpose(1, 2)  # [M, ..., T]
    pooled = F.adaptive_avg_pool1d(flat, parts).transpose(1, 2)
    return pooled.unflatten(2, tokens.shape[2:]) if tokens.ndim > 3 else pooled


def hidden(network: Any, block: int | None, **inputs: Any) -> Tensor:
    """What a model of transformers says after a block; None is its `last_hidden_state`."""
    if block is None:
        return network(**inputs).last_hidden_state
    return network(**inputs, output_hidden_states=True).hidden_states[block]


def one_shape(wide: Tensor, high: Tensor, *, where: str) -> tuple[int, ...]:
    """The shape of samples, given those of a wide and of a high medium; raises AssetError."""
    if wide.shape != high.shape:
        raise AssetError(
            f"{where}.weights: the preprocessor makes samples of different shapes "
            f"({list(wide.shape)} and {list(high.shape)}), which no batch can hold; set "
            "do_center_crop or a fixed size in its preprocessor_config.json"
        )
    return tuple(wide.shape)


def placed(samples: Tensor, module: nn.Module) -> Tensor:
    """Samples in the dtype and on the device of a module's weights."""
    like = next(module.parameters())
    return samples.to(like.device, like.dtype)


def prepared(extractor: Any, medium: Audio, *, where: str, **options: Any) -> Any:
    """What a feature extractor of transformers makes of a sound, at its own rate and with channels
    averaged; raises MediaError."""
    from mmllm import media

    rate = extractor.sampling_rate
    wave = np.array(media.resample(medium, rate).to_numpy()[0])
    try:
        return extractor(wave, sampling_rate=rate, return_tensors="pt", **options)
    except (ValueError, RuntimeError, AssertionError, IndexError) as error:
        raise MediaError(
            f"{where}: {medium!r} cannot be prepared ({len(wave)} samples at {rate} Hz): "
            f"{_first_line(error)}"
        ) from error
