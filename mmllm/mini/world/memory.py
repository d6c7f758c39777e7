"""Questions about what was made earlier in the conversation."""

from __future__ import annotations

import re

from mmllm.mini.world import wordings
from mmllm.mini.world.talk import Talk
from mmllm.mini.world.wordings import prompt, wording

_MOST = 4  # of what one answer lists
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
_ABOUT_PICTURES = re.compile(r"draw|drew|picture|image")


def remember(talk: Talk) -> bool:
    """The user asks what was made first, second, last, before that, in all, or how many it were."""
    made = talk.made
    kind = talk.rng.choice(list(wordings.tables()["memory"]))
    needed = 1 if kind in ("first", "last", "how many") else 2
    if len(made) < needed or (kind == "all" and len(made) > _MOST):
        return False
    asked = wording("memory", kind, talk.split, talk.rng)
    about = {"first": made[:1], "second": made[1:2], "last": made[-1:], "before": made[-2:-1]}
    are_drawn = all(verb == "drew" for verb, _ in about.get(kind, made))
    if _ABOUT_PICTURES.search(asked) and not are_drawn:
        return False
    talk.ask(asked)
    talk.answer(_answer(kind, made, are_drawn))
    return True


_ASKED = {"drew": "draw", "played": "play", "animated": "animate"}


def name_last(talk: Talk) -> bool:
    """The user asks what it was that was made just now, as in "What did you draw?"."""
    if not talk.made:
        return False
    verb, words = talk.made[-1]
    talk.ask(prompt(f"what_did_you_{_ASKED[verb]}", talk.split, talk.rng))
    talk.answer(f"I {verb} {words}.")
    return True


def _answer(kind: str, made: list[tuple[str, str]], are_drawn: bool) -> str:
    acts = [f"I {verb} {words}" for verb, words in made]
    if kind == "first":
        return f"First {acts[0]}."
    if kind == "second":
        return f"Second {acts[1]}."
    if kind == "before":
        return f"Before that {acts[-2]}."
    if kind == "last":
        return f"{acts[-1]}."
    if kind == "all":
        return f"First {', then '.join(acts)}."
    things = "picture" if are_drawn else "thing"
    return f"I have made {_NUMBERS[len(made)]} {things}{'s' if len(made) > 1 else ''}."
