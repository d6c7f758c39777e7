"""A linear probe: what the frozen features alone can tell, the yardstick of understanding.

Standardised features, multinomial logistic regression (scikit-learn), trained on the very items
that stage 1 trains on, with the very features that the model's projections read.

Legend: M media, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmllm import mini
from mmllm.conversation import Medium
from mmllm.data.frozen import FeatureCache
from mmllm.data.sources import read_rows
from mmllm.evaluation.judges import open_item
from mmllm.model import AnyToAny

_BATCH = 32


def probe(
    model: AnyToAny,
    modality: str,
    tests: Sequence[tuple[str, Medium]],
    *,
    data: Path | None = None,
) -> list[str]:
    """The concepts that a linear probe names for (concept, medium) pairs it has not seen.

    Two probes are fitted, on the mean over the tokens and on the tokens side by side; the better
    one is the yardstick, so that a probe that overfits makes nothing easier.
    """
    data = data or mini.locate("data")
    rows, _ = read_rows(str(data / "pairs.jsonl.gz"), None, "evaluation")
    trained = {
        row["file"]: row for row in rows if row["modality"] == modality and row["split"] == "train"
    }
    concepts = [row["concept"] for row in trained.values()]
    known = encoded(model, modality, [open_item(data, row) for row in trained.values()])
    asked = encoded(model, modality, [medium for _, medium in tests])
    wanted = np.array([concept for concept, _ in tests])
    answers = [fit(pool(known), concepts).predict(pool(asked)) for pool in (_mean, _side_by_side)]
    return list(max(answers, key=lambda named: (named == wanted).mean()))


def _mean(tokens: np.ndarray) -> np.ndarray:
    return tokens.mean(axis=1)


def _side_by_side(tokens: np.ndarray) -> np.ndarray:
    return tokens.reshape(len(tokens), -1)


def encoded(model: AnyToAny, modality: str, media: Sequence[Medium]) -> np.ndarray:
    """float[M, L, C]: the tokens that the encoder of this modality gives."""
    key, _ = model.renderer.input_keys[modality]
    work = FeatureCache(model)
    rows = []
    for start in range(0, len(media), _BATCH):
        features = work.input_media(key, media[start : start + _BATCH])["features"]
        assert features is not None
        rows.append(features.float().numpy())
    return np.concatenate(rows)


def fit(features: np.ndarray, concepts: Sequence[str]) -> Any:
    """A scikit-learn classifier: standardisation, then logistic regression with its defaults."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100, tol=1e-3))
    return classifier.fit(features, list(concepts))
