"""Video -> patches of space and time, by a video model of transformers: VideoMAE or V-JEPA 2.

Tong et al. 2022 (arXiv 2203.12602); Assran et al. 2025 (arXiv 2506.09985).
Legend: M media, F frames, t steps of time (tubelets of a few frames), h x w patches, L tokens,
C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from mmllm.conversation import Video
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.encoders.loading import ModelFolder
from mmllm.encoders.pooling import check_grid, check_parts, pool_grid, pool_time
from mmllm.encoders.pretrained import PretrainedConfig, TransformersEncoder
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class TransformersVideoConfig(PretrainedConfig):
    """Which weights, how many frames, and how the output is pooled."""

    modality: Literal["video"] = "video"
    frames: int | None = None
    """F: the middles of so many equal parts of the video; None: as many as in training."""
    layer: int = -1
    """Output of which block; -1 is the last, with the model's final norm where it has one."""
    steps: int | None = None
    """Time is averaged to so many equal parts; None keeps every tubelet."""
    grid: int | None = None
    """Patches of a step are averaged to grid x grid; None keeps them all."""


class TransformersVideoEncoder(TransformersEncoder):
    """float[M, F, 3, H, W] -> float[M, L, C]: step after step, patches row by row."""

    component = "transformers_video"
    modality: ClassVar[str] = "video"
    model_classes: ClassVar = {"videomae": "VideoMAEModel", "vjepa2": "VJEPA2Model"}
    processor_class = "AutoVideoProcessor"
    fingerprint_fields = ("steps", "grid")

    def configure(self, source: ModelFolder, model_type: str, model: Any) -> None:
        config, where = self.config, self.component
        is_videomae = model_type == "videomae"
        self._input = "pixel_values" if is_videomae else "pixel_values_videos"
        self._options: dict[str, Any] = {}
        trained = model.num_frames if is_videomae else model.frames_per_clip
        self._frames = self.num_frames = trained if config.frames is None else config.frames
        if is_videomae and self._frames != trained:
            raise ConfigError(f"{where}.frames: this model takes {trained}, got {config.frames}")
        if not is_videomae:
            self._options["skip_predictor"] = True
            del self.network.predictor
        if self._frames < 1 or self._frames % model.tubelet_size:
            raise ConfigError(
                f"{where}.frames: expected a multiple of {model.tubelet_size}, got {self._frames}"
            )
        self.choose_layer(model.num_hidden_layers)
        wide, high = (
            Video.from_numpy(np.zeros((1, *size, 3), np.uint8), 1.0)
            for size in ((48, 64), (64, 48))
        )
        self.sample_shape = self.probe_sample_shape(wide, high)
        height, width = self.sample_shape[2:]
        self._grid = (height // model.patch_size, width // model.patch_size)
        self._steps = self._frames // model.tubelet_size
        check_grid(config.grid, self._grid, where=where)
        check_parts("steps", config.steps, self._steps, where=where)
        patches = self._grid[0] * self._grid[1] if config.grid is None else config.grid**2
        self.feature_shape = ((config.steps or self._steps) * patches, model.hidden_size)

    def preprocessing(self) -> Any:
        return [self.processor.to_dict(), self._frames, "middles"]

    def to_tensor(self, medium: Video) -> Tensor:
        """A video -> float[F, 3, H, W]; a video of fewer frames repeats them."""

        inputs = self.processor(
            videos=medium.sample_frames(self._frames),
            do_sample_frames=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )
        return inputs[self._input][0].float()

    def forward(self, samples: Tensor) -> Features:
        """float[M, F, 3, H, W] -> float[M, L, C]."""
        inputs = {self._input: self.on_network(samples), **self._options}
        states = self.hidden_states(**inputs).unflatten(1, (self._steps, -1))  # [M, t, h * w, C]
        tokens = pool_time(states, self.config.steps)
        tokens = pool_grid(tokens, self._grid, self.config.grid)
        return Features(tokens.flatten(1, 2).float())


def build(config: TransformersVideoConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    return TransformersVideoEncoder(config)
