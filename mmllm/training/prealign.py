"""Pre-alignment: projections learn most of their task before the LLM is trained through.

Input side: a frozen encoder's features and the frozen LLM's own word embeddings are all that is
needed, so a few hundred steps take seconds where a step through the LLM takes one. Each projected
token is drawn to the embedding of the reply about its medium and away from those of the other
replies in the batch (InfoNCE, van den Oord et al. 2018; against text as in CLIP, Radford et al.
2021). What the LLM then reads is close to the word itself, which it can already repeat.

Output side: the LLM is run once over each conversation, the hidden states of the signal tokens are
kept, and the output projections learn to turn them into the decoders' conditions without it. At
the end of a stage that has changed the LLM, realignment does so again.

Legend: M media of a batch, N tokens of a medium, K signal tokens, R replies, D width of the LLM.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mmllm import losses
from mmllm.config import PrealignConfig, StageConfig
from mmllm.conversation import Medium
from mmllm.data.batch import collate
from mmllm.data.frozen import FrozenWork, identity
from mmllm.data.rendering import Rendered
from mmllm.model import AnyToAny

Reply = tuple[int, ...]
Autocast = Callable[[], AbstractContextManager]
_BATCH = 32


def prealign(
    model: AnyToAny,
    items: Iterable[Rendered],
    work: FrozenWork,
    stage: StageConfig,
    options: PrealignConfig,
    *,
    inputs: bool = True,
    autocast: Autocast = nullcontext,
    progress: bool = True,
) -> dict[str, float]:
    """Train the projections that have a gradient, inputs first. Returns, by name, the share of
    media that the tokens of an input projection tell right, or the loss of an output projection.

    Without `inputs` it is realignment: the output side alone, when a stage has changed the LLM.
    `autocast` gives the context of one forward pass: not of many, because it keeps the weights that
    it has cast. Every process does the same from the same seed, so there is nothing to exchange.
    """
    items, fit = list(items), _Fit(options, stage.seed, autocast, progress)
    scores = _prealign_inputs(model, items, work, fit) if inputs else {}
    return scores | _prealign_outputs(model, items, work, stage.distance, fit)


def _prealign_inputs(
    model: AnyToAny,
    items: list[Rendered],
    work: FrozenWork,
    fit: _Fit,
) -> dict[str, float]:
    scores = {}
    for key, pairs in _pairs(model, items).items():
        replies = list(dict.fromkeys(reply for _, reply in pairs))
        projection = model.input_projections[key]
        if not _trains(projection) or len(replies) < 2:
            continue
        targets = embed_replies(model, replies)  # [R, D]
        place = {reply: index for index, reply in enumerate(replies)}
        media = [medium for medium, _ in pairs]
        owners = torch.tensor([place[reply] for _, reply in pairs])

        def loss(chosen: Tensor, key=key, media=media, owners=owners, targets=targets) -> Tensor:
            rows, own = owners[chosen].unique(return_inverse=True)
            tokens = _tokens(model, work, key, [media[i] for i in chosen.tolist()])
            logits = tokens @ targets[rows.to(targets.device)].T / fit.options.temperature
            answers = own.to(logits.device).repeat_interleave(tokens.shape[1])
            return F.cross_entropy(logits.flatten(0, 1), answers)

        name = f"input_projections.{key}"
        fit(name, projection, len(media), loss)
        with torch.no_grad(), _evaluating(projection):
            near = [
                (_tokens(model, work, key, media[start : start + 64]) @ targets.T).mean(1).argmax(1)
                for start in range(0, len(media), 64)
            ]
        scores[name] = (torch.cat(near).cpu() == owners).float().mean().item()
    return scores


def _prealign_outputs(
    model: AnyToAny,
    items: list[Rendered],
    work: FrozenWork,
    distance: str,
    fit: _Fit,
) -> dict[str, float]:
    keys = [key for key, module in model.output_projections.items() if _trains(module)]
    made = _signals(model, [item for item in items if item.outputs], work, keys, fit)
    scores = {}
    for key, kept in made.items():
        projection, masks = model.output_projections[key], model.decoders[key].masks

        def loss(chosen: Tensor, kept=kept, projection=projection, masks=masks) -> Tensor:
            targets = {name: value[chosen] for name, value in kept.targets.items()}
            term = losses.align(projection(kept.states[chosen]), targets, masks, distance)
            return term.total / term.count

        name = f"output_projections.{key}"
        scores[name] = fit(name, projection, len(kept.states), loss)
    return scores


@dataclass
class _Signals:
    """Of one output: `states` float[M, K, D] as its projection takes them, `targets` by name."""

    states: Tensor
    targets: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def _signals(
    model: AnyToAny, items: list[Rendered], work: FrozenWork, keys: list[str], fit: _Fit
) -> dict[str, _Signals]:
    """What the LLM, as it stands, says at every signal run of `items`."""
    found: dict[str, list[tuple[Tensor, dict[str, Tensor]]]] = {key: [] for key in keys}
    items = sorted(items, key=len) if keys else []
    bar = tqdm(
        range(0, len(items), _BATCH),
        desc="pre-alignment: hidden states",
        unit="batch",
        disable=not fit.progress,
        leave=False,
    )
    with _evaluating(model):
        for start in bar:
            group = items[start : start + _BATCH]
            batch = collate(
                group,
                work,
                input_widths=model.input_widths,
                output_widths=model.output_widths,
                pad_id=model.llm.pad_id,
                seeds=[0] * len(group),
            ).to(model.device)
            with fit.autocast():
                signals = model.signals(batch)
            for key in keys:
                if len(signals[key]):
                    found[key].append((signals[key], batch.outputs[key].targets))
    return {
        key: _Signals(
            torch.cat([states for states, _ in parts]),
            {name: torch.cat([t[name] for _, t in parts]) for name in parts[0][1]},
        )
        for key, parts in found.items()
        if parts
    }


@dataclass(frozen=True)
class _Fit:
    """How projections are fitted, and the fitting."""

    options: PrealignConfig
    seed: int
    autocast: Autocast
    progress: bool

    def __call__(
        self, name: str, projection: nn.Module, num: int, loss: Callable[[Tensor], Tensor]
    ) -> float:
        """Adam on batches of `num` items, warmed up and brought down to nothing; the last loss."""
        options = self.options
        generator = torch.Generator().manual_seed(self.seed)
        torch.manual_seed(self.seed)  # dropout
        weights = [weight for weight in projection.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=options.learning_rate, betas=(0.9, 0.98))
        projection.train()
        value = torch.zeros(())
        bar = tqdm(
            range(options.steps),
            desc=f"pre-alignment: {name}",
            unit="step",
            disable=not self.progress,
            leave=False,
        )
        for step in bar:
            rate = min(1.0, (step + 1) / (0.05 * options.steps + 1)) * (1 - step / options.steps)
            optimizer.param_groups[0]["lr"] = options.learning_rate * rate
            with self.autocast():
                value = loss(torch.randperm(num, generator=generator)[: options.batch_size])
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        optimizer.zero_grad()
        return value.item()


def embed_replies(model: AnyToAny, replies: list[Reply]) -> Tensor:
    """The mean embedding of each reply's tokens, float32[R, D], centred, of length 1.

    A token counts by its inverse document frequency, so what all replies share counts nothing.
    """
    table = model.llm.embedding.weight.detach()
    frequency = Counter(token for reply in replies for token in set(reply))
    rows = []
    for reply in replies:
        ids = torch.tensor(reply, device=table.device)
        weights = table.new_tensor([math.log(len(replies) / frequency[t]) for t in reply]).float()
        rows.append(weights @ table[ids].float() / weights.sum().clamp_min(1e-6))
    stacked = torch.stack(rows)
    return F.normalize(stacked - stacked.mean(0), dim=-1)


def _tokens(model: AnyToAny, work: FrozenWork, key: str, media: list[Medium]) -> Tensor:
    """What the projection makes of media, each token of length 1: float32[M, N, D]."""
    found = work.input_media(key, media)
    features, mask = found["features"], found["feature_mask"]
    assert features is not None
    projected = model.input_projections[key](
        features.to(model.device), None if mask is None else mask.to(model.device)
    )
    return F.normalize(projected.float(), dim=-1)


def _pairs(model: AnyToAny, items: Iterable[Rendered]) -> dict[str, list[tuple[Medium, Reply]]]:
    """Medium and reply of each conversation that shows one medium, once each, by encoder key."""
    found: dict[tuple[str, str, Reply], tuple[Medium, Reply]] = {}
    vocabulary = model.llm.embedding.num_embeddings
    for item in items:
        if len(item.inputs) != 1 or item.outputs:
            continue
        reply = tuple(label for label in item.labels if 0 <= label < vocabulary)
        place = item.inputs[0]
        found[place.key, identity(place.medium), reply] = (place.medium, reply)
    grouped: dict[str, list[tuple[Medium, Reply]]] = {}
    for (key, _, _), pair in found.items():
        grouped.setdefault(key, []).append(pair)
    return grouped


def _trains(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)
