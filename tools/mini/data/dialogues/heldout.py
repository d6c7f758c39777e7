"""The test items of every task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tools.mini.data.dialogues.speaker import Speaker, user
from tools.mini.data.dialogues.tasks import REQUEST, link
from tools.mini.data.dialogues.world import Concept, Message, Row, World


def tests(world: World, prompts: dict) -> list[Row]:
    """Held-out items, by row of the table that `mmllm evaluate mini` prints."""
    rows: list[Row] = []

    def add(
        row: str, messages: list[Message], modalities: Sequence[str] = (), **expect: Any
    ) -> None:
        expected = {**expect, "modalities": list(modalities)}
        rows.append({"row": row, "messages": messages, "expect": expected})

    def speaker(row: str) -> Speaker:
        return Speaker(world, prompts, "heldout", row)

    def asks(row: str, modality: str, split: str, concepts: Sequence[Concept]) -> None:
        s = speaker(row)
        for concept in concepts:
            for file in world.files[modality, concept.id, split]:
                asked = s.ask(f"ask_{modality}", {"type": modality, "file": file})
                add(row, [asked], concept=concept.id, text_concept=concept.id)

    unknown = [c for c in world.pictures.values() if c.split == "heldout_concept"]
    asks("image->text", "image", "heldout_style", world.pool("image"))
    asks("image->text/unknown", "image", "heldout_concept", unknown)
    asks("video->text", "video", "train", world.pool("video"))
    asks("audio->text", "audio", "heldout_take", world.pool("audio"))

    for modality, times in {"image": 1, "video": 1, "audio": 2}.items():
        s = speaker(row := f"text->{modality}")
        for concept in world.pool(modality) * times:
            add(row, [user(s.say(REQUEST[modality], concept))], [modality], concept=concept.id)
    s = speaker(row := "text->image/synonym")
    for concept in world.pool("image"):
        for name in concept.heldout_synonyms:
            request = user(s.say("draw", concept.called(name)))
            add(row, [request], ["image"], concept=concept.id)

    for given, made, times in (("image", "audio", 2), ("audio", "image", 2), ("image", "video", 1)):
        s = speaker(row := f"{given}->{made}")
        pool = world.pool("video" if made == "video" else "sounding")
        for _ in range(len(pool) * times):
            source, target = link(s, given, made)
            kind = {"audio": "picture_to_sound", "image": "sound_to_picture"}
            shown = s.given(given, source.id)
            add(
                row,
                [s.ask(kind.get(made, "picture_to_clip"), shown)],
                [made],
                concept=target.id,
            )

    s = speaker(row := "what-did-you-draw")
    for _ in range(220):
        concept = s.pick("image")
        request = user(s.say("draw", concept))
        made = {"role": "assistant", "generate": True}
        turns = [request, made, user(s.say("what_did_you_draw"))]
        add(row, turns, concept=concept.id, text_concept=concept.id)

    def both(row: str, second: str, count: int) -> None:
        s = speaker(f"{row} {second}")
        for _ in range(count):
            picture, other = link(s, "image", second)
            kind = "draw_and_play" if second == "audio" else "draw_and_animate"
            names = [picture.id, other.id]
            turns = [user(s.say(kind, picture))]
            add(row, turns, ["image", second], concept=picture.id, concepts=names)

    both("text->image+audio", "audio", 2 * len(world.pool("sounding")))

    for text in prompts["chat"]["heldout"][:60]:
        add("routing/text", [user(text)])
    s = speaker(row := "routing/describe")
    for index in range(60):
        kind, pool = ("describe_sound", "audio") if index % 6 == 5 else ("describe", "image")
        add(row, [user(s.say(kind, s.pick(pool)))])
    for modality in ("image", "audio", "video"):
        s = speaker(row := f"routing/{modality}")
        for _ in range(60):
            concept = s.pick(modality)
            add(row, [user(s.say(REQUEST[modality], concept))], [modality], concept=concept.id)
    both("routing/two-media", "audio", 40)
    both("routing/two-media", "video", 20)
    s = speaker(row := "routing/medium-in-text-out")
    for _ in range(20):
        for modality in ("image", "audio", "video"):
            name = s.pick(modality).id
            asked = s.ask(f"ask_{modality}", s.given(modality, name))
            add(row, [asked], concept=name, text_concept=name)

    for modality, times in {"image": 1, "video": 1, "audio": 2}.items():
        s = speaker(row := f"decoder/{modality}")
        for concept in world.pool(modality) * times:
            phrase = s.deal("caption", world.captions[modality]["heldout"])
            caption = phrase.format_map(concept.__dict__)
            expected = {"concept": concept.id, "modalities": [modality]}
            rows.append({"row": row, "caption": caption, "expect": expected})
    counts: Counter[str] = Counter()
    numbered = []
    for row in rows:
        numbered.append({"id": f"{row['row']}/{counts[row['row']]}", **row})
        counts[row["row"]] += 1
    return numbered
