"""A text, a clip and a sound of known content, and scripted models that read them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import numpy as np

from mmllm.conversation import Audio, Medium, Message, Text, Video, user
from mmllm.reasoning import ScriptedModel

NAMES = ["Ada", "Ben", "Cy", "Dee", "Eli", "Fay", "Gus", "Hal", "Ida"]
THINGS = ["bees", "goats", "stamps", "orchids", "clocks", "kites", "maps", "drums", "snails"]
FILLER = "The day was long and nothing else of note took place in the quiet town. " * 2
TEXT = "\n\n".join(
    f"{name} keeps {thing}. {FILLER}" for name, thing in zip(NAMES, THINGS, strict=True)
)

NUM = 9
FRAMES = np.repeat(np.arange(NUM, dtype=np.uint8), 4)[:, None, None, None]
CLIP = Video.from_numpy(np.broadcast_to(FRAMES, (4 * NUM, 8, 8, 3)).copy(), 4.0)
SAMPLES = np.repeat(np.arange(NUM, dtype=np.float32) / 10, 1000)
SOUND = Audio.from_numpy(SAMPLES, 1000)


def write(text: str, rng: random.Random) -> str:
    """Summarises by the facts; answers with the name in front of the thing that is asked for."""
    if re.search(r"(summary|passage)\.$", text):
        return " ".join(re.findall(r"\w+ keeps \w+\.", text))
    thing = re.findall(r"Who keeps (\w+)\?", text)[-1]
    found = re.findall(rf"(\w+) keeps {thing}\b", text.rpartition("Who keeps")[0])
    return found[0] if found else "nobody"


def likelihood(text: str, reply: str) -> float:
    """A question is likelier where its thing is mentioned; an option if it is the right one."""
    if "Write a question" in text:
        return 0.0 if reply.split()[-1].strip("?") in text else -5.0
    return 0.0 if write(text, random.Random(0)) == reply else -3.0


def scripted() -> ScriptedModel:
    return ScriptedModel(write, likelihood)


def described(part: Text | Medium) -> str:
    """Names a medium after the middle of it, as an encoder that looks at few frames would."""
    if isinstance(part, Text):
        return part.text
    array = part.to_numpy()
    if isinstance(part, Video):
        return f"thing{array[len(array) // 2].max()}\n\n"
    return f"thing{round(10 * array[0, array.shape[1] // 2])}\n\n"


class Perceiving(ScriptedModel):
    """A scripted model that reads a description in place of each medium."""

    def complete(self, conversation: Sequence[Message], **options):
        return super().complete([_in_words(conversation[-1])], **options)

    def score(self, conversation: Sequence[Message], replies: Sequence[str]) -> list[float]:
        return super().score([_in_words(conversation[-1])], replies)


def _in_words(message: Message) -> Message:
    return user("".join(described(part) for part in message.parts))


def perceiving() -> Perceiving:
    def write(text: str, rng: random.Random) -> str:
        return text.split()[0]

    def likelihood(text: str, reply: str) -> float:
        return float(any(word in reply.split() for word in text.split()))

    return Perceiving(write, likelihood)
