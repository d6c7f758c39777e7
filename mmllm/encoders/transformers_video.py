"""Video -> patches of space and time, by a video model of transformers: VideoMAE, V-JEPA 2,
VideoPrism or Perception Encoder (video), which has one token a frame.

Tong et al. 2022 (arXiv 2203.12602); Assran et al. 2025 (arXiv 2506.09985); Zhao et al. 2024 (arXiv
2402.13217); Perception Encoder Audiovisual (Meta 2025).
Legend: M media, F frames, t steps of time (tubelets of a few frames), h x w patches, L tokens,
C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from mmllm.conversation import Video
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.encoders.loading import ModelFolder, ModelPart
from mmllm.encoders.pooling import check_grid, check_parts, pool_grid, pool_time
from mmllm.encoders.pretrained import PretrainedConfig, TransformersEncoder
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class TransformersVideoConfig(PretrainedConfig):
    """Which weights, how many frames, and how the output is pooled."""

    modality: Literal["video"] = "video"
    frames: int | None = None
    """F: the middles of so many equal parts of the video; None: as many as in training;
    16 for Perception Encoder, which takes any number."""
    layer: int = -1
    """Output of which block; -1 is the last, with the model's final norm where it has one."""
    steps: int | None = None
    """Time is averaged to so many equal parts; None keeps every tubelet."""
    grid: int | None = None
    """Patches of a step are averaged to grid x grid; None keeps them all."""


@dataclass(frozen=True)
class _Sizes:
    """What a family's config says of its tokens.

    Attributes:
        frames: as many as in training.
        is_fixed: whether it takes no other number.
        tubelet: frames of a step.
        patch: pixels of a patch; None: a frame is one.
        layers: blocks whose output may be chosen.
    """

    frames: int
    is_fixed: bool
    tubelet: int
    patch: tuple[int, int] | None
    layers: int


_SIZES: dict[str, Callable[[Any], _Sizes]] = {
    "VideoMAEModel": lambda model: _Sizes(
        model.num_frames, True, model.tubelet_size, (model.patch_size,) * 2, model.num_hidden_layers
    ),
    "VJEPA2Model": lambda model: _Sizes(
        model.frames_per_clip,
        False,
        model.tubelet_size,
        (model.patch_size,) * 2,
        model.num_hidden_layers,
    ),
    # Its blocks are of space, then of time: only what comes after both is a token of a patch.
    "VideoPrismVisionModel": lambda model: _Sizes(
        model.num_frames, True, model.tubelet_size[0], tuple(model.tubelet_size[1:]), 1
    ),
    "PeVideoEncoder": lambda _: _Sizes(16, False, 1, None, 1),
}


class TransformersVideoEncoder(TransformersEncoder):
    """float[M, F, 3, H, W] -> float[M, L, C]: step after step, patches row by row."""

    component = "transformers_video"
    modality: ClassVar[str] = "video"
    model_classes: ClassVar = {
        "videomae": "VideoMAEModel",
        "vjepa2": "VJEPA2Model",
        "videoprism": "VideoPrismVisionModel",
        "videoprism_vision_model": "VideoPrismVisionModel",
        "pe_video": "PeVideoEncoder",
        "pe_video_encoder": "PeVideoEncoder",
        "pe_audio_video": "PeVideoEncoder",
    }
    parts: ClassVar = {
        "videoprism": ModelPart("vision_config", {"video_model.vision_model.": ""}),
        "pe_video": ModelPart("video_config", {"video_encoder.": ""}),
        "pe_audio_video": ModelPart(
            "audio_video_config.video_config", {"video_model.video_encoder.": ""}
        ),
    }
    processor_class = "AutoVideoProcessor"
    fingerprint_fields = ("steps", "grid")

    def configure(self, source: ModelFolder, model_type: str, model: Any) -> None:
        config, where, name = self.config, self.component, self.model_classes[model_type]
        self._input = "pixel_values" if name == "VideoMAEModel" else "pixel_values_videos"
        self._options: dict[str, Any] = {}
        sizes = _SIZES[name](model)
        self._frames = self.num_frames = config.frames or sizes.frames
        if config.frames is not None and config.frames < 1:
            raise ConfigError(f"{where}.frames: expected at least 1, got {config.frames}")
        if sizes.is_fixed and self._frames != sizes.frames:
            raise ConfigError(
                f"{where}.frames: this model takes {sizes.frames}, got {config.frames}"
            )
        if name == "VJEPA2Model":
            self._options["skip_predictor"] = True
            del self.network.predictor
        if self._frames % sizes.tubelet:
            raise ConfigError(
                f"{where}.frames: expected a multiple of {sizes.tubelet}, got {self._frames}"
            )
        self.choose_layer(sizes.layers)
        wide, high = (
            Video.from_numpy(np.zeros((1, *size, 3), np.uint8), 1.0)
            for size in ((48, 64), (64, 48))
        )
        self.sample_shape = self.probe_sample_shape(wide, high)
        height, width = self.sample_shape[2:]
        patch_height, patch_width = sizes.patch or (height, width)
        self._grid = (height // patch_height, width // patch_width)
        self._steps = self._frames // sizes.tubelet
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
