"""The row of System 2 Attention over media: which of several media matter to the question?"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmllm.conversation import ContentPart, Medium, Message, Text
from mmllm.data.sources import read_text
from mmllm.evaluation.judges import open_item, read_items
from mmllm.evaluation.labels import LabelMatcher
from mmllm.evaluation.metrics import Metric, accuracy_metric, difference_metric
from mmllm.evaluation.prompts import evenly_spaced
from mmllm.evaluation.reasoning.searching import OnProgress
from mmllm.reasoning.models import ChatModel
from mmllm.reasoning.system2_attention import focus

NUM_CONVERSATIONS = 100
_ROW = "reasoning/focus"
_QUESTION = "What do you hear?"
_MARGIN = 0.5


def measure_focus(
    model: ChatModel, data: Path, num: int, on_progress: OnProgress
) -> Iterator[Metric]:
    """A sound between two pictures of other things, in any order, and a question about the sound:
    which media are kept, and is the sound named from what is kept?

    Args:
        model: what is measured.
        data: folder of mini's data.
        num: number of conversations.
        on_progress: called with the number of items done.
    """
    start = time.perf_counter()
    rng = random.Random(0)
    sounds = [item for item in read_items(data, "audio") if item["split"] == "heldout_take"]
    pictures = [item for item in read_items(data, "image") if item["split"] == "heldout_style"]
    labels = LabelMatcher(json.loads(read_text(data / "sounds.json.gz"))["concepts"])
    kept, exact, alone, crowded, focused = [], [], [], [], []
    for item in evenly_spaced(sounds, num):
        others = [picture for picture in pictures if picture["concept"] != item["concept"]]
        sound = open_item(data, item)
        shown = [sound, *(open_item(data, other) for other in rng.sample(others, 2))]
        rng.shuffle(shown)
        whole = [_asked(shown)]
        reduced = focus(model, whole, attend="media", margin=_MARGIN, max_new_tokens=24)
        media = reduced[-1].media
        kept.append(any(medium is sound for medium in media))
        exact.append(len(media) == 1 and media[0] is sound)
        for found, conversation in (
            (alone, [_asked([sound])]),
            (crowded, whole),
            (focused, reduced),
        ):
            (reply,) = model.complete(conversation, temperature=0.0, max_new_tokens=24)
            found.append(labels.matches_only(reply.text, item["concept"]))
        on_progress(1)
    yield difference_metric(f"{_ROW}, named: focused - all media", focused, crowded, start)
    yield accuracy_metric(f"{_ROW}, named from all media", crowded, start)
    yield accuracy_metric(f"{_ROW}, named from the media that were kept", focused, start)
    yield accuracy_metric(f"{_ROW}, named from the sound alone", alone, start)
    yield accuracy_metric(f"{_ROW}, the sound was kept", kept, start)
    yield accuracy_metric(f"{_ROW}, the sound alone was kept", exact, start)


def _asked(media: Sequence[Medium]) -> Message:
    parts: list[ContentPart] = [*media, Text(_QUESTION)]
    return Message("user", tuple(parts))
