"""How people ask: openers, verbs, closers, questions and edits, of training and held out.

A request is put together from the parts in `wordings.yaml`, so a few lists give thousands of
wordings. Names of things, colours and places come in by {slots}. `roughen` makes a request look
typed: small letters, no full stop, capitals, a slip of the finger.
"""

from __future__ import annotations

import functools
import json
import random
import re
from typing import Any, Literal

import yaml

from mmllm.mini.world import unknown
from mmllm.mini.world.things import DATA, things

Split = Literal["training", "heldout"]


@functools.cache
def tables() -> dict[str, Any]:
    """The wordings: groups of tables, each with lists of `training` and `heldout`."""
    return yaml.safe_load((DATA / "wordings.yaml").read_text(encoding="utf-8"))


def wording(group: str, kind: str, split: Split, rng: random.Random) -> str:
    """One of the wordings of a table, such as "edits" and "recolour"."""
    return rng.choice(tables()[group][kind][split])


@functools.cache
def _prompts() -> dict[str, dict[str, list[str]]]:
    return json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))


def prompt(kind: str, split: Split, rng: random.Random) -> str:
    """One of the wordings of a kind in `prompts.json`, such as "picture_to_sound"."""
    return rng.choice(_prompts()[kind]["train" if split == "training" else split])


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
        return as_sentence(text + closer)
    opener, closer = part("openers"), part("closers")
    body = wording("requests", kind, split, rng).format(x=x)
    if body.endswith("?") or body.startswith("I"):
        opener, closer = "", ""
    return as_sentence(opener + body + closer)


BARE = 0.08
"""Share of the requests for one thing that are its name alone: "mailbox"."""


def as_sentence(text: str) -> str:
    """With a capital letter and a mark at the end."""
    text = text.strip()
    asks = text.lower().startswith(("can you", "could you", "would you", "will you", "might you"))
    end = "" if text[-1] in ".?!" else ("?" if asks else ".")
    return text[0].upper() + text[1:] + end


_NEIGHBOURS = {
    key: row[max(0, at - 1) : at] + row[at + 1 : at + 2]
    for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    for at, key in enumerate(row)
}
"""Letter -> those next to it on a keyboard."""
_SHORT = {"you": "u", "please": "pls", "picture": "pic", "and": "&", "thanks": "thx", "are": "r"}


def roughen(text: str, rng: random.Random) -> str:
    """A request as it is typed: two in five of them as they are, others careless."""
    chance = rng.random()
    if chance < 0.40:
        return text
    if chance < 0.66:
        text = text.rstrip(".!")
        return text.lower() if rng.random() < 0.7 else text
    if chance < 0.70:
        return text.upper()
    if chance < 0.75:
        return text.rstrip(".") + rng.choice(("!", "!!", "...", " :)", " ..", "??"))
    words = text.rstrip(".").split() if rng.random() < 0.6 else text.split()
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(words))
        words[place] = _slip(words[place], rng)
    text = " ".join(words)
    if rng.random() < 0.1:  # a missing space
        text = text.replace(" ", "", 1) if text.count(" ") > 1 else text
    return text.lower() if rng.random() < 0.6 else text


def misspell(text: str, words: str, rng: random.Random) -> str:
    """A request with slips in most of the words that matter, and in some of the others.

    Args:
        text: the request.
        words: what it asks for: "a red cat".
        rng: where chance comes from.
    """
    meant = set(words.lower().split())

    def slipped(match: re.Match[str]) -> str:
        word = match[0]
        if rng.random() > (0.75 if word.lower() in meant else 0.2):
            return word
        tries = [(_by_ear if rng.random() < 0.35 else _slip)(word, rng) for _ in range(4)]
        return next((other for other in tries if other.lower() not in _known_words()), word)

    text = re.sub(r"[A-Za-z]{3,}", slipped, text)
    if rng.random() < 0.7:
        text = text.rstrip(".")
    return text.lower() if rng.random() < 0.7 else text


@functools.cache
def _known_words() -> frozenset[str]:
    """All words of names, which a slip must not become."""
    rows = [name for thing in things().values() for name in (thing.label, thing.plural)]
    rows += [name for thing in things().values() for name in thing.synonyms]
    return frozenset(" ".join((*rows, *unknown.things())).lower().split())


_EARS = (
    *(("ph", "f"), ("ck", "k"), ("c", "k"), ("qu", "kw"), ("x", "ks"), ("gh", ""), ("wh", "w")),
    *(("ei", "ie"), ("ie", "ei"), ("ea", "ee"), ("ee", "ea"), ("ou", "u"), ("ai", "ay")),
    *(("er", "or"), ("or", "er"), ("ar", "er"), ("le", "el"), ("ey", "y"), ("y", "ie")),
    *(("a", "e"), ("e", "a"), ("i", "e"), ("o", "u"), ("u", "a"), ("s", "c"), ("g", "j")),
    *(("tt", "t"), ("ll", "l"), ("nn", "n"), ("pp", "p"), ("rr", "r"), ("ss", "s"), ("bb", "b")),
    *(("t", "tt"), ("l", "ll"), ("n", "nn"), ("p", "pp"), ("r", "rr"), ("mb", "m"), ("kn", "n")),
)
"""How letters are taken for others that sound alike."""


def _by_ear(word: str, rng: random.Random) -> str:
    """A word as one might think that it is spelled: "elefant", "gitar", "bananna"."""
    if word[-1] == "e" and rng.random() < 0.15:
        return word[:-1]
    options = [(at.start(), len(old), new) for old, new in _EARS for at in re.finditer(old, word)]
    if not options:
        return _slip(word, rng)
    start, length, new = rng.choice(options)
    return word[:start] + new + word[start + length :]


def _slip(word: str, rng: random.Random) -> str:
    """A word of three letters or more with a slip of the finger, or cut short."""
    if short := _SHORT.get(word.lower()):
        return short
    if len(word) < 3 or not word.isalpha():
        return word
    place = rng.randrange(len(word) > 3, len(word) - 1)
    kind = rng.randrange(6)
    if kind <= 1:  # two letters change places
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    if kind == 2:  # one is missing
        return word[:place] + word[place + 1 :]
    if kind == 3:  # one is doubled
        return word[:place] + word[place] + word[place:]
    wrong = rng.choice(_NEIGHBOURS.get(word[place].lower(), word[place]))
    if kind == 4:  # a neighbour is hit instead
        return word[:place] + wrong + word[place + 1 :]
    return word[:place] + wrong + word[place:]  # or as well
