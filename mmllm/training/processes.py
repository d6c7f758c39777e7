"""The processes that train together: joining them, their device and precision, common decisions."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from mmllm.config import StageConfig
from mmllm.errors import ConfigError, MmllmError
from mmllm.kernels.devices import parse_device
from mmllm.kernels.precision import fast_dtype

REPLICAS = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
"""Options of DDP. Only frozen parts have buffers, and nothing changes them."""


def check_launch() -> None:
    """Raise ConfigError for settings of `accelerate launch` that mmllm cannot train with."""
    if name := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        parse_device(name)  # without a name accelerate takes the best device of the machine
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise ConfigError(
                f"accelerate: {kind} spreads weights over processes, and mmllm cannot write such "
                "a checkpoint; launch with configs/accelerate/multi-gpu.yaml, and a language model "
                "that is too large for one GPU with llm.quantization=4bit"
            )


def join_processes() -> PartialState:
    """Join the processes that were launched together, on the CPU where the launcher asks for it:
    Accelerator reads that variable, PartialState alone does not."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def decide_on_main(state: PartialState, decide: Callable[[], Any]) -> Any:
    """Call a function in the main process and broadcast its result.

    Args:
        state: the processes.
        decide: returns a value that can be pickled.

    Returns:
        The result, in every process.

    Raises:
        MmllmError: one that `decide` raised, in every process.
    """
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [decide()]
        except MmllmError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], MmllmError):
        raise outcome[0]
    return outcome[0]


def make_accelerator(stage: StageConfig, precision: str) -> Accelerator:
    """Build the accelerator of a stage.

    Args:
        stage: names the trackers and the output folder.
        precision: no, bf16 or fp16.

    Raises:
        ConfigError: the device cannot compute in `precision`, or a tracker is not installed.
    """
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=_trackers(stage),
            project_dir=stage.output,
            kwargs_handlers=[REPLICAS],
        )
    except ValueError as error:
        raise ConfigError(f"stage.precision: {precision} cannot be used here: {error}") from error
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError(
            "stage.precision: fp16 needs a GPU, and this is a CPU, where training would silently "
            "stay in float32; choose bf16, no or auto"
        )
    return accelerator


def choose_precision(wanted: str) -> str:
    """Resolve `auto`: bf16 where the device that trains has fast bf16 matrix products (measured on
    a CPU), else float32 (`no`)."""
    if wanted != "auto":
        return wanted
    device: Any = PartialState().device
    return "bf16" if fast_dtype(device.type) is torch.bfloat16 else "no"


def uses_liger(wanted: str, device: torch.device) -> bool:
    """Return whether Liger's kernel computes the loss of the LLM's head.

    Args:
        wanted: `stage.liger_loss`: on, off or auto, which uses it where it is installed and can
            run.
        device: the device of the training.

    Raises:
        ConfigError: `wanted` is `on` and the kernel cannot run.
    """
    missing = [] if importlib.util.find_spec("liger_kernel") else ["liger_kernel is not installed"]
    missing += [] if device.type == "cuda" else [f"this is {device.type}, and it needs cuda"]
    if wanted == "on" and missing:
        raise ConfigError(
            f"stage.liger_loss: on, but {' and '.join(missing)}; pip install 'mmllm[liger]' where "
            "there is a GPU, or let stage.liger_loss be auto"
        )
    return wanted != "off" and not missing


def _trackers(stage: StageConfig) -> Any:
    """Return accelerate's trackers; raises ConfigError for one that is not installed."""
    for name in stage.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"stage.trackers: {name!r} is not installed; pip install {name}, or leave it out"
            )
    return list(stage.trackers) or None
