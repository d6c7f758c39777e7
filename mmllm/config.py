"""Strict configuration: YAML -> frozen dataclasses, and the one place that looks up components.

Every key is known or an error that suggests the near one; every value is checked against the
type of its field, which also says what `no`, `1e-4` or `null` mean. A component is named by its
`type`; its Config stands next to its class, and its module is imported only when a config names it.

A config of one's own may name types of one's own ("module:Config"). One that lies in a checkpoint
may not: it imports nothing and names no file outside its folder, unless the user has said so by
name (`trust`).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import logging
import math
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mmllm import literals
from mmllm.errors import ConfigError, quoted
from mmllm.literals import SpelledScalar
from mmllm.weights import resolve_inside

logger = logging.getLogger(__name__)

COMPONENTS: dict[str, dict[str, str]] = {
    "llm": {"causal_lm": "mmllm.llm.causal_lm:CausalLMConfig"},
    "encoders": {
        "efficientnet": "mmllm.encoders.efficientnet:EfficientNetConfig",
        "frames": "mmllm.encoders.frames:FramesConfig",
        "aisfx": "mmllm.encoders.aisfx:AisfxConfig",
        "clap": "mmllm.encoders.clap:ClapConfig",
        "whisper": "mmllm.encoders.whisper:WhisperConfig",
        "ast": "mmllm.encoders.ast:AstConfig",
        "open_clip": "mmllm.encoders.open_clip:OpenClipConfig",
        "transformers_video": "mmllm.encoders.transformers_video:TransformersVideoConfig",
        "transformers_vision": "mmllm.encoders.transformers_vision:TransformersVisionConfig",
    },
    "input_projections": {
        "linear": "mmllm.projections.input:LinearConfig",
        "mlp": "mmllm.projections.input:MLPConfig",
        "words": "mmllm.projections.input:WordsConfig",
        "grouping": "mmllm.projections.input:GroupingConfig",
        "resampler": "mmllm.projections.input:ResamplerConfig",
    },
    "output_projections": {
        "transformer": "mmllm.projections.output:TransformerConfig",
    },
    "decoders": {
        "pixart": "mmllm.decoders.pixart:PixArtConfig",
        "wan": "mmllm.decoders.wan:WanConfig",
        "stable_audio": "mmllm.decoders.stable_audio:StableAudioConfig",
        "stable_diffusion": "mmllm.decoders.stable_diffusion:StableDiffusionConfig",
        "sd3": "mmllm.decoders.sd3:SD3Config",
        "flux": "mmllm.decoders.flux:FluxConfig",
        "audioldm2": "mmllm.decoders.audioldm2:AudioLDM2Config",
        "ltx": "mmllm.decoders.ltx:LTXConfig",
        "ltx2": "mmllm.decoders.ltx2:LTX2Config",
        "cogvideox": "mmllm.decoders.cogvideox:CogVideoXConfig",
        "sana": "mmllm.decoders.sana:SanaConfig",
        "z_image": "mmllm.decoders.z_image:ZImageConfig",
        "qwen_image": "mmllm.decoders.qwen_image:QwenImageConfig",
        "flux2": "mmllm.decoders.flux2:Flux2Config",
        "sdxl": "mmllm.decoders.sdxl:SDXLConfig",
        "audioldm": "mmllm.decoders.audioldm:AudioLDMConfig",
        "text_to_video": "mmllm.decoders.text_to_video:TextToVideoConfig",
    },
    "data": {
        "pairs": "mmllm.data.pairs:PairsConfig",
        "dialogues": "mmllm.data.dialogues:DialoguesConfig",
        "nextgpt": "mmllm.data.nextgpt:NextGPTConfig",
        "llava": "mmllm.data.llava:LlavaConfig",
        "alpaca": "mmllm.data.alpaca:AlpacaConfig",
        "messages": "mmllm.data.messages:MessagesConfig",
        "table": "mmllm.data.table:TableConfig",
        "webdataset": "mmllm.data.webdataset:WebDatasetConfig",
    },
}
"""Room -> type -> "module:Config". A new component is one file and one entry here."""

_OWN: set[str] = set()
"""Components from outside the table, "module:Config", that the user of this process has named."""
_TRUSTED: set[str] = set()
"""Modules and files that the user lets checkpoints name."""

T = TypeVar("T")


@dataclass(frozen=True)
class SystemConfig:
    """The joined model: which parts, under which keys. Keys tie a projection to its part.

    `licences` tells those of your own parts (encoders.image: MIT); `accept_licences` accepts those
    that forbid commercial use (mmllm.licences).
    """

    name: str
    llm: Any
    encoders: Mapping[str, Any] = field(default_factory=dict)
    input_projections: Mapping[str, Any] = field(default_factory=dict)
    decoders: Mapping[str, Any] = field(default_factory=dict)
    output_projections: Mapping[str, Any] = field(default_factory=dict)
    licences: Mapping[str, str] = field(default_factory=dict)
    accept_licences: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for parts, projections in (
            ("encoders", "input_projections"),
            ("decoders", "output_projections"),
        ):
            have, want = set(getattr(self, projections)), set(getattr(self, parts))
            if have != want:
                raise ConfigError(
                    f"system.{projections}: expected the keys of system.{parts} "
                    f"{quoted(sorted(want))}, got {quoted(sorted(have))}; each part needs one "
                    "projection under its own key"
                )


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out loss, measured every `every` steps on `batches` batches of `data`."""

    data: Mapping[str, Any]
    every: int = 100
    batches: int = 4


@dataclass(frozen=True)
class SamplesConfig:
    """Fixed prompts answered every `every` steps; written as a gallery next to the curves."""

    every: int = 200
    prompts: tuple[str, ...] = ()
    media: tuple[str, ...] = ()


@dataclass(frozen=True)
class PrealignConfig:
    """Before the first step, the projections that train learn alone (mmllm.training.prealign):
    those of inputs against the LLM's embeddings of the replies, those of outputs from hidden
    states that the LLM gives once for `variants` phrasings of each item, or for `conversations` of
    them, drawn by the stage's seed. As a stage's `realign`: the output side again, after the last
    step. Needs a `cache`."""

    steps: int = 300
    batch_size: int = 128
    learning_rate: float = 1e-3
    temperature: float = 0.07
    variants: int = 1
    conversations: int | None = None


@dataclass(frozen=True)
class KLConfig:
    """Plain text on which the adapted LLM is held to the base model by the loss `kl`
    (mmllm.data.plain): `file` of rows {"text"}, cut into windows of `length` tokens, `batch_size`
    of them in every step, over all processes and accumulation steps. The base LLM's own words
    serve well, and need no other data."""

    file: str
    length: int = 160
    batch_size: int = 2


@dataclass(frozen=True)
class StageConfig:
    """One stage of training, as data: what trains, on what, by which losses.

    `learning_rates` maps a pattern of parameter names (shell wildcards) to its learning rate and is
    the only place that says what trains. `losses` maps text, align, denoise and kl to weights.
    `data` maps a name to a dataset; `share` in it is its part of every batch.
    `init_from` is the checkpoint that the stage continues from (None: from nothing trained).
    `batch_size` counts conversations over all processes and accumulation steps.
    `pack` puts a micro-batch's conversations into one row without padding; without it,
    `length_window` sorts those of so many steps by length, so that little is padded (0: as drawn).
    `gradient_checkpointing` keeps no activations of the LLM but what enters its layers.
    `compile`: the LLM's layers by torch.compile; the first steps take a minute or more for it.
    `liger_loss`: the head's loss by Liger's kernel, where it is installed on CUDA; `on` insists.
    `optimizer`: adamw is torch's; the others, by bitsandbytes on CUDA, keep their state in 8 bits,
    and `paged` lets it leave the device when memory is short.
    `max_skip_fraction`: of the rows drawn, how many may be skipped because they cannot be used; 10
    always may (mmllm.training.report.ALLOWED_SKIPS).
    `best` names a held-out loss (validation/text): the model that has the lowest is kept in
    `output`/best, beside the last `save_total_limit` checkpoints.
    `trackers` are accelerate's: tensorboard, trackio, wandb and others;
    metrics.jsonl and report.html are written in any case.
    `cache` says where the frozen parts' work is kept: memory, none, or a folder that outlives the
    run and that others may share (mmllm.data.store). With `cache_complete` the folder must hold
    everything, nothing is computed, and no encoder stays in memory.
    """

    name: str
    learning_rates: Mapping[str, float]
    losses: Mapping[str, float]
    data: Mapping[str, Any]
    output: str
    init_from: str | None = None
    steps: int = 1000
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    max_length: int = 512
    warmup_ratio: float = 0.05
    schedule: typing.Literal["cosine", "linear", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: typing.Literal["auto", "no", "bf16", "fp16"] = "auto"
    align_loss: typing.Literal["mse", "smooth_l1", "cosine"] = "mse"
    pack: bool = False
    length_window: int = 0
    gradient_checkpointing: bool = False
    compile: bool = False
    liger_loss: typing.Literal["auto", "off", "on"] = "auto"
    optimizer: typing.Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    num_workers: int = 0
    cache: str = "memory"
    cache_complete: bool = False
    seed: int = 0
    save_steps: int = 200
    save_total_limit: int = 2
    max_skip_fraction: float = 0.01
    max_nonfinite: int = 10
    prealign: PrealignConfig | None = None
    realign: PrealignConfig | None = None
    kl: KLConfig | None = None
    best: str | None = None
    trackers: tuple[str, ...] = ()
    validation: ValidationConfig | None = None
    samples: SamplesConfig | None = None


@dataclass(frozen=True)
class RunConfig:
    """What one YAML of `configs/` holds: a system and one stage of its training."""

    system: SystemConfig
    stage: StageConfig


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a stage's YAML; `overrides` are `dotted.key=value`, checked like the YAML itself."""
    tree = read_yaml(path)
    is_saved = (Path(path).parent / "manifest.json").is_file()  # a checkpoint's, as it was trained
    tree["stage"] = _with_present_names(tree.get("stage"), warn=not is_saved)
    for override in overrides:
        _override(tree, override)
    return parse_run(tree, Path(path).name, warn=not is_saved)


RENAMED = {
    "accumulation": "gradient_accumulation_steps",
    "checkpoint_every": "save_steps",
    "clip": "max_grad_norm",
    "distance": "align_loss",
    "fused": "liger_loss",
    "keep": "save_total_limit",
    "max_bad_share": "max_skip_fraction",
    "recompute": "gradient_checkpointing",
    "retain": "kl",
    "start": "init_from",
    "train": "learning_rates",
    "warmup": "warmup_ratio",
    "workers": "num_workers",
}
"""Former name of a stage's key -> its name. 0.2 still reads the former ones, with a warning; of
losses, too."""

RENAMED_OPTIONS = {
    "negative": "negative_prompt",
    "source": "init_media",
    "true_guidance": "true_cfg_scale",
    "sound_guidance": "audio_guidance_scale",
    "cross_guidance": "modality_scale",
    "skip_guidance": "stg_scale",
    "skip_layer": "stg_block",
}
"""The same of the keys of decoders, which requests give as options too."""

RENAMED_PARAMETERS = {"llm.rows": "llm.signal_embeddings", "llm.head_rows": "llm.signal_head"}
"""The same for the parameters that `learning_rates` names, and an optimizer's state."""


def _with_present_names(stage: Any, *, warn: bool = False) -> Any:
    """A stage whose keys, those of its losses and learning rates too, have their present names."""
    if not isinstance(stage, Mapping):
        return stage
    stage = _renamed(stage, "stage", RENAMED, warn=warn)
    for key, names in (("losses", RENAMED), ("learning_rates", RENAMED_PARAMETERS)):
        if isinstance(stage.get(key), Mapping):
            stage[key] = _renamed(stage[key], f"stage.{key}", names, warn=warn)
    return stage


def _renamed(
    tree: Mapping[Any, Any], where: str, names: Mapping[str, str] = RENAMED, *, warn: bool
) -> dict[Any, Any]:
    for key in [key for key in names if key in tree]:
        new = names[key]
        if new in tree:
            raise ConfigError(f"{where}: {key} is now called {new}, and both are given: drop {key}")
        if warn:
            logger.warning("%s.%s is now called %s; please rename it", where, key, new)
    return {names.get(key, key): value for key, value in tree.items()}


def parse_run(tree: Mapping[str, Any], where: str = "config", *, warn: bool = True) -> RunConfig:
    """The same, from plain data. `warn`: of former names of a decoder's keys."""
    _check_keys(RunConfig, tree, where)
    return RunConfig(
        system=parse_system(tree["system"], warn=warn),
        stage=parse_stage(tree["stage"]),
    )


def parse_system(tree: Any, *, warn: bool = True) -> SystemConfig:
    """Plain data -> SystemConfig with every component's own Config inside. `warn`: of former names
    of a decoder's keys."""
    where = "system"
    tree = dict(_mapping(tree, where))
    _check_keys(SystemConfig, tree, where)
    parsed: dict[str, Any] = {
        key: tree[key] for key in ("name", "licences", "accept_licences") if key in tree
    }
    parsed["llm"] = parse_component("llm", tree["llm"], "llm", default="causal_lm")
    for room in ("encoders", "input_projections", "decoders", "output_projections"):
        entries = _mapping(tree.get(room, {}), room)
        parsed[room] = {
            key: parse_component(room, value, f"{room}.{key}", warn=warn)
            for key, value in entries.items()
        }
    return parse(SystemConfig, parsed, where)


def parse_stage(tree: Any) -> StageConfig:
    """Plain data -> StageConfig with every dataset's own Config inside."""
    where = "stage"
    tree = dict(_mapping(_with_present_names(tree), where))
    _check_keys(StageConfig, tree, where)
    tree["data"] = _datasets(tree["data"], f"{where}.data")
    if tree.get("validation") is not None:
        validation = dict(_mapping(tree["validation"], f"{where}.validation"))
        _check_keys(ValidationConfig, validation, f"{where}.validation")
        validation["data"] = _datasets(validation["data"], f"{where}.validation.data")
        tree["validation"] = validation
    stage = parse(StageConfig, tree, where)
    unknown = set(stage.losses) - {"text", "align", "denoise", "kl"}
    if unknown:
        raise ConfigError(
            f"stage.losses: unknown loss {quoted(sorted(unknown))}; known are text, align, "
            "denoise and kl"
        )
    if ("kl" in stage.losses) != (stage.kl is not None):
        raise ConfigError(
            "stage.losses.kl is the weight of what stage.kl describes: give both or neither"
        )
    for name in (
        *("steps", "batch_size", "gradient_accumulation_steps", "max_length"),
        *("save_steps", "save_total_limit"),
    ):
        if getattr(stage, name) < 1:
            raise ConfigError(f"stage.{name}: expected at least 1, got {getattr(stage, name)}")
    if stage.length_window < 0:
        raise ConfigError(f"stage.length_window: expected 0 or more, got {stage.length_window}")
    if stage.length_window and stage.pack:
        raise ConfigError(
            "stage.length_window spares padding, of which stage.pack has none: drop one"
        )
    if stage.cache_complete and stage.cache in ("memory", "none"):
        raise ConfigError(f"stage.cache_complete needs a folder as stage.cache, not {stage.cache}")
    if stage.cache_complete and stage.samples:
        raise ConfigError(
            "stage.samples runs the encoders; with cache_complete they are not loaded"
        )
    if stage.best and not stage.validation:
        raise ConfigError(f"stage.best: {stage.best} is measured by stage.validation: give one")
    if (stage.prealign or stage.realign) and stage.cache == "none":
        raise ConfigError("stage.prealign reads every medium many times: it needs a cache")
    if stage.batch_size % stage.gradient_accumulation_steps:
        raise ConfigError(
            f"stage.batch_size {stage.batch_size} is not a multiple of "
            f"stage.gradient_accumulation_steps {stage.gradient_accumulation_steps}"
        )
    return stage


def _datasets(tree: Any, where: str) -> dict[str, Any]:
    return {
        key: parse_component("data", value, f"{where}.{key}")
        for key, value in _mapping(tree, where).items()
    }


def component_class(room: str, kind: str, where: str | None = None) -> type:
    """The Config class of a component type; imports its module. "module:Config" names your own."""
    entry = COMPONENTS[room].get(kind, kind if ":" in kind else None)
    if entry is None:
        near = _suggest(kind, COMPONENTS[room])
        raise ConfigError(
            f"{where or room}: unknown type {quoted(kind)}{near}; known are "
            f"{', '.join(sorted(COMPONENTS[room]))}, or 'your.module:YourConfig'"
        )
    module, _, name = entry.partition(":")
    if kind in COMPONENTS[room]:
        return getattr(importlib.import_module(module), name)
    try:
        found = getattr(_import_own(module), name)
    except Exception as error:  # whatever a module of the user's own raises
        raise ConfigError(
            f"{where or room}: type {quoted(kind)} cannot be loaded: {type(error).__name__}: "
            f"{error}; its module has to be installed, on PYTHONPATH, or in the working folder"
        ) from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ConfigError(f"{where or room}: type {quoted(kind)} is no dataclass")
    _OWN.add(entry)
    return found


def _import_own(module: str) -> types.ModuleType:
    """A module that the user has named: found on the import path, else in the working folder,
    which is not on that path before."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        folder = str(Path.cwd())
        if error.name != module.partition(".")[0] or folder in sys.path:
            raise
        sys.path.append(folder)
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:
            sys.path.remove(folder)
            raise


def parse_component(
    room: str, tree: Any, where: str, *, default: str | None = None, warn: bool = True
) -> Any:
    """`{type: …, …}` -> the Config of that type. `warn`: of former names of a decoder's keys."""
    if dataclasses.is_dataclass(tree):
        return tree
    tree = dict(_mapping(tree, where))
    kind = tree.pop("type", default)
    if not isinstance(kind, str):
        known = ", ".join(sorted(COMPONENTS[room]))
        raise ConfigError(f"{where}: missing key 'type'; known are {known}")
    cls = component_class(room, kind, where)
    if room == "decoders":
        fields = {entry.name for entry in dataclasses.fields(cls)}
        former = {old: new for old, new in RENAMED_OPTIONS.items() if old not in fields}
        tree = _renamed(tree, where, former, warn=warn)
    return parse(cls, tree, where)


def build(config: Any, **context: Any) -> Any:
    """Make the component that a Config describes: `build` of the module where the Config lives."""
    return importlib.import_module(type(config).__module__).build(config, **context)


def parse(cls: type[T], tree: Any, where: str) -> T:
    """Plain data -> a dataclass, every key and every type checked; raises ConfigError."""
    tree = _mapping(tree, where)
    _check_keys(cls, tree, where)
    hints = _hints(cls)
    values = {key: _value(hints[key], value, f"{where}.{key}") for key, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def dump(config: Any) -> Any:
    """A dataclass -> plain data that `parse_*` reads back; component types are written out."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        tree: dict[str, Any] = {}
        kind = _component_type(type(config))
        if kind is not None:
            tree["type"] = kind
        for entry in dataclasses.fields(config):
            tree[entry.name] = dump(getattr(config, entry.name))
        return tree
    if isinstance(config, Mapping):
        return {key: dump(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [dump(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def trust(names: Collection[str]) -> None:
    """Let the checkpoints that this process opens name these modules ("my_encoder", with what is
    below it) as types of components, and these files as templates."""
    if isinstance(names, str):
        raise ConfigError(f"trust: expected a list of names, got {quoted(names)}")
    _TRUSTED.update(names)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; a `system:` that names a file is read from next to it.

    A YAML in a checkpoint's folder was written by others, any other by the user: see `trust`.
    """
    path = Path(path)
    folder = _checkpoint_of(path)
    if folder is not None:
        resolve_inside(folder, str(path.absolute()), str(path))
    tree = _read_mapping(path)
    included = tree.get("system")
    if isinstance(included, str):
        file = path.parent / included
        if folder is not None and included not in _TRUSTED:
            file = resolve_inside(folder, str(file.absolute()), f"{path}: system")
        tree["system"] = _read_mapping(file)
        folder = folder or _checkpoint_of(file)
    if folder is not None:
        _check_foreign(tree, folder, str(path))
    return tree


def _check_foreign(tree: Any, folder: Path, where: str) -> None:
    """Raises ConfigError if a config that others wrote, plain data, names code that is not mmllm's
    or a file outside `folder`, and the user does not trust it. Templates get their whole path."""
    if isinstance(tree, dict):
        kind = tree.get("type")
        if isinstance(kind, str) and ":" in kind and not _is_trusted(kind):
            module = quoted(kind.partition(":")[0])
            raise ConfigError(
                f"{where}: type {quoted(kind)} is code that does not belong to mmllm; a checkpoint "
                f"runs it only if you allow it by name: --trust {module.strip(chr(39))}, or "
                f"mmllm.load(…, trust=[{module}])"
            )
        template = tree.get("chat_template")
        if isinstance(template, str) and template.endswith(".jinja") and template not in _TRUSTED:
            tree["chat_template"] = str(resolve_inside(folder, template, f"{where}: chat_template"))
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            _check_foreign(value, folder, f"{where}: {quoted(key).strip(chr(39))}")


def _is_trusted(kind: str) -> bool:
    module = kind.partition(":")[0]
    packages = [module, *(module[:at] for at, letter in enumerate(module) if letter == ".")]
    return kind in _OWN or not _TRUSTED.isdisjoint([kind, *packages])


def _checkpoint_of(path: Path) -> Path | None:
    """The checkpoint in whose folder a file lies; None for one of the user's own."""
    parents = dict.fromkeys([*path.absolute().parents, *path.resolve().parents])
    for folder in parents:
        if (folder / "manifest.json").is_file() and (folder / "config.yaml").is_file():
            return folder
    return None


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            tree = literals.load(stream.read(literals.MAX_CHARACTERS + 1))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    return dict(_mapping(tree, str(path)))


def _component_type(cls: type) -> str | None:
    """What a config wrote, or would write, as the `type` of this class; None for no component."""
    entry = f"{cls.__module__}:{cls.__name__}"
    for kinds in COMPONENTS.values():
        for kind, known in kinds.items():
            if known == entry:
                return kind
    return entry if entry in _OWN else None


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"override {quoted(override)}: expected dotted.key=value")
    names = key.split(".")
    for depth, parents in ((1, ["stage"]), (2, ["stage", "losses"])):
        if names[:depth] == parents and len(names) > depth:
            names[depth] = RENAMED.get(names[depth], names[depth])
    *parents, last = names
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {quoted(override)}: {quoted(parent)} is not a mapping")
    try:
        node[last] = literals.load(value)
    except ValueError as error:
        raise ConfigError(
            f"override {quoted(override)}: the value is no YAML: {error}; put quotes round a text: "
            f"{key}='\"…\"'"
        ) from error


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _check_keys(cls: type, tree: Mapping[str, Any], where: str) -> None:
    fields = {entry.name: entry for entry in dataclasses.fields(cls) if entry.init}
    for key in tree:
        if key not in fields:
            raise ConfigError(
                f"{where}: unknown key {quoted(key)}{_suggest(key, fields)}; "
                f"known are {', '.join(sorted(fields))}"
            )
    missing = [
        name
        for name, entry in fields.items()
        if name not in tree
        and entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing key {', '.join(map(repr, missing))}")


def _suggest(key: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(key)[:60], list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _mapping(tree: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys, got {quoted(tree)}")
    return tree


def _value(hint: Any, value: Any, where: str) -> Any:
    """One field: nested dataclasses by `parse`, everything else by pydantic."""
    options = _options(hint)
    nested = [option for option in options if dataclasses.is_dataclass(option)]
    if nested and not dataclasses.is_dataclass(value):
        if value is None and type(None) in options:
            return None
        return parse(typing.cast(type, nested[0]), value, where)
    import pydantic

    value = _as_meant(hint, value)
    try:
        found = _adapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *(str(key)[:60] for key in first["loc"])])
        hint_at = {
            bool: "; YAML reads yes, no, on and off as true and false: put quotes round a text",
            type(None): "; YAML reads null, ~ and nothing as no value: put quotes round a text",
        }.get(type(first["input"]), "")
        raise ConfigError(
            f"{place}: {first['msg'].lower()}, got {quoted(first['input'])}{hint_at}"
        ) from error
    if _holds_nan(found):
        raise ConfigError(f"{where}: expected a number, got nan")
    return found


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one that it is."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _as_meant(hint: Any, value: Any) -> Any:
    """The same value without `SpelledScalar`: each scalar is what its field's type says."""
    options = _options(hint)
    if isinstance(value, SpelledScalar):
        return _scalar_as_meant(options, value)
    if isinstance(value, Mapping | list | tuple):
        for option in options:
            of = typing.get_args(option)
            origin = typing.get_origin(option)
            if isinstance(value, Mapping) and origin in (Mapping, dict) and len(of) == 2:
                return {key: _as_meant(of[1], entry) for key, entry in value.items()}
            if not isinstance(value, Mapping) and origin in (tuple, list, Sequence) and of:
                hints = [*of, *[of[0]] * len(value)] if of[-1] is not ... else [of[0]] * len(value)
                return [_as_meant(kind, entry) for kind, entry in zip(hints, value, strict=False)]
    return literals.without_spelling(value)


def _scalar_as_meant(options: Sequence[Any], value: SpelledScalar) -> Any:
    choices = [
        choice
        for option in options
        if typing.get_origin(option) is typing.Literal
        for choice in typing.get_args(option)
    ]
    for spelling in (value.spelling, value.spelling.lower()):
        if spelling in choices:
            return spelling
    if any(choice == value.plain and type(choice) is type(value.plain) for choice in choices):
        return value.plain
    fitting = {bool: (bool,), int: (int, float, bool), float: (float, int)}[type(value.plain)]
    if any(option is Any or option in fitting for option in options):
        return value.plain
    return value.spelling


def _holds_nan(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_nan(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_nan(entry) for entry in value)
    return isinstance(value, float) and math.isnan(value)


@functools.cache
def _adapter(hint: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
