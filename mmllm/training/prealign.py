"""Pre-alignment: input projections learn to point at the words of a reply before the LLM is run.

A frozen encoder's features and the frozen LLM's own word embeddings are all that this needs, so a
few hundred steps take seconds where a step through the LLM takes one. Each projected token is
drawn to the embedding of the reply about its medium and away from those of the other replies in
the batch (InfoNCE, van den Oord et al. 2018; against text as in CLIP, Radford et al. 2021). What
the LLM then reads is close to the word itself, which it can already repeat.

Legend: M media of a batch, N tokens of a medium, R replies, D width of the LLM.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mmllm.config import PrealignConfig
from mmllm.conversation import Medium
from mmllm.data.frozen import FrozenWork, identity
from mmllm.data.rendering import Rendered
from mmllm.model import AnyToAny

Reply = tuple[int, ...]


def prealign(
    model: AnyToAny,
    items: Iterable[Rendered],
    work: FrozenWork,
    options: PrealignConfig,
    *,
    seed: int,
    progress: bool = True,
) -> dict[str, float]:
    """Train the input projections that have a gradient; returns the share of media whose tokens
    are nearest to their own reply, by key of the encoder.

    Every process does the same from the same seed, so there is nothing to exchange.
    """
    scores = {}
    for key, pairs in _pairs(model, items).items():
        projection = model.input_projections[key]
        weights = [weight for weight in projection.parameters() if weight.requires_grad]
        replies = list(dict.fromkeys(reply for _, reply in pairs))
        if not weights or len(replies) < 2:
            continue
        targets = embed_replies(model, replies)  # [R, D]
        place = {reply: index for index, reply in enumerate(replies)}
        media = [medium for medium, _ in pairs]
        owners = torch.tensor([place[reply] for _, reply in pairs])
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # the projections' dropout
        optimizer = torch.optim.AdamW(weights, lr=options.learning_rate, weight_decay=0.1)
        model.train()
        bar = tqdm(
            range(options.steps),
            desc=f"pre-alignment: {key}",
            unit="step",
            disable=not progress,
            leave=False,
        )
        for _ in bar:
            chosen = torch.randperm(len(media), generator=generator)[: options.batch_size]
            rows, own = owners[chosen].unique(return_inverse=True)
            tokens = _tokens(model, work, key, [media[i] for i in chosen.tolist()])
            scale = 1 / options.temperature
            logits = scale * tokens @ targets[rows.to(targets.device)].T  # [M, N, R of this batch]
            answer = own.to(logits.device).repeat_interleave(tokens.shape[1])
            loss = F.cross_entropy(logits.flatten(0, 1), answer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            near = [
                (_tokens(model, work, key, media[start : start + 64]) @ targets.T).mean(1).argmax(1)
                for start in range(0, len(media), 64)
            ]
        scores[key] = (torch.cat(near).cpu() == owners).float().mean().item()
    return scores


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
