"""A linear probe on the frozen encoder's features: the reference for understanding.

Standardised features and multinomial logistic regression (scikit-learn), fitted on the items that
stage 1 trains on, with the features that the model's projections are given.

Legend: M media, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm import mini
from mmllm.conversation import Medium
from mmllm.data.sources import read_rows
from mmllm.evaluation.judges import open_item
from mmllm.features.cache import FeatureCache
from mmllm.model import AnyToAny
from mmllm.utils.extras import import_extra

_BATCH = 32


def probe(
    model: AnyToAny,
    modality: str,
    tests: Sequence[tuple[str, Medium]],
    *,
    data: Path | None = None,
) -> list[str]:
    """The concepts that a linear probe predicts for held-out media.

    Two probes are fitted, on the mean over the tokens and on the concatenated tokens; the better
    one is used, so that an overfitted probe does not lower the reference.

    Args:
        model: whose encoder of the modality is probed.
        modality: image or audio.
        tests: (concept, medium) pairs.
        data: folder of mini's data.
    """
    data = data or mini.locate("data")
    rows, _ = read_rows(str(data / "pairs.jsonl.gz"), None, "evaluation")
    trained = {
        row["file"]: row for row in rows if row["modality"] == modality and row["split"] == "train"
    }
    concepts = [row["concept"] for row in trained.values()]
    train_tokens = encode_tokens(
        model, modality, [open_item(data, row) for row in trained.values()]
    )
    test_tokens = encode_tokens(model, modality, [medium for _, medium in tests])
    expected = np.array([concept for concept, _ in tests])
    predictions = [
        fit_classifier(pool(train_tokens), concepts).predict(pool(test_tokens))
        for pool in (_mean, _concatenated)
    ]
    return list(max(predictions, key=lambda predicted: (predicted == expected).mean()))


def _mean(tokens: np.ndarray) -> np.ndarray:
    return tokens.mean(axis=1)


def _concatenated(tokens: np.ndarray) -> np.ndarray:
    return tokens.reshape(len(tokens), -1)


def encode_tokens(model: AnyToAny, modality: str, media: Sequence[Medium]) -> np.ndarray:
    """Encode media with the model's encoder, in batches.

    Args:
        model: the model.
        modality: image, audio or video.
        media: M media of that modality.

    Returns:
        float[M, L, C], the encoder's tokens.
    """
    key, _ = model.renderer.input_keys[modality]
    work = FeatureCache(model)
    rows = []
    for start in range(0, len(media), _BATCH):
        features = work.input_media(key, media[start : start + _BATCH])["features"]
        assert features is not None
        rows.append(features.float().numpy())
    return np.concatenate(rows)


def fit_classifier(features: np.ndarray, concepts: Sequence[str]) -> Any:
    """Fit a linear probe: standardisation, then logistic regression.

    Args:
        features: float[M, D].
        concepts: the class of each row.

    Returns:
        The fitted pipeline of scikit-learn.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    linear_model, pipeline, preprocessing = (
        import_extra(f"sklearn.{name}", extra="evaluation", needed_by="linear probes")
        for name in ("linear_model", "pipeline", "preprocessing")
    )
    classifier = pipeline.make_pipeline(
        preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=100, tol=1e-3)
    )
    return classifier.fit(features, list(concepts))
