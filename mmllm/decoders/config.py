"""Configs that decoder families share, and which of their fields one call may override."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from mmllm.config import RENAMED_OPTIONS
from mmllm.decoders.lora_config import DecoderLoraConfig
from mmllm.errors import ConfigError, quoted

logger = logging.getLogger(__name__)

CALL_OPTIONS = (
    *("steps", "guidance", "negative_prompt", "scheduler", "cache", "init_media", "strength"),
    *("references", "noise", "keep", "seconds", "frames", "fps", "height", "width"),
)
"""Fields that one call may override, in the order in which they are listed to users."""
SAMPLING_FIELDS = (
    *("weights", "steps", "guidance", "negative_prompt", "scheduler", "init_media", "strength"),
    *("references", "noise", "keep", "cache", "cache_threshold", "offload", "text_encoder"),
    *("quantization", "compile", "lora", "lora_scale", "train_lora", "vae_slicing", "shift"),
    *("lyrics", "vocal_language", "conditioning_scale", "guidance_2"),
)
"""Fields that change neither the encoding of captions nor that of media; fingerprints omit them."""

_COUNTS = {"steps", "max_caption_tokens", "frames", "height", "width", "window"}
_MAX_RATES = {"seconds": 600.0, "fps": 1000.0}
"""Positive real field -> its upper limit for every pipeline."""


@dataclass(frozen=True)
class DecoderConfig:
    """Fields of every decoder.

    Attributes:
        weights: a diffusers folder, a hub id, or `mini:…`.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 or less switches it off.
        negative_prompt: the caption to guide away from.
        scheduler: the name of another solver (mmllm.decoders.schedules); None: the pipeline's own.
        dtype: of the pipeline's weights.
        cache: what is kept from step to step (mmllm.decoders.caching).
        cache_threshold: the change up to which `first_block` reuses a step.
        offload: components of the pipeline are on the accelerator only while they compute: `model`
            one after the other, `group` block by block, the next one while one computes,
            `sequential` layer by layer, with the least memory and the most time.
        noise: `last` begins with the noise of the newest medium of the conversation that this
            decoder made, if there is one; `new`: with its own.
        keep: the share of the condition of that medium that is kept, from 0 to 1; known of media
            that the same process has made and still holds.
        text_encoder: `llm` where the pipeline's text encoder is the very model that is the system's
            LLM: its weights are then used, the pipeline's copy is not loaded; `own`: that copy.
        quantization: `fp8` stores the denoiser's large weights in 8 bits and computes in `dtype`;
            `4bit` (NF4) and `8bit` (LLM.int8) pack its linear layers by bitsandbytes.
        vae_tiling: the codec works in tiles: less memory for large media, and seams that are
            blended.
        vae_slicing: the codec takes the media of a batch one by one.
        compile: the denoiser's blocks are compiled, at the first step of each size.
        lora: a `.safetensors` file with a LoRA of the denoiser, which is added to its weights.
        lora_scale: the factor of what it adds.
        train_lora: a LoRA of the denoiser that a stage can train, as `decoders.KEY.lora.*`.
    """

    weights: str
    steps: int = 20
    guidance: float = 3.0
    negative_prompt: str = ""
    scheduler: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cache: Literal["first_block", "pyramid_attention", "taylorseer", "text_kv"] | None = None
    cache_threshold: float = 0.05
    offload: Literal["none", "model", "group", "sequential"] = "none"
    text_encoder: Literal["own", "llm"] = "own"
    noise: Literal["new", "last"] = "new"
    keep: float = 0.0
    quantization: Literal["fp8", "4bit", "8bit"] | None = None
    vae_tiling: bool = False
    vae_slicing: bool = False
    compile: bool = False
    lora: str | None = None
    lora_scale: float = 1.0
    train_lora: DecoderLoraConfig | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError unless every count is at least 1 and every length is positive, of the
        fields that a family adds, too."""
        values: dict[str, Any] = vars(self)
        if not 0 <= self.keep <= 1:
            raise ConfigError(f"keep: expected from 0 to 1, got {self.keep}")
        check_choice("noise", self.noise, ("new", "last"))
        for name, value in values.items():
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name}: expected a finite number, got {value}")
            if name in _MAX_RATES and value <= 0:
                raise ConfigError(f"{name}: expected more than 0, got {value}")
            if name in _MAX_RATES and value > _MAX_RATES[name]:
                raise ConfigError(f"{name}: expected at most {_MAX_RATES[name]:g}, got {value}")
            if name in _COUNTS and not isinstance(value, Integral):
                raise ConfigError(f"{name}: expected a whole number, got {quoted(value)}")
            if name in _COUNTS and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")


@dataclass(frozen=True)
class InitMediaConfig(DecoderConfig):
    """Fields of decoders that can start from a medium.

    Attributes:
        init_media: `last` starts from the newest medium of the decoder's initial modality in the
            conversation, if there is one; `none` starts from noise alone.
    """

    init_media: Literal["none", "last"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init_media", self.init_media, ("none", "last"))


@dataclass(frozen=True)
class Img2ImgConfig(InitMediaConfig):
    """Fields of decoders that add noise to the initial medium (SDEdit, Meng et al. 2021).

    Attributes:
        strength: the share of the steps that are run, from the noise level that belongs there: 1
            keeps next to nothing of the medium, 0.3 its colours and composition.
    """

    strength: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.strength <= 1:
            raise ConfigError(f"strength: expected more than 0, at most 1, got {self.strength}")


@dataclass(frozen=True)
class ReferenceConfig(DecoderConfig):
    """Fields of decoders that pictures of the conversation condition besides the caption.

    Attributes:
        references: `auto`: the pictures of the last message of the user, or else the newest one of
            the conversation; `all`: all of the conversation; the newest ones where there are more
            than the pipeline takes; `none`: no picture.
    """

    references: Literal["none", "auto", "all"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("references", self.references, ("none", "auto", "all"))


@dataclass(frozen=True)
class SequenceConfig(DecoderConfig):
    """Fields of decoders that take captions of any length.

    Attributes:
        max_caption_tokens: P, the positions of the condition; longer captions are cut.
    """

    max_caption_tokens: int = 24


@dataclass(frozen=True)
class ImageConfig(DecoderConfig):
    """Fields of every image decoder.

    Attributes:
        height: pixels; None: the pipeline's default.
        width: pixels; None: the pipeline's default.
    """

    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class VideoConfig(DecoderConfig):
    """Fields of every video decoder.

    Attributes:
        frames: frames of a video.
        fps: frames per second.
        height: pixels; None: the pipeline's default.
        width: pixels; None: the pipeline's default.
    """

    frames: int = 16
    fps: float = 8.0
    height: int | None = None
    width: int | None = None


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless a field has one of its values.

    Args:
        name: of the field.
        value: of the field.
        choices: what it may be.
    """
    if value not in choices:
        expected = ", ".join(choices[:-1]) + f" or {choices[-1]}"
        raise ConfigError(f"{name}: expected {expected}, got {quoted(value)}")


@functools.cache
def current_option_name(option: str) -> str:
    """Return the current name of an option; a former name is warned of, once.

    Args:
        option: as a caller gave it.
    """
    if option in RENAMED_OPTIONS:
        logger.warning("decoder option %s is now called %s", option, RENAMED_OPTIONS[option])
    return RENAMED_OPTIONS.get(option, option)
