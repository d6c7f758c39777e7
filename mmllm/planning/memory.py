"""Memory estimates of training: activations, projections, and the feature cache.

Legend: B rows, T tokens, D LLM width, Q and KV widths of all query and key heads, F width of the
feed-forward layer, I inputs of LoRA, N layers, V vocabulary; one process, one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmllm.config import StageConfig
from mmllm.errors import ConfigError
from mmllm.kernels.linear_cross_entropy import CHUNK_SIZE
from mmllm.llm.language_model import LanguageModel
from mmllm.model import AnyToAny
from mmllm.planning.parts import llm_shape, trains_through_llm
from mmllm.training.feed import open_sources
from mmllm.training.trainable import ParameterGroup

_LOGIT_BYTES = 12
"""Bytes of a logit while its loss is computed: itself, its logarithm and the gradients of both."""


def dtype_of(stage: StageConfig) -> torch.dtype:
    """Return the dtype of the LLM's weights in training; `auto` counts as bf16, as on a GPU."""
    return torch.bfloat16 if stage.precision in ("auto", "bf16") else torch.float32


def activations(
    llm: LanguageModel, stage: StageConfig, groups: Sequence[ParameterGroup], rows: int
) -> int:
    """Return the bytes that autograd saves of the LLM for one micro-batch of full rows.

        B T N (9 D + 4 Q + 4 KV + 6 F + I)    with 16-bit weights, twice that with float32;
        B T (2 D N + one layer's)             with gradient checkpointing;
        + 4 D B T                             for the last norm;
        + 12 V min(B T, 1024)                 for the logits.

    I, the inputs of LoRA's targets, of which some share one, counts six times with dropout, whose
    mask is saved. Only the logits count where no gradient goes through the LLM. Measured on the
    Llama of transformers 5.23 with sdpa under autocast; Korthikanti et al. 2022 (arXiv 2205.05198),
    eq. 2, give 34 D for GPT's layer.

    Args:
        llm: the language model, which may be on the meta device.
        stage: the stage, of which `max_length`, the dtype and `gradient_checkpointing` matter.
        groups: the parameters that it trains.
        rows: B, rows of a micro-batch on one process.
    """
    shape, positions = llm_shape(llm), rows * stage.max_length
    logits = _LOGIT_BYTES * shape.vocabulary * min(positions, CHUNK_SIZE)
    if not trains_through_llm(groups):
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


def projections(model: AnyToAny, stage: StageConfig, rows: int) -> tuple[int, float]:
    """Measure the projections, on the meta device, for one medium a row.

    Only the largest input and the largest output projection count: media of several kinds are rare
    in a row.

    Args:
        model: the model, on the meta device.
        stage: the stage; output projections count if it has an `align` or `denoise` loss.
        rows: rows of a micro-batch on one process.

    Returns:
        Bytes that autograd saves, and floating-point operations of the forward pass.
    """
    inputs, outputs = [(0, 0.0)], [(0, 0.0)]
    for key, encoder in model.encoders.items():
        features = torch.empty(rows, *encoder.feature_shape, device="meta")  # pyright: ignore
        inputs.append(measure(model.input_projections[key], features))
    if {"align", "denoise"} & stage.losses.keys():
        for projection in map(model.output_projection, model.output_projections):
            length = projection.signal_tokens + projection.num_words
            width = model.llm.width * max(len(projection.llm_layers), 1)
            signals = torch.empty(rows, length, width, device="meta", requires_grad=True)
            outputs.append(measure(projection, signals))
    (input_bytes, input_flops), (output_bytes, output_flops) = max(inputs), max(outputs)
    return input_bytes + output_bytes, input_flops + output_flops


def measure(module: nn.Module, *inputs: Tensor) -> tuple[int, float]:
    """Run a module in training mode and count what its forward pass costs.

    Args:
        module: the module; it may be on the meta device.
        *inputs: the arguments of its forward pass.

    Returns:
        Bytes that autograd saves, parameters excluded, and floating-point operations.
    """
    from torch.utils.flop_counter import FlopCounterMode

    own = {p.untyped_storage()._cdata for p in module.parameters()}
    saved: dict[int, Tensor] = {}  # references, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in own:
            saved[place] = tensor
        return tensor

    before = module.training
    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), counter:
        module.train()(*inputs)
    module.train(before)
    return sum(t.untyped_storage().nbytes() for t in saved.values()), counter.get_total_flops()


def cache_size(
    model: AnyToAny, stage: StageConfig, num_items: int | None = None
) -> tuple[dict[str, int], int]:
    """Estimate the feature cache of a stage, from above. Latents are not counted.

    A dataset whose file exists is counted; another has `num_items`, but at most as many as the
    stage draws from it. An item is one medium and its caption: of pairs the one that they ask for,
    else the largest. A caption that occurs again is kept once.

    Args:
        model: the model, whose encoders and decoders give the shapes.
        stage: the stage with its datasets.
        num_items: items of a dataset whose file is not here.

    Returns:
        Items by dataset, and bytes of their features: [L, C] of an encoder, and the conditions of a
            decoder, in `stage.cache_dtype`.
    """
    number_bytes = getattr(torch, stage.cache_dtype).itemsize
    feature_bytes = {
        str(encoder.modality): number_bytes * math.prod(encoder.feature_shape)  # pyright: ignore
        for encoder in model.encoders.values()
    }
    condition_bytes = {
        decoder.modality: number_bytes * sum(map(math.prod, decoder.condition_shapes.values()))
        for decoder in model.decoders.values()
    }
    shares = {name: entry.share for name, entry in stage.data.items()}
    items, total = {}, 0
    for name, entry in stage.data.items():
        try:
            items[name] = len(open_sources({name: entry}, "stage.data")[name])
        except ConfigError:
            drawn = stage.steps * stage.batch_size * shares[name] / sum(shares.values())
            items[name] = min(round(drawn), num_items or round(drawn))
        direction, modality = (getattr(entry, n, None) for n in ("direction", "modality"))
        sides = {
            "understand": [feature_bytes],
            "generate": [condition_bytes],
        }.get(direction or "", [feature_bytes, condition_bytes])
        largest = (max(kinds.values(), default=0) for kinds in sides)
        each = sides[0].get(modality, 0) if modality else sum(largest)
        total += items[name] * each
    return items, 0 if stage.cache == "none" else total
