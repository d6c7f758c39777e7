"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from mmllm.config import SystemConfig
from mmllm.licences import PartLicence
from mmllm.planning.planner import Plan, StagePlan


def render(plan: Plan, *, flops: float | None = None) -> Iterator[str]:
    """Yield the plan as text, line by line.

    Args:
        plan: the plan of a config.
        flops: floating-point operations per second of one device, which give the time of a stage;
            None leaves it out.
    """
    yield f"{plan.system.name}"
    yield ""
    yield "parameters"
    for part in plan.parts:
        named = ", ".join(f"{name} {n / 1e6:,.1f} M" for name, n in part.networks.items() if name)
        kind = "trained" if part.trained else "frozen "
        line = f"  {part.name:26} {part.parameters:15,}  {kind}  {named}"
        yield line.rstrip()
        if part.bytes_saved:
            yield f"  {'':26} {_gib(part.bytes_saved)} saved: its text encoder is the llm"
    frozen = sum(part.parameters for part in plan.parts if not part.trained)
    trained = sum(part.parameters for part in plan.parts if part.trained)
    yield f"  {'in all':26} {frozen:15,}  frozen, {trained:,} that may be trained"
    if plan.media:
        yield ""
        yield "tokens of a medium"
    for key, (num, is_most) in plan.media.items():
        most = "  at most, as many as it needs" if is_most else ""
        yield f"  encoders.{key:17} {num:15,}{most}"
    yield ""
    yield "licences"
    for entry in plan.licences:
        yield f"  {entry.part:26} {_licence(entry, plan.system)}"
    for stage in plan.stages:
        yield ""
        yield from _render_stage(stage, flops)


def _licence(entry: PartLicence, system: SystemConfig) -> str:
    terms = f": {entry.terms}" if entry.terms else ""
    refused = ""
    if not entry.commercial:
        accepted = entry.licence in system.accept_licences
        refused = ", NOT FOR COMMERCIAL USE" + (" (accepted)" if accepted else ": accept it first")
    return f"{entry.licence}{refused}{terms} [{entry.weights}; {entry.source}]"


def _render_stage(plan: StagePlan, flops: float | None) -> Iterator[str]:
    stage = plan.stage
    yield (
        f"stage {stage.name}: {stage.steps:,} steps of {stage.batch_size} conversations; "
        f"{plan.processes} process(es), {plan.rows} rows of at most {stage.max_length} tokens "
        "at once"
    )
    for group in plan.groups:
        yield f"  trains {group.pattern:28} {group.size:15,}  learning rate {group.learning_rate:g}"
    yield f"  trains {'in all':28} {plan.trained:15,}"
    yield f"  memory of a process          {_gib(sum(plan.memory.values()))}"
    for name, size in plan.memory.items():
        yield f"    {name:26} {_gib(size)}{_FORMULAS.get(name, '')}"
    if plan.filling:
        yield f"  before the first step        {_gib(sum(plan.filling.values()))}"
        for name, size in plan.filling.items():
            yield f"    {name:26} {_gib(size)}"
    kept = stage.save_total_limit + 1
    yield (
        f"  disk: a checkpoint           {_gb(plan.checkpoint)}, "
        f"{kept} at once {_gb(kept * plan.checkpoint).strip()}"
    )
    where = "in memory" if stage.cache == "memory" else f"in {stage.cache}"
    if stage.cache != "none":
        counted = ", ".join(f"{name} {count:,}" for name, count in plan.items.items())
        yield f"  cache {where:22} {_gb(plan.cache)}  at most ({counted} items)"
    yield f"  operations                   {plan.flops:9.2e}"
    if flops:
        seconds = plan.flops / (flops * plan.processes)
        yield (
            f"  time                         {_time(seconds)} at {flops:.3g} operations a second "
            "and process, frozen parts excluded"
        )
    else:
        yield "  time                         --flops RATE turns operations into time"


_FORMULAS = {
    "gradients": "  4 bytes a trained parameter",
    "optimizer": "  8 bytes a trained parameter (AdamW)",
    "activations": "  estimate: mmllm.planning.memory",
}


def _gib(size: float) -> str:
    return f"{size / 2**30:9.2f} GiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:9.2f} GB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:9.1f} hours" if seconds >= 3600 else f"{seconds / 60:9.1f} minutes"
