"""Reading a checkpoint of NExT-GPT: its tensors under plain names, its JSON files, and the ids of
its signal tokens.

The .pt and .bin files are pickles. They are read here and nowhere else, by
`torch.load(weights_only=True)`, which makes tensors and refuses the rest.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.errors import CheckpointError

FILES = (
    "pytorch_model.pt",
    "non_lora_trainables.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "mm_output_projector.bin",
    "mm_input_projector.bin",
)
"""Files of weights, by precedence: a tensor that several hold is taken from the first."""

SIGNALS = {
    "image": (r"\[IMG(\d+)\]", r"<image_(\d+)>"),
    "video": (r"\[VID(\d+)\]", r"<video_(\d+)>"),
    "audio": (r"\[AUD(\d+)\]", r"<audio_(\d+)>"),
}
"""How the signal tokens are spelt in either layout's tokenizer."""

COUNTS = {"image": "n_img_tokens", "video": "n_vid_tokens", "audio": "n_aud_tokens"}
"""Their numbers in the later layout's config.json, in the order in which it adds them."""


@dataclass(frozen=True)
class NextGPTCheckpoint:
    """A folder of NExT-GPT.

    Attributes:
        folder: Where it lies.
        tensors: All tensors, under their names without wrappers.
        config: config.json; empty without the file.
        adapter_config: adapter_config.json; empty without the file.
        duplicates: "FILE: NAME" of tensors that an earlier file holds too.
    """

    folder: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    adapter_config: dict[str, Any]
    duplicates: list[str]

    @property
    def is_later_layout(self) -> bool:
        """Whether the later train.py saved it, not the code of 7b_tiva_v0."""
        return not (self.folder / FILES[0]).is_file()

    def signal_ids(self) -> dict[str, list[int]]:
        """Modality -> ids of its signal tokens: by the tokenizer's files or, without them, the last
        rows of the table. Raises CheckpointError if neither tells."""
        by_tokenizer = self._ids_of_tokenizer()
        return by_tokenizer if any(by_tokenizer.values()) else self._ids_of_config()

    def _ids_of_tokenizer(self) -> dict[str, list[int]]:
        added = _added_tokens(self.folder)
        ids: dict[str, list[int]] = {}
        for key, patterns in SIGNALS.items():
            numbered = {
                int(match[1]): token
                for text, token in added.items()
                for pattern in patterns
                if (match := re.fullmatch(pattern, text))
            }
            if sorted(numbered) != list(range(len(numbered))):
                raise CheckpointError(
                    f"{self.folder}: signal tokens of {key} have gaps: {sorted(numbered)}"
                )
            ids[key] = [numbered[number] for number in range(len(numbered))]
        return ids

    def _ids_of_config(self) -> dict[str, list[int]]:
        config, folder = self.config, self.folder
        if not all(name in config for name in (*COUNTS.values(), "vocab_size")):
            raise CheckpointError(
                f"{folder}: the ids of the signal tokens are unknown: no added_tokens.json or "
                "tokenizer_config.json with them; copy the tokenizer's files of the checkpoint "
                "there"
            )
        if any(
            config.get(f"mm_use_{part}_{kind}")
            for part in ("img", "vid", "aud")
            for kind in ("patch_token", "start_end")
        ):
            raise CheckpointError(
                f"{folder}: config.json adds patch or start tokens behind the signal tokens; copy "
                "the tokenizer's files of the checkpoint there, which say which rows are which"
            )
        ids: dict[str, list[int]] = {}
        end = config["vocab_size"]
        for key in reversed(COUNTS):
            ids[key] = list(range(end - config[COUNTS[key]], end))
            end -= config[COUNTS[key]]
        return ids


def read(folder: Path) -> NextGPTCheckpoint:
    """Read all tensors and JSON files of a folder. Raises CheckpointError if it holds no checkpoint
    of NExT-GPT, or a file holds more than tensors."""
    paths = [folder / name for name in FILES if (folder / name).is_file()]
    if not paths:
        raise CheckpointError(
            f"{folder}: no checkpoint of NExT-GPT there; expected one of {', '.join(FILES)}"
        )
    tensors: dict[str, Tensor] = {}
    duplicates = []
    for path in paths:
        for name, value in _load(path).items():
            plain = _without_wrappers(name)
            if plain in tensors:
                duplicates.append(f"{path.name}: {plain}")
            tensors.setdefault(plain, value)
    return NextGPTCheckpoint(
        folder,
        tensors,
        config=_read_json(folder / "config.json"),
        adapter_config=_read_json(folder / "adapter_config.json"),
        duplicates=duplicates,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as tensors alone, and nothing else is unpickled: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: expected names and tensors, got {type(state).__name__}")
    return {str(name): value.detach() for name, value in state.items()}


def _without_wrappers(name: str) -> str:
    """A parameter's name without those of the modules that it was saved through."""
    for prefix in ("module.", "llama_model.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name.removeprefix("model.") if name.startswith("model.mm_") else name


def _added_tokens(folder: Path) -> dict[str, int]:
    """Text -> id, from the files of a slow or a fast tokenizer."""
    added: dict[str, int] = {}
    try:
        if (path := folder / "added_tokens.json").is_file():
            added |= json.loads(path.read_text(encoding="utf-8"))
        if (path := folder / "tokenizer_config.json").is_file():
            tree = json.loads(path.read_text(encoding="utf-8"))
            for number, token in tree.get("added_tokens_decoder", {}).items():
                added[token["content"]] = int(number)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not as a tokenizer writes it: {error!r}") from error
    return added
