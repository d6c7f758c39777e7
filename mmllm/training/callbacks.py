"""Callbacks between steps: realignment, validation, samples. Each checks whether it is due."""

from __future__ import annotations

from collections.abc import Callable

from mmllm.training.samples import write_samples
from mmllm.training.setup import TrainingRun
from mmllm.training.step import validate


def realign(training: TrainingRun, done: int) -> None:
    """Train the output projections alone after the last step, since training has changed the LLM.

    Args:
        training: the run; nothing happens without `stage.realign`.
        done: optimizer steps taken.
    """
    if training.stage.realign and done == training.stage.steps:
        training.align_projections(training.stage.realign, inputs=False)


def measure_validation(training: TrainingRun, done: int) -> None:
    """Measure the held-out losses if they are due, and keep the model if it is the best so far.

    Args:
        training: the run; nothing happens without `stage.validation`.
        done: optimizer steps taken.
    """
    options, stage = training.stage.validation, training.stage
    if options is None or training.validation is None or not training.is_due(options.every, done):
        return
    with training.averaged():
        losses = validate(
            training.accelerator,
            training.wrapped,
            training.validation,
            training.losses,
            options.batches,
            liger_loss=training.liger_loss,
        )
        training.journal.validation(done, losses)
        if stage.best and training.is_main and training.journal.is_best(stage.best, done):
            training.saver.save_best(done)


def sample(training: TrainingRun, done: int) -> None:
    """Answer the fixed prompts, if they are due, and write them as a gallery.

    Args:
        training: the run; nothing happens without `stage.samples`.
        done: optimizer steps taken.
    """
    options = training.stage.samples
    if options and training.is_main and training.is_due(options.every, done):
        with training.averaged():
            write_samples(training.model, options, training.saver.lock.folder, done)


CALLBACKS: tuple[Callable[[TrainingRun, int], None], ...] = (realign, measure_validation, sample)
"""Called in this order after every step, with the number of completed steps."""
