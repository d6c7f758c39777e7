"""The contracts of input and of output projections, and what all of a kind share.

Legend: M media, L encoder tokens, C encoder width, N tokens per medium, K signal tokens, D LLM
width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.errors import ConfigError


class InputProjection(nn.Module):
    """Base of all input projections: an encoder's features to embeddings of the LLM.

    Args:
        feature_shape: (L, C) of the encoder.
        width: D, the width of the LLM's embeddings.
        num_tokens: N, embeddings per medium.
        dropout: dropout of the features.
        scale: the root mean square of the LLM's embeddings.
        bare: whether to leave out norm, positions and scale.
    """

    num_tokens: int
    """N"""
    words: int | None = None
    """K, of a projection that classifies media into words."""
    vocabulary_type: str | None = None
    """The `type` of a projection whose vocabulary pre-alignment fills."""

    def __init__(
        self,
        feature_shape: tuple[int, int],
        width: int,
        num_tokens: int,
        dropout: float,
        scale: float,
        *,
        bare: bool = False,
    ):
        super().__init__()
        length, channels = feature_shape
        self.num_tokens = num_tokens
        self.feature_shape = feature_shape
        self.dropout = nn.Dropout(dropout)
        self.bare = bare
        if not bare:
            self.norm = nn.LayerNorm(channels)
            self.position = nn.Parameter(torch.zeros(length, channels))
            self.gain = nn.Parameter(torch.full((width,), float(scale)))

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute the embeddings that stand for media in the LLM's input.

        Args:
            features: float[M, L, C] of M >= 1 media.
            mask: bool[M, L], True for tokens that count; None: all.

        Returns:
            float[M, N, D].
        """
        raise NotImplementedError

    def prepare(self, features: Tensor) -> Tensor:
        """Check, normalise and add positions: float[M, L, C] -> float[M, L, C]."""
        if features.shape[1:] != torch.Size(self.feature_shape):
            raise ValueError(
                f"input projection: expected features [M, {self.feature_shape[0]}, "
                f"{self.feature_shape[1]}], got {list(features.shape)}; was it trained with "
                "another encoder?"
            )
        return self.dropout(features if self.bare else self.norm(features) + self.position)

    def embed_names(self, embed: Callable[[Tensor], Tensor]) -> None:
        """Look up the LLM's embeddings of the names that the projection knows, if it knows any:
        once its weights are loaded.

        Args:
            embed: int[U] token ids -> float[U, D], the LLM's embeddings of them.
        """

    def finish(self, tokens: Tensor) -> Tensor:
        """Scale to the RMS of LLM embeddings: float[M, N, D] -> float[M, N, D]."""
        return tokens if self.bare else F.rms_norm(tokens, tokens.shape[-1:]) * self.gain


class OutputProjection(nn.Module):
    """Base of all output projections: hidden states of signal tokens to a decoder's condition.

    Args:
        signal_tokens: K, the signal tokens of a medium.
        condition_shapes: shape of each tensor of the condition, by name.
        llm_layers: the n layers of the LLM after which states are read; empty: the last state.
        num_words: W, the words of the reply that are read in front of the signal tokens.
    """

    condition_dropout: float = 0.0
    """Share of media that the denoising loss conditions on `null_condition`."""
    reads_captions: bool = False
    """Whether `conditions` needs the captions' own conditions."""
    caption: Literal["reply", "request"] = "reply"
    """Whose words are the caption of a medium of a reply, where captions are read."""

    def __init__(
        self,
        signal_tokens: int,
        condition_shapes: Mapping[str, tuple[int, ...]],
        *,
        llm_layers: tuple[int, ...] = (),
        num_words: int = 0,
    ):
        super().__init__()
        self.signal_tokens = signal_tokens
        self.condition_shapes = dict(condition_shapes)
        self.llm_layers = llm_layers
        self.num_words = num_words

    def forward(self, signals: Tensor) -> dict[str, Tensor]:
        """Compute the conditions of media.

        Args:
            signals: float[M, W + K, n * D] of M >= 1 media: hidden states of the last W words of
                the reply, zeros in front where there are fewer, and of the signal tokens plus their
                embeddings.

        Returns:
            float[M, *shape] of each tensor of the condition, by name.
        """
        raise NotImplementedError

    def conditions(self, signals: Tensor, captions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the conditions of media from states and, where `reads_captions`, from what the
        decoder's text encoder says of their captions.

        Args:
            signals: as `forward` takes them.
            captions: the captions' own conditions, float[M, *shape] by name; may be empty where
                they are not read.

        Returns:
            float[M, *shape] of each tensor of the condition, by name.
        """
        return self(signals)

    def no_conditions(self) -> dict[str, Tensor]:
        """Return the conditions float[0, *shape] of no media (`zero_rows`)."""
        return {name: zero_rows(self, shape) for name, shape in self.condition_shapes.items()}

    def null_condition(self, num: int) -> dict[str, Tensor] | None:
        """Return the learned condition of no caption, to guide away from; None if there is none.

        Args:
            num: M.

        Returns:
            float[M, *shape] by name.
        """
        return None


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average over the tokens that count.

    Args:
        values: float[M, L, X].
        mask: bool[M, L], True for tokens that count; None: all.

    Returns:
        float[M, X].
    """
    if mask is None:
        return values.mean(dim=1)
    weights = mask.to(values.dtype)[..., None]
    return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1.0)


def saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a module, by name: parameters, and buffers that persist.

    Args:
        module: projections.
    """
    state = module.state_dict(keep_vars=True)
    buffers = {name: state[name] for name, _ in module.named_buffers() if name in state}
    return {**dict(module.named_parameters()), **buffers}


def zero_rows(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Return float[0, *shape] that depends on every parameter of a module: each gets a zero
    gradient, so that DDP's reducer never waits for a batch without a modality.

    Args:
        module: the module.
        shape: of one row.
    """
    sums = [parameter.sum() for parameter in module.parameters()]
    total = torch.stack(sums).sum() if sums else torch.zeros(())
    return total * total.new_zeros(0, *shape)


def check_sizes(needed: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Compare the numbers that a config describes with those that a checkpoint holds.

    Args:
        needed: how many the config describes, by group.
        sizes: how many there are.

    Raises:
        ConfigError: there are fewer.
    """
    for group, count in needed.items():
        if count > sizes[group]:
            raise ConfigError(
                f"{group}: the config describes {count:,} numbers, but the checkpoint holds "
                f"{sizes[group]:,}; was it trained with another LLM, encoder, decoder or "
                "projection?"
            )
