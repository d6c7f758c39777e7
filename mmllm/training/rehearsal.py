"""Media that a model names already, which it rehearses while it is taught others."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mmllm import config as configs
from mmllm.data.formats.labelled import LabelledMedium, read_labelled
from mmllm.data.sources import medium, read_rows, select
from mmllm.errors import ConfigError

_PAIRS = "mini:data/pairs.jsonl.gz"
_KINDS = {"image": "describe", "audio": "hear", "video": "watch"}
_SCENES = {"image": 400, "audio": 300, "video": 100}
_DESCRIPTION = re.compile(r"I (?:see|hear) (.*)\.")


def rehearsed_media(
    name: str, modality: str, source: str | Path | None, *, scenes: bool = True
) -> list[LabelledMedium]:
    """Read the media that a model is to keep.

    Args:
        name: the model's; `mini` has media of its own.
        modality: of the media.
        source: a folder or table of labelled media; None: the model's own.
        scenes: whether several things at once are among its own media.

    Raises:
        ConfigError: the model has none of its own, and none are named.
    """
    if source is not None:
        return [item for item in read_labelled(source).items if item.medium.modality == modality]
    if name != "mini":
        raise ConfigError(
            f"{name}: teaching needs media that the model already names, or it would forget them; "
            "name a folder or table of them with --rehearse"
        )
    return _single_things(modality) + (_scenes(modality) if scenes else [])


def _single_things(modality: str) -> list[LabelledMedium]:
    """The media of one thing that mini was trained on."""
    rows, root = read_rows(_PAIRS, None, "rehearsal")
    rows = select(rows, {"modality": modality, "split": "train"}, "rehearsal")
    return [
        LabelledMedium(medium(modality, row["file"], root, row["thing"]), row["label"])
        for row in (rows[index] for index in range(len(rows)))
    ]


def _scenes(modality: str) -> list[LabelledMedium]:
    """Scenes, soundscapes or clips that mini was trained on, with their descriptions."""
    tree = {"type": "scenes", "count": _SCENES[modality], "kinds": [_KINDS[modality]]}
    dataset = configs.build(configs.parse_component("data", tree, "rehearsal"), where="rehearsal")
    found = []
    for index in range(len(dataset)):
        question, answer = dataset.conversation(index, np.random.default_rng(0))
        described = _DESCRIPTION.fullmatch(answer.text)
        assert described is not None
        found.append(LabelledMedium(question.media[0], described[1]))
    return found
