"""Audio decoders that denoise mel spectrograms: an image codec over spectrograms, then a vocoder.

Legend: M media, N waveform samples, T spectrogram frames, B mel bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Audio
from mmllm.decoders.audio import AudioDecoder
from mmllm.decoders.config import DecoderConfig
from mmllm.decoders.latents import vae_scale_factor
from mmllm.errors import ConfigError


@dataclass(frozen=True)
class MelConfig(DecoderConfig):
    """Fields of audio decoders that denoise mel spectrograms.

    Attributes:
        seconds: duration; None: the length that the UNet was trained on.
        window: samples of the spectrogram's Fourier transform, which no pipeline's config contains
            (1024 at 16 kHz).
    """

    seconds: float | None = None
    window: int = 1024


class MelDecoder(AudioDecoder):
    """A family also writes `condition_shapes`, `encode_prompt` and `denoise`."""

    def configure(self) -> None:
        super().configure()
        vocoder, self.scale = self.component_config("vocoder"), vae_scale_factor(self)
        self.bands: int = vocoder["model_in_dim"]
        self.rate: int = vocoder["sampling_rate"]
        self.hop = math.prod(vocoder["upsample_rates"])
        if self.seconds * self.rate < self.hop:
            raise ConfigError(
                f"seconds: expected at least {self.hop / self.rate}, got {self.seconds}"
            )

    @property
    def default_seconds(self) -> float:
        return self.component_config("unet")["sample_size"] * self.scale * self.hop / self.rate

    @property
    def sample_rate(self) -> int:
        return self.rate

    @property
    def frames(self) -> int:
        """T, as the pipeline rounds it: whole frames, then up to whole latents."""
        frames = int(self.seconds / (self.hop / self.rate))
        return -(-frames // self.scale) * self.scale

    def to_tensor(self, medium: Audio) -> Tensor:
        """Truncated to `seconds` or padded with silence, its peak at 0.5 -> float[1, T, B], the
        natural logarithm of mel magnitudes, as AudioLDM's vocoders take them (Liu et al. 2023)."""
        wave = torch.from_numpy(medium.resample(self.rate, mono=True).to_numpy())[0]
        wave = wave[: int(self.seconds * self.rate)]
        wave = wave - wave.mean()
        wave = 0.5 * wave / (wave.abs().max() + 1e-8)
        wave = F.pad(wave, (0, max(self.frames * self.hop - len(wave), 0)))
        mel = log_mel(wave, self.rate, window=self.config.window, hop=self.hop, bands=self.bands)
        return mel[None, : self.frames]

    def pipeline_kwargs(self) -> dict[str, Any]:
        return {"audio_length_in_s": self.seconds}


def log_mel(wave: Tensor, rate: int, *, window: int, hop: int, bands: int) -> Tensor:
    """Compute the natural logarithm of mel magnitudes, with Slaney's scale and areas.

    Args:
        wave: float[*, N] samples.
        rate: samples per second.
        window: samples of a Hann window; borders are reflected.
        hop: samples from one frame to the next.
        bands: B, from 0 Hz to half the rate.

    Returns:
        float[*, T, B], magnitudes clamped to 1e-5 at least.
    """
    from torchaudio.functional import melscale_fbanks

    spectrum = torch.stft(
        wave, window, hop, window=torch.hann_window(window), return_complex=True
    ).abs()
    bank = melscale_fbanks(
        window // 2 + 1, 0.0, rate / 2, bands, rate, norm="slaney", mel_scale="slaney"
    )
    return (spectrum.mT @ bank).clamp(min=1e-5).log()
