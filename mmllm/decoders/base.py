"""The contract of frozen diffusion decoders, and what all diffusers pipelines share.

Legend: M media, P x E one tensor of the condition, S latent shape. A condition is a dict of
tensors, because real pipelines take several; they bear the pipeline's own names. A name that ends
in `mask` is a 0/1 mask over the positions P of its sequence and is predicted like every other
tensor (above 0.5 counts as 1).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import logging
import math
import shlex
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.config import RENAMED_OPTIONS
from mmllm.conversation import MEDIA, Medium
from mmllm.decoders.caching import check_cache, step_cache, usable_caches
from mmllm.decoders.schedules import add_training_noise, resolved, solver
from mmllm.errors import AssetError, ConfigError, MediaError, quoted, wrap_errors
from mmllm.media.preparing import preparing
from mmllm.weights import (
    PICKLE_SUFFIXES,
    are_weights_skipped,
    check_attention,
    locate,
    remote_code_disabled,
)

logger = logging.getLogger(__name__)

Condition = dict[str, Tensor]
COUNTS = {"steps", "max_caption_tokens", "frames", "height", "width", "window"}
LENGTHS = {"seconds": 600.0, "fps": 1000.0}
"""Field -> the most that any pipeline is asked for."""

REQUESTS = (
    *("steps", "guidance", "negative_prompt", "scheduler", "cache", "init_media", "strength"),
    *("seconds", "frames", "fps", "height", "width"),
)
SAMPLING = (
    *("weights", "steps", "guidance", "negative_prompt", "scheduler", "init_media", "strength"),
    *("cache", "cache_threshold", "offload"),
)
"""Fields of a config that change nothing of what captions and latents become."""

_CONVERT = (
    "from diffusers import DiffusionPipeline as Pipeline; "
    "Pipeline.from_pretrained({folder!r}, use_safetensors=False).save_pretrained({folder!r})"
)

_CODECS = "mmllm.mini.codecs"
"""Where codecs are that diffusers does not have."""

_LOADING = threading.Lock()
"""Held while a pipeline is loaded, since its libraries patch torch.nn for all threads meanwhile."""

OnStep = Callable[[int, int], None]
"""Called with (step, steps) while sampling; may raise Cancelled."""
OnPreview = Callable[[list[Medium]], None]
"""Called with M pictures, as they are so far, before some of the steps are told."""

_PREVIEWS = 4
"""A preview costs one pass of the codec: one is made after each quarter of the steps but the last.
"""


class Cancelled(Exception):
    """Raised by a callback to stop sampling; the decoder stays usable."""


@dataclass(frozen=True)
class DecoderConfig:
    """`weights`: a diffusers folder, a hub id, or `mini:…`. `steps`, `guidance` and
    `negative_prompt` are the defaults of `sample`; guidance of 1 or less is none. `scheduler` names
    another solver (mmllm.decoders.schedules) than the pipeline's own. `dtype`: of the pipeline's
    weights.

    `cache`: steps take over what has hardly changed (mmllm.decoders.caching); `cache_threshold` is
    how much that may be, for first_block. `offload`: parts of the pipeline are on the accelerator
    only while they compute: `model` one after the other, `sequential` layer by layer, which takes
    the least memory and the most time.
    """

    weights: str
    steps: int = 20
    guidance: float = 3.0
    negative_prompt: str = ""
    scheduler: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cache: Literal["first_block", "pyramid_attention", "taylorseer"] | None = None
    cache_threshold: float = 0.05
    offload: Literal["none", "model", "sequential"] = "none"

    def __post_init__(self) -> None:
        """Every count that a family adds is at least 1, every length more than 0."""
        values: dict[str, Any] = vars(self)
        for name, value in values.items():
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name}: expected a finite number, got {value}")
            if name in LENGTHS and value <= 0:
                raise ConfigError(f"{name}: expected more than 0, got {value}")
            if name in LENGTHS and value > LENGTHS[name]:
                raise ConfigError(f"{name}: expected at most {LENGTHS[name]:g}, got {value}")
            if name in COUNTS and not isinstance(value, Integral):
                raise ConfigError(f"{name}: expected a whole number, got {quoted(value)}")
            if name in COUNTS and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")


@dataclass(frozen=True)
class InitMediaConfig(DecoderConfig):
    """Of a pipeline that can start from a medium. `init_media: last` starts a reply's media from
    the newest one in the conversation, if there is one; `none` from noise alone."""

    init_media: Literal["none", "last"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_media not in ("none", "last"):
            raise ConfigError(f"init_media: expected none or last, got {self.init_media!r}")


@dataclass(frozen=True)
class Img2ImgConfig(InitMediaConfig):
    """Of one that puts noise on its source: `strength` of the steps are made, from the noise that
    belongs there. 1 leaves next to nothing of the source, 0.3 its colours and its composition."""

    strength: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength: expected more than 0, at most 1, got {self.strength}")


@dataclass(frozen=True)
class SequenceConfig(DecoderConfig):
    """Of a pipeline that takes captions of any length: `max_caption_tokens` is P."""

    max_caption_tokens: int = 24


class ModalityDecoder:
    """A frozen pipeline that turns a condition into media. Not an nn.Module: its weights never
    train and stay out of the model's checkpoint; the pipeline is loaded on first use.

    A family of pipelines fills in `condition_shapes` and the underscored methods at the end, each a
    few lines. All else is the same for all.
    """

    modality: ClassVar[str]
    """What it makes: "image", "audio" or "video"."""
    pipelines: ClassVar[Sequence[str]]
    """The diffusers classes that it knows."""
    masks: ClassVar[Mapping[str, str]] = {}
    """Sequence -> the mask over its positions, both names of condition tensors."""
    min_steps: ClassVar[int] = 1
    """The fewest steps that the pipeline can sample in."""
    passes_sigmas: ClassVar[bool] = False
    """Whether the pipeline tells its scheduler the noise levels, which few can be told."""
    img2img_class: str = ""
    """The diffusers class with the same parts that starts from a medium."""
    init_modality: str = ""
    """The kind of medium that it starts from; "": none."""
    init_one_by_one: bool = False
    """Whether it takes the media of a call one by one."""

    def __init__(self, config: DecoderConfig):
        self.config: Any = config
        self._own_config: Any = config  # `config` is another one while a call changes it
        self.folder = _folder(config.weights)
        self.pipeline_class = check_folder(self.folder, self.pipelines)
        check_cache(config.cache, self.pipeline_class)
        self._solver(config.scheduler)
        self._own_scheduler: Any = None
        self.device = torch.device("cpu")
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self._pipeline: Any = None
        self._sourced: Any = None
        self._negative: tuple[str, Condition] | None = None

    @property
    def request_options(self) -> tuple[str, ...]:
        """Fields of the config that one call of `sample` may change."""
        own = {entry.name for entry in dataclasses.fields(self._own_config)}
        if not self.init_modality:
            own -= {"init_media", "strength"}
        if not usable_caches(self.pipeline_class):
            own -= {"cache"}
        return tuple(name for name in REQUESTS if name in own)

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one condition, read from the pipeline's own configs."""
        raise NotImplementedError

    def encode_captions(self, captions: Sequence[str]) -> Condition:
        """What the pipeline's own text encoder says of captions: the targets of alignment.

        M >= 1 captions -> float32[M, …]. Embeddings at masked positions, which no pipeline looks
        at, are zero: a definite target.
        """
        if not captions:
            raise ValueError(f"{self.modality}: no captions; expected at least one")
        with self._used():
            return self._encode(self._read, list(captions))

    def unconditional(self, num: int) -> Condition:
        """The condition of the negative caption, for guidance: float32[num, …]."""
        caption: str = self.config.negative_prompt
        if self._negative is None or self._negative[0] != caption:
            with self._used():
                self._negative = caption, self._encode(self._read_negative, caption)
        found = self._negative[1]
        return {name: value.expand(num, *value.shape[1:]) for name, value in found.items()}

    def preprocess(self, medium: Medium) -> Tensor:
        """A medium of this modality -> what `encode_media` takes, on the CPU; else MediaError."""
        if not isinstance(medium, MEDIA[self.modality]):
            raise MediaError(f"the {self.modality} decoder cannot take {medium!r}")
        with preparing(medium, f"the {self.modality} decoder"):
            return self._preprocess(medium)

    @torch.no_grad()
    def encode_media(self, samples: Tensor) -> Tensor:
        """Preprocessed media [M, …] -> normalised latents float32[M, *S], cacheable: the mode of
        the codec's distribution, so that the same medium always gives the same latents."""
        with self._used():
            return self._normalise(self._mode(samples.to(self.device, self.dtype))).float()

    def denoising_loss(
        self, condition: Condition, latents: Tensor, *, noise: Tensor, times: Tensor
    ) -> Tensor:
        """The pipeline's own training loss -> float[M]; `times` float[M] in (0, 1), 1 = noise.

        Mean squared error, per sample, to the target that the scheduler's config prescribes;
        latents and noise float[M, *S]. The gradient reaches the condition's embeddings; masks
        count as 0 or 1 here as in sampling, and get a gradient of zero.
        """
        if self.config.offload != "none" and torch.is_grad_enabled():
            raise ConfigError(
                f"{self.modality}: offload {self.config.offload!r} takes weights away that the "
                "gradient needs; train with offload none, or without the loss 'denoise'"
            )
        latents, noise, times = (
            tensor.to(self.device, torch.float32) for tensor in (latents, noise, times)
        )
        self._check(condition, len(latents))
        step = add_training_noise(self.pipeline.scheduler, latents, noise, times)
        predicted = self._denoise(
            self._ready(condition), step.inputs.to(self.dtype), step.timesteps
        )
        predicted = predicted[:, : latents.shape[1]]  # some models predict a variance behind it
        return (predicted.float() - step.target).square().flatten(1).mean(1)

    @torch.no_grad()
    def sample(
        self,
        condition: Condition,
        *,
        generators: Sequence[torch.Generator],
        sources: Sequence[Medium] | None = None,
        on_step: OnStep | None = None,
        on_preview: OnPreview | None = None,
        **changes: Any,
    ) -> list[Medium]:
        """Run the pipeline on M >= 1 conditions at once, one generator each. `changes`: see
        `settings`; they hold while the call lasts, so a decoder serves one call at a time.
        `sources`: one medium of `init_modality` each, to start from in place of noise alone.
        `on_preview`: called by decoders that have previews, now and then."""
        num = len(generators)
        self._check(condition, num)
        if sources is not None and self.init_one_by_one and num > 1:
            media: list[Medium] = []
            for row in range(num):
                media += self.sample(
                    {name: value[row : row + 1] for name, value in condition.items()},
                    generators=generators[row : row + 1],
                    sources=sources[row : row + 1],
                    on_step=on_step and _one_of_many(on_step, row, num),
                    **changes,
                )
            return media
        with self._changed(self.settings(**changes)), self._used():
            pipeline, start = self.pipeline, {}
            if sources is not None:
                pipeline, start = self._start(sources, num)
            options = self._options()
            known = inspect.signature(pipeline).parameters
            if start:  # its size and length are the source's, where the pipeline does not ask
                options = {name: value for name, value in options.items() if name in known}
            guidance = self._guidance(self.config.guidance, lambda: self.unconditional(num))
            with step_cache(pipeline, self.config.cache, self.config.cache_threshold):
                output = pipeline(
                    **self._arguments(condition),
                    **guidance,
                    **options,
                    **start,
                    **self._callbacks(known, on_step, on_preview, start.get("strength", 1.0)),
                    num_inference_steps=self.config.steps,
                    generator=generators[0] if start and self.init_one_by_one else list(generators),
                    output_type="np",
                )
            return self._media(output)

    def settings(self, **changes: Any) -> Any:
        """The config with what one call changes (`request_options`; None changes nothing).

        Raises ConfigError for an unknown option and for a value that the pipeline cannot take.
        """
        changes = {
            _present_name(name): value for name, value in changes.items() if value is not None
        }
        for name in changes.keys() - set(self.request_options):
            raise ConfigError(
                f"{self.modality}: unknown option {name!r}; this decoder takes "
                f"{', '.join(self.request_options)}"
            )
        try:
            settings = dataclasses.replace(self._own_config, **changes)
        except TypeError as error:
            raise ConfigError(f"{self.modality}: {changes}: {error}") from error
        if settings.steps < self.min_steps:
            raise ConfigError(f"steps: expected at least {self.min_steps}, got {settings.steps}")
        if changes.get("negative_prompt") and settings.guidance <= 1:
            raise ConfigError(
                f"{self.modality}: a negative caption does nothing at guidance "
                f"{settings.guidance:g}; give more than 1, or no negative caption"
            )
        check_cache(settings.cache, self.pipeline_class)
        self._solver(settings.scheduler)
        if self.init_modality and settings.init_media == "last":
            self._check_strength(settings)
        copy.copy(self)._configure(settings)  # a copy: this decoder may be sampling
        return settings

    def measures(self, **changes: Any) -> dict[str, float]:
        """What the media of one call will measure, as far as that is known: `height` and `width` in
        pixels, `seconds`. Raises as `settings` does."""
        other = copy.copy(self)
        other._configure(self.settings(**changes))
        return other._measures()

    @contextlib.contextmanager
    def _changed(self, config: Any) -> Iterator[None]:
        """Within it the decoder has this config."""
        own = self.config
        try:
            self._configure(config)
            if config.scheduler != own.scheduler:
                self._reschedule()
            yield
        finally:
            self._configure(own)
            if config.scheduler != own.scheduler:
                self._reschedule()

    def _solver(self, name: str | None) -> tuple[str, dict[str, Any]] | None:
        """Class and settings of the scheduler called `name`; None for the pipeline's own. Raises
        ConfigError for one that cannot take its place."""
        if name is None:
            return None
        return solver(self.component_config("scheduler"), name, passes_sigmas=self.passes_sigmas)

    def _reschedule(self) -> None:
        """Give what is loaded the scheduler that the config names."""
        own, chosen = self._own_scheduler, self._solver(self.config.scheduler)
        scheduler = own if chosen is None else resolved(own, *chosen)
        for pipeline in filter(None, (self._pipeline, self._sourced)):
            pipeline.scheduler = scheduler

    @contextlib.contextmanager
    def _used(self) -> Iterator[None]:
        """Behind it nothing of an offloaded pipeline is on the accelerator. (Of one that is
        offloaded layer by layer nothing ever stays.)"""
        try:
            yield
        finally:
            if self._pipeline is not None and self.config.offload == "model":
                self._pipeline.maybe_free_model_hooks()

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline, loaded once."""
        if self._pipeline is None:
            with _LOADING:
                if self._pipeline is None:  # else another thread was first
                    self._load()
        return self._pipeline

    def _load(self) -> None:
        self._check_offload()
        # Weights that are born in inference mode could never take part in a training step.
        with torch.inference_mode(False):
            pipeline = load_pipeline(self.folder, self.dtype)
            if self.config.offload == "none":
                pipeline.to(self.device)
            else:
                getattr(pipeline, f"enable_{self.config.offload}_cpu_offload")(device=self.device)
            self._loaded(pipeline)
        self._own_scheduler = pipeline.scheduler
        self._pipeline = pipeline
        self._reschedule()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ModalityDecoder:
        """Where the pipeline lives (moved now if it is loaded; loaded again for another dtype than
        the config's, because parts of some transformers must stay float32, which only loading
        respects)."""
        chosen: torch.dtype = dtype or getattr(torch, self.config.dtype)
        if chosen != self.dtype or self.config.offload != "none":
            self.release()
        self.device, self.dtype = torch.device(device), chosen
        self._check_offload()
        self._negative = None
        if self._pipeline is not None:
            self._pipeline.to(self.device)
        return self

    def release(self) -> None:
        """Forget the loaded pipeline; the next use loads it again."""
        self._pipeline = self._sourced = self._negative = None

    def component_config(self, name: str) -> dict[str, Any]:
        """The JSON config of one part of the pipeline, read without loading weights."""
        folder = self.folder / name
        for file in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
            if (folder / file).is_file():
                with wrap_errors(AssetError, folder / file):
                    return dict(json.loads((folder / file).read_text(encoding="utf-8")))
        raise AssetError(f"{folder}: no config found; this decoder needs the pipeline's {name}")

    @property
    def fingerprint(self) -> str:
        """Of everything that decides what captions and latents become; not of where the folder
        lies, nor of how it is sampled from."""
        settings = dataclasses.asdict(self.config)
        for name in SAMPLING:
            settings.pop(name, None)
        if settings["dtype"] == "float32":  # as it was before there was a choice
            del settings["dtype"]
        former = {new: old for old, new in RENAMED_OPTIONS.items()}
        settings = {former.get(name, name): value for name, value in settings.items()}
        digest = hashlib.sha256(repr((type(self).__name__, settings)).encode())
        for file in sorted(self.folder.rglob("*")):
            if file.suffix in {".json", ".safetensors"}:
                name = file.relative_to(self.folder).as_posix()
                digest.update(f"{name}:{file.stat().st_size}".encode())
                if file.suffix == ".json" or file.stat().st_size < 64 * 2**20:
                    digest.update(file.read_bytes())
        return digest.hexdigest()[:16]

    # What differs between families of pipelines.

    def _configure(self, config: Any) -> None:
        """Take a config; ConfigError for one that the pipeline cannot follow."""
        self.config = config

    def _measures(self) -> dict[str, float]:
        """`measures` by the config in force."""
        return {}

    def _preview(self, latents: Tensor) -> list[Medium] | None:
        """Latents in the making, as the pipeline holds them -> M pictures; None: there are none."""
        return None

    def _loaded(self, pipeline: Any) -> None:
        """What a pipeline that was just loaded still needs."""

    def _preprocess(self, medium: Any) -> Tensor:
        """A medium of this modality -> what the codec takes, [*shape], on the CPU."""
        raise NotImplementedError

    def _clean(self, caption: str) -> str:
        """A caption as the pipeline hands it to its tokenizer."""
        return caption

    def _mode(self, samples: Tensor) -> Tensor:
        """Preprocessed media [M, …] -> the codec's latents [M, *S]."""
        return self.pipeline.vae.encode(samples).latent_dist.mode()

    def _normalise(self, latents: Tensor) -> Tensor:
        """The codec's latents [M, *S] -> as the denoiser takes them."""
        return latents * self.pipeline.vae.config.scaling_factor

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """One call of the transformer, as the pipeline makes it: [M, *S] -> [M, *S]."""
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        """What else the pipeline is called with."""
        return {}

    def _start(self, sources: Sequence[Medium], num: int) -> tuple[Any, dict[str, Any]]:
        """The pipeline that starts from media, and what it is called with beside the rest."""
        if not self.init_modality:
            raise ConfigError(
                f"{self.modality}: {self.pipeline_class} makes media from noise alone; leave out "
                "the sources, or take a decoder that can start from them"
            )
        wrong = [medium for medium in sources if medium.modality != self.init_modality]
        if wrong or len(sources) != num:
            raise ValueError(
                f"{self.modality}: expected {num} sources of kind {self.init_modality}, got "
                f"{list(sources)}"
            )
        self._check_strength(self.config)
        return self._start_from(sources)

    def _start_from(self, sources: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """The same once the sources are known to be right."""
        raise NotImplementedError

    def _sharing(self) -> Any:
        """`img2img_class`, made of the parts of our pipeline. (`from_pipe` would cast them.)"""
        if self._sourced is None:
            import diffusers

            own = self.pipeline
            kind = getattr(diffusers, self.img2img_class)
            parts, options = kind._get_signature_keys(kind)
            shared = {name: own.components[name] for name in parts if name in own.components}
            told = {name: own.config[name] for name in options if name in own.config}
            with _quietly():
                self._sourced = kind(**shared, **told)
            self._sourced.set_progress_bar_config(disable=True)
        return self._sourced

    def _check_offload(self) -> None:
        if (
            self.config.offload != "none"
            and self.device.type == "cpu"
            and not are_weights_skipped()
        ):
            raise ConfigError(
                f"{self.modality}: offload {self.config.offload!r} keeps weights off an "
                "accelerator, but this decoder is to run on the CPU; choose a device such as cuda, "
                "or offload none"
            )

    def _check_strength(self, config: Any) -> None:
        if "strength" in self.request_options and int(config.steps * config.strength) < 1:
            raise ConfigError(
                f"{self.modality}: a strength of {config.strength:g} of {config.steps} steps is "
                f"less than one; expected at least {1 / config.steps:.2g}, or more steps"
            )

    def _arguments(self, condition: Condition) -> dict[str, Any]:
        """The condition under the names of the pipeline's arguments."""
        return self._ready(condition)

    def _guidance(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        """The pipeline's arguments of guidance; 1 is the condition alone, as pipelines count."""
        return {"guidance_scale": scale, **(self._guided(negative()) if scale > 1 else {})}

    def _guided(self, negative: Condition) -> dict[str, Any]:
        """The negative condition under the names of the pipeline's arguments."""
        return {f"negative_{name}": value for name, value in self._arguments(negative).items()}

    def _media(self, output: Any) -> list[Medium]:
        """The pipeline's output -> media."""
        raise NotImplementedError

    def _ready(self, condition: Condition) -> Condition:
        """On the pipeline's device and dtype, masks 0 or 1 with one position at least."""
        ready = {name: value.to(self.device, self.dtype) for name, value in condition.items()}
        for name in self.masks.values():
            ready[name] = _binary(ready[name])
        return ready

    @torch.no_grad()
    def _encode(self, read: Callable[[Any], Condition], words: Any) -> Condition:
        """float32, and zero where a mask says that nobody looks."""
        condition = {name: value.float() for name, value in read(words).items()}
        for sequence, mask in self.masks.items():
            condition[sequence] = condition[sequence] * condition[mask][..., None]
        return condition

    def _read_negative(self, caption: str) -> Condition:
        """What the pipeline makes of the caption to lead away from."""
        return self._read([caption])

    def _zeros(self, num: int) -> Condition:
        """The condition of pipelines whose absent caption is no caption at all."""
        return {
            name: torch.zeros(num, *shape, device=self.device)
            for name, shape in self.condition_shapes.items()
        }

    def _read(self, captions: Sequence[str]) -> Condition:
        """What the pipeline makes of captions; here the common way of tokenizer, T5, padding."""
        pipeline = self.pipeline
        tokens = pipeline.tokenizer(
            [self._clean(caption) for caption in captions],
            padding="max_length",
            max_length=self.config.max_caption_tokens,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        mask = tokens.attention_mask
        states = pipeline.text_encoder(tokens.input_ids, attention_mask=mask)[0].float()
        condition = {"prompt_embeds": states * mask[..., None]}
        return condition | {name: mask.float() for name in self.masks.values()}

    def _callbacks(
        self,
        known: Container[str],
        on_step: OnStep | None,
        on_preview: OnPreview | None,
        strength: float,
    ) -> dict[str, Any]:
        """Our callbacks under the name that this pipeline has for one. An exception from it leaves
        the denoising loop at once; the next call sets the scheduler's state anew."""
        if on_step is None and on_preview is None:
            return {}

        def tell(done: int, steps: int, latents: Tensor) -> None:
            shown = {steps * part // _PREVIEWS for part in range(1, _PREVIEWS)}
            if on_preview and done in shown and (preview := self._preview(latents)):
                on_preview(preview)
            if on_step:
                on_step(done, steps)

        def callback(pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            tell(step + 1, pipe.num_timesteps, tensors["latents"])  # of a higher order: more calls
            return tensors

        def legacy(step: int, _time: Any, latents: Tensor) -> None:
            steps = int(self.config.steps * strength)
            tell(min(step + 1, steps), steps, latents)

        if "callback_on_step_end" in known:
            return {"callback_on_step_end": callback}
        return {"callback": legacy}

    def _check(self, condition: Condition, num: int) -> None:
        """Exactly the tensors of `condition_shapes`, one row per medium, one row at least."""
        got = {name: tuple(value.shape) for name, value in condition.items()}
        want = {name: (num, *shape) for name, shape in self.condition_shapes.items()}
        if num < 1 or got != want:
            raise ValueError(
                f"{self.modality}: expected a condition {want} for {num} media, as the configs in "
                f"{self.folder} say, got {got}; was the output projection trained for another "
                "decoder, or is a generator missing?"
            )


def check_folder(folder: Path, pipelines: Sequence[str]) -> str:
    """Which of these pipelines the folder holds, whole and free of pickle; else AssetError. Reads
    no weights."""
    index = read_index(folder)
    found = str(index.get("_class_name"))
    if found not in pipelines:
        raise AssetError(
            f"{folder}: holds a {found}, but this type of decoder takes {' or '.join(pipelines)}"
        )
    for name, (_, kind) in parts_of(index, folder).items():
        part = folder / name
        if not part.is_dir():
            raise AssetError(f"{folder}: {name} ({kind}) is missing; is the copy complete?")
        files = {file.suffix for file in part.iterdir()}
        if (part / "config.json").is_file():
            with wrap_errors(AssetError, part / "config.json"):
                told = json.loads((part / "config.json").read_text(encoding="utf-8"))
            check_attention(told, part / "config.json")
        if ".safetensors" not in files and files & set(PICKLE_SUFFIXES):
            raise AssetError(
                f"{part}: holds pickled weights only, which could run code and are not read here; "
                "if you trust them, convert the pipeline once:\n  python -c "
                + shlex.quote(_CONVERT.format(folder=str(folder.resolve())))
            )
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says of itself and of its parts."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise AssetError(f"{folder}: no model_index.json; expected the folder of a pipeline")
    with wrap_errors(AssetError, index):
        found = json.loads(index.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise AssetError(f"{index}: expected an object, got {quoted(found)}")
        return found


def parts_of(index: dict[str, Any], folder: Path) -> dict[str, tuple[str, str]]:
    """Part -> library and class, of what a pipeline's folder says; AssetError for a library that is
    none of diffusers, transformers and mmllm's codecs: code that somebody brings is not run."""
    parts: dict[str, tuple[str, str]] = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[:1] in ([], [None]):
            continue
        if len(entry) != 2 or not all(isinstance(word, str) for word in (name, *entry)):
            continue
        library, kind = entry
        known = library == _CODECS or library.isidentifier()
        if not (known and name.isidentifier() and kind.isidentifier()):
            raise AssetError(
                f"{folder}: {quoted(name)} is {quoted(kind)} of {quoted(library)}, which is not of "
                "diffusers or transformers; code that comes with a pipeline is not run"
            )
        if (folder / name / f"{library}.py").exists():
            raise AssetError(
                f"{folder / name}: brings {library}.py; code that comes with a pipeline is not run"
            )
        parts[name] = library, kind
    return parts


def load_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """`DiffusionPipeline.from_pretrained`, safetensors only, our own codecs registered first,
    every part frozen."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if any(library == _CODECS for library, _ in parts_of(read_index(folder), folder).values()):
        importlib.import_module(_CODECS)
    told = f"{folder}: the pipeline cannot be loaded"
    with wrap_errors(AssetError, told), _quietly(), remote_code_disabled():
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder), use_safetensors=True, dtype=dtype, trust_remote_code=False
        )
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return pipeline


def meta_components(folder: Path) -> dict[str, torch.nn.Module]:
    """Every network of a pipeline's folder by name, on the meta device: its configs are read, its
    weights are not. (Our own codecs, which are small, compute tables as they are made: these are on
    the CPU.) Raises AssetError for a part that its config does not make."""
    import diffusers
    import transformers

    made: dict[str, torch.nn.Module] = {}
    for name, (library, kind) in parts_of(read_index(folder), folder).items():
        cls: Any
        if library == _CODECS:
            cls = getattr(importlib.import_module(library), kind)
        elif library == "transformers":
            cls = getattr(transformers, kind)
        else:  # some parts are named by the package of their pipeline
            cls = getattr(diffusers, kind, None) or getattr(
                importlib.import_module(f"diffusers.pipelines.{library}"), kind
            )
        if not issubclass(cls, torch.nn.Module):
            continue
        try:
            with torch.device("cpu" if library == _CODECS else "meta"):
                made[name] = _hollow(cls, str(folder / name))
        except (OSError, ValueError, TypeError) as error:
            raise AssetError(f"{folder / name}: makes no {kind}: {error}") from error
    return made


def _hollow(cls: Any, folder: str) -> torch.nn.Module:
    """A class of transformers or of diffusers -> the network of a folder's config."""
    if hasattr(cls, "config_class"):
        return cls(cls.config_class.from_pretrained(folder))
    return cls.from_config(cls.load_config(folder))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without progress bars of seconds, and without the warnings that a codec is one of ours or
    that diffusers will not develop a pipeline further; others, such as weights that do not fit,
    stay."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    def telling(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        ours = "Expected types for" in message and "mmllm." in message
        return not ours and "has been deprecated and will not receive" not in message

    libraries = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    log = logging.getLogger("diffusers.pipelines.pipeline_utils")
    log.addFilter(telling)
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        log.removeFilter(telling)
        for library in shown:
            library.enable_progress_bar()


def _folder(weights: str) -> Path:
    """The pipeline's folder; a hub id is downloaded (configs and safetensors) or found cached."""
    folder = Path(locate(weights, "decoders weights"))
    if folder.is_dir():
        return folder
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(weights, use_safetensors=True))
    except (OSError, ValueError) as error:
        raise AssetError(
            f"decoders weights: {weights!r} is no folder here and cannot be fetched from the hub: "
            f"{str(error).splitlines()[0]}; give a folder, correct the id, or log in with `hf auth "
            "login` if it is gated"
        ) from error


@functools.cache
def _present_name(option: str) -> str:
    """The name that an option of a call has now; a former one is warned of, once."""
    if option in RENAMED_OPTIONS:
        logger.warning("decoder option %s is now called %s", option, RENAMED_OPTIONS[option])
    return RENAMED_OPTIONS.get(option, option)


def _one_of_many(on_step: OnStep, row: int, num: int) -> OnStep:
    """Steps of one medium told as a part of the steps of all."""
    return lambda step, steps: on_step(row * steps + step, num * steps)


def _binary(mask: Tensor) -> Tensor:
    """float[M, P] -> 0 or 1; where nothing is above 0.5, the highest position is kept, because
    attention over no position is not defined. Tied to its input by a gradient of zero, so that a
    distributed reducer never waits for the part that predicts it."""
    real = mask > 0.5
    best = F.one_hot(mask.argmax(-1), mask.shape[-1]).bool()
    real = real | (best & ~real.any(-1, keepdim=True))
    return real.to(mask.dtype) + 0.0 * mask
