"""Writes the page of a study's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mmllm.insight.features.activity import FeatureActivity
from mmllm.insight.features.cards import CardMaker, choose_features, shown_medium
from mmllm.insight.features.changes import FeatureChange
from mmllm.insight.features.effects import made_under, modalities_made
from mmllm.insight.features.page import ShownMedium, features_html
from mmllm.insight.study import DictionaryStudy
from mmllm.utils import files
from mmllm.utils.progress import progress_bar

_STRENGTH = 2.0
"""Of what is added to signal tokens, in units of the feature's largest activation there."""


def write_features(
    study: DictionaryStudy,
    page: Path,
    *,
    num: int = 32,
    features: Sequence[int] | None = None,
    with_frozen: bool = False,
    with_media: bool = True,
    changes: Sequence[FeatureChange] = (),
) -> Path:
    """Write the page: one HTML file that needs no other.

    Args:
        study: the model, its states and the dictionary.
        page: the file.
        num: number of features.
        features: which; None: those that stand for the same thing in most modalities first.
        with_frozen: whether the scores of a random decoder are on it.
        with_media: whether what the model makes under each feature is on it.
        changes: features of which it shows what the adapters changed.

    Returns:
        `page`.
    """
    activity = FeatureActivity.measure(study.dictionary, study.activations)
    chosen = list(features) if features is not None else choose_features(activity, num)
    chosen += [change.feature for change in changes if change.feature not in chosen]
    made = _made(study, activity, chosen) if with_media else {}
    maker = CardMaker(study.model, study.dictionary, activity, study.features)
    with progress_bar("features", total=len(chosen), unit="feature") as bar:
        cards = []
        for feature in chosen:
            cards.append(maker.card(feature, made.get(feature, ())))
            bar.update()
    scores = {
        name: {kind: estimate.value for kind, estimate in row.items()}
        for name, row in study.scores(with_frozen=with_frozen).items()
    }
    active = study.num_active()
    total = len(study.activations)
    intro = (
        f"{study.dictionary.width:,} features of {study.origin.name or 'a model'}, found without "
        f"labels in {total:,} states of {study.site}. About {max(active.values()):.0f} of them are "
        "active at a position. Each column shows what makes a feature most active in one modality; "
        "the bar under a medium is how strongly."
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    title = f"What {study.origin.name or 'the model'} has features for"
    html = features_html(title, cards, intro=intro, scores=scores, changes=changes)
    files.atomic_write(page, html)
    return page


def _made(
    study: DictionaryStudy, activity: FeatureActivity, features: Sequence[int]
) -> Mapping[int, Sequence[ShownMedium]]:
    """What the model makes with each feature that is active at signal tokens, after what it makes
    without: pictures, or sounds where the feature is most active at those of sounds."""
    by_modality: dict[str, dict[int, float]] = {}
    known = modalities_made(study.model)
    for feature in features:
        strongest = activity.strongest(feature, "signal", 1)
        if strongest:
            row, value = strongest[0]
            medium = activity.acts.medium(row)
            if medium is not None and medium.modality in known:
                by_modality.setdefault(medium.modality, {})[feature] = value
    made: dict[int, list[ShownMedium]] = {}
    for modality, strengths in by_modality.items():
        directions = [
            _STRENGTH * value * study.dictionary.direction(feature)
            for feature, value in strengths.items()
        ]
        width = study.dictionary.W_dec.shape[1]
        additions = torch.stack([torch.zeros(width), *directions])
        plain, *steered = made_under(study.model, study.site, additions, modality)
        for feature, medium in zip(strengths, steered, strict=True):
            made[feature] = [shown_medium(plain, "without"), shown_medium(medium, "with it")]
    return made
