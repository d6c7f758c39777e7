"""Changes of a scene, as people ask for them: "make it blue", "without the cat", "swap them".

Every function returns a new scene and leaves the old one as it was. A change that a scene cannot
take (a fifth thing, a colour for something of many hues) is an EditError that says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmllm.mini.world.scenes import MOST, Group, Layout, Scene, Size
from mmllm.mini.world.things import colourable, things


class EditError(ValueError):
    """Why a scene cannot be changed so."""


def recolour(
    scene: Scene, index: int, colour: str | None, paintable: Sequence[str] | None = None
) -> Scene:
    """The scene with one group in another colour; None gives back the colours of the thing.

    Args:
        scene: what there is.
        index: of the group.
        colour: one of COLOURS, or None.
        paintable: the things that take a colour; those that are rendered in one by default.
    """
    group = _group(scene, index)
    if colour is not None and group.thing not in (paintable or colourable()):
        raise EditError(f"{things()[group.thing].caption} keeps its colours")
    return _with(scene, index, replace(group, colour=colour))


def set_count(scene: Scene, index: int, count: int) -> Scene:
    """The scene with another number of one group's things."""
    group = _group(scene, index)
    if count < 1:
        raise EditError("a group holds at least one thing")
    if count > 1 and not things()[group.thing].countable:
        raise EditError(f"{things()[group.thing].label} cannot be counted")
    return _with(scene, index, replace(group, count=count, size=None if count > 1 else group.size))


def resize(scene: Scene, index: int, size: Size | None) -> Scene:
    """The scene with one group bigger or smaller."""
    return _with(scene, index, replace(_group(scene, index), size=size))


def bigger(scene: Scene, index: int) -> Scene:
    """One size up: small, ordinary, big."""
    return _step(scene, index, 1)


def smaller(scene: Scene, index: int) -> Scene:
    """One size down."""
    return _step(scene, index, -1)


def become(scene: Scene, index: int, thing: str) -> Scene:
    """The scene with one group's thing replaced by another; its colour goes if it cannot stay."""
    group = _group(scene, index)
    if any(other.thing == thing for other in scene.groups):
        raise EditError(f"there is {things()[thing].caption} already")
    colour = group.colour if thing in colourable() else None
    count = group.count if things()[thing].countable else 1
    return _with(scene, index, replace(group, thing=thing, colour=colour, count=count))


def on_ground(scene: Scene, ground: str | None) -> Scene:
    """The scene on another background."""
    return replace(scene, ground=ground)


def remove(scene: Scene, index: int) -> Scene:
    """The scene without one of its groups; the others close up in the order that they had."""
    _group(scene, index)
    if len(scene.groups) == 1:
        raise EditError("nothing would be left")
    groups = scene.groups[:index] + scene.groups[index + 1 :]
    layouts: dict[int, Layout] = {1: "alone", 2: "pair", 3: "row"}
    layout = layouts[len(groups)]
    if scene.layout == "over":
        layout = "pair" if index == 0 else "above"
    if scene.layout == "row":
        layout = "left"
    return replace(scene, groups=groups, layout=layout)


def add(scene: Scene, group: Group, where: str = "next to") -> Scene:
    """The scene with one more group.

    Args:
        scene: It holds one or two groups.
        group: What comes in.
        where: "left", "right", "above", "below" or "next to" what there is.
    """
    if any(other.thing == group.thing for other in scene.groups):
        raise EditError(f"there is {things()[group.thing].caption} already")
    if len(scene.groups) == 1:
        return _check(_pair(scene, group, where))
    if len(scene.groups) == 2:
        return _check(_third(scene, group, where))
    raise EditError("a scene holds at most three groups that can be added to")


def swap(scene: Scene) -> Scene:
    """Two groups in one another's place."""
    if len(scene.groups) != 2:
        raise EditError(f"two groups can be swapped, not {len(scene.groups)}")
    return replace(scene, groups=scene.groups[::-1])


def move(scene: Scene, index: int, where: str) -> Scene:
    """One of two groups "left", "right", "above" or "below" the other."""
    if len(scene.groups) != 2:
        raise EditError(f"one of two groups can be moved, not of {len(scene.groups)}")
    group, other = _group(scene, index), scene.groups[1 - index]
    return _pair(replace(scene, groups=(other,), layout="alone"), group, where)


def _group(scene: Scene, index: int) -> Group:
    if not 0 <= index < len(scene.groups):
        raise EditError(f"the scene holds {len(scene.groups)} groups; there is no group {index}")
    return scene.groups[index]


def _with(scene: Scene, index: int, group: Group) -> Scene:
    groups = (*scene.groups[:index], group, *scene.groups[index + 1 :])
    return _check(replace(scene, groups=groups))


def _check(scene: Scene) -> Scene:
    count = sum(group.count for group in scene.groups)
    if count > MOST:
        raise EditError(f"a scene holds at most {MOST} things, not {count}")
    return scene


def _step(scene: Scene, index: int, step: int) -> Scene:
    sizes: list[Size | None] = ["small", None, "big"]
    place = sizes.index(_group(scene, index).size) + step
    if not 0 <= place < len(sizes):
        raise EditError(f"it is as {'big' if step > 0 else 'small'} as it gets")
    return resize(scene, index, sizes[place])


def _pair(scene: Scene, group: Group, where: str) -> Scene:
    first = scene.groups[0]
    orders: dict[str, tuple[tuple[Group, Group], Layout]] = {
        "left": ((group, first), "left"),
        "right": ((first, group), "left"),
        "above": ((group, first), "above"),
        "below": ((first, group), "above"),
        "next to": ((first, group), "pair"),
    }
    if where not in orders:
        raise EditError(f"unknown place {where!r}; known are {', '.join(orders)}")
    groups, layout = orders[where]
    return replace(scene, groups=groups, layout=layout)


def _third(scene: Scene, group: Group, where: str) -> Scene:
    one, two = scene.groups
    if scene.layout == "above":
        raise EditError("a third group has no place above or below two others")
    orders: dict[str, tuple[tuple[Group, ...], Layout]] = {
        "left": ((group, one, two), "row"),
        "right": ((one, two, group), "row"),
        "next to": ((one, two, group), "row"),
        "above": ((group, one, two), "over"),
    }
    if where not in orders:
        raise EditError(f"a third group can stand {', '.join(orders)}, not {where!r}")
    groups, layout = orders[where]
    return replace(scene, groups=groups, layout=layout)
