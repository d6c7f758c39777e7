"""Clips in conversations: asked for, changed by talking, and shown."""

from __future__ import annotations

from dataclasses import replace

from mmllm.mini.world import wordings
from mmllm.mini.world.captions import clip_caption, describe_clip, phrase
from mmllm.mini.world.clips import (
    MOTIONS,
    Clip,
    draw_clip,
    draw_heldout_clip,
    draw_training_clip,
)
from mmllm.mini.world.talk import Talk
from mmllm.mini.world.wordings import prompt, wording

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
_OPPOSITES = {"left": "right", "up": "down", "grow": "shrink"}
_OPPOSITES |= {value: key for key, value in _OPPOSITES.items()}


def animate(talk: Talk) -> bool:
    """The user asks for a clip, or for what was drawn to move."""
    scene = talk.scene
    if scene and len(scene.groups) == 1 and scene.groups[0].count == 1 and talk.rng.random() < 0.5:
        motion = talk.rng.choice(list(MOTIONS))
        clip = Clip(replace(scene, groups=(replace(scene.groups[0], size=None),)), (motion,))
        words = _moving(talk, "animate", motion)
        if _VERBS[motion] not in words and _GERUNDS[motion] not in words:
            clip = replace(clip, motions=("bounce",))  # what moves for no stated reason bounces
        text = words[0].upper() + words[1:]
    else:
        clip, words = _clip(talk)
        if talk.rng.random() < 0.5:
            text = prompt("animate", talk.split, talk.rng).format(caption=words)
        else:
            text = wordings.request("animate", words, talk.split, talk.rng)
    return _show(talk, text, clip)


def change_motion(talk: Talk) -> bool:
    """The user wants what moved last to move in another way."""
    clip = talk.clip
    if clip is None or len(clip.motions) != 1:
        return False
    motion = talk.rng.choice([name for name in MOTIONS if name != clip.motions[0]])
    return _show(talk, _moving(talk, "motion", motion), replace(clip, motions=(motion,)))


def reverse(talk: Talk) -> bool:
    """The user wants what moved last to move the other way."""
    clip = talk.clip
    if clip is None or len(clip.motions) != 1 or clip.motions[0] not in _OPPOSITES:
        return False
    clip = replace(clip, motions=(_OPPOSITES[clip.motions[0]],))
    return _show(talk, wording("edits", "reverse", talk.split, talk.rng), clip)


def _moving(talk: Talk, kind: str, motion: str) -> str:
    slots = {"motion": _GERUNDS[motion], "motion_verb": _VERBS[motion]}
    return wording("edits", kind, talk.split, talk.rng).format(**slots)


def _show(talk: Talk, text: str, clip: Clip) -> bool:
    if not talk.allowed_clip(clip):
        return False
    talk.ask(text)
    talk.show_clip(clip)
    return True


def _clip(talk: Talk) -> tuple[Clip, str]:
    """A clip and its caption; in one of four a thing bounces without a word of its motion."""
    if talk.rng.random() < 0.25:
        scene = talk.draw_thing()
        return Clip(scene, ("bounce",)), phrase(scene.groups[0], talk.rng, talk.wording)
    clip = draw_clip(talk.rng)
    return clip, clip_caption(clip, talk.rng, talk.wording)


def watch(talk: Talk) -> bool:
    """The user shows a clip and asks what happens."""
    clip = (draw_heldout_clip if talk.is_heldout else draw_training_clip)(talk.rng)
    talk.ask(wording("shown", "watch", talk.split, talk.rng), talk.video(clip))
    plain = replace(clip, scene=replace(clip.scene, ground=None))
    talk.answer(f"I see {describe_clip(plain)}.")
    return True
