"""The one training loop. All stages run through `train`."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from mmllm import licences
from mmllm.config import RunConfig
from mmllm.kernels import allocator
from mmllm.kernels.backend import resolve_backend
from mmllm.training.callbacks import CALLBACKS
from mmllm.training.feed import seed_step
from mmllm.training.interrupt import Interrupt
from mmllm.training.lock import RunLock
from mmllm.training.optimizer import set_learning_rates
from mmllm.training.processes import check_launch, decide_on_main, join_processes
from mmllm.training.resume import StartingPoint, find_start
from mmllm.training.setup import TrainingRun, build_training
from mmllm.training.step import training_step

logger = logging.getLogger(__name__)


def train(
    run: RunConfig, *, resume: bool = False, progress: bool = True, precompute: bool = True
) -> Path:
    """Train one stage. `accelerate launch` decides on which machines.

    Interrupting (Ctrl-C, SIGTERM) saves a checkpoint after the current step. The output folder is
    locked meanwhile.

    Args:
        run: the system and the stage.
        resume: go on from the newest checkpoint exactly as if nothing had happened.
        progress: show progress bars.
        precompute: run the frozen parts before the first step over what the steps draw, not when a
            step asks.

    Returns:
        The output folder.

    Raises:
        ConfigError: the stage cannot run here, or its folder is taken.
        CheckpointError: a checkpoint is damaged, or the disk is full.
        TrainingError: too many items are unusable, or too many losses are not finite.
    """
    if resolve_backend(run.system.kernels) == "auto":
        allocator.keep_freed_memory()
    check_launch()
    processes = join_processes()
    licences.check(run.system)  # before a folder is made for it
    lock = RunLock(Path(run.stage.output))
    with contextlib.ExitStack() as held:

        def begin() -> StartingPoint:
            held.enter_context(lock)
            return find_start(run.stage, lock.folder, resume)

        start = decide_on_main(processes, begin)
        training = build_training(run, start, lock, progress=progress, precompute=precompute)
        run_steps(training)
        training.finish()
        return lock.folder


def run_steps(training: TrainingRun) -> None:
    """Run the remaining steps, or those until an interrupt; the last one saves a checkpoint."""
    stage, journal, accelerator = training.stage, training.journal, training.accelerator
    with training.progress_bar() as bar, Interrupt() as interrupt:
        for step, data in training.steps():
            began = time.perf_counter()
            training.model.train()
            seed_step(stage.seed, step, accelerator.process_index)
            set_learning_rates(training.optimizer, training.groups, stage, step)
            losses = training_step(
                accelerator,
                training.wrapped,
                training.optimizer,
                data,
                training.losses,
                stage.max_grad_norm,
                liger_loss=training.liger_loss,
            )
            if training.average:
                training.average.update()
            journal.flush()  # writes the previous step's losses while this step runs
            journal.step(step, losses, data.skipped, seconds=time.perf_counter() - began)
            bar.set_postfix(journal.latest(), refresh=False)
            bar.update()
            if bar.disable:
                journal.log_progress(step + 1)
            done = step + 1
            for callback in CALLBACKS:
                callback(training, done)
            stopped = interrupt.agreed(accelerator)
            if stopped or training.is_due(stage.save_steps, done):
                journal.flush()
                training.saver.save(done)
                journal.curves()
            if stopped:
                logger.warning("stopped at step %d; go on with --resume", done)
                break


def dry_run(run: RunConfig, *, progress: bool = True) -> None:
    """Take one step of everything that a stage does, checkpoint, validation and samples included.

    It runs in a temporary folder: errors show in a minute instead of at the end.

    Args:
        run: the stage and its system.
        progress: whether to show a progress bar.
    """
    stage = run.stage
    with tempfile.TemporaryDirectory() as folder:
        once = replace(
            stage,
            output=folder,
            steps=1,
            cache="none" if stage.cache == "none" else "memory",
            cache_complete=False,
            prealign=None,
            realign=None,
            trackers=(),
            validation=stage.validation and replace(stage.validation, every=1, batches=1),
        )
        train(replace(run, stage=once), progress=progress, precompute=False)
    logger.info("dry run: one step of everything went well; nothing was kept")
