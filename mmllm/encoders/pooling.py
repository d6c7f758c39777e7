"""Choosing a layer and pooling its tokens: averages over grids of patches and over time.

Legend: M media, L tokens, C channels, h x w a grid of patches, T steps of time.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mmllm.errors import ConfigError


def block_number(layer: int, blocks: int, *, where: str) -> int:
    """Return the number of a block, from 1, that a config's `layer` selects.

    Args:
        layer: 1 to `blocks`, or a negative number that counts from the last block (-1).
        blocks: the number of blocks of the model.
        where: the encoder's place in the config, for messages.

    Raises:
        ConfigError: the model has no such block.
    """
    number = layer if layer > 0 else blocks + 1 + layer
    if layer == 0 or not 1 <= number <= blocks:
        raise ConfigError(
            f"{where}.layer: expected 1 to {blocks}, or -{blocks} to -1 counted from the last "
            f"(the model has {blocks}), got {layer}"
        )
    return number


def check_grid(grid: int | None, shape: tuple[int, int], *, where: str) -> None:
    """Raise ConfigError unless patches can be averaged to a square grid.

    Args:
        grid: the side of the grid; None keeps all patches.
        shape: (h, w), patches of an image.
        where: the encoder's place in the config, for messages.
    """
    if grid is not None and not 1 <= grid <= min(shape):
        raise ConfigError(
            f"{where}.grid: expected 1 to {min(shape)} (the image is {shape[0]} x {shape[1]} "
            f"patches), got {grid}"
        )


def check_parts(key: str, parts: int | None, most: int, *, where: str) -> None:
    """Raise ConfigError unless steps of time can be averaged to equal parts.

    Args:
        key: the name of the setting, for messages.
        parts: the number of parts; None keeps all steps.
        most: the number of steps that the encoder gives.
        where: the encoder's place in the config, for messages.
    """
    if parts is not None and not 1 <= parts <= most:
        raise ConfigError(f"{where}.{key}: expected 1 to {most}, got {parts}")


def pool_grid(tokens: Tensor, shape: tuple[int, int], grid: int | None) -> Tensor:
    """Average patches over the cells of a square grid.

    Args:
        tokens: float[..., h * w, C], row after row.
        shape: (h, w), patches of an image.
        grid: the side of the grid; None keeps all patches.

    Returns:
        float[..., grid * grid, C].
    """
    if grid is None:
        return tokens
    flat = tokens.flatten(0, -3).transpose(1, 2).unflatten(2, shape)  # [M, C, h, w]
    pooled = F.adaptive_avg_pool2d(flat, grid).flatten(2).transpose(1, 2)
    return pooled.unflatten(0, tokens.shape[:-2])


def pool_time(tokens: Tensor, parts: int | None) -> Tensor:
    """Average tokens over equal parts of time.

    Args:
        tokens: float[M, T, ...].
        parts: the number of parts; None keeps all T steps.

    Returns:
        float[M, parts, ...].
    """
    if parts is None:
        return tokens
    flat = tokens.flatten(2).transpose(1, 2)  # [M, ..., T]
    pooled = F.adaptive_avg_pool1d(flat, parts).transpose(1, 2)
    return pooled.unflatten(2, tokens.shape[2:]) if tokens.ndim > 3 else pooled
