"""The towers of vision-language models: what their processors make of an image, and the embeddings
that their own projectors make of that.

Legend: M media, P patches of an image at most, S numbers of a patch or tile, N embeddings of a
image and L at most, D width of the language model, n layers that DeepStack adds to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmllm.conversation import Image
from mmllm.encoders.base import Features
from mmllm.encoders.loading import first_line
from mmllm.errors import AssetError, ConfigError, MediaError


class NativeResolution:
    """Images of any size and aspect, in patches that are merged (Qwen2-VL and later).

    A sample is float[1 + P, S]; its first row begins with the rows and columns of patches.

    Args:
        model: the transformers model, on any device.
        processor: its image processor.
        max_tokens: L.
    """

    before, after = "<|vision_start|>", "<|vision_end|>"
    attends_to_itself = False

    def __init__(self, model: Any, processor: Any, max_tokens: int):
        vision = model.config.vision_config
        self.merge, self.patch = processor.merge_size, processor.patch_size
        self.model, self.processor = model, processor
        unit = (self.merge * self.patch) ** 2  # pixels of one embedding
        longest = min(processor.size["longest_edge"], max_tokens * unit)
        shortest = min(processor.size["shortest_edge"], longest)
        self.unit, self.size = unit, {"shortest_edge": shortest, "longest_edge": longest}
        width = model.config.get_text_config().hidden_size
        layers = len(getattr(vision, "deepstack_visual_indexes", ()))
        self.feature_shape = (max_tokens, width * (1 + layers))
        numbers = 3 * processor.temporal_patch_size * self.patch**2
        self.sample_shape = (1 + max_tokens * self.merge**2, numbers)

    def measure(self, image: Image) -> tuple[int, tuple[int, int, int] | None]:
        """N, and the grid 1 x h x w of embeddings."""
        rows, columns = self._grid(image)
        grid = 1, rows // self.merge, columns // self.merge
        return grid[1] * grid[2], grid

    def to_tensor(self, image: Image) -> Tensor:
        """An image -> float[1 + P, S], zeros behind its last patch."""
        size = self._size_of(image)
        inputs = self.processor(images=image.to_pil(), size=size, return_tensors="pt")
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        patches = inputs["pixel_values"]
        assert (rows, columns) == self._grid(image)
        sample = torch.zeros(self.sample_shape)
        sample[0, 0], sample[0, 1] = rows, columns
        sample[1 : 1 + len(patches)] = patches
        return sample

    def forward(self, samples: Tensor) -> Features:
        """float[M, 1 + P, S] -> float[M, L, D * (1 + n)] and the mask of each image's N."""
        shapes = samples[:, 0, :2].round().long()
        counts = shapes.prod(dim=1).tolist()
        patches = [row[1 : 1 + count] for row, count in zip(samples, counts, strict=True)]
        grids = torch.cat([torch.ones_like(shapes[:, :1]), shapes], dim=1)
        output = self.model.get_image_features(torch.cat(patches), grids, return_dict=True)
        layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
        by_image = [torch.cat(parts, dim=-1) for parts in zip(*layers, strict=True)]
        return _padded(by_image, self.feature_shape[0])

    def _grid(self, image: Image) -> tuple[int, int]:
        """Rows and columns of patches, as the processor resizes."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        height, width = smart_resize(
            image.height,
            image.width,
            self.patch * self.merge,
            min_pixels=(size := self._size_of(image))["shortest_edge"],
            max_pixels=size["longest_edge"],
        )
        return height // self.patch, width // self.patch

    def _size_of(self, image: Image) -> dict[str, int]:
        """Pixels of an image, at least and at most, within its budget."""
        longest = min(self.size["longest_edge"], image.tokens_within(1 << 40) * self.unit)
        return {"shortest_edge": min(self.size["shortest_edge"], longest), "longest_edge": longest}


class FixedSize:
    """Images that are resized to one square each, or cut into tiles of it (Gemma 3, InternVL).

    A sample is float[T, 1 + S] of T tiles at most; its first column is 1 where there is a tile.

    Args:
        model: the transformers model, on any device.
        processor: its image processor.
        max_tokens: L.
    """

    before, after = "\n\n<start_of_image>", "<end_of_image>\n\n"
    attends_to_itself = True

    def __init__(self, model: Any, processor: Any, max_tokens: int):
        self.model, self.processor = model, processor
        self.tile_tokens = self.tokens_of_a_tile(model.config)
        self.num_tiles = self.most_tiles(max_tokens // self.tile_tokens)
        if max_tokens < self.tile_tokens:
            raise ConfigError(
                f"encoders: max_tokens: an image of {model.config.model_type!r} takes "
                f"{self.tile_tokens} tokens, got {max_tokens}"
            )
        height, width = processor.size["height"], processor.size["width"]
        self.tile = (3, height, width)
        self.sample_shape = (self.num_tiles, 1 + 3 * height * width)
        width = model.config.get_text_config().hidden_size
        self.feature_shape = (self.num_tiles * self.tile_tokens, width)

    def tokens_of_a_tile(self, config: Any) -> int:
        """Embeddings of one square."""
        return config.mm_tokens_per_image

    def most_tiles(self, budget: int) -> int:
        """T, of a budget of tiles."""
        return 1

    def count_tiles(self, image: Image) -> int:
        """Tiles of an image."""
        return 1

    def options_of(self, image: Image) -> dict[str, Any]:
        """Further arguments of the processor."""
        return {}

    def measure(self, image: Image) -> tuple[int, tuple[int, int, int] | None]:
        """N; there is no grid."""
        return self.count_tiles(image) * self.tile_tokens, None

    def to_tensor(self, image: Image) -> Tensor:
        """An image -> float[T, 1 + S], zeros behind its last tile."""
        inputs = self.processor(
            images=image.to_pil(), return_tensors="pt", **self.options_of(image)
        )
        tiles = inputs["pixel_values"]
        sample = torch.zeros(self.sample_shape)
        if len(tiles) != self.count_tiles(image):
            raise MediaError(f"expected {self.count_tiles(image)} tiles, got {len(tiles)}")
        sample[: len(tiles), 0] = 1
        sample[: len(tiles), 1:] = tiles.flatten(1)
        return sample

    def forward(self, samples: Tensor) -> Features:
        """float[M, T, 1 + S] -> float[M, L, D] and the mask of each image's N."""
        is_tile = samples[..., 0] > 0.5
        tiles = samples[is_tile][:, 1:].unflatten(1, self.tile)
        embeddings = self.model.get_image_features(tiles, return_dict=True).pooler_output
        counts = is_tile.sum(dim=1).tolist()
        by_image = [part.flatten(0, 1) for part in embeddings.split(counts)]
        return _padded(by_image, self.feature_shape[0])


class Tiles(FixedSize):
    """Images cut into tiles near their aspect, with a thumbnail behind them, where the processor
    does so and two tiles are within L (InternVL)."""

    before, after = "<img>", "</img>\n"
    attends_to_itself = False

    def most_tiles(self, budget: int) -> int:
        options = self._options_within(budget)
        return options["max_patches"] + options["crop_to_patches"]  # and the thumbnail

    def tokens_of_a_tile(self, config: Any) -> int:
        return config.image_seq_length

    def count_tiles(self, image: Image) -> int:
        return self.processor.get_number_of_image_patches(
            image.height, image.width, self.options_of(image)
        )

    def options_of(self, image: Image) -> dict[str, Any]:
        budget = image.tokens_within(self.num_tiles * self.tile_tokens)
        return self._options_within(budget // self.tile_tokens)

    def _options_within(self, budget: int) -> dict[str, Any]:
        crops = bool(self.processor.crop_to_patches) and budget > 2
        tiles = min(budget - 1, self.processor.max_patches) if crops else 1
        return {"crop_to_patches": crops, "min_patches": 1, "max_patches": tiles}


Tower = NativeResolution | FixedSize

_TOWERS: dict[str, type[NativeResolution] | type[FixedSize]] = {
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        NativeResolution,
    ),
    "gemma3": FixedSize,
    "internvl": Tiles,
}
"""`model_type` of transformers -> how its tower reads images."""


def build_tower(model: Any, folder: Path, max_tokens: int, *, where: str) -> Tower:
    """How the tower of a transformers model reads images.

    Args:
        model: the model.
        folder: its folder, which has the config of its processor.
        max_tokens: L.
        where: the encoder's place in the config, for messages.

    Raises:
        ConfigError: mmllm does not know its tower.
        AssetError: the folder has no usable processor.
    """
    kind = model.config.model_type
    if kind not in _TOWERS:
        raise ConfigError(
            f"{where}: the language model is of type {kind!r}, whose own tower mmllm cannot use; "
            f"known are {', '.join(sorted(_TOWERS))}: give an encoder with weights of its own"
        )
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # whatever a reader of foreign files raises
        raise AssetError(
            f"{where}: {folder} has no usable image processor: {first_line(error)}; copy "
            "preprocessor_config.json of the published model next to its weights"
        ) from error
    return _TOWERS[kind](model, processor, max_tokens)


def _padded(parts: Sequence[Tensor], length: int) -> Features:
    """float[N, C] of each medium -> float[M, L, C], zeros behind each, and its mask."""
    tokens = pad_sequence([part.float() for part in parts], batch_first=True)
    tokens = torch.nn.functional.pad(tokens, (0, 0, 0, length - tokens.shape[1]))
    counts = torch.tensor([len(part) for part in parts], device=tokens.device)
    return Features(tokens, torch.arange(length, device=tokens.device) < counts[:, None])
