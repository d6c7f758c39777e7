"""All concepts and media that the conversations are about."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmllm import mini
from mmllm.data.sources import read_text

ROOT = Path(__file__).resolve().parents[4]
DATA = mini.FOLDER / "data"
DRAWN = "fluent-3d"  # the style of pictures that the assistant makes
MEDIUM_SPLIT = {"image": "heldout_style", "audio": "heldout_take", "video": "train"}  # when tested
Message = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Concept:
    """Something with an image (`kind` image, some also with a video) or a sound (`kind` audio)."""

    id: str
    kind: str
    label: str
    caption: str
    thing: str
    """What is named: the caption of a picture; "a violin" where that is a sound."""
    synonyms: tuple[str, ...]
    heldout_synonyms: tuple[str, ...]
    split: str = "train"
    category: str = ""
    clip: bool = False
    picture: str | None = None
    """Of a sound: the picture of what makes it."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.label, *self.synonyms)

    def called(self, name: str) -> Concept:
        """The same concept with another name in caption and thing, as a user may put it."""
        thing = with_article(name, like=self.thing)
        sound = f"the sound of {thing}"
        caption = sound if self.kind == "audio" else thing
        return Concept(**{**self.__dict__, "label": name, "caption": caption, "thing": thing})


@dataclass
class World:
    """All concepts and media, by kind and modality."""

    pictures: dict[str, Concept]
    sounds: dict[str, Concept]
    items: list[Row]
    captions: dict[str, dict[str, list[str]]]
    files: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)
    """(modality, concept, split) -> files."""

    @classmethod
    def load(cls) -> World:
        """Read the tables that the makers of pictures, clips and sounds left."""
        sounds = _read("sounds.json.gz")
        visual = [row for row in _read("items.json.gz") if row["modality"] != "audio"]
        items = visual + [{**row, "style": "take"} for row in sounds["items"]]
        world = cls(
            {row["id"]: _concept(row, "image") for row in _read("concepts.json")},
            {row["id"]: _concept(row, "audio") for row in sounds["concepts"]},
            items,
            {**_read("captions.json"), "audio": sounds["captions"]},
        )
        for item in items:
            key = (item["modality"], item["concept"], item["split"])
            world.files.setdefault(key, []).append(item["file"])
        return world

    def concept(self, modality: str, name: str) -> Concept:
        return (self.sounds if modality == "audio" else self.pictures)[name]

    def pool(self, name: str) -> list[Concept]:
        """Trained concepts: `image`, `video`, `audio`, `sounding` (sounds with a picture), or
        `precise` (pictures with labels of several words: "red apple", "stop sign")."""
        if name == "audio":
            return list(self.sounds.values())
        if name == "sounding":
            return [sound for sound in self.sounds.values() if sound.picture]
        visual = [concept for concept in self.pictures.values() if concept.split == "train"]
        if name == "precise":
            return [concept for concept in visual if " " in concept.label]
        return [concept for concept in visual if concept.clip] if name == "video" else visual

    def names(self, *, heldout: bool) -> set[str]:
        """Names in lower case that training may use, or that it must not."""
        known, unseen = set(), set()
        for concept in (*self.pictures.values(), *self.sounds.values()):
            (known if concept.split == "train" else unseen).update(concept.names)
            unseen.update(concept.heldout_synonyms)
        known, unseen = ({name.lower() for name in names} for names in (known, unseen))
        if both := known & unseen:
            raise ValueError(f"names both trained and held out: {sorted(both)}")
        return unseen if heldout else known


def _read(name: str) -> Any:
    return json.loads(read_text(DATA / name))


def _concept(row: Row, kind: str) -> Concept:
    fields = {key: row[key] for key in Concept.__dataclass_fields__ if key in row}
    fields |= {"kind": kind, "thing": row.get("thing", row["caption"])}
    names = {key: tuple(row[key]) for key in ("synonyms", "heldout_synonyms")}
    # "plate of spaghetti" is not held out where the caption is "a plate of spaghetti".
    names["heldout_synonyms"] = tuple(
        name for name in names["heldout_synonyms"] if name.lower() not in row["caption"].lower()
    )
    return Concept(**{**fields, **names})


NO_ARTICLE = {
    "applause", "champagne", "chiptune", "chocolate", "clapping", "coffee", "hammering",
    "honking", "ice cream", "soft ice cream", "knocking", "lightning", "maize",
    "pasta", "planet earth", "rain", "rainfall", "saturn", "soft serve", "surf", "hot coffee",
    "bowling", "ping pong", "birdsong", "sawing", "hooting", "croaking", "mooing", "bleating",
    "quacking", "clapping hands", "mind blown", "crying with laughter", "whale song", "sakura",
    "dripping water",
}  # fmt: skip
SINGULAR_IN_S = {"brachiosaurus", "brontosaurus", "chorus", "circus"}


def with_article(name: str, *, like: str) -> str:
    """`name` as a phrase: "puppy" -> "a puppy"; plurals and materials take none or "a pair of"."""
    plain = name.lower()
    if like.startswith("a pair of ") and plain.endswith("s") and " of " not in plain:
        return f"a pair of {name}"
    plural = plain.split(" of ")[0].split(" with ")[0].endswith("s")
    plural = plural and not plain.endswith("ss") and plain not in SINGULAR_IN_S
    if plain in NO_ARTICLE or plural or plain.startswith("hands "):
        return name
    if plain == "globe":
        return f"the {name}"
    vowel = plain[0] in "aeiou" and not plain.startswith(("uni", "ufo", "eu", "ewe", "one"))
    return f"{'an' if vowel or plain.startswith(('xmas', 'hour')) else 'a'} {name}"
