"""Video by SANA-Video (Chen et al. 2025): a linear DiT that cross-attends to the states of a Gemma.

Legend: M media, F frames, H x W pixels, P caption tokens, E their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mmllm.decoders.config import SequenceConfig, VideoConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.latents import standardize
from mmllm.decoders.sana import GemmaPrompt
from mmllm.decoders.visual import VideoDecoder, check_frames
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class SanaVideoConfig(VideoConfig, SequenceConfig):
    """A `SanaVideoPipeline`. The weights do not fix the size; the defaults are the pipeline's."""

    steps: int = 50
    guidance: float = 6.0
    max_caption_tokens: int = 300
    frames: int = 81
    fps: float = 16.0
    height: int = 480
    width: int = 832


class SanaVideoDecoder(GemmaPrompt, VideoDecoder):
    """A decoder of video whose codec is Wan's or LTX-2's."""

    pipelines: ClassVar = ["SanaVideoPipeline"]

    @property
    def max_side(self) -> int:
        """The end of the table of rotary positions."""
        (space, _), (_, *patch) = self._scales, self._patch
        return self._positions * space * min(patch)

    @property
    def max_frames(self) -> int:
        return (self._positions * self._patch[0] - 1) * self._scales[1] + 1

    @property
    def _positions(self) -> int:
        return self.component_config("transformer").get("rope_max_seq_len", 1024)

    @property
    def _patch(self) -> list[int]:
        """Latents in time, height and width of one token."""
        return self.component_config("transformer")["patch_size"]

    @property
    def _scales(self) -> tuple[int, int]:
        """Pixels along a side, and frames, of one latent."""
        vae = self.component_config("vae")
        for names in (
            ("scale_factor_spatial", "scale_factor_temporal"),  # Wan's
            ("spatial_compression_ratio", "temporal_compression_ratio"),  # LTX-2's
        ):
            if all(name in vae for name in names):
                return vae[names[0]], vae[names[1]]
        raise ConfigError(
            f"video: {self.folder}: a SanaVideoPipeline with the codec {vae.get('_class_name')}, "
            "whose scales its config does not give; expected AutoencoderKLWan or "
            "AutoencoderKLLTX2Video"
        )

    def compute_size(self) -> tuple[int, int]:
        space, time = self._scales
        check_frames(self.config.frames, time)
        _, *patch = self._patch
        return self.resolve_size((480, 832), max(32, *(space * side for side in patch)))

    def normalize_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        buffers = dict(vae.named_buffers())
        if "latents_mean" not in buffers:  # Wan's are in its config
            return standardize(vae, latents)
        mean, std = (buffers[name].view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        return (latents - mean.to(latents)) / std.to(latents)

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return self.pipeline.transformer(
            noisy,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=timesteps,
            return_dict=False,
        )[0]

    def pipeline_kwargs(self) -> dict[str, Any]:
        kwargs = super().pipeline_kwargs()
        kwargs["frames"] = kwargs.pop("num_frames")
        return kwargs


def build(config: SanaVideoConfig) -> SanaVideoDecoder:
    return SanaVideoDecoder(config)
