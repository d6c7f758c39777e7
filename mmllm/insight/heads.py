"""Induction heads: scores of every attention head, and what the model loses without some of them.

An induction head attends from a token to the one behind its earlier occurrence, and so continues
what it has seen before (Olsson et al. 2022). Which heads do so is shown by their attention; which
of them matter, by ablation only: `HeadTable.top` finds the candidates, `ablated` takes them away,
and `HeadTable.controls` are as many others of the same layers.

Legend: B sequences, T positions, H heads of C, D width, V text vocabulary, W windows of S tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmllm.errors import ConfigError
from mmllm.insight.hooks import edit, look
from mmllm.insight.positions import Positions
from mmllm.insight.sites import find_site, model_of, num_heads_of
from mmllm.model import AnyToAny

_BATCH = 8
_COMMON, _RARE = 0.04, 0.5
"""Random tokens come from this part of the vocabulary, neither the most nor the least common: ids
of byte-pair encodings are in the order of frequency."""


class Head(NamedTuple):
    """One attention head."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"


@dataclass(frozen=True)
class HeadScore:
    """The scores of one head on repeated random tokens.

    Attributes:
        layer: its layer.
        head: its number there.
        prefix_matching: mean attention from a token to those behind its earlier occurrences.
        previous_token: mean attention to the position before.
        direct_effect: mean of what its output adds by itself to the logit of the right token,
            relative to all tokens; what later heads make of it is not in this.
    """

    layer: int
    head: int
    prefix_matching: float
    previous_token: float
    direct_effect: float

    @property
    def name(self) -> Head:
        """Layer and head."""
        return Head(self.layer, self.head)


@dataclass(frozen=True)
class HeadTable:
    """The scores of all heads of a model."""

    scores: tuple[HeadScore, ...]

    def top(self, num: int = 5, by: str = "prefix_matching") -> list[Head]:
        """The heads with the highest scores.

        Args:
            num: how many.
            by: which score.
        """
        ranked = sorted(self.scores, key=lambda score: getattr(score, by), reverse=True)
        return [score.name for score in ranked[:num]]

    def controls(self, chosen: Sequence[Head], seed: int = 0) -> list[Head]:
        """As many other heads, each of the same layer as one of those that are given.

        Args:
            chosen: the heads that the controls are for; none of them is drawn.
            seed: of the draw.

        Raises:
            ConfigError: a layer has not enough other heads.
        """
        draw, taken = random.Random(seed), set(chosen)
        for layer, _ in chosen:
            others = [s.name for s in self.scores if s.layer == layer and s.name not in taken]
            if not others:
                raise ConfigError(f"layers.{layer} has no other heads to compare with; choose less")
            taken.add(draw.choice(others))
        return sorted(taken - set(chosen))

    def to_json(self) -> list[dict[str, Any]]:
        """The scores as plain data."""
        return [asdict(score) for score in self.scores]


def all_heads(chat: Any) -> list[Head]:
    """Every head of the model whose output is a site.

    Args:
        chat: what `mmllm.load` gives, or a model.
    """
    model, found = model_of(chat), []
    for layer in range(len(model.llm.backbone.layers)):
        try:
            site = find_site(model, f"layers.{layer}.heads")
        except ConfigError:  # a layer without attention
            continue
        found += [Head(layer, head) for head in range(num_heads_of(site))]
    return found


@torch.inference_mode()
def head_table(
    chat: Any, *, examples: int = 10, length: int = 25, repeats: int = 4, seed: int = 0
) -> HeadTable:
    """Score all heads on random tokens that are repeated.

    Args:
        chat: what `mmllm.load` gives, or a model.
        examples: number of sequences that the scores are averaged over.
        length: number of tokens that are repeated.
        repeats: how often they stand there.
        seed: of the tokens.

    Raises:
        ConfigError: the model has no attention heads that can be looked at.
    """
    model, heads = model_of(chat), all_heads(chat)
    if not heads:
        raise ConfigError("this model has no attention heads that can be looked at")
    ids = repeated_tokens(model, examples, length, repeats, seed)
    sums = {head: torch.zeros(3, dtype=torch.float64) for head in heads}
    for row in ids:
        patterns = attention_patterns(model, row[None])
        effects = _direct_effects(model, row, start=1 + length)
        for layer, pattern in patterns.items():
            scores = torch.stack(
                [_prefix_matching(pattern[0], length), _previous_token(pattern[0])], dim=1
            )
            for number, score in enumerate(scores.double()):
                head = Head(layer, number)
                sums[head] += torch.cat([score, effects[head].double()[None]])
    return HeadTable(
        tuple(HeadScore(*head, *(total / len(ids)).tolist()) for head, total in sums.items())
    )


@contextmanager
def ablated(chat: Any, heads: Iterable[Head]) -> Iterator[None]:
    """Context in which the outputs of heads are zero, at every position.

    Args:
        chat: what `mmllm.load` gives, or a model.
        heads: the heads.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def zero(numbers: list[int]) -> Any:
        def function(states: Tensor, _positions: Positions) -> Tensor:
            kept = torch.ones(states.shape[1], 1).to(states)
            kept[numbers] = 0
            return states * kept

        return function

    with ExitStack() as stack:
        for layer, numbers in by_layer.items():
            stack.enter_context(edit(chat, f"layers.{layer}.heads", zero(numbers)))
        yield


# --- losses -------------------------------------------------------------------------------------


def repeated_tokens(
    chat: Any, num: int, length: int = 50, repeats: int = 2, seed: int = 0
) -> Tensor:
    """Draw sequences of random tokens that are repeated, behind a start token:
    int[num, 1 + length * repeats].

    Args:
        chat: what `mmllm.load` gives, or a model.
        num: number of sequences.
        length: number of different tokens.
        repeats: how often they stand there.
        seed: of the draw.
    """
    llm = model_of(chat).llm
    low, high = (int(llm.tokens.vocab_size * share) for share in (_COMMON, _RARE))
    allowed = sorted(set(range(low, high)) - set(llm.tokenizer.all_special_ids))
    draw = random.Random(seed)
    rows = [start_ids(chat) + draw.sample(allowed, length) * repeats for _ in range(num)]
    return torch.tensor(rows)


def start_ids(chat: Any) -> list[int]:
    """The id that a sequence of plain tokens begins with: that of the start token, or another one.

    Args:
        chat: what `mmllm.load` gives, or a model.
    """
    llm = model_of(chat).llm
    start = llm.tokenizer.bos_token_id
    return [start if isinstance(start, int) else llm.pad_id]


@torch.inference_mode()
def token_losses(chat: Any, ids: Tensor) -> Tensor:
    """Compute -ln p of every token but the first, of sequences of plain tokens.

    Args:
        chat: what `mmllm.load` gives, or a model.
        ids: int[W, S].

    Returns:
        float32[W, S - 1], on the CPU.
    """
    model, rows = model_of(chat), []
    for group in ids.split(_BATCH):
        group = group.to(model.device)
        hidden = model.llm(model.llm.embed(group))[:, :-1]  # [B, S - 1, D]
        nll = model.llm.token_nll(hidden.flatten(0, 1), group[:, 1:].flatten())
        rows.append(nll.view(len(group), -1).float().cpu())
    return torch.cat(rows)


def repeat_losses(
    chat: Any, num: int = 100, *, length: int = 50, seed: int = 0, heads: Iterable[Head] = ()
) -> Tensor:
    """Compute the mean loss of random tokens where they stand for the second time: float32[num].

    Args:
        chat: what `mmllm.load` gives, or a model.
        num: number of sequences.
        length: number of tokens that are repeated.
        seed: of the tokens.
        heads: those that are ablated.
    """
    ids = repeated_tokens(chat, num, length, 2, seed)
    with ablated(chat, heads):
        return token_losses(chat, ids)[:, length:].mean(1)


def in_context_scores(losses: Tensor, late: tuple[int, int], early: tuple[int, int]) -> Tensor:
    """Subtract the loss of early tokens from that of late ones, of each window: how much the model
    has learned from the context (negative: it is better later).

    Args:
        losses: float[W, S - 1] of `token_losses`.
        late: first and last position, the last one not included.
        early: likewise.

    Returns:
        float[W].
    """
    return losses[:, slice(*late)].mean(1) - losses[:, slice(*early)].mean(1)


# --- attention ----------------------------------------------------------------------------------


@torch.inference_mode()
def attention_patterns(chat: Any, ids: Tensor) -> dict[int, Tensor]:
    """Compute the attention of every head, by transformers' eager attention. Not for long texts:
    there are B * H * T * T weights in each layer.

    Args:
        chat: what `mmllm.load` gives, or a model.
        ids: int[B, T], plain tokens.

    Returns:
        Layer -> float32[B, H, T, T], on the CPU: rows attend, columns are attended to.

    Raises:
        ConfigError: the model's attention gives no weights.
    """
    model = model_of(chat)
    base, found = model.llm.base_model, {}
    before = base.config.get_text_config()._attn_implementation
    layers = sorted({head.layer for head in all_heads(model)})
    with ExitStack() as stack:
        for layer in layers:
            attention = find_site(model, f"layers.{layer}.attention").module

            def keep(_module: Any, _args: Any, output: Any, layer: int = layer) -> None:
                found[layer] = output[1]

            stack.callback(attention.register_forward_hook(keep).remove)
        stack.callback(base.set_attn_implementation, before)
        base.set_attn_implementation("eager")
        ids = ids.to(model.device)
        model.llm(model.llm.embed(ids))
    if any(pattern is None for pattern in found.values()):
        raise ConfigError(f"{type(base).__name__} gives no attention weights")
    return {layer: pattern.float().cpu() for layer, pattern in found.items()}


def _prefix_matching(pattern: Tensor, length: int) -> Tensor:
    """Mean attention from repeated tokens to those behind their earlier occurrences: float[H, T, T]
    -> float[H]"""
    scores = []
    for at in range(1 + length, pattern.shape[1]):
        targets = list(range(at - length + 1, 1, -length))
        scores.append(pattern[:, at, targets].sum(-1))
    return torch.stack(scores).mean(0)


def _previous_token(pattern: Tensor) -> Tensor:
    """Mean attention to the position before: float[H, T, T] -> float[H]"""
    return pattern.diagonal(-1, 1, 2).mean(-1)


def _direct_effects(model: AnyToAny, ids: Tensor, start: int) -> dict[Head, Tensor]:
    """What each head adds to the logit of the next token, relative to the mean over V, from
    position `start` on: int[T] -> float[] by head.

    The final norm is taken as the product with what it multiplies each number of the last residual
    state by, which is what an RMS norm does."""
    layers = sorted({head.layer for head in all_heads(model)})
    last = len(model.llm.backbone.layers) - 1
    names = [f"layers.{layer}.heads" for layer in layers]
    with look(model, f"layers.{last}", "hidden", *names) as seen:
        model.llm(model.llm.embed(ids[None].to(model.device)))
    rows = slice(start, len(ids) - 1)  # the last token has no next one
    residual, hidden = (seen[name][rows].float() for name in (f"layers.{last}", "hidden"))
    scale = torch.where(residual.abs() > 1e-6, hidden / residual, 0)  # [P, D]
    table = model.llm.base_model.get_output_embeddings().weight[: model.llm.tokens.vocab_size]
    towards = (table[ids[start + 1 :].to(table.device)].float() - table.float().mean(0)).cpu()
    towards = towards * scale  # [P, D]
    effects = {}
    for layer, name in zip(layers, names, strict=True):
        states, module = seen[name][rows], find_site(model, name).module  # [P, H, C]
        device, dtype = next(module.parameters()).device, states.dtype
        alone = torch.eye(states.shape[1], dtype=dtype)[:, None, :, None] * states  # [H, P, H, C]
        zero = torch.zeros(1, states[0].numel(), dtype=dtype, device=device)
        added = module(alone.flatten(2).to(device)) - module(zero)  # [H, P, D]
        for number, value in enumerate((added.float().cpu() * towards).sum(-1).mean(1)):
            effects[Head(layer, number)] = value
    return effects
