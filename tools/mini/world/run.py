"""A training of so many steps or minutes: weights, averaged weights, optimizer, progress.

Both the codec and the decoders train this way. A run writes its state every few minutes, stops
politely at Ctrl-C, and goes on where it was: exactly, if its length is given in steps (the learning
rate of a run by the clock depends on the clock). Nothing on disk is a pickle.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from mmllm.kernels.allocator import keep_freed_memory


@dataclass
class Progress:
    """Where a run stands: progress.json."""

    minutes: float | None = None
    steps: int | None = None
    seed: int = 0
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # means over 50 steps

    def share(self) -> float:
        """0 at the start, 1 when the steps or the minutes are used up."""
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        if self.minutes is None:
            raise ValueError("a run lasts so many steps or so many minutes: give one of them")
        return min(1.0, self.seconds / 60 / self.minutes)


class Run:
    """The state of a training.

    Args:
        folder: Where it is kept.
        model: What trains; its weights are those of the start.
        progress: Where it stands.
        learning_rate: At its highest, after the warm-up.
        averaging: Share of the averaged weights that a step keeps, late in training.
        paces: A parameter's name -> its multiple of the learning rate.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        progress: Progress,
        learning_rate: float,
        averaging: float = 0.999,
        paces: Callable[[str], float] = lambda name: 1.0,
        weight_decay: float = 0.0,
    ):
        self.folder, self.model, self.progress = folder, model, progress
        self.learning_rate, self.averaging = learning_rate, averaging
        self.weights = {n: w for n, w in model.named_parameters() if w.requires_grad}
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}
        groups: dict[float, list[nn.Parameter]] = {}
        for name, weight in self.weights.items():
            groups.setdefault(paces(name), []).append(weight)
        self.optimizer = torch.optim.AdamW(
            [{"params": weights, "pace": pace} for pace, weights in groups.items()],
            lr=learning_rate,
            betas=(0.9, 0.98),
            weight_decay=weight_decay,
        )
        if (folder / "progress.json").exists():
            self._load()

    def _load(self) -> None:
        saved = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
        # A longer run may go on from a shorter one: how long it lasts is the caller's word.
        length = {"minutes": self.progress.minutes, "steps": self.progress.steps}
        self.progress = Progress(**saved | length)
        state = load_file(self.folder / f"state-{self.progress.step}.safetensors")
        for name, weight in self.weights.items():
            weight.data.copy_(state[f"weight/{name}"])
            self.averages[name].copy_(state[f"average/{name}"])
            self.optimizer.state[weight] = {
                key: state[f"{key}/{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }

    def save(self) -> None:
        """Write the state next to the previous one, then the JSON that refers to it."""
        state: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            state[f"weight/{name}"] = weight.detach().contiguous()
            state[f"average/{name}"] = self.averages[name].contiguous()
            for key, value in self.optimizer.state[weight].items():
                state[f"{key}/{name}"] = value.contiguous()
        current = self.folder / f"state-{self.progress.step}.safetensors"
        save_file(state, current)
        fresh = self.folder / "progress.json.new"
        fresh.write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
        fresh.replace(self.folder / "progress.json")
        for old in self.folder.glob("state-*.safetensors"):
            if old != current:
                old.unlink()

    def update(self, loss: Tensor) -> float:
        """One step down the gradient of a loss; the loss as a number."""
        progress = self.progress
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        cosine = 0.01 + 0.99 * (1 + math.cos(math.pi * progress.share())) / 2
        rate = self.learning_rate * min(1.0, (progress.step + 1) / 200) * cosine
        for group in self.optimizer.param_groups:
            group["lr"] = group["pace"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        kept = min(self.averaging, (1 + progress.step) / (10 + progress.step))
        weights = [weight.detach() for weight in self.weights.values()]
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averages.values()), weights, 1 - kept)
        return loss.item()

    def load_averages(self, model: nn.Module) -> None:
        """Copy the averaged weights into a model of the same shape."""
        for name, weight in model.named_parameters():
            if name in self.averages:
                weight.data.copy_(self.averages[name])


def load_run(
    folder: Path,
    model: nn.Module,
    fit: Callable[[Tensor, torch.Size], Tensor] = lambda average, shape: average,
) -> None:
    """Copy the averaged weights of a run into a model, but layers that it lacks.

    Args:
        folder: of the run.
        model: what gets them.
        fit: (averaged weights, shape that the model has) -> weights; of another shape, they are
            left out.
    """
    progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    state = load_file(folder / f"state-{progress['step']}.safetensors")
    for name, weight in model.named_parameters():
        average = state.get(f"average/{name}")
        if average is not None and (average := fit(average, weight.shape)).shape == weight.shape:
            weight.data.copy_(average)


def train(
    run: Run,
    loss_of: Callable[[int, float], Tensor],
    look: Callable[[Run], None],
    every: float,
) -> None:
    """Steps until the run has had its length.

    Args:
        run: What is trained.
        loss_of: (step, share of the run) -> the loss of a step, a pure function of the weights.
        look: Called after every checkpoint, to write samples.
        every: Minutes between checkpoints.
    """
    keep_freed_memory()
    progress = run.progress
    stopped: list[int] = []  # Ctrl-C or a polite kill: finish the step, save, end
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, _: stopped.append(number))
    bar = tqdm(unit="step", initial=progress.step, mininterval=20)
    saved = last = time.monotonic()
    losses: list[float] = []
    while progress.share() < 1 and not stopped:
        losses.append(run.update(loss_of(progress.step, progress.share())))
        now = time.monotonic()
        progress.seconds, last = progress.seconds + now - last, now
        bar.update()
        if len(losses) == 50:
            progress.losses.append(sum(losses) / 50)
            bar.set_postfix(loss=f"{progress.losses[-1]:.4f}", done=f"{progress.share():.0%}")
            losses.clear()
        if now - saved > every * 60:
            run.save()
            look(run)
            saved = last = time.monotonic()
    bar.close()
    run.save()
    look(run)


def parse_run(
    parser: argparse.ArgumentParser, minutes: float
) -> tuple[argparse.Namespace, Progress]:
    """Add the options of every run, parse the command line and set up what a run needs.

    Args:
        parser: With the options of one training.
        minutes: How long a run lasts by default.

    Returns:
        The arguments, and the progress of a run that begins.
    """
    parser.add_argument("--minutes", type=float, default=minutes, help="in all")
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--every", type=float, default=10, help="minutes between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    return arguments, Progress(arguments.minutes, arguments.steps, arguments.seed)
