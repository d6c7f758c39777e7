"""Images of any size and aspect -> tokens of their tiles and of the whole, by an image encoder of
one size (InternVL 1.5, Chen et al. 2024, arXiv 2404.16821, sec. 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mmllm.conversation import Image, Medium
from mmllm.encoders.base import ModalityEncoder
from mmllm.encoders.pieces import PiecesEncoder, build_inner
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class TilesConfig:
    """Which image encoder, within which budget."""

    modality: Literal["image"] = "image"
    encoder: Mapping[str, Any] = field(default_factory=lambda: {"type": "efficientnet"})
    """An image encoder as a system's `encoders` has it: its `type` and its keys."""
    max_tokens: int = 1024
    """Tokens of an image at most."""


class TilesEncoder(PiecesEncoder):
    """The tiles of an image row by row, and the whole image behind them; of an image that is no
    larger than what the encoder sees, the image alone."""

    modality: ClassVar[str] = "image"

    def __init__(self, config: TilesConfig, inner: ModalityEncoder):
        if len(inner.sample_shape) != 3:
            raise ConfigError(
                "tiles.encoder: expected one that sees images of one size, got one of any aspect: "
                "name it alone, with its own max_tokens"
            )
        super().__init__("tiles", inner, config.max_tokens)
        self._size = inner.sample_shape[1:]

    def cut(self, medium: Image, most: int) -> list[tuple[Medium, float]]:
        height, width = medium.height, medium.width
        rows, columns = self._grid(height, width, most - 1)
        if rows * columns == 1:
            return [(medium, 0.0)]
        array = medium.to_numpy()
        tiles: list[Medium] = [
            Image(
                array=array[
                    row * height // rows : (row + 1) * height // rows,
                    column * width // columns : (column + 1) * width // columns,
                ]
            )
            for row in range(rows)
            for column in range(columns)
        ]
        return [(tile, 0.0) for tile in (*tiles, medium)]

    def _grid(self, height: int, width: int, most: int) -> tuple[int, int]:
        """Rows and columns of tiles: the grid whose tiles are nearest to the encoder's aspect, and
        of equally near ones the finest; no tile has fewer pixels than half of what the encoder
        sees, in height or width."""
        high, wide = self._size
        most_rows, most_columns = max(2 * height // high, 1), max(2 * width // wide, 1)
        wanted = math.log(width / wide) - math.log(height / high)
        grids = [
            (rows, columns)
            for rows in range(1, min(most, most_rows) + 1)
            for columns in range(1, min(most // rows, most_columns) + 1)
        ]
        return min(
            grids or [(1, 1)],
            key=lambda grid: (
                round(abs(math.log(grid[1] / grid[0]) - wanted), 6),
                -grid[0] * grid[1],
            ),
        )


def build(config: TilesConfig) -> ModalityEncoder:
    """The frozen encoder with its image encoder inside. Raises ConfigError and AssetError."""
    return TilesEncoder(config, build_inner(config.encoder, "tiles.encoder", "image"))
