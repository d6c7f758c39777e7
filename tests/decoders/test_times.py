"""Noise levels of the denoising loss: how they are drawn, and how much each counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from torch import Tensor

from mmllm.config import DenoiseConfig
from mmllm.decoders.schedules import add_training_noise
from mmllm.decoders.times import UNIFORM, TimeDistribution, time_distribution


def drawn(distribution: TimeDistribution, count: int = 4000) -> np.ndarray:
    return np.array(
        [distribution.draw(torch.Generator().manual_seed(seed)).item() for seed in range(count)]
    )


def quantiles(values: Any) -> np.ndarray:
    return np.quantile(np.asarray(values), np.linspace(0.05, 0.95, 10))


def test_uniform_times_are_those_of_before() -> None:
    generator = torch.Generator().manual_seed(5)
    assert UNIFORM.draw(torch.Generator().manual_seed(5)) == torch.rand((), generator=generator)


def test_logit_normal_times_are_distributed_as_diffusers_distributes_them() -> None:
    torch.manual_seed(0)
    wanted = compute_density_for_timestep_sampling("logit_normal", 20000, 0.5, 1.2)
    found = drawn(TimeDistribution((0.5, 1.2)))
    np.testing.assert_allclose(quantiles(found), quantiles(wanted), atol=0.03)


def test_shifted_times_are_the_levels_of_a_shifted_sampler() -> None:
    """`sigmas` of the scheduler with and without a shift, as functions of one another."""
    plain, moved = (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=shift).sigmas for shift in (1.0, 3.0)
    )
    found = drawn(TimeDistribution(shift=3.0))
    uniform = drawn(UNIFORM).clip(1e-3, 1)  # where the table begins
    np.testing.assert_allclose(found, np.interp(uniform, plain.flip(0), moved.flip(0)), atol=4e-3)


def decoder_with(scheduler: Any) -> Any:
    config = {"_class_name": type(scheduler).__name__, **dict(scheduler.config)}
    return SimpleNamespace(component_config=lambda name: config)


@pytest.mark.parametrize(
    ("scheduler", "normal", "shift"),
    [
        (diffusers.DDPMScheduler(), None, 1.0),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), (0.0, 1.0), 3.0),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.15),
            (0.0, 1.0),
            np.exp(1.15),
        ),
        (
            diffusers.UniPCMultistepScheduler(
                use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction"
            ),
            (0.0, 1.0),
            5.0,
        ),
        (diffusers.EDMDPMSolverMultistepScheduler(), None, 1.0),
    ],
)
def test_auto_follows_the_family_of_the_scheduler(scheduler, normal, shift) -> None:
    found = time_distribution(decoder_with(scheduler), DenoiseConfig())
    assert found.normal == normal
    assert found.shift == pytest.approx(shift)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"times": "uniform"}, UNIFORM),
        ({"times": "shifted"}, TimeDistribution(shift=3.0)),
        ({"times": "shifted", "shift": 2.0}, TimeDistribution(shift=2.0)),
        ({"times": "logit_normal", "mean": 1.0}, TimeDistribution((1.0, 1.0))),
        ({"times": "logit_normal", "shift": 2.0}, TimeDistribution((0.0, 1.0), 2.0)),
    ],
)
def test_options_say_the_distribution(options: dict, wanted: TimeDistribution) -> None:
    decoder = decoder_with(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert time_distribution(decoder, DenoiseConfig(**options)) == wanted


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_those_of_diffusers_scripts(kind: str) -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    times = torch.linspace(0.02, 0.98, 20)
    latents = torch.randn(20, 2, 3)
    example = add_training_noise(scheduler, latents, torch.randn(20, 2, 3), times)
    snr = compute_snr(scheduler, example.timesteps)
    weights = snr.clamp(max=5.0)
    weights = {"epsilon": weights / snr, "v_prediction": weights / (snr + 1), "sample": weights}
    torch.testing.assert_close(example.min_snr_weights(5.0), weights[kind], rtol=1e-4, atol=0)


def x0_of(kind: str, noisy: Tensor, predicted: Tensor, time: Tensor) -> Tensor:
    if kind == "flow_prediction":
        return noisy - time * predicted
    return (noisy - time * predicted) / (1 - time) if kind == "epsilon" else predicted


@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "sample"])
def test_min_snr_of_a_flow_counts_the_error_of_x0(kind: str) -> None:
    """weight * |prediction - target|^2 is min(SNR, gamma) * |x0 of it - x0|^2."""
    scheduler: Any = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type=kind
    )
    times = torch.linspace(0.05, 0.95, 9)
    latents, noise, off = torch.randn(3, 9, 4).double()
    example = add_training_noise(scheduler, latents, noise, times.double())
    wide = times.double()[:, None]
    x0 = x0_of(kind, example.inputs, example.target + off, wide)
    snr = ((1 - times) / times).square()
    wanted = snr.clamp(max=2.0) * (x0 - latents).square().mean(1)
    found = example.min_snr_weights(2.0) * off.square().mean(1)
    torch.testing.assert_close(found, wanted.double(), rtol=1e-4, atol=0)


def test_min_snr_of_edm_is_that_of_v_prediction() -> None:
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(sigma_data=0.5)
    times = torch.tensor([0.1, 0.5, 0.9])
    example = add_training_noise(scheduler, torch.randn(3, 2), torch.randn(3, 2), times)
    snr = 1 / torch.tan(times * torch.pi / 2).square()
    torch.testing.assert_close(
        example.min_snr_weights(5.0), snr.clamp(max=5) / (snr + 1), rtol=1e-4, atol=0
    )
