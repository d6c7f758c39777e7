"""Audio decoders: lengths, waveforms out.

Legend: M media, C channels, N waveform samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmllm.conversation import Audio, Medium
from mmllm.decoders.decoder import ModalityDecoder


class AudioDecoder(ModalityDecoder):
    """A decoder of audio. A family also writes `default_seconds` and `sample_rate`."""

    modality = "audio"

    @property
    def default_seconds(self) -> float:
        """The length that is generated where the config gives none."""
        raise NotImplementedError

    @property
    def sample_rate(self) -> int:
        """Waveform samples per second."""
        raise NotImplementedError

    @property
    def seconds(self) -> float:
        """The length of what is generated."""
        return self.config.seconds or self.default_seconds

    def output_spec(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def fit_wave(self, medium: Audio, channels: int, length: int) -> Tensor:
        """Resample a sound, truncate it to `seconds` and pad it with silence.

        Args:
            medium: the sound.
            channels: C of the codec.
            length: N of the codec's input.

        Returns:
            float[C, N].
        """
        rate = self.sample_rate
        wave = torch.from_numpy(medium.resample(rate, mono=channels == 1).to_numpy())
        if len(wave) < channels:
            wave = wave[:1].expand(channels, -1)
        wave = wave[:channels, : int(self.seconds * rate)]
        return F.pad(wave, (0, length - wave.shape[-1]))

    def to_media(self, output: Any) -> list[Medium]:
        waves = output.audios.clip(-1, 1)  # float32[M, N] or [M, C, N]
        return [Audio.from_numpy(wave, sample_rate=self.sample_rate) for wave in waves]
