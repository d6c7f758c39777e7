"""The project's former private vocabulary is gone from names, docstrings, messages, configs, docs.

A word is searched whole and in any case, also as a part of an identifier: `check_room` and
`RoomSize` both have a `room`. What may keep one is written out below, with the reason.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = {
    "apart": "kl_to_base, max difference, separately",
    "beside": "next to, besides, in addition to",
    "heard": "audible, recognised",
    "heed": "poll, respect",
    "heeded": "respected",
    "hollow": "meta",
    "learnt": "learned, trained on",
    "nats": "token_nll",
    "opening": "shared prefix",
    "openings": "shared prefixes",
    "owed": "pending",
    "retain": "kl",
    "room": "namespace, capacity, package",
    "rooms": "namespaces, packages",
    "said": "written, given, reported",
    "told": "reported, logged, documented",
    "untouched": "unchanged, adapters_disabled",
    "whoever": "the reader, the client, the first process",
}
"""Former word -> what is written in its place."""
PHRASES = ("cannot be meant", "few_heaps", "left out and told")
IDENTIFIERS = (
    *("_Apart", "_Beside", "_Lane", "_Late", "_Summed", "_Together", "_Wanted", "_Writer"),
    *("ClipDecoder", "FrozenWork", "LaidOut", "PackedStack", "PictureDecoder", "PlainText"),
    *("ReleasedEncoder", "RetainConfig", "RoomSize", "SoundDecoder"),
    *("add_outputs", "divides_caches", "divisible", "input_widths", "named_adapters", "noised"),
    *("num_shared", "output_of_row", "output_widths", "packs_openings", "read_whole", "shrinkage"),
)
"""Former names that none of the words above is in."""

READ = "former name, still read: "
ALLOWED = (
    ("mmllm/config/renamed.py", '"retain": "kl"', READ + "a loss in YAML"),
    ("mmllm/cli/renamed.py", '"--beside": "--baseline"', READ + "an option of evaluate"),
    ("mmllm/evaluation/report.py", '"beside": "baseline"', READ + "a key of reports as JSON"),
    (
        "mmllm/evaluation/report.py",
        "{modality} apart",
        READ + "a metric of reports as JSON",
    ),
    ("mmllm/features/maintenance.py", "room.json", "a file of feature caches that exist"),
    ("mmllm/features/namespace.py", "room.json", "a file of feature caches that exist"),
    ("mmllm/features/store.py", "room.json", "a file of feature caches that exist"),
    ("mmllm/mini/world/captions.py", "{a} beside {b}", "a caption as people write it"),
    ("tools/mini/data/own_words.py", "going?” said", "a sentence of the training text"),
    ("tests/cli/test_entry.py", "--beside", READ + "an option of evaluate"),
    ("tests/evaluation/test_report.py", '"beside"', READ + "a key of reports as JSON"),
    ("tests/evaluation/test_report.py", "image apart", READ + "a metric of reports as JSON"),
    ("tests/features/test_cache.py", "room.json", "a file of feature caches that exist"),
    ("tests/test_config.py", "retain", READ + "a loss in YAML"),
    ("CHANGELOG.md", "(was `--beside`)", "names the former option"),
    ("CHANGELOG.md", "`retain`", "names the former loss"),
)
"""(file, text of it, why it may stay). A text that its file has not is an error too."""
DATA = ("mmllm/mini/checkpoint/", "mmllm/mini/data/", "mmllm/mini/decoders/")
"""Shipped data: bytes that fingerprints and hashes hold; it keeps the names of its time."""
SUFFIXES = (".py", ".yaml", ".yml", ".md", ".ipynb", ".html", ".js", ".css", ".sh")


def searched() -> list[str]:
    """The tracked files whose words are searched, relative to the repository."""
    code = ("mmllm", "configs", "train", "tools", "benchmarks", "demos", "tests")
    where = (*code, "docs/*.md", "*.md", ":!tests/test_words.py")
    listed = subprocess.run(
        ["git", "ls-files", *where], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [
        name
        for name in listed.stdout.splitlines()
        if name.endswith(SUFFIXES) and not name.startswith(DATA) and (ROOT / name).is_file()
    ]


def former_words(text: str) -> list[tuple[int, str]]:
    """(line number, word) of each former word in a text."""
    words = "|".join((*WORDS, *PHRASES))
    identifiers = "|".join(map(re.escape, IDENTIFIERS))
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", line)  # camelCase -> camel Case
        pattern = rf"(?<![A-Za-z])(?:{words})(?![A-Za-z])"
        found += [(number, match[0]) for match in re.finditer(pattern, split, re.IGNORECASE)]
        found += [(number, match[0]) for match in re.finditer(rf"\b(?:{identifiers})\b", line)]
    return found


@pytest.mark.parametrize(
    "text",
    [
        "model.nats",
        "def _check_room(): ...",
        "class RoomSize:",
        "SAID",
        "as FrozenWork(x)",
    ],
)
def test_a_former_word_is_found_wherever_it_stands(text):
    assert former_words(text)


@pytest.mark.parametrize("text", ["the classroom", "retained", "a saidiya", "besides"])
def test_a_part_of_another_word_is_none(text):
    assert not former_words(text)


def test_the_former_vocabulary_is_nowhere():
    files = searched()
    known = {"README.md", "docs/training.md", "mmllm/model.py", "train/train.py"}
    assert known | {"tests/test_model.py"} <= set(files)
    problems = []
    for name in files:
        text = (ROOT / name).read_text(encoding="utf-8")
        for file, kept, _ in ALLOWED:
            if file == name:
                text = text.replace(kept, " ")
        problems += [f"{name}:{number}: {word}" for number, word in former_words(text)]
    assert not problems, "reword, see WORDS:\n" + "\n".join(problems)


@pytest.mark.parametrize(("name", "kept", "reason"), ALLOWED)
def test_what_is_allowed_is_still_there(name, kept, reason):
    assert reason
    assert kept in (ROOT / name).read_text(encoding="utf-8")
    assert former_words(kept)
