"""The codec in the VAE slot of mini's decoder of sounds.

Images and clips need none of ours: theirs is a plain AutoencoderKL. `import mmllm.mini.codecs`
before `DiffusionPipeline.from_pretrained(folder)`.

Dimensions: B samples, N waveform samples, M mel bands, K latent tokens.
"""

# diffusers types `self.config` as a plain dict, but it answers to attributes.
# pyright: basic, reportAttributeAccessIssue=false, reportPrivateImportUsage=false

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDecoderOutput
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from torch.nn import functional
from torchaudio.functional import melscale_fbanks


def _exactly(latents: Tensor) -> AutoencoderKLOutput:
    """The distribution without spread that diffusers expects of `vae.encode`."""
    parameters = torch.cat([latents, torch.zeros_like(latents)], dim=1)
    return AutoencoderKLOutput(DiagonalGaussianDistribution(parameters, deterministic=True))


class MelAutoencoder(ModelMixin, ConfigMixin):
    """Waveform <-> stacked log-mel frames, back by damped Griffin-Lim.

    float[B, 1, N] at `sampling_rate` <-> float[B, frames_per_token * M, K], K = N / `hop_length`;
    a token is `frames_per_token` frames. Values are log magnitudes, shifted and scaled by `mean`
    and `std` to about unit variance. Phase: Griffin & Lim 1984, from a fixed start, so the same
    latents always give the same sound. A bin whose rebuilt magnitude is small next to the wanted
    one has no reliable phase and is turned down by `damping`, so that latents equal to rounding
    give equal sounds: 2e-6 of noise in the latents moves the wave by less than 1e-4, against 2e-2
    with the faster iteration of Perraudin et al. 2013.
    """

    @register_to_config
    def __init__(
        self,
        sampling_rate: int = 16_000,
        audio_channels: int = 1,
        n_fft: int = 1024,
        frame_hop: int = 256,
        n_mels: int = 96,
        frames_per_token: int = 2,
        floor: float = 1e-2,
        mean: float = -1.8,
        std: float = 2.3,
        iterations: int = 24,
        damping: float = 0.5,
    ):
        super().__init__()
        self.sampling_rate = sampling_rate
        self.hop_length = frame_hop * frames_per_token  # waveform samples per token
        bands = melscale_fbanks(
            n_fft // 2 + 1, 0.0, sampling_rate / 2, n_mels, sampling_rate, norm=None
        )
        self.register_buffer("bands", bands / bands.sum(dim=0), persistent=False)  # [n_fft/2+1, M]
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("unit", torch.ones(1))  # tells the device and dtype of the module

    @apply_forward_hook
    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        """float[B, 1, N] in -1..1 -> float[B, frames_per_token * M, K]."""
        config = self.config
        if x.shape[-1] % self.hop_length:
            raise ValueError(
                f"a waveform of {x.shape[-1]} samples is no multiple of {self.hop_length}; pad it"
            )
        mel = self._spectrum(x.mean(dim=1)).abs().transpose(1, 2) @ self.bands.float()
        mel = (mel[:, :-1].clamp(min=config.floor).log() - config.mean) / config.std
        return _exactly(mel.unflatten(1, (-1, config.frames_per_token)).flatten(2).transpose(1, 2))

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, **_: object
    ) -> OobleckDecoderOutput | tuple:
        """float[B, frames_per_token * M, K] -> float[B, 1, K * hop_length]."""
        config = self.config
        mel = z.float().transpose(1, 2).unflatten(2, (config.frames_per_token, -1)).flatten(1, 2)
        mel = (mel * config.std + config.mean).clamp(max=math.log(config.n_fft)).exp()
        mel = functional.relu(mel - 2 * config.floor)  # what the floor hides is silence, not hiss
        mel = torch.cat([mel, mel[:, -1:]], dim=1)
        wave = self._phase(self._linear(mel).transpose(1, 2), z.shape[-1] * self.hop_length)
        wave = wave / wave.abs().amax(dim=-1, keepdim=True).clamp(min=1.0)
        wave = wave.unsqueeze(1).to(z.dtype)
        return OobleckDecoderOutput(sample=wave) if return_dict else (wave,)

    def _spectrum(self, wave: Tensor) -> Tensor:
        """float[B, N] -> complex[B, n_fft/2+1, N / frame_hop + 1]."""
        config = self.config
        return torch.stft(
            wave.float(),
            config.n_fft,
            config.frame_hop,
            window=self.window.float(),
            return_complex=True,
        )

    def _wave(self, spectrum: Tensor, length: int) -> Tensor:
        """complex[B, n_fft/2+1, frames] -> float[B, length]."""
        config = self.config
        return torch.istft(
            spectrum, config.n_fft, config.frame_hop, window=self.window.float(), length=length
        )

    def _linear(self, mel: Tensor) -> Tensor:
        """float[B, frames, M] -> non-negative magnitudes float[B, frames, n_fft/2+1].

        Non-negative least squares by multiplicative updates: Lee & Seung 2001.
        """
        bands = self.bands.float()
        gram = bands @ bands.T
        target = mel @ bands.T
        inverse = torch.linalg.pinv(bands.cpu()).to(bands.device)  # MPS has no decomposition
        linear = (mel @ inverse).clamp(min=1e-6)
        for _ in range(40):
            linear = linear * target / (linear @ gram).clamp(min=1e-10)
        return linear

    def _phase(self, magnitude: Tensor, length: int) -> Tensor:
        """float[B, n_fft/2+1, frames] magnitudes -> float[B, length], a wave that has them."""
        generator = torch.Generator().manual_seed(0)
        start = torch.rand(magnitude.shape[1:], generator=generator).to(magnitude.device)
        spectrum = torch.polar(magnitude, (2 * math.pi * start).expand_as(magnitude))
        damping = self.config.damping
        for _ in range(self.config.iterations):
            rebuilt = self._spectrum(self._wave(spectrum, length))
            weight = (1 + damping) * magnitude / (rebuilt.abs() + damping * magnitude + 1e-9)
            spectrum = weight * rebuilt
        return self._wave(spectrum, length)
