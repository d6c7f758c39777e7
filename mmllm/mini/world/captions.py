"""Scenes in words.

Every layout has several wordings; some are held out and never used in training. The first of each
list is canonical: mini's own replies use it.
"""

from __future__ import annotations

import random
import re
from typing import Literal

from mmllm.mini.world.clips import Clip
from mmllm.mini.world.scenes import Group, Scene
from mmllm.mini.world.things import things

Wording = Literal["canonical", "training", "heldout"]

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}

# layout -> wordings of training, wordings held out; a, b, c, d are the groups in their order.
_LAYOUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alone": (("{a}",), ("{a}",)),
    "left": (
        (
            "{a} to the left of {b}",
            "{b} to the right of {a}",
            "{a} left of {b}",
            "{b} right of {a}",
            "{a} on the left of {b}",
            "{b} on the right of {a}",
            "{a} on the left and {b} on the right",
            "{b} on the right and {a} on the left",
            "on the left {a}, on the right {b}",
            "{a}, and to the right of it {b}",
            "{b}, and to the left of it {a}",
            "{b} with {a} to the left of it",
            "{a} with {b} to the right of it",
            "left {a}, right {b}",
            "{b} that has {a} on the left",
        ),
        (
            "{b} with {a} on its left",
            "{a} with {b} on its right",
            "{a} on the left side, {b} on the right side",
            "{a} at the left of {b}",
        ),
    ),
    "above": (
        (
            "{a} above {b}",
            "{b} below {a}",
            "{a} over {b}",
            "{b} under {a}",
            "{a} on top of {b}",
            "{b} underneath {a}",
            "{a} at the top and {b} at the bottom",
            "{b} at the bottom and {a} at the top",
            "{b}, and above it {a}",
            "{a}, and below it {b}",
            "{b} with {a} on top",
            "{b} that has {a} over it",
            "{a} with {b} underneath",
            "{a} up in the picture, {b} down",
        ),
        (
            "{b} beneath {a}",
            "{b} with {a} above it",
            "{a} with {b} below it",
            "{a} higher up than {b}",
        ),
    ),
    "pair": (
        (
            "{a} and {b}",
            "{a} next to {b}",
            "{a} beside {b}",
            "{a} with {b}",
            "{a} and {b} side by side",
            "{a} plus {b}",
            "{a} & {b}",
            "{a} along with {b}",
            "{a} in the company of {b}",
        ),
        ("{a} together with {b}", "{a} alongside {b}", "both {a} and {b}"),
    ),
    "row": (
        (
            "{a}, {b} and {c} in a row",
            "{a}, {b} and {c}",
            "{a}, {b}, {c}",
            "{b} between {a} and {c}",
            "{a} on the left, {b} in the middle and {c} on the right",
            "from left to right {a}, {b} and {c}",
            "{a} together with {b} and {c}",
            "{a}, next to it {b}, next to that {c}",
            "{a}, {b} as well as {c}",
            "{a} plus {b} plus {c}",
            "in the middle {b}, {a} to the left and {c} to the right",
        ),
        (
            "{a}, then {b}, then {c}",
            "{a} and {b} and {c}",
            "{b} in the middle, {a} on the left and {c} on the right",
        ),
    ),
    "over": (
        (
            "{a} above {b} and {c}",
            "{b} and {c} below {a}",
            "{a} over {b} and {c}",
            "{a} at the top, {b} and {c} at the bottom",
            "{b} and {c}, and above them {a}",
            "{b} and {c} with {a} above them",
            "{a}, and below it {b} and {c}",
        ),
        ("{b} and {c} under {a}", "{a} on top of {b} and {c}"),
    ),
    "corners": (
        (
            "{a} and {b} above {c} and {d}",
            "{c} and {d} below {a} and {b}",
            "{a}, {b}, {c} and {d}",
            "{a} and {b} at the top, {c} and {d} at the bottom",
        ),
        ("{a} and {b} over {c} and {d}", "{c} and {d} under {a} and {b}"),
    ),
}

_GROUNDS = (
    ("on a {ground} background", "against a {ground} background", "with a {ground} background"),
    ("before a {ground} background", "and the background is {ground}"),
)

_SIZES = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}

_MASS = {
    *("rice", "milk", "wine", "soup", "soap", "pasta", "spaghetti"),
    *("bread", "lightning", "cheese", "corn", "coffee", "fries"),
}
"""Synonyms without a plural: "some milk"."""

# motion -> wordings of training, wordings held out; they follow the name of a thing.
_MOTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "left": (
        ("moving to the left", "going left", "sliding left", "moving from right to left"),
        ("travelling to the left", "heading left"),
    ),
    "right": (
        ("moving to the right", "going right", "sliding right", "moving from left to right"),
        ("travelling to the right", "heading right"),
    ),
    "up": (
        ("moving up", "going up", "rising", "flying up"),
        ("travelling upwards", "climbing up"),
    ),
    "down": (
        ("moving down", "going down", "falling", "sinking"),
        ("travelling downwards", "dropping down"),
    ),
    "grow": (
        ("growing", "getting bigger", "becoming larger"),
        ("getting larger and larger", "expanding"),
    ),
    "shrink": (
        ("shrinking", "getting smaller", "becoming smaller"),
        ("getting smaller and smaller", "dwindling"),
    ),
    "spin": (("spinning", "turning around", "rotating"), ("whirling round", "doing a turn")),
    "bounce": (("bouncing", "jumping", "hopping"), ("leaping up and down", "bobbing up and down")),
    "appear": (("appearing", "popping up"), ("coming into view", "showing up all of a sudden")),
}

_FRAMES = (
    ("{scene}", "a picture of {scene}", "an image of {scene}", "a drawing of {scene}"),
    ("{scene}", "a photo of {scene}", "an illustration of {scene}"),
)


def describe(scene: Scene) -> str:
    """The canonical caption of a scene: "a red cat to the left of two dogs"."""
    return caption(scene, random.Random(0), "canonical")


def caption(scene: Scene, rng: random.Random, wording: Wording = "training") -> str:
    """A caption of a scene.

    Args:
        scene: What it says.
        rng: Chooses among wordings.
        wording: "canonical" takes the first of every list, "training" any of those of training,
            "heldout" any of those that training never sees.
    """
    split = 1 if wording == "heldout" else 0

    def choose(options: tuple[str, ...], plain: float) -> str:
        if wording == "canonical" or (wording == "training" and rng.random() < plain):
            return options[0]
        return rng.choice(options)

    names = [phrase(group, rng, wording) for group in scene.groups]
    slots = dict(zip("abcd", names, strict=False))
    text = choose(_LAYOUTS[scene.layout][split], 0.2).format(**slots)
    if scene.ground:
        text += " " + choose(_GROUNDS[split], 0.4).format(ground=scene.ground)
    return choose(_FRAMES[split], 0.7).format(scene=text)


def announce(scene: Scene) -> str:
    """What a reply says before the picture of a scene: "Here is a red cat."."""
    return f"Here {'are' if is_plural(scene.groups[0]) else 'is'} {describe(scene)}."


def is_plural(group: Group) -> bool:
    """Whether a verb that follows it is one of several: two cats, some grapes, but some bread."""
    thing = things()[group.thing]
    return group.count > 1 or (thing.caption == f"some {thing.plural}" and thing.plural[-1] == "s")


def announce_clip(clip: Clip) -> str:
    """What a reply says before a clip: "Here is a clip of a cat spinning."."""
    return f"Here is a clip of {describe_clip(clip)}."


def describe_clip(clip: Clip) -> str:
    """The canonical caption of a clip: "a cat moving to the left and a dog spinning"."""
    return clip_caption(clip, random.Random(0), "canonical")


def clip_caption(clip: Clip, rng: random.Random, wording: Wording = "training") -> str:
    """A caption of a clip; the arguments are those of `caption`."""
    split = 1 if wording == "heldout" else 0
    parts = []
    for group, motion in zip(clip.scene.groups, clip.motions, strict=True):
        name = phrase(group, rng, wording)
        if motion is None:
            parts.append(name)
            continue
        options = _MOTIONS[motion][split]
        canonical = wording == "canonical" or (wording == "training" and rng.random() < 0.3)
        parts.append(f"{name} {options[0] if canonical else rng.choice(options)}")
    text = " and ".join(parts)
    if clip.scene.ground:
        grounds = _GROUNDS[split]
        ground = grounds[0] if wording == "canonical" else rng.choice(grounds)
        text += " " + ground.format(ground=clip.scene.ground)
    return text


def phrase(group: Group, rng: random.Random, wording: Wording = "canonical") -> str:
    """A group as a noun phrase with its article or number: "two small red cats"."""
    thing = things()[group.thing]
    varied = wording != "canonical"
    noun = thing.label
    others = thing.heldout_synonyms if wording == "heldout" else thing.synonyms
    if varied and group.count == 1 and others and rng.random() < 0.2:
        noun = rng.choice(others)
    adjectives = []
    if group.size:
        sizes = _SIZES[group.size]
        adjectives.append(rng.choice(sizes) if varied else sizes[0])
    if group.colour:
        adjectives.append(group.colour)
    if group.count > 1:
        number = NUMBERS[group.count]
        if varied and rng.random() < 0.15:
            number = str(group.count)
        return " ".join([number, *adjectives, thing.plural])
    mass = thing.caption.startswith("some ") or noun in _MASS
    if noun != thing.label:
        text = " ".join([*adjectives, noun])
        return f"some {text}" if mass else with_article(text)
    found = re.fullmatch(r"(an?|some|the) (.*)", thing.caption)
    if found is None:
        raise ValueError(f"things.json: the caption {thing.caption!r} has no article")
    article, rest = found.groups()
    text = " ".join([*adjectives, rest])
    if article == "some":
        return f"some {text}"
    if varied and rng.random() < 0.08:
        return f"one {text}"
    return with_article(text) if adjectives else thing.caption


def with_article(text: str) -> str:
    """ "orange cat" -> "an orange cat"."""
    vowel = text[0].lower() in "aeiou" and not text.lower().startswith(("uni", "ufo", "eu"))
    return f"{'an' if vowel else 'a'} {text}"
