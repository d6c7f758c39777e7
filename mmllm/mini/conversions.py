"""Conversions of assets: the file of a wheel -> safetensors under the names that mmllm reads.

Raise `assets.CONVERSION` when one of them changes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.utils.quiet import without_bars

if TYPE_CHECKING:
    from torch import Tensor


def convert_smollm2(file: Path, folder: Path) -> None:
    """GGUF -> what `from_pretrained(folder)` of transformers reads, weights in bfloat16."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": file.parent,
        "gguf_file": file.name,
        "trust_remote_code": False,
    }
    # `dequantize` must be asked for: by default the weights stay packed in GGUF blocks.
    with without_bars("transformers.modeling_gguf_pytorch_utils"):
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    # A model that remembers its quantisation refuses to be saved.
    model.hf_quantizer = None  # pyright: ignore[reportArgumentType]
    for memory in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, memory):
            delattr(model.config, memory)
    model.is_quantized = False  # pyright: ignore[reportArgumentType]
    model.config.name_or_path = "smollm2-135m-instruct"
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(**source)
    # GGUF names its way of splitting ("smollm") and transformers does not apply it: digits are
    # split one by one before the byte-level rule, as in the published tokenizer of SmolLM2.
    # Without it, two spaces before a number become other tokens than the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def convert_efficientnet(file: Path, folder: Path, *, blocks: tuple[int, ...]) -> None:
    """Names of efficientnet_lite_pytorch -> names of timm; `blocks` counts the blocks per stage."""
    import torch

    place = [(stage, i) for stage, count in enumerate(blocks) for i in range(count)]
    state = torch.load(file, map_location="cpu", weights_only=True)
    _save_tensors({_efficientnet_key(key, place): value for key, value in state.items()}, folder)


def _efficientnet_key(key: str, place: list[tuple[int, int]]) -> str:
    """`_blocks.3._bn0.weight` -> `blocks.2.0.bn1.weight`."""
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    outer["_fc"] = "classifier"
    found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if found is None:
        layer, name = key.rsplit(".", 1)
        return f"{outer[layer]}.{name}"
    block, layer, name = found.groups()
    stage, index = place[int(block)]
    if stage == 0:  # the first stage does not expand its channels
        inner = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw"}
        inner["_bn2"] = "bn2"
    else:
        inner = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw"}
        inner |= {"_bn1": "bn2", "_project_conv": "conv_pwl", "_bn2": "bn3"}
    return f"blocks.{stage}.{index}.{inner[layer]}.{name}"


def convert_aisfx(file: Path, folder: Path) -> None:
    """The convolutional trunk alone; the nine classifiers of its training are left out."""
    import numpy as np
    import torch

    # The file also holds a table with numpy integers; the two names below rebuild those and
    # nothing else (`__reduce__` knows where this numpy keeps what the file calls numpy.core).
    scalar = np.int64(0).__reduce__()[0]
    allowed = [(scalar, "numpy.core.multiarray.scalar"), np.dtype, type(np.dtype(np.int64))]
    with torch.serialization.safe_globals(allowed):
        state, _ = torch.load(file, map_location="cpu", weights_only=True)
    trunk = "embedding_net."
    _save_tensors(
        {
            key.removeprefix(trunk).replace("conv_block", "blocks."): value
            for key, value in state.items()
            if key.startswith(trunk)
        },
        folder,
    )


def _save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    contiguous = {key: tensors[key].contiguous() for key in sorted(tensors)}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
