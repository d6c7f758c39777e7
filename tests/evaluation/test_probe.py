"""The linear probe: what it reads, and what it separates."""

import numpy as np

from mmllm.evaluation.probe import encode_tokens, fit_classifier
from mmllm.model import AnyToAny
from tests.evaluation.scripted import CONCEPTS, medium


def test_probe_reads_what_the_projections_read(tiny_model: AnyToAny) -> None:
    media = [medium("image", concept) for concept in CONCEPTS]
    encoder = tiny_model.encoders["image"]
    expected = encoder.encode(media).tokens.numpy()
    np.testing.assert_allclose(encode_tokens(tiny_model, "image", media), expected, rtol=1e-6)


def test_probe_separates_what_is_linearly_separable() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 8))
    concepts = [c for c in ("a", "b", "c") for _ in range(20)]
    features = np.repeat(centres, 20, axis=0) + 0.1 * rng.normal(size=(60, 8))
    assert list(fit_classifier(features, concepts).predict(centres)) == ["a", "b", "c"]
