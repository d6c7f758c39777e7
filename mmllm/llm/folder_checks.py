"""Checks of a language model's folder, which may be untrusted, before transformers opens it.

They read names, headers and JSON, never a pickle, and run no code.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mmllm.errors import CheckpointError, wrap_errors
from mmllm.weights import PICKLE_SUFFIXES, check_parameter_count, resolve_inside

_CONVERT_PROGRAM = (
    "from transformers import AutoModelForCausalLM as Model; "
    "Model.from_pretrained({folder!r}, use_safetensors=False, dtype='auto')"
    ".save_pretrained({folder!r})"
)
"""Program that converts a trusted pickle to safetensors."""

_MAX_GROWTH = 64.0
"""Factor by which a tokenizer's replacements may lengthen a text, before or after the model."""


def check_file_names(weights: str, source: Path) -> list[str]:
    """List a local model folder.

    Args:
        weights: `llm.weights` of the config, for messages.
        source: A folder, or a hub id that is no path here.

    Returns:
        The names in the folder, sorted; none for a hub id.

    Raises:
        CheckpointError: It holds no model, an adapter, or its weights as a pickle only.
    """
    if not source.exists():
        return []
    if not source.is_dir():
        raise CheckpointError(f"llm.weights {weights!r}: expected a folder or a .gguf file")
    names = sorted(path.name for path in source.iterdir())
    if "config.json" not in names:
        raise CheckpointError(
            f"llm.weights {weights!r} has no config.json ({', '.join(names[:8]) or 'nothing'}); is "
            "it the folder of a model?"
        )
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"llm.weights {weights!r} is the folder of an adapter, which names another model: "
            "merge the two with peft (merge_and_unload) and give the merged folder"
        )
    if any(name.endswith(".safetensors") for name in names):
        return names
    pickles = [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]
    if not pickles:
        raise CheckpointError(f"llm.weights {weights!r} has no *.safetensors; is the copy whole?")
    program = _CONVERT_PROGRAM.format(folder=str(source.resolve()))
    raise CheckpointError(
        f"llm.weights {weights!r} has no *.safetensors, only {pickles[0]}, a pickle, which is not "
        f"read here; if you trust it, convert it once:\n  python -c {shlex.quote(program)}"
    )


def check_contents(folder: Path, names: Sequence[str], build: Callable[[], nn.Module]) -> None:
    """Check the JSON files and the sizes of a local model folder.

    Args:
        folder: The folder.
        names: The names in it.
        build: Builds the model of its config.json.

    Raises:
        CheckpointError: An index names files outside the folder, a JSON file cannot be read, a
            tokenizer may exhaust memory, or config.json describes more than the weights hold
            (transformers would allocate the missing tensors before it reports them).
    """
    shards = {name for name in names if name.endswith(".safetensors")}
    for name in names:
        if name.endswith(".safetensors.index.json"):
            index = json.loads((folder / name).read_text(encoding="utf-8"))
            shards |= {str(shard) for shard in index["weight_map"].values()}
    files = [resolve_inside(folder, name, "llm.weights", follow=True) for name in sorted(shards)]
    for name in {"generation_config.json"}.intersection(names):  # transformers ignores its damage
        with wrap_errors(CheckpointError, folder / name):
            json.loads((folder / name).read_text(encoding="utf-8"))
    if "tokenizer.json" in names:
        check_tokenizer(folder / "tokenizer.json")
    check_parameter_count(folder / "config.json", files, build)


def check_tokenizer(file: Path) -> None:
    """Bound the growth of texts by a tokenizer.json. Raises CheckpointError if its replacements
    could turn a word into gigabytes: the library allocates them outside Python's reach."""
    file = resolve_inside(file.parent, file.name, "llm.weights", follow=True)
    text = file.read_text(encoding="utf-8")
    if '"Replace"' not in text:  # skips the parsing of most files, some of which have 30 MB
        return
    with wrap_errors(CheckpointError, file):
        tree = json.loads(text)
        for key in ("normalizer", "decoder"):
            growth = _max_growth(tree.get(key))
            if growth > _MAX_GROWTH:
                raise CheckpointError(
                    f"{file}: {key}: its replacements make texts {growth:.3g} times as long, more "
                    f"than {_MAX_GROWTH:g}"
                )


def _max_growth(step: Any) -> float:
    """The largest factor by which a step of a tokenizer, or a sequence of steps, lengthens a
    text."""
    if not isinstance(step, dict):
        return 1.0
    if step.get("type") == "Replace":
        pattern = step["pattern"].get("String", "")
        return max(len(step["content"]) / max(len(pattern), 1), 1.0)
    steps = [*step.get("normalizers", ()), *step.get("decoders", ())]
    return math.prod(map(_max_growth, steps))
