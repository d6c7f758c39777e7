"""Finding checkpoints: a model by name, a checkpoint's folder, or the newest one of a run."""

from __future__ import annotations

import logging
from pathlib import Path

from mmllm.checkpoints.manifest import Checkpoint, is_checkpoint, read_checkpoint, verify
from mmllm.errors import CheckpointError, MmllmError, quoted, wrap_errors
from mmllm.utils import files
from mmllm.utils.hints import did_you_mean

logger = logging.getLogger(__name__)

MODELS = ("mini",)
"""Models that are known by name."""


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a model by name ("mini"), a checkpoint folder, or a run folder (then its newest
    undamaged checkpoint). Raises CheckpointError."""
    if str(folder) == "mini" and not Path(folder).exists():
        from mmllm.mini import locate

        return open_checkpoint(locate("checkpoint"))
    with wrap_errors(CheckpointError, quoted(str(folder))):
        folder = files.current_folder(Path(folder).expanduser())
        is_alone = is_checkpoint(folder)
    if is_alone:
        return read_checkpoint(folder)
    newest = latest(folder)
    if newest is None:
        hint = "" if folder.exists() else did_you_mean(folder, MODELS)
        raise CheckpointError(
            f"{folder}: no checkpoint there{hint}; expected a folder with manifest.json, a run "
            f"folder with checkpoints/, or the name of a model ({', '.join(MODELS)})"
        )
    return newest


def latest(run_folder: str | Path) -> Checkpoint | None:
    """The newest checkpoint of a run whose files have their hashes; damaged ones are skipped with a
    warning. None for a run without checkpoints. Raises CheckpointError if all are damaged."""
    candidates = _step_folders(Path(run_folder))
    for candidate in reversed(candidates):
        try:
            checkpoint = read_checkpoint(candidate)
            verify(checkpoint)
            return checkpoint
        except MmllmError as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
    if candidates:
        raise CheckpointError(
            f"{run_folder}: {len(candidates)} checkpoint(s), none of them whole (see the log); "
            "put a whole one back, or delete the folder to begin again"
        )
    return None


def prune(run_folder: Path, keep: int, step: int) -> None:
    """Delete all checkpoints of a run up to a step but the newest.

    Those of later steps were damaged when the run was resumed (it would have gone on from them), so
    they do not count among the kept ones.

    Args:
        run_folder: the run's folder.
        keep: how many checkpoints remain, 1 at least.
        step: the step of the newest checkpoint.
    """
    folders = sorted((run_folder / "checkpoints").glob("step-*"))
    for old in [path for path in folders if path.name <= _step_name(step)][:-keep]:
        doomed = files.draft_path(old)  # under its own name it is complete or absent
        old.rename(doomed)
        files.remove(doomed)


def step_folder(run_folder: Path, step: int) -> Path:
    """Return the folder in which a run keeps its checkpoint of a step.

    Args:
        run_folder: the run's folder.
        step: the number of optimizer steps taken.
    """
    return run_folder / "checkpoints" / _step_name(step)


def _step_folders(run_folder: Path) -> list[Path]:
    """The folders of a run's checkpoints by step, complete or not."""
    names = {
        path.name.removeprefix(".").removesuffix(".replaced")
        for pattern in ("step-*", ".step-*.replaced")
        for path in (run_folder / "checkpoints").glob(pattern)
    }
    return [files.current_folder(run_folder / "checkpoints" / name) for name in sorted(names)]


def _step_name(step: int) -> str:
    return f"step-{step:08d}"
