"""Video with audio by LTX-2 (HaCohen et al. 2026): one DiT over the tokens of both.

Legend: M media, F frames, H x W pixels, C audio channels, T spectrogram frames, B mel bands,
P caption tokens, E width of all layers of the text encoder together, V latent values of the frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmllm.conversation import Audio, Medium, Video
from mmllm.decoders.config import InitMediaConfig, SequenceConfig, VideoConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.mel import log_mel
from mmllm.decoders.prompts import encode_with_mask
from mmllm.decoders.visual import VideoDecoder, check_frames
from mmllm.errors import ConfigError

_AUDIO_SCALE = 4
"""Spectrogram frames per audio latent, of every codec of its class."""
_MAX_SECONDS = 120.0


@dataclass(frozen=True)
class LTX2Config(VideoConfig, SequenceConfig, InitMediaConfig):
    """An `LTX2Pipeline`; the defaults are the pipeline's, which are for LTX-2.3. The model is
    conditioned on `fps`. A `guidance` of 1 or less switches all kinds of guidance off.

    Attributes:
        guidance: classifier-free guidance of the frames.
        audio_guidance_scale: classifier-free guidance of the audio.
        modality_scale: guidance away from frames and audio that do not attend to each other;
            1: off.
        stg_scale: guidance away from a transformer without self-attention in one block (STG, Hyung
            et al. 2024); 0: off.
        stg_block: the index of that block; 29 for LTX-2.0.
    """

    steps: int = 30
    guidance: float = 3.0
    audio_guidance_scale: float = 7.0
    modality_scale: float = 3.0
    stg_scale: float = 1.0
    stg_block: int = 28
    max_caption_tokens: int = 1024
    frames: int = 121
    fps: float = 24.0


class LTX2Decoder(VideoDecoder):
    """Condition: `prompt_embeds` [P, E], captions at the end of P, and `prompt_attention_mask` [P].

    Media and latents are flat: all of the frames, then all of the audio. A video without an audio
    track counts as silent.
    """

    pipelines: ClassVar = ["LTX2Pipeline"]
    masks: ClassVar = {"prompt_embeds": "prompt_attention_mask"}
    passes_sigmas: ClassVar[bool] = True
    img2img_class = "LTX2ImageToVideoPipeline"
    init_modality = "image"

    init_one_by_one = True  # it compresses the image like a frame of a film, with one generator

    def __init__(self, config: LTX2Config):
        super().__init__(config)
        settings = self.component_config("connectors")
        for kind in ("video", "audio"):
            registers = settings[f"{kind}_connector_num_learnable_registers"]
            if registers and config.max_caption_tokens % registers:
                raise ConfigError(
                    f"max_caption_tokens: expected a multiple of {registers} (the learned tokens "
                    f"that fill this pipeline's captions), got {config.max_caption_tokens}"
                )
        layers = self.component_config("transformer")["num_layers"]
        if config.stg_scale > 0 and not 0 <= config.stg_block < layers:
            raise ConfigError(
                f"stg_block: expected one of the transformer's layers, 0 to {layers - 1}, got "
                f"{config.stg_block}; or a stg_scale of 0"
            )

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens, settings = self.config.max_caption_tokens, self.component_config("connectors")
        width = settings["caption_channels"] * settings["text_proj_in_factor"]
        return {"prompt_embeds": (tokens, width), "prompt_attention_mask": (tokens,)}

    @property
    def audio_length(self) -> int:
        """Audio latents in time."""
        codec = self.component_config("audio_vae")
        per_second = codec["sample_rate"] / codec["mel_hop_length"] / _AUDIO_SCALE
        return round(self.config.frames / self.config.fps * per_second)

    def compute_size(self) -> tuple[int, int]:
        vae = self.component_config("vae")
        scale = 2 ** sum(vae["spatio_temporal_scaling"])
        time = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * scale
        space = vae.get("spatial_compression_ratio") or vae["patch_size"] * scale
        check_frames(self.config.frames, time)
        seconds = self.config.frames / self.config.fps
        if seconds > _MAX_SECONDS or self.audio_length < 1:
            raise ConfigError(
                f"fps: {self.config.frames} frames at {self.config.fps:g} a second are "
                f"{seconds:.3g} s, and their audio {self.audio_length} latents; expected at least "
                f"1, and at most {_MAX_SECONDS:g} s"
            )
        return self.resolve_size((512, 768), math.lcm(32, space))

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        return encode_with_mask(self, captions)

    def to_tensor(self, medium: Video) -> Tensor:
        """Pixels float[3, F, H, W] in [-1, 1] and then log-mels float[C, T, B], flattened. Mel
        set-up of LTX-2's training: windows of 1024 samples, magnitudes, Slaney's scale."""
        codec = self.component_config("audio_vae")
        rate, hop, channels = codec["sample_rate"], codec["mel_hop_length"], codec["in_channels"]
        frames = self._mel_shape[1]
        video = medium.decoded()
        assert isinstance(video, Video)
        wave = torch.zeros(channels, frames * hop)
        if video.audio is not None:
            track = torch.from_numpy(video.audio.resample(rate, mono=channels == 1).to_numpy())
            track = track[:channels, : wave.shape[1]]  # a single channel is broadcast to all
            wave[:, : track.shape[1]] = track
        mel = log_mel(wave, rate, window=1024, hop=hop, bands=codec["mel_bins"])[:, :frames]
        return torch.cat([super().to_tensor(video).flatten(), mel.flatten()])

    def encode_latents(self, samples: Tensor) -> Tensor:
        """Latents [M, ...] that are normalised already, by the statistics of each codec."""
        pipeline, mels = self.pipeline, math.prod(self._mel_shape)
        pixels = samples[:, :-mels].unflatten(1, (3, self.config.frames, *self.size))
        vae, audio_vae = pipeline.vae, pipeline.audio_vae
        frames = pipeline._normalize_latents(
            vae.encode(pixels).latent_dist.mode(),
            vae.latents_mean,
            vae.latents_std,
            vae.config.scaling_factor,
        )
        audio = audio_vae.encode(samples[:, -mels:].unflatten(1, self._mel_shape))
        audio = pipeline._normalize_audio_latents(
            pipeline._pack_audio_latents(audio.latent_dist.mode()),
            audio_vae.latents_mean,
            audio_vae.latents_std,
        )
        return torch.cat([frames.flatten(1), audio.flatten(1)], dim=1)

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return latents

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        pipeline, settings = self.pipeline, self.pipeline.transformer.config
        vae, audio_length, fps = pipeline.vae, self.audio_length, self.config.fps
        grid = (
            (self.config.frames - 1) // vae.temporal_compression_ratio + 1,
            *(side // vae.spatial_compression_ratio for side in self.size),
        )
        num = noisy.shape[1] - audio_length * settings.audio_in_channels  # V
        patches = settings.patch_size, settings.patch_size_t
        frames = noisy[:, :num].unflatten(1, (settings.in_channels, *grid))
        mask = condition["prompt_attention_mask"]
        embeds, audio_embeds, attention_mask = pipeline.connectors(
            # The mask is read as integers: the product ties it to the loss.
            condition["prompt_embeds"] * mask[..., None],
            mask,
            padding_side=pipeline.tokenizer.padding_side,
        )
        rope, audio_rope = pipeline.transformer.rope, pipeline.transformer.audio_rope
        predicted, predicted_audio = pipeline.transformer(
            hidden_states=pipeline._pack_latents(frames, *patches),
            audio_hidden_states=noisy[:, num:].unflatten(
                1, (audio_length, settings.audio_in_channels)
            ),
            encoder_hidden_states=embeds,
            audio_encoder_hidden_states=audio_embeds,
            timestep=timesteps,
            sigma=timesteps,
            encoder_attention_mask=attention_mask,
            audio_encoder_attention_mask=attention_mask,
            num_frames=grid[0],
            height=grid[1],
            width=grid[2],
            fps=fps,
            audio_num_frames=audio_length,
            video_coords=rope.prepare_video_coords(len(noisy), *grid, noisy.device, fps=fps),
            audio_coords=audio_rope.prepare_audio_coords(len(noisy), audio_length, noisy.device),
            isolate_modalities=False,
            use_cross_timestep=self._use_cross_timestep,
            return_dict=False,
        )
        predicted = pipeline._unpack_latents(predicted, *grid, *patches)
        return torch.cat([predicted.flatten(1), predicted_audio.flatten(1)], dim=1)

    def prepare_condition(self, condition: Condition) -> Condition:
        """The pipeline expects captions that end at P: a predicted mask is filled up to there."""
        ready = super().prepare_condition(condition)
        mask = ready["prompt_attention_mask"]
        return ready | {"prompt_attention_mask": mask.cummax(-1).values}

    def pipeline_kwargs(self) -> dict[str, Any]:
        return {
            "frame_rate": self.config.fps,
            "use_cross_timestep": self._use_cross_timestep,
            **super().pipeline_kwargs(),
        }

    def guidance_kwargs(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        if scale <= 1:
            scales = {"guidance_scale": 1.0, "audio_guidance_scale": 1.0}
            scales |= dict.fromkeys(("stg_scale", "audio_stg_scale"), 0.0)
            return scales | dict.fromkeys(("modality_scale", "audio_modality_scale"), 1.0)
        config = self.config
        return {
            "guidance_scale": scale,
            "audio_guidance_scale": config.audio_guidance_scale,
            "modality_scale": config.modality_scale,
            "audio_modality_scale": config.modality_scale,
            "stg_scale": config.stg_scale,
            "audio_stg_scale": config.stg_scale,
            "spatio_temporal_guidance_blocks": [config.stg_block],
            **self.negative_kwargs(negative()),
        }

    def to_media(self, output: Any) -> list[Medium]:
        rate = self.pipeline.vocoder.config.output_sampling_rate
        waves = output.audio.float().clip(-1, 1).cpu().numpy()  # float32[M, C, N]
        return [
            replace(video, audio=Audio.from_numpy(wave, sample_rate=rate))  # pyright: ignore
            for video, wave in zip(super().to_media(output), waves, strict=True)
        ]

    @property
    def _use_cross_timestep(self) -> bool:
        """Whether each modality is modulated by the other's time: since LTX-2.3."""
        return bool(self.component_config("transformer").get("cross_attn_mod"))

    @property
    def _mel_shape(self) -> tuple[int, int, int]:
        """C, T, B of what the audio codec, causal in time, encodes to `audio_length` latents."""
        codec = self.component_config("audio_vae")
        return (
            codec["in_channels"],
            self.audio_length * _AUDIO_SCALE - _AUDIO_SCALE + 1,
            codec["mel_bins"],
        )


def build(config: LTX2Config) -> LTX2Decoder:
    return LTX2Decoder(config)
