"""What concepts are called: the training captions of a decoder, and its held-out ones."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mmllm import mini

DATA = mini.FOLDER / "data"


@dataclass(frozen=True)
class Captions:
    """What concepts are called: phrasings with slots, and per concept what fills them.

    Slots are {caption}, and for sounds also {label} and {thing}; a concept has one filling for its
    canonical name and one for each training synonym.
    """

    train: list[str]
    heldout: list[str]
    names: list[list[dict[str, str]]]

    def draw(self, concept: int, rng: random.Random) -> str:
        """One training caption: often plain, and under the canonical name."""
        names = self.names[concept]
        name = names[0] if rng.random() < 0.5 else rng.choice(names)
        phrasing = self.train[0] if rng.random() < 0.4 else rng.choice(self.train)
        if rng.random() < 0.35:  # words that it does not know, which must do no harm
            words = [
                "[UNK]" if "{" not in word and rng.random() < 0.5 else word
                for word in phrasing.split()
            ]
            around = ["[UNK]"] * rng.randrange(3), ["[UNK]"] * rng.randrange(4)
            phrasing = " ".join([*around[0], *words, *around[1]])
        return phrasing.format(**name)

    def test(self, concept: int, index: int) -> str:
        """The canonical name in one of the phrasings that training never sees."""
        return self.heldout[index % len(self.heldout)].format(**self.names[concept][0])

    def texts(self) -> list[str]:
        """Everything that a training caption is made of."""
        return self.train + [
            text for names in self.names for name in names for text in name.values()
        ]


def with_article(name: str, like: str) -> str:
    """A synonym as a noun phrase like the canonical one: 'puppy', 'a dog' -> 'a puppy'."""
    first = like.split()[0]
    if first == "the":
        return f"the {name}"
    if first not in ("a", "an", "some"):
        return name
    if first == "some" and name.endswith("s"):
        return f"some {name}"
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def names_of(concept: dict) -> list[dict[str, str]]:
    """The fillings of a row of concepts.json or sounds.json."""
    thing = concept.get("thing", concept["caption"])
    things = [thing] + [with_article(name, thing) for name in concept["synonyms"]]
    labels = [concept["label"], *concept["synonyms"]]
    return [
        {"label": label, "thing": other, "caption": concept["caption"].replace(thing, other)}
        for label, other in zip(labels, things, strict=True)
    ]
