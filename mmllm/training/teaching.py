"""Teach a trained model the names of one's own images, sounds or clips, in under a minute.

An input projection of `type: words` (mmllm.projections.input.WordsProjection) reads a medium as one
of K words that the language model can already say. Teaching adds words and leaves everything else
as it is: each new name is spelled with the language model's own embeddings, and the classifier
that chooses a word is trained on the new media together with those that the model was trained on
(rehearsal; Robins 1995), so that it keeps what it knew. Neither the language model nor its LoRA
changes, and nothing new can be drawn: the decoders are frozen.

Legend: M media, L encoder tokens, C encoder width, K words, N tokens of a word, D LLM width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mmllm import checkpoints
from mmllm.conversation import Medium
from mmllm.data.formats.labelled import LabelledMedia, LabelledMedium, read_labelled
from mmllm.errors import ConfigError
from mmllm.features.cache import FeatureCache
from mmllm.features.store import FeatureStore
from mmllm.model import AnyToAny
from mmllm.projections.input import WordsProjection
from mmllm.training.prealign import spell_replies

_BATCH = 32
_REHEARSED = "mini:data/pairs.jsonl.gz"
_ANSWER = "This is {}."


@dataclass(frozen=True)
class TeachingOptions:
    """How the classifier of words is trained. The values were chosen on `mini` with 20 things that
    it had never seen, so that 300 steps name them and lose nothing (docs/tutorial.md)."""

    steps: int = 300
    batch_size: int = 128
    """Batch size: half new media, half rehearsed ones."""
    learning_rate: float = 3e-4
    dropout: float = 0.2
    """Dropout of the classifier's inputs."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2 or not self.learning_rate > 0:
            raise ConfigError(
                "teaching: expected steps >= 1, batch_size >= 2 and learning_rate > 0, got "
                f"{self.steps}, {self.batch_size} and {self.learning_rate}"
            )


@dataclass(frozen=True)
class Lesson:
    """What one encoder's projection was taught."""

    encoder: str
    new: list[str]
    """Captions that got a new word."""
    known: list[str]
    """Captions that already had a word."""
    num_media: int
    accuracy: float
    """Share of the taught media that are read as their word: of training media, so no estimate for
    others."""
    kept: float | None
    """Share of the rehearsed media that are read as the same word as before; None without any."""


def teach(
    source: str | Path,
    output: str | Path,
    *,
    model: str = "mini",
    rehearse: str | Path | None = None,
    options: TeachingOptions | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> tuple[list[Lesson], LabelledMedia]:
    """Teach a model the names of the media in a folder or table, and save it as a checkpoint.

    Args:
        source: a folder or table of labelled media (mmllm.data.formats.labelled.read_labelled).
        output: where the checkpoint is written; what stands there is replaced whole.
        model: a checkpoint folder or a known name. The encoders of the media's modalities need an
            input projection of `type: words`.
        rehearse: a folder or table of media that the model already names, which it is to keep;
            `mini`, and what was trained on its data, rehearses its own training media.
        options: steps, learning rate, seed.
        cache: folder of a feature cache (mmllm.features.store), from which media are taken that an
            encoder has read before; None keeps their features in memory.
        progress: show one progress bar, where there is a terminal.

    Returns:
        One Lesson for each encoder that was taught, and the media that were read and skipped.

    Raises:
        ConfigError: no labelled media, or a projection of another type.
        CheckpointError: `model` is no checkpoint, or the disk does not take the new one.
        CacheError: `cache` cannot be written.
    """
    options = options or TeachingOptions()
    own = read_labelled(source)
    found = checkpoints.open_checkpoint(model)
    system = found.system()
    keys = {entry: _encoder_of(system, entry) for entry in _modalities(own.items)}
    joined = checkpoints.load_model(found)
    features = FeatureCache(joined, store=FeatureStore(cache) if cache else None)
    lessons = []
    with tqdm(total=0, unit="step", disable=None if progress else True, leave=False) as bar:
        for modality, key in keys.items():
            items = [item for item in own.items if item.medium.modality == modality]
            rehearsed = _rehearsed(system.name, modality, rehearse)
            teacher = _Teacher(joined, features, key, items, rehearsed, options, bar)
            lessons.append(teacher.teach())
    if features.store:
        features.store.flush()
    stage = found.run().stage if "stage" in found.config() else None
    checkpoints.save(
        Path(output),
        joined,
        step=found.step,
        stage=stage,
        resolved_settings=found.manifest["chosen"],
        with_llm=found.holds_llm,
    )
    return lessons, own


def _modalities(items: Sequence[LabelledMedium]) -> list[str]:
    return sorted({item.medium.modality for item in items})


def _encoder_of(system: Any, modality: str) -> str:
    """The key of the encoder whose projection learns words of this modality."""
    keys = [key for key, entry in system.encoders.items() if entry.modality == modality]
    if not keys:
        raise ConfigError(f"{system.name} has no encoder that reads {modality}")
    for key in keys:
        if getattr(system.input_projections[key], "words", None):
            return key
    raise ConfigError(
        f"input_projections.{keys[0]}: teaching adds words to a projection of type words, and this "
        "is another type; train it by a stage of its own on your data (docs/tutorial.md)"
    )


def _rehearsed(name: str, modality: str, source: str | Path | None) -> list[LabelledMedium]:
    """Media that the model was trained to name."""
    if source is not None:
        return [item for item in read_labelled(source).items if item.medium.modality == modality]
    if name != "mini":
        raise ConfigError(
            f"{name}: teaching needs media that the model already names, or it would forget them; "
            "name a folder or table of them with --rehearse"
        )
    return _mini_media(modality)


def _mini_media(modality: str) -> list[LabelledMedium]:
    from mmllm.data.sources import medium, read_rows, select

    rows, root = read_rows(_REHEARSED, None, "rehearsal")
    rows = select(rows, {"modality": modality, "split": "train"}, "rehearsal")
    return [
        LabelledMedium(medium(modality, row["file"], root, row["thing"]), row["label"])
        for row in (rows[index] for index in range(len(rows)))
    ]


class _Teacher:
    """One projection and its classifier of words."""

    def __init__(
        self,
        model: AnyToAny,
        cache: FeatureCache,
        key: str,
        items: list[LabelledMedium],
        rehearsed: list[LabelledMedium],
        options: TeachingOptions,
        bar: tqdm,
    ):
        projection = model.input_projections[key]
        assert isinstance(projection, WordsProjection)
        assert projection.words is not None
        self.num_words = projection.words
        self.model, self.cache, self.key, self.projection = model, cache, key, projection
        self.items, self.rehearsed, self.options, self.bar = items, rehearsed, options, bar
        batches = sum(-(-len(part) // _BATCH) for part in (items, rehearsed))
        bar.total = (bar.total or 0) + batches + options.steps

    def teach(self) -> Lesson:
        old = self._read([item.medium for item in self.rehearsed], "media it knows")
        new = self._read([item.medium for item in self.items], "your media")
        before = self._choices(old)
        words = self._words(before)
        own = torch.tensor([words[_caption(item)] for item in self.items])
        self._fit(new, own, old, before)
        chosen = self._choices(new)
        kept = (self._choices(old) == before).float().mean().item() if len(old) else None
        captions = list(dict.fromkeys(_caption(item) for item in self.items))
        return Lesson(
            encoder=self.key,
            new=[caption for caption in captions if words[caption] >= self.num_words],
            known=[caption for caption in captions if words[caption] < self.num_words],
            num_media=len(self.items),
            accuracy=(chosen == own).float().mean().item(),
            kept=kept,
        )

    @torch.no_grad()
    def _read(self, media: Sequence[Medium], what: str) -> Tensor:
        """The projection's prepared encoder tokens, averaged: float32[M, C]."""
        self.bar.set_description(f"teaching {self.key}: reading {what}")
        means = []
        for start in range(0, len(media), _BATCH):
            found = self.cache.input_media(self.key, media[start : start + _BATCH])
            features, mask = found["features"], found["feature_mask"]
            assert features is not None
            means.append(self.projection.mean_feature(features, mask).float())
            self.bar.update()
        return torch.cat(means) if means else torch.zeros(0, self.projection.feature_shape[1])

    @torch.no_grad()
    def _choices(self, means: Tensor) -> Tensor:
        """The word that each medium is read as: int[M]."""
        return self.projection.classifier(means).argmax(dim=-1)

    def _words(self, before: Tensor) -> dict[str, int]:
        """Caption -> its word. Captions without one get a new word, spelled as the LLM does."""
        owners: dict[str, list[int]] = {}
        for item, word in zip(self.rehearsed, before.tolist(), strict=True):
            owners.setdefault(_caption(item), []).append(word)
        words = {caption: max(set(found), key=found.count) for caption, found in owners.items()}
        captions = list(dict.fromkeys(_caption(item) for item in self.items))
        added = [caption for caption in captions if caption not in words]
        if added:
            spoken = [self._reply(caption) for caption in dict.fromkeys([*added, *owners])]
            spelled = spell_replies(self.model, spoken, self.projection.num_tokens)
            first = self.projection.add_words(spelled[: len(added)])
            words |= {caption: first + index for index, caption in enumerate(added)}
            config = self.model.config
            projections = dict(config.input_projections)
            projections[self.key] = replace(projections[self.key], words=self.projection.words)
            self.model.config = replace(config, input_projections=projections)
        return words

    def _reply(self, caption: str) -> tuple[int, ...]:
        tokenizer = self.model.llm.tokenizer
        return tuple(tokenizer.encode(_ANSWER.format(caption), add_special_tokens=False))

    def _fit(self, new: Tensor, targets: Tensor, old: Tensor, kept: Tensor) -> None:
        """Train the classifier on halves of new and rehearsed media: AdamW, with a rate that falls
        linearly to 0."""
        self.bar.set_description(f"teaching {self.key}")
        options = self.options
        generator = torch.Generator().manual_seed(options.seed)
        torch.manual_seed(options.seed)  # dropout
        classifier = self.projection.classifier
        weights = list(classifier.requires_grad_(True).parameters())
        optimizer = torch.optim.AdamW(
            weights, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        half = options.batch_size // 2 if len(old) else 0
        rest = options.batch_size - half
        for step in range(options.steps):
            own = torch.randint(len(new), (rest,), generator=generator)
            inputs, labels = new[own], targets[own]
            if half:
                rehearsed = torch.randint(len(old), (half,), generator=generator)
                inputs = torch.cat([inputs, old[rehearsed]])
                labels = torch.cat([labels, kept[rehearsed]])
            logits = classifier(F.dropout(inputs, options.dropout))
            loss = F.cross_entropy(logits, labels)
            optimizer.param_groups[0]["lr"] = options.learning_rate * (1 - step / options.steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            self.bar.update()
        classifier.requires_grad_(False)


def _caption(item: LabelledMedium) -> str:
    return (item.medium.caption or item.label).strip()
