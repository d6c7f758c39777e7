"""StageConfig: how a stage of training is declared, as `stage:` of a YAML in `configs/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmllm.config.parse import as_mapping, check_keys, parse
from mmllm.config.registry import parse_component
from mmllm.config.renamed import with_current_names
from mmllm.errors import ConfigError, quoted

LOSSES = ("text", "first_token", "align", "denoise", "kl")


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out losses.

    Attributes:
        data: name -> dataset, as in `StageConfig.data`.
        every: steps between two validations; the last step always validates.
        batches: how many batches are measured, the same ones every time.
    """

    data: Mapping[str, Any]
    every: int = 100
    batches: int = 4


@dataclass(frozen=True)
class SamplesConfig:
    """Fixed prompts that are answered during training and written as a gallery.

    Attributes:
        every: steps between two galleries; the last step always writes one.
        prompts: user messages of text alone.
        media: user messages with one medium each, "image FILE text".
    """

    every: int = 200
    prompts: tuple[str, ...] = ()
    media: tuple[str, ...] = ()


@dataclass(frozen=True)
class PrealignConfig:
    """Training of the projections alone, without gradients through the LLM (training.prealign).

    As `prealign` it runs before the first step: input projections against the LLM's embeddings of
    the replies, output projections on hidden states that the LLM computes once. As `realign` it
    runs after the last step, on the output projections alone. Needs a `cache`.

    Attributes:
        steps: optimizer steps of each projection.
        batch_size: media of one step.
        learning_rate: the peak of the schedule.
        temperature: of the InfoNCE loss of input projections.
        variants: phrasings of each item.
        conversations: at most so many conversations for the output side, drawn by the stage's
            seed (None: all).
    """

    steps: int = 300
    batch_size: int = 128
    learning_rate: float = 1e-3
    temperature: float = 0.07
    variants: int = 1
    conversations: int | None = None


@dataclass(frozen=True)
class KLConfig:
    """Text on which the loss `kl` holds the adapted LLM to the base LLM (mmllm.data.text_corpus).

    Text that the base LLM generated serves well, and needs no other data.

    Attributes:
        file: rows of {"text"}.
        length: tokens of a window.
        batch_size: windows in every step, over all processes and accumulation steps.
    """

    file: str
    length: int = 160
    batch_size: int = 2


@dataclass(frozen=True)
class DenoiseConfig:
    """The noise levels of the loss `denoise`, and how much each of them counts.

    Attributes:
        times: how noise levels are drawn between 0 and 1, which is noise. uniform; logit_normal,
            the sigmoid of a normal variable (Esser et al. 2024, sec. 3.1); shifted, uniform and
            then moved towards noise by `shift` (sec. 5.3.2); auto, by the decoder's scheduler: for
            flow matching logit_normal and then shifted, else uniform.
        mean: of the normal variable.
        std: standard deviation of the normal variable.
        shift: null is that of the decoder's own scheduler where `times` shifts, else 1.
        min_snr: gamma of min-SNR weighting (Hang et al. 2023), 5 in the paper; null: every noise
            level counts alike.
    """

    times: Literal["uniform", "logit_normal", "shifted", "auto"] = "auto"
    mean: float = 0.0
    std: float = 1.0
    shift: float | None = None
    min_snr: float | None = None


@dataclass(frozen=True)
class EMAConfig:
    """An exponential moving average of what trains (Polyak and Juditsky 1992).

    The averages are validated, sampled from and saved as the model of a checkpoint; the trained
    values lie in its training state. The decay rises as (1 + step) / (10 + step) up to `decay`.

    Attributes:
        decay: the share of the average that a step keeps.
    """

    decay: float = 0.999


@dataclass(frozen=True)
class StageConfig:
    """One stage of training: what trains, on which data, by which losses.

    Attributes:
        name: what the stage is called in logs and reports.
        learning_rates: pattern of parameter names (shell wildcards) -> learning rate. The only
            place that declares what trains.
        losses: `text`, `first_token`, `align`, `denoise`, `kl` -> weight (mmllm.losses).
        data: name -> dataset; `share` of a dataset is its part of every batch.
        output: folder of the run.
        init_from: checkpoint whose weights the stage continues from (None: untrained).
        steps: optimizer steps.
        batch_size: conversations of a step, over all processes and accumulation steps.
        gradient_accumulation_steps: micro-batches of a step in each process.
        max_length: tokens of a conversation at most; longer ones are skipped.
        warmup_ratio: share of the steps with a rising learning rate.
        schedule: learning rate after the warm-up: down to a tenth (cosine), to zero (linear).
        betas: of AdamW.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        precision: auto is bf16 where the device computes it fast, else float32 (`no`).
        align_loss: distance of projected conditions to the captions' own in the loss `align`.
        pack: put a micro-batch's conversations into one row without padding.
        length_window: without `pack`, sort the conversations of so many steps by length, so that
            little is padded (0: as drawn).
        gradient_checkpointing: keep only the inputs of the LLM's layers and recompute the rest.
        compile: compile the LLM's layers by torch.compile; the first steps take a minute or more.
        liger_loss: the head's loss by Liger's kernel; auto: where it is installed, on CUDA.
        optimizer: adamw is torch's; the others, by bitsandbytes on CUDA, keep 8-bit moments, which
            `paged` lets leave the device when memory is short.
        num_workers: processes that prepare batches in advance (0: the training process does).
        cache: where features of frozen parts are kept: `memory`, `none`, or a folder that outlives
            the run and may be shared (mmllm.features.store).
        cache_dtype: how features and conditions are kept there; bfloat16 takes half the space.
        cache_complete: the folder holds everything: nothing is computed, and no encoder stays in
            memory.
        seed: of initialisation, order of the data, dropout and noise.
        save_steps: steps between two checkpoints.
        save_total_limit: checkpoints to keep.
        max_skip_fraction: at most this share of the drawn rows may be unusable; ten always may be
            (mmllm.training.journal.ALLOWED_SKIPS).
        max_nonfinite: at most so many steps in a row may have a loss that is not finite.
        prealign: training of the projections alone before the first step.
        realign: training of the output projections alone after the last step.
        kl: text of the loss `kl`.
        denoise: noise levels of the loss `denoise`; null: drawn uniformly, and all count alike.
        ema: a moving average of what trains, which is saved and used in its place.
        best: a held-out loss (`validation/text`): the model with the lowest is kept in
            `output`/best, in addition to the last checkpoints.
        trackers: accelerate's (tensorboard, trackio, wandb, …); metrics.jsonl and report.html are
            written in any case.
        validation: held-out losses.
        samples: fixed prompts that are answered during training.
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
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    align_loss: Literal["mse", "smooth_l1", "cosine"] = "mse"
    pack: bool = False
    length_window: int = 0
    gradient_checkpointing: bool = False
    compile: bool = False
    liger_loss: Literal["auto", "off", "on"] = "auto"
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    num_workers: int = 0
    cache: str = "memory"
    cache_dtype: Literal["float32", "bfloat16"] = "float32"
    cache_complete: bool = False
    seed: int = 0
    save_steps: int = 200
    save_total_limit: int = 2
    max_skip_fraction: float = 0.01
    max_nonfinite: int = 10
    prealign: PrealignConfig | None = None
    realign: PrealignConfig | None = None
    kl: KLConfig | None = None
    denoise: DenoiseConfig | None = None
    ema: EMAConfig | None = None
    best: str | None = None
    trackers: tuple[str, ...] = ()
    validation: ValidationConfig | None = None
    samples: SamplesConfig | None = None


def parse_stage(tree: Any) -> StageConfig:
    """Plain data -> StageConfig, with the Config of every dataset inside.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type, or settings that
            contradict each other.
    """
    where = "stage"
    tree = dict(as_mapping(with_current_names(tree), where))
    check_keys(StageConfig, tree, where)
    tree["data"] = _datasets(tree["data"], f"{where}.data")
    if tree.get("validation") is not None:
        validation = dict(as_mapping(tree["validation"], f"{where}.validation"))
        check_keys(ValidationConfig, validation, f"{where}.validation")
        validation["data"] = _datasets(validation["data"], f"{where}.validation.data")
        tree["validation"] = validation
    stage = parse(StageConfig, tree, where)
    _check(stage)
    return stage


def _datasets(tree: Any, where: str) -> dict[str, Any]:
    return {
        key: parse_component("data", value, f"{where}.{key}")
        for key, value in as_mapping(tree, where).items()
    }


def _check(stage: StageConfig) -> None:
    """Raise ConfigError for values out of range and settings that contradict each other."""
    unknown = set(stage.losses) - set(LOSSES)
    if unknown:
        raise ConfigError(
            f"stage.losses: unknown loss {quoted(sorted(unknown))}; known are text, "
            "first_token, align, denoise and kl"
        )
    if ("kl" in stage.losses) != (stage.kl is not None):
        raise ConfigError(
            "stage.losses.kl is the weight of what stage.kl describes: give both or neither"
        )
    _check_denoise(stage)
    if stage.ema and not 0 < stage.ema.decay < 1:
        raise ConfigError(f"stage.ema.decay: expected between 0 and 1, got {stage.ema.decay:g}")
    if stage.ema and stage.realign:
        raise ConfigError(
            "stage.realign trains after the last step, stage.ema averages steps: drop one"
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


def _check_denoise(stage: StageConfig) -> None:
    """Raise ConfigError for options of the loss `denoise` that are out of range or without use."""
    options = stage.denoise
    if options is None:
        return
    if "denoise" not in stage.losses:
        raise ConfigError(
            "stage.denoise describes the loss denoise, which stage.losses has not: give it a "
            "weight there, or drop stage.denoise"
        )
    for name in ("std", "shift", "min_snr"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"stage.denoise.{name}: expected above 0, got {value:g}")
