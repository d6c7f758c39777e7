"""Requests that say what is not wanted: a dog but no cat, not a cat but a dog, a car that is not
red, no cat at all."""

from __future__ import annotations

from dataclasses import replace

from mmllm.mini.world.captions import phrase
from mmllm.mini.world.scenes import Group, Scene
from mmllm.mini.world.talk import Talk
from mmllm.mini.world.things import COLOURS, colourable, things
from mmllm.mini.world.wordings import as_sentence, wording

_OTHER_COLOUR = dict.fromkeys(COLOURS, "blue") | {"blue": "red"}
"""Colour that is not wanted -> the one that is drawn."""


def negate(talk: Talk) -> bool:
    """The user asks for a thing and says what it is not to be, or asks for none."""
    rng = talk.rng
    kind = rng.choice(("but no", "but no", "not but", "not but", "not colour", "not at all"))
    known = colourable() if kind == "not colour" else tuple(things())
    wanted, other = (Group(thing) for thing in rng.sample(known, 2))
    if kind != "not colour" and wanted.thing in colourable() and rng.random() < 0.25:
        wanted = replace(wanted, colour=rng.choice(list(COLOURS)))
    colour = rng.choice(list(COLOURS))
    shown = Scene((wanted,))
    if kind == "not colour":
        shown = Scene((replace(wanted, colour=_OTHER_COLOUR[colour]),))
    if not talk.allowed(shown):
        return False
    words = phrase(wanted, rng, talk.wording)
    slots = {"x": words, "y": phrase(other, rng, talk.wording), "colour": colour}
    for article in ("a ", "an ", "some "):  # no cat, without any cats
        slots["y"] = slots["y"].removeprefix(article) if kind == "but no" else slots["y"]
    if kind == "not at all":
        slots["x"] = words if rng.random() < 0.7 else things()[wanted.thing].plural
    talk.ask(as_sentence(wording("negations", kind, talk.split, rng).format(**slots)))
    if kind == "not at all":
        talk.answer("All right, I will not draw it. What shall I draw instead?")
    else:
        talk.show(shown)
    return True
