"""Labelled media of one's own: folders, names of files, tables, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmllm.config import build, parse_component
from mmllm.conversation import Audio, Image
from mmllm.data.formats.labelled import caption_of_label, read_labelled
from mmllm.errors import ConfigError


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return Image.from_numpy(np.full((8, 8, 3), 90, np.uint8)).save(path)


def labels(source: Path) -> list[tuple[str, str]]:
    items = read_labelled(source).items
    return [(Path(str(item.medium.source)).name, item.label) for item in items]


def test_subfolders_are_labels(tmp_path: Path) -> None:
    for name in ("red_panda/1.png", "red_panda/more/2.png", "axe/a.jpg"):
        image(tmp_path / name)
    (tmp_path / ".hidden").mkdir()
    assert labels(tmp_path) == [("a.jpg", "axe"), ("1.png", "red panda"), ("2.png", "red panda")]


def test_names_of_files_are_labels(tmp_path: Path) -> None:
    for name in ("Rex.png", "red panda (2).png", "red-panda_01.png", "umbrella3.png"):
        image(tmp_path / name)
    assert [label for _, label in labels(tmp_path)] == ["Rex", "red panda", "red-panda", "umbrella"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "file,label\na.png,red panda\nb.png,axe\n"),
        ("t.tsv", "path\tcaption\na.png\tred panda\nb.png\taxe\n"),
        ("metadata.csv", "file_name,text\na.png,red panda\nb.png,axe\n"),
        ("t.jsonl", '{"image": "a.png", "name": "red panda"}\n{"image": "b.png", "name": "axe"}\n'),
    ],
)
def test_tables_name_files_and_labels(tmp_path: Path, name: str, text: str) -> None:
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    (tmp_path / name).write_text(text, encoding="utf-8")
    source = tmp_path if name.startswith("metadata") else tmp_path / name
    assert labels(source) == [("a.png", "red panda"), ("b.png", "axe")]


def test_a_file_that_cannot_be_read_costs_itself(tmp_path: Path) -> None:
    image(tmp_path / "axe/a.png")
    (tmp_path / "axe/b.png").write_bytes(b"no image")
    Audio.from_numpy(np.zeros(1600, np.float32), 16_000).save(tmp_path / "axe/c.wav")
    found = read_labelled(tmp_path)
    assert [item.medium.modality for item in found.items] == ["image", "audio"]
    assert len(found.skipped) == 1
    assert "b.png" in found.skipped[0]


def test_a_row_outside_the_folder_is_skipped(tmp_path: Path) -> None:
    image(tmp_path / "in/a.png")
    image(tmp_path / "b.png")
    table = tmp_path / "in/t.csv"
    table.write_text("file,label\na.png,axe\n../b.png,axe\n,axe\n", encoding="utf-8")
    found = read_labelled(table)
    assert len(found.items) == 1
    assert [("lies outside" in line, "row 3" in line) for line in found.skipped] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nothing", None, "no such folder or file"),
        ("a.txt", "x", "expected a folder of media, or a table"),
        ("t.csv", "file,whatever\na.png,axe\n", "no column of labels.*got file, whatever"),
        ("t.csv", "file,label\na.png,axe\n", "no media with labels.*the first that was skipped"),
    ],
)
def test_what_is_no_labelled_data_says_what_is(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_labelled(tmp_path / name)


@pytest.mark.parametrize(
    ("label", "caption"),
    [
        ("red panda", "a red panda"),
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("hour glass", "an hour glass"),
        ("one-way street", "a one-way street"),
        ("my bicycle", "my bicycle"),
        ("Rex", "Rex"),
        ("3 bears", "3 bears"),
    ],
)
def test_labels_are_spoken_as_noun_phrases(label: str, caption: str) -> None:
    assert caption_of_label(label) == caption


def test_a_stage_asks_about_each_file(tmp_path: Path) -> None:
    image(tmp_path / "red_panda/1.png")
    image(tmp_path / "axe/1.png")
    entry = {
        "type": "labelled",
        "source": str(tmp_path),
        "modality": "image",
        "direction": "generate",
        "prompts": ["Draw {caption}; {label}."],
        "replies": ["Here is {caption}."],
    }
    dataset = build(parse_component("data", entry, "data.mine"), where="data.mine")
    rng = np.random.default_rng(0)
    asked, answered = dataset.conversation(1, rng)
    assert len(dataset) == 2
    assert asked.text == "Draw a red panda; red panda."
    assert answered.text == "Here is a red panda."
    assert [medium.caption for medium in answered.media] == ["a red panda"]
    assert dataset.name(0).endswith("axe/1.png")


def test_a_stage_without_labelled_files_says_so(tmp_path: Path) -> None:
    entry = {
        "type": "labelled",
        "source": str(tmp_path),
        "modality": "image",
        "direction": "generate",
        "prompts": ["Draw {caption}."],
    }
    with pytest.raises(ConfigError, match=r"data\.mine\.source: .* no labelled files"):
        build(parse_component("data", entry, "data.mine"), where="data.mine")
