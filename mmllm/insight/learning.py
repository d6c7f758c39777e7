"""In-context learning over media and over text: what a model copies from a few lines it has read.

    a picture of a dog: walk
    a picture of a ship: green
    another picture of a dog:            -> walk?

The labels are words that have nothing to do with what is shown, so that nothing but the sequence
tells them. `template_task` is the same over words of a kind ("(month) (animal): 0", Olsson et al.
2022), with the attention of each head on the lines of the right kind.

Legend: P predicted positions, H heads, T positions, N lines.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from mmllm.conversation import Medium
from mmllm.data.batch import collate
from mmllm.data.protocol import FeatureProvider
from mmllm.data.rendering import UNSUPERVISED, MediaSpan, Rendered
from mmllm.errors import ConfigError
from mmllm.features.cache import FeatureCache
from mmllm.insight.heads import Head, ablated, all_heads, attention_patterns, start_ids
from mmllm.insight.sites import model_of
from mmllm.model import AnyToAny

Part = str | Medium
"""Text, or a medium, in a sequence."""

_BATCH = 8
LABEL = re.compile(r"[a-z]{4,7}")
_NUM_LABELS = 1000

MONTHS = "January February March April May June July August September October November December"
COLOURS = "red blue green yellow purple orange black white pink brown grey"
ANIMALS = "cat dog horse cow pig sheep goat lion tiger bear wolf fox rabbit mouse"
FRUITS = "apple banana pear grape peach plum cherry lemon melon mango fig kiwi"
TEMPLATES = ((MONTHS, ANIMALS), (MONTHS, FRUITS), (COLOURS, ANIMALS), (COLOURS, FRUITS))
"""The four kinds of line; the label of a line is the number of its kind."""


@dataclass(frozen=True)
class Example:
    """One thing in two forms.

    Attributes:
        name: what it is.
        shown: how it stands in the sequence, with its label.
        asked: how its label is asked for: another picture, another take, a word.
    """

    name: str
    shown: Part
    asked: Part


@dataclass(frozen=True)
class TemplateResult:
    """What became of the lines of `template_task`.

    Attributes:
        correct: for each line whether its label was the most likely of the four.
        shares: head -> for each text, its attention on earlier lines of the same kind, as a share
            of that on all earlier lines.
        chance: the share of earlier lines that are of the same kind.
    """

    correct: list[bool]
    shares: dict[Head, list[float]]
    chance: float

    def best(self) -> Head:
        """The head with the largest mean share."""
        return max(self.shares, key=lambda head: sum(self.shares[head]))


def sequence(chat: object, parts: Iterable[Part]) -> Rendered:
    """Render text and media as they are, behind a start token: without turns, without a template.

    Args:
        chat: what `mmllm.load` gives, or a model.
        parts: text and media in order.

    Raises:
        ConfigError: the model has no encoder for a medium.
    """
    model = model_of(chat)
    renderer, rendered = model.renderer, Rendered(start_ids(model), [UNSUPERVISED])
    for part in parts:
        if isinstance(part, str):
            ids = renderer.encode_text(part)
        else:
            if part.modality not in renderer.input_keys:
                raise ConfigError(f"this model has no encoder for {part.modality}")
            key, length = renderer.input_keys[part.modality]
            rendered.inputs.append(MediaSpan(key, part, len(rendered.ids), length))
            ids = [model.llm.tokens.placeholder_id] * length
        rendered.ids += ids
        rendered.labels += [UNSUPERVISED] * len(ids)
    return rendered


def copying(
    chat: object,
    examples: Sequence[Example],
    *,
    num: int = 100,
    shots: int = 4,
    seed: int = 0,
    heads: Iterable[Head] = (),
    features: FeatureProvider | None = None,
    on_progress: Callable[[int], object] = lambda _: None,
) -> list[bool]:
    """Show `shots` things with their labels, and ask for the label of one of them in another form.

    Args:
        chat: what `mmllm.load` gives, or a model.
        examples: the things that are drawn from.
        num: number of sequences.
        shots: things in a sequence; guessing is right in 1 / `shots`.
        seed: of what is drawn: things, labels, and which is asked for.
        heads: those that are ablated.
        features: gives the encoders' inputs; one that is kept computes each medium once.
        on_progress: called with the number of sequences after each batch.

    Returns:
        For each sequence whether the right label was the most likely of those shown.

    Raises:
        ConfigError: there are fewer examples than shots, or the model lacks an encoder.
    """
    model, draw = model_of(chat), random.Random(seed)
    if len(examples) < shots:
        raise ConfigError(f"copying: {shots} shots need as many examples, got {len(examples)}")
    features = features or FeatureCache(model)
    labels = label_ids(model, {example.name for example in examples})
    if len(labels) < shots:
        raise ConfigError("copying: the tokenizer has too few whole words to be labels")
    items, choices = [], []
    for _ in range(num):
        things = draw.sample(list(examples), shots)
        chosen = draw.sample(labels, shots)
        right = draw.randrange(shots)
        parts: list[Part] = []
        for thing, label in zip(things, chosen, strict=True):
            parts += [thing.shown, f":{model.llm.tokenizer.decode([label])}\n"]
        items.append(sequence(model, [*parts, things[right].asked, ":"]))
        choices.append((chosen, right))
    correct: list[bool] = []
    with ablated(model, heads):
        while len(correct) < num:
            group = slice(len(correct), len(correct) + _BATCH)
            for logits, (chosen, right) in zip(
                _next_logits(model, items[group], features), choices[group], strict=True
            ):
                correct.append(int(logits[chosen].argmax()) == right)
            on_progress(len(items[group]))
    return correct


def label_ids(model: AnyToAny, names: Iterable[str]) -> list[int]:
    """The tokens that are a whole common word, with the space before it, and in none of the names.

    Args:
        model: the model.
        names: of the things that are to be labelled.
    """
    tokenizer, taken = model.llm.tokenizer, " ".join(names).casefold()
    found = []
    for token in range(len(tokenizer)):
        text = str(tokenizer.decode([token]))
        word = text.strip()
        if text == f" {word}" and LABEL.fullmatch(word) and word not in taken:
            found.append(token)
    return found[:_NUM_LABELS]


@torch.inference_mode()
def _next_logits(
    model: AnyToAny, items: Sequence[Rendered], features: FeatureProvider
) -> torch.Tensor:
    """The logits behind the last position of each sequence: float32[B, V + O], on the CPU."""
    ends = [
        Rendered([*item.ids, model.llm.pad_id], [*item.labels, 0], item.inputs) for item in items
    ]  # a label to be predicted at the end, which gives the index of the state before it
    batch = collate(
        ends,
        features,
        model.batch_layout,
        pack=model.llm.supports_prefix_packing,
        share=False,
        targets=False,
    ).to(model.device)
    states = model.hidden(batch).flatten(0, 1)[batch.target_indices]
    return model.llm.head(states).float().cpu()


@torch.inference_mode()
def template_task(
    chat: object, *, num_texts: int = 12, num_lines: int = 24, seed: int = 0
) -> TemplateResult:
    """Let the model read lines like "April pig: 0", whose label is given by the kinds of their
    words, and look where each head attends from before a label.

    Args:
        chat: what `mmllm.load` gives, or a model.
        num_texts: number of texts.
        num_lines: lines of a text.
        seed: of the words.
    """
    model, draw = model_of(chat), random.Random(seed)
    encode = model.renderer.encode_text
    label_tokens = [encode(f"x: {kind}")[-1] for kind in range(len(TEMPLATES))]
    heads = all_heads(model)
    correct: list[bool] = []
    shares: dict[Head, list[float]] = {head: [] for head in heads}
    chances: list[float] = []
    for _ in range(num_texts):
        kinds = [draw.randrange(len(TEMPLATES)) for _ in range(num_lines)]
        ids, starts, asked = start_ids(model), [], []
        for kind in kinds:
            first, second = (draw.choice(words.split()) for words in TEMPLATES[kind])
            starts.append(len(ids))
            ids += encode(f"{first} {second}: {kind}")
            asked.append(len(ids) - 2)  # the position that predicts the label
            ids += encode("\n")
        row = torch.tensor([ids])
        states = model.llm(model.llm.embed(row.to(model.device)))[0, asked]
        logits = model.llm.head(states)[:, label_tokens]
        correct += (logits.argmax(-1).cpu() == torch.tensor(kinds)).tolist()
        kind_of = torch.tensor(kinds)
        lines = kind_of[:, None] == kind_of
        for line in range(1, num_lines):
            chances.append(lines[line, :line].float().mean().item())
        for layer, pattern in attention_patterns(model, row).items():
            rows = pattern[0][:, asked]  # [H, N, T]
            ends = [*starts[1:], len(ids)]
            by_line = torch.stack(
                [rows[:, :, s:e].sum(-1) for s, e in zip(starts, ends, strict=True)], dim=-1
            ).tril(-1)  # [H, N, N], earlier lines only
            for number in range(len(by_line)):
                every = by_line[number].sum().clamp(min=1e-12)
                share = by_line[number][lines].sum() / every
                shares[Head(layer, number)].append(share.item())
    return TemplateResult(correct, shares, sum(chances) / len(chances))
