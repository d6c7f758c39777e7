"""The config of a LoRA of a decoder that trains."""

from __future__ import annotations

from dataclasses import dataclass

from mmllm.errors import ConfigError


@dataclass(frozen=True)
class DecoderLoraConfig:
    """A LoRA of the denoiser, which changes nothing before it is trained.

    Attributes:
        rank: of each pair of matrices; what they add is not scaled further.
        targets: ends of the names of the linear layers that get one.
    """

    rank: int = 16
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"train_lora.rank: expected at least 1, got {self.rank}")
        if not self.targets:
            raise ConfigError("train_lora.targets: expected at least one name of a layer")
