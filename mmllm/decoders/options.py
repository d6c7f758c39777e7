"""Options of a loaded pipeline, by diffusers' own means: a LoRA, weights in 8 bits, a codec that
works in parts, compilation, offload.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmllm.decoders.quantization import DENOISERS, pack
from mmllm.errors import AssetError, ConfigError, quoted, wrap_errors

COMPILE_OPTIONS: dict[str, Any] = {}
"""Arguments of torch.compile."""

_SUFFIX = ".safetensors"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def apply_options(pipeline: Any, config: Any, trained: Any = None) -> None:
    """Apply a decoder's options to its pipeline, which was just loaded.

    Args:
        pipeline: the pipeline of diffusers, changed in place.
        config: the decoder's config.
        trained: the `DecoderLora` that trains, or was trained.

    Raises:
        ConfigError: the pipeline does not support an option.
        AssetError: the file of an adapter cannot be read.
    """
    if config.lora is not None:
        merge_lora(pipeline, config.lora, config.lora_scale)
    if trained is not None:
        trained.bind(pipeline)
    for option in ("tiling", "slicing"):
        if getattr(config, f"vae_{option}"):
            _enable_codec(pipeline, option)
    for denoiser in denoisers(pipeline):
        if config.quantization == "fp8":
            denoiser.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=denoiser.dtype
            )
        elif config.quantization is not None:
            pack(denoiser, config.quantization)
        if config.compile:
            _compile(denoiser)


def denoisers(pipeline: Any) -> list[Any]:
    """Return the networks that the pipeline calls at each step.

    Args:
        pipeline: the pipeline of diffusers.
    """
    parts = (pipeline.components.get(name) for name in DENOISERS)
    return [part for part in parts if isinstance(part, nn.Module)]


def check_gradient(modality: str, config: Any, pipeline: Callable[[], Any]) -> None:
    """Raise ConfigError if an option takes away what the gradient of the denoising loss needs.

    Args:
        modality: the decoder's modality, for the message.
        config: its config.
        pipeline: gives its pipeline; called only where that decides.
    """
    if config.offload != "none":
        raise ConfigError(
            f"{modality}: offload {config.offload!r} takes weights away that the gradient needs; "
            "train with offload none, or without the loss 'denoise'"
        )
    if config.quantization is None:
        return
    for denoiser in denoisers(pipeline()):
        for name, module in denoiser.named_modules():
            if isinstance(module, _CONVOLUTIONS) and module.weight.dtype == torch.float8_e4m3fn:
                raise ConfigError(
                    f"{modality}: quantization {config.quantization!r} casts {name}, a "
                    "convolution, back before the gradient has passed it; train with "
                    "quantization null, or without the loss 'denoise'"
                )


def enable_offload(pipeline: Any, how: str, device: torch.device) -> None:
    """Keep the weights of a pipeline off the accelerator while they are not needed.

    Args:
        pipeline: the pipeline of diffusers, changed in place.
        how: `model`, `sequential` or `group`, see DecoderConfig.
        device: the accelerator.
    """
    if how == "group":
        pipeline.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",
        )
    else:
        getattr(pipeline, f"enable_{how}_cpu_offload")(device=device)


def merge_lora(pipeline: Any, file: str, scale: float) -> None:
    """Add a LoRA (Hu et al. 2021) of the denoiser to its weights: no step takes longer.

    Args:
        pipeline: the pipeline of diffusers, changed in place.
        file: a `.safetensors` file in any of the formats that the pipeline's own loader reads.
        scale: the factor of what it adds.

    Raises:
        AssetError: there is no such file, or it does not fit the pipeline.
        ConfigError: the pipeline has no loader, or the LoRA also changes how captions are encoded.
    """
    path, kind = Path(file).expanduser(), type(pipeline).__name__
    if path.suffix != _SUFFIX or not path.is_file():
        raise AssetError(f"lora: {quoted(file)} is no {_SUFFIX} file; expected the path of one")
    if not hasattr(pipeline, "load_lora_weights"):
        raise ConfigError(f"lora: diffusers loads none into a {kind}; leave lora out")
    where = {"pretrained_model_name_or_path_or_dict": str(path.parent), "weight_name": path.name}
    with wrap_errors(AssetError, f"lora: {path} does not fit a {kind}"):
        state = pipeline.lora_state_dict(**where, use_safetensors=True)
        names = state[0] if isinstance(state, tuple) else state
        if any(name.startswith("text_encoder") for name in names):
            raise ConfigError(
                f"lora: {path} also changes the text encoder, so that captions would no longer be "
                "encoded as those that projections learned from; expected one of the denoiser alone"
            )
        pipeline.load_lora_weights(
            str(path.parent), weight_name=path.name, use_safetensors=True, adapter_name="lora"
        )
        if not pipeline.get_active_adapters():
            raise AssetError(f"lora: {path} has no weights for a {kind}")
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    for denoiser in denoisers(pipeline):
        denoiser.requires_grad_(False).eval()


def _enable_codec(pipeline: Any, option: str) -> None:
    """Switch on `tiling` or `slicing` of the codec."""
    codec = pipeline.components.get("vae")
    try:
        getattr(codec, f"enable_{option}")()
    except (AttributeError, NotImplementedError) as error:
        raise ConfigError(
            f"vae_{option}: a {type(codec).__name__} has no {option}; leave vae_{option} out"
        ) from error


def _compile(denoiser: Any) -> None:
    """Compile the repeated blocks of a denoiser, or all of it where it names none."""
    if getattr(denoiser, "_repeated_blocks", None):
        denoiser.compile_repeated_blocks(**COMPILE_OPTIONS)
    else:
        denoiser.compile(**COMPILE_OPTIONS)
