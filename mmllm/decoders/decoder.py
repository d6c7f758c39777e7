"""What all decoders share: encoding captions and media, the denoising loss, sampling.

Legend: M media, S shape of the latents of one medium.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from mmllm.conversation import MEDIA, Image, Medium
from mmllm.decoders.caching import check_cache, step_cache, usable_caches
from mmllm.decoders.callbacks import callback_kwargs, scheduler_reports, step_of_batch
from mmllm.decoders.condition import binary_mask, check_condition, zero_masked
from mmllm.decoders.config import CALL_OPTIONS, DecoderConfig, current_option_name
from mmllm.decoders.contract import Condition, DecoderContract, OnPreview, OnStep
from mmllm.decoders.editing import EditMedia, denoise_each
from mmllm.decoders.fingerprints import pipeline_fingerprint
from mmllm.decoders.img2img import check_strength
from mmllm.decoders.loading import (
    PipelineRuntime,
    check_pipeline_folder,
    load_pipeline,
    resolve_folder,
)
from mmllm.decoders.options import apply_options, check_gradient
from mmllm.decoders.quantization import check_quantization
from mmllm.decoders.schedules import add_training_noise, find_solver
from mmllm.errors import AssetError, ConfigError, MediaError, wrap_errors
from mmllm.media.preprocessing import preprocessing
from mmllm.utils.hints import did_you_mean


class ModalityDecoder(DecoderContract):
    """A frozen diffusion pipeline that turns a condition into media, one `sample` at a time.

    No nn.Module, for its weights are in no checkpoint. The pipeline is loaded on first use.
    """

    def __init__(self, config: DecoderConfig):
        """Check the folder and the config, but no weights. Raises AssetError and ConfigError."""
        self.config: Any = config
        self.folder = resolve_folder(config.weights)
        self.pipeline_class = self.check_folder()
        check_cache(config.cache, self.pipeline_class)
        check_quantization(config, self.modality)
        self.runtime = PipelineRuntime(
            self.folder,
            name=self.modality,
            dtype=getattr(torch, config.dtype),
            offload=config.offload,
            solver=self._solver(),
            on_loaded=self.on_loaded,
            needs_llm=config.text_encoder == "llm",
            load=self.load_folder,
        )
        self._negative: dict[str, Condition] = {}  # the latest negative prompt, encoded
        self.configure()

    # --- The pipeline ----------------------------------------------------------------------------

    def check_folder(self) -> str:
        return check_pipeline_folder(self.folder, self.pipelines)

    def load_folder(self, dtype: torch.dtype, text_encoder: Any) -> Any:
        pipeline = load_pipeline(self.folder, dtype, text_encoder=text_encoder)
        apply_options(pipeline, self.config, self.lora)
        return pipeline

    @property
    def pipeline(self) -> Any:
        return self.runtime.pipeline

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    @property
    def dtype(self) -> torch.dtype:
        return self.runtime.dtype

    @property
    def is_loaded(self) -> bool:
        """Whether the pipeline is in memory."""
        return self.runtime.is_loaded

    def share_text_encoder(self, llm: Any, where: str) -> None:
        """Encode captions by the system's language model, if `text_encoder: llm` asks for it.

        Args:
            llm: the `LanguageModel`.
            where: this decoder's key in the config, for errors.

        Raises:
            ConfigError: it is not the model that the pipeline was trained with.
        """
        if self.config.text_encoder == "llm":
            self.runtime.share_text_encoder(llm, where)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the pipeline, now if it is loaded, else when it is.

        Args:
            device: the device that samples.
            dtype: the dtype of its weights; None: that of the config.
        """
        self.runtime.move(torch.device(device), dtype or getattr(torch, self.config.dtype))
        self._negative.clear()
        return self

    def release(self) -> None:
        """Drop the loaded pipeline; the next use loads it again."""
        self.runtime.release()
        self._negative.clear()

    def component_config(self, name: str) -> dict[str, Any]:
        folder = self.folder / name
        for file in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
            if (folder / file).is_file():
                with wrap_errors(AssetError, folder / file):
                    return dict(json.loads((folder / file).read_text(encoding="utf-8")))
        raise AssetError(f"{folder}: no config found; this decoder needs the pipeline's {name}")

    @property
    def fingerprint(self) -> str:
        """The hash of all that decides how captions and media are encoded, not how it samples."""
        return pipeline_fingerprint(type(self).__name__, self.config, self.folder)

    @property
    def caption_fingerprint(self) -> str:
        """`fingerprint`, with the dtype in which captions are encoded where that is the language
        model's and not the pipeline's."""
        encoder = self.runtime.text_encoder
        dtype = getattr(torch, self.config.dtype) if encoder is None else encoder.caption_dtype
        if dtype == getattr(torch, self.config.dtype):
            return self.fingerprint
        return f"{self.fingerprint}-{str(dtype).removeprefix('torch.')}"

    # --- Options of one call ---------------------------------------------------------------------

    @property
    def request_options(self) -> tuple[str, ...]:
        """Fields of the config that one call of `sample` may override."""
        fields = {entry.name for entry in dataclasses.fields(self.config)}
        fields -= set() if self.init_modality else {"init_media", "strength"}
        fields -= set() if self.max_references else {"references"}
        fields -= set() if usable_caches(self.pipeline_class) else {"cache"}
        return tuple(name for name in CALL_OPTIONS if name in fields)

    def with_overrides(self, **options: Any) -> Self:
        """A copy of this decoder with other options, on the same pipeline.

        Args:
            options: of `request_options`; None keeps the config's value.

        Returns:
            A decoder whose `config`, `output_spec()` and `sample` follow the options.

        Raises:
            ConfigError: for an unknown option, and for a value that the pipeline cannot take.
        """
        options = {
            current_option_name(name): value for name, value in options.items() if value is not None
        }
        for name in options.keys() - set(self.request_options):
            known = [*self.request_options, *(["mask"] if self.takes_mask else [])]
            takes = f"this decoder takes {', '.join(known)}{did_you_mean(name, known)}"
            raise ConfigError(f"{self.modality}: unknown option {name!r}; {takes}")
        try:
            config = dataclasses.replace(self.config, **options)
        except TypeError as error:
            raise ConfigError(f"{self.modality}: {options}: {error}") from error
        if config.steps < (least := self.min_steps):
            raise ConfigError(f"steps: expected at least {least}, got {config.steps}")
        if options.get("negative_prompt") and config.guidance <= 1:
            raise ConfigError(
                f"{self.modality}: a negative prompt does nothing at guidance "
                f"{config.guidance:g}; give more than 1, or no negative prompt"
            )
        check_cache(config.cache, self.pipeline_class)
        decoder = copy.copy(self)
        decoder.config = config
        decoder._solver()
        if "strength" in self.request_options and config.init_media == "last":
            check_strength(self.modality, config)
        decoder.configure()
        return decoder

    def _solver(self) -> tuple[str, dict[str, Any]] | None:
        """Class and settings of the scheduler; None: the pipeline's own. Raises ConfigError."""
        if self.config.scheduler is None:
            return None
        own = self.component_config("scheduler")
        return find_solver(own, self.config.scheduler, passes_sigmas=self.passes_sigmas)

    # --- Encoding --------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> Condition:
        """Encode captions by the pipeline's own text encoders: the targets of alignment.

        M >= 1 captions -> float32[M, ...]. Embeddings at masked positions, which no pipeline
        attends to, are zero, so that targets are well defined.
        """
        if not captions:
            raise ValueError(f"{self.modality}: no captions; expected at least one")
        with self.runtime.offload_scope():
            return zero_masked(self.encode_prompt(list(captions)), self.masks)

    @torch.no_grad()
    def unconditional(self, num: int) -> Condition:
        """The condition of the negative prompt, for guidance: float32[num, ...]."""
        prompt: str = self.config.negative_prompt
        if prompt not in self._negative:
            with self.runtime.offload_scope():
                encoded = zero_masked(self.encode_negative_prompt(prompt), self.masks)
            self._negative.clear()
            self._negative[prompt] = encoded
        condition = self._negative[prompt]
        return {name: value.expand(num, *value.shape[1:]) for name, value in condition.items()}

    def zero_condition(self, num: int) -> Condition:
        """The condition of pipelines that were trained with zeros for the absent caption."""
        return {
            name: torch.zeros(num, *shape, device=self.device)
            for name, shape in self.condition_shapes.items()
        }

    def prepare_condition(self, condition: Condition) -> Condition:
        """The condition on the pipeline's device and in its dtype, masks 0 or 1 with at least one
        position."""
        ready = {name: value.to(self.device, self.dtype) for name, value in condition.items()}
        for name in self.masks.values():
            ready[name] = binary_mask(ready[name])
        return ready

    def preprocess(self, medium: Medium) -> Tensor:
        """A medium of this modality -> one row of `encode_media`'s input, on the CPU. Raises
        MediaError."""
        if not isinstance(medium, MEDIA[self.modality]):
            raise MediaError(f"the {self.modality} decoder cannot take {medium!r}")
        with preprocessing(medium, f"the {self.modality} decoder"):
            return self.to_tensor(medium)

    @torch.no_grad()
    def encode_media(self, samples: Tensor) -> Tensor:
        """Preprocessed media [M, ...] -> normalised latents float32[M, *S], the same for the same
        medium and so cacheable."""
        with self.runtime.offload_scope():
            latents = self.encode_latents(samples.to(self.device, self.dtype))
            return self.normalize_latents(latents).float()

    # --- Training --------------------------------------------------------------------------------

    def denoising_loss(
        self,
        condition: Condition,
        latents: Tensor,
        *,
        noise: Tensor,
        times: Tensor,
        min_snr: float | None = None,
        references: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The pipeline's own training loss, per medium: float[M].

        Mean squared error to the target that the scheduler's config prescribes. The gradient
        reaches the condition's embeddings; masks are binary here as in sampling, and get a gradient
        of zero.

        Args:
            condition: M conditions.
            latents: float[M, *S], normalised.
            noise: float[M, *S].
            times: float[M] in (0, 1), 1 = noise.
            min_snr: gamma of min-SNR weighting (Hang et al. 2023); None: no weights.
            references: of each medium the latents of its references, float[R, *S], R may be 0;
                None: no medium has any.
        """
        if torch.is_grad_enabled():
            check_gradient(self.modality, self.config, lambda: self.pipeline)
        latents, noise, times = (
            tensor.to(self.device, torch.float32) for tensor in (latents, noise, times)
        )
        check_condition(self, condition, len(latents))
        step = add_training_noise(self.pipeline.scheduler, latents, noise, times)
        ready, inputs = self.prepare_condition(condition), step.inputs.to(self.dtype)
        if references is None and not self.samples_one_by_one:
            predicted = self.denoise(ready, inputs, step.timesteps)
        else:
            predicted = denoise_each(self, ready, inputs, step.timesteps, references)
        predicted = predicted[:, : latents.shape[1]]  # some models also predict a variance
        losses = (predicted.float() - step.target).square().flatten(1).mean(1)
        return losses if min_snr is None else losses * step.min_snr_weights(min_snr)

    # --- Sampling --------------------------------------------------------------------------------

    def sample(
        self,
        condition: Condition,
        *,
        generators: Sequence[torch.Generator],
        init_media: Sequence[Medium] | None = None,
        masks: Sequence[Image] | None = None,
        references: Sequence[Sequence[Medium]] | None = None,
        on_step: OnStep | None = None,
        on_preview: OnPreview | None = None,
        options: Mapping[str, Any] | None = None,
        negative: Condition | None = None,
    ) -> list[Medium]:
        """Run the pipeline on a batch of conditions.

        Args:
            condition: M >= 1 conditions.
            generators: one per medium, of the noise.
            init_media: one medium of `init_modality` each, to start from instead of noise alone.
            masks: of each initial image what may change, white on black; the other pixels stay.
            references: of each medium the images that it is conditioned on besides its condition.
            on_step: called after every step; may raise Cancelled.
            on_preview: called a few times with images, by decoders that have previews.
            options: overrides of the config for this call; see `with_overrides`.
            negative: M conditions to guide away from, unless `options` have a negative prompt;
                None: that of the config's negative prompt.

        Returns:
            M media of `modality`.

        Raises:
            ConfigError: for options that the pipeline cannot take.
            MediaError: for a mask that has not the size of its picture.
            ValueError: for a condition of another decoder, or a wrong number of initial media.
        """
        decoder = self.with_overrides(**(options or {}))
        if (options or {}).get("negative_prompt"):
            negative = None
        media = EditMedia(init_media, masks, references)
        return decoder._sample(condition, generators, media, on_step, on_preview, negative)

    @torch.no_grad()
    def _sample(
        self,
        condition: Condition,
        generators: Sequence[torch.Generator],
        media: EditMedia,
        on_step: OnStep | None,
        on_preview: OnPreview | None,
        negative: Condition | None,
    ) -> list[Medium]:
        """`sample` by the options in `self.config`."""
        num, config = len(generators), self.config
        for each in (condition, negative):
            if each is not None:
                check_condition(self, each, num)
        media.check(self, num)
        if num > 1 and media.is_one_by_one(self):
            return [
                medium
                for row in range(num)
                for medium in self._sample(
                    {name: value[row : row + 1] for name, value in condition.items()},
                    generators[row : row + 1],
                    media.row(row),
                    on_step and step_of_batch(on_step, row, num),
                    None,
                    negative and {name: value[row : row + 1] for name, value in negative.items()},
                )
            ]
        with self.runtime.scheduler_scope(self._solver()), self.runtime.offload_scope():
            pipeline, init_kwargs = media.prepare(self)
            parameters = inspect.signature(pipeline).parameters
            kwargs = self.pipeline_kwargs()
            if init_kwargs:  # some img2img pipelines take size and length from the medium
                kwargs = {name: value for name, value in kwargs.items() if name in parameters}
            guidance = self.guidance_kwargs(
                config.guidance, lambda: negative or self.unconditional(num)
            )
            strength = init_kwargs.get("strength", 1.0)
            with (
                step_cache(pipeline, config.cache, config.cache_threshold),
                scheduler_reports(self, pipeline, parameters, on_step, on_preview),
            ):
                output = pipeline(
                    **self.condition_kwargs(condition),
                    **guidance,
                    **kwargs,
                    **init_kwargs,
                    **callback_kwargs(self, parameters, on_step, on_preview, strength),
                    num_inference_steps=config.steps,
                    generator=generators[0] if media.is_one_by_one(self) else list(generators),
                    output_type="np",
                )
            made = self.to_media(output)
        return self.keep_unmasked(made, media.init, media.masks) if media.masks else made
