"""Training of sparse autoencoders: BatchTopK, TopK, Matryoshka and JumpReLU, also as transcoders.

Inputs are centred and scaled to a variance of 1 per coordinate; both are folded into the weights at
the end, so that a dictionary takes states as they are. `k` is the mean number of active features
for all kinds: thresholds are calibrated at the end, on states that nothing was trained on if there
are any, since features are active more often there. Batches are a function of (seed, step): a run
that was interrupted goes on from its last saved step as if it had not been.

Legend: B positions of a batch, D width of the input, E of the output, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mmllm.errors import ConfigError, TrainingError
from mmllm.insight.dictionary.activation import jumprelu, kth_largest, step_function
from mmllm.insight.dictionary.autoencoder import (
    Origin,
    SparseAutoencoder,
    normalized_rows,
    random_directions,
)
from mmllm.insight.dictionary.calibration import calibrate
from mmllm.kernels.precision import fast_autocast
from mmllm.utils import files
from mmllm.utils.hashing import fingerprint
from mmllm.utils.progress import progress_bar
from mmllm.weights import save_tensors

Kind = Literal["batch_topk", "topk", "matryoshka", "jumprelu"]

Sample = Callable[[int], tuple[Tensor, Tensor]]
"""Step -> inputs float[B, D] and what is to be predicted of them, float[B, E]: the same tensor but
for a transcoder. The same step gives the same batch."""

_CALIBRATION = 8
"""Batches on which thresholds are calibrated. Their steps lie behind the last one of training."""
_NUM_STATISTICS = 4
"""Batches of which mean and scale are computed, from the same range of steps."""


@dataclass(frozen=True)
class DictionaryConfig:
    """How a dictionary is trained.

    Attributes:
        kind: batch_topk: the B k largest activations of a batch (Bussmann et al. 2024); topk: the k
            largest of each position (Gao et al. 2024); matryoshka: batch_topk whose first 1/16,
            1/8, 1/4 and 1/2 of the features reconstruct too (Bussmann et al. 2025); jumprelu: a
            trained threshold for each feature (Rajamanoharan et al. 2024).
        width: F.
        k: active features, on average over positions.
        decoder: frozen: directions stay random, and only the encoder trains. This is a baseline.
        steps: optimizer steps.
        batch_size: B.
        learning_rate: of Adam, after a warm-up of 5 % and until a linear decay of the last 30 %.
        auxiliary: weight of the loss by which dead features learn to reconstruct what the others do
            not (AuxK, Gao et al. 2024).
        dead_after: steps without an activation after which a feature counts as dead.
        sparsity: jumprelu: weight of (L0 / k - 1)^2.
        bandwidth: jumprelu: width of the kernel through which thresholds get a gradient.
        seed: of weights and batches.
    """

    kind: Kind = "batch_topk"
    width: int = 4096
    k: int = 32
    decoder: Literal["trained", "frozen"] = "trained"
    steps: int = 600
    batch_size: int = 2048
    learning_rate: float = 1e-3
    auxiliary: float = 1 / 32
    dead_after: int = 40
    sparsity: float = 0.3
    bandwidth: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            known = ", ".join(get_args(Kind))
            raise ConfigError(f"dictionary.kind: unknown kind {self.kind!r}; known are {known}")
        for name in ("width", "k", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"dictionary.{name}: expected at least 1, got {getattr(self, name)}"
                )
        if self.k > self.width:
            raise ConfigError(
                f"dictionary.k: {self.k} active features of {self.width}; choose a larger width"
            )


def train_dictionary(
    config: DictionaryConfig,
    sample: Sample,
    origin: Origin,
    *,
    held_out: Sample | None = None,
    folder: Path | None = None,
    save_every: int = 100,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> SparseAutoencoder:
    """Train a dictionary on the states of a site.

    Args:
        config: kind, size and steps.
        sample: gives the batch of a step.
        origin: the model and site of the states.
        held_out: gives the batches on which thresholds are calibrated; None: `sample`.
        folder: where the state of training is kept, so that a second call goes on from there; it
            is deleted at the end. None keeps nothing.
        save_every: steps between two saved states.
        device: where it is trained.
        progress: whether to show a progress bar.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    trainer = _DictionaryTrainer(config, sample, origin, torch.device(device))
    file = folder / "training_state.safetensors" if folder else None
    first = trainer.resume(file) if file else 0
    name = f"dictionary {origin.site}"
    with progress_bar(name, total=config.steps, unit="step", show=progress, initial=first) as bar:
        for step in range(first, config.steps):
            trainer.step(step)
            if file and (step + 1) % save_every == 0:
                trainer.save(file, step + 1)
            bar.update()
    dictionary = trainer.finished(held_out or sample)
    if file:
        file.unlink(missing_ok=True)
    return dictionary


class _DictionaryTrainer:
    """Weights in normalised units, their optimizer, and since when each feature is inactive."""

    def __init__(
        self, config: DictionaryConfig, sample: Sample, origin: Origin, device: torch.device
    ):
        self.config, self.sample, self.origin, self.device = config, sample, origin, device
        steps = range(config.steps, config.steps + _NUM_STATISTICS)
        batches = [(x.to(device), y.to(device)) for x, y in map(sample, steps)]
        self.mean_in, self.scale_in = _statistics([x for x, _ in batches])
        self.mean_out, self.scale_out = (
            _statistics([y for _, y in batches])
            if origin.is_transcoder
            else (self.mean_in, self.scale_in)
        )
        generator = torch.Generator().manual_seed(config.seed)
        d_in, d_out = len(self.mean_in), len(self.mean_out)
        decoder = random_directions(config.width, d_out, generator)
        encoder = (
            random_directions(config.width, d_in, generator).t()
            if origin.is_transcoder
            else decoder.t()
        )
        weights = {
            "W_enc": encoder.contiguous().clone(),
            "b_enc": torch.zeros(config.width),
            "W_dec": decoder,
            "b_dec": torch.zeros(d_out),
        }
        if config.kind == "jumprelu":
            weights["log_threshold"] = torch.zeros(config.width)
        self.weights = {name: value.to(device) for name, value in weights.items()}
        self.trained = {
            name: nn.Parameter(value)
            for name, value in self.weights.items()
            if name != "W_dec" or config.decoder == "trained"
        }
        self.weights.update(self.trained)
        self.optimizer = torch.optim.Adam(
            self.trained.values(), lr=config.learning_rate, fused=True
        )
        self.inactive = torch.zeros(config.width, dtype=torch.long, device=device)

    # --- one step -------------------------------------------------------------------------------

    def step(self, step: int) -> None:
        """One step of Adam on the batch of `step`."""
        config = self.config
        x, y = self._normalized_batch(step)
        with fast_autocast(self.device.type):
            pre = self._pre_activations(x)
            active, penalty = self._activate(pre)
            loss, residual = self._reconstruction(active, y)
            loss = loss + penalty + self._auxiliary(pre, residual)
        if not loss.isfinite():
            raise TrainingError(
                f"dictionary {self.origin.site}: the loss of step {step} is not finite; lower "
                f"learning_rate ({config.learning_rate})"
            )
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            fired = (active > 0).any(dim=0)
            self.inactive = torch.where(fired, 0, self.inactive + 1)
            self._keep_unit_norm(before=True)
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            rate = _rate(step, config.steps)
            self.optimizer.param_groups[0]["lr"] = config.learning_rate * rate
            self.optimizer.step()
            self._keep_unit_norm(before=False)

    def _normalized_batch(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = (states.to(self.device) for states in self.sample(step))
        normal = (x.float() - self.mean_in) / self.scale_in
        same = (y.float() - self.mean_out) / self.scale_out if self.origin.is_transcoder else normal
        return normal, same

    def _pre_activations(self, x: Tensor) -> Tensor:
        """float32[B, D] -> float[B, F]"""
        bias = 0 if self.origin.is_transcoder else self.weights["b_dec"]
        return torch.addmm(self.weights["b_enc"], x - bias, self.weights["W_enc"])

    def _activate(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Activations float[B, F] and the penalty on their number."""
        config, none = self.config, pre.new_zeros((), dtype=torch.float32)
        if config.kind == "jumprelu":
            threshold = self.weights["log_threshold"].exp().to(pre.dtype)
            num_active = step_function(pre, threshold, config.bandwidth).float().sum(dim=-1).mean()
            penalty = config.sparsity * (num_active / config.k - 1).square()
            return jumprelu(pre, threshold, config.bandwidth), penalty
        if config.kind == "topk":
            largest = pre.topk(config.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter(-1, largest.indices, largest.values.relu()), none
        smallest = kth_largest(pre.detach(), config.k * len(pre))
        return pre.relu() * (pre >= smallest), none

    def _reconstruction(self, active: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean square error, over all nested dictionaries, and the residual float32[B, E]."""
        bias, decoder = self.weights["b_dec"], self.weights["W_dec"]
        ends = [self.config.width]
        if self.config.kind == "matryoshka":
            ends = sorted({max(1, self.config.width >> shift) for shift in range(5)})
        residual, loss, start = y - bias, y.new_zeros(()), 0
        for end in ends:
            residual = residual - (active[:, start:end] @ decoder[start:end]).float()
            loss = loss + residual.square().mean() / len(ends)
            start = end
        return loss, residual

    def _auxiliary(self, pre: Tensor, residual: Tensor) -> Tensor:
        """Error of dead features at what the living ones leave."""
        dead = (self.inactive > self.config.dead_after).nonzero()[:, 0]
        if not len(dead) or not self.config.auxiliary or self.config.decoder == "frozen":
            return residual.new_zeros(())
        target = residual.detach()
        k = min(len(dead), target.shape[1] // 2)
        largest = pre[:, dead].topk(k, dim=-1, sorted=False)
        active = torch.zeros_like(pre[:, dead]).scatter(-1, largest.indices, largest.values.relu())
        error = (target - (active @ self.weights["W_dec"][dead]).float()).square().mean()
        scale = min(len(dead) / (target.shape[1] // 2), 1.0)
        return self.config.auxiliary * scale * error / target.square().mean()

    def _keep_unit_norm(self, *, before: bool) -> None:
        """Before a step, remove the part of the gradient that would change the norm of a decoder
        row; after it, set the norm to 1."""
        decoder = self.trained.get("W_dec")
        if decoder is None:
            return
        if before:
            assert decoder.grad is not None
            along = (decoder.grad * decoder).sum(dim=-1, keepdim=True)
            decoder.grad -= along * decoder
        else:
            decoder.copy_(normalized_rows(decoder))

    # --- the end --------------------------------------------------------------------------------

    @torch.no_grad()
    def finished(self, calibration: Sample) -> SparseAutoencoder:
        """The dictionary in the units of the states, its thresholds calibrated to k."""
        config = self.config
        dictionary = SparseAutoencoder(
            len(self.mean_in),
            config.width,
            self.origin,
            d_out=len(self.mean_out),
            k=config.k if config.kind == "topk" else None,
        ).to(self.device)
        weights = {name: value.detach() for name, value in self.weights.items()}
        scale = self.scale_out / self.scale_in
        b_enc, b_dec = weights["b_enc"], weights["b_dec"] * self.scale_out + self.mean_out
        if self.origin.is_transcoder:  # it reads states that nothing is subtracted from
            b_enc = b_enc - self.mean_in / self.scale_in @ weights["W_enc"]
        dictionary.W_enc.copy_(weights["W_enc"] * scale)
        dictionary.b_enc.copy_(b_enc * self.scale_out)
        dictionary.W_dec.copy_(weights["W_dec"])
        dictionary.b_dec.copy_(b_dec)
        if config.kind == "jumprelu":
            dictionary.threshold.copy_(weights["log_threshold"].exp())
        else:
            dictionary.threshold.fill_(1.0)
        steps = range(config.steps, config.steps + _CALIBRATION)
        states = [calibration(step)[0].to(self.device) for step in steps]
        return calibrate(dictionary, torch.cat(states), config.k).cpu()

    # --- resuming -------------------------------------------------------------------------------

    @property
    def _fingerprint(self) -> str:
        statistics = [self.scale_in.item(), self.mean_in.sum().item()]
        return fingerprint([asdict(self.config), asdict(self.origin), statistics])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "inactive", self.inactive
        for name, parameter in self.trained.items():
            yield name, parameter.detach()
            state = self.optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq", "step"):
                if key in state:
                    yield f"{key}/{name}", state[key]

    def save(self, file: Path, step: int) -> None:
        """Write the state after `step` steps."""
        file.parent.mkdir(parents=True, exist_ok=True)
        about = {"fingerprint": self._fingerprint, "step": str(step)}
        with (
            files.write_errors(file, TrainingError, "free some space"),
            files.atomic_file(file) as draft,
        ):
            save_tensors(dict(self._tensors()), draft, about)

    def resume(self, file: Path) -> int:
        """Read a state that `save` wrote, of the same config and states; how many steps it has."""
        from safetensors import safe_open

        if not file.is_file():
            return 0
        with safe_open(file, framework="pt") as saved:
            about = saved.metadata() or {}
            if about.get("fingerprint") != self._fingerprint:
                return 0
            self.inactive.copy_(saved.get_tensor("inactive"))
            for name, parameter in self.trained.items():
                parameter.data.copy_(saved.get_tensor(name))
                self.optimizer.state[parameter] = {
                    key: saved.get_tensor(f"{key}/{name}").to(self.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        return int(about["step"])


def _statistics(batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean float32[D], and the root of the mean variance of a coordinate."""
    values = torch.cat([batch.float() for batch in batches])
    mean = values.mean(dim=0)
    return mean, (values - mean).square().mean().sqrt().clamp(min=1e-8)


def _rate(step: int, steps: int) -> float:
    """Warm-up, plateau, linear decay: the share of the learning rate."""
    warmup, decay = max(1, steps // 20), max(1, steps * 3 // 10)
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)
