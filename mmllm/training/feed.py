"""Training batches by step number: draw, read, render, look features up, collate."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmllm import config as configs
from mmllm.config import StageConfig
from mmllm.data.batch import Batch, BatchLayout, collate
from mmllm.data.checked_source import CheckedDataSource, render
from mmllm.data.mixture import Draw, LengthGroups, Mixture, balance_by_length
from mmllm.data.protocol import DataSource
from mmllm.data.rendering import Rendered, Renderer
from mmllm.data.text_corpus import TextCorpus
from mmllm.errors import MediaError, TrainingError
from mmllm.features.cache import DeviceRequired, FeatureCache

logger = logging.getLogger(__name__)

_MAX_TRIES = 100
"""Consecutive unusable items after which training gives up."""

BALANCED_RANKS = 16
"""Most ranks that balance the lengths of their packs among themselves. Each of them renders the
conversations of all to know their lengths, which would be too many on a large cluster."""


@dataclass
class StepData:
    """One process's part of a step.

    Attributes:
        microbatches: its micro-batches.
        skipped: (name, error) of items that could not be read.
    """

    microbatches: list[Batch]
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def pin_memory(self) -> StepData:
        """Called by torch's DataLoader, in its own thread where there are data workers."""
        return StepData([batch.pin_memory() for batch in self.microbatches], self.skipped)


class TrainingStepDataset(Dataset):
    """`dataset[step]` -> StepData of one process; all randomness is a function of (seed, step).

    Args:
        renderer: the model's.
        layout: the model's.
        mixture: the training data.
        cache: features of the frozen parts.
        stage: batch size, packing, lengths and data workers.
        rank: the process.
        world_size: number of processes.
        text_corpus: text for the loss `kl`, if the stage has it.
        pin_memory: whether batches are put into page-locked memory, for a CUDA device.

    Raises:
        ConfigError: a batch size cannot be divided among processes and accumulation steps.
    """

    def __init__(
        self,
        renderer: Renderer,
        layout: BatchLayout,
        mixture: Mixture,
        cache: FeatureCache,
        stage: StageConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        text_corpus: TextCorpus | None = None,
        pin_memory: bool = False,
    ):
        for name, size in (
            ("", stage.batch_size),
            ("kl.", text_corpus.batch_size if text_corpus else 0),
        ):
            if size % (stage.gradient_accumulation_steps * world_size):
                raise configs.ConfigError(
                    f"stage.{name}batch_size {size} cannot be divided among {world_size} processes "
                    f"and {stage.gradient_accumulation_steps} accumulation steps"
                )
        self.renderer, self.layout = renderer, layout
        self.mixture = mixture
        self.order: Mixture | LengthGroups = mixture
        if stage.length_window:
            self.order = LengthGroups(
                mixture,
                self._length,
                window=stage.length_window,
                slices=stage.gradient_accumulation_steps,
            )
        self.cache = cache
        self.stage = stage
        self.rank, self.world_size = rank, world_size
        self.text_corpus = text_corpus
        self.pin_memory = pin_memory

    def __getitem__(self, step: int) -> StepData:
        draws = self.order.batch(step, self.stage.batch_size)
        windows = self.text_corpus.batch(step) if self.text_corpus else None
        parts = self.stage.gradient_accumulation_steps * self.world_size
        size = len(draws) // self.stage.gradient_accumulation_steps
        result = StepData([])
        for micro in range(self.stage.gradient_accumulation_steps):
            rendered: dict[Draw, Rendered] = {}
            local = self._local_draws(draws[micro * size : (micro + 1) * size], rendered)
            batch = self._collate(local, rendered, result.skipped)
            part = micro * self.world_size + self.rank
            batch.text_windows = None if windows is None else windows.chunk(parts)[part]
            result.microbatches.append(batch)
        return result

    def steps(self, start: int, stop: int) -> Iterator[StepData]:
        """Yield the data of consecutive steps.

        The stage's data workers prepare them in advance, except steps that need a frozen part run
        on the device, which a worker cannot use.

        Args:
            start: the first step.
            stop: the step after the last.
        """
        loader = DataLoader(
            _Prefetched(self),
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self.stage.num_workers,
            persistent_workers=False,
            pin_memory=self.pin_memory,
        )
        for step, ready in zip(range(start, stop), loader, strict=True):
            yield self[step] if ready is None else ready

    def render(self, draw: Draw) -> Rendered:
        """Render one item; raises MediaError."""
        source = self.mixture.sources[draw.source]
        conversation = source.conversation(draw.index, self.mixture.rng(draw))
        return render(self.renderer, conversation, self.stage.max_length)

    def _local_draws(self, draws: Sequence[Draw], rendered: dict[Draw, Rendered]) -> Sequence[Draw]:
        """This process's draws of a micro-batch: its slice or, where they are packed, as many that
        balance the lengths of the ranks' packs. What is rendered for that is put into `rendered`.
        """
        size = len(draws) // self.world_size
        first = self.rank - self.rank % BALANCED_RANKS
        ranks = min(BALANCED_RANKS, self.world_size - first)
        if not self.stage.pack or 1 in (ranks, size):
            return draws[self.rank * size : (self.rank + 1) * size]
        near = draws[first * size : (first + ranks) * size]
        parts = balance_by_length(near, ranks, functools.partial(self._length, rendered=rendered))
        return parts[self.rank - first]

    def _length(self, draw: Draw, rendered: dict[Draw, Rendered] | None = None) -> int:
        """Count the tokens of a draw and put its rendering into `rendered`; a draw that will be
        skipped counts as the longest."""
        try:
            item = self.render(draw)
        except MediaError:
            return self.stage.max_length
        if rendered is not None:
            rendered[draw] = item
        return len(item)

    def _collate(
        self,
        draws: Sequence[Draw],
        rendered: Mapping[Draw, Rendered],
        skipped: list[tuple[str, str]],
    ) -> Batch:
        items, seeds = [], []
        for draw in draws:
            items.append(self._usable_item(draw, rendered, skipped))
            seeds.append(draw.seed)
        return collate(
            items,
            self.cache,
            self.layout,
            pack=self.stage.pack,
            share=not self.stage.pack or self.layout.supports_prefix_packing,
            seeds=seeds,
        )

    def _usable_item(
        self, draw: Draw, rendered: Mapping[Draw, Rendered], skipped: list[tuple[str, str]]
    ) -> Rendered:
        """Render the drawn item or, if it is unusable, the next usable one of its source. Items in
        between are recorded as skipped only when they are drawn themselves."""
        size = len(self.mixture.sources[draw.source])
        tries = min(size, _MAX_TRIES)
        last = ""
        for attempt in range(tries):
            candidate = Draw(draw.source, (draw.index + attempt) % size, draw.seed)
            try:
                known = candidate in rendered
                item = rendered[candidate] if known else self.render(candidate)
                self.cache.check(item)
                return item
            except MediaError as error:
                name = f"{draw.source}/{self.mixture.sources[draw.source].name(candidate.index)}"
                last = f"{name}: {error}"
                if not attempt:
                    skipped.append((name, str(error)))
        raise TrainingError(
            f"{draw.source}: {tries} items in a row cannot be used, of {size}; `mmllm data check` "
            f"lists them all; the last is {last}"
        )


@dataclass(frozen=True)
class _Prefetched(Dataset):
    """The steps of a dataset in a data worker; None for a step that needs the device."""

    feed: TrainingStepDataset

    def __getitem__(self, step: int) -> StepData | None:
        try:
            return self.feed[step]
        except DeviceRequired:
            return None


def open_sources(data: Mapping[str, object], where: str) -> dict[str, DataSource]:
    """Open the datasets of a stage; a row that is wrong in any way raises MediaError when it is
    read.

    Args:
        data: the datasets' configs by name.
        where: their place in the config, for messages.

    Raises:
        ConfigError: a dataset cannot be opened.
    """
    return {
        name: CheckedDataSource(configs.build(entry, where=f"{where}.{name}"))
        for name, entry in data.items()
    }


def render_all_items(
    renderer: Renderer,
    sources: Mapping[str, DataSource],
    variants: int = 1,
    skipped: list[tuple[str, str]] | None = None,
    rows: Mapping[str, Sequence[int]] | None = None,
) -> Iterator[Rendered]:
    """Render every item whose frozen features training will need.

    Args:
        renderer: the model's.
        sources: the datasets by name.
        variants: phrasings of each item.
        skipped: (name, error) of each unusable row is appended to it; they are left out.
        rows: the rows of each dataset; None: all.
    """
    for name, source in sources.items():
        for index in range(len(source)) if rows is None else rows.get(name, ()):
            try:
                for variant in range(variants):
                    yield render_item(renderer, source, index, variant)
            except MediaError as error:
                if skipped is not None:
                    skipped.append((f"{name}/{source.name(index)}", str(error)))


def drawn_rows(mixture: Mixture, stage: StageConfig, start: int = 0) -> dict[str, list[int]] | None:
    """The rows of each dataset that steps draw; None if they are as many draws as rows, or more.

    Args:
        mixture: the datasets and their order.
        stage: number of steps, batch size and length window.
        start: the first step.
    """
    window = stage.length_window or 1
    stop = math.ceil(stage.steps / window) * window
    draws = range(start // window * window * stage.batch_size, stop * stage.batch_size)
    if len(draws) >= sum(map(len, mixture.sources.values())):
        return None
    rows: dict[str, set[int]] = {name: set() for name in mixture.sources}
    for number in draws:
        draw = mixture.draw(number)
        rows[draw.source].add(draw.index)
    return {name: sorted(indices) for name, indices in rows.items()}


def render_item(renderer: Renderer, source: DataSource, index: int, variant: int = 0) -> Rendered:
    """Render one of the phrasings of one item.

    Args:
        renderer: the model's; it knows the chat template and the placeholders.
        source: the dataset.
        index: the item.
        variant: seeds the draw among phrasings.

    Raises:
        MediaError: the row is wrong, or its media cannot be read.
    """
    rng = np.random.default_rng([index, variant])
    return render(renderer, source.conversation(index, rng))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generator (dropout) by the step, so that resuming needs no saved random state.

    Args:
        seed: that of the stage.
        step: the optimizer step.
        rank: the index of the process, below 4096.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + rank)
