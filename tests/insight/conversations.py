"""Conversations of every kind of position, and words for what is in them."""

from __future__ import annotations

from collections.abc import Sequence

from mmllm.conversation import Message, assistant, user
from mmllm.data.rendering import Rendered
from mmllm.insight.concepts import ConceptVocabulary
from mmllm.model import AnyToAny
from tests.samples import clip, picture, sound

VOCABULARY = ConceptVocabulary({"apple": ["apple"], "rocket": ["rocket", "ship"]})


def messages(number: int = 0) -> list[list[Message]]:
    """Four conversations, which differ with the number."""
    value = 20 * number
    return [
        [user("What is this?", picture(value, caption="an apple")), assistant("a red apple")],
        [user(sound(number / 9), "hello"), assistant(f"the sound {number} of a rocket")],
        [user("Draw a rocket."), assistant("Here", picture(value, caption="a rocket"))],
        [user(clip(value), "one two"), assistant(f"three {number}")],
    ]


def rendered(model: AnyToAny, num: int = 1) -> list[Rendered]:
    conversations: Sequence[list[Message]] = [each for n in range(num) for each in messages(n)]
    return [model.renderer.render(each) for each in conversations]
