"""The training loop and its state: weights, averages, optimizer and progress."""

from __future__ import annotations

import json
import math
import re
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from tools.mini.decoders.items import Items, latents_of, training_batch
from tools.mini.decoders.loss import denoising_loss
from tools.mini.decoders.pipelines import TEXT_PATH
from tools.mini.decoders.samples import sheet
from tools.mini.decoders.table import DECODERS


def modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    parts = {name: getattr(pipe, name) for name in pipe.components}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def parameters(pipe: DiffusionPipeline) -> dict[str, int]:
    return {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in modules(pipe).items()
    }


def trained(pipe: DiffusionPipeline) -> dict[str, nn.Parameter]:
    """What the loop trains: all but the codec and the time frequencies of the audio decoder."""
    weights = {}
    for name, part in modules(pipe).items():
        for key, parameter in part.named_parameters():
            frozen = name == "vae" or f"{name}.{key}" == "transformer.time_proj.weight"
            parameter.requires_grad_(not frozen)
            if parameter.requires_grad:
                weights[f"{name}.{key}"] = parameter
    return weights


# First pattern that fits a parameter's name -> its share of the learning rate.
PACES = {
    r"text_encoder\.shared": 5.0,
    r"text_encoder\.": 0.3,
    rf"transformer\..*({TEXT_PATH})": 2.0,
    "": 1.0,
}


@dataclass
class Progress:
    """Where a run stands: goes into progress.json."""

    decoder: str
    seed: int
    steps: int
    minutes: float | None
    step: int = 0
    seconds: float = 0.0
    earlier: int = 0  # steps of the run whose transformer this one began with
    losses: list[float] = field(default_factory=list)  # means over 50 steps

    def share(self) -> float:
        """0 at the start, 1 when the steps or the minutes are used up."""
        minutes = self.seconds / 60 / self.minutes if self.minutes else 0.0
        return min(1.0, max(self.step / self.steps, minutes))


class Run:
    """Pipeline, averaged weights and optimizer of a training, on disk without pickle."""

    def __init__(self, folder: Path, pipe: DiffusionPipeline, progress: Progress):
        self.folder, self.pipe, self.progress = folder, pipe, progress
        self.recipe = DECODERS[progress.decoder]
        self.latents: Tensor | None = None  # of all items, where nothing varies them
        self.weights = trained(pipe)
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}
        groups: dict[float, list[nn.Parameter]] = {}
        for name, weight in self.weights.items():
            pace = next(pace for pattern, pace in PACES.items() if re.match(pattern, name))
            groups.setdefault(pace, []).append(weight)
        self.optimizer = torch.optim.AdamW(
            [{"params": weights, "pace": pace} for pace, weights in groups.items()],
            lr=self.recipe.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
        )

    @classmethod
    def start(
        cls,
        folder: Path,
        items: Items,
        words: Path,
        codec: Path | None,
        progress: Progress,
        after: Path | None,
    ) -> Run:
        """A new run; `after`: an earlier one whose transformer it takes, but for the text path."""
        torch.manual_seed(progress.seed)
        pipe = DECODERS[progress.decoder].build(items.captions.texts(), words, codec)
        if after:
            done = json.loads((after / "progress.json").read_text(encoding="utf-8"))
            state = load_file(after / f"state-{done['step']}.safetensors")
            progress.earlier = done["step"]
            for name, weight in pipe.transformer.named_parameters():
                if f"average/transformer.{name}" in state and not re.search(TEXT_PATH, name):
                    weight.data.copy_(state[f"average/transformer.{name}"])
        pipe.save_pretrained(folder / "start")
        return cls(folder, pipe, progress)

    @classmethod
    def resume(cls, folder: Path) -> Run:
        progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
        run = cls(folder, DiffusionPipeline.from_pretrained(folder / "start"), progress)
        state = load_file(folder / f"state-{progress.step}.safetensors")
        for name, weight in run.weights.items():
            weight.data.copy_(state[f"weight/{name}"])
            run.averages[name].copy_(state[f"average/{name}"])
            run.optimizer.state[weight] = {
                key: state[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
        return run

    def save(self) -> None:
        """Write the state next to the previous one, then the JSON that refers to it."""
        state = {}
        for name, weight in self.weights.items():
            state[f"weight/{name}"] = weight.detach()
            state[f"average/{name}"] = self.averages[name]
            state |= {f"{k}/{name}": v for k, v in self.optimizer.state[weight].items()}
        current = self.folder / f"state-{self.progress.step}.safetensors"
        save_file(state, current)
        fresh = self.folder / "progress.json.new"
        fresh.write_text(json.dumps(asdict(self.progress), indent=1), encoding="utf-8")
        fresh.replace(self.folder / "progress.json")
        for old in self.folder.glob("state-*.safetensors"):
            if old != current:
                old.unlink()

    def rate(self) -> float:
        """Warm-up over 200 steps, then a cosine to 2 % of the full learning rate."""
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * self.progress.share())) / 2
        return self.recipe.learning_rate * min(1.0, (self.progress.step + 1) / 200) * cosine

    def take_step(self, items: Items) -> float:
        """One optimizer step; float32 weights, bfloat16 products."""
        progress = self.progress
        torch.manual_seed(hash((progress.seed, progress.step)))  # dropout in the text encoder
        chosen, captions, generator = training_batch(
            self.recipe, items, progress.step, progress.seed
        )
        if self.recipe.augment:
            clean = latents_of(
                self.recipe, self.pipe, self.recipe.augment(items.samples[chosen], generator)
            )
        else:
            if self.latents is None:
                self.latents = latents_of(self.recipe, self.pipe, items.samples)
            clean = self.latents[chosen]
        with torch.autocast("cpu", torch.bfloat16):
            loss = denoising_loss(
                self.recipe, self.pipe, clean, captions, generator, progress.share()
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["pace"] * self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        decay = min(0.999, (1 + progress.step) / (10 + progress.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.averages.values()), list(self.weights.values()), 1 - decay
            )
        return loss.item()

    def averaged(self) -> DiffusionPipeline:
        """A second pipeline that carries the averaged weights, for sampling and shipping."""
        pipe = DiffusionPipeline.from_pretrained(self.folder / "start")
        for name, weight in trained(pipe).items():
            weight.data.copy_(self.averages[name])
        pipe.set_progress_bar_config(disable=True)
        return pipe


def train(run: Run, items: Items, every: float) -> None:
    """Steps until the share is used up; a checkpoint and a sheet of samples every few minutes."""
    progress = run.progress
    for part in modules(run.pipe).values():
        part.train()
    bar = tqdm(total=progress.steps, initial=progress.step, unit="step", mininterval=20)
    saved = last = time.monotonic()
    losses: list[float] = []
    stopped: list[int] = []  # Ctrl-C or a polite kill: finish the step, save, end
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, _: stopped.append(number))
    # The fused attention kernel is slow backward on CPUs: 1.15 against 0.77 s a step.
    with sdpa_kernel(SDPBackend.MATH):
        while progress.share() < 1 and not stopped:
            losses.append(run.take_step(items))
            now = time.monotonic()
            progress.seconds, last = progress.seconds + now - last, now
            bar.update()
            if len(losses) == 50:
                progress.losses.append(sum(losses) / 50)
                bar.set_postfix(loss=f"{progress.losses[-1]:.4f}", done=f"{progress.share():.0%}")
                losses.clear()
            if now - saved > every * 60:
                run.save()
                sheet(run, items)
                saved = last = time.monotonic()
    bar.close()
    run.save()
    sheet(run, items)
