"""The one training loop: load, choose what trains, step, save. All stages run through `train`."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch import Tensor
from tqdm import tqdm

from mmllm import checkpoints, licences
from mmllm import config as configs
from mmllm import model as models
from mmllm.config import PrealignConfig, RunConfig, StageConfig
from mmllm.data.batch import Batch
from mmllm.data.mixture import Mixture
from mmllm.data.rendering import Rendered
from mmllm.data.text_corpus import TextCorpus
from mmllm.encoders.base import UnloadedEncoder
from mmllm.errors import CheckpointError, ConfigError, MmllmError
from mmllm.features.cache import FeatureCache
from mmllm.features.store import FeatureStore
from mmllm.kernels import allocator
from mmllm.kernels.backend import resolve_backend
from mmllm.kernels.devices import parse_device, to_device
from mmllm.kernels.precision import fast_dtype
from mmllm.losses import Loss, LossTerm, build_losses, num_targets, total_loss
from mmllm.losses import compute as compute_losses
from mmllm.model import AnyToAny
from mmllm.training import report
from mmllm.training.feed import (
    StepData,
    TrainingStepDataset,
    open_sources,
    render_all_items,
    seed_step,
)
from mmllm.training.lock import RunLock
from mmllm.training.prealign import prealign
from mmllm.training.stage import ParameterGroup, choose_trainable, replaceable_decoders
from mmllm.utils import files

logger = logging.getLogger(__name__)

_MAY_CHANGE = {
    *("steps", "output", "save_steps", "save_total_limit", "best", "validation", "samples"),
    *("num_workers", "trackers", "cache", "cache_complete", "realign", "gradient_checkpointing"),
    *("compile", "liger_loss"),
}
"""Keys of a stage that a resumed run may give another value than the checkpoint has."""


REPLICAS = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
"""How DDP keeps the replicas alike: frozen parts have the only buffers, which nobody changes."""


def dry_run(run: RunConfig, *, progress: bool = True) -> None:
    """One step of everything that a stage does, checkpoint, validation and samples included, in a
    folder that is deleted: what is wrong is found in a minute instead of at the end."""
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


def train(
    run: RunConfig, *, resume: bool = False, progress: bool = True, precompute: bool = True
) -> Path:
    """Train one stage; returns its output folder. `accelerate launch` decides on what machines.

    Interrupting (Ctrl-C, SIGTERM) saves a checkpoint after the step in hand; `resume` goes on
    from the newest one exactly as if nothing had happened. `precompute`: run the frozen parts over
    all data before the first step, and not when a step asks. The folder is locked meanwhile.
    """
    if resolve_backend(run.system.kernels) == "auto":
        allocator.keep_freed_memory()
    _check_launch()
    state = join_processes()
    licences.check(run.system)  # before a folder is made for it
    lock = RunLock(Path(run.stage.output))
    with contextlib.ExitStack() as held:

        def begin() -> tuple[checkpoints.Checkpoint | None, bool]:
            held.enter_context(lock)
            return _starting_point(run.stage, lock.folder, resume)

        source, resumed = _decided(state, begin)
        return _train(run, source, resumed, lock, progress=progress, precompute=precompute)


def _check_launch() -> None:
    """Raises ConfigError for what accelerate was told and cannot be, before it begins."""
    if name := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        parse_device(name)  # without a name accelerate takes the best one that is here
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise ConfigError(
                f"accelerate: {kind} spreads weights over processes, and mmllm cannot write such "
                "a checkpoint; launch with configs/accelerate/multi-gpu.yaml, and a language model "
                "that is too large for one GPU with llm.quantization=4bit"
            )


def join_processes() -> PartialState:
    """This process among those that were launched together, on the CPU where that is said:
    Accelerator reads this variable, PartialState alone does not."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def _decided(state: PartialState, decide: Callable[[], Any]) -> Any:
    """What the main process decides, told to all; an MmllmError there is raised everywhere."""
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


def _train(
    run: RunConfig,
    source: checkpoints.Checkpoint | None,
    resume: bool,
    lock: RunLock,
    *,
    progress: bool,
    precompute: bool,
) -> Path:
    """`source`: what the weights come from, and with `resume` the step and the optimiser too."""
    stage, output = run.stage, lock.folder
    chosen = dict(source.manifest["chosen"]) if resume and source else {}
    precision = chosen.setdefault("precision", choose_precision(stage.precision))
    accelerator = _accelerator(stage, precision)
    main = accelerator.is_main_process

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = models.build(run.system, dtype=dtype, device=str(accelerator.device), seed=stage.seed)
    if source:
        replaced = () if resume else replaceable_decoders(model, stage.learning_rates)
        checkpoints.load_weights(model, source, replaced=replaced)
    groups = choose_trainable(model, stage.learning_rates)
    model.llm.liger_loss = uses_liger(stage.liger_loss, accelerator.device)
    if stage.gradient_checkpointing:
        model.llm.gradient_checkpointing_enable()
    if stage.compile:
        model.llm.compile_layers()
    optimizer = make_optimizer(stage, groups)
    start = _restore(source, optimizer, groups, stage) if resume and source else 0
    if main:  # weights and two moments in float32
        checkpoints.require_free_space(output, 3 * 4 * sum(group.size for group in groups))

    mixture = Mixture(open_sources(stage.data, "stage.data"), stage.seed)
    work = build_feature_cache(model, stage)
    feed = TrainingStepDataset(
        model,
        mixture,
        work,
        stage,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        plain=_plain_text(model, stage),
    )
    validation = _validation_feed(model, work, stage)
    if stage.trackers:
        accelerator.init_trackers(stage.name)
    journal = report.Journal(output, start, stage, main=main, log=accelerator.log)
    if main:
        _announce(run, groups, start, output, accelerator)
    # A complete cache is trusted: its millions of items are not looked up before the first step.
    items = (
        render_all_items(model, mixture.sources) if precompute and not stage.cache_complete else ()
    )
    for name, error in warm(work, items, accelerator, progress):
        logger.warning("cannot be read, will be skipped: %s: %s", name, error)
    if stage.cache_complete:
        for key, encoder in model.encoders.items():
            model.encoders[key] = UnloadedEncoder(encoder)  # pyright: ignore[reportArgumentType]
    align = functools.partial(
        _align, model, mixture, work, stage, accelerator, journal, progress and main
    )
    if stage.prealign and start == 0:
        align(stage.prealign)

    losses = build_losses(model, stage.losses, align_loss=stage.align_loss)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    save = _Saver(accelerator, model, optimizer, groups, run, chosen, lock)
    bar = tqdm(
        total=stage.steps,
        initial=start,
        desc=stage.name,
        unit="step",
        disable=not (main and progress),
    )
    with bar, _Interrupt() as interrupt:
        for step, data in enumerate(feed.steps(start, stage.steps), start):
            began = time.perf_counter()
            model.train()
            seed_step(stage.seed, step, accelerator.process_index)
            rate = learning_rate_factor(stage, step)
            for entry, group in zip(optimizer.param_groups, groups, strict=True):
                entry["lr"] = group.learning_rate * rate
            found = training_step(
                accelerator, wrapped, optimizer, data, losses, stage.max_grad_norm
            )
            journal.flush()  # the step before, while this one is under way
            journal.step(step, found, data.skipped, seconds=time.perf_counter() - began)
            bar.set_postfix(journal.latest(), refresh=False)
            bar.update()
            done = step + 1
            if stage.realign and done == stage.steps:
                align(stage.realign, inputs=False)
            if (
                validation
                and stage.validation
                and (done % stage.validation.every == 0 or done == stage.steps)
            ):
                journal.validation(
                    done,
                    validate(accelerator, wrapped, validation, losses, stage.validation.batches),
                )
                if stage.best and main and journal.is_best(stage.best, done):
                    lock.check()
                    checkpoints.save(
                        output / "best", model, step=done, stage=stage, resolved_settings=chosen
                    )
            if stage.samples and main and (done % stage.samples.every == 0 or done == stage.steps):
                report.write_samples(model, stage.samples, output, done)
            stopped = interrupt.agreed(accelerator)
            if done % stage.save_steps == 0 or done == stage.steps or stopped:
                journal.flush()
                save(output, done)
                journal.curves()
            if stopped:
                logger.warning("stopped at step %d; go on with --resume", done)
                break
    if work.store:
        work.store.flush()
    journal.finish()
    accelerator.wait_for_everyone()
    # DDP's wrapper goes before the processes' group: as the last to hold the group it would wait
    # there, with Python's lock, for a thread that may wait for the lock.
    del wrapped
    accelerator.free_memory()
    accelerator.end_training()
    return output


def _accelerator(stage: StageConfig, precision: str) -> Accelerator:
    """Raises ConfigError for a precision that its device cannot compute in."""
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


def _align(
    model: AnyToAny,
    mixture: Mixture,
    work: FeatureCache,
    stage: StageConfig,
    accelerator: Accelerator,
    journal: report.Journal,
    progress: bool,
    options: PrealignConfig,
    *,
    inputs: bool = True,
) -> None:
    """Pre-alignment or, without inputs, realignment over the stage's own data."""
    items = render_all_items(model, mixture.sources, options.variants)
    journal.prealigned(
        prealign(
            model,
            items,
            work,
            stage,
            options,
            inputs=inputs,
            autocast=accelerator.autocast,  # pyright: ignore[reportArgumentType] - its own default
            progress=progress,
        )
    )


def _plain_text(model: AnyToAny, stage: StageConfig) -> TextCorpus | None:
    """What the loss `kl` reads."""
    if stage.kl is None:
        return None
    options = asdict(stage.kl)
    return TextCorpus(encode=model.renderer.encode_text, seed=stage.seed, **options)


def build_feature_cache(model: AnyToAny, stage: StageConfig) -> FeatureCache:
    """Where a stage keeps what its frozen parts say."""
    on_disk = stage.cache not in ("memory", "none")
    return FeatureCache(
        model,
        enabled=stage.cache != "none",
        denoise=bool(stage.losses.get("denoise")),
        store=FeatureStore(stage.cache, complete=stage.cache_complete) if on_disk else None,
    )


def warm(
    work: FeatureCache,
    items: Iterable[Rendered],
    state: Accelerator | PartialState,
    progress: bool = True,
) -> list[tuple[str, str]]:
    """Run the frozen parts over all items: each process its part where a folder is shared, each
    everything where it is kept in memory. Returns the media that cannot be read."""
    part = (state.process_index, state.num_processes) if work.store else (0, 1)
    bad = work.precompute(items, progress=progress and state.is_main_process, part=part)
    state.wait_for_everyone()
    if work.store:
        work.store.refresh()
    return bad


def training_step(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    data: StepData,
    losses: Sequence[Loss],
    max_grad_norm: float,
) -> _Losses:
    """One optimizer step over the micro-batches of this process. No host-device synchronisation
    happens here: scalars are copied asynchronously and waited for when the losses are read.

    Args:
        accelerator: the process group and device.
        model: the model as `accelerator.prepare` returned it.
        optimizer: likewise.
        data: this process's part of the step.
        losses: the stage's losses.
        max_grad_norm: gradients are clipped to this norm.
    """
    device = accelerator.device
    local = num_targets(losses, data.microbatches)
    names = sorted(local)
    counts = to_device(torch.tensor([float(local[name]) for name in names]), device)
    totals = _summed(accelerator, counts)
    sums = {name: torch.zeros((), device=device) for name in names}
    for number, batch in enumerate(data.microbatches):
        last = number == len(data.microbatches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            terms = forward_losses(model, batch.to(device), losses)
            by_name = dict(zip(names, totals().unbind(), strict=True))
            # Gradients are averaged over processes, but each term is divided by its global count.
            loss = total_loss(losses, terms, by_name) * accelerator.num_processes
            accelerator.backward(loss)
        for name, term in terms.items():
            sums[name] += to_device(term.total.detach(), device)
    norm = accelerator.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], max_grad_norm
    )
    finite = _is_finite(norm, device)
    _update(optimizer, finite)
    optimizer.zero_grad()
    reduced = _summed(accelerator, torch.stack([sums[name] for name in names]))
    numbers = _Late(
        lambda: torch.cat([reduced(), totals(), finite[None].float()]), device.type == "cuda"
    )
    return _Losses(names, {loss.name: loss.weight for loss in losses}, numbers)


def forward_losses(model: Any, batch: Batch, losses: Sequence[Loss]) -> dict[str, LossTerm]:
    """One forward pass and its losses by name, in training and in validation."""
    return compute_losses(losses, model(batch), batch)


def _summed(accelerator: Accelerator, values: Tensor) -> Callable[[], Tensor]:
    """Sums over all processes, under way until they are asked for: whoever is first goes on."""
    if not accelerator.use_distributed:
        return lambda: values
    work: Any = torch.distributed.all_reduce(values, async_op=True)

    def found() -> Tensor:
        work.wait()
        return values

    return found


class _Losses:
    """The mean losses of a step by name, on their way from the device."""

    def __init__(self, names: Sequence[str], weights: Mapping[str, float], numbers: _Late):
        """`numbers`: the sums, the counts, and 1 if the gradient was finite."""
        self._names, self._weights, self._numbers = names, weights, numbers

    def __call__(self) -> dict[str, float]:
        """Waits for the step to end. The weighted sum of all is `loss`, not a number for a step
        that was left out."""
        numbers = self._numbers.read()
        parts = zip(self._names, numbers, numbers[len(self._names) :], strict=False)
        values = {name: total / count for name, total, count in parts if count}
        loss = sum(self._weights[name] * values[name] for name in values)
        return {**values, "loss": loss if numbers[-1] else math.nan}


class _Late:
    """Numbers that are not waited for until they are read. Those of a GPU: the copy is queued now,
    behind what makes them, so that it meanwhile has the next step to do."""

    def __init__(self, make: Callable[[], Tensor], queue: bool):
        self._make, self._copied = make, None
        if queue:
            values = make()
            host = torch.empty_like(values, device="cpu", pin_memory=True)
            host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream(values.device).record_event()
            self._make = lambda: host

    def read(self) -> list[float]:
        if self._copied:
            self._copied.synchronize()
        return self._make().tolist()


def _is_finite(norm: Any, device: torch.device) -> Tensor:
    """bool[]; a launcher that tells no norm looks itself."""
    if norm is None:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _update(optimizer: Any, finite: Tensor) -> None:
    """The optimiser's step, left out where the gradient is not finite. The fused AdamW is told on
    the device, as a gradient scaler does it; others must wait for the answer."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if isinstance(inner, torch.optim.AdamW):
        inner.grad_scale, inner.found_inf = None, (~finite).float()  # pyright: ignore
        optimizer.step()
    elif finite:
        optimizer.step()


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: Any,
    dataset: TrainingStepDataset,
    losses: Sequence[Loss],
    batches: int,
) -> dict[str, float]:
    """Mean losses over the first batches of the validation data, the same ones every time.

    Args:
        accelerator: the process group and device.
        model: the model as `accelerator.prepare` returned it; it is left in evaluation mode.
        dataset: the validation data.
        losses: the stage's losses.
        batches: how many batches.
    """
    model.eval()
    totals: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}
    for data in dataset.steps(0, batches):
        for batch in data.microbatches:
            terms = forward_losses(model, batch.to(accelerator.device), losses)
            for name, term in terms.items():
                totals.setdefault(name, []).append(to_device(term.total, accelerator.device))
                counts[name] = counts.get(name, 0) + term.count
    names = sorted(totals)
    rows = [[sum(torch.stack(totals[name]).tolist()), counts[name]] for name in names]
    reduced = accelerator.reduce(torch.tensor(rows, device=accelerator.device)).tolist()  # pyright: ignore
    return {
        name: total / count for name, (total, count) in zip(names, reduced, strict=True) if count
    }


def learning_rate_factor(stage: StageConfig, step: int) -> float:
    """Warm-up, then the stage's schedule down to a tenth (cosine) or to zero (linear)."""
    warm = max(round(stage.warmup_ratio * stage.steps), 1)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(stage.steps - warm, 1)
    if stage.schedule == "cosine":
        return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
    return 1 - done if stage.schedule == "linear" else 1.0


def _starting_point(
    stage: StageConfig, output: Path, resume: bool
) -> tuple[checkpoints.Checkpoint | None, bool]:
    """What the weights come from, if anything: the checkpoint to resume (then True), or the one
    that the stage starts from."""
    existing = checkpoints.latest(output)
    if resume:
        if existing:
            _compare_stage(existing, stage)
            return existing, True
        logger.warning("%s: nothing to resume; starting from the beginning", output)
    elif existing:
        raise ConfigError(
            f"{output} already holds a run (step {existing.step}): go on with --resume, or give "
            "another folder with stage.output=…, or delete it"
        )
    if stage.init_from is None:
        return None, False
    try:
        return checkpoints.open_checkpoint(stage.init_from), False
    except CheckpointError as error:
        raise CheckpointError(
            f"stage {stage.name!r} starts from {stage.init_from!r}, which is absent or damaged: "
            "train the stage before it first, or name another checkpoint with stage.init_from=… "
            f"({error})"
        ) from error


def _compare_stage(existing: checkpoints.Checkpoint, stage: StageConfig) -> None:
    """A resumed run must be the run that was stopped."""
    before, now = configs.dump(existing.run().stage), configs.dump(stage)
    odd = [key for key in now if key not in _MAY_CHANGE and before.get(key) != now[key]]
    if odd:
        raise ConfigError(
            f"{existing.folder}: cannot resume with another stage.{odd[0]}: the checkpoint has "
            f"{before.get(odd[0])!r}, the config {now[odd[0]]!r}"
        )


def make_optimizer(stage: StageConfig, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    """AdamW, torch's own or one of bitsandbytes; raises ConfigError where that is missing."""
    table = [
        {"params": list(group.parameters.values()), "lr": group.learning_rate} for group in groups
    ]
    options: dict[str, Any] = {"betas": stage.betas, "weight_decay": stage.weight_decay}
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(table, fused=True, **options)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"stage.optimizer: {stage.optimizer} needs bitsandbytes, which is not installed; "
            "pip install 'mmllm[quantization]', or leave it out"
        )
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kind = AdamW8bit if stage.optimizer == "adamw_8bit" else PagedAdamW8bit
    return kind(table, **options)


def _optimizer_tensors(optimizer: Any, groups: list[ParameterGroup]) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, for safetensors."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return {
        f"{kind}/{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for group in groups
        for name, parameter in group.parameters.items()
        for kind, value in optimizer.state[parameter].items()
    }


def _restore(
    source: checkpoints.Checkpoint,
    optimizer: torch.optim.Optimizer,
    groups: list[ParameterGroup],
    stage: StageConfig,
) -> int:
    """Load the optimiser's state; returns the step to go on with."""
    _, tensors = checkpoints.training_state(source)
    parameters = {n: p for group in groups for n, p in group.parameters.items()}
    for entry, value in tensors.items():
        kind, _, name = entry.partition("/")
        name = configs.RENAMED_PARAMETERS.get(name, name)
        if name not in parameters:
            raise CheckpointError(
                f"{source.folder}: optimiser state for {name!r}, not in the table"
            )
        counted = kind == "step" and stage.optimizer != "adamw"  # bitsandbytes counts on the host
        place = int(value) if counted else value.to(parameters[name].device)
        optimizer.state[parameters[name]][kind] = place
    return source.step


def _validation_feed(
    model: AnyToAny, work: FeatureCache, stage: StageConfig
) -> TrainingStepDataset | None:
    if stage.validation is None:
        return None
    sources = open_sources(stage.validation.data, "stage.validation.data")
    # One process sees all of it: a few batches, and sums that need no care about slices.
    return TrainingStepDataset(
        model,
        Mixture(sources, stage.seed),
        work,
        replace(stage, gradient_accumulation_steps=1, length_window=0),
    )


def _trackers(stage: StageConfig) -> Any:
    """What accelerate is asked to log with; raises ConfigError for one that is not installed."""
    for name in stage.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"stage.trackers: {name!r} is not installed; pip install {name}, or leave it out"
            )
    return list(stage.trackers) or None


def uses_liger(wanted: str, device: torch.device) -> bool:
    """auto: Liger's kernel where it is installed and can run; raises ConfigError for `on` where it
    cannot."""
    missing = [] if importlib.util.find_spec("liger_kernel") else ["liger_kernel is not installed"]
    missing += [] if device.type == "cuda" else [f"this is {device.type}, and it needs cuda"]
    if wanted == "on" and missing:
        raise ConfigError(
            f"stage.liger_loss: on, but {' and '.join(missing)}; pip install 'mmllm[liger]' where "
            "there is a GPU, or let stage.liger_loss be auto"
        )
    return wanted != "off" and not missing


def choose_precision(wanted: str) -> str:
    """auto: bf16 where the device that trains has fast bf16 products (measured on a CPU), else
    float32."""
    if wanted != "auto":
        return wanted
    device: Any = PartialState().device
    return "bf16" if fast_dtype(device.type) is torch.bfloat16 else "no"


def _announce(
    run: RunConfig, groups: list[ParameterGroup], start: int, output: Path, accelerator: Accelerator
) -> None:
    """Say what trains, on what, and where it goes; write the config next to the results."""
    file = output / "config.yaml"
    with report.written(file):
        files.atomic_write(file, yaml.safe_dump(configs.dump(run), sort_keys=False))
    logger.info("stage %s -> %s, from step %d", run.stage.name, output, start)
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


@dataclass
class _Saver:
    """Writes checkpoints from the main process."""

    accelerator: Accelerator
    model: AnyToAny
    optimizer: Any
    groups: list[ParameterGroup]
    run: RunConfig
    chosen: dict[str, Any]
    lock: RunLock

    def __call__(self, output: Path, step: int) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.lock.check()
            checkpoints.save(
                checkpoints.step_folder(output, step),
                self.model,
                step=step,
                stage=self.run.stage,
                training={"step": step},
                tensors=_optimizer_tensors(self.optimizer, self.groups),
                resolved_settings=self.chosen,
            )
            checkpoints.prune(output, self.run.stage.save_total_limit, step)
        self.accelerator.wait_for_everyone()


class _Interrupt:
    """Turns Ctrl-C and SIGTERM into a flag that is read after each step; a second one ends.

    A signal that was ignored before stays ignored: so shells start jobs in the background, which
    Ctrl-C is not meant for. Outside the main thread, where Python lets nobody handle signals, they
    do what they did.
    """

    def __init__(self) -> None:
        self.seen = False
        self._flag: _Late | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that Python did not install, and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._flag and error is None:  # nothing may be under way when the group is left
            self._flag.read()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        logger.warning("stopping after this step; once more to stop at once")

    def agreed(self, accelerator: Accelerator) -> bool:
        """True on every process at the same step: at once where there is one, else at the step
        after any of them was interrupted, when the device has told without being waited for."""
        if accelerator.num_processes == 1:
            return self.seen
        flag = to_device(torch.tensor([float(self.seen)]), accelerator.device)
        before, self._flag = (
            self._flag,
            _Late(_summed(accelerator, flag), accelerator.device.type == "cuda"),
        )
        return before is not None and before.read()[0] > 0
