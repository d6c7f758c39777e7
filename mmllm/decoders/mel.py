"""What decoders of mel spectrograms share: sounds in, a codec of pictures, a vocoder, sounds out.

Legend: M sounds, N waveform samples, T spectrogram frames, B mel bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Audio, Medium
from mmllm.decoders.base import DecoderConfig, ModalityDecoder
from mmllm.decoders.visual import vae_scale_factor
from mmllm.errors import ConfigError
from mmllm.media import resample


@dataclass(frozen=True)
class MelConfig(DecoderConfig):
    """`seconds`: how long sounds are; None is what the UNet was trained for. `window`: samples of
    the spectrogram's Fourier transform, which no pipeline tells (1024 at 16 kHz)."""

    seconds: float | None = None
    window: int = 1024


class MelDecoder(ModalityDecoder):
    modality = "audio"

    def __init__(self, config: MelConfig):
        super().__init__(config)
        vocoder, self.shrink = self.component_config("vocoder"), vae_scale_factor(self)
        self.bands: int = vocoder["model_in_dim"]
        self.rate: int = vocoder["sampling_rate"]
        self.hop = math.prod(vocoder["upsample_rates"])
        self._trained = (
            self.component_config("unet")["sample_size"] * self.shrink * self.hop / self.rate
        )
        self._configure(config)

    def _configure(self, config: MelConfig) -> None:
        super()._configure(config)
        if self.seconds * self.rate < self.hop:
            raise ConfigError(
                f"seconds: expected at least {self.hop / self.rate}, got {self.seconds}"
            )

    @property
    def seconds(self) -> float:
        """How long a sound is."""
        return self.config.seconds or self._trained

    def _measures(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    @property
    def frames(self) -> int:
        """T, as the pipeline rounds it: whole frames, then up to whole latents."""
        frames = int(self.seconds / (self.hop / self.rate))
        return -(-frames // self.shrink) * self.shrink

    def _preprocess(self, medium: Audio) -> Tensor:
        """Cut to `seconds` or padded with silence, its peak at 0.5 -> float[1, T, B], the natural
        logarithm of mel magnitudes, as the vocoders of AudioLDM read them (Liu et al. 2023)."""
        wave = torch.from_numpy(resample(medium, self.rate, mono=True).to_numpy())[0]
        wave = wave[: int(self.seconds * self.rate)]
        wave = wave - wave.mean()
        wave = 0.5 * wave / (wave.abs().max() + 1e-8)
        wave = F.pad(wave, (0, max(self.frames * self.hop - len(wave), 0)))
        mel = log_mel(wave, self.rate, window=self.config.window, hop=self.hop, bands=self.bands)
        return mel[None, : self.frames]

    def _options(self) -> dict[str, Any]:
        return {"audio_length_in_s": self.seconds}

    def _media(self, output: Any) -> list[Medium]:
        waves = output.audios.clip(-1, 1)  # float32[M, N]
        return [Audio.from_numpy(wave, sample_rate=self.rate) for wave in waves]


def log_mel(wave: Tensor, rate: int, *, window: int, hop: int, bands: int) -> Tensor:
    """Waves float[*, N] at `rate` Hz -> the natural logarithm of mel magnitudes float[*, T, B]:
    Hann windows of `window` samples every `hop`, borders reflected, Slaney's scale and areas."""
    from torchaudio.functional import melscale_fbanks

    spectrum = torch.stft(
        wave, window, hop, window=torch.hann_window(window), return_complex=True
    ).abs()
    bank = melscale_fbanks(
        window // 2 + 1, 0.0, rate / 2, bands, rate, norm="slaney", mel_scale="slaney"
    )
    return (spectrum.mT @ bank).clamp(min=1e-5).log()
