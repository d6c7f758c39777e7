"""What a scheduler's config prescribes for training (noise path, timesteps, target), and which
other solvers can replace it in sampling.

The schedulers' own `add_noise` is not usable: Euler and Heun return unscaled samples, multistep
solvers are off by a step, flow matching has none. So the noise path is derived from the config.
Legend: M samples, S latent shape, x0 clean, n noise, x noisy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmllm.errors import ConfigError

FLOW = {"flow_prediction", "sample", "epsilon"}
VARIANCE_PRESERVING = {"epsilon", "sample", "v_prediction"}

DPM = "DPMSolverMultistepScheduler"
_FREE = {"clip_sample": False, "thresholding": False}  # latents have no bounds
_FLOWS = {"use_flow_sigmas": True, "final_sigmas_type": "zero"}
SOLVERS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "variance preserving": {
        "ddim": ("DDIMScheduler", _FREE),
        "ddpm": ("DDPMScheduler", _FREE),
        "dpm++": (DPM, {"algorithm_type": "dpmsolver++"}),
        "dpm++_karras": (DPM, {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
        "dpm++_sde": (DPM, {"algorithm_type": "sde-dpmsolver++"}),
        "euler": ("EulerDiscreteScheduler", {}),
        "euler_trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
        "heun": ("HeunDiscreteScheduler", {}),
        "lcm": ("LCMScheduler", {}),
        "unipc": ("UniPCMultistepScheduler", {}),
    },
    "flow": {
        "euler": ("FlowMatchEulerDiscreteScheduler", {}),
        "dpm++": (DPM, _FLOWS),
        "unipc": ("UniPCMultistepScheduler", _FLOWS),
    },
    "CogVideoX": {
        "ddim": ("CogVideoXDDIMScheduler", {}),
        "dpm++": ("CogVideoXDPMScheduler", {}),
    },
    "EDM": {},
}
"""Kind of noise path -> name in a config -> diffusers class and required settings."""


@dataclass(frozen=True)
class DenoisingExample:
    """A training batch of a denoiser.

    Attributes:
        inputs: float[M, *S], noisy latents as the pipeline would pass them.
        timesteps: [M], as the pipeline would pass them.
        target: float[M, *S], what the denoiser is to predict.
        kind: the `prediction_type` of the target; that of EDM is v_prediction, to a factor.
        snr: float[M], the signal-to-noise ratio of the inputs.
    """

    inputs: Tensor
    timesteps: Tensor
    target: Tensor
    kind: str
    snr: Tensor

    def min_snr_weights(self, gamma: float) -> Tensor:
        """Compute the weights float[M] of the squared error to `target` by which each sample counts
        as min(SNR, gamma) in the error of x0 (Hang et al. 2023, sec. 3.4).

        Args:
            gamma: the SNR from which on samples count alike.
        """
        if self.kind == "epsilon":
            return (gamma / self.snr).clamp(max=1)
        weights = self.snr.clamp(max=gamma)
        if self.kind == "v_prediction":
            return weights / (self.snr + 1)
        if self.kind == "flow_prediction":
            return weights / (self.snr.sqrt() + 1).square()
        return weights


def add_training_noise(
    scheduler: Any, latents: Tensor, noise: Tensor, times: Tensor
) -> DenoisingExample:
    """Add noise to latents as the scheduler's config prescribes for training.

    - flow (FlowMatch…, or `use_flow_sigmas`): x = (1 - s) x0 + s n with s = times, timesteps 1000 s
      (Lipman et al. 2023);
    - EDM preconditioning: x = x0 + sigma n, scaled (Karras et al. 2022, table 1);
    - otherwise variance preserving: x = alpha x0 + sigma n from `alphas_cumprod`, integer timesteps
      (Ho et al. 2020).

    Args:
        scheduler: of diffusers.
        latents: float[M, *S].
        noise: float[M, *S].
        times: float[M] in (0, 1).

    Raises:
        ConfigError: for a scheduler or a prediction type without a known target.
    """
    config = scheduler.config
    wide = times.view(-1, *[1] * (latents.ndim - 1))
    if type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas", False):
        kind = config.get("prediction_type", "flow_prediction")
        target = _target(scheduler, kind, FLOW, latents, noise)
        return DenoisingExample(
            (1 - wide) * latents + wide * noise,
            times * config.num_train_timesteps,
            target,
            kind,
            ((1 - times) / times).square(),
        )
    if hasattr(scheduler, "precondition_outputs"):
        return _preconditioned(scheduler, latents, noise, wide)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ConfigError(
            f"{type(scheduler).__name__}: no training target is known for this scheduler; expected "
            "flow matching, EDM, or one with alphas_cumprod (DDPM, DDIM, DPM-Solver, UniPC, Euler)"
        )
    num = config.num_train_timesteps
    steps = (times * num).long().clamp(max=num - 1)
    alpha_cumprod = scheduler.alphas_cumprod.to(latents)[steps].view_as(wide)
    alpha, sigma = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
    target = _target(
        scheduler, config.prediction_type, VARIANCE_PRESERVING, latents, noise, alpha, sigma
    )
    return DenoisingExample(
        alpha * latents + sigma * noise,
        steps,
        target,
        config.prediction_type,
        (alpha / sigma).square().flatten(),
    )


def find_solver(
    config: Mapping[str, Any], name: str, *, passes_sigmas: bool = False
) -> tuple[str, dict[str, Any]]:
    """Return class and settings of the solver called `name`, to replace a scheduler.

    Args:
        config: of the pipeline's own scheduler.
        name: a key of SOLVERS for its kind of noise path.
        passes_sigmas: the pipeline passes noise levels of its own, which only Euler's accepts.

    Raises:
        ConfigError: names the solvers that can replace it.
    """
    own = config["_class_name"]
    if own.startswith("CogVideoX"):
        kind = "CogVideoX"  # its noise path is shifted, which no other scheduler supports
    elif own.startswith("FlowMatch") or config.get("use_flow_sigmas", False):
        kind = "flow"
    else:
        kind = "EDM" if own.startswith(("EDM", "Cosine")) else "variance preserving"
    known = dict(SOLVERS[kind])
    if kind == "flow" and config.get("prediction_type", "flow_prediction") != "flow_prediction":
        del known["euler"]  # it takes velocities only
    if passes_sigmas:
        known = {"euler": known["euler"]}
    if name not in known:
        raise ConfigError(
            f"scheduler: {name!r} cannot take the place of the pipeline's own {own} ({kind}); "
            f"those that can: {', '.join(known) or 'none'}"
        )
    return known[name]


def with_solver(scheduler: Any, kind: str, settings: Mapping[str, Any]) -> Any:
    """Convert a scheduler to another class of diffusers, on the same noise path.

    Args:
        scheduler: the pipeline's own scheduler.
        kind: the name of the class.
        settings: further entries of its config.
    """
    import diffusers

    config = scheduler.config
    shift, path = config.get("shift") or config.get("flow_shift") or 1.0, {}
    if kind.startswith("FlowMatch"):
        path = {"shift": shift}
    elif settings.get("use_flow_sigmas"):
        predicted = config.get("prediction_type", "flow_prediction")
        path = {"flow_shift": shift, "prediction_type": predicted}
    return getattr(diffusers, kind).from_config(config, **path, **settings)


def _preconditioned(
    scheduler: Any, latents: Tensor, noise: Tensor, times: Tensor
) -> DenoisingExample:
    """EDM: the scheduler itself scales inputs, times and outputs (c_in, c_noise, c_skip, c_out).

    Noise levels are uniform in the angle atan(sigma / sigma_data) between signal and noise, as in
    the cosine scheduler that Stable Audio was trained with. `times` float[M, 1, ...].
    """
    config = scheduler.config
    sigma = config.sigma_data * torch.tan(times * math.pi / 2)
    sigma = sigma.clamp(config.sigma_min, config.sigma_max)
    noisy = latents + sigma * noise
    skipped = scheduler.precondition_outputs(noisy, torch.zeros_like(noisy), sigma)  # c_skip x
    scale = scheduler.precondition_outputs(
        torch.zeros_like(sigma), torch.ones_like(sigma), sigma
    )  # c_out
    return DenoisingExample(
        scheduler.precondition_inputs(noisy, sigma),
        scheduler.precondition_noise(sigma).flatten(),
        (latents - skipped) / scale,
        "v_prediction",
        (config.sigma_data / sigma).square().flatten(),
    )


def _target(
    scheduler: Any,
    kind: str,
    known: set[str],
    clean: Tensor,
    noise: Tensor,
    alpha: Tensor | float = 1.0,
    sigma: Tensor | float = 1.0,
) -> Tensor:
    """The target for a `prediction_type`; v: Salimans & Ho 2022, sec. 4; flow: dx/ds."""
    if kind not in known:
        raise ConfigError(
            f"{type(scheduler).__name__}: prediction_type {kind!r} has no meaning on its noise "
            f"path; expected one of {', '.join(sorted(known))}"
        )
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "v_prediction":
        return alpha * noise - sigma * clean
    return noise - clean
