"""mmllm: any-to-any multimodal language models that train and run at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmllm.conversation import Audio, Image, Medium, Message, Text, Video
from mmllm.errors import (
    AssetError,
    CheckpointError,
    ConfigError,
    ContextError,
    MediaError,
    MmllmError,
    TrainingError,
)
from mmllm.inference.inputs import assistant, system, user
from mmllm.inference.replies import Reply
from mmllm.utils.garbage import no_collection
from mmllm.version import __version__ as __version__

if TYPE_CHECKING:
    import torch

    from mmllm.inference.chat import Chat

__all__ = [
    "AssetError",
    "Audio",
    "Chat",
    "CheckpointError",
    "ConfigError",
    "ContextError",
    "Image",
    "MediaError",
    "Medium",
    "Message",
    "MmllmError",
    "Reply",
    "Text",
    "TrainingError",
    "Video",
    "assistant",
    "load",
    "system",
    "user",
]


def load(
    source: str | Path = "mini",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    prefixes: int = 0,
    memory: bool | Mapping[str, int] | None = None,
    trust: Collection[str] = (),
) -> Chat:
    """Load a model to talk to.

    Args:
        source: "mini", the model that is shipped; a checkpoint or run folder; or a YAML file, whose
            model is untrained.
        device: cpu, cuda, mps, or auto, which is the best available; None: as `auto`.
        dtype: float32, bfloat16 or float16; None or auto: bfloat16 where the device computes it
            fast, else float32.
        prefixes: how many conversations' key-value caches are kept for their next turns.
        memory: True for conversations longer than the model's context, or options of
            `llm.memory` by name ({"window": 1024}); False for none; None: what its config says.
        trust: your own modules ("my_encoder") and template files that the checkpoint may use. No
            other code of a checkpoint is run.

    Returns:
        The model in evaluation mode, behind `reply`, `stream` and `reply_many`.

    Raises:
        ConfigError: a YAML is invalid, or `source`, `device` or `dtype` is unknown.
        CheckpointError: a checkpoint is damaged, or was made with other frozen parts.

    Example:
        ```python
        chat = mmllm.load()
        print(chat.reply("hello"))
        ```
    """
    with no_collection():
        from mmllm.inference.loading import load as load_chat

        return load_chat(
            source, device=device, dtype=dtype, prefixes=prefixes, memory=memory, trust=trust
        )


def __getattr__(name: str) -> Any:
    if name == "Chat":
        from mmllm.inference.chat import Chat

        return Chat
    raise AttributeError(f"module 'mmllm' has no attribute {name!r}")
