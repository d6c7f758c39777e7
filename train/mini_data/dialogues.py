"""Write the pairs, dialogues, validation dialogues and tests of `mini`'s data, and its plain texts.

    python train/mini_data/dialogues.py                    # half a minute once replies are kept
    python train/mini_data/dialogues.py --texts PACKAGES   # only data/text/, see the data's README

In: `concepts.json`, `captions.json`, gzipped `sounds.json` and `items.json`, and `prompts.json`
(phrasings by kind: train, validation, heldout; written by hand).
Out, gzipped: `pairs.jsonl`, `dialogues.jsonl`, `validation.jsonl`, `tests.jsonl`. The same input
gives the same text. Plain chat is answered by the base language model itself, greedily; its
replies are kept in --replies (ten minutes on one core when that file is absent).

Nothing is written before `check` has proved that no test phrasing, held-out name or test medium is
in what trains.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmllm.data.sources import read_text, write_text

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "mmllm" / "mini" / "data"
SYSTEM = "You can see, hear, draw, play and animate."
"""System prompt of the model's configurations; the replies of plain chat were written under it."""

DRAWN = "fluent-3d"  # the style of pictures that the assistant makes
MEDIUM_SPLIT = {"image": "heldout_style", "audio": "heldout_take", "video": "train"}  # when tested
MAX_NEW_TOKENS = 48
Message = dict[str, Any]
Row = dict[str, Any]

log = logging.getLogger("dialogues")


def main() -> None:
    """Load, write every file in memory, check, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--replies",
        type=Path,
        default=ROOT / "runs" / "mini_data" / "replies.json",
        help="where the language model's replies are kept",
    )
    parser.add_argument("--texts", type=Path, help="folder with the packages of data/text/")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.texts:
        write_texts(args.texts)
        return

    world = World.load()
    prompts = json.loads((DATA / "prompts.json").read_text("utf-8"))
    said = plain_prompts(world, prompts)
    known = replies([text for texts in said.values() for text in texts], args.replies)
    unseen = heldout_names(world)
    plain = {kind: [(t, known[t]) for t in said[kind] if fit(known[t], unseen)] for kind in said}
    files = {
        "pairs.jsonl.gz": pairs(world),
        "dialogues.jsonl.gz": dialogues(world, prompts, "train", plain),
        "validation.jsonl.gz": dialogues(world, prompts, "validation", plain),
        "tests.jsonl.gz": tests(world, prompts),
    }
    check(world, prompts, files)
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
        write_text(DATA / name, "".join(line + "\n" for line in lines))
        report(name, rows)


# --- what there is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Concept:
    """Something that can be shown (`kind` image, also as a clip) or heard (`kind` audio)."""

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
        heard = _read("sounds.json.gz")
        seen = [row for row in _read("items.json.gz") if row["modality"] != "audio"]
        items = seen + [{**row, "style": "take"} for row in heard["items"]]
        world = cls(
            {row["id"]: _concept(row, "image") for row in _read("concepts.json")},
            {row["id"]: _concept(row, "audio") for row in heard["concepts"]},
            items,
            {**_read("captions.json"), "audio": heard["captions"]},
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
        seen = [concept for concept in self.pictures.values() if concept.split == "train"]
        if name == "precise":
            return [concept for concept in seen if " " in concept.label]
        return [concept for concept in seen if concept.clip] if name == "video" else seen

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


# --- pairs: stages 1 and 2 ----------------------------------------------------------------------


def pairs(world: World) -> list[Row]:
    """Every train medium with its canonical caption; some again as `validation` (new phrasings)."""
    rows = []
    for item in world.items:
        if item["split"] != "train":
            continue
        concept = world.concept(item["modality"], item["concept"])
        row = {key: item[key] for key in ("file", "modality", "style", "concept")}
        row |= {"caption": concept.caption, "label": concept.label, "thing": concept.thing}
        rows.append({**row, "answer": answer(concept), "split": "train"})
    again = []
    for modality, step in {"image": 13, "video": 4, "audio": 11}.items():
        some = [row for row in rows if row["modality"] == modality][::step]
        again += [{**row, "split": "validation"} for row in some]
    return rows + again


# --- turns --------------------------------------------------------------------------------------


def user(*content: str | Message) -> Message:
    return {"role": "user", "content": _content(content)}


def assistant(*content: str | Message) -> Message:
    return {"role": "assistant", "content": _content(content)}


def _content(content: Sequence[str | Message]) -> str | list[Message]:
    if len(content) == 1 and isinstance(content[0], str):
        return content[0]
    return [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]


def answer(concept: Concept) -> str:
    """ "This is a dog."; plural things are "These are"."""
    plural = concept.caption.split()[0] in ("some", "clapping") and concept.label.endswith("s")
    return f"{'These are' if plural else 'This is'} {concept.caption}."


BEFORE = (
    "Hi!", "Hello!", "Hey,", "OK.", "Well,", "So,", "Right.", "Now,", "Listen.", "Sorry,", "Hm.",
    "Great.", "Thanks.", "Good morning.", "One question:", "Something else:", "Quick one:",
)  # fmt: skip
AFTER = ("Thanks!", "Thank you.", "Please.", "Take your time.", "Be quick.", "OK?", "If you can.")
CONTRACTIONS = {
    r"\bI would\b": "I'd", r"\bI am\b": "I'm", r"\b(What|Who|Where|How|That|It) is\b": r"\1's",
    r"\b([Dd])o not\b": r"\1on't", r"\bLet us\b": "Let's", r"\bcannot\b": "can't",
}  # fmt: skip


def contracted(text: str) -> str:
    """ "I would like" -> "I'd like"; "What is" -> "What's"."""
    for long, short in CONTRACTIONS.items():
        text = re.sub(long, short, text)
    return text


def said(modality: str, concept: Concept) -> str:
    """What a medium is called in a reply: its modality comes first, so that one word decides it."""
    kind = {"image": "a picture of ", "video": "a clip of ", "audio": ""}[modality]
    return f"{kind}{concept.caption}"


class Speaker:
    """Draws phrasings, concepts and media for one task, each as often as the others."""

    def __init__(self, world: World, prompts: dict, split: str, task: str):
        self.world, self.prompts, self.split = world, prompts, split
        self.rng = random.Random(f"{split}/{task}")
        self._decks: dict[str, Iterator] = {}

    def deal(self, name: str, cards: Sequence) -> Any:
        """The next of `cards`, which are shuffled anew whenever all have been dealt."""
        if name not in self._decks:
            self._decks[name] = self._shuffled(cards)
        return next(self._decks[name])

    def _shuffled(self, cards: Sequence) -> Iterator:
        while True:
            yield from self.rng.sample(cards, len(cards))

    def pick(self, pool: str) -> Concept:
        return self.deal(f"pool {pool}", self.world.pool(pool))

    def say(self, kind: str, concept: Concept | None = None, **slots: str) -> str:
        """A phrasing of this kind with its slots filled; train texts are typed loosely."""
        phrase = self.deal(kind, self.prompts[kind][self.split])
        if concept:
            if self.split == "train" and concept.synonyms and self.rng.random() < 0.3:
                concept = concept.called(self.deal(f"names {concept.id}", concept.synonyms))
            slots |= {"caption": concept.caption, "label": concept.label, "thing": concept.thing}
        text = phrase.format_map(slots) if slots else phrase
        text = text[0].upper() + text[1:]
        return self.loosely(text) if self.split == "train" else text

    def loosely(self, text: str) -> str:
        """As people type: contracted, with a word before or after, no capitals, no stop."""
        if self.rng.random() < 0.5:
            text = contracted(text)
        if self.rng.random() < 0.2:
            before = self.deal("before", BEFORE)
            inner = before[-1] in ",:" and not text.startswith(("I ", "I'"))
            text = f"{before} {text[0].lower() + text[1:] if inner else text}"
        if self.rng.random() < 0.15 and text[-1] in ".?!":
            text = f"{text} {self.deal('after', AFTER)}"
        text = text.lower() if self.rng.random() < 0.15 else text
        return text.rstrip(".?") if self.rng.random() < 0.2 else text

    def ask(self, kind: str, medium: Message, **slots: str) -> Message:
        """The user shows a medium and asks, in either order."""
        content = [medium, self.say(kind, None, **slots)]
        return user(*(content if self.rng.random() < 0.5 else reversed(content)))

    def given(self, modality: str, name: str) -> Message:
        """A medium from the user: any train file, or in tests one that nothing has trained on."""
        split = MEDIUM_SPLIT[modality] if self.split == "heldout" else "train"
        files = self.world.files[modality, name, split]
        return {"type": modality, "file": self.deal(f"{modality} {name}", files)}

    def made(self, modality: str, concept: Concept) -> Message:
        """A medium from the assistant, with the caption that it is aligned with."""
        files = self.world.files[modality, concept.id, "train"]
        if modality == "image":
            file = next(file for file in files if DRAWN in file)
        else:
            file = self.deal(f"{modality} {concept.id}", files)
        return {"type": modality, "file": file, "caption": concept.caption}

    def here(self, modality: str, concept: Concept) -> tuple[str, Message]:
        """ "Here is a picture of a dog." and the dog."""
        return f"Here is {said(modality, concept)}.", self.made(modality, concept)


# --- dialogues: stage 3 -------------------------------------------------------------------------

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
        told = assistant(f"I {PAST[modality]} {caption}.")
        return [request, reply, user(speaker.say(RECALL[modality])), told]

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
            f"First {said('image', picture)}.",
            speaker.made("image", picture),
            f"Then {said(second, other)}.",
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
    told = answer(concept)
    return [
        speaker.ask("category", speaker.given("image", concept.id), category=asked),
        assistant(f"{'Yes' if yes else 'No'}, {told[0].lower()}{told[1:]}"),
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


# --- plain chat, answered by the base model ------------------------------------------------


def plain_prompts(world: World, prompts: dict) -> dict[str, list[str]]:
    """What users say in rows without media: chat, and words about things that could be drawn."""
    said = {}
    for split, things, sounds in (("train", 1020, 540), ("validation", 9, 3)):
        speaker = Speaker(world, prompts, split, "describe")
        said[f"chat {split}"] = prompts["chat"][split]
        texts = [speaker.say("describe", speaker.pick("image")) for _ in range(things)]
        texts += [speaker.say("describe_sound", speaker.pick("audio")) for _ in range(sounds)]
        said[f"describe {split}"] = list(dict.fromkeys(texts))
    return said


def replies(texts: list[str], path: Path) -> dict[str, str]:
    """Text -> reply of the language model; those that `path` lacks are generated and added."""
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    missing = sorted((text for text in set(texts) if text not in known), key=lambda t: (len(t), t))
    if missing:
        reply = _language_model()
        for start in range(0, len(missing), 128):
            batch = missing[start : start + 128]
            known |= dict(zip(batch, reply(batch), strict=True))
            path.write_text(json.dumps(known, ensure_ascii=False, indent=1), "utf-8")
            log.info("%d of %d replies", start + len(batch), len(missing))
    return known


def _language_model() -> Callable[[list[str]], list[str]]:
    """Texts -> greedy replies, cut at the last full sentence where they are too long."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mmllm.mini.assets import fetch

    folder = fetch("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    @torch.inference_mode()
    def reply(texts: list[str]) -> list[str]:
        turns = [
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
            for text in texts
        ]
        batch = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :]
        said = tokenizer.batch_decode(ids, skip_special_tokens=True)
        ended = (ids == end).any(1).tolist()
        return [whole(text.strip(), complete) for text, complete in zip(said, ended, strict=True)]

    return reply


def whole(text: str, complete: bool) -> str:
    """The text up to its last full sentence (all of it if the model came to an end)."""
    if complete:
        return text
    stops = list(re.finditer(r'(?<=[^\d\s])[.!?]["”)]?(?=\s|$)', text))
    return text[: stops[-1].end()] if stops else ""


def fit(reply: str, unseen: Callable[[str], list[str]]) -> bool:
    """Whether a reply may train: not empty, no loop, no held-out name, not like a medium's."""
    words = reply.lower().split()
    loops = repeats(words, 3) > 2 or repeats(words, 6) > 1
    lead = reply.startswith(("Here is", "Here are", "First ", "I drew", "I played", "I animated"))
    odd = "\ufffd" in reply or "<|" in reply
    return bool(words) and not (loops or lead or odd) and not unseen(reply)


def repeats(words: list[str], length: int) -> int:
    """How often the most frequent run of so many words occurs."""
    runs = Counter(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
    return max(runs.values(), default=0)


# --- tests --------------------------------------------------------------------------------------


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


# --- proof --------------------------------------------------------------------------------------


def check(world: World, prompts: dict, files: dict[str, list[Row]]) -> None:
    """Raise unless nothing of the tests is in what trains, and every medium is there."""
    trained = [row for name, rows in files.items() if name != "tests.jsonl.gz" for row in rows]
    tested = files["tests.jsonl.gz"]
    problems = []

    found = heldout_names(world)
    for row in trained:
        for text in texts_of(row):
            problems += [f"held-out name {name!r} in {text!r}" for name in found(text)]

    for kind, sets in prompts.items():
        for one, other in (
            ("train", "heldout"),
            ("train", "validation"),
            ("validation", "heldout"),
        ):
            shared = {_bare(p) for p in sets[one]} & {_bare(p) for p in sets[other]}
            problems += [f"{kind}: {text!r} is in {one} and {other}" for text in shared]
    asked = {_bare(text) for row in trained for text in texts_of(row, "user")}
    phrasings = {p for sets in prompts.values() for p in sets["heldout"]}
    problems += [
        f"test text {text!r} trains" for text in asked if unseen_phrasing(world, phrasings)(text)
    ]
    again = {_bare(text) for row in tested for text in texts_of(row, "user")} & asked
    problems += [f"test text {text!r} trains" for text in again]

    split = {item["file"]: item["split"] for item in world.items}
    clips = {item["file"] for item in world.items if item["modality"] == "video"}
    problems += [f"test medium {f}" for r in trained for f in media_of(r) if split[f] != "train"]
    problems += [
        f"train medium {file} in {row['id']}"
        for row in tested
        for file in media_of(row)
        if split[file] == "train" and file not in clips
    ]
    shown = {file for row in (*trained, *tested) for file in media_of(row)}
    problems += [f"{file} does not exist" for file in sorted(shown) if not (DATA / file).is_file()]
    if problems:
        raise ValueError(f"{len(problems)} problems:\n" + "\n".join(sorted(set(problems))[:40]))


def texts_of(row: Row, role: str | None = None) -> Iterator[str]:
    """Every text and caption in a row, or what one role says."""
    if role is None and "caption" in row:
        yield row["caption"]
    for message in row.get("messages", ()):
        if role not in (None, message["role"]) or "content" not in message:
            continue
        content = message["content"]
        for part in [{"text": content}] if isinstance(content, str) else content:
            yield from (part[key] for key in ("text", "caption") if key in part)


def media_of(row: Row) -> Iterator[str]:
    """Every file that a row names."""
    if "file" in row:
        yield row["file"]
    for message in row.get("messages", ()):
        content = message.get("content", "")
        if not isinstance(content, str):
            yield from (part["file"] for part in content if "file" in part)


def heldout_names(world: World) -> Callable[[str], list[str]]:
    """Text -> the held-out names in it; whole words, the longest name wins."""
    unseen = world.names(heldout=True)
    names = sorted(unseen | world.names(heldout=False), key=len, reverse=True)
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)", re.IGNORECASE)
    return lambda text: [name for name in pattern.findall(text) if name.lower() in unseen]


def unseen_phrasing(world: World, phrasings: set[str]) -> Callable[[str], bool]:
    """Bare text -> whether it is one of the phrasings, with any trained name in its slots."""
    fillings = {"animal", *(c.split("-")[0] for c in world.pictures), *CATEGORIES.values()}
    for concept in (*world.pictures.values(), *world.sounds.values()):
        for name in concept.names:
            also = concept.called(name)
            fillings |= {concept.caption, concept.thing, also.caption, also.thing, name}
    fillings = {_bare(text) for text in fillings}
    slot = re.compile(r"\{\w+\}")
    forms = []
    for phrase in map(_bare, phrasings):
        literals = slot.split(phrase)
        form = re.compile("(.+)".join(map(re.escape, literals)))
        forms.append((max(literals, key=len), form))  # the literal is looked for first: quick

    def seen(text: str) -> bool:
        found = (form.fullmatch(text) for literal, form in forms if literal in text)
        return any(match and set(match.groups()) <= fillings for match in found)

    return seen


def _bare(text: str) -> str:
    """Without case, stops and double spaces."""
    return " ".join(re.sub(r"[^\w\s'{}+*/-]", " ", text.lower()).split())


def report(name: str, rows: list[Row]) -> None:
    counts = Counter(row.get("row") or row.get("task") or row["modality"] for row in rows)
    size = (DATA / name).stat().st_size
    log.info("%s: %d rows, %d bytes: %s", name, len(rows), size, dict(counts))


# --- plain texts for perplexity -----------------------------------------------------------------

TEXT_LENGTH = 120_000  # characters of each text
PYTHON_PAGES = ("faq/design", "faq/general", "howto/sockets", "howto/unicode", "howto/functional")
PYTHON_PAGES += ("howto/logging", "howto/regex", "tutorial/classes", "tutorial/modules")


def write_texts(packages: Path) -> None:
    """A novel and a technical text, as paragraphs of one line each, and the latter's licence."""
    with tarfile.open(next(packages.glob("[Bb]rotli-*.tar.gz"))) as archive:
        member = next(m for m in archive.getnames() if m.endswith("testdata/alice29.txt"))
        novel = archive.extractfile(member).read().decode("ascii")
    folder = packages / "usr/share/doc/python3.11/html/_sources"
    pages = [(folder / f"{page}.rst.txt").read_text("utf-8") for page in PYTHON_PAGES]
    (DATA / "text").mkdir(exist_ok=True)
    for name, paragraphs in (
        ("alice", [" ".join(block.split()) for block in re.split(r"\n\s*\n", novel)]),
        ("python", [text for page in pages for text in prose(page)]),
    ):
        text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
        text = text[: text.rindex("\n\n", 0, TEXT_LENGTH)] if len(text) > TEXT_LENGTH else text
        (DATA / "text" / f"{name}.txt").write_text(text + "\n", "utf-8")
        log.info("text/%s.txt: %d characters", name, len(text))
    licence = (packages / "usr/share/doc/python3.11-doc/copyright").read_text("utf-8")
    start, end = licence.index("PYTHON SOFTWARE FOUNDATION"), licence.index("BEOPEN.COM LICENSE")
    (DATA / "text" / "LICENSE.python").write_text(licence[start:end].rstrip() + "\n", "utf-8")


def prose(page: str) -> Iterator[str]:
    """The paragraphs of a reStructuredText page, without code, headings and mark-up."""
    for block in re.split(r"\n\s*\n", page):
        if block.startswith((" ", "..", "\t", "|", "+", "*", "-", "=", "#", ":")):
            continue
        text = re.sub(r":[\w:+-]+:`[!~]?([^`<]+?)(?:\s*<[^`>]*>)?`", r"\1", " ".join(block.split()))
        text = re.sub(r"`([^`<]+?)\s*(?:<[^`>]*>)?`__?", r"\1", text)
        text = re.sub(r"``(.+?)``|\*\*(.+?)\*\*|\*(\w[^*]*?)\*", r"\1\2\3", text)
        text = re.sub(r"::$", ":", text).replace("\\ ", "")
        if len(text) > 60 and text[-1] in ".:!?)" and "://" not in text and "`" not in text:
            yield text


if __name__ == "__main__":
    main()
