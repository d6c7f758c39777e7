"""`llm.memory`: conversations beyond the model's own context, of which every step of generation
reads the parts that fit best (mmllm.llm.retrieval)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmllm.errors import ConfigError

if TYPE_CHECKING:
    from mmllm.llm.kv_cache import KVCache

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Families of transformers whose keys mmllm.llm.retrieval can rotate."""
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of RoPE whose angle is a position times a constant."""


@dataclass(frozen=True)
class MemoryOptions:
    """What a step of generation reads of a long conversation.

    Attributes:
        window: last positions that are always read.
        block: positions of a block; a medium is never cut, and a longer one is a block by itself.
        blocks: older blocks that each key-value head of each layer reads.
        max_length: the context in tokens, in place of `llm.max_length`: what is kept in memory.
    """

    window: int = 1024
    block: int = 64
    blocks: int = 16
    max_length: int = 65_536

    def __post_init__(self) -> None:
        for name in ("window", "block", "blocks", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"llm.memory.{name}: expected at least 1, got {getattr(self, name)}"
                )


def new_cache(model: Any, options: MemoryOptions | None) -> KVCache:
    """An empty key-value cache of a transformers model.

    Args:
        model: the model.
        options: what is read of it; None: all.
    """
    from mmllm.llm.kv_cache import KVCache
    from mmllm.llm.retrieval import RetrievalCache

    if options is None:
        return KVCache(model.config)
    return RetrievalCache(model.config, options, model.get_decoder().rotary_emb.inv_freq)


def check_memory(model: Any, attention: str) -> None:
    """Raise ConfigError for a transformers model that cannot read a part of its cache.

    Args:
        model: the model.
        attention: `llm.attention`.
    """
    config = model.config.get_text_config()
    if attention != "sdpa":
        raise ConfigError(f"llm.memory: needs llm.attention sdpa, got {attention}")
    if config.model_type not in _MODEL_TYPES:
        raise ConfigError(
            f"llm.memory: expected a model of {', '.join(_MODEL_TYPES)}, got {config.model_type}; "
            "leave it out"
        )
    if not new_cache(model, None).croppable:
        raise ConfigError(
            "llm.memory: this model's sliding windows forget older positions; leave it out"
        )
    rope = model.get_decoder().rotary_emb.rope_type
    if rope not in _ROPE_TYPES:
        raise ConfigError(
            f"llm.memory: expected RoPE of type {', '.join(_ROPE_TYPES)}, got {rope}; leave it out"
        )
