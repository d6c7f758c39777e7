"""Questions about scenes, and their answers."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

from mmllm.conversation import Image
from mmllm.mini.world import wordings
from mmllm.mini.world.captions import NUMBERS, describe, phrase
from mmllm.mini.world.rendering import place_picture
from mmllm.mini.world.scenes import Scene
from mmllm.mini.world.talk import Talk, name_of
from mmllm.mini.world.things import DATA, things
from mmllm.mini.world.wordings import wording

STYLES = ("fluent-3d", "fluent-flat", "noto")
"""Of the pictures that training may see."""
HELDOUT_STYLES = ("twemoji",)


def read(talk: Talk) -> bool:
    """The user shows a scene and asks about it."""
    scene = talk.draw_scene()
    if scene.layout == "pair":  # whose order the image decides
        scene = replace(scene, layout="left")
    return question(talk, scene, None, talk.image(scene))


def describe_scene(talk: Talk) -> bool:
    """The user shows a scene and asks what it is; the answer leaves its ground out."""
    scene = talk.draw_scene()
    if scene.layout == "pair":  # whose order the image decides
        scene = replace(scene, layout="left")
    talk.ask(wording("questions", "what", talk.split, talk.rng), talk.image(scene))
    talk.answer(f"I see {describe(replace(scene, ground=None))}.")
    talk.turn_to(scene)
    return True


def describe_picture(talk: Talk) -> bool:
    """The user shows one thing in another style, anywhere and of any size, and asks what it is."""
    entry = talk.rng.choice(_concepts())
    styles = HELDOUT_STYLES if talk.is_heldout else STYLES
    file = DATA / "pictures" / talk.rng.choice(styles) / f"{entry['id']}.webp"
    shown = Image(array=place_picture(file, talk.rng))
    talk.ask(wording("questions", "what", talk.split, talk.rng), shown)
    talk.answer(f"I see {entry['caption']}.")
    return True


@functools.cache
def _concepts() -> list[dict[str, str]]:
    """Things that have pictures of several styles, but those that are held out."""
    rows = json.loads((DATA / "concepts.json").read_text(encoding="utf-8"))
    return [row for row in rows if row["split"] == "train"]


def reread(talk: Talk) -> bool:
    """The user asks about what was drawn last."""
    return talk.scene is not None and question(talk, talk.scene)


def question(talk: Talk, scene: Scene, kind: str | None = None, *shown: Image) -> bool:
    """The user asks about a scene.

    Args:
        talk: the conversation.
        scene: what is asked about.
        kind: of question, a table of wordings; None: any.
        *shown: its image, if the user shows it now.
    """
    kind = kind or talk.rng.choice(list(wordings.tables()["questions"]))
    if not shown and kind in ("what", "is it", "which"):
        return False
    written = _questions(talk, scene, kind)
    if written is None:
        return False
    slots, answer = written
    asked = wording("questions", kind, talk.split, talk.rng).format(**slots)
    talk.ask(asked[0].upper() + asked[1:], *shown)
    talk.answer(answer)
    if shown:
        talk.turn_to(scene)
    return True


def _questions(talk: Talk, scene: Scene, kind: str) -> tuple[dict[str, str], str] | None:
    """The slots of a question and its answer, or None if the scene gives no such question."""
    rng = talk.rng
    index = rng.randrange(len(scene.groups))
    group = scene.groups[index]
    thing = things()[group.thing]
    name = name_of(scene, index)
    absent = rng.choice([t for t in things().values() if t.id not in _ids(scene)])
    if kind == "what":
        return {}, f"I see {describe(replace(scene, ground=None))}."
    if kind == "count":
        if not thing.countable:
            return None
        if rng.random() < 0.15 and absent.countable:
            return {"many": absent.plural}, f"There are no {absent.plural}."
        if group.count == 1:
            return {"many": thing.plural}, f"There is one {thing.label}."
        return {"many": thing.plural}, f"There are {NUMBERS[group.count]} {thing.plural}."
    if kind == "colour":
        if not group.colour:
            return None
        verb = "is" if group.count == 1 else "are"
        question = {"it": name}
        if verb == "are":
            return None
        return question, f"{name[0].upper()}{name[1:]} {verb} {group.colour}."
    places = _places(scene)
    if kind == "where":
        if not places:
            return None
        verb = "is" if group.count == 1 else "are"
        if verb == "are":
            return None
        return {"it": name}, f"{name[0].upper()}{name[1:]} is {places[index]}."
    if kind == "side":
        if not places or len(set(places)) < len(places):
            return None
        side = places[index]
        return {"side": side}, f"{side[0].upper()}{side[1:]} is {phrase(group, rng)}."
    present = rng.random() < 0.5
    if kind == "yes or no":
        if present and group.count == 1:
            return {"x": thing.caption}, f"Yes, there is {thing.caption}."
        if present:
            return None
        seen = describe(replace(scene, ground=None, layout=scene.layout))
        return {"x": absent.caption}, f"No, there is no {absent.label}. I see {seen}."
    if len(scene.groups) > 1 or group.count > 1:
        return None
    if kind == "is it":
        if present:
            return {"x": thing.caption}, f"Yes, it is {thing.caption}."
        return {"x": absent.caption}, f"No, it is {thing.caption}."
    choices = [thing.caption, absent.caption]
    rng.shuffle(choices)
    return {"x": choices[0], "y": choices[1]}, f"It is {thing.caption}."


def _ids(scene: Scene) -> set[str]:
    return {group.thing for group in scene.groups}


def _places(scene: Scene) -> tuple[str, ...]:
    """Where each group of a scene stands, in words; empty if the layout leaves it open."""
    left, right = "on the left", "on the right"
    return {
        "left": (left, right),
        "above": ("at the top", "at the bottom"),
        "row": (left, "in the middle", right),
        "over": ("at the top", "at the bottom left", "at the bottom right"),
        "corners": (
            *("at the top left", "at the top right"),
            *("at the bottom left", "at the bottom right"),
        ),
    }.get(scene.layout, ())
