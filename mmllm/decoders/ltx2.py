"""Clips with their sound by LTX-2 (HaCohen et al. 2026): one DiT over the tokens of both.

Legend: M clips, F frames, H x W pixels, T spectrogram frames, B mel bands, P caption tokens, E the
width of all layers of the text encoder together. V and A count the latents of pictures and sound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmllm.conversation import Audio, Medium, Video
from mmllm.decoders.base import Condition, InitMediaConfig, SequenceConfig
from mmllm.decoders.mel import log_mel
from mmllm.decoders.visual import VideoConfig, VideoDecoder, check_frames
from mmllm.errors import ConfigError
from mmllm.media import resample

_SHRINK = 4
"""Spectrogram frames to one latent of the sound, in every codec of its class."""
_LONGEST = 120.0
"""Seconds of a clip, by which its sound is made."""


@dataclass(frozen=True)
class LTX2Config(VideoConfig, SequenceConfig, InitMediaConfig):
    """An `LTX2Pipeline`; the defaults are the pipeline's, which are for LTX-2.3. `fps` is part of
    what it is told.

    Beside `guidance`, of the pictures, it leads the sound by `audio_guidance_scale`, both away from
    pictures and sound that do not hear of one another by `modality_scale` (1: not), and from a
    transformer without self-attention in layer `stg_block` by `stg_scale` (0: not). A
    `guidance` of 1 or less switches all of them off. LTX-2.0 wants a `stg_block` of 29.
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

    Media and latents are flat: all of the pictures, then all of the sound. A clip without a sound
    track counts as one that is silent.
    """

    pipelines: ClassVar = ["LTX2Pipeline"]
    masks: ClassVar = {"prompt_embeds": "prompt_attention_mask"}
    passes_sigmas: ClassVar[bool] = True
    img2img_class = "LTX2ImageToVideoPipeline"
    init_modality = "image"

    init_one_by_one = True  # it compresses a picture like a frame of a film, one by one

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
    def ticks(self) -> int:
        """Latents of the sound in time."""
        codec = self.component_config("audio_vae")
        per_second = codec["sample_rate"] / codec["mel_hop_length"] / _SHRINK
        return round(self.config.frames / self.config.fps * per_second)

    def _size(self) -> tuple[int, int]:
        vae = self.component_config("vae")
        halvings = 2 ** sum(vae["spatio_temporal_scaling"])
        time = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * halvings
        space = vae.get("spatial_compression_ratio") or vae["patch_size"] * halvings
        check_frames(self.config.frames, time)
        seconds = self.config.frames / self.config.fps
        if seconds > _LONGEST or self.ticks < 1:
            raise ConfigError(
                f"fps: {self.config.frames} frames at {self.config.fps:g} a second are "
                f"{seconds:.3g} s, and their sound {self.ticks} latents; expected at least 1, and "
                f"at most {_LONGEST:g} s"
            )
        return self._chosen((512, 768), math.lcm(32, space))

    def _read(self, captions: Sequence[str]) -> Condition:
        words, mask, _, _ = self.pipeline.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_caption_tokens,
            device=self.device,
        )
        return {"prompt_embeds": words, "prompt_attention_mask": mask}

    def _preprocess(self, medium: Video) -> Tensor:
        """Pixels float[3, F, H, W] in [-1, 1] and log-mels float[C, T, B], as LTX-2 was trained
        on (1024 samples a window, magnitudes, Slaney's scale), one behind the other."""
        codec = self.component_config("audio_vae")
        rate, hop, channels = codec["sample_rate"], codec["mel_hop_length"], codec["in_channels"]
        frames = self._mel_shape[1]
        clip = medium.decoded()
        assert isinstance(clip, Video)
        wave = torch.zeros(channels, frames * hop)
        if clip.audio is not None:
            sound = torch.from_numpy(resample(clip.audio, rate, mono=channels == 1).to_numpy())
            sound = sound[:channels, : wave.shape[1]]  # a single channel is heard on all
            wave[:, : sound.shape[1]] = sound
        mel = log_mel(wave, rate, window=1024, hop=hop, bands=codec["mel_bins"])[:, :frames]
        return torch.cat([super()._preprocess(clip).flatten(), mel.flatten()])

    def _mode(self, samples: Tensor) -> Tensor:
        """Normalised already: the two codecs have statistics of their own."""
        pipeline, mels = self.pipeline, math.prod(self._mel_shape)
        pixels = samples[:, :-mels].unflatten(1, (3, self.config.frames, *self.size))
        pictures = pipeline.vae.encode(pixels).latent_dist.mode()
        sound = pipeline.audio_vae.encode(samples[:, -mels:].unflatten(1, self._mel_shape))
        vae, audio = pipeline.vae, pipeline.audio_vae
        pictures = pipeline._normalize_latents(
            pictures, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )
        ticks = pipeline._normalize_audio_latents(
            pipeline._pack_audio_latents(sound.latent_dist.mode()),
            audio.latents_mean,
            audio.latents_std,
        )
        return torch.cat([pictures.flatten(1), ticks.flatten(1)], dim=1)

    def _normalise(self, latents: Tensor) -> Tensor:
        return latents

    def _denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        pipeline, settings = self.pipeline, self.pipeline.transformer.config
        vae, ticks, fps = pipeline.vae, self.ticks, self.config.fps
        grid = (
            (self.config.frames - 1) // vae.temporal_compression_ratio + 1,
            *(side // vae.spatial_compression_ratio for side in self.size),
        )
        num = noisy.shape[1] - ticks * settings.audio_in_channels  # V
        patches = settings.patch_size, settings.patch_size_t
        pictures = noisy[:, :num].unflatten(1, (settings.in_channels, *grid))
        mask = condition["prompt_attention_mask"]
        words, sound_words, attended = pipeline.connectors(
            condition["prompt_embeds"] * mask[..., None],  # read as integers: the product's tie
            mask,
            padding_side=pipeline.tokenizer.padding_side,
        )
        rope, sound_rope = pipeline.transformer.rope, pipeline.transformer.audio_rope
        seen, heard = pipeline.transformer(
            hidden_states=pipeline._pack_latents(pictures, *patches),
            audio_hidden_states=noisy[:, num:].unflatten(1, (ticks, settings.audio_in_channels)),
            encoder_hidden_states=words,
            audio_encoder_hidden_states=sound_words,
            timestep=timesteps,
            sigma=timesteps,
            encoder_attention_mask=attended,
            audio_encoder_attention_mask=attended,
            num_frames=grid[0],
            height=grid[1],
            width=grid[2],
            fps=fps,
            audio_num_frames=ticks,
            video_coords=rope.prepare_video_coords(len(noisy), *grid, noisy.device, fps=fps),
            audio_coords=sound_rope.prepare_audio_coords(len(noisy), ticks, noisy.device),
            isolate_modalities=False,
            use_cross_timestep=self._crossed,
            return_dict=False,
        )
        seen = pipeline._unpack_latents(seen, *grid, *patches)
        return torch.cat([seen.flatten(1), heard.flatten(1)], dim=1)

    def _ready(self, condition: Condition) -> Condition:
        """The pipeline counts on captions that end at P: a predicted mask is filled up to there."""
        ready = super()._ready(condition)
        mask = ready["prompt_attention_mask"]
        return ready | {"prompt_attention_mask": mask.cummax(-1).values}

    def _options(self) -> dict[str, Any]:
        return {
            "frame_rate": self.config.fps,
            "use_cross_timestep": self._crossed,
            **super()._options(),
        }

    def _guidance(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
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
            **self._guided(negative()),
        }

    def _media(self, output: Any) -> list[Medium]:
        rate = self.pipeline.vocoder.config.output_sampling_rate
        waves = output.audio.float().clip(-1, 1).cpu().numpy()  # float32[M, C, N]
        return [
            replace(clip, audio=Audio.from_numpy(wave, sample_rate=rate))  # pyright: ignore
            for clip, wave in zip(super()._media(output), waves, strict=True)
        ]

    @property
    def _crossed(self) -> bool:
        """Whether each modality is modulated by the other's time: since LTX-2.3."""
        return bool(self.component_config("transformer").get("cross_attn_mod"))

    @property
    def _mel_shape(self) -> tuple[int, int, int]:
        """C, T, B of what the sound's codec, causal in time, encodes to `ticks`."""
        codec = self.component_config("audio_vae")
        return codec["in_channels"], self.ticks * _SHRINK - _SHRINK + 1, codec["mel_bins"]


def build(config: LTX2Config) -> LTX2Decoder:
    return LTX2Decoder(config)
