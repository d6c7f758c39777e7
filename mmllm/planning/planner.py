"""Estimate the resources of a system and its stages without downloading or loading weights.

A plan builds the very model that training builds, with the same code, on the meta device: shapes
without numbers. So parts that do not fit fail here as they would there, and the parameters that it
counts are those that training prints. Memory and time are estimates; the tests hold their formulas
against autograd and against torch's own counter of operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmllm import config as configs
from mmllm import licences
from mmllm import model as models
from mmllm.config import RunConfig, StageConfig, SystemConfig
from mmllm.errors import ConfigError
from mmllm.licences import PartLicence
from mmllm.model import AnyToAny
from mmllm.planning.flops import operations
from mmllm.planning.memory import activations, cache_size, dtype_of, projections
from mmllm.planning.parts import FLOAT_BYTES, Part, parts_of
from mmllm.training.trainable import ParameterGroup, choose_trainable

STAGES = "[0-9]_*.yaml"
"""The stages of a recipe's folder, in their order."""
ADAM_BYTES = 2 * FLOAT_BYTES
"""Bytes of AdamW's two moments of a parameter."""


@dataclass(frozen=True)
class StagePlan:
    """Resources of one stage, in bytes and operations.

    Attributes:
        stage: the stage.
        processes: how many share its batch.
        rows: conversations of a micro-batch in one process.
        groups: what trains.
        memory: of one process while it steps, by purpose.
        filling: of one process before that, while the frozen parts run over the data.
        checkpoint: bytes of a checkpoint.
        items: cached media by dataset.
        cache: bytes of the feature cache.
        flops: operations of the whole stage, over all processes.
    """

    stage: StageConfig
    processes: int
    rows: int
    groups: list[ParameterGroup]
    memory: dict[str, int]
    filling: dict[str, int]
    checkpoint: int
    items: dict[str, int]
    cache: int
    flops: float

    @property
    def trained(self) -> int:
        """The number of trained parameters."""
        return sum(group.size for group in self.groups)


@dataclass(frozen=True)
class Plan:
    """Resources of a system and its stages.

    Attributes:
        system: the config of the system.
        parts: its parts with their parameters and bytes.
        licences: the licences of the parts.
        stages: the resources of each stage.
        media: tokens of the LLM that a medium takes, by encoder key, and whether it may take less.
    """

    system: SystemConfig
    parts: list[Part]
    licences: list[PartLicence]
    stages: list[StagePlan] = field(default_factory=list)
    media: dict[str, tuple[int, bool]] = field(default_factory=dict)


def plan(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    processes: int = 1,
    num_items: int | None = None,
) -> Plan:
    """Plan a stage, a system or a recipe.

    Args:
        path: a stage's YAML, a system's YAML, or a folder with a YAML a stage.
        overrides: `dotted.key=value` each, of the stages.
        processes: how many share the stage's batch (DDP: each holds the whole model).
        num_items: items of each dataset whose file is not here; None: as many as its stage draws.

    Raises:
        ConfigError: parts that do not fit, or a batch that cannot be divided.
        AssetError: the config of a part is not on this machine.
    """
    if processes < 1:
        raise ConfigError(f"--num-processes: expected at least 1, got {processes}")
    if num_items is not None and num_items < 1:
        raise ConfigError(f"--items: expected at least 1, got {num_items}")
    path = Path(path)
    files = sorted(path.glob(STAGES)) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path}: no stages there; expected files named {STAGES}")
    if path.is_file() and "stage" not in configs.read_yaml(path):
        if overrides:
            raise ConfigError(f"{path}: a system alone takes no overrides; edit it")
        tree = configs.read_yaml(path)
        system = configs.parse_system(tree.get("system", tree))
        built = models.build(system, dtype=torch.bfloat16, meta=True)
        return Plan(system, parts_of(built), licences.of_parts(system), media=media_tokens(built))
    stages, model, runs = (
        [],
        None,
        [configs.load_run(file, overrides) for file in files],
    )
    for run in runs:
        if model is None or run.system != model.config:
            model = models.build(run.system, dtype=dtype_of(run.stage), meta=True)
        stages.append(plan_stage(model, run, processes=processes, num_items=num_items))
    assert model is not None
    system = runs[-1].system
    return Plan(system, parts_of(model), licences.of_parts(system), stages, media_tokens(model))


def plan_stage(
    model: AnyToAny, run: RunConfig, *, processes: int = 1, num_items: int | None = None
) -> StagePlan:
    """Estimate the memory, time and disk of a stage per process.

    Args:
        model: the model of `run.system`, on the meta device.
        run: the stage and the system that it trains.
        processes: how many processes share the batch.
        num_items: items of each dataset whose file is not here; None: as many as are drawn.

    Raises:
        ConfigError: the batch cannot be divided among processes and accumulation steps.
    """
    stage = run.stage
    if stage.batch_size % (stage.gradient_accumulation_steps * processes):
        raise ConfigError(
            f"stage.batch_size {stage.batch_size} cannot be divided among {processes} processes "
            f"and {stage.gradient_accumulation_steps} accumulation steps"
        )
    with torch.device("meta"):
        groups = choose_trainable(model, stage.learning_rates)
    rows = stage.batch_size // (stage.gradient_accumulation_steps * processes)
    parts = {part.name: part for part in parts_of(model)}
    adapters = sum(part.bytes for part in parts.values() if part.trained)
    trained = sum(group.size for group in groups)
    encoders = sum(part.bytes for name, part in parts.items() if name.startswith("encoders."))
    pipelines = [parts[f"decoders.{key}"].bytes for key in _decoders_of(model, stage)]
    conditions = {"align", "denoise"} & stage.losses.keys()
    projected, projecting = projections(model, stage, rows)
    memory = {
        "llm": parts["llm"].bytes,
        "encoders": 0 if stage.cache_complete else encoders,
        "decoders": sum(pipelines) if stage.losses.get("denoise") or stage.samples else 0,
        "projections, rows, LoRA": adapters,
        "gradients": trained * FLOAT_BYTES,
        "optimizer": trained * ADAM_BYTES,
        "activations": projected + activations(model.llm, stage, groups, rows),
    }
    filling = {
        "llm": parts["llm"].bytes,
        "encoders": encoders,
        "decoders, one at a time": max(pipelines, default=0) if conditions else 0,
        "projections, rows, LoRA": adapters,
    }
    microbatches = stage.gradient_accumulation_steps * processes * stage.steps
    items, cache = cache_size(model, stage, num_items)
    return StagePlan(
        stage=stage,
        processes=processes,
        rows=rows,
        groups=groups,
        memory=memory,
        filling={} if stage.cache == "none" or stage.cache_complete else filling,
        checkpoint=adapters + trained * ADAM_BYTES,
        items=items,
        cache=cache,
        flops=microbatches
        * (3 * projecting + operations(model.llm, stage, groups, rows, processes)),
    )


def _decoders_of(model: AnyToAny, stage: StageConfig) -> list[str]:
    """The decoders whose media the stage may train on or sample: they load on first use."""
    made = {getattr(entry, "modality", None) for entry in stage.data.values()}
    if stage.samples or None in made:
        return list(model.decoders)
    return [key for key, decoder in model.decoders.items() if decoder.modality in made]


def media_tokens(model: AnyToAny) -> dict[str, tuple[int, bool]]:
    """Return the tokens of a medium by encoder key, and whether it takes only those that it needs.

    Args:
        model: the model, which may be on the meta device.
    """
    measured = {model.renderer.input_keys[modality][0] for modality in model.renderer.layouts}
    return {key: (num, key in measured) for key, num in model.num_input_tokens.items()}
