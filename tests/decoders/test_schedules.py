"""An oracle in place of the transformer: the loss must vanish, the real sampler must recover x0.

The oracle knows x0 and the transformer's timestep, nothing else; alpha and sigma it
computes here, from the papers' formulas.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from mmllm.decoders.decoder import ModalityDecoder
from mmllm.decoders.schedules import SOLVERS as SOLVERS_BY_NAME
from mmllm.decoders.schedules import add_training_noise
from mmllm.errors import ConfigError
from tests.decoders import tiny

FLOWS = {"use_flow_sigmas": True, "final_sigmas_type": "zero"}
ZERO = {"final_sigmas_type": "zero"}
SOLVERS = [
    ("DPMSolverMultistep", {**FLOWS, "prediction_type": "sample"}),
    ("DPMSolverMultistep", {**FLOWS, "prediction_type": "sample", "flow_shift": 3.0}),
    ("DPMSolverMultistep", {**FLOWS, "prediction_type": "flow_prediction"}),
    ("UniPCMultistep", {**FLOWS, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
    *[
        (name, {**ZERO, "prediction_type": kind})
        for name in ("DPMSolverMultistep", "UniPCMultistep")
        for kind in ("epsilon", "v_prediction", "sample")
    ],
]
SCALING = [  # these need a pipeline that scales its noise and its inputs, which Wan does not
    *[
        (name, {**settings, "prediction_type": kind})
        for name, settings in (
            ("DDIM", {"clip_sample": False}),
            ("DDPM", {"clip_sample": False}),
            ("EulerDiscrete", {}),
        )
        for kind in ("epsilon", "v_prediction", "sample")
    ],
    ("EDMDPMSolverMultistep", {"prediction_type": "epsilon"}),
    ("EDMDPMSolverMultistep", {"prediction_type": "v_prediction", "sigma_data": 1.0}),
    ("EDMEuler", {"prediction_type": "epsilon"}),
]
CASES = [
    *[(modality, *each) for modality in ("image", "audio") for each in SOLVERS + SCALING],
    *[("video", *each) for each in SOLVERS],
    *[("stable_diffusion", *each) for each in SCALING[:9]],
    ("video", "FlowMatchEulerDiscrete", {"shift": 3.0}),  # the others ask for its initial sigma
]


NAMED = [
    *[("cogvideox", name) for name in SOLVERS_BY_NAME["CogVideoX"]],
    *[(family, name) for family in ("sd3", "flux", "sana") for name in SOLVERS_BY_NAME["flow"]],
    ("image", "unipc"),  # predicts samples on a flow path
    ("ltx", "euler"),
    *[("stable_diffusion", name) for name in SOLVERS_BY_NAME["variance preserving"]],
]


def oracle(scheduler: Any, clean: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
    """What a perfect model answers to inputs float[B, *S] at times [B] or [1]."""
    times = times.to(torch.float64).view(-1, *[1] * (noisy.ndim - 1))
    config, noisy, clean = scheduler.config, noisy.double(), clean.double()
    name = type(scheduler).__name__
    if "Cosine" in name:  # alpha = cos, sigma = sin of the angle: an ordinary v
        alpha, sigma = torch.cos(times * torch.pi / 2), torch.sin(times * torch.pi / 2)
        return alpha * (noisy - alpha * clean) / sigma - sigma * clean
    if "EDM" in name:  # Karras et al. 2022, table 1
        level, data = torch.exp(4 * times), config.sigma_data
        total = level**2 + data**2
        sign = -1 if config.prediction_type == "v_prediction" else 1
        return sign * (clean - data**2 / total * noisy * total**0.5) / (level * data / total**0.5)
    kind = config.get("prediction_type", "flow_prediction")
    if "FlowMatch" in name or config.get("use_flow_sigmas", False):
        alpha, sigma = 1 - times / 1000, times / 1000
    else:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        kept = (1 - betas).cumprod(0)
        if "CogVideoX" in name:  # Yang et al. 2024: the signal-to-noise ratio is divided
            kept = kept / (config.snr_shift_scale + (1 - config.snr_shift_scale) * kept)
        whole = times.floor().long()  # Euler walks between the steps of training
        kept = torch.exp(
            torch.lerp(kept.log()[whole], kept.log()[whole.add(1).clamp(max=999)], times - whole)
        )
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    noise = (noisy - alpha * clean) / sigma
    return {
        "epsilon": noise,
        "sample": clean.expand_as(noisy),
        "v_prediction": alpha * noise - sigma * clean,
        "flow_prediction": noise - clean,
    }[kind]


def with_oracle(
    family: str, decoder: ModalityDecoder, scheduler: Any, clean: Tensor, monkeypatch
) -> None:
    """The decoder's pipeline with another scheduler, its denoiser replaced by the oracle."""
    denoiser = tiny.denoiser(decoder.pipeline)
    signature = inspect.signature(denoiser.forward)
    dialect = tiny.dialect(family)
    clean = dialect.pack(decoder.pipeline, clean)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        noisy = dialect.read(*(given[name] for name in dialect.noisy or [next(iter(given))]))
        times = dialect.clock(given["timestep"] if "timestep" in given else given["t"])
        if times.ndim > 1:  # a time for every token, all the same
            times = times[:, 0]
        repeats = len(noisy) // len(clean)  # guidance doubles the batch
        known = clean.repeat(repeats, *[1] * (clean.ndim - 1))
        answer = oracle(scheduler, known, noisy, times).to(noisy.dtype)
        return dialect.write(answer)

    decoder.pipeline.scheduler = scheduler
    monkeypatch.setattr(denoiser, "forward", forward)


@pytest.mark.parametrize(("family", "name", "settings"), CASES)
def test_an_oracle_has_no_loss_and_is_recovered_by_the_sampler(
    make, monkeypatch, family, name, settings
):
    decoder = make(family, steps=10)
    check(family, decoder, getattr(diffusers, f"{name}Scheduler")(**settings), monkeypatch)


@pytest.mark.parametrize("family", [key for key in tiny.FAMILIES if key not in tiny.MODALITIES])
def test_an_oracle_and_the_familys_own_scheduler(make, monkeypatch, family):
    decoder = make(family, steps=20)
    check(family, decoder, decoder.pipeline.scheduler, monkeypatch)


@pytest.mark.parametrize(("family", "name"), NAMED)
def test_an_oracle_and_a_scheduler_chosen_by_name(make, monkeypatch, family, name):
    decoder, own = make(family, steps=10, scheduler=name), make(family)
    assert decoder.fingerprint == own.fingerprint  # how one samples changes no target
    check(family, decoder, decoder.pipeline.scheduler, monkeypatch)


def check(family: str, decoder: ModalityDecoder, scheduler: Any, monkeypatch) -> None:
    media = [tiny.medium(decoder.modality, seed) for seed in range(2)]
    both = decoder.encode_media(torch.stack([decoder.preprocess(each) for each in media]))
    num = 1 if decoder.samples_one_by_one else 2  # the oracle knows all media of a call
    clean = both[:num]
    with_oracle(family, decoder, scheduler, clean, monkeypatch)
    condition = decoder.encode_captions(["a dog", "a red apple"][:num])

    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for times in ([0.05, 0.3], [0.6, 0.95]):
        times = torch.tensor(times[:num])
        losses = decoder.denoising_loss(condition, clean, noise=noise, times=times)
        torch.testing.assert_close(losses, torch.zeros(num), rtol=0, atol=1e-6)
    wrong = decoder.denoising_loss(
        condition, both.flip(0)[:num], noise=noise, times=torch.full((num,), 0.4)
    )
    assert wrong.min() > 1e-3

    generators = [torch.Generator().manual_seed(seed) for seed in range(num)]
    made = decoder.sample(condition, generators=generators)
    wanted = decoded(decoder, clean)
    tolerance = 0.02 if decoder.modality == "audio" else 2
    for row, medium in enumerate(made):
        difference = medium.to_numpy().astype(np.float32) - wanted[row]
        assert np.abs(difference).max() <= tolerance
    if family == "ltx2":
        audio = sound_decoded(decoder.pipeline, clean[:, 384:])
        for row, clip in enumerate(made):
            np.testing.assert_allclose(clip.audio.to_numpy(), audio[row], rtol=0, atol=0.02)
    if family == "kandinsky6":
        codec, vocoder = decoder.pipeline.audio_vae, decoder.pipeline.vocoder
        sound = clean[:, 128:].unflatten(1, (4, 79)) / codec.config.scaling_factor
        expected = vocoder(codec.decode(sound).sample).sample.numpy()
        np.testing.assert_allclose(made[0].audio.to_numpy(), expected[0], rtol=0, atol=0.02)


def decoded(decoder: ModalityDecoder, latents: Tensor) -> np.ndarray:
    """What the codec itself makes of normalised latents, as `Medium.to_numpy` counts."""
    pipeline, vae = decoder.pipeline, decoder.pipeline.vae
    if isinstance(vae, diffusers.AutoencoderKLLTX2Video):
        latents = latents[:, :384].unflatten(1, (8, 3, 4, 4))
    if isinstance(pipeline, diffusers.Kandinsky6TI2VAPipeline):
        latents = latents[:, :128].unflatten(1, (4, 2, 4, 4))
    scale, shift = vae.config.get("scaling_factor") or 1.0, vae.config.get("shift_factor") or 0.0
    if isinstance(vae, diffusers.AutoencoderKLFlux2):
        mean, var = (value.view(-1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
        latents = pipeline._unpatchify_latents(latents * (var + 1e-4).sqrt() + mean)
    mean, std = (
        getattr(vae, name, vae.config.get(name)) for name in ("latents_mean", "latents_std")
    )
    if mean is not None:
        wide = [-1, *[1] * (latents.ndim - 2)]
        latents = latents * torch.as_tensor(std).view(wide) + torch.as_tensor(mean).view(wide)
    else:
        latents = latents / scale + shift
    if isinstance(vae, diffusers.AutoencoderKLQwenImage | diffusers.AutoencoderKLQwenImage21):
        pixels = vae.decode(latents[:, :, None]).sample[:, :, 0].movedim(1, -1)  # of clips
        pixels = (pixels / 2 + 0.5).clamp(0, 1)
        if pixels.shape[-1] == 4:  # the last is opacity
            pixels = pixels[..., :3] * pixels[..., 3:] + (1 - pixels[..., 3:])
        return (pixels * 255).round().numpy()
    if decoder.modality == "audio" and hasattr(pipeline, "vocoder"):
        return pipeline.mel_spectrogram_to_waveform(vae.decode(latents).sample)[:, None].numpy()
    if isinstance(pipeline, diffusers.AceStepPipeline):  # as loud as a peak of -1 dB
        waves = vae.decode(latents).sample.numpy()
        return waves * 10**-0.05 / np.abs(waves).max((1, 2), keepdims=True)
    if decoder.modality == "audio":
        return vae.decode(latents).sample.numpy()
    if isinstance(vae, diffusers.AutoencoderKL) and latents.ndim == 5:  # frame by frame
        frames = [vae.decode(frame).sample for frame in latents.unbind(2)]
        pixels = torch.stack(frames, 2).movedim(1, -1)
    else:
        pixels = vae.decode(latents).sample.movedim(1, -1)
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().numpy()


def sound_decoded(pipeline: Any, latents: Tensor) -> np.ndarray:
    """The same of the latents of LTX-2's sound: 31 ticks of 1 x 4 numbers."""
    codec = pipeline.audio_vae
    ticks = latents.unflatten(1, (31, 4)) * codec.latents_std + codec.latents_mean
    return pipeline.vocoder(codec.decode(ticks[:, None]).sample).numpy()


def test_stable_audios_own_cosine_scheduler(monkeypatch):
    """Its sampler, which draws noise by torchsde, is not run: its denoiser is asked directly."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    name = "diffusers.schedulers.scheduling_cosine_dpmsolver_multistep"
    scheduler = importlib.import_module(name).CosineDPMSolverMultistepScheduler()
    clean, noise = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.25, 0.5, 0.7, 0.95])
    step = add_training_noise(scheduler, clean, noise, times)
    torch.testing.assert_close(step.timesteps, times)  # the clock that the model was trained with
    torch.testing.assert_close(
        step.target, oracle(scheduler, clean, step.inputs, step.timesteps).float()
    )
    sigma = torch.tan(times * torch.pi / 2)[:, None, None]
    recovered = scheduler.precondition_outputs(clean + sigma * noise, step.target, sigma)
    torch.testing.assert_close(recovered, clean, rtol=0, atol=1e-4)


def test_what_has_no_meaning_is_refused():
    latents, times = torch.zeros(1, 3), torch.full((1,), 0.5)
    with pytest.raises(ConfigError, match="'v_prediction' has no meaning"):
        add_training_noise(
            tiny.flow_scheduler(prediction_type="v_prediction"), latents, latents, times
        )
    with pytest.raises(ConfigError, match="no training target is known"):
        add_training_noise(diffusers.SCMScheduler(), latents, latents, times)
