"""The parts of a system: their parameters, their bytes, and the sizes of the LLM.

Legend: B rows, T tokens, D LLM width, Q and KV widths of all query and key heads, F width of the
feed-forward layer, I inputs of LoRA, N layers, V vocabulary; one process, one micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmllm.decoders.decoder import ModalityDecoder
from mmllm.decoders.networks import meta_components
from mmllm.decoders.quantization import DENOISERS, PACKED
from mmllm.decoders.shared_text_encoder import COMPONENT
from mmllm.llm.language_model import LanguageModel
from mmllm.model import AnyToAny
from mmllm.training.trainable import ParameterGroup

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Part:
    """One part of a system.

    Attributes:
        name: `llm`, `encoders.KEY`, `decoders.KEY` or a group of trainable parameters.
        networks: parameters by network.
        bytes: of its weights as they are loaded.
        trained: whether it may train.
        bytes_saved: of a text encoder that is not loaded, because the LLM is the same model.
    """

    name: str
    networks: dict[str, int]
    bytes: int
    trained: bool = False
    bytes_saved: int = 0

    @property
    def parameters(self) -> int:
        """The number of parameters of all its networks."""
        return sum(self.networks.values())


def parts_of(model: AnyToAny) -> list[Part]:
    """Every part with its number of parameters, frozen ones first."""
    frozen = {name: p for name, p in model.llm.model.named_parameters() if "lora_" not in name}
    parts = [
        Part(
            "llm",
            {"": count_parameters(frozen.values())},
            _llm_bytes(model.llm, frozen.values()),
        )
    ]
    for key, encoder in model.encoders.items():
        own = list(encoder.parameters())
        parts.append(Part(f"encoders.{key}", {"": count_parameters(own)}, _size(own)))
    for key, decoder in model.decoders.items():
        parts.append(_decoder_part(key, decoder))
    candidates: dict[str, int] = {}
    for name, parameter in model.trainable_candidates():
        group = ".".join(name.split(".")[: 3 if name.startswith("decoders.") else 2])
        candidates[group] = candidates.get(group, 0) + parameter.numel()
    return parts + [
        Part(group, {"": count}, count * FLOAT_BYTES, trained=True)
        for group, count in candidates.items()
    ]


def _llm_bytes(llm: LanguageModel, frozen: Iterable[Tensor]) -> int:
    """Bytes of the LLM as it is loaded: `quantization` packs all linear layers but the head."""
    packed = PACKED.get(llm.config.quantization or "")
    head = llm.model.get_output_embeddings().weight
    linear = {id(m.weight) for m in llm.model.modules() if isinstance(m, nn.Linear)} - {id(head)}
    sizes = (
        p.numel() * (packed if packed and id(p) in linear else p.element_size()) for p in frozen
    )
    return round(sum(sizes))


def _decoder_part(key: str, decoder: ModalityDecoder) -> Part:
    networks, size = dict(_networks(decoder.folder)), decoder.dtype.itemsize
    shared = networks.pop(COMPONENT) if decoder.config.text_encoder == "llm" else 0
    loaded = size * sum(networks.values())
    if packed := PACKED.get(decoder.config.quantization or ""):
        loaded += (packed - size) * _linear_weights(decoder.folder)
    return Part(f"decoders.{key}", networks, round(loaded), bytes_saved=size * shared)


@functools.cache
def _networks(folder: Path) -> dict[str, int]:
    """Parameters of a pipeline by network, cached for the stages of a recipe."""
    networks = meta_components(folder)
    return {name: count_parameters(network.parameters()) for name, network in networks.items()}


@functools.cache
def _linear_weights(folder: Path) -> int:
    """Weights of linear layers of its denoisers, which `quantization` packs."""
    networks = meta_components(folder)
    layers = (m for name in DENOISERS if name in networks for m in networks[name].modules())
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))


@dataclass(frozen=True)
class LLMShape:
    """The sizes of an LLM, as the formulas of `memory` and `flops` use them.

    Attributes:
        width: D.
        queries: Q, heads of queries times their width.
        keys: KV, heads of keys times their width.
        inner: F, the width between the two layers of an MLP.
        layers: N.
        vocabulary: V, rows of the embedding table.
        weights: P, frozen parameters without embedding and head.
        lora_inputs: I, widths of the inputs of LoRA's targets, summed per layer.
    """

    width: int
    queries: int
    keys: int
    inner: int
    layers: int
    vocabulary: int
    weights: int
    lora_inputs: float


def llm_shape(llm: LanguageModel) -> LLMShape:
    """Return the sizes that decide the operations and the memory of an LLM."""
    config = llm.model.config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    frozen = {name: p for name, p in llm.model.named_parameters() if "lora_" not in name}
    tables = {id(p): p for p in (llm.embedding.weight, llm.model.get_output_embeddings().weight)}
    inputs = [p.shape[1] for name, p in llm.lora_parameters() if "lora_A" in name]
    return LLMShape(
        width=width,
        queries=heads * head,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * head,
        inner=getattr(config, "intermediate_size", None) or 4 * width,
        layers=config.num_hidden_layers,
        vocabulary=len(llm.embedding.weight),
        weights=count_parameters(p for p in frozen.values() if id(p) not in tables),
        lora_inputs=sum(inputs) / config.num_hidden_layers,
    )


def trains_through_llm(groups: Sequence[ParameterGroup]) -> bool:
    """Return whether gradients go through the LLM: a module before or inside it trains."""
    names = (name for group in groups for name in group.parameters)
    return any(
        name.startswith(("input_projections.", "llm.signal_embeddings", "llm.lora."))
        for name in names
    )


def count_parameters(parameters: Iterable[Tensor]) -> int:
    """Return the number of elements of these tensors."""
    return sum(parameter.numel() for parameter in parameters)


def _size(parameters: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
