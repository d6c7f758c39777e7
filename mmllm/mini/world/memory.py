"""Questions about what was made earlier in the conversation."""

from __future__ import annotations

import re

from mmllm.mini.world import wordings
from mmllm.mini.world.captions import NUMBERS, describe
from mmllm.mini.world.scenes import Scene
from mmllm.mini.world.talk import Talk
from mmllm.mini.world.things import things
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


def recall(talk: Talk) -> bool:
    """The user asks about the colour or number of what was drawn, or for the first one again."""
    if talk.rng.random() < 0.2:
        return _redraw(talk)
    drawn = [scene for scene in _drawn(talk) if len(scene.groups) == 1]
    if not drawn:
        return False
    scene = talk.rng.choice(drawn)
    group = scene.groups[0]
    thing = things()[group.thing]
    if sum(group.thing in {other.thing for other in past.groups} for past in _drawn(talk)) > 1:
        return False  # it was drawn more than once: which is meant?
    if group.colour and group.count == 1:
        kind, slots = "colour", {"it": thing.label}
        answer = f"The {thing.label} was {group.colour}."
    elif group.count > 1:
        kind, slots = "number", {"many": thing.plural}
        answer = f"I drew {NUMBERS[group.count]} {thing.plural}."
    elif talk.rng.random() < 0.5:
        kind, slots, answer = "whether", {"x": thing.caption}, f"Yes, I drew {thing.caption}."
    else:
        past = {group.thing for scene in _drawn(talk) for group in scene.groups}
        other = things()[talk.rng.choice([name for name in things() if name not in past])]
        kind, slots = "whether", {"x": other.caption}
        answer = f"No, I did not draw {other.caption}."
    talk.ask(wording("recall", kind, talk.split, talk.rng).format(**slots))
    talk.answer(answer)
    return True


def _redraw(talk: Talk) -> bool:
    drawn = _drawn(talk)
    if len(drawn) < 2 or describe(drawn[0]) == describe(drawn[-1]):
        return False
    talk.ask(wording("recall", "again", talk.split, talk.rng))
    talk.show(drawn[0])
    return True


def _drawn(talk: Talk) -> list[Scene]:
    return [shown for shown in talk.shown.values() if isinstance(shown, Scene)]


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
