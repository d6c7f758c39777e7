"""Which of transformers' Auto classes reads a checkpoint: that of causal language models, or that
of vision-language, audio and omni models, whose language part is what mmllm calls the language
model.

The towers of such a model stay in it as they are: they are frozen, have no adapters, and are
written when the model is exported.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mmllm.errors import CheckpointError, quoted


def language_config(config: Any) -> Any:
    """The part of a checkpoint's config that describes what reads and writes text: the thinker of
    an omni model, whose talker and vocoder are not loaded; else all of it."""
    return getattr(config, "thinker_config", config)


def auto_class(config: Any) -> Any:
    """The Auto class of transformers for a model's config (`language_config`).

    Args:
        config: the config of transformers.

    Raises:
        CheckpointError: transformers has no generative model for it that reads embeddings, as
            mmllm has to.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as MULTIMODAL,
    )

    kind, text = config.model_type, config.get_text_config()
    found = f"it holds a model of type {quoted(kind)}"
    if kind not in MULTIMODAL and kind not in CAUSAL:
        raise CheckpointError(
            f"{found}: expected a causal language model, or a vision-language, audio or omni model "
            "of transformers (AutoModelForCausalLM, AutoModelForMultimodalLM); an encoder belongs "
            "under `encoders`, a pipeline under `decoders`"
        )
    if config.is_encoder_decoder or text.is_encoder_decoder:
        raise CheckpointError(
            f"{found}, an encoder and a decoder: expected a language model whose prompt and reply "
            "are one sequence"
        )
    if getattr(text, "hidden_size_per_layer_input", None):
        raise CheckpointError(
            f"{found}, whose layers read token ids besides embeddings (per-layer embeddings): "
            "media and signal tokens have none; take a size of the family without them"
        )
    return AutoModelForMultimodalLM if kind in MULTIMODAL else AutoModelForCausalLM


def has_towers(model: Any) -> bool:
    """Whether a transformers model has more parts than the language model: towers of other
    modalities."""
    return model.config.get_text_config() is not model.config


def language_modules(model: Any) -> list[str]:
    """The names of the two modules that are the language part of a model with towers: the decoder,
    and the head."""
    parts = (model.get_decoder(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is p for p in parts)]


def stacked_experts(model: nn.Module) -> list[str]:
    """The names of the parameters that hold the weights of all experts of a layer, float[experts,
    out, in]: a mixture of experts has no linear layers for them."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and ".experts." in name
    ]
