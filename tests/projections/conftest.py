"""The tiny system with a connector of each kind in front of its decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import parts

SMALL = {"type": "connector", "width": 16, "heads": 2, "layers": 2, "feed_forward": 32}


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that is not the system's own."""
    return parts.write_llm(tmp_path_factory.mktemp("connector") / "llm", width=24, seed=5)


def connectors(language_model: Path, **options: Any) -> dict[str, dict]:
    """Output projections: of words and layers, of a language model, and neither."""
    return {
        "image": {**SMALL, "signal_tokens": 4, "words": 3, "llm_layers": [1, 2], **options},
        "audio": {
            **{**SMALL, "layers": 1, "signal_tokens": 3, "weights": str(language_model)},
            **{"words": 2, **options},
        },
        "video": {**SMALL, "signal_tokens": 12, **options},
    }


@pytest.fixture
def make_connected(make_model, language_model: Path):
    """`make_connected(condition_dropout=0.5)`: the tiny system, freshly built, with connectors."""

    def make(**options: Any):
        return make_model(output_projections=connectors(language_model, **options))

    return make
