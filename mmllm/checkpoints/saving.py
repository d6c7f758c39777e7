"""Write checkpoints atomically: into a draft folder, synced and renamed (mmllm.utils.files)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm import config as configs
from mmllm.checkpoints.contents import fingerprints, saved_parameters
from mmllm.checkpoints.manifest import write_manifest
from mmllm.config import SystemConfig
from mmllm.errors import CheckpointError
from mmllm.llm.export import save_transformers
from mmllm.model import AnyToAny
from mmllm.utils import files, literals
from mmllm.weights import save_tensors


def save(
    folder: Path,
    model: AnyToAny,
    *,
    step: int,
    stage: Any = None,
    training: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    resolved_settings: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    with_llm: bool = False,
) -> Path:
    """Write a checkpoint, which replaces the one that is there. A card (README.md) in it stays.

    Args:
        folder: Where.
        model: Its projections, signal tables and adapters are written.
        step: Number of optimizer steps taken.
        stage: The stage's config; None if no stage trained the model.
        training: State of training as JSON data, for training/state.json.
        tensors: State of the optimizer by name, for training/optimizer.safetensors.
        resolved_settings: Settings that were chosen by measurement.
        dtype: Converts the weights (None: as they are).
        with_llm: Whether to write the frozen language model too.

    Raises:
        CheckpointError: Writing fails; a folder that was there before is unchanged.
    """
    folder = Path(folder)
    with write_errors(folder), files.atomic_folder(folder) as draft:
        require_free_space(folder, _bytes_needed(model, tensors or {}, with_llm=with_llm))
        tree = {"system": configs.dump(model.config)}
        if with_llm:
            tree["system"]["llm"]["weights"] = "llm"  # below the checkpoint, wherever it goes
            save_transformers(model.llm, draft / "llm")
        _keep_template(draft, tree["system"]["llm"], model.llm.chat_template)
        if stage is not None:
            tree["stage"] = configs.dump(stage)
        (draft / "config.yaml").write_text(literals.dump(tree), encoding="utf-8")
        _write_weights(draft, model, dtype)
        if training is not None:
            (draft / "training").mkdir()
            (draft / "training" / "state.json").write_text(json.dumps(training), encoding="utf-8")
            save_tensors(tensors or {}, draft / "training" / "optimizer.safetensors")
        write_manifest(
            draft,
            step=step,
            system=model.config.name,
            stage=getattr(stage, "name", None),
            fingerprints=fingerprints(model),
            chosen=dict(resolved_settings or {}),
        )
        card = files.current_folder(folder) / "README.md"
        if card.is_file():
            shutil.copy2(card, draft)
    return folder


def assemble(
    folder: Path,
    system: SystemConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
    write_more: Callable[[Path], None],
) -> Path:
    """Write a checkpoint of weights that were trained elsewhere, without building the model.

    The frozen parts that they were trained with are unknown, so there are no fingerprints; shapes
    are checked when the checkpoint is loaded.

    Args:
        folder: A new folder.
        system: The system that the weights belong to.
        tensors: File -> name -> tensor, for the safetensors.
        write_more: Called with the draft's folder, to add other files.

    Raises:
        CheckpointError: `folder` exists, or cannot be written.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; name a new folder")
    with write_errors(folder), files.atomic_folder(folder) as draft:
        tree = configs.dump(system)
        _keep_template(draft, tree["llm"], None)
        text = literals.dump({"system": tree})
        (draft / "config.yaml").write_text(text, encoding="utf-8")
        for name, own in tensors.items():
            save_tensors(own, draft / name)
        write_more(draft)
        write_manifest(draft, step=0, system=system.name, stage=None, fingerprints={}, chosen={})
    return folder


def require_free_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError unless a checkpoint fits on the disk.

    Args:
        folder: the folder that is to hold it, which need not exist yet.
        needed: bytes of the checkpoint.
    """
    free = files.free_bytes(folder)
    if free < needed:
        raise CheckpointError(
            f"{folder}: a checkpoint takes {needed / 2**20:.0f} MiB but {free / 2**20:.0f} MiB are "
            "free; free some space and resume from the previous checkpoint"
        )


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Convert an error of the disk into a CheckpointError that names the remedy."""
    remedy = "free some space or name another folder; what was there before is unchanged"
    with files.write_errors(folder, CheckpointError, remedy):
        yield


def _write_weights(draft: Path, model: AnyToAny, dtype: torch.dtype | None) -> None:
    """Projections, signal tables and LoRA of decoders as safetensors, adapters in peft's format."""
    for file, parameters in saved_parameters(model).items():
        (draft / file).parent.mkdir(parents=True, exist_ok=True)
        save_tensors(
            {
                name: value.detach().to(
                    "cpu", dtype if dtype and value.is_floating_point() else value.dtype
                )
                for name, value in parameters.items()
            },
            draft / file,
        )
    if model.llm.has_lora:
        model.llm.save_lora(draft / "adapter", dtype)


def _keep_template(draft: Path, llm: dict[str, Any], text: str | None) -> None:
    """Copy a chat template that is a file of its own into the checkpoint, which reads none that
    lies elsewhere. `text`: what the file held when the model was loaded."""
    template = llm["chat_template"]
    if template is not None and template.endswith(".jinja"):
        text = text or Path(template).expanduser().read_text(encoding="utf-8")
        (draft / "chat_template.jinja").write_text(text, encoding="utf-8")
        llm["chat_template"] = "chat_template.jinja"


def _bytes_needed(model: AnyToAny, tensors: Mapping[str, Tensor], *, with_llm: bool) -> int:
    """An upper bound of a checkpoint's size."""
    trained = sum(value.numel() * 4 for _, value in model.trainable_candidates())
    others = [*tensors.values(), *(model.llm.model.parameters() if with_llm else ())]
    return trained + sum(value.numel() * value.element_size() for value in others) + 2**20
