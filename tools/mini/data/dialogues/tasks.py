"""The dialogues of stage 3 by task."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator

from tools.mini.data.dialogues.speaker import Speaker, answer, assistant, described, user
from tools.mini.data.dialogues.world import Concept, Message, Row, World

REQUEST = {"image": "draw", "video": "animate", "audio": "sound"}
PAST = {"image": "drew", "video": "animated", "audio": "played"}
RECALL = {modality: f"what_did_you_{verb}" for modality, verb in REQUEST.items()}
RECALL["audio"] = "what_did_you_play"


def generate(modality: str, pool: str = "") -> Callable[[Speaker], list[Message]]:
    """text -> medium, of a concept of this pool."""

    def turns(speaker: Speaker) -> list[Message]:
        concept = speaker.pick(pool or modality)
        request = user(speaker.say(REQUEST[modality], concept))
        return [request, assistant(*speaker.here(modality, concept))]

    return turns


def understand(modality: str) -> Callable[[Speaker], list[Message]]:
    """medium -> text."""

    def turns(speaker: Speaker) -> list[Message]:
        concept = speaker.pick(modality)
        shown = speaker.given(modality, concept.id)
        return [speaker.ask(f"ask_{modality}", shown), assistant(answer(concept))]

    return turns


def recall(modality: str) -> Callable[[Speaker], list[Message]]:
    """The model is asked what it has just made."""

    def turns(speaker: Speaker) -> list[Message]:
        request, reply = generate(modality)(speaker)
        caption = reply["content"][1]["caption"]
        response = assistant(f"I {PAST[modality]} {caption}.")
        return [request, reply, user(speaker.say(RECALL[modality])), response]

    return turns


def linked(given: str, made: str) -> Callable[[Speaker], list[Message]]:
    """medium -> another medium of the same thing."""
    kind = {"image audio": "picture_to_sound", "audio image": "sound_to_picture"}.get(
        f"{given} {made}", "picture_to_clip"
    )

    def turns(speaker: Speaker) -> list[Message]:
        source, target = link(speaker, given, made)
        request = speaker.ask(kind, speaker.given(given, source.id))
        return [request, assistant(*speaker.here(made, target))]

    return turns


def link(speaker: Speaker, given: str, made: str) -> tuple[Concept, Concept]:
    """A concept in one modality and the same thing in another."""
    if "audio" not in (given, made):
        concept = speaker.pick("video")
        return concept, concept
    sound = speaker.pick("sounding")
    assert sound.picture
    picture = speaker.world.pictures[sound.picture]
    return (sound, picture) if given == "audio" else (picture, sound)


def two_media(second: str) -> Callable[[Speaker], list[Message]]:
    """A picture and its sound, or a picture and its clip, in one reply."""
    kind = "draw_and_play" if second == "audio" else "draw_and_animate"

    def turns(speaker: Speaker) -> list[Message]:
        picture, other = link(speaker, "image", second)
        reply = assistant(
            f"First {described('image', picture)}.",
            speaker.made("image", picture),
            f"Then {described(second, other)}.",
            speaker.made(second, other),
        )
        return [user(speaker.say(kind, picture)), reply]

    return turns


CATEGORIES = {
    "animal": "an animal",
    "food": "something to eat",
    "plant": "a plant",
    "vehicle": "a vehicle",
}
NEITHER = ("tool", "clothes", "electronics", "shape", "home", "music")
NO_VEHICLES = ("siren", "traffic-light", "stop-sign", "anchor", "parachute", "spider-web")


def categorise(speaker: Speaker) -> list[Message]:
    """A question about a picture, to be answered with yes or no and its name."""
    concept = speaker.pick("image")
    while concept.category not in (*CATEGORIES, *NEITHER) or concept.id in NO_VEHICLES:
        concept = speaker.pick("image")
    yes = concept.category in CATEGORIES and speaker.rng.random() < 0.7
    other = "vehicle" if concept.category in ("animal", "food", "plant") else "animal"
    asked = CATEGORIES[concept.category if yes else other]
    response = answer(concept)
    return [
        speaker.ask("category", speaker.given("image", concept.id), category=asked),
        assistant(f"{'Yes' if yes else 'No'}, {response[0].lower()}{response[1:]}"),
    ]


def recolour(speaker: Speaker) -> list[Message]:
    """A heart, circle, square or book is drawn, and then again in another colour."""
    first, second = speaker.deal("colours", colour_pairs(speaker.world))
    return [
        user(speaker.say("draw", first)),
        assistant(*speaker.here("image", first)),
        user(speaker.say("recolour", colour=second.id.split("-")[0])),
        assistant(*speaker.here("image", second)),
    ]


def colour_pairs(world: World) -> list[tuple[Concept, Concept]]:
    """Two trained concepts that differ in colour only."""
    colours = {"red", "orange", "yellow", "green", "blue", "purple", "black", "brown"}
    shapes = ("heart", "circle", "square", "book")
    known = [c for c in world.pool("image") if c.id.split("-")[0] in colours]
    return [
        (first, second)
        for first in known
        for second in known
        for shape in shapes
        if first is not second
        and first.id.endswith(f"-{shape}")
        and second.id.endswith(f"-{shape}")
    ]


def draw_twice(speaker: Speaker) -> list[Message]:
    """Two pictures in a row."""
    first, second = speaker.pick("image"), speaker.pick("image")
    while second.id == first.id:
        second = speaker.pick("image")
    return [
        user(speaker.say("draw", first)),
        assistant(*speaker.here("image", first)),
        user(speaker.say("next", second)),
        assistant(*speaker.here("image", second)),
    ]


def show_and_play(speaker: Speaker) -> list[Message]:
    """A picture is named, then its sound is played."""
    picture, sound = link(speaker, "image", "audio")
    return [
        speaker.ask("ask_image", speaker.given("image", picture.id)),
        assistant(answer(picture)),
        user(speaker.say("picture_to_sound")),
        assistant(*speaker.here("audio", sound)),
    ]


TASKS: dict[str, tuple[Callable[[Speaker], list[Message]], int, int]] = {
    "text->image": (generate("image"), 1300, 15),
    "text->video": (generate("video"), 700, 10),
    "text->audio": (generate("audio"), 900, 10),
    "image->text": (understand("image"), 800, 15),
    "video->text": (understand("video"), 350, 8),
    "audio->text": (understand("audio"), 560, 10),
    "image->audio": (linked("image", "audio"), 1000, 8),
    "audio->image": (linked("audio", "image"), 1000, 8),
    "image->video": (linked("image", "video"), 860, 8),
    "text->image+audio": (two_media("audio"), 1100, 8),
    "text->image+video": (two_media("video"), 700, 6),
    "image+text->text": (categorise, 280, 6),
    "draw, what": (recall("image"), 400, 8),
    "play, what": (recall("audio"), 220, 4),
    "animate, what": (recall("video"), 220, 4),
    "draw, recolour": (recolour, 112, 4),
    "draw, draw": (draw_twice, 200, 4),
    "show, play": (show_and_play, 180, 4),
    "text->image, precise": (generate("image", "precise"), 400, 0),
}
"""Task -> how its turns are made, how many rows of dialogues and of validation."""
MIXED = {"train": 50, "validation": 3}
"""Rows of each kind in which media and plain chat follow each other."""


def dialogues(world: World, prompts: dict, split: str, plain: dict) -> list[Row]:
    """All rows of one split; `plain`: "chat train" -> (user text, reply) and so on."""
    rows: list[Row] = []
    for task, (turns, *counts) in TASKS.items():
        speaker = Speaker(world, prompts, split, task)
        count = counts[split == "validation"]
        rows += _unique(task, (turns(speaker) for _ in range(count)))
    chat = {kind: plain[f"{kind} {split}"] for kind in ("chat", "describe")}
    for kind, exchanges in chat.items():
        if (split, kind) == ("train", "chat"):  # "Hi!" must be no sign that a medium is wanted
            speaker = Speaker(world, prompts, split, kind)
            exchanges = [*exchanges, *((speaker.loosely(t), r) for t, r in exchanges)]
        rows += _unique(kind, ([user(t), assistant(r)] for t, r in exchanges))
    rows += _unique("with chat", mixed(Speaker(world, prompts, split, "mixed"), chat["chat"]))
    return [{"id": f"{split[0]}{index}", **row} for index, row in enumerate(rows)]


def mixed(speaker: Speaker, exchanges: list[tuple[str, str]]) -> Iterator[list[Message]]:
    """Plain chat before and after pictures that are shown or drawn, and before other media."""
    for _ in range(MIXED[speaker.split]):
        for before, after in (
            (understand("image"), None),
            (generate("image"), None),
            (None, generate("image")),
            (None, generate("audio")),
            (None, generate("video")),
        ):
            text, reply = speaker.deal("chat", exchanges)
            yield [
                *(before(speaker) if before else []),
                user(text),
                assistant(reply),
                *(after(speaker) if after else []),
            ]


def _unique(task: str, conversations: Iterable[list[Message]]) -> list[Row]:
    seen = {json.dumps(messages): messages for messages in conversations}
    return [{"task": task, "messages": messages} for messages in seen.values()]
