"""Proves that nothing held out is in what trains."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tools.mini.data.dialogues.tasks import CATEGORIES
from tools.mini.data.dialogues.world import DATA, Row, World


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
