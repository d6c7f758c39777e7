"""Training batches by step number: draw, read, render, look up, collate."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmllm import config as configs
from mmllm.config import StageConfig
from mmllm.data.batch import Batch, collate
from mmllm.data.checked_source import CheckedDataSource, render
from mmllm.data.mixture import Draw, LengthGroups, Mixture, balance_by_length
from mmllm.data.protocol import DataSource
from mmllm.data.rendering import Rendered
from mmllm.data.text_corpus import TextCorpus
from mmllm.errors import MediaError, TrainingError
from mmllm.features.cache import DeviceRequired, FeatureCache
from mmllm.model import AnyToAny

logger = logging.getLogger(__name__)

_TRIES = 100

_NEIGHBOURS = 16
"""So many ranks deal their packed conversations out among themselves. Each renders those of all of
them to know their lengths: on a large cluster those of a whole micro-batch would be too many."""


@dataclass
class StepData:
    """One process's part of one global batch: its micro-batches, and what was skipped."""

    microbatches: list[Batch]
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def pin_memory(self) -> StepData:
        """Called by torch's DataLoader, in a thread of its own where there are data workers."""
        return StepData([batch.pin_memory() for batch in self.microbatches], self.skipped)


class TrainingStepDataset(Dataset):
    """`dataset[step]` -> StepData of one process; all randomness is a function of (seed, step)."""

    def __init__(
        self,
        model: AnyToAny,
        mixture: Mixture,
        work: FeatureCache,
        stage: StageConfig,
        *,
        rank: int = 0,
        world: int = 1,
        plain: TextCorpus | None = None,
    ):
        for name, size in (("", stage.batch_size), ("kl.", plain.batch_size if plain else 0)):
            if size % (stage.gradient_accumulation_steps * world):
                raise configs.ConfigError(
                    f"stage.{name}batch_size {size} cannot be divided among {world} processes "
                    f"and {stage.gradient_accumulation_steps} accumulation steps"
                )
        self.model = model
        self.mixture = mixture
        self.order: Mixture | LengthGroups = mixture
        if stage.length_window:
            self.order = LengthGroups(
                mixture,
                self._length,
                window=stage.length_window,
                slices=stage.gradient_accumulation_steps,
            )
        self.work = work
        self.stage = stage
        self.rank, self.world = rank, world
        self.plain = plain

    def __getitem__(self, step: int) -> StepData:
        draws = self.order.batch(step, self.stage.batch_size)
        windows = self.plain.batch(step) if self.plain else None
        parts = self.stage.gradient_accumulation_steps * self.world
        size = len(draws) // self.stage.gradient_accumulation_steps
        result = StepData([])
        for micro in range(self.stage.gradient_accumulation_steps):
            ready: dict[Draw, Rendered] = {}
            own = self._own(draws[micro * size : (micro + 1) * size], ready)
            batch = self._collate(own, ready, result.skipped)
            part = micro * self.world + self.rank
            batch.text_windows = None if windows is None else windows.chunk(parts)[part]
            result.microbatches.append(batch)
        return result

    def steps(self, start: int, stop: int) -> Iterator[StepData]:
        """Steps start … stop - 1, prepared ahead by the stage's data workers, or here where a
        frozen part has to be run for it: a worker cannot use the device."""
        loader = DataLoader(
            _Ahead(self),
            batch_size=None,
            sampler=range(start, stop),
            num_workers=self.stage.num_workers,
            persistent_workers=False,
            pin_memory=self.model.device.type == "cuda",
        )
        for step, ready in zip(range(start, stop), loader, strict=True):
            yield self[step] if ready is None else ready

    def render(self, draw: Draw) -> Rendered:
        """One item; raises MediaError."""
        source = self.mixture.sources[draw.source]
        conversation = source.conversation(draw.index, self.mixture.rng(draw))
        return render(self.model.renderer, conversation, self.stage.max_length)

    def _own(self, draws: Sequence[Draw], ready: dict[Draw, Rendered]) -> Sequence[Draw]:
        """This process's draws of a micro-batch: its slice; where they are packed, as many, so
        chosen that no process has a much longer pack than its neighbours. What had to be rendered
        for it is put into `ready`."""
        size = len(draws) // self.world
        first = self.rank - self.rank % _NEIGHBOURS
        ranks = min(_NEIGHBOURS, self.world - first)
        if not self.stage.pack or 1 in (ranks, size):
            return draws[self.rank * size : (self.rank + 1) * size]
        near = draws[first * size : (first + ranks) * size]
        dealt = balance_by_length(near, ranks, functools.partial(self._length, ready=ready))
        return dealt[self.rank - first]

    def _length(self, draw: Draw, ready: dict[Draw, Rendered] | None = None) -> int:
        """Tokens of a draw, whose rendering is put into `ready`; one that will be skipped counts
        as the longest."""
        try:
            rendered = self.render(draw)
        except MediaError:
            return self.stage.max_length
        if ready is not None:
            ready[draw] = rendered
        return len(rendered)

    def _collate(
        self,
        draws: Sequence[Draw],
        ready: Mapping[Draw, Rendered],
        skipped: list[tuple[str, str]],
    ) -> Batch:
        items, seeds = [], []
        for draw in draws:
            items.append(self._readable(draw, ready, skipped))
            seeds.append(draw.seed)
        return collate(
            items,
            self.work,
            num_input_tokens=self.model.num_input_tokens,
            num_signal_tokens=self.model.num_signal_tokens,
            pad_id=self.model.llm.pad_id,
            pack=self.stage.pack,
            share=not self.stage.pack or self.model.llm.supports_prefix_packing,
            seeds=seeds,
        )

    def _readable(
        self, draw: Draw, ready: Mapping[Draw, Rendered], skipped: list[tuple[str, str]]
    ) -> Rendered:
        """The item, or the next one of its source that can be used; those between are skipped when
        they are drawn themselves."""
        size = len(self.mixture.sources[draw.source])
        tries = min(size, _TRIES)
        last = ""
        for attempt in range(tries):
            candidate = Draw(draw.source, (draw.index + attempt) % size, draw.seed)
            try:
                rendered = ready[candidate] if candidate in ready else self.render(candidate)
                self.work.check(rendered)
                return rendered
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
class _Ahead(Dataset):
    """The steps of a feed in a data worker; None for one that needs the device."""

    feed: TrainingStepDataset

    def __getitem__(self, step: int) -> StepData | None:
        try:
            return self.feed[step]
        except DeviceRequired:
            return None


def open_sources(data: Mapping[str, object], where: str) -> dict[str, DataSource]:
    """The datasets that a stage names; whatever is wrong with a row of theirs is a MediaError."""
    return {
        name: CheckedDataSource(configs.build(entry, where=f"{where}.{name}"))
        for name, entry in data.items()
    }


def render_all_items(
    model: AnyToAny,
    sources: Mapping[str, DataSource],
    variants: int = 1,
    skipped: list[tuple[str, str]] | None = None,
) -> Iterator[Rendered]:
    """Each item of each source, in so many of its phrasings: what the frozen parts will be asked
    about. Rows that cannot be used are left out and, where a list is given, (name, error) of each
    is put into it."""
    for name, source in sources.items():
        for index in range(len(source)):
            try:
                for variant in range(variants):
                    yield render_item(model, source, index, variant)
            except MediaError as error:
                if skipped is not None:
                    skipped.append((f"{name}/{source.name(index)}", str(error)))


def render_item(model: AnyToAny, source: DataSource, index: int, variant: int = 0) -> Rendered:
    """One of the phrasings of one item; raises MediaError."""
    rng = np.random.default_rng([index, variant])
    return render(model.renderer, source.conversation(index, rng))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout's randomness is a function of the step too, so resuming needs no saved state."""
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + rank)
