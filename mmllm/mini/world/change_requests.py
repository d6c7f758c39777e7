"""Changes of the last scene as they are asked for, each with the scene that they lead to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mmllm.mini.world import edits
from mmllm.mini.world.captions import NUMBERS, describe, phrase
from mmllm.mini.world.edits import EditError
from mmllm.mini.world.scenes import GROUNDS, Group, Scene
from mmllm.mini.world.talk import Talk, name_of
from mmllm.mini.world.things import COLOURS, things
from mmllm.mini.world.wordings import wording


def edit(talk: Talk) -> bool:
    """The user asks for a change of what was drawn."""
    scene = talk.scene
    if scene is None:
        return False
    kinds = talk.rng.sample(list(_EDITS), len(_EDITS))
    return any(_edit(talk, scene, kind) for kind in kinds)


def _edit(talk: Talk, scene: Scene, kind: str) -> bool:
    """A change of one kind, where the scene can take it."""
    try:
        written = _EDITS[kind](talk, scene)
    except EditError:
        return False
    if written is None or not talk.allowed(written[1]):
        return False
    words, changed = written
    clip = replace(talk.clip, scene=changed) if talk.clip and kind in _OF_CLIPS else None
    if clip and not talk.allowed_clip(clip):
        return False
    opener = talk.rng.choice(("", "", "", "please ", "now ", "ok, ", "can you ", "and "))
    if opener == "can you " and not words.startswith(("make", "change", "add", "put", "remove")):
        opener = ""
    text = opener + words
    if opener == "can you ":
        text = text.rstrip("?") + "?"
    talk.ask(text[0].upper() + text[1:])
    if clip:
        talk.show_clip(clip)
    else:
        talk.show(changed)
    return True


Written = tuple[str, Scene] | None


def _words(talk: Talk, kind: str, **slots: str) -> str:
    return wording("edits", kind, talk.split, talk.rng).format(**slots)


def _recolour(talk: Talk, scene: Scene) -> Written:
    index = talk.rng.randrange(len(scene.groups))
    colour = talk.rng.choice([c for c in COLOURS if c != scene.groups[index].colour])
    changed = edits.recolour(scene, index, colour, talk.paintable)
    kind = "recolour" if len(scene.groups) == 1 else "recolour one"
    name = name_of(scene, index)
    if scene.groups[index].count > 1 and len(scene.groups) == 1 and talk.rng.random() < 0.5:
        name = "them"
    return _words(talk, kind, colour=colour, it=name), changed


def _recolour_all(talk: Talk, scene: Scene) -> Written:
    count = len(scene.groups)
    if count < 2:
        return None
    colour = talk.rng.choice(list(COLOURS))
    words, changed = _words(talk, "recolour all", colour=colour), scene
    for index in range(count):
        changed = edits.recolour(changed, index, colour, talk.paintable)
    if changed == scene or (count > 2 and "both" in words):
        return None
    return words, changed


def _natural(talk: Talk, scene: Scene) -> Written:
    if len(scene.groups) != 1 or not scene.groups[0].colour:
        return None
    words = _words(talk, "natural", colour=scene.groups[0].colour)
    return words, edits.recolour(scene, 0, None)


def _count(talk: Talk, scene: Scene) -> Written:
    if len(scene.groups) != 1:
        return None
    group = scene.groups[0]
    number = talk.rng.choice([n for n in (1, 2, 3, 4) if n != group.count])
    if number == 1:
        return None
    changed = edits.set_count(scene, 0, number)
    many = things()[group.thing].plural
    return _words(talk, "count", number=NUMBERS[number], many=many), changed


def _one_more(talk: Talk, scene: Scene) -> Written:
    return _number_of(talk, scene, "one more", scene.groups[0].count + 1)


def _one_less(talk: Talk, scene: Scene) -> Written:
    return _number_of(talk, scene, "one less", scene.groups[0].count - 1)


def _only_one(talk: Talk, scene: Scene) -> Written:
    return _number_of(talk, scene, "only one", 1) if scene.groups[0].count > 1 else None


def _number_of(talk: Talk, scene: Scene, kind: str, count: int) -> Written:
    if len(scene.groups) != 1:
        return None
    changed = edits.set_count(scene, 0, count)
    thing = things()[scene.groups[0].thing]
    return _words(talk, kind, thing=thing.label, many=thing.plural), changed


def _move(talk: Talk, scene: Scene) -> Written:
    if len(scene.groups) != 2:
        return None
    index = talk.rng.randrange(2)
    where = talk.rng.choice(("left", "right", "above", "below"))
    changed = edits.move(scene, index, where)
    if describe(changed) == describe(scene):
        return None
    it, other = name_of(scene, index), name_of(scene, 1 - index)
    places = {
        "left": ("on the left", "to the left", f"to the left of {other}", f"left of {other}"),
        "right": ("on the right", "to the right", f"to the right of {other}", f"right of {other}"),
        "above": ("at the top", f"above {other}", f"over {other}", f"on top of {other}"),
        "below": ("at the bottom", f"below {other}", f"under {other}", f"underneath {other}"),
    }
    return _words(talk, "move", it=it, where=talk.rng.choice(places[where])), changed


def _add(talk: Talk, scene: Scene) -> Written:
    colour = talk.rng.choice(list(COLOURS)) if talk.rng.random() < 0.25 else None
    pool = talk.paintable if colour else tuple(things())
    group = Group(talk.rng.choice(pool), colour=colour)
    where = talk.rng.choice(("left", "right", "above", "below", "next to"))
    changed = edits.add(scene, group, where)
    it = "it" if len(scene.groups) == 1 and scene.groups[0].count == 1 else "them"
    places = {
        "left": ("on the left", f"to the left of {it}", f"left of {it}"),
        "right": ("on the right", f"to the right of {it}", f"right of {it}"),
        "above": ("at the top", f"above {it}", f"over {it}"),
        "below": ("at the bottom", f"below {it}", f"under {it}"),
        "next to": (f"next to {it}",),
    }
    words = _words(talk, "add", x=phrase(group, talk.rng, talk.wording), where="{where}")
    if "{where}" in words:
        return words.format(where=talk.rng.choice(places[where])), changed
    return (words, edits.add(scene, group)) if where == "next to" else None


def _remove(talk: Talk, scene: Scene) -> Written:
    index = talk.rng.randrange(len(scene.groups))
    changed = edits.remove(scene, index)
    name = name_of(scene, index)
    return _words(talk, "remove", it=name, name=name.removeprefix("the ")), changed


def _swap(talk: Talk, scene: Scene) -> Written:
    changed = edits.swap(scene)
    if scene.layout == "pair":
        return None
    return _words(talk, "swap"), changed


def _resize(talk: Talk, scene: Scene) -> Written:
    if len(scene.groups) != 1 or scene.groups[0].count > 1:
        return None
    bigger = talk.rng.random() < 0.5
    changed = (edits.bigger if bigger else edits.smaller)(scene, 0)
    return _words(talk, "bigger" if bigger else "smaller", it=name_of(scene, 0)), changed


def _become(talk: Talk, scene: Scene) -> Written:
    index = talk.rng.randrange(len(scene.groups))
    group = scene.groups[index]
    if group.count > 1 or group.colour:
        return None
    thing = talk.rng.choice(list(things()))
    changed = edits.become(scene, index, thing)
    return _words(talk, "become", x=things()[thing].caption, it=name_of(scene, index)), changed


def _ground(talk: Talk, scene: Scene) -> Written:
    grounds = [g for g in GROUNDS if g != (scene.ground or "white") and g not in _colours(scene)]
    ground = talk.rng.choice(grounds)
    return _words(talk, "ground", ground=ground), edits.on_ground(scene, ground)


def _again(talk: Talk, scene: Scene) -> Written:
    return _words(talk, "again"), scene


def _colours(scene: Scene) -> set[str | None]:
    return {group.colour for group in scene.groups}


_EDITS: dict[str, Callable[[Talk, Scene], Written]] = {
    "recolour": _recolour,
    "recolour all": _recolour_all,
    "natural": _natural,
    "count": _count,
    "one more": _one_more,
    "one less": _one_less,
    "only one": _only_one,
    "move": _move,
    "add": _add,
    "remove": _remove,
    "swap": _swap,
    "resize": _resize,
    "become": _become,
    "ground": _ground,
    "again": _again,
}
_OF_CLIPS = ("recolour", "natural", "become", "ground", "again")
"""Changes that a clip takes as well: it goes on moving as it did."""
