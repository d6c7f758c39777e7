"""Initial state of a run, validation of a resumed run, and writing of its checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmllm import checkpoints
from mmllm import config as configs
from mmllm.config import StageConfig
from mmllm.errors import CheckpointError, ConfigError
from mmllm.model import AnyToAny
from mmllm.training.ema import MovingAverage
from mmllm.training.lock import RunLock
from mmllm.training.optimizer import state_tensors
from mmllm.training.trainable import ParameterGroup

logger = logging.getLogger(__name__)

_MAY_CHANGE = {
    *("steps", "output", "save_steps", "save_total_limit", "best", "validation", "samples"),
    *("num_workers", "trackers", "cache", "cache_complete", "realign", "gradient_checkpointing"),
    *("compile", "liger_loss"),
}
"""Keys of a stage that a resumed run may give another value than the checkpoint has."""


@dataclass(frozen=True)
class StartingPoint:
    """The initial state of a run.

    Attributes:
        checkpoint: where the weights come from (None: they are untrained).
        resumes: take the step and the optimizer's state from it too.
    """

    checkpoint: checkpoints.Checkpoint | None = None
    resumes: bool = False


def find_start(stage: StageConfig, output: Path, resume: bool) -> StartingPoint:
    """Return where a stage starts: its own newest checkpoint, another one, or nowhere.

    Args:
        stage: names another stage's checkpoint as `init_from`, unless it starts from the config.
        output: the run's folder.
        resume: whether to go on from the newest checkpoint in `output`, if there is one.

    Raises:
        ConfigError: the folder holds a run and `resume` is not given, or it holds another run.
        CheckpointError: `stage.init_from` is absent or damaged.
    """
    existing = checkpoints.latest(output)
    if resume:
        if existing:
            _check_same_run(existing, stage)
            return StartingPoint(existing, resumes=True)
        logger.warning("%s: nothing to resume; starting from the beginning", output)
    elif existing:
        raise ConfigError(
            f"{output} already holds a run (step {existing.step}): go on with --resume, or give "
            "another folder with stage.output=…, or delete it"
        )
    if stage.init_from is None:
        return StartingPoint()
    try:
        return StartingPoint(checkpoints.open_checkpoint(stage.init_from))
    except CheckpointError as error:
        raise CheckpointError(
            f"stage {stage.name!r} starts from {stage.init_from!r}, which is absent or damaged: "
            "train the stage before it first, or name another checkpoint with stage.init_from=… "
            f"({error})"
        ) from error


def _check_same_run(existing: checkpoints.Checkpoint, stage: StageConfig) -> None:
    """Raise ConfigError unless the config is that of the run that was stopped."""
    before, now = configs.dump(existing.run().stage), configs.dump(stage)
    odd = [key for key in now if key not in _MAY_CHANGE and before.get(key) != now[key]]
    if odd:
        raise ConfigError(
            f"{existing.folder}: cannot resume with another stage.{odd[0]}: the checkpoint has "
            f"{before.get(odd[0])!r}, the config {now[odd[0]]!r}"
        )


@dataclass
class CheckpointSaver:
    """Writes the checkpoints of a run from the main process; called by every process."""

    accelerator: Accelerator
    model: AnyToAny
    optimizer: Any
    groups: Sequence[ParameterGroup]
    stage: StageConfig
    resolved_settings: dict[str, Any]
    lock: RunLock
    average: MovingAverage | None = None

    def save(self, step: int) -> None:
        """Write the checkpoint of a step, with the optimizer's state, and delete the oldest. With a
        moving average, the model is the averaged one."""
        output = self.lock.folder
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.lock.check()
            tensors = state_tensors(self.optimizer, self.groups)
            if self.average:
                tensors |= self.average.trained_tensors()
            with self.average.applied() if self.average else nullcontext():
                checkpoints.save(
                    checkpoints.step_folder(output, step),
                    self.model,
                    step=step,
                    stage=self.stage,
                    training={"step": step},
                    tensors=tensors,
                    resolved_settings=self.resolved_settings,
                )
            checkpoints.prune(output, self.stage.save_total_limit, step)
        self.accelerator.wait_for_everyone()

    def save_best(self, step: int) -> None:
        """Write the model alone to `output`/best; the caller has put averages into it."""
        self.lock.check()
        checkpoints.save(
            self.lock.folder / "best",
            self.model,
            step=step,
            stage=self.stage,
            resolved_settings=self.resolved_settings,
        )
