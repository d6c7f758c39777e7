"""Checkpoints made of a checkpoint: the model alone, with LoRA merged, or as a transformers
folder."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmllm.checkpoints.loading import load_model, load_whole_model
from mmllm.checkpoints.manifest import Checkpoint
from mmllm.checkpoints.saving import save, write_errors
from mmllm.config import SystemConfig
from mmllm.llm.export import merge_lora, save_transformers
from mmllm.utils import files

logger = logging.getLogger(__name__)


def export(source: Checkpoint, folder: Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write the model of a checkpoint without its training state, to be used or given away.

    Args:
        source: the checkpoint.
        folder: the folder to write; a checkpoint in it is replaced, its README.md stays.
        dtype: what the weights are converted to; None keeps theirs.

    Returns:
        The folder.

    Raises:
        CheckpointError: the checkpoint is damaged, or the folder cannot be written.
    """
    model = load_model(source)
    if source.holds_llm and dtype:
        model.llm.model.to(dtype)
    return save(
        folder,
        model,
        step=source.step,
        stage=source.stage(),
        resolved_settings=source.resolved_settings,
        dtype=dtype,
        with_llm=source.holds_llm,
    )


def merge(source: Checkpoint, folder: Path, *, dtype: torch.dtype) -> Path:
    """Write a checkpoint that contains its language model, with LoRA merged into it.

    LoRA is merged in float32, from whole weights even where it was trained on quantised ones. A
    decoder with `text_encoder: llm`, whose captions merging would change, gets `own`.

    Args:
        source: the checkpoint.
        folder: the folder to write; a checkpoint in it is replaced, its README.md stays.
        dtype: what the merged weights are converted to.

    Returns:
        The folder.

    Raises:
        CheckpointError: the checkpoint is damaged, or the folder cannot be written.
    """
    model = load_whole_model(source)
    merge_lora(model.llm)
    model.llm.model.to(dtype)  # as its files will be, so that its fingerprint is theirs
    model.config = _with_own_text_encoders(source.system())
    return save(
        folder,
        model,
        step=source.step,
        stage=source.stage(),
        resolved_settings=source.resolved_settings,
        with_llm=True,
    )


def export_transformers(source: Checkpoint, folder: Path, *, dtype: torch.dtype) -> Path:
    """Write the language model of a checkpoint as a plain transformers folder (mmllm.llm.export).

    LoRA is merged, and the signal tokens are added to the vocabulary.

    Args:
        source: the checkpoint.
        folder: the folder to write to; other files in it stay.
        dtype: what the merged weights are converted to.

    Returns:
        The folder.

    Raises:
        CheckpointError: the checkpoint is damaged, or the folder cannot be written.
    """
    model = load_whole_model(source)
    merge_lora(model.llm)
    model.llm.model.to(dtype)
    with write_errors(folder):
        with files.atomic_folder(folder / "transformers") as draft:
            save_transformers(model.llm, draft, signals=True)
        files.move_files(folder / "transformers", folder)
    return folder


def _with_own_text_encoders(system: SystemConfig) -> SystemConfig:
    """The system whose decoders read captions by their pipelines' own text encoders, since merging
    changes the language model that others read them by."""
    decoders: dict[str, Any] = dict(system.decoders)
    for key, decoder in decoders.items():
        if decoder.text_encoder == "llm":
            logger.warning(
                "decoders.%s: its captions are those of the language model without LoRA; it gets "
                "text_encoder: own, and the pipeline's is loaded next to the merged model",
                key,
            )
            decoders[key] = replace(decoder, text_encoder="own")
    return replace(system, decoders=decoders)
