"""Turns of conversations: phrasings, names and media drawn for both sides."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tools.mini.data.dialogues.world import DRAWN, MEDIUM_SPLIT, Concept, Message, World

SYSTEM = "You can see, hear, draw, play and animate."
"""System prompt of the model's configurations; the replies of plain chat were written under it."""


def user(*content: str | Message) -> Message:
    return {"role": "user", "content": _content(content)}


def assistant(*content: str | Message) -> Message:
    return {"role": "assistant", "content": _content(content)}


def _content(content: Sequence[str | Message]) -> str | list[Message]:
    if len(content) == 1 and isinstance(content[0], str):
        return content[0]
    return [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]


def answer(concept: Concept) -> str:
    """ "This is a dog."; plural things are "These are"."""
    plural = concept.caption.split()[0] in ("some", "clapping") and concept.label.endswith("s")
    return f"{'These are' if plural else 'This is'} {concept.caption}."


BEFORE = (
    "Hi!", "Hello!", "Hey,", "OK.", "Well,", "So,", "Right.", "Now,", "Listen.", "Sorry,", "Hm.",
    "Great.", "Thanks.", "Good morning.", "One question:", "Something else:", "Quick one:",
)  # fmt: skip
AFTER = ("Thanks!", "Thank you.", "Please.", "Take your time.", "Be quick.", "OK?", "If you can.")
CONTRACTIONS = {
    r"\bI would\b": "I'd", r"\bI am\b": "I'm", r"\b(What|Who|Where|How|That|It) is\b": r"\1's",
    r"\b([Dd])o not\b": r"\1on't", r"\bLet us\b": "Let's", r"\bcannot\b": "can't",
}  # fmt: skip


def contracted(text: str) -> str:
    """ "I would like" -> "I'd like"; "What is" -> "What's"."""
    for long, short in CONTRACTIONS.items():
        text = re.sub(long, short, text)
    return text


def described(modality: str, concept: Concept) -> str:
    """What a medium is called in a reply: its modality comes first, so that one word decides it."""
    kind = {"image": "a picture of ", "video": "a clip of ", "audio": ""}[modality]
    return f"{kind}{concept.caption}"


class Speaker:
    """Draws phrasings, concepts and media for one task, each as often as the others."""

    def __init__(self, world: World, prompts: dict, split: str, task: str):
        self.world, self.prompts, self.split = world, prompts, split
        self.rng = random.Random(f"{split}/{task}")
        self._decks: dict[str, Iterator] = {}

    def deal(self, name: str, cards: Sequence) -> Any:
        """The next of `cards`, which are shuffled anew whenever all have been dealt."""
        if name not in self._decks:
            self._decks[name] = self._shuffled(cards)
        return next(self._decks[name])

    def _shuffled(self, cards: Sequence) -> Iterator:
        while True:
            yield from self.rng.sample(cards, len(cards))

    def pick(self, pool: str) -> Concept:
        return self.deal(f"pool {pool}", self.world.pool(pool))

    def say(self, kind: str, concept: Concept | None = None, **slots: str) -> str:
        """A phrasing of this kind with its slots filled; train texts are typed loosely."""
        phrase = self.deal(kind, self.prompts[kind][self.split])
        if concept:
            if self.split == "train" and concept.synonyms and self.rng.random() < 0.3:
                concept = concept.called(self.deal(f"names {concept.id}", concept.synonyms))
            slots |= {"caption": concept.caption, "label": concept.label, "thing": concept.thing}
        text = phrase.format_map(slots) if slots else phrase
        text = text[0].upper() + text[1:]
        return self.loosely(text) if self.split == "train" else text

    def loosely(self, text: str) -> str:
        """As people type: contracted, with a word before or after, no capitals, no stop."""
        if self.rng.random() < 0.5:
            text = contracted(text)
        if self.rng.random() < 0.2:
            before = self.deal("before", BEFORE)
            inner = before[-1] in ",:" and not text.startswith(("I ", "I'"))
            text = f"{before} {text[0].lower() + text[1:] if inner else text}"
        if self.rng.random() < 0.15 and text[-1] in ".?!":
            text = f"{text} {self.deal('after', AFTER)}"
        text = text.lower() if self.rng.random() < 0.15 else text
        return text.rstrip(".?") if self.rng.random() < 0.2 else text

    def ask(self, kind: str, medium: Message, **slots: str) -> Message:
        """The user shows a medium and asks, in either order."""
        content = [medium, self.say(kind, None, **slots)]
        return user(*(content if self.rng.random() < 0.5 else reversed(content)))

    def given(self, modality: str, name: str) -> Message:
        """A medium from the user: any train file, or in tests one that nothing has trained on."""
        split = MEDIUM_SPLIT[modality] if self.split == "heldout" else "train"
        files = self.world.files[modality, name, split]
        return {"type": modality, "file": self.deal(f"{modality} {name}", files)}

    def made(self, modality: str, concept: Concept) -> Message:
        """A medium from the assistant, with the caption that it is aligned with."""
        files = self.world.files[modality, concept.id, "train"]
        if modality == "image":
            file = next(file for file in files if DRAWN in file)
        else:
            file = self.deal(f"{modality} {concept.id}", files)
        return {"type": modality, "file": file, "caption": concept.caption}

    def here(self, modality: str, concept: Concept) -> tuple[str, Message]:
        """ "Here is a picture of a dog." and the dog."""
        return f"Here is {described(modality, concept)}.", self.made(modality, concept)
