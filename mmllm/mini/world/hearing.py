"""Exchanges about sounds: playing what is asked for, what was drawn, and naming sounds."""

from __future__ import annotations

from dataclasses import replace

from mmllm.mini.world import unknown, wordings
from mmllm.mini.world.sounds import (
    Soundscape,
    Voice,
    announce_soundscape,
    describe_soundscape,
    draw_heldout_soundscape,
    draw_soundscape,
    draw_training_soundscape,
    is_training,
    sounds,
    soundscape_caption,
)
from mmllm.mini.world.talk import Talk
from mmllm.mini.world.things import things
from mmllm.mini.world.wordings import wording

_SOUNDS = {
    "bell": "church-bell",
    "clock": "ticking-clock",
    "drum": "drum-kit",
    "ufo": "flying-saucer",
    "phone": "telephone",
    "train": "steam-train",
    "ship": "ship-horn",
    "car": "car-horn",
    "police-car": "siren",
    "fire-engine": "siren",
    "bicycle": "bicycle-bell",
    "wave": "ocean-wave",
    "beach": "ocean-wave",
    "lightning": "thunder",
    "raindrop": "water-drop",
    "droplet": "water-drop",
    "cloud-with-rain": "rain",
    "snake": "rattlesnake",
    "door": "knock-on-a-door",
    "saw": "hand-saw",
    "radio": "radio-static",
    "heart": "heartbeat",
    "game-controller": "video-game",
}
"""Thing -> the sound of another name that it makes."""
_PLAIN = 0.4
"""Share of the requests that are for one sound as it is."""


def sound_of(thing: str) -> str | None:
    """The sound that a thing makes, by its id; None if the world has none."""
    name = _SOUNDS.get(thing, thing)
    return name if name in sounds() else None


def play(talk: Talk) -> bool:
    """The user asks for sounds."""
    if talk.rng.random() < _PLAIN:
        scape = Soundscape((Voice(talk.rng.choice(list(sounds()))),))
    else:
        draw = draw_heldout_soundscape if talk.is_heldout else draw_training_soundscape
        scape = draw(talk.rng)
    words = soundscape_caption(scape, talk.rng, talk.wording)
    talk.ask(wordings.request("sound", words, talk.split, talk.rng))
    _answer(talk, scape)
    return True


def replay(talk: Talk) -> bool:
    """The user asks for a change of what was played: louder, lower, three times, then a bell."""
    scape = talk.scape
    if scape is None:
        return False
    kinds = ["again", "then", "loud", "soft", "high", "low", "times"]
    kind = talk.rng.choice(kinds if len(scape.voices) == 1 else ["again", "swap"])
    slots: dict[str, str] = {}
    if kind == "then":
        other = talk.rng.choice([name for name in sounds() if name != scape.voices[0].sound])
        first = Voice(scape.voices[0].sound)
        scape = Soundscape((first, Voice(other)), talk.rng.choice(("then", "together")))
        kind, slots = f"and {scape.layout}", {"x": sounds()[other].thing}
    elif kind == "swap":
        if scape.layout == "together":
            return False
        scape = replace(scape, voices=scape.voices[::-1])
    elif kind == "times":
        times = talk.rng.choice((2, 3))
        slots = {"times": ("twice", "three times")[times - 2]}
        scape = Soundscape((Voice(scape.voices[0].sound, times=times),))
    elif kind in ("loud", "soft"):
        scape = Soundscape((Voice(scape.voices[0].sound, loudness=kind),))
    elif kind in ("high", "low"):
        scape = Soundscape((Voice(scape.voices[0].sound, pitch=kind),))
    if not talk.is_heldout and not is_training(scape):
        return False
    talk.ask(wording("sounds", kind, talk.split, talk.rng).format(**slots))
    _answer(talk, scape)
    return True


def play_scene(talk: Talk) -> bool:
    """The user asks what the thing that was drawn sounds like."""
    scene = talk.scene
    if scene is None or len(scene.groups) != 1 or scene.groups[0].count > 1:
        return False
    thing = scene.groups[0].thing
    talk.ask(wording("edits", "sound", talk.split, talk.rng))
    return sound_or_refusal(talk, thing)


def hear(talk: Talk) -> bool:
    """The user plays sounds and asks what they are."""
    while True:
        scape = draw_soundscape(talk.rng)
        if is_training(scape) or talk.is_heldout:
            break
    talk.ask(wording("shown", "hear", talk.split, talk.rng), talk.audio(scape))
    talk.answer(f"I hear {describe_soundscape(scape)}.")
    return True


def refuse_sound(talk: Talk) -> bool:
    """The user asks for a sound that is not in the world."""
    words = [word for word in unknown.SOUNDS if unknown.is_heldout(word) is talk.is_heldout]
    word = talk.rng.choice(words)
    talk.ask(wordings.request("sound", word, talk.split, talk.rng))
    near = sounds()[unknown.SOUNDS[word]].thing
    talk.answer(f"I do not know the sound of {word}. The nearest that I know is {near}.")
    return True


def sound_or_refusal(talk: Talk, thing: str) -> bool:
    """Answer with the sound of a thing, or that it is unknown."""
    name = sound_of(thing)
    if name is None:
        talk.answer(f"I do not know what {things()[thing].caption} sounds like.")
    else:
        _answer(talk, Soundscape((Voice(name),)))
    return True


def _answer(talk: Talk, scape: Soundscape) -> None:
    words = describe_soundscape(scape)
    talk.shown[len(talk.messages)] = scape
    talk.answer(announce_soundscape(scape), talk.audio(scape, words))
    talk.scape, talk.clip = scape, None
    talk.made.append(("played", words))
