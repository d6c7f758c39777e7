"""Convert the LoRA weights of a NExT-GPT checkpoint to adapters in peft's format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmllm.convert.reading import NextGPTCheckpoint
from mmllm.errors import CheckpointError
from mmllm.weights import save_tensors

LORA_ALPHA = 32.0
"""The paper's value, used without an adapter_config.json."""

_NAME = re.compile(r"(model\.layers\.\d+\..*\.(\w+))\.lora_([AB])(\.default)?\.weight")


@dataclass(frozen=True)
class LoraTensors:
    """Adapters of a language model.

    Attributes:
        tensors: By peft's names.
        names: NExT-GPT's name of each -> peft's.
        targets: Names of the modules that are adapted.
        config: adapter_config.json; empty without the file.
    """

    tensors: dict[str, Tensor]
    names: dict[str, str]
    targets: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """Raise CheckpointError if the adapters have several."""
        ranks = {
            value.shape[0] for name, value in self.tensors.items() if name.endswith("lora_A.weight")
        }
        if len(ranks) != 1:
            raise CheckpointError(f"LoRA of several ranks: {sorted(ranks)}")
        return ranks.pop()

    def options(self) -> dict[str, Any]:
        """`llm.lora` of a config."""
        return {
            "rank": self.rank,
            "alpha": float(self.config.get("lora_alpha", LORA_ALPHA)),
            "dropout": float(self.config.get("lora_dropout", 0.0)),
            "targets": list(self.targets),
        }

    def save(self, folder: Path, llm: str) -> None:
        """Write a new folder in peft's format.

        Args:
            folder: the folder, which must not exist.
            llm: the name of the base model, for peft's config.
        """
        from peft import LoraConfig

        folder.mkdir()
        options = self.options()
        LoraConfig(
            r=options["rank"],
            lora_alpha=options["alpha"],
            lora_dropout=options["dropout"],
            target_modules=options["targets"],
            task_type="CAUSAL_LM",
            base_model_name_or_path=llm,
            inference_mode=True,
        ).save_pretrained(str(folder))
        tensors = {name: value.float().contiguous() for name, value in self.tensors.items()}
        save_tensors(tensors, folder / "adapter_model.safetensors")


def lora_tensors(source: NextGPTCheckpoint) -> LoraTensors:
    """The adapters of the language model's layers; empty without LoRA."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    targets: set[str] = set()
    for name, value in source.tensors.items():
        if match := _NAME.fullmatch(name):
            renamed = f"base_model.model.{match[1]}.lora_{match[3]}.weight"
            tensors[renamed] = value
            names[name] = renamed
            targets.add(match[2])
    return LoraTensors(tensors, names, tuple(sorted(targets)), source.adapter_config)
