"""Precompute outputs of frozen parts for all data, before training or by `mmllm cache CONFIG`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator, PartialState

from mmllm import licences
from mmllm import model as models
from mmllm.config import RunConfig, StageConfig
from mmllm.data.mixture import Mixture
from mmllm.data.rendering import Rendered
from mmllm.errors import ConfigError
from mmllm.features.cache import FeatureCache
from mmllm.features.store import FeatureStore
from mmllm.model import AnyToAny
from mmllm.training.feed import open_sources, render_all_items
from mmllm.training.processes import join_processes

logger = logging.getLogger(__name__)

_MAX_NAMED = 20
"""Most unusable rows that are logged by name."""


def build_feature_cache(model: AnyToAny, stage: StageConfig) -> FeatureCache:
    """Build the feature cache of a stage: in memory, on disk, or none.

    Args:
        model: the model, whose frozen parts compute the features.
        stage: names the cache; latents are kept if it has a denoising loss, and captions are
            embedded if one of its losses, or pre-alignment, reads their embeddings.

    Raises:
        CacheError: the cache on disk cannot be used.
    """
    on_disk = stage.cache not in ("memory", "none")
    denoise = bool(stage.losses.get("denoise"))
    return FeatureCache(
        model,
        enabled=stage.cache != "none",
        denoise=denoise,
        captions=bool(denoise or "align" in stage.losses or stage.prealign or stage.realign),
        store=FeatureStore(stage.cache, complete=stage.cache_complete) if on_disk else None,
        dtype=getattr(torch, stage.cache_dtype),
    )


def precompute_features(
    cache: FeatureCache,
    items: Iterable[Rendered],
    state: Accelerator | PartialState,
    progress: bool = True,
) -> list[tuple[str, str]]:
    """Run the frozen parts over all items that are not cached.

    Each process computes a part where a folder is shared, everything where the cache is in memory.

    Args:
        cache: receives the features.
        items: rendered items of the datasets.
        state: the processes, which all wait for the last one.
        progress: whether the main process shows a progress bar.

    Returns:
        (name, error) of every medium that cannot be read.
    """
    part = (state.process_index, state.num_processes) if cache.store else (0, 1)
    unreadable = cache.precompute(items, progress=progress and state.is_main_process, part=part)
    state.wait_for_everyone()
    if cache.store:
        cache.store.refresh()
    return unreadable


def fill_cache(run: RunConfig, *, progress: bool = True) -> FeatureStore:
    """Fill the folder that the stage names as its `cache`, for training and validation data.

    What is there is not computed again, so an interrupted run goes on where it stopped. Under
    `accelerate launch` the processes share the work.

    Args:
        run: the stage and its system.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: the stage names no folder, or a licence is not accepted.
    """
    licences.check(run.system)
    stage = with_writable_cache(run).stage
    state = join_processes()
    # The language model only renders here and is not run: load it at half the memory.
    model = models.build(run.system, dtype=torch.bfloat16, device=str(state.device))
    cache = build_feature_cache(model, stage)
    assert cache.store is not None
    data = [stage.data, *([stage.validation.data] if stage.validation else [])]
    for datasets in data:
        sources = Mixture(open_sources(datasets, "stage.data"), stage.seed).sources
        rows: list[tuple[str, str]] = []
        items = render_all_items(model.renderer, sources, skipped=rows)
        for name, error in precompute_features(cache, items, state, progress):
            logger.warning("cannot be read: %s: %s", name, error)
        if state.is_main_process:  # each process reads all rows
            _log_unusable(rows, sum(map(len, sources.values())))
    if state.is_main_process:
        cache.store.index()
    return cache.store


def _log_unusable(rows: Sequence[tuple[str, str]], total: int) -> None:
    """Log the rows that are left out, the first ones by name, and their number."""
    for name, error in rows[:_MAX_NAMED]:
        logger.warning("cannot be used: %s: %s", name, error)
    if rows:
        logger.warning(
            "%d of %d rows cannot be used; `mmllm data check` lists them all", len(rows), total
        )


def with_writable_cache(run: RunConfig) -> RunConfig:
    """The run with a cache that may still grow; raises ConfigError if the stage names no folder."""
    if run.stage.cache in ("memory", "none"):
        raise ConfigError(
            f"stage.cache: expected a folder, got {run.stage.cache!r}; give one: "
            "mmllm cache CONFIG stage.cache=FOLDER"
        )
    return replace(run, stage=replace(run.stage, cache_complete=False))
