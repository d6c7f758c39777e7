"""`mmllm cache CONFIG`: run the frozen parts of a stage over all its data, once, and keep it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from mmllm import model as models
from mmllm.config import RunConfig
from mmllm.data.mixture import Mixture
from mmllm.errors import ConfigError
from mmllm.features.store import FeatureStore
from mmllm.training.feed import open_sources, render_all_items
from mmllm.training.loop import build_feature_cache, join_processes, warm

logger = logging.getLogger(__name__)

_NAMED = 20
"""Rows that cannot be used and are told of by name."""


def fill_cache(run: RunConfig, *, progress: bool = True) -> FeatureStore:
    """Fill the folder that the stage names as its `cache`. What is there is not computed again,
    so an interrupted run goes on where it stopped; under `accelerate launch` the processes share
    the work. Raises ConfigError if the stage names no folder."""
    stage = with_writable_cache(run).stage
    state = join_processes()
    # The language model renders here and is not run: half its memory will do.
    model = models.build(run.system, dtype=torch.bfloat16, device=str(state.device))
    work = build_feature_cache(model, stage)
    assert work.store is not None
    data = [stage.data, *([stage.validation.data] if stage.validation else [])]
    for datasets in data:
        sources = Mixture(open_sources(datasets, "stage.data"), stage.seed).sources
        rows: list[tuple[str, str]] = []
        items = render_all_items(model, sources, skipped=rows)
        for name, error in warm(work, items, state, progress):
            logger.warning("cannot be read: %s: %s", name, error)
        if state.is_main_process:  # each process reads all rows
            _report(rows, sum(map(len, sources.values())))
    if state.is_main_process:
        work.store.index()
    return work.store


def _report(rows: Sequence[tuple[str, str]], total: int) -> None:
    """Say which rows are left out, the first ones by name, and how many."""
    for name, error in rows[:_NAMED]:
        logger.warning("cannot be used: %s: %s", name, error)
    if rows:
        logger.warning(
            "%d of %d rows cannot be used; `mmllm data check` lists them all", len(rows), total
        )


def with_writable_cache(run: RunConfig) -> RunConfig:
    """The run with a cache that may still grow; raises ConfigError if it names no folder."""
    if run.stage.cache in ("memory", "none"):
        raise ConfigError(
            f"stage.cache: expected a folder, got {run.stage.cache!r}; give one: "
            "mmllm cache CONFIG stage.cache=FOLDER"
        )
    return replace(run, stage=replace(run.stage, cache_complete=False))
