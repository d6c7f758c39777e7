"""Fitting projections alone: to states that the language model has computed once.

Legend: M media, W words, K signal tokens, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmllm.config import PrealignConfig
from mmllm.data.batch import OutputMedia, collate
from mmllm.data.rendering import Rendered
from mmllm.errors import ConfigError
from mmllm.features.cache import FeatureCache
from mmllm.model import AnyToAny
from mmllm.utils.progress import progress_bar

Autocast = Callable[[], AbstractContextManager]
BATCH_SIZE = 32
"""Conversations that the language model runs over at once."""


@dataclass
class SignalStates:
    """Training data of one output projection.

    Attributes:
        states: float[M, W + K, D], the input of the projection.
        targets: the captions' own conditions, by name.
        latents: float[M, …] of the media, if the cache has those of all.
        references: of each medium the latents of its references; None if no medium has any.
    """

    states: Tensor
    targets: dict[str, Tensor] = field(default_factory=dict)
    latents: Tensor | None = None
    references: list[Tensor] | None = None

    def references_of(self, rows: Tensor) -> list[Tensor] | None:
        """Return those of some media.

        Args:
            rows: int[R], the media.
        """
        if self.references is None:
            return None
        return [self.references[row] for row in rows.tolist()]


@torch.no_grad()
def collect_states(
    model: AnyToAny, items: list[Rendered], cache: FeatureCache, keys: list[str], fit: ProjectionFit
) -> dict[str, SignalStates]:
    """Compute the present LLM's hidden states at every signal span, by output key.

    Args:
        model: the model.
        items: the conversations.
        cache: conditions of captions, and latents if it keeps them.
        keys: of the outputs.
        fit: its autocast and its progress bars.
    """
    found: dict[str, list[SignalStates]] = {key: [] for key in keys}
    items = sorted(items, key=len) if keys else []
    starts = range(0, len(items), BATCH_SIZE)
    bar = progress_bar(
        "pre-alignment: hidden states", total=len(starts), unit="batch", show=fit.progress
    )
    with evaluating(model), bar as shown:
        for start in starts:
            group = items[start : start + BATCH_SIZE]
            batch = collate(
                group,
                cache,
                model.batch_layout,
                pack=model.llm.supports_prefix_packing,
                seeds=[0] * len(group),
            ).to(model.device)
            with fit.autocast():
                signals = model.signals(batch)
            for key in keys:
                if len(signals[key]):
                    media = batch.outputs[key]
                    found[key].append(_states(signals[key], media))
            shown.update()
    return {key: _joined(parts) for key, parts in found.items() if parts}


def _states(signals: Tensor, media: OutputMedia) -> SignalStates:
    return SignalStates(signals, media.targets, media.latents, media.references)


def _joined(parts: list[SignalStates]) -> SignalStates:
    """The media of all parts as one; without latents if one part has none."""
    latents = [part.latents for part in parts if part.latents is not None]
    references: list[Tensor] = []
    for part in parts:
        references += part.references or [part.states.new_zeros(0)] * len(part.states)
    return SignalStates(
        torch.cat([part.states for part in parts]),
        {name: torch.cat([part.targets[name] for part in parts]) for name in parts[0].targets},
        torch.cat(latents) if len(latents) == len(parts) else None,
        references if any(map(len, references)) else None,
    )


@dataclass(frozen=True)
class ProjectionFit:
    """Fits one projection after another with the same options.

    Attributes:
        options: steps, batch size and learning rate.
        seed: of the order of the items and of dropout.
        autocast: context of a forward pass.
        progress: show progress bars.
    """

    options: PrealignConfig
    seed: int
    autocast: Autocast
    progress: bool

    def __call__(
        self, name: str, projection: nn.Module, num: int, loss: Callable[[Tensor], Tensor]
    ) -> float:
        """Train a projection with AdamW, a warm-up and a linear decay to zero.

        Args:
            name: for the progress bar.
            projection: what is trained.
            num: how many items there are.
            loss: of a batch of item indices.

        Returns:
            The last loss.

        Raises:
            ConfigError: the loss depends on no parameter that trains.
        """
        options = self.options
        generator = torch.Generator().manual_seed(self.seed)
        torch.manual_seed(self.seed)  # dropout
        weights = [weight for weight in projection.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(
            weights, lr=options.learning_rate, betas=(0.9, 0.98), fused=True
        )
        projection.train()
        value = torch.zeros(())
        warmup = 0.05 * options.steps + 1
        bar = progress_bar(
            f"pre-alignment: {name}", total=options.steps, unit="step", show=self.progress
        )
        with bar as shown:
            for step in range(options.steps):
                rate = min(1.0, (step + 1) / warmup) * (1 - step / options.steps)
                optimizer.param_groups[0]["lr"] = options.learning_rate * rate
                with self.autocast():
                    value = loss(torch.randperm(num, generator=generator)[: options.batch_size])
                if not value.requires_grad:
                    trained = [n for n, w in projection.named_parameters() if w.requires_grad]
                    raise ConfigError(
                        f"stage.learning_rates: pre-alignment of {name} trains other parameters "
                        f"than {', '.join(trained)}, which are all that the stage trains of it; "
                        f"name {name}.*"
                    )
                optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                shown.update()
        optimizer.zero_grad()
        return value.item()


def trains(module: nn.Module) -> bool:
    """Whether any parameter of a module trains."""
    return any(weight.requires_grad for weight in module.parameters())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context in which a module has no dropout."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)
