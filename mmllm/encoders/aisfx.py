"""Audio -> tokens over time, by a convolutional network trained on sound-effects libraries.

Ma and Lerch 2022 (ISMIR), "Representation Learning for the Automatic Indexing of Sound Effects
Libraries": the trunk of X-Sequential-CE, four blocks of two 3x3 convolutions over log-mel frames
(after Kong et al. 2018, DCASE baseline, arXiv 1808.00773); weights CC BY 4.0.
Legend: M media, T frames of 23.2 ms, S samples, L tokens, C = 512 channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm.conversation import Audio
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.encoders.pretrained import AssetEncoder, dtype_of
from mmllm.errors import ConfigError
from mmllm.weights import are_weights_skipped

RATE = 44_100
_WINDOW, _HOP, _BANDS = 2048, 1024, 96
MAX_LOG_MEL = 9.457798957824707
"""The largest log-mel value of the training data, which was scaled to [0, 1]."""
_CHANNELS = (64, 128, 256, 512)
_SHRINK = 8
"""Frames per step of the last feature map: three of the four blocks halve time and frequency."""


@dataclass(frozen=True)
class AisfxConfig:
    """The length of the window, and how many tokens represent it."""

    modality: Literal["audio"] = "audio"
    weights: str = "mini:aisfx"
    """The asset, or a folder with `model.safetensors`."""
    frames: int = 100
    """T: 100 frames are 2.3 s, as in training."""
    tokens: int = 4
    """L: equal parts of the window, each the maximum over its time."""
    normalize: bool = True
    """Scale the audio to a peak of 1 first: loudness tells little about the content."""

    def __post_init__(self) -> None:
        steps = self.frames // _SHRINK
        if not 1 <= self.tokens <= steps:
            raise ConfigError(
                f"tokens: expected 1 to {steps} (frames {self.frames} / {_SHRINK}), got "
                f"{self.tokens}"
            )


class AisfxEncoder(AssetEncoder):
    """Log-mel frames float[M, T, 96] -> float[M, L, 512]; the maximum over L is its embedding."""

    component = "aisfx"
    modality: ClassVar[str] = "audio"
    layer = "block 4"
    preprocessing = f"log-mel {RATE} {_WINDOW} {_HOP} {_BANDS} loudest window"

    def __init__(self, config: AisfxConfig, folder: Path | None) -> None:
        super().__init__(config, folder)
        self.sample_shape = (config.frames, _BANDS)
        self.feature_shape = (config.tokens, _CHANNELS[-1])

    def build_network(self) -> None:
        widths = (1, *_CHANNELS)
        self.blocks = nn.ModuleDict(
            {str(i): _Block(widths[i - 1], widths[i]) for i in range(1, len(widths))}
        )

    def to_tensor(self, medium: Audio) -> Tensor:
        """Audio -> float[T, 96], silence after its end; of longer audio the loudest window."""

        wave = torch.tensor(medium.resample(RATE).to_numpy()[0])
        if self.config.normalize:
            wave = wave / wave.abs().max().clamp(min=1e-4)
        return _fit(log_mel(wave), self.config.frames) / MAX_LOG_MEL

    def forward(self, samples: Tensor) -> Features:
        """float[M, T, 96] -> float[M, L, 512]."""
        x = samples.to(dtype_of(self))[:, None]  # [M, 1, T, 96]
        for number, block in self.blocks.items():
            x = block(x)
            if number != str(len(_CHANNELS)):
                x = F.max_pool2d(x, 2)
        x = x.mean(dim=3)  # [M, 512, T / 8]
        return Features(F.adaptive_max_pool1d(x, self.config.tokens).transpose(1, 2))


class _Block(nn.Module):
    """float[M, in, T, F] -> float[M, out, T, F]: two 3x3 convolutions, normed and rectified."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


def log_mel(wave: Tensor) -> Tensor:
    """float[S] at 44.1 kHz -> float[T, 96]: log10(1 + 10^4 * mel power), frames centred.

    Triangular filters, evenly spaced on the HTK mel scale from 0 to 22,050 Hz, each summing to 1
    (in Essentia, which the network was trained with: weighting "warping", normalize "unit_sum").
    """
    window = torch.hann_window(_WINDOW, periodic=False)
    spectrum = torch.stft(
        wave, _WINDOW, _HOP, window=window, pad_mode="constant", return_complex=True
    )
    power = spectrum.abs().square().T  # [T, 1025]
    return torch.log10(1 + 1e4 * power @ _mel_filterbank())


@cache
def _mel_filterbank() -> Tensor:
    """The filterbank float[1025, 96]."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127.01048 * torch.log1p(hertz / 700)

    bins = mel(torch.linspace(0, RATE / 2, _WINDOW // 2 + 1, dtype=torch.float64))
    edges = torch.linspace(0, float(bins[-1]), _BANDS + 2, dtype=torch.float64)
    left, middle, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - left) / (middle - left)
    falling = (right - bins[:, None]) / (right - middle)
    weights = torch.minimum(rising, falling).clamp(min=0)
    return (weights / weights.sum(dim=0)).float()


def _fit(frames: Tensor, length: int) -> Tensor:
    """float[T', 96] -> float[length, 96]: padded with silence, or the window that sums highest."""
    if len(frames) <= length:
        return F.pad(frames, (0, 0, 0, length - len(frames)))
    total = F.pad(frames.double().sum(dim=1).cumsum(dim=0), (1, 0))
    start = int((total[length:] - total[:-length]).argmax())
    return frames[start : start + length]


def build(config: AisfxConfig) -> ModalityEncoder:
    """The frozen encoder; fetches its weights at first use. Raises AssetError."""
    from mmllm.mini import assets

    if are_weights_skipped():
        return AisfxEncoder(config, None)
    return AisfxEncoder(config, assets.resolve(config.weights))
