"""Things of mini's data as they are seen, audible and written, in training and held-out contexts:
the exemplars of the row `insight/concepts`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.conversation import Medium, Message, user
from mmllm.data.rendering import Rendered
from mmllm.data.sources import read_text
from mmllm.evaluation.judges import open_item, read_items
from mmllm.insight.collecting import label_positions
from mmllm.insight.concepts import ConceptVocabulary, mini_vocabulary
from mmllm.insight.features.concept_units import Exemplar
from mmllm.model import AnyToAny

QUESTIONS = {
    False: ("What is this?", "Tell me about it."),
    True: ("Can you name it?", "Look here."),
}
"""Whether it is held out -> the text next to a picture or a sound."""
SENTENCES = {
    False: (
        "I saw {thing} yesterday.",
        "Tell me about {thing}.",
        "My brother has {thing}.",
        "There was {thing} in the story.",
        "We talked about {thing} at school.",
        "Do you know {thing}?",
    ),
    True: (
        "Nobody expected {thing} there.",
        "Is {thing} expensive?",
        "She dreamt of {thing} again.",
        "The poem is about {thing}.",
    ),
}


@dataclass(frozen=True)
class Shown:
    """An exemplar in its conversation.

    Attributes:
        exemplar: what it is.
        conversation: rendered for a model.
        positions: those of the medium or the word.
    """

    exemplar: Exemplar
    conversation: Rendered
    positions: Sequence[int]


def read_exemplars(model: AnyToAny, data: Path, num: int) -> list[Shown]:
    """Exemplars of the things that have pictures, sounds and a name. Held out are a style of
    pictures, two takes of each sound, and sentences.

    Args:
        model: renders the conversations.
        data: folder of mini's data.
        num: things at most.
    """
    concepts = {entry["id"]: entry for entry in json.loads(read_text(data / "concepts.json"))}
    sounds = json.loads(read_text(data / "sounds.json.gz"))["concepts"]
    things = {entry["picture"]: entry["id"] for entry in sounds if entry["picture"] in concepts}
    vocabulary = mini_vocabulary()
    shown: list[Shown] = []
    for concept, sound in list(things.items())[:num]:
        for modality, name in (("image", concept), ("audio", sound)):
            for item in read_items(data, modality):
                if item["concept"] == name:
                    shown += _media(model, data, item, Exemplar(concept, modality, False))
        shown += _words(model, vocabulary, concept, concepts[concept]["caption"])
    return shown


def _media(
    model: AnyToAny, data: Path, item: Mapping[str, Any], exemplar: Exemplar
) -> Iterator[Shown]:
    """A medium before and after each of two texts."""
    held_out = item["split"] != "train"
    medium: Medium = open_item(data, item)
    for number, question in enumerate(QUESTIONS[held_out]):
        message: Message = user(medium, question) if number % 2 else user(question, medium)
        rendered = model.renderer.render([message], add_generation_prompt=True)
        span = rendered.inputs[0]
        positions = range(span.start, span.start + span.length)
        yield Shown(Exemplar(exemplar.concept, exemplar.modality, held_out), rendered, positions)


def _words(
    model: AnyToAny, vocabulary: ConceptVocabulary, concept: str, thing: str
) -> Iterator[Shown]:
    number, first = vocabulary.concepts.index(concept), len(model.renderer.prefix_ids)
    for held_out, sentences in SENTENCES.items():
        for sentence in sentences:
            message = user(sentence.format(thing=thing))
            rendered = model.renderer.render([message], add_generation_prompt=True)
            named = np.flatnonzero(label_positions(model, rendered, vocabulary)[2] == number)
            positions = [int(at) for at in named if at >= first]
            if positions:
                yield Shown(Exemplar(concept, "text", held_out), rendered, positions)
