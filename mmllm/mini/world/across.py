"""Exchanges from one medium to another, and two media in one reply."""

from __future__ import annotations

import numpy as np
import PIL.Image

from mmllm.conversation import Image
from mmllm.mini.world import wordings
from mmllm.mini.world.clips import Clip
from mmllm.mini.world.hearing import sound_of, sound_or_refusal
from mmllm.mini.world.scenes import Group, Scene, draw_training_scene
from mmllm.mini.world.sounds import Soundscape, Voice, describe_soundscape
from mmllm.mini.world.talk import Talk
from mmllm.mini.world.things import DATA, things
from mmllm.mini.world.wordings import prompt, wording

STYLES = ("fluent-flat", "noto")
"""Other styles of pictures that training may show."""
_KNOWN = 0.85
"""Share of the pictures whose sound is asked for that have one."""


def shown(talk: Talk, thing: str) -> Image:
    """A picture of one thing: as in scenes, or, where there is one, in another style."""
    file = DATA / "pictures" / talk.rng.choice(STYLES) / f"{thing}.webp"
    if talk.rng.random() < 0.5 and file.exists():
        with PIL.Image.open(file) as picture:
            return Image(array=np.asarray(picture.convert("RGB")))
    return talk.image(Scene((Group(thing),)))


def hear_picture(talk: Talk) -> bool:
    """The user shows a thing and asks what it sounds like."""
    known = [thing for thing in things() if sound_of(thing)]
    thing = talk.rng.choice(known if talk.rng.random() < _KNOWN else list(things()))
    picture = shown(talk, thing)
    talk.ask(_either(talk, "edits", "sound", "picture_to_sound"), picture)
    talk.turn_to(Scene((Group(thing),)))
    return sound_or_refusal(talk, thing)


def draw_sound(talk: Talk) -> bool:
    """The user plays the sound of a thing, as it is, louder or softer, and asks for its picture."""
    known = _makers()
    name = talk.rng.choice(list(known))
    voice = Voice(name, loudness=talk.rng.choice((None, None, "loud", "soft")))
    sound = talk.audio(Soundscape((voice,)))
    talk.ask(_either(talk, "shown", "draw sound", "sound_to_picture"), sound)
    talk.show(Scene((Group(known[name]),)))
    return True


def draw_made(talk: Talk) -> bool:
    """The user asks for a picture of what moved or sounded last."""
    if talk.clip and talk.scene:
        scene = talk.scene
    elif talk.scape and len(talk.scape.voices) == 1:
        thing = _makers().get(talk.scape.voices[0].sound)
        if thing is None:
            return False
        scene = Scene((Group(thing),))
    else:
        return False
    talk.ask(wording("edits", "still", talk.split, talk.rng))
    talk.show(scene)
    return True


def _makers() -> dict[str, str]:
    """Sound -> the thing that makes it."""
    return {name: thing for thing in things() if (name := sound_of(thing))}


def animate_picture(talk: Talk) -> bool:
    """The user shows a thing, or a coloured one, and asks for it to move: it bounces."""
    if talk.rng.random() < 0.3:
        scene = Scene(draw_training_scene(talk.rng).groups)
        group = scene.groups[0]
        if len(scene.groups) > 1 or group.count > 1 or group.size:
            return False
        picture = talk.image(scene)
    else:
        thing = talk.rng.choice(list(things()))
        scene, picture = Scene((Group(thing),)), shown(talk, thing)
    clip = Clip(scene, ("bounce",))
    if not talk.allowed_clip(clip):
        return False
    talk.ask(prompt("picture_to_clip", talk.split, talk.rng), picture)
    talk.show_clip(clip)
    return True


def draw_and_play(talk: Talk) -> bool:
    """The user asks for the picture and the sound of a thing at once."""
    thing = talk.rng.choice([thing for thing in things() if sound_of(thing)])
    scape = Soundscape((Voice(sound_of(thing) or ""),))
    if talk.rng.random() < 0.3:
        text = talk.rng.choice(wordings.tables()["both"][talk.split])
        text = wordings.as_sentence(text.format(x=things()[thing].caption))
    else:
        text = _both(talk, "draw_and_play", thing)
    talk.ask(text)
    talk.show(Scene((Group(thing),)))
    words = describe_soundscape(scape)
    drawn = talk.messages.pop().parts
    talk.answer(*drawn, f"And here is the sound of {words}.", talk.audio(scape, words))
    talk.made.append(("played", words))
    return True


def draw_and_animate(talk: Talk) -> bool:
    """The user asks for the picture and a clip of a thing at once."""
    scene = talk.draw_thing()
    clip = Clip(scene, ("bounce",))
    if not talk.allowed_clip(clip):
        return False
    talk.ask(_both(talk, "draw_and_animate", scene.groups[0].thing))
    talk.show(scene)
    talk.show_clip(clip, *talk.messages.pop().parts)
    return True


def _both(talk: Talk, kind: str, thing: str) -> str:
    return prompt(kind, talk.split, talk.rng).format(caption=things()[thing].caption)


def _either(talk: Talk, group: str, kind: str, prompts: str) -> str:
    if talk.rng.random() < 0.3:
        return wording(group, kind, talk.split, talk.rng)
    return prompt(prompts, talk.split, talk.rng)
