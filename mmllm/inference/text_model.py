"""The likelihood of given replies, and a fingerprint of the model that computes it: what
mmllm.reasoning asks of a chat besides replies.

Legend: P supervised positions, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mmllm import checkpoints
from mmllm.conversation import Message, assistant
from mmllm.data.batch import collate
from mmllm.data.protocol import FeatureProvider
from mmllm.data.rendering import UNSUPERVISED, Rendered
from mmllm.errors import ConfigError, ContextError
from mmllm.model import AnyToAny
from mmllm.utils.hashing import fingerprint, sha256

MAX_POSITIONS = 4096
"""Positions of the replies in one forward pass of `score_replies`."""
_COMPUTE = ("llm", "encoders", "input_projections", "decoders", "output_projections")
"""Groups of a config that determine what is computed."""
_NUM_VALUES = 256
"""Values of each frozen weight that a fingerprint reads, evenly spaced."""


@torch.inference_mode()
def score_replies(
    model: AnyToAny,
    features: FeatureProvider,
    messages: Sequence[Message],
    replies: Sequence[str],
) -> list[float]:
    """log p of each text as the whole reply, its end token included.

    The prompt is computed once per forward pass where conversations can be packed behind a shared
    prefix (`LanguageModel.supports_prefix_packing`).

    Args:
        model: the model.
        features: gives the encoders' inputs.
        messages: the conversation before the reply.
        replies: at least one text.

    Raises:
        ConfigError: there are no replies.
        ContextError: the prompt and a reply exceed the context.
    """
    if isinstance(replies, str) or not replies:
        raise ConfigError("score: expected a list of one or more replies")
    num_prompt = len(model.renderer.render(messages, add_generation_prompt=True))
    items = []
    for reply in replies:
        item = model.renderer.render([*messages, assistant(reply)])
        if len(item) > model.llm.max_length:
            raise ContextError(
                f"the prompt and a reply take {len(item)} tokens, but the context holds "
                f"{model.llm.max_length}: shorten them, or raise llm.max_length if the model allows"
                " it"
            )
        unsupervised = [UNSUPERVISED] * num_prompt
        items.append(replace(item, labels=unsupervised + item.labels[num_prompt:]))
    if model.llm.config.memory is not None:
        return _score_with_memory(model, features, items, num_prompt)
    scores: list[float] = []
    while len(scores) < len(items):
        scores += _score(model, features, _next_group(items[len(scores) :], num_prompt))
    return scores


def _next_group(items: Sequence[Rendered], num_prompt: int) -> Sequence[Rendered]:
    """As many of the first items as one forward pass takes; at least one. The prompt does not
    count, so that a long one is computed once for all replies, too."""
    num = total = 0
    for item in items:
        total += len(item) - num_prompt
        if num and total > MAX_POSITIONS:
            break
        num += 1
    return items[:num]


def _score(model: AnyToAny, features: FeatureProvider, items: Sequence[Rendered]) -> list[float]:
    llm = model.llm
    batch = collate(
        items,
        features,
        model.batch_layout,
        pack=llm.supports_prefix_packing,
        targets=False,
    ).to(model.device)
    states = model.hidden(batch).flatten(0, 1)[batch.target_indices]  # [P, D]
    counts = [sum(label != UNSUPERVISED for label in item.labels) for item in items]
    nll = llm.token_nll(states, batch.labels).double().cpu().split(counts)
    return [-part.sum().item() for part in nll]


def _score_with_memory(
    model: AnyToAny, features: FeatureProvider, items: Sequence[Rendered], num_prompt: int
) -> list[float]:
    """Score replies one by one, each behind the prompt's cache: what generation reads of the prompt
    is read here, too."""
    llm, first = model.llm, items[0]
    prompt = Rendered(first.ids[:num_prompt], first.labels[:num_prompt], first.inputs)
    batch = collate([prompt], features, model.batch_layout, targets=False).to(model.device)
    cache = llm.new_cache()
    for place in prompt.inputs:
        cache.keep_whole(place.start, place.start + place.length)
    last = llm(model.embed(batch), positions=batch.positions, cache=cache)[0, -1:]
    scores = []
    for item in items:
        ids, labels = torch.tensor([item.ids[num_prompt:], item.labels[num_prompt:]]).to(
            last.device
        )
        positions = torch.arange(num_prompt, len(item), device=last.device)[None]
        fork = cache.prefix(num_prompt)
        states = torch.cat([last, llm(llm.embed(ids[None]), positions=positions, cache=fork)[0]])
        is_target = labels != UNSUPERVISED
        nll = llm.token_nll(states[:-1][is_target], labels[is_target])
        scores.append(-nll.double().sum().item())
    return scores


def model_fingerprint(model: AnyToAny) -> str:
    """A hash of what the model computes text with: values of its config other than the defaults,
    its frozen weights, and all that was trained.

    Names, licences, paths and kernels are no part of it, and a key that a later version adds to the
    config is none as long as it has its default.

    Args:
        model: the model.
    """
    config = {group: _chosen(getattr(model.config, group)) for group in _COMPUTE}
    parts = checkpoints.fingerprints(model)
    weights = [_digest(name, tensor) for name, tensor in model.llm.base_model.named_parameters()]
    trained = [
        sha256(name.encode() + parameter.detach().float().cpu().contiguous().numpy().tobytes())
        for name, parameter in model.trainable_candidates()
    ]
    return fingerprint([config, parts, model.llm.chat_template, weights, trained])


def _chosen(config: Any) -> Any:
    """The values of a config that are not its defaults. Weights are identified by content."""
    if dataclasses.is_dataclass(config):
        values = {
            entry.name: value
            for entry in dataclasses.fields(config)
            if (value := getattr(config, entry.name)) != _default(entry)
        }
        return {"type": type(config).__name__, **_chosen(values)}
    if isinstance(config, Mapping):
        return {key: _chosen(value) for key, value in config.items() if key != "weights"}
    if isinstance(config, list | tuple):
        return list(map(_chosen, config))
    return config


def _default(entry: dataclasses.Field[Any]) -> Any:
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return entry.default


def _digest(name: str, tensor: torch.Tensor) -> str:
    """A hash of evenly spaced values of a weight, rounded so that the dtype it was loaded in does
    not matter."""
    flat = tensor.detach().flatten()
    if flat.is_meta:
        return name
    values = flat[:: max(1, len(flat) // _NUM_VALUES)].to("cpu", torch.bfloat16).float()
    return sha256(name.encode() + values.numpy().tobytes())
