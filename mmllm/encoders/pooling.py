"""Choosing a layer and pooling its tokens: averages over grids of patches and over time.

Legend: M media, L tokens, C channels, h x w a grid of patches, T steps of time.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mmllm.errors import ConfigError


def block_number(layer: int, blocks: int, *, where: str) -> int:
    """The block that a config's `layer` means, 1 to `blocks`; negative layers count from the last.
    Raises ConfigError."""
    number = layer if layer > 0 else blocks + 1 + layer
    if layer == 0 or not 1 <= number <= blocks:
        raise ConfigError(
            f"{where}.layer: expected 1 to {blocks}, or -{blocks} to -1 counted from the last "
            f"(the model has {blocks}), got {layer}"
        )
    return number


def check_grid(grid: int | None, shape: tuple[int, int], *, where: str) -> None:
    """Raise ConfigError unless h x w patches can be averaged to grid x grid."""
    if grid is not None and not 1 <= grid <= min(shape):
        raise ConfigError(
            f"{where}.grid: expected 1 to {min(shape)} (the image is {shape[0]} x {shape[1]} "
            f"patches), got {grid}"
        )


def check_parts(key: str, parts: int | None, most: int, *, where: str) -> None:
    """Raise ConfigError unless `most` steps of time can be averaged to so many parts."""
    if parts is not None and not 1 <= parts <= most:
        raise ConfigError(f"{where}.{key}: expected 1 to {most}, got {parts}")


def pool_grid(tokens: Tensor, shape: tuple[int, int], grid: int | None) -> Tensor:
    """Average patches: float[..., h * w, C] -> float[..., grid * grid, C]; None keeps them."""
    if grid is None:
        return tokens
    flat = tokens.flatten(0, -3).transpose(1, 2).unflatten(2, shape)  # [M, C, h, w]
    pooled = F.adaptive_avg_pool2d(flat, grid).flatten(2).transpose(1, 2)
    return pooled.unflatten(0, tokens.shape[:-2])


def pool_time(tokens: Tensor, parts: int | None) -> Tensor:
    """Average equal parts of time: float[M, T, ...] -> float[M, parts, ...]; None keeps them."""
    if parts is None:
        return tokens
    flat = tokens.flatten(2).transpose(1, 2)  # [M, ..., T]
    pooled = F.adaptive_avg_pool1d(flat, parts).transpose(1, 2)
    return pooled.unflatten(2, tokens.shape[2:]) if tokens.ndim > 3 else pooled
