"""Dictionaries on disk, in the format of SAELens: cfg.json and sae_weights.safetensors.

SAELens (and what reads its files) loads them as `topk`, `jumprelu`, or `jumprelu_transcoder`. The
model and the site are in `metadata`, with fields of its own names where it has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmllm.errors import CheckpointError, quoted, wrap_errors
from mmllm.insight.dictionary.autoencoder import Origin, SparseAutoencoder
from mmllm.utils import files
from mmllm.weights import copy_tensors, save_tensors, tensor_shapes

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ARCHITECTURES = ("topk", "jumprelu", "jumprelu_transcoder", "standard", "transcoder")
_UNSUPPORTED = {"normalize_activations": "none", "reshape_activations": "none"}


def save_dictionary(
    dictionary: SparseAutoencoder, folder: Path, about: dict[str, Any] | None = None
) -> Path:
    """Write a dictionary as a folder.

    Args:
        dictionary: the dictionary.
        folder: is replaced, if it exists.
        about: JSON-like data that is kept with it, such as how it was trained and its metrics.

    Returns:
        The folder.

    Raises:
        CheckpointError: it cannot be written.
    """
    origin = dictionary.origin
    config: dict[str, Any] = {
        "architecture": _architecture(dictionary),
        "d_in": len(dictionary.W_enc),
        "d_sae": dictionary.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not origin.is_transcoder,
        **_UNSUPPORTED,
        "metadata": {
            "model_name": origin.name,
            "hook_name": origin.site,
            "hook_name_out": origin.output_site,
            "model_fingerprint": origin.model,
            "mmllm": about or {},
        },
    }
    if dictionary.k is not None:
        config["k"] = dictionary.k
    if origin.is_transcoder:
        config |= {"d_out": len(dictionary.b_dec), "hook_name_out": origin.output_site}
    remedy = "free some space, or choose another folder"
    with (
        files.write_errors(folder, CheckpointError, remedy),
        files.atomic_folder(folder) as draft,
    ):
        save_tensors(_tensors(dictionary), draft / WEIGHTS)
        (draft / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return folder


def load_dictionary(folder: Path) -> SparseAutoencoder:
    """Read a dictionary that `save_dictionary` or SAELens wrote.

    Of SAELens' architectures, `topk`, `jumprelu`, `standard` (ReLU) and transcoders of the latter
    two are read, with activations that are not normalised.

    Raises:
        CheckpointError: there is none, it is damaged, or of another architecture.
    """
    config = read_config(folder)
    metadata = config.get("metadata") or {}
    site = str(metadata.get("hook_name"))
    is_transcoder = str(config["architecture"]).endswith("transcoder")
    output_site = metadata.get("hook_name_out") or config.get("hook_name_out")
    origin = Origin(
        model=str(metadata.get("model_fingerprint")),
        site=site,
        output_site=str(output_site) if is_transcoder else site,
        name=str(metadata.get("model_name") or ""),
    )
    file = folder / WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{file}: not there; is the copy of the dictionary whole?")
    shapes = tensor_shapes(file)
    if len(shapes.get("W_enc", ())) != 2 or len(shapes.get("W_dec", ())) != 2:
        raise CheckpointError(f"{file}: expected matrices W_enc and W_dec, got {quoted(shapes)}")
    dictionary = SparseAutoencoder(
        shapes["W_enc"][0],
        shapes["W_dec"][0],
        origin,
        d_out=shapes["W_dec"][1],
        k=config.get("k") if config["architecture"] == "topk" else None,
    )
    if "threshold" in shapes and config["architecture"] == "standard":
        raise CheckpointError(f"{file}: an architecture 'standard' has no thresholds")
    targets = _tensors(dictionary)
    if config["architecture"] in ("standard", "transcoder"):
        targets.pop("threshold")
    copy_tensors(targets, file, remedy="the dictionary is damaged; take another copy")
    return dictionary


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a stored dictionary. Raises CheckpointError."""
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{folder}: no dictionary there, which has the files {CONFIG} and {WEIGHTS}; "
            "`mmllm insight features CHECKPOINT` trains one"
        )
    with wrap_errors(CheckpointError, file):
        config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or config.get("architecture") not in _ARCHITECTURES:
        got = config.get("architecture") if isinstance(config, dict) else config
        raise CheckpointError(
            f"{file}: architecture: expected one of {', '.join(_ARCHITECTURES)}, got {quoted(got)}"
        )
    for name, only in _UNSUPPORTED.items():
        if config.get(name, only) != only:
            raise CheckpointError(
                f"{file}: {name}: expected {only!r}, got {quoted(config[name])}; fold it into the "
                "weights with SAELens first"
            )
    return config


def _architecture(dictionary: SparseAutoencoder) -> str:
    if dictionary.k is not None:
        return "topk"
    return "jumprelu_transcoder" if dictionary.origin.is_transcoder else "jumprelu"


def _tensors(dictionary: SparseAutoencoder) -> dict[str, Any]:
    tensors = dict(dictionary.state_dict())
    if dictionary.k is not None:
        tensors.pop("threshold")
    return tensors
