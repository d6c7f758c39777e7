"""Denoisers whose linear layers are packed in 4 or 8 bits by bitsandbytes."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmllm.errors import ConfigError
from mmllm.utils.extras import import_extra

DENOISERS = ("transformer", "transformer_2", "unet")
"""Components that a pipeline calls at each step."""
PACKED = {"4bit": 4.127 / 8, "8bit": 1.0}
"""Bytes of a packed weight; 0.127 bits are the constants (Dettmers et al. 2023, section 3)."""


def check_quantization(config: Any, where: str) -> None:
    """Check that a decoder's other options allow packed weights.

    Args:
        config: the decoder's config.
        where: the decoder, for the message.

    Raises:
        ConfigError: bitsandbytes is missing, or `offload` moves single layers.
    """
    if config.quantization not in PACKED:
        return
    needed_by = f"{where}: quantization {config.quantization}"
    import_extra("bitsandbytes", extra="quantization", needed_by=needed_by)
    if config.offload in ("group", "sequential"):
        raise ConfigError(
            f"{where}: offload {config.offload} moves single layers, which packed weights do not "
            "allow: expected offload none or model, or quantization fp8 or null, got "
            f"{config.quantization}"
        )


def pack(denoiser: nn.Module, quantization: str) -> None:
    """Replace the linear layers of a denoiser on the CPU; they are packed when it is moved to its
    device, the CPU included.

    Args:
        denoiser: changed in place. Layers that its class keeps in float32 stay.
        quantization: `4bit`: NF4 with its constants quantised (Dettmers et al. 2023); `8bit`:
            LLM.int8 (Dettmers et al. 2022).
    """
    kept = tuple(getattr(denoiser, "_keep_in_fp32_modules", None) or ())
    for name, layer in list(denoiser.named_modules()):
        if type(layer) is nn.Linear and not any(part in name.split(".") for part in kept):
            denoiser.set_submodule(name, _packed(layer, quantization))


def _packed(layer: nn.Linear, quantization: str) -> nn.Module:
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    weight = layer.weight.detach()
    if quantization == "4bit":
        kind = {"quant_type": "nf4"}
        made = layers.Linear4bit(*sizes, compute_dtype=weight.dtype, device="meta", **kind)
        made.weight = layers.Params4bit(weight, requires_grad=False, **kind)
    else:
        made = layers.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        made.weight = layers.Int8Params(weight, requires_grad=False)
    made.bias = layer.bias
    return made.eval()
