"""From a model and its data to a dictionary and what it is worth: collect, train, score, show.

Everything is kept in a folder, so that a second run goes on from where the first one was ended:

    FOLDER/cache/         states, in the format of the feature cache
    FOLDER/dictionary-…/  dictionaries, in the format of SAELens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmllm import mini
from mmllm.conversation import Message
from mmllm.data.checked_source import CheckedDataSource, render
from mmllm.data.formats.dialogues import Dialogues, DialoguesConfig
from mmllm.data.rendering import Rendered
from mmllm.data.sources import read_text
from mmllm.errors import ConfigError, MediaError
from mmllm.features.cache import FeatureCache
from mmllm.insight.activations import BALANCE, Activations
from mmllm.insight.collecting import collect
from mmllm.insight.concepts import ConceptVocabulary, mini_vocabulary
from mmllm.insight.dictionary import metrics
from mmllm.insight.dictionary.autoencoder import Origin, SparseAutoencoder
from mmllm.insight.dictionary.calibration import calibrate
from mmllm.insight.dictionary.storage import CONFIG, load_dictionary, save_dictionary
from mmllm.insight.dictionary.training import DictionaryConfig, train_dictionary
from mmllm.insight.steering import late_site
from mmllm.model import AnyToAny
from mmllm.utils import files
from mmllm.utils.hashing import fingerprint

_WINDOW = 160
"""Tokens of a window of plain text."""
_PCA_STATES = 16_384


@dataclass(frozen=True)
class StudyData:
    """What a model is run over.

    Attributes:
        conversations: rendered conversations and windows of plain text.
        vocabulary: names of concepts, if they are known.
        skipped: rows that cannot be used.
    """

    conversations: Sequence[Rendered]
    vocabulary: ConceptVocabulary | None = None
    skipped: int = 0


def read_dialogues(
    model: AnyToAny,
    file: str,
    *,
    limit: int | None = None,
    texts: Sequence[str] = (),
    vocabulary: ConceptVocabulary | None = None,
) -> StudyData:
    """Read conversations evenly spaced in a file of dialogues, and windows of plain text.

    Args:
        model: renders them.
        file: JSON or JSONL, as mmllm.data.formats.dialogues reads it.
        limit: conversations at most.
        texts: plain texts, cut into windows.
        vocabulary: names of concepts.

    Raises:
        ConfigError: the file cannot be read, or has no row that can be used.
    """
    source = CheckedDataSource(Dialogues(DialoguesConfig(file=file, either_order=True), file))
    step = max(1, -(-len(source) // limit)) if limit else 1
    conversations, skipped = [], 0
    for index in range(0, len(source), step):
        try:
            messages: Sequence[Message] = source.conversation(
                index, np.random.default_rng([index, 0])
            )
            conversations.append(render(model.renderer, messages, model.llm.max_length))
        except MediaError:
            skipped += 1
    if not conversations:
        raise ConfigError(
            f"{file}: none of {skipped} rows can be used with this model; `mmllm data check` says "
            "why"
        )
    for text in texts:
        ids = model.renderer.encode_text(text)
        for start in range(0, len(ids) - _WINDOW + 1, _WINDOW):
            window = ids[start : start + _WINDOW]
            conversations.append(Rendered(ids=window, labels=list(window)))
    return StudyData(conversations, vocabulary, skipped)


def read_data(model: AnyToAny, file: str, *, limit: int | None = None) -> StudyData:
    """Read a file of dialogues; of mini's, with its texts and the names of its concepts.

    Args:
        model: renders them.
        file: as `read_dialogues` takes it.
        limit: conversations at most.

    Raises:
        ConfigError: the file cannot be read, or has no row that can be used.
    """
    if not file.startswith("mini:"):
        return read_dialogues(model, file, limit=limit)
    folder = mini.locate("data") / "text"
    texts = [read_text(path) for path in sorted(folder.glob("*.txt"))]
    if limit:
        texts = [text[: _WINDOW * limit // 8] for text in texts]
    return read_dialogues(model, file, limit=limit, texts=texts, vocabulary=mini_vocabulary())


class DictionaryStudy:
    """States of one site of a model, a dictionary of them, and its scores.

    Args:
        model: the model.
        model_fingerprint: its fingerprint (`Chat.fingerprint`).
        data: what it is run over.
        folder: where states and dictionaries are kept.
        site: name of the site; None: `late_site`.
        config: how dictionaries are trained.
        balance: share of each kind of position in a batch.
        name: of the model, for people.
    """

    def __init__(
        self,
        model: AnyToAny,
        model_fingerprint: str,
        data: StudyData,
        folder: Path,
        *,
        site: str | None = None,
        config: DictionaryConfig = DictionaryConfig(),  # noqa: B008 - frozen
        balance: Mapping[str, float] = BALANCE,
        name: str = "",
    ):
        self.model, self.data, self.folder = model, data, folder
        self.site = site or late_site(model)
        self.origin = Origin(model_fingerprint, self.site, self.site, name)
        self.config, self.balance = config, balance
        self.features = FeatureCache(model)

    @cached_property
    def activations(self) -> Activations:
        """States of all conversations."""
        return self._collect(self.origin.model)

    @cached_property
    def base_activations(self) -> Activations:
        """The same states without the adapters.

        Raises:
            ConfigError: the model has none.
        """
        if not self.model.llm.has_lora:
            raise ConfigError(
                f"{self.origin.name or 'this model'} has no adapters, so that it is its own base; "
                "compare a model that was trained with LoRA (`llm.lora`)"
            )
        with self.model.llm.adapters_disabled():
            return self._collect(f"{self.origin.model} without adapters")

    def _collect(self, model_fingerprint: str) -> Activations:
        return collect(
            self.model,
            self.data.conversations,
            [self.site],
            model_fingerprint=model_fingerprint,
            folder=self.folder / "cache",
            vocabulary=self.data.vocabulary,
        )[self.site]

    @cached_property
    def parts(self) -> tuple[Activations, Activations]:
        """Training and held-out states."""
        return self.activations.split()

    @cached_property
    def dictionary(self) -> SparseAutoencoder:
        """The dictionary, trained unless it is in the folder."""
        return self.train(self.config)

    @cached_property
    def frozen(self) -> SparseAutoencoder:
        """The same with a random decoder that does not train: a baseline."""
        return self.train(replace(self.config, decoder="frozen"))

    def train(self, config: DictionaryConfig) -> SparseAutoencoder:
        """Train a dictionary on the training states and calibrate its thresholds on held-out ones,
        or read the one that was trained before.

        Args:
            config: how it is trained.
        """
        train, held_out = self.parts
        about = {"config": asdict(config), "positions": train.counts(), "balance": self.balance}
        name = fingerprint([about, asdict(self.origin)])
        folder = self.folder / f"dictionary-{name}"
        if (folder / CONFIG).is_file():
            dictionary = load_dictionary(folder)
            dictionary.check_origin(self.origin.model, self.site)
            return dictionary
        sample, unseen = (
            part.sampler(config.batch_size, balance=self.balance, seed=config.seed)
            for part in (train, held_out if len(held_out) else train)
        )
        training = self.folder / f"training-{name}"
        dictionary = train_dictionary(config, sample, self.origin, held_out=unseen, folder=training)
        files.remove(training)
        save_dictionary(dictionary, folder, about)
        return dictionary

    @cached_property
    def baselines(self) -> dict[str, metrics.Reconstruct]:
        """Reconstructions with as many numbers a position: k components, k axes."""
        k = self.config.k
        return {
            f"PCA-{k}": metrics.PrincipalComponents(self._sample, k),
            f"{k} plain axes": metrics.PlainAxes(self._sample, k),
        }

    @cached_property
    def _sample(self) -> Tensor:
        """Training states of all kinds, in the shares of training."""
        return self.parts[0].sampler(_PCA_STATES, balance=self.balance)(0)[0]

    def reconstructions(self, *, with_frozen: bool) -> dict[str, metrics.Reconstruct]:
        """The dictionary and its baselines by name.

        Args:
            with_frozen: whether a dictionary with a random decoder, which has to be trained, is
                among them.
        """
        frozen = {"random decoder": self.frozen} if with_frozen else {}
        return {"dictionary": self.dictionary, **self.baselines, **frozen}

    def scores(self, *, with_frozen: bool = False) -> dict[str, dict[str, metrics.Estimate]]:
        """Variance explained by method and kind of position, of all methods with k numbers at a
        position; see `reconstructions`."""
        return {
            name: self.variance_explained(reconstruct, by_kind=True)
            for name, reconstruct in self.reconstructions(with_frozen=with_frozen).items()
        }

    def summary(self, *, with_frozen: bool = False) -> str:
        """The scores as aligned lines of text; see `reconstructions`."""
        scores = self.scores(with_frozen=with_frozen)
        scores["one threshold"] = self.variance_explained(self.dictionary)
        kinds = list(scores["dictionary"])
        lines = [f"{'variance explained':20}" + "".join(f"{kind:>9}" for kind in kinds)]
        for name, row in scores.items():
            lines.append(f"{name:20}" + "".join(f"{row[kind].value:9.3f}" for kind in kinds))
        active = self.num_active()
        lines.append(f"{'active features':20}" + "".join(f"{active[kind]:9.1f}" for kind in kinds))
        return "\n".join([*lines, f"{'dead features':20}{self.dead_share():9.1%}"])

    def variance_explained(
        self, reconstruct: metrics.Reconstruct, *, by_kind: bool = False
    ) -> dict[str, metrics.Estimate]:
        """Of the held-out states of each kind.

        Args:
            reconstruct: the dictionary, or a baseline.
            by_kind: whether a dictionary has the thresholds at which k features are active at
                positions of the kind, rather than its own.
        """
        found = {}
        for kind, acts in self._held_out.items():
            method = self._calibrated(reconstruct, kind) if by_kind else reconstruct
            found[kind] = metrics.variance_explained(method, acts)
        return found

    def num_active(self, *, by_kind: bool = False) -> dict[str, float]:
        """L0: features of the dictionary that are active at a held-out position of each kind.

        Args:
            by_kind: as for `variance_explained`.
        """
        found = {}
        for kind, acts in self._held_out.items():
            dictionary = self._calibrated(self.dictionary, kind) if by_kind else self.dictionary
            found[kind] = float(metrics.density(dictionary, acts.states).sum())
        return found

    @cached_property
    def _held_out(self) -> dict[str, Activations]:
        """Kind -> its held-out positions, without massive states."""
        held_out = self.parts[1]
        kinds = {kind: held_out.of_kind(kind) & ~held_out.is_massive for kind in held_out.counts()}
        return {kind: held_out.select(where) for kind, where in kinds.items() if where.any()}

    def _calibrated(self, reconstruct: Any, kind: str) -> Any:
        """A dictionary with k active features at positions of a kind; anything else as it is."""
        if not isinstance(reconstruct, SparseAutoencoder):
            return reconstruct
        return calibrate(reconstruct, self._held_out[kind].states, self.config.k)

    def dead_share(self) -> float:
        """Share of features that are active at no position, of training or held out."""
        return float(
            (metrics.density(self.dictionary, self.activations.states) == 0).float().mean()
        )

    def loss_recovered(
        self, num: int, reconstructions: Mapping[str, metrics.Reconstruct]
    ) -> dict[str, metrics.Estimate]:
        """Loss recovered on held-out conversations, against the mean state.

        Args:
            num: conversations at most.
            reconstructions: by name.
        """
        held_out = self.parts[1]
        numbers = held_out.items.unique().tolist()
        conversations = [self.data.conversations[number] for number in numbers][:num]
        max_norm = self.activations.max_norm
        mean = self._sample.float().mean(dim=0)

        def measure(reconstruct: metrics.Reconstruct | None) -> metrics.SplicedLosses:
            return metrics.losses(
                self.model,
                conversations,
                self.features,
                self.site,
                reconstruct,
                max_norm=max_norm,
            )

        clean, ablated = measure(None), measure(lambda states: mean.expand(len(states), -1))
        return {
            name: metrics.loss_recovered(clean, measure(reconstruct), ablated)
            for name, reconstruct in reconstructions.items()
        }
