"""How people ask: openers, verbs, closers, questions and edits, of training and held out.

A request is put together from the parts in `wordings.yaml`, so a few lists give thousands of
wordings. Names of things, colours and places come in by {slots}. `roughen` makes a request look
typed: small letters, no full stop, capitals, a slip of the finger.
"""

from __future__ import annotations

import functools
import random
from typing import Any, Literal

import yaml

from mmllm.mini.world.things import DATA

Split = Literal["training", "heldout"]


@functools.cache
def tables() -> dict[str, Any]:
    """The wordings: groups of tables, each with lists of `training` and `heldout`."""
    return yaml.safe_load((DATA / "wordings.yaml").read_text(encoding="utf-8"))


_SLIPS = {"a": "s", "e": "r", "i": "o", "o": "p", "t": "r", "n": "m", "r": "t", "s": "d", "c": "v"}


def wording(group: str, kind: str, split: Split, rng: random.Random) -> str:
    """One of the wordings of a table, such as "edits" and "recolour"."""
    return rng.choice(tables()[group][kind][split])


def request(kind: str, x: str, split: Split, rng: random.Random) -> str:
    """A request: opener, verb with its object, closer; or, to draw, a wish.

    Args:
        kind: "draw", "animate" or "sound".
        x: What is asked for, as a noun phrase.
        split: Whose wordings.
        rng: Where chance comes from.
    """

    def part(name: str) -> str:
        return rng.choice(tables()[name][split])

    if kind == "draw" and rng.random() < 0.3:
        text = wording("requests", "wish", split, rng).format(x=x)
        closer = part("closers") if "?" not in text and rng.random() < 0.3 else ""
        return _sentence(text + closer)
    opener, closer = part("openers"), part("closers")
    body = wording("requests", kind, split, rng).format(x=x)
    if body.endswith("?") or body.startswith("I"):
        opener, closer = "", ""
    return _sentence(opener + body + closer)


def _sentence(text: str) -> str:
    """With a capital letter and a mark at the end."""
    text = text.strip()
    asks = text.lower().startswith(("can you", "could you", "would you", "will you", "might you"))
    end = "" if text[-1] in ".?!" else ("?" if asks else ".")
    return text[0].upper() + text[1:] + end


def roughen(text: str, rng: random.Random) -> str:
    """A request as it is typed: half of them as they are, others careless."""
    chance = rng.random()
    if chance < 0.45:
        return text
    if chance < 0.75:
        text = text.rstrip(".!")
        return text.lower() if rng.random() < 0.7 else text
    if chance < 0.80:
        return text.upper()
    if chance < 0.85:
        return text.rstrip(".") + rng.choice(("!", "!!", "...", " :)"))
    words = text.split()
    place = rng.randrange(len(words))
    words[place] = _slip(words[place], rng)
    text = " ".join(words)
    return text.lower() if rng.random() < 0.5 else text


def _slip(word: str, rng: random.Random) -> str:
    """A word of four letters or more with one of four slips of the finger."""
    if len(word) < 4 or not word.isalpha():
        return word
    place = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(4)
    if kind == 0:  # two letters change places
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    if kind == 1:  # one is missing
        return word[:place] + word[place + 1 :]
    if kind == 2:  # one is doubled
        return word[:place] + word[place] + word[place:]
    return word[:place] + _SLIPS.get(word[place], word[place]) + word[place + 1 :]
