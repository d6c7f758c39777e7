"""Teach a trained model the names of one's own images, sounds or clips, in about a minute.

Two types of input projections choose a name of a medium by a linear classifier: `words`
(mmllm.projections.input.WordsProjection) one of its words, `ctc` (mmllm.projections.ctc) one of its
names, or none, and then it spells a description. Teaching appends the new names, in the language
model's own embeddings, and trains the classifier, on the new media together with those that the
model was trained on (rehearsal; Robins 1995), which are to be read as they were. Everything else
stays as it is: what is in front of the classifier, whose input is computed once for each medium,
how descriptions are spelled, the language model and its LoRA. Nothing new can be drawn: the
decoders are frozen.

Legend: M media.
"""

from __future__ import annotations

import copy
import operator
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
from mmllm.projections.ctc import CTCConfig
from mmllm.projections.input import WordsConfig
from mmllm.training.learners import LEARNERS
from mmllm.training.rehearsal import rehearsed_media

_BATCH = 32


@dataclass(frozen=True)
class TeachingOptions:
    """How the classifier is trained. The values are for a projection of `type: ctc`."""

    steps: int = 300
    batch_size: int = 128
    rehearsal: float = 0.5
    """Share of a batch that is rehearsed media."""
    keep: float = 1.0
    """Weight of the loss of rehearsed media, which are to be read as they were."""
    learning_rate: float = 1e-3
    dropout: float = 0.2
    """Dropout of the classifier's inputs."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2 or not self.learning_rate > 0:
            raise ConfigError(
                "teaching: expected steps >= 1, batch_size >= 2 and learning_rate > 0, got "
                f"{self.steps}, {self.batch_size} and {self.learning_rate}"
            )
        if not 0 <= self.rehearsal <= 1 - 1 / self.batch_size:
            raise ConfigError(
                "teaching: rehearsal: expected a share of a batch that leaves one new medium, "
                f"got {self.rehearsal}"
            )


_DEFAULTS: dict[type, TeachingOptions] = {
    CTCConfig: TeachingOptions(),
    WordsConfig: TeachingOptions(learning_rate=3e-4),
}
"""Config of a projection that can be taught -> how it is taught."""


@dataclass(frozen=True)
class Lesson:
    """What one encoder's projection was taught."""

    encoder: str
    new: list[str]
    """Captions that the projection did not have."""
    known: list[str]
    """Captions that had a word, or were a name, before."""
    num_media: int
    accuracy: float
    """Share of the taught media that are read as their word or name: of training media, so no
    estimate for others."""
    kept: float | None
    """Share of the rehearsed media that are read as the same word or name as before, or spelled as
    before; None without any. Those of a caption that is new are not rehearsed."""


def teach(
    source: str | Path | LabelledMedia,
    output: str | Path,
    *,
    model: str = "mini",
    rehearse: str | Path | LabelledMedia | None = None,
    options: TeachingOptions | None = None,
    steps: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> tuple[list[Lesson], LabelledMedia]:
    """Teach a model the names of labelled media, and save it as a checkpoint.

    Args:
        source: the media, or a folder or table of them (read_labelled of
            mmllm.data.formats.labelled).
        output: where the checkpoint is written; what stands there is replaced whole.
        model: a checkpoint folder or a known name. The encoders of the media's modalities need an
            input projection of `type: ctc` or `type: words`.
        rehearse: media that the model already names and is to keep, or a folder or table of them;
            `mini`, and what was trained on its data, rehearses its own training media.
        options: how the classifier is trained; None: as the type of its projection asks for, with
            `steps` and `seed`.
        steps: how many, if not as many as the type of the projection asks for.
        seed: of the order and of dropout.
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
    own = source if isinstance(source, LabelledMedia) else read_labelled(source)
    found = checkpoints.open_checkpoint(model)
    system = found.system()
    keys = {entry: _encoder_of(system, entry) for entry in _modalities(own.items)}
    joined = checkpoints.load_model(found)
    features = FeatureCache(joined, store=FeatureStore(cache) if cache else None)
    lessons = []
    with tqdm(total=0, unit="step", disable=None if progress else True, leave=False) as bar:
        for modality, key in keys.items():
            items = [item for item in own.items if item.medium.modality == modality]
            spells = isinstance(system.input_projections[key], CTCConfig)
            rehearsed = rehearsed_media(system.name, modality, rehearse, with_scenes=spells)
            chosen = options
            if chosen is None:
                default = _DEFAULTS[type(system.input_projections[key])]
                chosen = replace(default, steps=steps or default.steps, seed=seed)
            teacher = _Teacher(joined, features, key, items, rehearsed, chosen, bar)
            lessons.append(teacher.teach())
    if features.store:
        features.store.flush()
    checkpoints.save(
        Path(output),
        joined,
        step=found.step,
        stage=found.stage(),
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
        if type(system.input_projections[key]) in LEARNERS:
            return key
    raise ConfigError(
        f"input_projections.{keys[0]}: teaching adds to the vocabulary of a projection of type ctc "
        "or words, and this is another type; train it by a stage of its own on your data "
        "(docs/tutorial.md)"
    )


class _Teacher:
    """One projection, its media and those that it rehearses."""

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
        self.learner = LEARNERS[type(model.config.input_projections[key])](model, key)
        self.cache, self.key, self.items, self.rehearsed = cache, key, items, rehearsed
        self.options, self.bar = options, bar
        batches = sum(-(-len(part) // _BATCH) for part in (items, rehearsed))
        bar.total = (bar.total or 0) + batches + options.steps

    def teach(self) -> Lesson:
        old = self._inputs([item.medium for item in self.rehearsed], "media it knows")
        own = self._inputs([item.medium for item in self.items], "your media")
        before = self._read(old)
        by_caption: dict[str, list[Any]] = {}
        for item, reading in zip(self.rehearsed, before, strict=True):
            by_caption.setdefault(_caption(item), []).append(reading)
        captions = list(dict.fromkeys(_caption(item) for item in self.items))
        classifier = copy.deepcopy(self.learner.classifier)
        readings, new = self.learner.add(captions, by_caption)
        same = [i for i, item in enumerate(self.rehearsed) if _caption(item) not in new]
        old, before = old[same], [before[i] for i in same]
        wanted = [readings[_caption(item)] for item in self.items]
        self._fit(own, wanted, old, classifier)
        return Lesson(
            encoder=self.key,
            new=new,
            known=[caption for caption in captions if caption not in new],
            num_media=len(self.items),
            accuracy=_share_equal(self._read(own), wanted),
            kept=_share_equal(self._read(old), before) if before else None,
        )

    @torch.no_grad()
    def _inputs(self, media: Sequence[Medium], what: str) -> Tensor:
        """The classifier's input of media: float32[M, ...]."""
        self.bar.set_description(f"teaching {self.key}: reading {what}")
        found = []
        for start in range(0, len(media), _BATCH):
            tensors = self.cache.input_media(self.key, media[start : start + _BATCH])
            assert tensors["features"] is not None
            found.append(self.learner.inputs(tensors["features"], tensors["feature_mask"]))
            self.bar.update()
        return torch.cat(found) if found else torch.zeros(0)

    @torch.no_grad()
    def _read(self, inputs: Tensor) -> list[Any]:
        """What each medium is read as now."""
        return [reading for part in inputs.split(_BATCH) for reading in self.learner.read(part)]

    def _fit(self, own: Tensor, wanted: list[Any], old: Tensor, before: nn.Linear) -> None:
        """Train the classifier to read new media as wanted and to score rehearsed media as it did
        `before`: AdamW, with a rate that falls linearly to 0."""
        self.bar.set_description(f"teaching {self.key}")
        options = self.options
        generator = torch.Generator().manual_seed(options.seed)
        torch.manual_seed(options.seed)  # dropout
        classifier = self.learner.classifier
        weights = list(classifier.requires_grad_(True).parameters())
        optimizer = torch.optim.AdamW(
            weights, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        num_old = int(options.batch_size * options.rehearsal) if len(old) else 0
        num_own = options.batch_size - num_old
        for step in range(options.steps):
            chosen = torch.randint(len(own), (num_own,), generator=generator)
            inputs = own[chosen]
            if num_old:
                rehearsed = old[torch.randint(len(old), (num_old,), generator=generator)]
                inputs = torch.cat([inputs, rehearsed])
            logits = classifier(F.dropout(inputs, options.dropout))
            loss = self.learner.loss(logits[:num_own], [wanted[i] for i in chosen.tolist()])
            if num_old:
                with torch.no_grad():
                    scores = before(rehearsed)
                kept = self.learner.rehearsal_loss(logits[num_own:], scores)
                loss = loss + options.keep * kept
            optimizer.param_groups[0]["lr"] = options.learning_rate * (1 - step / options.steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            self.bar.update()
        classifier.requires_grad_(False)


def _caption(item: LabelledMedium) -> str:
    return (item.medium.caption or item.label).strip()


def _share_equal(read: Sequence[object], wanted: Sequence[object]) -> float:
    return sum(map(operator.eq, read, wanted)) / len(wanted)
