"""What a transformer learns from examples in its context, inside and outside its training mixture.

python demos/mixtures.py runs/mixtures

A small transformer reads x1, f(x1), x2, f(x2), ... and predicts f at every x (Garg et al. 2022). It
is trained on linear functions, on sinusoids, or on both, and then asked about functions of either
kind, about sums of both, and about kinds that it has never seen (Yadlowsky et al. 2023): within the
mixture it is as good as a model of one family alone; between the families and outside it fails.
Writes runs/mixtures/{mixtures.json,curves.png,index.html}. A seed is 24,000 steps of a
small model; started again, it goes on with what is there.
"""

import argparse
import html
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmllm import console

DIMENSIONS, EXAMPLES = 4, 12
BATCH, STEPS, LEARNING_RATE = 64, 8_000, 2e-3
SEQUENCES = 2_000
"""Functions of each kind that a model is asked about."""
TRAINED = {"linear": ["linear"], "sine": ["sine"], "mixture": ["linear", "sine"]}
"""Name of a model -> the families that it is trained on, in equal parts."""

Family = Callable[[Tensor, torch.Generator], Tensor]
"""x float[B, N, D] -> f(x) float[B, N], a function for each of the B sequences; variance 1."""


def linear(x: Tensor, generator: torch.Generator) -> Tensor:
    """w x, with w ~ N(0, 1 / D)"""
    weights = torch.randn(len(x), x.shape[-1], 1, generator=generator) / math.sqrt(x.shape[-1])
    return (x @ weights)[..., 0]


def sine(x: Tensor, generator: torch.Generator, faster: float = 1.0) -> Tensor:
    """sqrt(2) sin(a x1 + b), with a from 1 to 2 times `faster`"""
    a, b = torch.rand(2, len(x), 1, generator=generator)
    return math.sqrt(2) * torch.sin((1 + a) * faster * x[..., 0] + 2 * math.pi * b)


def combined(share: float) -> Family:
    """`share` of a linear function and 1 - `share` of a sinusoid"""
    return lambda x, g: share * linear(x, g) + (1 - share) * sine(x, g)


ASKED: dict[str, Family] = {
    "linear": linear,
    **{f"{share:.0%} linear + {1 - share:.0%} sine": combined(share) for share in (0.9, 0.7, 0.5)},
    **{f"{share:.0%} linear + {1 - share:.0%} sine": combined(share) for share in (0.3, 0.1)},
    "sine": sine,
    "sine, twice as fast": lambda x, g: sine(x, g, faster=2.0),
    "products x1 x2": lambda x, g: x[..., 0] * x[..., 1],
    "linear, three times as steep": lambda x, g: 3 * linear(x, g),
}
"""What the models are asked about."""
FAMILIES: dict[str, Family] = {"linear": linear, "sine": sine}


class InContextLearner(nn.Module):
    """A decoder-only transformer over pairs (x, f(x)) that predicts f(x) at every x."""

    def __init__(self, width: int = 64, layers: int = 3, heads: int = 4):
        super().__init__()
        self.read_x, self.read_y = nn.Linear(DIMENSIONS, width), nn.Linear(1, width)
        self.places = nn.Parameter(torch.randn(2 * EXAMPLES, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 1)
        self.mask = nn.Transformer.generate_square_subsequent_mask(2 * EXAMPLES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """float[B, N, D], float[B, N] -> predictions float[B, N], each from the pairs before it"""
        pairs = torch.stack([self.read_x(x), self.read_y(y[..., None])], dim=2)
        tokens = pairs.flatten(1, 2) + self.places
        states = self.layers(tokens, mask=self.mask, is_causal=True)
        return self.out(self.norm(states[:, ::2]))[..., 0]


def train(families: list[str], seed: int, steps: int) -> InContextLearner:
    """Train on fresh functions at every step, a share of each family in each batch."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = InContextLearner()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # warm-up over 5 %, then half a cosine
        optimizer,
        lambda step: min(1, 20 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2,
    )
    for _ in range(steps):
        x = torch.randn(BATCH, EXAMPLES, DIMENSIONS, generator=generator)
        parts = x.chunk(len(families))
        functions = (FAMILIES[name] for name in families)
        y = torch.cat([f(part, generator) for f, part in zip(functions, parts, strict=True)])
        loss = F.mse_loss(model(x, y), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def errors(model: InContextLearner, family: Family) -> Tensor:
    """Squared error of each prediction over the variance of f(x): float[SEQUENCES, N]; 1 is what
    saying 0 costs."""
    generator = torch.Generator().manual_seed(10_000)
    x = torch.randn(SEQUENCES, EXAMPLES, DIMENSIONS, generator=generator)
    y = family(x, generator)
    return (model(x, y) - y).square() / y.square().mean()


@torch.inference_mode()
def least_squares(family: Family) -> Tensor:
    """The same of the least-squares fit of a linear function to the pairs so far."""
    generator = torch.Generator().manual_seed(10_000)
    x = torch.randn(SEQUENCES, EXAMPLES, DIMENSIONS, generator=generator)
    y = family(x, generator)
    guesses = [torch.zeros(SEQUENCES)]
    for n in range(1, EXAMPLES):
        weights = torch.linalg.pinv(x[:, :n]) @ y[:, :n, None]
        guesses.append((x[:, n : n + 1] @ weights)[:, 0, 0])
    return (torch.stack(guesses, 1) - y).square() / y.square().mean()


def interval(values: Tensor) -> list[float]:
    """Mean and 95 % interval (normal) of float[num]"""
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    return [round(values.mean().item() + sign * half, 4) for sign in (0, -1, 1)]


def measure(seed: int, steps: int, folder: Path) -> dict[str, dict[str, list[list[float]]]]:
    """Train the models of a seed, unless they are there, and ask them: model -> what it was asked
    -> by the number of examples, the error and its interval."""
    results = {}
    for name, families in TRAINED.items():
        path = folder / f"{name}-{seed}.safetensors"
        if path.exists():
            model = InContextLearner().eval()
            model.load_state_dict(load_file(path))
        else:
            console.echo(f"seed {seed}: {name}, {steps} steps")
            model = train(families, seed, steps)
            save_file(model.state_dict(), path)
        results[name] = {
            asked: [interval(column) for column in errors(model, family).T]
            for asked, family in ASKED.items()
        }
    return results


def summary(results: dict) -> dict[str, float]:
    """The three findings of one seed, at the last of the predictions (EXAMPLES - 1 pairs)."""
    last = {model: {k: v[-1][0] for k, v in asked.items()} for model, asked in results.items()}
    mixture = last["mixture"]
    return {
        "inside: mixture / pure model, worse family": max(
            mixture[family] / last[family][family] for family in FAMILIES
        ),
        "between: half and half / worse pure family": mixture["50% linear + 50% sine"]
        / max(mixture[family] for family in FAMILIES),
        "outside: sine asked of the linear model": last["linear"]["sine"],
        "outside: products asked of the mixture": mixture["products x1 x2"],
        "outside: faster sine asked of the mixture": mixture["sine, twice as fast"],
    }


def draw(results: dict, path: Path) -> None:
    """Two panels: error by the number of examples, and between the two families."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for model, asked in results.items():
        for family in FAMILIES:
            if model in (family, "mixture"):
                style = "-" if model == "mixture" else "--"
                color = "C0" if family == "linear" else "C1"
                values = [entry[0] for entry in asked[family]]
                left.plot(values, style, color=color, label=f"{family}, {model} model")
    left.plot(least_squares(linear).mean(0), ":", color="C0", label="linear, least squares")
    left.set(yscale="log", ylim=(1e-3, 2), xlabel="examples in the context", title="in the mixture")
    between = [name for name in ASKED if "+" in name or name in FAMILIES]
    for color, (model, asked) in zip(("C0", "C1", "C2"), results.items(), strict=True):
        mean, low, high = zip(*(asked[name][-1] for name in between), strict=True)
        right.plot(mean, "o-", color=color, label=f"{model} model")
        right.fill_between(range(len(between)), low, high, color=color, alpha=0.2)
    right.axhline(1, color="grey", linewidth=0.8, label="saying 0")
    names = [name.partition(" linear")[0] if "+" in name else name for name in between]
    right.set(yscale="log", xlabel="share of linear", title=f"between, {EXAMPLES - 1} examples")
    right.set_xticks(range(len(between)), names)
    for axis in (left, right):
        axis.set_ylabel("relative squared error")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, measure, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    results = [measure(seed, given.steps, given.folder) for seed in range(given.seeds)]
    findings = [summary(result) for result in results]
    report = {"findings": findings, "errors": results}
    (given.folder / "mixtures.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    draw(results[0], given.folder / "curves.png")
    rows = [
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{finding[name]:.2f}</td>" for finding in findings)
        for name in findings[0]
    ]
    heads = "".join(f"<th>seed {seed}</th>" for seed in range(given.seeds))
    (given.folder / "index.html").write_text(
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<title>Mixtures</title><style>body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem "
        "auto;padding:0 1rem}img{width:100%}td,th{padding:.2rem 1rem;text-align:left}</style>"
        f"<h1>In-context learning inside and outside the training mixture</h1>"
        f"<img src=curves.png alt='error by examples, and between the families'>"
        f"<table><tr><th></th>{heads}</tr>{''.join(rows)}</table>",
        encoding="utf-8",
    )
    for name in findings[0]:
        console.echo(f"{name:46} " + " ".join(f"{finding[name]:.2f}" for finding in findings))


if __name__ == "__main__":
    main()
