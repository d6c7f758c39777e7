"""LoRA of a decoder's denoiser that trains (Hu et al. 2021): its weights belong to the model, and
are the same tensors inside the pipeline, whenever that is loaded.

A checkpoint holds them in diffusers' format, which `load_lora_weights` of the pipeline reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmllm.decoders.lora_config import DecoderLoraConfig
from mmllm.decoders.networks import meta_components
from mmllm.errors import ConfigError, wrap_errors

_ADAPTER = "trained"
_DENOISERS = ("transformer", "unet")


class DecoderLora(nn.Module):
    """The weights of a LoRA by the names of the layers that they belong to: child `lora`."""

    def __init__(self, folder: Path, options: DecoderLoraConfig, where: str):
        """Make fresh weights, by the configs alone: A random, always the same, B zero.

        Args:
            folder: of the pipeline.
            options: which layers, and the rank.
            where: the decoder's key in the config, for errors.

        Raises:
            ConfigError: the pipeline has no such layers, or two denoisers.
        """
        super().__init__()
        networks = meta_components(folder)
        self.component = next((name for name in _DENOISERS if name in networks), "")
        if not self.component or "transformer_2" in networks:
            raise ConfigError(
                f"{where}.train_lora: {folder} has no denoiser, or two; expected one named "
                f"{' or '.join(_DENOISERS)}"
            )
        self.options = options
        network: Any = networks[self.component]
        message = f"{where}.train_lora.targets: {', '.join(options.targets)}"
        with wrap_errors(ConfigError, message), torch.device("meta"):
            _add_adapter(network, options)
        self.lora = nn.Module()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in _adapter_weights(network):
            weight = torch.zeros(parameter.shape, device="cpu")
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(weight, math.sqrt(5), generator=generator)
            _place(self.lora, name, nn.Parameter(weight, requires_grad=False))

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every weight by its name in diffusers' format."""
        yield from self.lora.named_parameters(prefix=self.component)

    def bind(self, pipeline: Any) -> None:
        """Let a pipeline's denoiser compute with these weights.

        Args:
            pipeline: the pipeline of diffusers, just loaded, changed in place.
        """
        network = getattr(pipeline, self.component)
        _add_adapter(network, self.options)
        weights = dict(self.lora.named_parameters())
        for name in [name for name, _ in _adapter_weights(network)]:
            path, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(f"{path}.{_ADAPTER}"), leaf, weights[name])


def decoder_lora(decoder: Any, where: str, device: torch.device) -> DecoderLora:
    """Return the LoRA of a decoder, which is made unless it has one.

    Args:
        decoder: the decoder; a fresh LoRA changes nothing of what it makes.
        where: its key in the config, for errors.
        device: where a fresh one is put.

    Raises:
        ConfigError: its config describes none, or one that the pipeline cannot have.
    """
    if decoder.lora is not None:
        return decoder.lora
    config = decoder.config
    if config.train_lora is None:
        raise ConfigError(
            f"{where}.train_lora is null, but this stage or checkpoint uses a LoRA of the decoder"
        )
    if config.quantization is not None or config.compile or config.offload != "none":
        raise ConfigError(
            f"{where}.train_lora needs the weights as they are: expected quantization null, "
            "compile false and offload none"
        )
    decoder.lora = DecoderLora(decoder.folder, config.train_lora, where).to(device)
    decoder.release()  # the next use loads it with these weights
    return decoder.lora


def _add_adapter(network: Any, options: DecoderLoraConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=options.rank, lora_alpha=options.rank, target_modules=list(options.targets)
    )
    inject_adapter_in_model(settings, network, adapter_name=_ADAPTER)


def _adapter_weights(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of the adapter by name, without the adapter's own."""
    for name, parameter in network.named_parameters():
        if f".{_ADAPTER}." in name:
            yield name.replace(f".{_ADAPTER}.", "."), parameter


def _place(tree: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in dict(tree.named_children()):
            tree.add_module(part, nn.Module())
        tree = tree.get_submodule(part)
    tree.register_parameter(leaf, parameter)
