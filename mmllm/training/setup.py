"""Building a training run: model, optimizer, data, features, losses and journal, ready to step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import yaml
from accelerate import Accelerator

from mmllm import checkpoints
from mmllm import config as configs
from mmllm import model as models
from mmllm.config import PrealignConfig, RunConfig, StageConfig, SystemConfig
from mmllm.data.mixture import Mixture
from mmllm.data.text_corpus import TextCorpus
from mmllm.errors import ConfigError
from mmllm.features.cache import FeatureCache
from mmllm.losses import Loss, build_losses
from mmllm.model import AnyToAny
from mmllm.projections.ctc import CTCConfig
from mmllm.training.connectors import prepare_connectors, report_gates
from mmllm.training.ema import MovingAverage, without_trained
from mmllm.training.feed import (
    StepData,
    TrainingStepDataset,
    drawn_rows,
    open_sources,
    render_all_items,
)
from mmllm.training.journal import Journal, write_errors
from mmllm.training.lock import RunLock
from mmllm.training.optimizer import load_state_tensors, make_optimizer
from mmllm.training.prealign import prealign
from mmllm.training.precompute import build_feature_cache, precompute_features
from mmllm.training.processes import choose_precision, make_accelerator, uses_liger
from mmllm.training.resume import CheckpointSaver, StartingPoint
from mmllm.training.trainable import ParameterGroup, choose_trainable, replaceable_decoders
from mmllm.training.unread_media import warn_of_unread_media
from mmllm.utils import files
from mmllm.utils.progress import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)


@dataclass
class TrainingRun:
    """Everything that the steps of one stage need.

    Attributes:
        stage: what is trained, and how.
        start: the first step, 0 unless the run is resumed.
        accelerator: the process group and device.
        model: the model itself.
        wrapped: the model as the accelerator prepared it, perhaps inside DDP.
        groups: what trains.
        optimizer: over `groups`, as the accelerator prepared it.
        losses: of the stage.
        liger_loss: whether the head's loss is computed by Liger's kernel.
        mixture: the training data.
        dataset: steps of the training data, of this process.
        validation: steps of the validation data, if there is any.
        cache: features of the frozen parts.
        journal: metrics, curves and skipped items.
        saver: writes checkpoints.
        average: the moving average of what trains, if the stage keeps one.
        progress: whether this process shows progress bars.
    """

    stage: StageConfig
    start: int
    accelerator: Accelerator
    model: AnyToAny
    wrapped: Any
    groups: list[ParameterGroup]
    optimizer: Any
    losses: list[Loss]
    liger_loss: bool
    mixture: Mixture
    dataset: TrainingStepDataset
    validation: TrainingStepDataset | None
    cache: FeatureCache
    journal: Journal
    saver: CheckpointSaver
    average: MovingAverage | None
    progress: bool

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the run's files."""
        return self.accelerator.is_main_process

    def steps(self) -> Iterator[tuple[int, StepData]]:
        """Yield (number, data) of every remaining step."""
        return enumerate(self.dataset.steps(self.start, self.stage.steps), self.start)

    def is_due(self, every: int, done: int) -> bool:
        """Return whether an action is due; every action is due after the last step.

        Args:
            every: its interval in steps.
            done: optimizer steps taken.
        """
        return done % every == 0 or done == self.stage.steps

    def progress_bar(self) -> AbstractContextManager[tqdm]:
        """A bar over the steps, while the returned context is open."""
        return progress_bar(
            self.stage.name,
            total=self.stage.steps,
            initial=self.start,
            unit="step",
            show=self.progress,
        )

    def align_projections(self, options: PrealignConfig, *, inputs: bool = True) -> None:
        """Train projections alone, on cached features of the stage's data.

        Args:
            options: steps, learning rate and the number of items.
            inputs: True for pre-alignment; False, for realignment, leaves input projections
                unchanged.
        """
        items = render_all_items(self.model.renderer, self.mixture.sources, options.variants)
        scores = prealign(
            self.model,
            items,
            self.cache,
            self.stage,
            options,
            inputs=inputs,
            autocast=self.accelerator.autocast,  # pyright: ignore[reportArgumentType] - its default
            progress=self.progress,
        )
        self.journal.prealigned(scores)

    def averaged(self) -> AbstractContextManager[None]:
        """Context in which the model has its averaged weights, if the stage keeps averages."""
        return self.average.applied() if self.average else nullcontext()

    def finish(self) -> None:
        """Write what is pending and leave the process group."""
        if self.cache.store:
            self.cache.store.flush()
        self.journal.finish()
        if self.is_main:
            report_gates(self.model)
        self.accelerator.wait_for_everyone()
        # DDP's wrapper must go before the process group: its destructor, as the group's last
        # holder, would wait with Python's lock for a thread that may wait for that lock.
        self.wrapped = None
        self.accelerator.free_memory()
        self.accelerator.end_training()


def build_training(
    run: RunConfig, begin: StartingPoint, lock: RunLock, *, progress: bool, precompute: bool
) -> TrainingRun:
    """Build a run up to its first step, frozen features and pre-alignment included.

    Args:
        run: the system and the stage.
        begin: what the weights come from.
        lock: holds the run's folder.
        progress: show progress bars.
        precompute: run the frozen parts now over all data that the steps draw, not when one asks.
    """
    stage, output = run.stage, lock.folder
    source = begin.checkpoint
    if source:
        run = replace(run, system=with_saved_names(run.system, source))
    settings = dict(source.manifest["chosen"]) if source and begin.resumes else {}
    precision = settings.setdefault("precision", choose_precision(stage.precision))
    accelerator = make_accelerator(stage, precision)
    liger_loss = uses_liger(stage.liger_loss, accelerator.device)

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = models.build(run.system, dtype=dtype, device=str(accelerator.device), seed=stage.seed)
    if source:
        replaced = () if begin.resumes else replaceable_decoders(model, stage.learning_rates)
        checkpoints.load_weights(model, source, replaced=replaced)
    groups = choose_trainable(model, stage.learning_rates)
    _check_decoder_lora(stage, groups, accelerator.num_processes)
    model.prepare_for_training(
        gradient_checkpointing=stage.gradient_checkpointing,
        compile_layers=stage.compile,
    )
    optimizer = make_optimizer(stage, groups)
    start = source.step if source and begin.resumes else 0
    average = MovingAverage(stage.ema, groups, step=start) if stage.ema else None
    if source and begin.resumes:
        _, tensors = checkpoints.training_state(source)
        load_state_tensors(optimizer, groups, stage, without_trained(tensors), source.folder)
        if average:
            average.load_trained(tensors, source.folder)
    if accelerator.is_main_process:  # weights, perhaps their averages, two moments in float32
        size = sum(group.size for group in groups)
        checkpoints.require_free_space(output, (4 if average else 3) * 4 * size)

    mixture = Mixture(open_sources(stage.data, "stage.data"), stage.seed)
    cache = build_feature_cache(model, stage)
    dataset = TrainingStepDataset(
        model.renderer,
        model.batch_layout,
        mixture,
        cache,
        stage,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        text_corpus=text_corpus(model, stage),
        pin_memory=model.device.type == "cuda",
    )
    validation = _validation_dataset(model, cache, stage)
    if stage.trackers:
        accelerator.init_trackers(stage.name)
    is_main = accelerator.is_main_process
    journal = Journal(output, start, stage, main=is_main, log=accelerator.log)
    if is_main:
        _announce(run, groups, start, lock, accelerator)
    training = TrainingRun(
        stage=stage,
        start=start,
        accelerator=accelerator,
        model=model,
        wrapped=model,
        groups=groups,
        optimizer=optimizer,
        losses=build_losses(
            model, stage.losses, align_loss=stage.align_loss, denoise=stage.denoise
        ),
        liger_loss=liger_loss,
        mixture=mixture,
        dataset=dataset,
        validation=validation,
        cache=cache,
        journal=journal,
        saver=CheckpointSaver(
            accelerator, model, optimizer, groups, stage, settings, lock, average
        ),
        average=average,
        progress=progress and is_main,
    )
    _prepare_features(training, precompute, progress)
    if start == 0:
        _prepare_connectors(training)
    if stage.prealign and start == 0:
        training.align_projections(stage.prealign)
    elif start == 0 and stage.init_from is None:
        _warn_about_words(model)
    if start == 0:
        warn_of_unread_media(model.renderer, training.mixture.sources)
    training.wrapped, training.optimizer = accelerator.prepare(model, optimizer)
    return training


def with_saved_names(system: SystemConfig, source: checkpoints.Checkpoint) -> SystemConfig:
    """Return a system whose input projections have capacity for the names that a checkpoint's know.

    Args:
        system: the system of a stage, whose config may have been written before teaching.
        source: the checkpoint that the stage starts from.
    """
    saved, projections = checkpoints.saved_names(source), dict(system.input_projections)
    for key, entry in projections.items():
        if isinstance(entry, CTCConfig) and saved.get(key, 0) > entry.names:
            projections[key] = replace(entry, names=saved[key])
    return replace(system, input_projections=projections)


def _check_decoder_lora(
    stage: StageConfig, groups: Sequence[ParameterGroup], num_processes: int
) -> None:
    """Raise ConfigError where a decoder's LoRA would get no gradient, or not in every process."""
    trained = [group.pattern for group in groups if group.pattern.startswith("decoders.")]
    if trained and not stage.losses.get("denoise"):
        raise ConfigError(
            f"stage.learning_rates: {trained[0]}: only the loss denoise trains a decoder's LoRA; "
            "give it a weight in stage.losses"
        )
    if trained and num_processes > 1:
        raise ConfigError(
            f"stage.learning_rates: {trained[0]}: a decoder's LoRA trains in one process, because "
            f"a step may have no media for it; this run has {num_processes}"
        )


def _prepare_connectors(training: TrainingRun) -> None:
    """Measure what new connectors read, on the first batches; each process on all of them, so that
    all get the same, whatever their number."""
    model, mixture, stage = training.model, training.mixture, training.stage
    whole = TrainingStepDataset(model.renderer, model.batch_layout, mixture, training.cache, stage)
    steps = whole.steps(0, stage.steps)
    prepare_connectors(
        model,
        (batch for data in steps for batch in data.microbatches),
        training.accelerator.autocast,  # pyright: ignore[reportArgumentType] - its default
    )


def _warn_about_words(model: AnyToAny) -> None:
    """Warn of projections with a vocabulary that train from a random one: they learn little."""
    for key, projection in model.input_projections.items():
        trains = any(parameter.requires_grad for parameter in projection.parameters())
        kind = getattr(projection, "vocabulary_type", None)
        if trains and kind:
            logger.warning(
                "input_projections.%s: a projection of type `%s` learns little without "
                "pre-alignment; add `prealign: {steps: 300}` to the stage (docs/training.md)",
                key,
                kind,
            )


def _prepare_features(training: TrainingRun, precompute: bool, progress: bool) -> None:
    """Fill the cache with what the steps draw, and pre-alignment reads, or release the encoders
    where it is complete. A complete cache is trusted: its millions of items are not looked up
    before the first step."""
    stage, mixture = training.stage, training.mixture
    complete = stage.cache_complete
    sources = {} if complete or not precompute else mixture.sources
    aligns = stage.prealign or stage.realign
    rows = None if aligns else drawn_rows(mixture, stage, training.start)
    items = render_all_items(training.model.renderer, sources, rows=rows)
    unreadable = precompute_features(training.cache, items, training.accelerator, progress)
    for name, error in unreadable:
        logger.warning("cannot be read, will be skipped: %s: %s", name, error)
    if complete:
        training.model.unload_encoders()


def text_corpus(model: AnyToAny, stage: StageConfig) -> TextCorpus | None:
    """Build the text corpus of the loss `kl`; None if the stage has no such loss.

    Args:
        model: its renderer encodes the text.
        stage: the stage.
    """
    if stage.kl is None:
        return None
    return TextCorpus(encode=model.renderer.encode_text, seed=stage.seed, **asdict(stage.kl))


def _validation_dataset(
    model: AnyToAny, cache: FeatureCache, stage: StageConfig
) -> TrainingStepDataset | None:
    if stage.validation is None:
        return None
    sources = open_sources(stage.validation.data, "stage.validation.data")
    # Every process sees all of it: these are a few batches, and the mean needs no slices.
    return TrainingStepDataset(
        model.renderer,
        model.batch_layout,
        Mixture(sources, stage.seed),
        cache,
        replace(stage, gradient_accumulation_steps=1, length_window=0),
        pin_memory=model.device.type == "cuda",
    )


def _announce(
    run: RunConfig,
    groups: list[ParameterGroup],
    start: int,
    lock: RunLock,
    accelerator: Accelerator,
) -> None:
    """Log what trains, on which devices, and where to; write the config next to the results."""
    file = lock.folder / "config.yaml"
    with write_errors(file):
        files.atomic_write(file, yaml.safe_dump(configs.dump(run), sort_keys=False))
    logger.info("stage %s -> %s, from step %d", run.stage.name, lock.folder, start)
    logger.info(
        "%d process(es) on %s, precision %s",
        accelerator.num_processes,
        accelerator.device.type,
        accelerator.mixed_precision,
    )
    for group in groups:
        logger.info(
            "  trains %-28s %3d tensors %12s parameters  learning rate %g",
            group.pattern,
            len(group.parameters),
            f"{group.size:,}",
            group.learning_rate,
        )
    logger.info("  in all %s parameters", f"{sum(group.size for group in groups):,}")
