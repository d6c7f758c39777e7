"""Media that a model names already, which it rehearses while it is taught others."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mmllm import config as configs
from mmllm.data.formats.labelled import LabelledMedia, LabelledMedium, read_labelled
from mmllm.data.sources import medium, read_rows, select
from mmllm.errors import ConfigError

_PAIRS = "mini:data/pairs.jsonl.gz"
_KINDS = {"image": "describe", "audio": "hear", "video": "watch"}
_SCENES = {"image": 400, "audio": 300, "video": 100}
_DESCRIPTION = re.compile(r"I (?:see|hear) (.*)\.")


def rehearsed_media(
    name: str, modality: str, source: str | Path | LabelledMedia | None, *, with_scenes: bool = True
) -> list[LabelledMedium]:
    """Read the media that a model is to keep.

    Args:
        name: the model's; `mini` has media of its own.
        modality: of the media.
        source: labelled media, or a folder or table of them; None: the model's own.
        with_scenes: whether several things at once are among its own media.

    Raises:
        ConfigError: the model has none of its own, and none are named.
    """
    if source is not None:
        found = source if isinstance(source, LabelledMedia) else read_labelled(source)
        return [item for item in found.items if item.medium.modality == modality]
    if name != "mini":
        raise ConfigError(
            f"{name}: teaching needs media that the model already names, or it would forget them; "
            "name a folder or table of them with --rehearse"
        )
    return single_things(modality) + (scenes(modality) if with_scenes else [])


def single_things(modality: str) -> list[LabelledMedium]:
    """Return the media of one thing that mini was trained on.

    Args:
        modality: of the media.
    """
    rows, root = read_rows(_PAIRS, None, "rehearsal")
    rows = select(rows, {"modality": modality, "split": "train"}, "rehearsal")
    return [
        LabelledMedium(medium(modality, row["file"], root, row["thing"]), row["label"])
        for row in (rows[index] for index in range(len(rows)))
    ]


def scenes(modality: str, count: int | None = None) -> list[LabelledMedium]:
    """Return scenes, soundscapes or clips that mini was trained on, with their descriptions.

    Args:
        modality: of the media.
        count: how many; None: as many as teaching rehearses.
    """
    count = count or _SCENES[modality]
    tree = {"type": "scenes", "count": count, "kinds": [_KINDS[modality]]}
    dataset = configs.build(configs.parse_component("data", tree, "rehearsal"), where="rehearsal")
    found = []
    for index in range(len(dataset)):
        question, answer = dataset.conversation(index, np.random.default_rng(0))
        described = _DESCRIPTION.fullmatch(answer.text)
        assert described is not None
        found.append(LabelledMedium(question.media[0], described[1]))
    return found
