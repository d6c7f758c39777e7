"""Rows `insight/sae` and `insight/concepts`: what a sparse autoencoder of mini's states is worth.

States and dictionaries are kept in the cache of mini's assets, so that a second measurement, or one
that was interrupted, does not compute them again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.evaluation.concept_exemplars import Shown, read_exemplars
from mmllm.evaluation.metrics import Metric, with_threshold
from mmllm.insight.collecting import groups_of, states_of
from mmllm.insight.dictionary.autoencoder import random_directions
from mmllm.insight.dictionary.metrics import Estimate
from mmllm.insight.dictionary.synthetic import RECOVERED, KnownFeatures
from mmllm.insight.dictionary.training import DictionaryConfig, train_dictionary
from mmllm.insight.features.concept_units import bootstrap_mean, concept_units
from mmllm.insight.study import DictionaryStudy, read_data
from mmllm.mini.assets import cache_folder

CONVERSATIONS = 4000
CONFIG = DictionaryConfig()
TRUTH = KnownFeatures.draw(512, 64, active=4.0)
SYNTHETIC = DictionaryConfig(width=512, k=4, steps=1000, batch_size=512)
MIN_TEXT, MIN_MEDIA, MIN_LEAD, MIN_RECOVERED = 0.80, 0.65, 0.15, 0.90
MIN_WORST_AUROC = 0.93
MODALITIES = ("image", "audio", "text")
"""In which one feature has to stand for a thing: seen, audible, written."""

OnProgress = Callable[[int], object]


def measure_dictionary(
    chat: Any, data: Path, num: int, on_progress: OnProgress
) -> Iterator[Metric]:
    """Variance explained of held-out states by kind, next to principal components, plain axes and a
    random decoder, all with k numbers a position: dictionaries have the thresholds at which k
    features are active at the kind. Next to that, with one threshold for all kinds; dead features;
    loss recovered; features of a synthetic set.

    Args:
        chat: the model.
        data: folder of mini's data.
        num: held-out conversations of which the loss is measured.
        on_progress: takes the number of items done.
    """
    start = time.perf_counter()
    study = open_study(chat)
    scores = study.scores(with_frozen=True)
    own = scores.pop("dictionary")
    for kind, estimate in own.items():
        metric = _metric(f"insight/sae, variance explained of {kind}", estimate, start)
        yield with_threshold(metric, MIN_TEXT if kind == "text" else MIN_MEDIA)
    for name, row in scores.items():
        for kind, estimate in row.items():
            yield _metric(f"insight/sae/{name}, variance explained of {kind}", estimate, start)
    lead = min(
        estimate.value - max(row[kind].value for row in scores.values())
        for kind, estimate in own.items()
    )
    n = sum(estimate.n for estimate in own.values())
    yield with_threshold(Metric("insight/sae, least lead over baselines", n, lead), MIN_LEAD)
    sizes = study.parts[1].counts()
    for kind, count in study.num_active(by_kind=True).items():
        metric = Metric(f"insight/sae, active features of {kind}", sizes[kind], count)
        limit = study.config.k
        yield replace(metric, threshold=f"<= {limit}", met=count <= limit)
    for kind, estimate in study.variance_explained(study.dictionary).items():
        yield _metric(f"insight/sae/one threshold, variance explained of {kind}", estimate, start)
    for kind, count in study.num_active().items():
        yield Metric(f"insight/sae/one threshold, active features of {kind}", sizes[kind], count)
    yield Metric("insight/sae, share of dead features", study.dictionary.width, study.dead_share())
    reconstructions = study.reconstructions(with_frozen=True)
    for name, estimate in study.loss_recovered(num, reconstructions).items():
        label = "insight/sae" if name == "dictionary" else f"insight/sae/{name}"
        metric = _metric(f"{label}, loss recovered", estimate, start)
        yield with_threshold(metric, MIN_RECOVERED) if name == "dictionary" else metric
    yield from measure_known_features(TRUTH, SYNTHETIC)
    on_progress(num)


def measure_concepts(chat: Any, data: Path, num: int, on_progress: OnProgress) -> Iterator[Metric]:
    """One unit for the picture, the sound and the word of a thing: the area under the ROC curve at
    the modality at which it is worst, on held-out styles, takes and sentences. Next to features:
    the axes of the residual stream, a random decoder, and directions that are fitted to labels,
    which show the most that can be expected.

    Args:
        chat: the model.
        data: folder of mini's data.
        num: things at most.
        on_progress: takes the number of items done.
    """
    start = time.perf_counter()
    study = open_study(chat)
    shown = read_exemplars(chat.model, data, num)
    states = exemplar_states(study, shown)
    exemplars = [each.exemplar for each in shown]
    units: dict[str, Callable[[Tensor], Tensor]] = {
        "": study.dictionary.encode,
        "/plain axes": lambda x: torch.cat([x, -x], dim=-1),
        "/random decoder": study.frozen.encode,
        "/fitted directions": _fitted_directions(states, shown),
    }
    worst: dict[str, list[float]] = {}
    for name, encode in units.items():
        values = torch.stack([encode(each).max(dim=0).values for each in states])
        found = concept_units(values, exemplars, MODALITIES)
        for modality in MODALITIES:
            estimate = bootstrap_mean([each.auroc[modality] for each in found])
            yield Metric(f"insight/concepts{name}, AUROC of {modality}", len(found), *estimate)
        worst[name] = [each.worst for each in found]
        estimate = bootstrap_mean(worst[name])
        metric = Metric(f"insight/concepts{name}, worst of three AUROC", len(found), *estimate)
        metric = replace(metric, seconds=round(time.perf_counter() - start, 2))
        yield metric if name else with_threshold(metric, MIN_WORST_AUROC)
    pairs = zip(worst[""], worst["/plain axes"], strict=True)
    mean, low, high = bootstrap_mean([own - axis for own, axis in pairs])
    metric = Metric("insight/concepts, lead over plain axes", len(worst[""]), mean, low, high)
    yield replace(metric, threshold="interval above 0", met=low > 0)
    on_progress(num)


def open_study(
    chat: Any, *, conversations: int = CONVERSATIONS, config: DictionaryConfig = CONFIG
) -> DictionaryStudy:
    """The study of a model on mini's dialogues and texts.

    Args:
        chat: the model.
        conversations: at most.
        config: of the dictionary.
    """
    data = read_data(chat.model, "mini:data/dialogues.jsonl.gz", limit=conversations)
    return DictionaryStudy(
        chat.model,
        chat.fingerprint,
        data,
        cache_folder() / "insight",
        config=config,
        name=chat.model.config.name,
    )


def exemplar_states(study: DictionaryStudy, shown: Sequence[Shown]) -> list[Tensor]:
    """The states at the positions of each exemplar: float32[_, D].

    Args:
        study: the model and the site.
        shown: the exemplars.
    """
    states: list[Tensor] = [torch.empty(0)] * len(shown)
    order = sorted(range(len(shown)), key=lambda index: len(shown[index].conversation))
    for group in groups_of(order, [len(each.conversation) for each in shown]):
        conversations = [shown[index].conversation for index in group]
        found = states_of(study.model, conversations, study.features, [study.site])[study.site]
        for index, own in zip(group, found, strict=True):
            states[index] = own[list(shown[index].positions)].float()
    return states


def _fitted_directions(
    states: Sequence[Tensor], shown: Sequence[Shown]
) -> Callable[[Tensor], Tensor]:
    """One direction a concept: the mean of its training exemplars less that of the others, over
    coordinates of equal variance, summed over modalities."""
    means = torch.stack([each.mean(dim=0) for each in states])
    scale = means.std(dim=0).clamp(min=1e-6)
    means = means / scale
    concepts = sorted({each.exemplar.concept for each in shown})
    directions = torch.zeros(len(concepts), means.shape[1])
    for modality in MODALITIES:
        rows = [
            index
            for index, each in enumerate(shown)
            if each.exemplar.modality == modality and not each.exemplar.held_out
        ]
        labels = torch.tensor([concepts.index(shown[row].exemplar.concept) for row in rows])
        centred = means[rows] - means[rows].mean(dim=0)
        for number in labels.unique().tolist():
            directions[number] += centred[labels == number].mean(dim=0)
    return lambda x: x / scale @ directions.t()


def measure_known_features(truth: KnownFeatures, config: DictionaryConfig) -> Iterator[Metric]:
    """Share of a synthetic set's features that a dictionary finds, and that random directions do;
    and the variance that it explains meanwhile.

    Args:
        truth: the features.
        config: of the dictionary.
    """
    dictionary = train_dictionary(config, truth.sample(config.batch_size), truth.origin)
    count, width = truth.directions.shape
    chance = random_directions(config.width, width, torch.Generator().manual_seed(1))
    for name, decoder in (("", dictionary.W_dec), ("/random decoder", chance)):
        found = (truth.recovered(decoder) > RECOVERED).float().mean().item()
        yield Metric(f"insight/sae{name}, known features found", count, found)
    states = truth.states(4096, seed=10**6)
    error = (states - dictionary(states)).square().sum()
    explained = 1 - (error / (states - states.mean(dim=0)).square().sum()).item()
    yield Metric("insight/sae, variance explained of known features", len(states), explained)


def _metric(name: str, estimate: Estimate, start: float) -> Metric:
    seconds = round(time.perf_counter() - start, 2)
    return Metric(name, estimate.n, estimate.value, estimate.low, estimate.high, seconds=seconds)
