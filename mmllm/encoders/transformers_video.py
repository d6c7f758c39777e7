"""Clips -> patches of space and time, by a video model of transformers: VideoMAE or V-JEPA 2.

Tong et al. 2022 (arXiv 2203.12602); Assran et al. 2025 (arXiv 2506.09985).
Legend: M clips, F frames, t steps of time (tubelets of a few frames), h x w patches, L tokens,
C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from mmllm.conversation import Video
from mmllm.encoders import pretrained
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.errors import ConfigError

_WHERE = "transformers_video"
_MODELS = {
    "videomae": ("VideoMAEModel", "pixel_values"),
    "vjepa2": ("VJEPA2Model", "pixel_values_videos"),
}
"""`model_type` of a folder -> the class of transformers that reads it, and its input."""


@dataclass(frozen=True)
class TransformersVideoConfig:
    """Which weights, how many frames, what of the answer."""

    weights: str
    """A folder or a hub id."""
    modality: Literal["video"] = "video"
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    frames: int | None = None
    """F: the middles of so many equal parts of the clip; None is what the model was trained on."""
    layer: int = -1
    """Output of which block; -1 is the last, with the model's final norm where it has one."""
    steps: int | None = None
    """Time is averaged to so many equal parts; None keeps every tubelet."""
    grid: int | None = None
    """Patches of a step are averaged to grid x grid; None keeps them all."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights; tokens are float32."""


class TransformersVideoEncoder(ModalityEncoder):
    """float[M, F, 3, H, W] -> float[M, L, C]: step after step, patches row by row."""

    modality: ClassVar[str] = "video"

    def __init__(self, config: TransformersVideoConfig) -> None:
        """Opens and loads the weights; raises AssetError and ConfigError."""
        super().__init__()
        import transformers

        self.config = config
        source = pretrained.Source(config.weights, config.revision, where=_WHERE)
        kind = source.family(list(_MODELS))
        name, self._input = _MODELS[kind]
        self.processor = source.preprocessor(transformers.AutoVideoProcessor)
        self.network = source.load(getattr(transformers, name), config.dtype)
        of: Any = self.network.config
        self._options: dict[str, Any] = {}
        own = of.num_frames if kind == "videomae" else of.frames_per_clip
        self._frames = self.num_frames = own if config.frames is None else config.frames
        if kind == "videomae" and self._frames != own:
            raise ConfigError(f"{_WHERE}.frames: this model takes {own}, got {config.frames}")
        if kind == "vjepa2":
            self._options["skip_predictor"] = True
            del self.network.predictor
        if self._frames < 1 or self._frames % of.tubelet_size:
            raise ConfigError(
                f"{_WHERE}.frames: expected a multiple of {of.tubelet_size}, got {self._frames}"
            )
        block = pretrained.block_number(config.layer, of.num_hidden_layers, where=_WHERE)
        self._after = None if block == of.num_hidden_layers else block

        blanks = (
            Video.from_numpy(np.zeros((1, *s, 3), np.uint8), 1.0) for s in ((48, 64), (64, 48))
        )
        self.sample_shape = pretrained.one_shape(*map(self.preprocess, blanks), where=_WHERE)
        height, width = self.sample_shape[2:]
        self._grid = (height // of.patch_size, width // of.patch_size)
        self._steps = self._frames // of.tubelet_size
        pretrained.check_grid(config.grid, self._grid, where=_WHERE)
        pretrained.check_parts("steps", config.steps, self._steps, where=_WHERE)
        patches = self._grid[0] * self._grid[1] if config.grid is None else config.grid**2
        self.feature_shape = ((config.steps or self._steps) * patches, of.hidden_size)
        self._fingerprint = pretrained.fingerprint(
            {
                "component": _WHERE,
                "weights": source.hash,
                "preprocessing": [self.processor.to_dict(), self._frames, "middles"],
                "layer": block,
                "steps": config.steps,
                "grid": config.grid,
                "dtype": config.dtype,
            }
        )
        self.freeze()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def _preprocess(self, medium: Video) -> Tensor:
        """A clip -> float[F, 3, H, W]; a clip of fewer frames repeats them."""
        from mmllm import media

        made = self.processor(
            videos=media.sample_frames(medium, self._frames),
            do_sample_frames=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )
        return made[self._input][0].float()

    def forward(self, samples: Tensor) -> Features:
        """float[M, F, 3, H, W] -> float[M, L, C]."""
        inputs = {self._input: pretrained.placed(samples, self.network), **self._options}
        found = pretrained.hidden(self.network, self._after, **inputs)
        found = found.unflatten(1, (self._steps, -1))  # [M, t, h * w, C]
        found = pretrained.pool_time(found, self.config.steps)
        found = pretrained.pool_grid(found, self._grid, self.config.grid)
        return Features(found.flatten(1, 2).float())


def build(config: TransformersVideoConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    return TransformersVideoEncoder(config)
