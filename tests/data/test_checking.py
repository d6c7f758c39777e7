"""`mmllm data check`: each kind of fault is planted once and must be found, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmllm import config, media, model, planning
from mmllm.cli import INTERRUPTED, main
from mmllm.conversation import Image
from mmllm.data import check_report, checking
from mmllm.model import AnyToAny
from tests.data.files import clip, picture, sound, source, write_json


def turns(text: str, answer: str = "Yes.") -> list[dict[str, str]]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Ten rows, of which the first three are good."""
    picture(tmp_path / "a.png", 10)
    sound(tmp_path / "a.wav")
    clip(tmp_path / "a.mp4", 40)
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    whole = Image.from_numpy(noise).save(tmp_path / "torn.png")
    whole.write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    rows = [
        {"input_image": "a.png", "conversations": turns("<image> Grey?")},
        {"input_audio": "a.wav", "conversations": turns("<audio> A tone?")},
        {
            "output_video": "a.mp4",
            "video_captions": "grey",
            "conversations": turns("Grey.", "<video>"),
        },
        {"input_image": "none.png", "conversations": turns("<image> Gone?")},
        {"input_image": "torn.png", "conversations": turns("<image> Torn?")},
        {"input_image": "copy.png", "conversations": turns("<image> Grey?")},
        {"input_image": "a.png", "conversations": turns("<image> <Image> <image_00>?")},
        {"input_image": "../a.png", "conversations": turns("<image> Whose?")},
        {"input_image": "a.png", "conversations": turns("<image> <image> Two?")},
        {"output_image": "a.png", "image_captions": " ", "conversations": turns("!", "<image>")},
    ]
    write_json(tmp_path / "rows.json", rows)
    return tmp_path


PLANTED = {
    "missing": ["none.png"],
    "corrupt": ["torn.png"],
    "duplicate": ["copy.png"],
    "tag": ["a.png", "a.png"],
    "outside": ["../a.png"],
    "placeholder": ["a.png"],
    "caption": ["a.png"],
}


def test_every_fault_is_found_and_no_other(faulty: Path):
    report = checking.check(
        {"rows": source("nextgpt", file=str(faulty / "rows.json"))}, faulty / "out", progress=False
    )
    found: dict[str, list[str]] = {}
    for problem in report.problems:
        found.setdefault(problem.kind, []).append(problem.row.split("(")[1].rstrip(")"))
    assert found == PLANTED
    assert report.findings["rows"].media == {"image in": 5, "audio in": 1, "video out": 1}
    lines = list(check_report.table(report))
    assert lines[0].split()[:3] == ["dataset", "rows", "read"]
    assert lines[1].split()[:3] == ["rows", "10", "10"]
    page = report.page.read_text()
    assert page.count("<article>") == 5, "rows whose media can be shown"
    assert len(list((faulty / "out").glob("*.webp"))) == 1
    written = (faulty / "out" / "problems.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in written] == [p.kind for p in report.problems]


def test_oversized_media_are_found_by_their_header(faulty: Path):
    sources = {"rows": source("nextgpt", file=str(faulty / "rows.json"))}
    with media.limits(pixels=20):
        report = checking.check(sources, faulty / "out", progress=False, samples=1)
    kinds = {problem.kind for problem in report.problems}
    assert "oversized" in kinds
    assert any("48 pixels" in problem.message for problem in report.problems)


def test_headers_only_does_not_find_truncated_files(faulty: Path):
    sources = {"rows": source("nextgpt", file=str(faulty / "rows.json"))}
    report = checking.check(sources, faulty / "out", progress=False, headers_only=True, samples=1)
    kinds = {problem.kind for problem in report.problems}
    assert kinds == PLANTED.keys() - {"corrupt"}


def test_truncated_files_are_reported_on_the_page_after_a_check_of_headers(faulty: Path):
    """What is shown is decoded, and what cannot be is a problem of its row."""
    sources = {"rows": source("nextgpt", file=str(faulty / "rows.json"))}
    report = checking.check(sources, faulty / "out", progress=False, headers_only=True)
    assert {problem.kind for problem in report.problems} == PLANTED.keys()


def test_the_command_reads_a_stage_and_exits_by_what_it_found(
    faulty: Path, system_tree: dict, monkeypatch, capsys
):
    monkeypatch.chdir(faulty)
    stage = {
        "name": "s",
        "output": "run",
        "learning_rates": {"*": 0.1},
        "losses": {"text": 1},
        "data": {"rows": {"type": "nextgpt", "file": "rows.json"}},
    }
    Path("run.yaml").write_text(yaml.safe_dump({"system": system_tree, "stage": stage}))
    assert main(["data", "check", "run.yaml"]) == 1
    shown = capsys.readouterr()
    assert "missing: 1" in shown.out
    assert "none.png: no such file" in shown.out
    assert Path("run/data-check/index.html").is_file()

    good = json.loads(Path("rows.json").read_text())[:3]
    write_json(Path("rows.json"), good)
    assert main(["data", "check", "run.yaml", "--limit", "2", "--out", "sheet"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["rows", "3", "2"]
    assert Path("sheet/index.html").is_file()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmllm.data.formats.nextgpt.NextGPT.conversation", interrupted)
    assert main(["data", "check", "run.yaml"]) == INTERRUPTED
    assert "stopped" in capsys.readouterr().err


def test_rows_that_are_too_long_are_counted_with_what_would_fit(
    tmp_path: Path, system_tree: dict, monkeypatch, capsys
):
    """As training skips them: by the tokens of the stage's own tokenizer and template."""
    words = [1, 20, 95, 200]
    rows = [
        {"instruction": f"Say {count}.", "input": "", "output": "hello " * count} for count in words
    ]
    monkeypatch.chdir(tmp_path)
    write_json(Path("rows.json"), rows)
    stage = {
        "name": "s",
        "output": "run",
        "learning_rates": {"*": 0.1},
        "losses": {"text": 1},
        "max_length": 100,
        "data": {"rows": {"type": "alpaca", "file": "rows.json"}},
    }
    Path("run.yaml").write_text(yaml.safe_dump({"system": system_tree, "stage": stage}))
    renderer = planning.renderer(config.parse_system(system_tree))
    own = model.build(config.parse_system(system_tree)).renderer
    talks = source("alpaca", file="rows.json")
    lengths = []
    for index in range(len(rows)):
        conversation = talks.conversation(index, np.random.default_rng(0))
        lengths.append(len(own.render(conversation)))
        assert renderer.render(conversation).ids == own.render(conversation).ids
    assert main(["data", "check", "run.yaml"]) == 1
    shown = capsys.readouterr().out
    longer = [length for length in lengths if length > 100]
    assert len(longer) == 2
    assert f"too long: {len(longer)}" in shown
    assert f"rows/3: {lengths[3]} tokens, but stage.max_length is 100" in shown
    table = [line.split() for line in shown.splitlines() if line.startswith(("rows that", "rows "))]
    steps = [int(step.replace(",", "")) for step in table[1][4:-1]]
    assert 100 in steps
    assert [int(count) for count in table[2][1:]] == [
        *(sum(length <= step for length in lengths) for step in steps),
        max(lengths),
    ]
    assert main(["data", "check", "run.yaml", f"stage.max_length={max(lengths)}"]) == 0


def test_rows_that_the_model_cannot_read_are_found(
    tmp_path: Path, make_model: Callable[..., AnyToAny]
):
    picture(tmp_path / "a.png")
    rows = [{"image": "a.png", "conversations": turns("<image> Grey?")}]
    sources = {"rows": source("llava", file=write_json(tmp_path / "rows.json", rows))}
    blind = make_model(encoders={}, input_projections={}).renderer
    report = checking.check(sources, tmp_path / "out", progress=False, renderer=blind)
    assert [problem.kind for problem in report.problems] == ["row"]
    assert "no encoder for image" in report.problems[0].message


def test_without_the_tokenizer_the_rest_is_looked_at(
    faulty: Path, system_tree: dict, monkeypatch, capsys
):
    monkeypatch.chdir(faulty)
    stage = {
        "name": "s",
        "output": "run",
        "learning_rates": {"*": 0.1},
        "losses": {"text": 1},
        "data": {"rows": {"type": "nextgpt", "file": "rows.json"}},
    }
    absent = {**system_tree, "llm": {"weights": "./nowhere"}}
    Path("run.yaml").write_text(yaml.safe_dump({"system": absent, "stage": stage}))
    assert main(["data", "check", "run.yaml"]) == 1
    shown = capsys.readouterr()
    assert "missing: 1" in shown.out
    assert "lengths of rows are not checked: llm.weights" in shown.err
