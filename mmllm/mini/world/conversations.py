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
from mmllm.mini.world import unknown, wordings
from mmllm.mini.world.across import (
    animate_picture,
    draw_and_animate,
    draw_and_play,
    draw_sound,
    hear_picture,
)
from mmllm.mini.world.captions import (
    caption,
    clip_caption,
    describe_clip,
    with_article,
)
from mmllm.mini.world.change_requests import edit
from mmllm.mini.world.clips import (
    MOTIONS,
    Clip,
    draw_clip,
    draw_heldout_clip,
    draw_training_clip,
)
from mmllm.mini.world.hearing import hear, play, play_scene, refuse_sound, replay
from mmllm.mini.world.memory import name_last, remember
from mmllm.mini.world.negations import negate
from mmllm.mini.world.questions import describe_picture, describe_scene, read, reread
from mmllm.mini.world.scenes import Group, Scene
from mmllm.mini.world.talk import Talk
from mmllm.mini.world.things import COLOURS, things
from mmllm.mini.world.wordings import Split, wording

_GERUNDS = {
    "left": "moving to the left",
    "right": "moving to the right",
    "up": "moving up",
    "down": "moving down",
    "grow": "growing",
    "shrink": "shrinking",
    "spin": "spinning",
    "bounce": "bouncing",
    "appear": "appearing",
}
_VERBS = {
    "left": "move to the left",
    "right": "move to the right",
    "up": "rise",
    "down": "fall",
    "grow": "grow",
    "shrink": "shrink",
    "spin": "spin",
    "bounce": "bounce",
    "appear": "appear",
}


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
    return _draw(talk, Scene((Group(talk.rng.choice(list(things()))),)))


def draw_typed(talk: Talk) -> bool:
    """The user asks for one thing, or a scene, and misspells what matters."""
    if talk.rng.random() < 0.6:
        return _draw(talk, Scene((Group(talk.rng.choice(list(things()))),)), typed=True)
    return _draw(talk, talk.draw_scene(), typed=True)


def _draw(talk: Talk, scene: Scene, *, typed: bool = False) -> bool:
    words = caption(scene, talk.rng, talk.wording)
    for frame in ("a picture of ", "an image of ", "a drawing of ", "a photo of "):
        words = words.removeprefix(frame)
    words = words.removeprefix("an illustration of ")
    text = wordings.request("draw", words, talk.split, talk.rng)
    talk.ask(wordings.misspell(text, words, talk.rng) if typed else text, typed=typed)
    talk.show(scene)
    return True


def animate(talk: Talk) -> bool:
    """The user asks for a clip, or for what was drawn to move."""
    scene = talk.scene
    if scene and len(scene.groups) == 1 and scene.groups[0].count == 1 and talk.rng.random() < 0.5:
        motion = talk.rng.choice(list(MOTIONS))
        clip = Clip(replace(scene, groups=(replace(scene.groups[0], size=None),)), (motion,))
        slots = {"motion": _GERUNDS[motion], "motion_verb": _VERBS[motion]}
        words = wording("edits", "animate", talk.split, talk.rng).format(**slots)
        if _VERBS[motion] not in words and _GERUNDS[motion] not in words:
            clip = replace(clip, motions=("bounce",))  # what moves for no stated reason bounces
        text = words[0].upper() + words[1:]
    else:
        clip = draw_clip(talk.rng)
        words = clip_caption(clip, talk.rng, talk.wording)
        text = wordings.request("animate", words, talk.split, talk.rng)
    if not talk.allowed_clip(clip):
        return False
    talk.ask(text)
    talk.scene = clip.scene if len(clip.scene.groups) == 1 else None  # what "it" is now
    talk.show_clip(clip)
    return True


def watch(talk: Talk) -> bool:
    """The user shows a clip and asks what happens."""
    clip = (draw_heldout_clip if talk.is_heldout else draw_training_clip)(talk.rng)
    talk.ask(wording("shown", "watch", talk.split, talk.rng), talk.video(clip))
    plain = replace(clip, scene=replace(clip.scene, ground=None))
    talk.answer(f"I see {describe_clip(plain)}.")
    return True


def small_talk(talk: Talk) -> bool:
    """Greetings, thanks, and what it is and can do."""
    tables = wordings.tables()["talk"]
    kind = talk.rng.choice(list(tables))
    talk.ask(wording("talk", kind, talk.split, talk.rng))
    talk.answer(talk.rng.choice(tables[kind]["answers"]))
    return True


def _noun_phrase(word: str) -> str:
    """An unknown thing as it is asked for: "a scooter", "ice skates", "the Great Wall"."""
    if word[0].isupper():
        return f"the {word}"
    is_plural = word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return word if is_plural else with_article(word)


def refuse(talk: Talk) -> bool:
    """The user asks for what is not in the world: one honest sentence, and the nearest thing."""
    rng = talk.rng

    def pick(words: Sequence[str]) -> str:
        return rng.choice([word for word in words if unknown.is_heldout(word) is talk.is_heldout])

    kind = rng.choice(("thing", "thing", "thing", "number", "colour", "language"))
    if kind == "language":
        talk.ask(pick(unknown.LANGUAGES))
        talk.answer("I only understand English. Try: draw a cat.")
        return True
    known, offer = things()[rng.choice(list(things()))], None
    if kind == "thing":
        word = pick(list(unknown.things()))
        near = things()[unknown.things()[word]]
        asked = _noun_phrase(word)
        if asked != word and rng.random() < 0.3:
            asked = with_article(f"{rng.choice(list(COLOURS))} {word}")
        reply = f"I cannot draw {asked} yet. The nearest that I know is {near.caption}."
        offer = Scene((Group(near.id),))
    elif kind == "number":
        word = pick(list(unknown.NUMBERS))
        if not known.countable:
            return False
        asked = f"{word} {known.plural}"
        many = f"{unknown.NUMBERS[word]} {known.plural}"
        reply = f"I cannot draw {many}: I can count to four. Shall I draw four {known.plural}?"
        offer = Scene((Group(known.id, 4),))
    else:
        word = pick(unknown.COLOURS)
        asked = with_article(f"{word} {known.label}")
        reply = f"I do not know the colour {word}. Shall I draw {known.caption} in another colour?"
    talk.ask(wordings.request("draw", asked, talk.split, rng))
    talk.answer(reply)
    talk.offer = offer
    return True


def accept(talk: Talk) -> bool:
    """The user takes what was offered instead."""
    offer = talk.offer
    if offer is None or not talk.allowed(offer):
        return False
    talk.ask(talk.rng.choice(wordings.tables()["accept"][talk.split]))
    talk.show(offer)
    return True


KINDS: dict[str, tuple[Exchange, ...]] = {
    "draw": (draw,),
    "single": (draw_thing,),
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
    "accept": (refuse, accept),
    "negate": (negate,),
    "memory": (draw, draw, draw, edit, edit, animate, play, remember, remember, remember),
    "last": (draw, draw_thing, play, animate, name_last),
    "talk": (small_talk,),
    "edits": (draw, edit, edit, edit),
    "replay": (play, replay),
    "mixed": (
        *(draw, edit, edit, animate, read, reread, remember, small_talk, refuse),
        *(play, replay, play_scene, hear, watch, negate, accept),
    ),
}
"""Kind of conversation -> what may happen in it; those in _BEGINNING begin with the
first, those in _ENDING end with the last."""
_BEGINNING = ("edits", "replay", "memory", "accept")
_ENDING = ("memory", "last", "accept")
_TRIES = 20
_LENGTHS = {
    "edits": (2, 4),
    "replay": (2, 3),
    "memory": (2, 6),
    "last": (2, 3),
    "accept": (2, 2),
    "mixed": (3, 8),
}
_SHARES = {
    "draw": 0.07,
    "single": 0.04,
    "typed": 0.15,
    "describe": 0.02,
    "picture": 0.03,
    "read": 0.06,
    "animate": 0.04,
    "watch": 0.02,
    "play": 0.05,
    "hear": 0.03,
    "across": 0.10,
    "refuse": 0.05,
    "accept": 0.02,
    "negate": 0.04,
    "memory": 0.04,
    "last": 0.03,
    "talk": 0.03,
    "edits": 0.08,
    "replay": 0.03,
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
