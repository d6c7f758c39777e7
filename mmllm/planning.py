"""`mmllm plan`: what a system and its stages need, before anything is fetched, loaded or started.

The plan builds the very model that training builds, with the same code, but on the meta device:
shapes without numbers (mmllm.weights.skip_weights). So parts that do not fit fail here as they
would there, and the parameters that it counts are those that training prints. Memory and time are
estimates; their formulas stand beside them and are held against autograd and against torch's own
counter of operations by the tests.

Legend: B rows, T tokens, D LLM width, Q and KV widths of all query and key heads, F width of the
feed-forward layer, I inputs of LoRA, N layers, V vocabulary; one process, one micro-batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm import config as configs
from mmllm import licences, weights
from mmllm.config import RunConfig, StageConfig, SystemConfig
from mmllm.data.rendering import Renderer
from mmllm.decoders.loading import meta_components
from mmllm.errors import ConfigError
from mmllm.kernels.linear_cross_entropy import CHUNK_SIZE
from mmllm.licences import PartLicence
from mmllm.llm.language_model import LanguageModel
from mmllm.llm.loading import local_tokenizer
from mmllm.llm.templates import chat_template
from mmllm.model import AnyToAny
from mmllm.training.feed import open_sources
from mmllm.training.trainable import ParameterGroup, choose_trainable

STAGES = "[0-9]_*.yaml"
"""The stages of a recipe's folder, in their order."""
_FLOAT = 4
_ADAM = 2 * _FLOAT
"""Bytes of AdamW's two moments of a parameter."""
_QUANTIZED = {"4bit": 4.127 / 8, "8bit": 1.0}
"""Bytes of a packed weight; 0.127 bits are the constants (Dettmers et al. 2023, section 3)."""
_LOGIT = 12
"""Bytes of a logit while its loss is made: itself, its logarithm and the gradients of both."""


@dataclass(frozen=True)
class Part:
    """`parameters` of one part, by network; `bytes` as it is loaded."""

    name: str
    networks: dict[str, int]
    bytes: int
    trained: bool = False

    @property
    def parameters(self) -> int:
        return sum(self.networks.values())


@dataclass(frozen=True)
class StagePlan:
    """What one stage needs. Bytes and operations; `memory` is of one process while it steps,
    `filling` before that, while the frozen parts run over the data; `items` counts cached media by
    dataset, `cache` their bytes."""

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
        return sum(group.size for group in self.groups)


@dataclass(frozen=True)
class Plan:
    system: SystemConfig
    parts: list[Part]
    licences: list[PartLicence]
    stages: list[StagePlan] = field(default_factory=list)


def plan(path: str | Path, overrides: Sequence[str] = (), *, processes: int = 1) -> Plan:
    """Plan a stage's YAML, a system's YAML, or a folder with a YAML a stage.

    `processes`: how many share the stage's batch (DDP: each holds the whole model). Raises
    ConfigError for parts that do not fit, AssetError where a part's configs are not at hand.
    """
    if processes < 1:
        raise ConfigError(f"--num-processes: expected at least 1, got {processes}")
    path = Path(path)
    files = sorted(path.glob(STAGES)) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path}: no stages there; expected files named {STAGES}")
    if path.is_file() and "stage" not in configs.read_yaml(path):
        if overrides:
            raise ConfigError(f"{path}: a system alone takes no overrides; edit it")
        tree = configs.read_yaml(path)
        system = configs.parse_system(tree.get("system", tree))
        return Plan(system, parts_of(build_meta(system)), licences.of_parts(system))
    stages, model, runs = [], None, [configs.load_run(file, overrides) for file in files]
    for run in runs:
        if model is None or run.system != model.config:
            model = build_meta(run.system, dtype_of(run.stage))
        stages.append(plan_stage(model, run, processes=processes))
    assert model is not None
    return Plan(runs[-1].system, parts_of(model), licences.of_parts(runs[-1].system), stages)


def build_meta(system: SystemConfig, dtype: torch.dtype = torch.bfloat16) -> AnyToAny:
    """The model of a system without its weights: `mmllm.model.build` on the meta device."""
    with weights.skip_weights():
        encoders = {key: configs.build(entry) for key, entry in system.encoders.items()}
        decoders = {key: configs.build(entry) for key, entry in system.decoders.items()}
        llm = configs.build(system.llm, dtype=dtype)
    with torch.device("meta"):
        return AnyToAny(system, llm, encoders, decoders)


def renderer(system: SystemConfig) -> Renderer:
    """The renderer of a system, without its weights and from this machine alone: what a dataset's
    rows become, and how long they are. Raises AssetError, CheckpointError or ConfigError where the
    tokenizer or the configs of a part are not at hand."""
    llm: Any = system.llm
    tokenizer, ends = local_tokenizer(llm.weights)
    model = build_meta(replace(system, llm=replace(llm, chat_template="plain")))
    model.llm.tokenizer = tokenizer
    return Renderer(
        tokenizer,
        model.renderer.tokens,
        end_ids=model.llm.end_ids | ends,
        input_keys=model.renderer.input_keys,
        output_keys=model.renderer.output_keys,
        template=chat_template(llm.chat_template, tokenizer),
        template_options=llm.template_options,
        system_prompt=llm.system_prompt,
    )


def dtype_of(stage: StageConfig) -> torch.dtype:
    """Of the LLM's weights in training; `auto` is taken for what a GPU gives."""
    return torch.bfloat16 if stage.precision in ("auto", "bf16") else torch.float32


def parts_of(model: AnyToAny) -> list[Part]:
    """Every part and how many parameters it has, frozen ones first."""
    frozen = {name: p for name, p in model.llm.model.named_parameters() if "lora_" not in name}
    parts = [Part("llm", {"": _count(frozen.values())}, _llm_bytes(model.llm, frozen.values()))]
    for key, encoder in model.encoders.items():
        own = list(encoder.parameters())
        parts.append(Part(f"encoders.{key}", {"": _count(own)}, _size(own)))
    for key, decoder in model.decoders.items():
        networks = _networks(decoder.folder)
        size = torch.empty(0, dtype=decoder.dtype).element_size()
        parts.append(Part(f"decoders.{key}", networks, size * sum(networks.values())))
    rooms: dict[str, int] = {}
    for name, parameter in model.trainable_candidates():
        room = ".".join(name.split(".")[:2])
        rooms[room] = rooms.get(room, 0) + parameter.numel()
    return parts + [
        Part(room, {"": count}, count * _FLOAT, trained=True) for room, count in rooms.items()
    ]


def _llm_bytes(llm: LanguageModel, frozen: Iterable[Tensor]) -> int:
    """As it is loaded: with `quantization` its linear layers but the head are packed."""
    packed = _QUANTIZED.get(llm.config.quantization or "")
    head = llm.model.get_output_embeddings().weight
    linear = {id(m.weight) for m in llm.model.modules() if isinstance(m, nn.Linear)} - {id(head)}
    sizes = (
        p.numel() * (packed if packed and id(p) in linear else p.element_size()) for p in frozen
    )
    return round(sum(sizes))


@functools.cache
def _networks(folder: Path) -> dict[str, int]:
    """Parameters of a pipeline by network; every stage of a recipe asks."""
    found = meta_components(folder)
    return {name: _count(network.parameters()) for name, network in found.items()}


def plan_stage(model: AnyToAny, run: RunConfig, *, processes: int = 1) -> StagePlan:
    """What a stage needs of each of so many processes; `model` is `build_meta(run.system)`."""
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
    pipelines = [part.bytes for name, part in parts.items() if name.startswith("decoders.")]
    speaks = {"align", "denoise"} & stage.losses.keys()
    projected, projecting = _projections(model, stage, rows)
    memory = {
        "llm": parts["llm"].bytes,
        "encoders": 0 if stage.cache_complete else encoders,
        "decoders": sum(pipelines) if stage.losses.get("denoise") or _draws(stage) else 0,
        "projections, rows, LoRA": adapters,
        "gradients": trained * _FLOAT,
        "optimizer": trained * _ADAM,
        "activations": projected + activations(model.llm, stage, groups, rows),
    }
    filling = {
        "llm": parts["llm"].bytes,
        "encoders": encoders,
        "decoders, one at a time": max(pipelines, default=0) if speaks else 0,
        "projections, rows, LoRA": adapters,
    }
    microbatches = stage.gradient_accumulation_steps * processes * stage.steps
    items, cache = _cache(model, stage)
    return StagePlan(
        stage=stage,
        processes=processes,
        rows=rows,
        groups=groups,
        memory=memory,
        filling={} if stage.cache == "none" or stage.cache_complete else filling,
        checkpoint=adapters + trained * _ADAM,
        items=items,
        cache=cache,
        flops=microbatches
        * (3 * projecting + operations(model.llm, stage, groups, rows, processes)),
    )


def activations(
    llm: LanguageModel, stage: StageConfig, groups: Sequence[ParameterGroup], rows: int
) -> int:
    """Bytes that autograd keeps of one micro-batch of full rows:

        B T N (9 D + 4 Q + 4 KV + 6 F + I)    with 16-bit weights, twice that with float32;
        B T (2 D N + one layer's)             where the stage recomputes;
        + 4 D B T                             for the last norm;
        + 12 V min(B T, 1024)                 for the logits.

    I, the inputs of LoRA's targets, of which some share one, counts six times with dropout, whose
    mask is kept. Nothing but the logits where no
    gradient goes through the LLM. Measured on the Llama of transformers 5.23 with sdpa under
    autocast; Korthikanti et al. 2022 (arXiv 2205.05198), eq. 2, give 34 D for GPT's layer.
    """
    shape, positions = _shape(llm), rows * stage.max_length
    logits = _LOGIT * shape.vocabulary * min(positions, CHUNK_SIZE)
    if not _reaches_llm(groups):
        return logits
    twice = dtype_of(stage).itemsize // 2
    lora = llm.config.lora if llm.has_lora else None
    inputs = (6 if lora and lora.dropout else 1) * shape.lora_inputs
    wide = 9 * shape.width + 4 * shape.queries + 4 * shape.keys + 6 * shape.inner
    layer = round(twice * (wide + inputs))
    ends = positions * 4 * shape.width + logits
    if stage.gradient_checkpointing:
        return positions * (2 * twice * shape.width * shape.layers + layer) + ends
    return positions * layer * shape.layers + ends


def operations(
    llm: LanguageModel,
    stage: StageConfig,
    groups: Sequence[ParameterGroup],
    rows: int,
    processes: int = 1,
) -> float:
    """Floating-point operations of the LLM in one micro-batch of full rows:

        forward   2 B T P + 4 B T T Q N + 2 B T V D    P: weights of the layers, LoRA's included;
        backward  as much again, attention and LoRA twice, where a gradient goes through the LLM;
        once more forward where it is recomputed.

    Every position is counted as real and supervised, so it is an upper bound. `kl` adds its
    windows: forward and backward, and forward again without the adapters. Frozen parts run once an
    item and are not in it, nor is pre-alignment.
    """
    shape = _shape(llm)

    def passes(rows: int, length: int) -> tuple[float, float, float]:
        positions = rows * length
        layers = 2 * positions * shape.weights
        attention = 4 * positions * length * shape.queries * shape.layers
        adapters = 2 * positions * _count(p for _, p in llm.lora_parameters())
        head = 2 * positions * shape.vocabulary * shape.width
        forward = layers + attention + adapters
        backward = layers + 2 * attention + 2 * adapters if _reaches_llm(groups) else 0
        if _reaches_llm(groups) and stage.gradient_checkpointing:
            backward += forward
        return forward, backward, head

    forward, backward, head = passes(rows, stage.max_length)
    total = forward + backward + head * (1 + _reaches_llm(groups))
    if stage.kl:
        share = stage.kl.batch_size / (stage.gradient_accumulation_steps * processes)
        forward, backward, head = passes(1, stage.kl.length)
        total += share * (2 * forward + backward + 3 * head)
    return total


def render(found: Plan, *, flops: float | None = None) -> Iterator[str]:
    """The plan in lines. `flops`: operations that one device really does in a second."""
    yield f"{found.system.name}"
    yield ""
    yield "parameters"
    for part in found.parts:
        named = ", ".join(f"{name} {n / 1e6:,.1f} M" for name, n in part.networks.items() if name)
        kind = "trained" if part.trained else "frozen "
        line = f"  {part.name:26} {part.parameters:15,}  {kind}  {named}"
        yield line.rstrip()
    frozen = sum(part.parameters for part in found.parts if not part.trained)
    trained = sum(part.parameters for part in found.parts if part.trained)
    yield f"  {'in all':26} {frozen:15,}  frozen, {trained:,} that may be trained"
    yield ""
    yield "licences"
    for entry in found.licences:
        yield f"  {entry.part:26} {_licence(entry, found.system)}"
    for stage in found.stages:
        yield ""
        yield from _render_stage(stage, flops)


def _licence(entry: PartLicence, system: SystemConfig) -> str:
    terms = f": {entry.terms}" if entry.terms else ""
    refused = ""
    if not entry.commercial:
        accepted = entry.licence in system.accept_licences
        refused = ", NOT FOR COMMERCIAL USE" + (" (accepted)" if accepted else ": accept it first")
    return f"{entry.licence}{refused}{terms} [{entry.weights}; {entry.source}]"


def _render_stage(found: StagePlan, flops: float | None) -> Iterator[str]:
    stage = found.stage
    yield (
        f"stage {stage.name}: {stage.steps:,} steps of {stage.batch_size} conversations; "
        f"{found.processes} process(es), {found.rows} rows of at most {stage.max_length} tokens "
        "at once"
    )
    for group in found.groups:
        yield f"  trains {group.pattern:28} {group.size:15,}  learning rate {group.learning_rate:g}"
    yield f"  trains {'in all':28} {found.trained:15,}"
    yield f"  memory of a process          {_gib(sum(found.memory.values()))}"
    for name, size in found.memory.items():
        yield f"    {name:26} {_gib(size)}{_FORMULAS.get(name, '')}"
    if found.filling:
        yield f"  before the first step        {_gib(sum(found.filling.values()))}"
        for name, size in found.filling.items():
            yield f"    {name:26} {_gib(size)}"
    kept = stage.save_total_limit + 1
    yield (
        f"  disk: a checkpoint           {_gb(found.checkpoint)}, "
        f"{kept} at once {_gb(kept * found.checkpoint).strip()}"
    )
    where = "in memory" if stage.cache == "memory" else f"in {stage.cache}"
    if stage.cache != "none":
        counted = ", ".join(f"{name} {count:,}" for name, count in found.items.items())
        yield f"  cache {where:22} {_gb(found.cache)}  at most ({counted} items)"
    yield f"  operations                   {found.flops:9.2e}"
    if flops:
        seconds = found.flops / (flops * found.processes)
        yield (
            f"  time                         {_time(seconds)} at {flops:.3g} operations a second "
            "and process, frozen parts apart"
        )
    else:
        yield "  time                         --flops RATE turns operations into time"


_FORMULAS = {
    "gradients": "  4 bytes a trained parameter",
    "optimizer": "  8 bytes a trained parameter (AdamW)",
    "activations": "  estimate: mmllm.planning.activations",
}


@dataclass(frozen=True)
class _Shape:
    """The LLM's sizes, by the legend above."""

    width: int
    queries: int
    keys: int
    inner: int
    layers: int
    vocabulary: int
    weights: int
    lora_inputs: float


def _shape(llm: LanguageModel) -> _Shape:
    of = llm.model.config.get_text_config()
    width, heads = of.hidden_size, of.num_attention_heads
    head = getattr(of, "head_dim", None) or width // heads
    frozen = {name: p for name, p in llm.model.named_parameters() if "lora_" not in name}
    tables = {id(p): p for p in (llm.embedding.weight, llm.model.get_output_embeddings().weight)}
    inputs = [p.shape[1] for name, p in llm.lora_parameters() if "lora_A" in name]
    return _Shape(
        width=width,
        queries=heads * head,
        keys=(getattr(of, "num_key_value_heads", None) or heads) * head,
        inner=getattr(of, "intermediate_size", None) or 4 * width,
        layers=of.num_hidden_layers,
        vocabulary=len(llm.embedding.weight),
        weights=_count(p for p in frozen.values() if id(p) not in tables),
        lora_inputs=sum(inputs) / of.num_hidden_layers,
    )


def _reaches_llm(groups: Sequence[ParameterGroup]) -> bool:
    """Whether what trains lies in front of the LLM or inside it."""
    names = (name for group in groups for name in group.parameters)
    return any(
        name.startswith(("input_projections.", "llm.signal_embeddings", "llm.lora."))
        for name in names
    )


def _projections(model: AnyToAny, stage: StageConfig, rows: int) -> tuple[int, float]:
    """Bytes that autograd keeps of the projections, and operations of their forward pass: of one
    medium a row and kind, run on the meta device. (The largest input and output count: media of
    several kinds are rare in a row.)"""
    inputs, outputs = [(0, 0.0)], [(0, 0.0)]
    for key, encoder in model.encoders.items():
        features = torch.empty(rows, *encoder.feature_shape, device="meta")  # pyright: ignore
        inputs.append(measure(model.input_projections[key], features))
    if {"align", "denoise"} & stage.losses.keys():
        for key, projection in model.output_projections.items():
            width = model.num_signal_tokens[key]
            signals = torch.empty(rows, width, model.llm.width, device="meta", requires_grad=True)
            outputs.append(measure(projection, signals))
    heard, said = max(inputs), max(outputs)
    return heard[0] + said[0], heard[1] + said[1]


def measure(module: nn.Module, *inputs: Tensor) -> tuple[int, float]:
    """Bytes that autograd keeps of a forward pass (parameters apart), and its operations."""
    from torch.utils.flop_counter import FlopCounterMode

    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, Tensor] = {}  # holding them keeps the addresses apart

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in own:
            kept[place] = tensor
        return tensor

    before = module.training
    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), counter:
        module.train()(*inputs)
    module.train(before)
    return sum(t.untyped_storage().nbytes() for t in kept.values()), counter.get_total_flops()


def _cache(model: AnyToAny, stage: StageConfig) -> tuple[dict[str, int], int]:
    """Items by dataset, and bytes of what the frozen parts say of them: float32 features
    of an encoder's [L, C], float32 conditions of a decoder. Latents are not counted.

    A dataset whose file is at hand is counted, another has what the stage sees of it. An item is
    one medium and its caption: of pairs the one that they ask for, else the largest, so that it
    is a bound. A caption that is met again is kept once.
    """
    heard = {
        str(encoder.modality): _FLOAT * math.prod(encoder.feature_shape)  # pyright: ignore
        for encoder in model.encoders.values()
    }
    said = {
        decoder.modality: _FLOAT * sum(map(math.prod, decoder.condition_shapes.values()))
        for decoder in model.decoders.values()
    }
    shares = {name: entry.share for name, entry in stage.data.items()}
    items, total = {}, 0
    for name, entry in stage.data.items():
        try:
            items[name] = len(open_sources({name: entry}, "stage.data")[name])
        except ConfigError:
            seen = stage.steps * stage.batch_size * shares[name] / sum(shares.values())
            items[name] = round(seen)
        direction, modality = (getattr(entry, n, None) for n in ("direction", "modality"))
        sides = {"understand": [heard], "generate": [said]}.get(direction or "", [heard, said])
        largest = (max(kinds.values(), default=0) for kinds in sides)
        each = sides[0].get(modality, 0) if modality else sum(largest)
        total += items[name] * each
    return items, 0 if stage.cache == "none" else total


def _draws(stage: StageConfig) -> bool:
    """Whether the stage's samples make media, whose pipelines then stay in memory."""
    return stage.samples is not None


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _size(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _gib(size: float) -> str:
    return f"{size / 2**30:9.2f} GiB"


def _gb(size: float) -> str:
    return f"{size / 1e9:9.2f} GB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:9.1f} hours" if seconds >= 3600 else f"{seconds / 60:9.1f} minutes"
