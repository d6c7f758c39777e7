"""The decoder contract: what a family of diffusers pipelines writes to become a decoder.

A family subclasses ImageDecoder, VideoDecoder or AudioDecoder, which implement the hooks about
media, and writes `pipelines`, `condition_shapes`, `encode_prompt` and `denoise`. All other hooks
have a default that fits most pipelines. `docs/decoders.md` shows a whole family.

Legend: M media, P x E one tensor of the condition, S shape of the latents of one medium.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmllm.conversation import Medium

Condition = dict[str, Tensor]
"""What a pipeline is conditioned on: several tensors by the pipeline's own argument names, one row
per medium. A name that ends in `mask` is a 0/1 mask over the positions P of its sequence; it is
predicted like every other tensor, and counts as 1 above 0.5."""

OnStep = Callable[[int, int], None]
"""Called with (step, number of steps) after each denoising step; may raise Cancelled."""
OnPreview = Callable[[list[Medium]], None]
"""Called with M images decoded from intermediate latents, before OnStep is."""


class Cancelled(Exception):
    """Raised by a callback to stop sampling; the decoder stays usable."""


class DecoderContract(ABC):
    """The hooks of a decoder family, and what they may use.

    Hooks read the options of the current call from `self.config`: a call with options of its own
    runs on a copy of the decoder (`ModalityDecoder.with_overrides`), so nothing has to be passed
    on or restored.
    """

    # --- Declarations ------------------------------------------------------------------------

    modality: ClassVar[str]
    """What the decoder generates: "image", "audio" or "video"."""
    pipelines: ClassVar[Sequence[str]]
    """Names of the diffusers pipeline classes that the family supports."""
    masks: ClassVar[Mapping[str, str]] = {}
    """Sequence tensor -> the mask over its positions, both names of condition tensors."""
    min_steps: ClassVar[int] = 1
    """The smallest number of steps that the pipeline can sample in."""
    passes_sigmas: ClassVar[bool] = False
    """Whether the pipeline passes noise levels of its own to the scheduler, which only Euler's
    accepts."""
    samples_one_by_one: ClassVar[bool] = False
    """Whether the pipeline makes one medium a call, so that batches are split, those of the
    denoising loss included."""
    img2img_class: str = ""
    """Name of the diffusers class with the same components that starts from a medium."""
    init_modality: str = ""
    """Modality of the medium that generation can start from; "" if it cannot."""
    init_one_by_one: bool = False
    """Whether that class takes one medium a call, so that batches are split."""
    inpaint_class: str = ""
    """Name of the diffusers class with the same components that repaints the white part of a mask
    in a medium."""
    max_references: int = 0
    """How many pictures the pipeline can be conditioned on besides the caption; 0: none."""
    min_references: int = 1
    """How many it takes at least, where it takes any."""
    needs_references: bool = False
    """Whether it makes nothing without one."""
    masks_references: bool = False
    """Whether it takes a mask and references in one call."""
    starts_with_references: bool = False
    """Whether it takes a medium to start from, without a mask, and references in one call."""

    @property
    def takes_mask(self) -> bool:
        """Whether a part of a picture can be repainted (`prepare_inpainting`)."""
        return bool(self.inpaint_class)

    # --- Provided by ModalityDecoder ----------------------------------------------------------

    lora: Any = None
    """The `DecoderLora` of the denoiser, if one trains or was trained."""
    config: Any
    """The family's config, with the options of the current call."""
    folder: Path
    """The pipeline's folder on disk."""
    pipeline_class: str
    """Which of `pipelines` the folder holds."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device on which the pipeline is, or will be."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the pipeline's weights."""

    @property
    @abstractmethod
    def pipeline(self) -> Any:
        """The diffusers pipeline, loaded on first use."""

    @property
    @abstractmethod
    def request_options(self) -> tuple[str, ...]:
        """Fields of the config that one call of `sample` may override."""

    @abstractmethod
    def component_config(self, name: str) -> dict[str, Any]:
        """Read the JSON config of one component of the pipeline, without loading weights.

        Args:
            name: the component, such as "vae".

        Returns:
            The config.

        Raises:
            AssetError: the pipeline has no such component, or its config cannot be read.
        """

    @abstractmethod
    def check_folder(self) -> str:
        """Check the folder without reading weights, and return the name of its pipeline's class.

        Raises:
            AssetError: it is incomplete, holds another pipeline, or code that is not run.
        """

    @abstractmethod
    def load_folder(self, dtype: torch.dtype, text_encoder: Any) -> Any:
        """Load the pipeline, with the options of the config. Raises AssetError and ConfigError.

        Args:
            dtype: the dtype of its weights.
            text_encoder: takes the place of the folder's own; None: that.
        """

    # --- Required ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one condition, read from the configs, without weights."""

    @abstractmethod
    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        """Run the pipeline's text encoders.

        Args:
            captions: M captions.

        Returns:
            {name: [M, *condition_shapes[name]]}.
        """

    @abstractmethod
    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Call the transformer or UNet once, exactly as the pipeline does in its loop.

        Args:
            condition: as `prepare_condition` returns it.
            noisy: [M, *S], scaled as the scheduler scales its input.
            timesteps: [M], on the scheduler's clock.

        Returns:
            The raw prediction [M, *S]; channels beyond those of S (a variance) are cut off.
        """

    def denoise_with_references(
        self, condition: Condition, noisy: Tensor, timesteps: Tensor, references: Tensor
    ) -> Tensor:
        """Call the transformer as `denoise` does, for one medium with references. Needed where
        `max_references` is set.

        Args:
            condition: as `prepare_condition` returns it, of one row.
            noisy: [1, *S].
            timesteps: [1].
            references: [R, *S], normalised latents of the references.

        Returns:
            The raw prediction [1, *S].
        """
        raise NotImplementedError

    @abstractmethod
    def to_tensor(self, medium: Any) -> Tensor:
        """Convert a medium to one input of the codec, on the CPU. Any exception becomes a
        MediaError.

        Args:
            medium: a medium of `modality`.
        """

    @abstractmethod
    def to_media(self, output: Any) -> list[Medium]:
        """Convert the output of the pipeline's call to M media.

        Args:
            output: what the pipeline returned.
        """

    # --- Optional: configuration ----------------------------------------------------------------

    def configure(self) -> None:  # noqa: B027 (optional)
        """Derive attributes from `self.config` and the configs of the components.

        It runs in the constructor and for every call with options, and must not load weights.

        Raises:
            ConfigError: the pipeline cannot generate what the config asks for.
        """

    def output_spec(self) -> dict[str, float]:
        """Return what is known beforehand of the generated media.

        Returns:
            `height` and `width` in pixels, `seconds`; those that apply.
        """
        return {}

    def on_loaded(self, pipeline: Any) -> None:  # noqa: B027 (optional)
        """Repair or complete a pipeline that was just loaded.

        Args:
            pipeline: the pipeline of diffusers, changed in place.
        """

    # --- Optional: text ---------------------------------------------------------------------------

    def clean_prompt(self, caption: str) -> str:
        """Return a caption as the pipeline passes it to its tokenizer.

        Args:
            caption: the caption.
        """
        return caption

    def encode_negative_prompt(self, caption: str) -> Condition:
        """Run the pipeline's text encoders on the negative prompt.

        Args:
            caption: the negative prompt, which may be empty.

        Returns:
            The condition, one row per tensor.
        """
        return self.encode_prompt([caption])

    # --- Optional: latents ------------------------------------------------------------------------

    def encode_latents(self, samples: Tensor) -> Tensor:
        """Encode samples with the codec.

        Args:
            samples: outputs of `to_tensor`, stacked: [M, ...].

        Returns:
            The mode of the codec's distribution, so that a medium always has the same latents.
        """
        return self.pipeline.vae.encode(samples).latent_dist.mode()

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """Scale the codec's latents as the denoiser takes them.

        Args:
            latents: [M, ...] of the codec.

        Returns:
            [M, *S].
        """
        return latents * self.pipeline.vae.config.scaling_factor

    def decode_preview(self, latents: Tensor) -> list[Medium] | None:
        """Decode intermediate latents cheaply.

        Args:
            latents: as the pipeline holds them.

        Returns:
            M small images; None: no previews.
        """
        return None

    # --- Optional: arguments of the pipeline's call -----------------------------------------------

    @abstractmethod
    def prepare_condition(self, condition: Condition) -> Condition:
        """Move a condition to the pipeline's device and dtype, and make its masks binary.

        Args:
            condition: as `encode_prompt` or an output projection gives it.
        """

    def condition_kwargs(self, condition: Condition) -> dict[str, Any]:
        """Return the condition by the names of the pipeline's arguments.

        Args:
            condition: as `encode_prompt` or an output projection gives it.
        """
        return self.prepare_condition(condition)

    def negative_kwargs(self, negative: Condition) -> dict[str, Any]:
        """Return the negative condition by the names of the pipeline's arguments.

        Args:
            negative: as `encode_negative_prompt` gives it, with the rows of the condition.
        """
        return {
            f"negative_{name}": value for name, value in self.condition_kwargs(negative).items()
        }

    def guidance_kwargs(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        """Return the pipeline's arguments of classifier-free guidance.

        Args:
            scale: the guidance scale; 1 uses the condition alone.
            negative: computes the negative condition. It is called only if guidance needs it.
        """
        return {"guidance_scale": scale, **(self.negative_kwargs(negative()) if scale > 1 else {})}

    def pipeline_kwargs(self) -> dict[str, Any]:
        """Return all other arguments of the pipeline's call: size, length, frame rate."""
        return {}

    def prepare_img2img(self, media: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """Prepare sampling that starts from media. Needed where `init_modality` is set.

        Args:
            media: M media of `init_modality`.

        Returns:
            The pipeline that starts from them, and the additional arguments of its call.
        """
        raise NotImplementedError

    def prepare_inpainting(
        self, media: Sequence[Any], masks: Sequence[Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Prepare sampling that repaints a part of media. Needed where `takes_mask` is true.

        Args:
            media: M media of `init_modality`.
            masks: M masks of their sizes, white where they may change; of a video in all frames.

        Returns:
            The pipeline that repaints them, and the additional arguments of its call.
        """
        raise NotImplementedError

    def keep_unmasked(
        self, made: Sequence[Medium], media: Sequence[Any] | None, masks: Sequence[Any]
    ) -> list[Medium]:
        """Return the media that were made, with the pixels of the initial ones where masks are
        black. Needed where `takes_mask` is true.

        Args:
            made: M media in our size.
            media: the M media that they were made from.
            masks: M masks of their sizes.
        """
        raise NotImplementedError

    def reference_kwargs(self, references: Sequence[Any], name: str) -> dict[str, Any]:
        """Return references by the names of the pipeline's arguments. Needed where
        `max_references` is set.

        Args:
            references: those of one medium, at most `max_references` images.
            name: of the argument: that of the pipeline that takes a mask has another one.
        """
        raise NotImplementedError
