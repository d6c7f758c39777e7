"""Former names of YAML keys. 0.2 still reads them, with a warning that names the new one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mmllm.errors import ConfigError

logger = logging.getLogger(__name__)

RENAMED = {
    "accumulation": "gradient_accumulation_steps",
    "checkpoint_every": "save_steps",
    "clip": "max_grad_norm",
    "distance": "align_loss",
    "fused": "liger_loss",
    "keep": "save_total_limit",
    "max_bad_share": "max_skip_fraction",
    "recompute": "gradient_checkpointing",
    "retain": "kl",
    "start": "init_from",
    "train": "learning_rates",
    "warmup": "warmup_ratio",
    "workers": "num_workers",
}
"""Former name -> name, of a stage's keys and of its losses."""

RENAMED_OPTIONS = {
    "negative": "negative_prompt",
    "source": "init_media",
    "true_guidance": "true_cfg_scale",
    "sound_guidance": "audio_guidance_scale",
    "cross_guidance": "modality_scale",
    "skip_guidance": "stg_scale",
    "skip_layer": "stg_block",
}
"""Former name -> name, of a decoder's keys, which requests give as options too."""

RENAMED_PARAMETERS = {"llm.rows": "llm.signal_embeddings", "llm.head_rows": "llm.signal_head"}
"""Former name -> name, of parameters in `learning_rates` and in an optimizer's state."""


def with_current_names(stage: Any, *, warn: bool = False) -> Any:
    """Rename the former keys of a stage, of its losses and of its learning rates.

    Args:
        stage: plain data; returned as it is if it is no mapping.
        warn: log each former name.

    Raises:
        ConfigError: a key is given under both of its names.
    """
    if not isinstance(stage, Mapping):
        return stage
    stage = rename_keys(stage, "stage", RENAMED, warn=warn)
    for key, names in (("losses", RENAMED), ("learning_rates", RENAMED_PARAMETERS)):
        if isinstance(stage.get(key), Mapping):
            stage[key] = rename_keys(stage[key], f"stage.{key}", names, warn=warn)
    return stage


def rename_keys(
    tree: Mapping[Any, Any], where: str, names: Mapping[str, str], *, warn: bool
) -> dict[Any, Any]:
    """Rename the keys of a mapping.

    Args:
        tree: plain data from YAML.
        where: its place in the config, for messages.
        names: former name -> present name.
        warn: whether to log a warning for each former name.

    Raises:
        ConfigError: a key is given under both of its names.
    """
    for key in [key for key in names if key in tree]:
        new = names[key]
        if new in tree:
            raise ConfigError(f"{where}: {key} is now called {new}, and both are given: drop {key}")
        if warn:
            logger.warning("%s.%s is now called %s; please rename it", where, key, new)
    return {names.get(key, key): value for key, value in tree.items()}
