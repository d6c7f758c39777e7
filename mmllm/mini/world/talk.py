"""A conversation being written: its messages, and what was drawn and asked for so far."""

from __future__ import annotations

import random
from typing import Any

from mmllm.conversation import Audio, ContentPart, Image, Medium, Message, Video, assistant, user
from mmllm.mini.world.captions import (
    Wording,
    announce,
    announce_clip,
    describe,
    describe_clip,
)
from mmllm.mini.world.clips import FPS, Clip, render_clip
from mmllm.mini.world.clips import is_training as is_training_clip
from mmllm.mini.world.rendering import render
from mmllm.mini.world.scenes import (
    Group,
    Scene,
    draw_heldout_scene,
    draw_training_scene,
    is_training,
)
from mmllm.mini.world.sounds import RATE, Soundscape, render_soundscape
from mmllm.mini.world.things import colourable, things
from mmllm.mini.world.wordings import Split, roughen


class Talk:
    """A conversation being written.

    Args:
        rng: Where chance comes from.
        split: Whose wordings and combinations it uses.
        targets: Whether replies hold the media that they show; else their captions alone.
    """

    def __init__(self, rng: random.Random, split: Split, targets: bool = True):
        self.rng = rng
        self.targets = targets
        self.split: Split = split
        self.messages: list[Message] = []
        self.scene: Scene | None = None  # what was drawn or shown last
        self.scape: Soundscape | None = None  # what was played last
        self.clip: Clip | None = None  # the last medium, where it is a clip
        self.offer: Scene | None = None  # what was offered instead of what cannot be drawn
        self.made: list[tuple[str, str]] = []  # (verb in the past, caption) of all that was made
        # Place of a reply among the messages -> what its medium is to show.
        self.shown: dict[int, Scene | Clip | Soundscape] = {}

    @property
    def is_heldout(self) -> bool:
        """Whether the split is the held-out one."""
        return self.split == "heldout"

    @property
    def wording(self) -> Wording:
        """How scenes are put by the user."""
        return "heldout" if self.split == "heldout" else "training"

    @property
    def paintable(self) -> tuple[str, ...]:
        """The things that may be asked for in a colour; all, where nothing is rendered: the image
        decoder paints cars blue, though it has learned colours on things of one hue alone."""
        return colourable() if self.targets else tuple(things())

    def ask(self, text: str, *media: Medium, typed: bool = False) -> None:
        """A turn of the user; a medium stands before or after the words.

        Args:
            text: what is asked.
            *media: what is shown with it.
            typed: whether `text` is as it is typed already, slips and all.
        """
        self.offer = None
        parts = [text if typed else roughen(text, self.rng), *media]
        if self.rng.random() < 0.5:
            parts.reverse()
        self.messages.append(user(*parts))

    def answer(self, *parts: Any) -> None:
        """A turn of the assistant: words and media."""
        self.messages.append(assistant(*parts))

    def turn_to(self, scene: Scene) -> None:
        """Make a scene what the conversation is about."""
        self.scene, self.scape, self.clip = scene, None, None

    def show(self, scene: Scene) -> None:
        """Answer with a scene: in words, then as an image."""
        words = describe(scene)
        self.shown[len(self.messages)] = scene
        self.answer(announce(scene), self.image(scene, words))
        self.turn_to(scene)
        self.made.append(("drew", words))

    def show_clip(self, clip: Clip, *before: ContentPart) -> None:
        """Answer with a clip: in words, then as a video.

        Args:
            clip: what it shows.
            *before: what the reply holds in front of them.
        """
        words, announced = describe_clip(clip), announce_clip(clip)
        self.shown[len(self.messages)] = clip
        if before:
            announced = f"And h{announced[1:]}"
        self.answer(*before, announced, self.video(clip, words))
        self.scape, self.clip = None, clip
        self.scene = clip.scene if len(clip.scene.groups) == 1 else None  # what "it" is now
        self.made.append(("animated", words))

    def image(self, scene: Scene, words: str | None = None) -> Image:
        """The image of a scene; with its caption for a reply."""
        if words and not self.targets:
            return Image(caption=words)
        return Image(array=render(scene, self.rng), caption=words)

    def video(self, clip: Clip, words: str | None = None) -> Video:
        """The same of a clip."""
        if words and not self.targets:
            return Video(caption=words)
        return Video(array=render_clip(clip, self.rng), fps=FPS, caption=words)

    def audio(self, scape: Soundscape, words: str | None = None) -> Audio:
        """The same of a soundscape."""
        if words and not self.targets:
            return Audio(caption=words)
        wave = render_soundscape(scape, self.rng, heldout_takes=self.is_heldout)
        return Audio.from_numpy(wave, RATE, caption=words)

    def draw_thing(self) -> Scene:
        """A scene of one thing, as it is."""
        return Scene((Group(self.rng.choice(list(things()))),))

    def draw_scene(self) -> Scene:
        """A scene of the split."""
        if self.split == "training":
            return draw_training_scene(self.rng)
        kinds = ("colour", "count", "pair", "pair, colours", "groups", "three")
        return draw_heldout_scene(self.rng.choice(kinds), self.rng)

    def allowed(self, scene: Scene) -> bool:
        """Whether a scene may occur: in training none that is held out."""
        return self.split == "heldout" or is_training(scene)

    def allowed_clip(self, clip: Clip) -> bool:
        """The same of a clip."""
        return self.split == "heldout" or is_training_clip(clip)


def name_of(scene: Scene, index: int) -> str:
    """How one refers to a group: "the cat", "the dogs"."""
    group = scene.groups[index]
    thing = things()[group.thing]
    return f"the {thing.label if group.count == 1 else thing.plural}"
