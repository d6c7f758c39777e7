"""What identifies a decoder's encoding of captions and media: equal fingerprints, equal results."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from mmllm.config import RENAMED_OPTIONS
from mmllm.decoders.config import SAMPLING_FIELDS


def pipeline_fingerprint(kind: str, config: Any, folder: Path) -> str:
    """Hash everything that decides how captions and media are encoded; not where the folder lies,
    nor how the decoder samples.

    Args:
        kind: the class of the decoder.
        config: its config.
        folder: of the pipeline.

    Returns:
        16 hexadecimal digits.
    """
    settings = dataclasses.asdict(config)
    for name in SAMPLING_FIELDS:
        settings.pop(name, None)
    if settings["dtype"] == "float32":  # fingerprints are older than this field
        del settings["dtype"]
    if not settings["vae_tiling"]:  # or than this one
        del settings["vae_tiling"]
    former = {new: old for old, new in RENAMED_OPTIONS.items()}  # and than these names
    settings = {former.get(name, name): value for name, value in settings.items()}
    digest = hashlib.sha256(repr((kind, settings)).encode())
    for file in sorted(folder.rglob("*")):
        if file.suffix in {".json", ".safetensors"}:
            name = file.relative_to(folder).as_posix()
            digest.update(f"{name}:{file.stat().st_size}".encode())
            if file.suffix == ".json" or file.stat().st_size < 64 * 2**20:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
