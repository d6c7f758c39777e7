"""Conversations about scenes: a dataset that is written while it is read.

A conversation has one to eight exchanges. What was drawn last is remembered as a scene, so that an
edit ("make it blue", "now with a dog on the left") is answered by the changed scene, in words first
and then as an image: "Here is a blue cat." and the image.

Every conversation is a pure function of its split and number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmllm.conversation import Message
from mmllm.errors import ConfigError
from mmllm.mini.world import wordings
from mmllm.mini.world.across import (
    animate_picture,
    draw_and_animate,
    draw_and_play,
    draw_made,
    draw_sound,
    hear_picture,
)
from mmllm.mini.world.captions import caption, describe
from mmllm.mini.world.change_requests import edit
from mmllm.mini.world.hearing import hear, play, play_scene, refuse_sound, replay
from mmllm.mini.world.memory import name_last, recall, remember
from mmllm.mini.world.motions import animate, change_motion, reverse, watch
from mmllm.mini.world.negations import negate
from mmllm.mini.world.questions import describe_picture, describe_scene, read, reread
from mmllm.mini.world.refusals import accept, refuse, refuse_number, refuse_thing
from mmllm.mini.world.scenes import Group, Scene
from mmllm.mini.world.talk import Talk
from mmllm.mini.world.things import COLOURS, things
from mmllm.mini.world.wordings import Split, wording


@dataclass(frozen=True)
class ConversationsConfig:
    """Settings of a dataset of conversations about scenes.

    Attributes:
        count: how many there are; the same number gives the same conversations.
        split: "training", or "heldout" for wordings and combinations that training never has.
        kinds: only conversations of these kinds (names of KINDS); all by default, in a fixed
            mixture.
        targets: whether replies hold the media that they show, as the loss `denoise` needs them;
            else their captions alone, and nothing is rendered for them.
        share: weight of the dataset in the mixture.
    """

    count: int = 20_000
    split: str = "training"
    kinds: tuple[str, ...] = ()
    targets: bool = True
    share: float = 1.0


Exchange = Callable[[Talk], bool]
"""Writes one exchange; False, with nothing written, if the conversation does not allow it."""


def draw(talk: Talk) -> bool:
    """The user asks for a scene."""
    return _draw(talk, talk.draw_scene())


def draw_thing(talk: Talk) -> bool:
    """The user asks for one thing, as it is: what is unknown is mostly asked for like this."""
    scene = talk.draw_thing()
    if talk.rng.random() < wordings.BARE:
        talk.ask(things()[scene.groups[0].thing].label)
        talk.show(scene)
        return True
    return _draw(talk, scene)


def draw_coloured(talk: Talk) -> bool:
    """The user asks for one thing in a colour, its own or any other."""
    group = Group(talk.rng.choice(talk.paintable), colour=talk.rng.choice(list(COLOURS)))
    return talk.allowed(Scene((group,))) and _draw(talk, Scene((group,)))


def draw_typed(talk: Talk) -> bool:
    """The user asks for one thing, or a scene, and misspells what matters."""
    if talk.rng.random() < 0.6:
        return _draw(talk, talk.draw_thing(), typed=True)
    return _draw(talk, talk.draw_scene(), typed=True)


def draw_few(talk: Talk) -> bool:
    """The user asks for two or three things, in the fewest words: a cat and a dog."""
    scene = replace(talk.draw_scene(), ground=None)
    if not 2 <= len(scene.groups) <= 3:
        return False
    if talk.rng.random() < 0.7:
        scene = replace(scene, layout="pair" if len(scene.groups) == 2 else "row")
    words = describe(scene) if talk.split == "training" else None
    return _draw(talk, scene, words)


def _draw(talk: Talk, scene: Scene, words: str | None = None, *, typed: bool = False) -> bool:
    words = words or caption(scene, talk.rng, talk.wording)
    for frame in ("a picture of ", "an image of ", "a drawing of ", "a photo of "):
        words = words.removeprefix(frame)
    words = words.removeprefix("an illustration of ")
    text = wordings.request("draw", words, talk.split, talk.rng)
    talk.ask(wordings.misspell(text, words, talk.rng) if typed else text, typed=typed)
    talk.show(scene)
    return True


def small_talk(talk: Talk) -> bool:
    """Greetings, thanks, and what it is and can do."""
    tables = wordings.tables()["talk"]
    kind = talk.rng.choice(list(tables))
    talk.ask(wording("talk", kind, talk.split, talk.rng))
    talk.answer(talk.rng.choice(tables[kind]["answers"]))
    return True


def follow(talk: Talk) -> bool:
    """The user goes on with what was made last: changes it, or asks for it in another medium."""
    made = (edit, play_scene, draw_made, change_motion, reverse, replay)
    return any(exchange(talk) for exchange in talk.rng.sample(made, len(made)))


KINDS: dict[str, tuple[Exchange, ...]] = {
    "draw": (draw,),
    "single": (draw_thing,),
    "colour": (draw_coloured,),
    "few": (draw_few,),
    "typed": (draw_typed,),
    "describe": (describe_scene,),
    "picture": (describe_picture,),
    "read": (read,),
    "animate": (animate,),
    "watch": (watch,),
    "play": (play,),
    "hear": (hear,),
    "across": (hear_picture, draw_sound, animate_picture, draw_and_play, draw_and_animate),
    "refuse": (refuse, refuse, refuse, refuse_sound),
    "unknown": (refuse_thing,),
    "number": (refuse_number,),
    "accept": (refuse, accept),
    "negate": (negate,),
    "memory": (draw, draw, draw, edit, edit, animate, play, remember, remember, remember),
    "last": (draw, draw_thing, play, animate, name_last),
    "recall": (draw, draw_thing, draw, play, small_talk, edit, recall),
    "talk": (small_talk,),
    "edits": (draw, edit, edit, edit),
    "follow": (draw_thing, draw_few, animate, play, edit, follow),
    "replay": (play, replay),
    "mixed": (
        *(draw, edit, edit, animate, read, reread, remember, small_talk, refuse),
        *(play, replay, play_scene, hear, watch, negate, accept, small_talk, recall, follow),
    ),
}
"""Kind of conversation -> what may happen in it; those in _BEGINNING begin with the
first, those in _ENDING end with the last."""
_BEGINNING = ("edits", "replay", "memory", "accept", "recall")
_ENDING = ("memory", "last", "recall", "accept", "follow")
_TRIES = 20
_LENGTHS = {
    "edits": (2, 4),
    "follow": (2, 4),
    "replay": (2, 3),
    "memory": (2, 6),
    "last": (2, 3),
    "recall": (2, 5),
    "accept": (2, 2),
    "mixed": (3, 8),
}
_SHARES = {
    "draw": 0.05,
    "single": 0.04,
    "colour": 0.04,
    "few": 0.05,
    "typed": 0.12,
    "describe": 0.02,
    "picture": 0.02,
    "read": 0.06,
    "animate": 0.05,
    "watch": 0.02,
    "play": 0.04,
    "hear": 0.03,
    "across": 0.06,
    "refuse": 0.04,
    "unknown": 0.03,
    "number": 0.02,
    "accept": 0.02,
    "negate": 0.04,
    "memory": 0.03,
    "last": 0.02,
    "recall": 0.03,
    "talk": 0.03,
    "edits": 0.08,
    "follow": 0.06,
    "replay": 0.02,
    "mixed": 0.07,
}


def converse(kind: str, split: Split, rng: random.Random, *, targets: bool = True) -> Talk:
    """Write a conversation of a kind.

    Args:
        kind: one of KINDS.
        split: whose wordings and combinations it uses.
        rng: where chance comes from.
        targets: whether replies hold the media that they show, or their captions alone.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of conversation {kind!r}; known are {', '.join(KINDS)}")
    length = rng.randint(*_LENGTHS.get(kind, (1, 1)))
    talk = None
    while talk is None:
        talk = _attempt(kind, length, Talk(rng, split, targets))
    return talk


def _attempt(kind: str, length: int, talk: Talk) -> Talk | None:
    """Write so many exchanges; None where the conversation took a turn that allows no next one."""
    exchanges = KINDS[kind]
    for _ in range(_TRIES * length):
        if len(talk.messages) == 2 * length:
            return talk
        exchange = talk.rng.choice(exchanges)
        if kind in _BEGINNING and not talk.messages:
            exchange = exchanges[0]
        elif kind in _ENDING and len(talk.messages) == 2 * length - 2:
            exchange = exchanges[-1]
        exchange(talk)
    return None


class Conversations:
    """A dataset of conversations about scenes, see ConversationsConfig."""

    def __init__(self, config: ConversationsConfig):
        self.config = config
        self.share = config.share
        self.split: Split = "heldout" if config.split == "heldout" else "training"

    def __len__(self) -> int:
        return self.config.count

    def conversation(self, index: int, rng: np.random.Generator) -> Sequence[Message]:
        """See DataSource."""
        chance = random.Random(f"{self.split} {index}")
        kinds = self.config.kinds or tuple(_SHARES)
        shares = [_SHARES[kind] for kind in kinds]
        kind = chance.choices(kinds, shares)[0]
        return converse(kind, self.split, chance, targets=self.config.targets).messages

    def name(self, index: int) -> str:
        """See DataSource."""
        return f"{self.split} {index}"


def build(config: ConversationsConfig, *, where: str) -> Conversations:
    """Open the dataset of a config; `where` is its place in the config, for messages."""
    unknown_kinds = [kind for kind in config.kinds if kind not in KINDS]
    if unknown_kinds:
        raise ConfigError(f"{where}.kinds: unknown {unknown_kinds}; known are {', '.join(KINDS)}")
    if config.split not in ("training", "heldout"):
        raise ConfigError(f"{where}.split: expected training or heldout, got {config.split!r}")
    return Conversations(config)
