"""Folders of pretrained encoders: resolving, checking, loading and hashing them.

A hub id becomes a local folder first, so that the same code checks, loads and fingerprints both.
Only safetensors are read, and no code from a repository runs.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from mmllm.errors import AssetError
from mmllm.utils.hashing import fingerprint, sha256_files
from mmllm.utils.hints import did_you_mean
from mmllm.utils.quiet import quiet_libraries
from mmllm.weights import (
    PICKLE_SUFFIXES,
    are_weights_skipped,
    check_parameter_count,
    locate,
    remote_code_disabled,
)

_TRANSFORMERS_FILES = ("*.json", "model*.safetensors")
METADATA_KEYS = ("_name_or_path", "_commit_hash", "transformers_version")
"""Keys of a config.json that do not change what the model computes."""
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
    """Return the local folder behind `weights`.

    Args:
        weights: a folder, an asset of `mini`, or a hub id, whose files are downloaded or found
            cached.
        where: the encoder's name in error messages.
        revision: branch, tag or commit of a hub id.
        files: patterns of the files that are downloaded.

    Raises:
        AssetError: where there is no such folder and the hub has none.
    """
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
            f"{first_line(error)}; give a folder, correct the id or the revision, or log "
            "in with `hf auth login` if it is gated"
        ) from error
    return Path(folder)


def read_json(folder: Path, name: str, *, where: str) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder.

    Args:
        folder: the model's folder.
        name: the file's name in it.
        where: the encoder's place in the config, for messages.

    Raises:
        AssetError: the file is missing or holds no object; the message lists what is there instead.
    """
    try:
        tree = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("no object")
        return tree
    except (OSError, ValueError, RecursionError) as error:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise AssetError(
            f"{where}.weights: {folder} has no readable {name} ({there}); is it the right folder?"
        ) from error


def weight_files(folder: Path, pattern: str, *, where: str) -> list[Path]:
    """Return the safetensors files of a model folder, sorted by name.

    Args:
        folder: the model's folder.
        pattern: a glob pattern of file names.
        where: the encoder's place in the config, for messages.

    Returns:
        At least one file; an empty list where weights are skipped.

    Raises:
        AssetError: no file matches. If there is a pickle instead, the message has the command that
            converts it.
    """
    if are_weights_skipped():
        return []
    files = sorted(folder.glob(pattern))
    if files:
        return files
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if not pickles:
        raise AssetError(
            f"{where}.weights: {folder} has no {pattern}; is it the right folder? (Of a hub id "
            "only safetensors are fetched: where it has none, download its pickle into a folder "
            "and give that, to see the command that converts it)"
        )
    target = folder / pattern.replace("*", "")
    program = _CONVERT.format(source=str(pickles[0]), target=str(target))
    raise AssetError(
        f"{where}.weights: {folder} has no {pattern}, only {pickles[0].name}, a pickle, which is "
        f"not read here; if you trust it, convert it once:\n  python -c {shlex.quote(program)}"
    )


@dataclass(frozen=True)
class ModelPart:
    """One network of a model's folder, read without the rest.

    Attributes:
        config: the place of its config in the model's, such as "thinker_config.audio_config".
        prefixes: beginning of the names of its weights in the files -> of those in the network.
    """

    config: str
    prefixes: Mapping[str, str] = field(default_factory=dict)


class ModelFolder:
    """A folder as transformers saves it: its config, its weights, and the hash of both.

    Args:
        weights: the folder, or a hub id.
        revision: the revision of a hub id; None: the newest.
        where: the encoder's place in the config, for messages.

    Raises:
        AssetError: there is no such folder, or it has no safetensors.
    """

    def __init__(self, weights: str, revision: str | None, *, where: str) -> None:
        """Open the folder and check that it has safetensors."""
        self.where = where
        self.folder = open_folder(weights, where=where, revision=revision)
        self.config = read_json(self.folder, "config.json", where=where)
        self.files = weight_files(self.folder, "model*.safetensors", where=where)
        config = {key: value for key, value in self.config.items() if key not in METADATA_KEYS}
        self.hash = fingerprint([sha256_files(self.files), config])

    def model_type(self, known: Sequence[str]) -> str:
        """The `model_type`, which must be one of `known`. Raises AssetError."""
        kind = str(self.config.get("model_type"))
        if kind not in known:
            raise AssetError(
                f"{self.where}.weights: {self.folder} holds a model of type {kind!r}"
                f"{did_you_mean(kind, list(known))}; this encoder reads {', '.join(known)}"
            )
        return kind

    def load(self, cls: Any, dtype: str, part: ModelPart | None = None) -> Any:
        """Load the model, or a part of it, on the meta device where weights are skipped.

        Args:
            cls: the class of transformers.
            dtype: of the weights.
            part: the part of the folder's model that is read; None: all.

        Raises:
            AssetError: it cannot be loaded, or lacks a weight.
        """
        if are_weights_skipped():
            config = self._read_config(cls, part)
            with torch.device("meta"):
                return cls(config).to(getattr(torch, dtype))
        options: dict[str, Any] = {}
        if part is not None:
            mapping = {f"^{re.escape(old)}": new for old, new in part.prefixes.items()}
            options = {"config": self._read_config(cls, part), "key_mapping": mapping}
        try:
            with quiet_libraries("transformers"), remote_code_disabled():
                config = options.get("config") or self._read_config(cls, None)
                check_parameter_count(self.folder / "config.json", self.files, lambda: cls(config))
                model, report = cls.from_pretrained(
                    str(self.folder),
                    dtype=getattr(torch, dtype),
                    use_safetensors=True,
                    output_loading_info=True,
                    **options,
                )
        except Exception as error:  # whatever a reader of foreign files raises
            raise AssetError(
                f"{self.where}.weights: {self.folder} cannot be loaded as {cls.__name__}: "
                f"{first_line(error)}"
            ) from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise AssetError(
                f"{self.where}.weights: {self.folder} lacks {len(missing)} weights of "
                f"{cls.__name__}, first {missing[0]!r}; was it saved completely?"
            )
        return model

    def _read_config(self, cls: Any, part: ModelPart | None) -> Any:
        """The config of the whole model, or that of a part of it."""
        if part is None:
            return cls.config_class.from_pretrained(str(self.folder))
        from transformers import AutoConfig

        whole = AutoConfig.from_pretrained(str(self.folder), trust_remote_code=False)
        return attrgetter(part.config)(whole)

    def processor(self, cls: Any) -> Any:
        """The image or video processor, or the feature extractor, that was saved with the model.
        Raises AssetError."""
        try:
            # Only Auto classes know the option; others would keep it as a setting of theirs.
            options = {"trust_remote_code": False} if cls.__name__.startswith("Auto") else {}
            with quiet_libraries("transformers"), remote_code_disabled():
                return cls.from_pretrained(str(self.folder), **options)
        except Exception as error:
            raise AssetError(
                f"{self.where}.weights: {self.folder} has no usable preprocessor for "
                f"{cls.__name__}: {first_line(error)}; copy preprocessor_config.json of "
                "the published model next to its weights"
            ) from error


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
