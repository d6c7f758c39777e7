"""What is wrong with a row costs that row: in the check, in the cache and in training alike, for
every reader. Each field of a good row, at any depth, takes each of the values that files hold."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmllm import config
from mmllm import model as models
from mmllm.data import checking
from mmllm.training import precompute, trainer
from mmllm.training.feed import open_sources, render_all_items
from tests.data.files import picture, write_tar

DEEP: Any = "x"
for _ in range(400):
    DEEP = [DEEP]
VALUES = [
    None,
    5,
    float("nan"),
    float("inf"),
    True,
    "",
    " \n",
    [],
    ["x"],
    {"a": 1},
    DEEP,
    "half \ud800",
    "word " * 20_000,
    "/9j/" + "A" * 5000,
]
LINES = [
    b"{",
    b"[1, 2]",
    b"null",
    b"5",
    b'"text"',
    b"[" * 100_000,
    b'{"a": "caf\xe9"}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b"{}",
]
PHRASES = {"direction": "generate", "prompts": ["Draw {caption}, {size}."], "replies": ["Here."]}
PAIR = {"direction": "understand", "prompts": ["What is this?"]}
ASKED = {"role": "user", "content": [{"type": "text", "text": "Draw."}]}
TURNS = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "A cat."}]

READERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pairs": (
        {"file": "a.png", "caption": "red", "size": 3, "modality": "image"},
        {"modality": "image", **PHRASES},
    ),
    "dialogues": (
        {
            "messages": [
                ASKED,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "Here."},
                        {"type": "image", "file": "a.png", "caption": "red"},
                    ],
                },
            ]
        },
        {},
    ),
    "messages": (
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "value": "?"}]},
                {"role": "assistant", "content": "A cat."},
            ],
        },
        {},
    ),
    "llava": ({"image": "a.png", "conversations": TURNS}, {}),
    "nextgpt": (
        {
            "output_image": "a.png",
            "image_captions": ["red"],
            "conversations": [
                {"from": "human", "value": "Draw."},
                {"from": "gpt", "value": "<image>"},
            ],
        },
        {},
    ),
    "alpaca": ({"instruction": "Add.", "input": "2 and 2", "output": "4"}, {}),
    "table": (
        {"file": "a", "caption": "red", "size": 3},
        {"path": "{file}.png", "modality": "image", **PHRASES},
    ),
}


def broken(row: Any) -> Iterator[Any]:
    """The row with each value at each path, and without the value of that path."""
    for *path, last in places(row):
        for value in VALUES:
            changed = inner = copy.deepcopy(row)
            for key in path:
                inner = inner[key]
            inner[last] = value
            yield changed
        changed = inner = copy.deepcopy(row)
        for key in path:
            inner = inner[key]
        del inner[last]
        yield changed


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a row."""
    if not isinstance(value, dict | list):
        return
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        yield from places(entry, (*path, key))


def write(kind: str, folder: Path, row: Any) -> dict[str, Any]:
    """A file of broken rows among good ones; returns how a config names it."""
    lines = []
    for number, changed in enumerate(broken(row)):
        if number % 3 == 0:
            lines.append(json.dumps(row).encode())
        lines.append(json.dumps(changed).encode())
    for line in LINES:
        lines += [line, json.dumps(row).encode()]
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    return {"type": kind, "file": str(folder / "rows.jsonl")}


def make_shards(folder: Path) -> dict[str, Any]:
    png = picture(folder / "a.png").read_bytes()
    files: dict[str, bytes] = {}
    for number, value in enumerate(VALUES):
        files |= {f"{number}.png": png, f"{number}.json": json.dumps({"alt": value}).encode()}
    for number, data in enumerate(LINES):
        files |= {f"line{number}.png": png, f"line{number}.json": data}
    for number in range(12):
        files |= {f"good{number}.png": png, f"good{number}.json": b'{"alt": "red"}'}
    files |= {"torn.png": png[:40], "torn.json": b'{"alt": "red"}', "alone.json": b"{}"}
    write_tar(folder / "a.tar", files)
    return {
        "type": "webdataset",
        "shards": str(folder / "a.tar"),
        "caption": "json:alt",
        "modality": "image",
        **PAIR,
    }


@pytest.mark.parametrize("kind", [*READERS, "webdataset"])
def test_a_broken_row_costs_itself(kind: str, make_run, tmp_path: Path, caplog):
    folder = tmp_path / "data"
    folder.mkdir()
    picture(folder / "a.png")
    if kind == "webdataset":
        entry = make_shards(folder)
    else:
        row, fields = READERS[kind]
        entry = {**write(kind, folder, row), **fields}
    data = {"rows": config.parse_component("data", entry, "stage.data.rows")}
    source = open_sources(data, "stage.data")["rows"]
    run = make_run(
        steps=2,
        batch_size=-(-len(source) // 2),
        gradient_accumulation_steps=1,
        max_length=200,
        max_skip_fraction=1.0,
        losses={"text": 1.0, "align": 1.0, "denoise": 0.1},
        learning_rates={"*_projections.*": 1e-3},
        save_steps=2,
        cache=str(tmp_path / "cache"),
    )
    run = replace(run, stage=replace(run.stage, data=data))
    model = models.build(run.system)

    sources = {"rows": source}
    report = checking.check(
        sources, tmp_path / "check", progress=False, renderer=model.renderer, max_length=200
    )
    assert report.findings["rows"].read == len(source)
    found = {
        (f"rows/{problem.row}", problem.message)
        for problem in report.problems
        if problem.kind not in ("duplicate", "tag")
    }
    of_rows = {
        (f"rows/{problem.row}", problem.message)
        for problem in report.problems
        if problem.kind in ("row", "caption", "placeholder", "outside", "too long")
    }
    assert len(of_rows) > len(found) / 2
    assert all(len(message) <= 1000 for _, message in found)
    page = (tmp_path / "check" / "problems.jsonl").read_text(encoding="utf-8")
    assert page.count("\n") == len(report.problems)

    skipped: list[tuple[str, str]] = []
    good = sum(1 for _ in render_all_items(model.renderer, sources, skipped=skipped))
    assert good + len(skipped) == len(source)
    assert set(skipped) <= found
    with caplog.at_level(logging.WARNING):
        precompute.fill_cache(run, progress=False)
    assert f"{len(skipped)} of {len(source)} rows cannot be used" in caplog.text

    caplog.clear()
    with caplog.at_level(logging.WARNING):
        output = trainer.train(run, progress=False)
    rows = json.loads((output / "skipped.json").read_text())
    assert {row["item"] for row in rows} == {name for name, _ in found}
    assert {(row["item"], row["error"]) for row in rows} >= of_rows
    assert (output / "checkpoints" / "step-00000002").is_dir()
    records = [record for record in caplog.records if record.msg.startswith("skipped ")]
    assert len(records) == len(rows), "each is named once, however often it is drawn"
    total = sum(row["times"] for row in rows)
    assert f"{total} of {2 * run.stage.batch_size} items drawn" in caplog.text
