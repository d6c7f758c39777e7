"""What the shipped model knows: things, their colours and motions, and sounds."""

from __future__ import annotations

from mmllm.mini.world.clips import MOTIONS
from mmllm.mini.world.sounds import sounds
from mmllm.mini.world.things import COLOURS, things


def known_concepts() -> dict[str, list[str]]:
    """List what the shipped model was trained on, sorted.

    Returns:
        "image": names of the things that it draws, names and animates; "colour": the colours that
        it gives them; "motion": how they move in clips; "audio": names of the sounds.
    """
    return {
        "image": sorted(thing.label for thing in things().values()),
        "colour": sorted(COLOURS),
        "motion": sorted(MOTIONS),
        "audio": sorted(sound.label for sound in sounds().values()),
    }
