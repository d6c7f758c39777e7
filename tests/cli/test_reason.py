"""`mmllm reason`: searches from the command line, their files, and mistakes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import mmllm
from mmllm.cli import FAILED, main
from mmllm.reasoning import ScriptedModel
from mmllm.reasoning.problems.cipher import encode
from tests.reasoning.optimizers import descend
from tests.reasoning.readers import NAMES, SOUND, TEXT, perceiving, scripted


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(text: str, rng: random.Random) -> str:
        return descend(text, rng) if "w=" in text else "nothing"

    def likelihood(_: str, reply: str) -> float:
        return sum(letter in "etaoin" for letter in reply)

    monkeypatch.setattr(mmllm, "load", lambda *_: ScriptedModel(rule, likelihood))


def test_a_search_prints_what_it_found_and_the_baselines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / name for name in ("run.jsonl", "result.json", "curve.png")}
    arguments = ["reason", "search", "regression", "--steps", "8", "--seed", "1"]
    arguments += ["--record", str(files["run.jsonl"]), "--json", str(files["result.json"])]
    assert main([*arguments, "--curve", str(files["curve.png"])]) == 0
    out, err = capsys.readouterr()
    assert "linear regression (15, 14), strategy opro: [15, 14] (a solution" in out
    assert "random search at" in out
    assert "hill climbing at" in out
    assert "best of step" not in err  # no table without a terminal
    tree = json.loads(files["result.json"].read_text())
    assert tree["best"]["candidate"] == "[15, 14]"
    assert [entry["name"] for entry in tree["baselines"]] == ["random search", "hill climbing"]
    assert files["curve.png"].read_bytes().startswith(b"\x89PNG")
    assert len(files["run.jsonl"].read_text().splitlines()) == tree["usage"]["calls"]
    before = {name: file.read_bytes() for name, file in files.items()}
    assert main([*arguments, "--curve", str(files["curve.png"])]) == 0  # from the record
    assert {name: file.read_bytes() for name, file in files.items()} == before


@pytest.mark.parametrize("problem", ["salesman", "blocksworld", "arithmetic"])
def test_every_problem_can_be_searched(problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reason", "search", problem, "--steps", "2", "--max-calls", "1"]) == 0
    out = capsys.readouterr().out
    assert "ended after 1 steps (budget)" in out
    assert "answers in a row were unusable" in out


def test_a_terminal_sees_a_line_per_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    main(["reason", "search", "regression", "--target", "36", "-1", "--steps", "3"])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["1", "8/8"], ["2", "8/8"], ["3", "8/8"]]


def test_a_cipher_is_decoded(capsys: pytest.CaptureFixture[str]) -> None:
    text = "the queen was not amused at all"
    assert main(["reason", "cipher", encode(text, 7), "--shift", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"generate and test: {text} (shift 7)", "asked directly: nothing"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--max-calls", "0"], "--max-calls: expected at least 1, got 0"),
        (["--json", "/dev/null/x.json"], "--json /dev/null/x.json: cannot be written"),
        (["--curve", "curve.xyz"], "--curve curve.xyz: cannot be written"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reason", "search", "regression", "--steps", "1", *arguments]) == FAILED
    assert message in capsys.readouterr().err


def test_a_sound_is_read_by_segments_of_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmllm, "load", lambda *_: perceiving())
    file, result = tmp_path / "long.wav", tmp_path / "result.json"
    SOUND.save(file)
    command = ["reason", "read", str(file), "When is the thing4 there?", "--segment-seconds", "1"]
    command += ["--trees", str(tmp_path / "trees"), "--json", str(result), "--compare"]
    assert main(command) == 0
    assert "last segment: 4.0 s to 5.0 s" in capsys.readouterr().err
    tree = json.loads(result.read_text())
    assert tree["segments"] == [4]
    assert (tree["baselines"]["lexical"], tree["baselines"]["truncated"]) == ("thing4", None)
    assert main([*command[:4], "--segment-seconds", "0"]) == FAILED
    assert "seconds: expected more than 0" in capsys.readouterr().err


def test_a_text_is_read_and_its_tree_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scripted()
    monkeypatch.setattr(mmllm, "load", lambda *_: model)
    monkeypatch.chdir(tmp_path)
    book, result = tmp_path / "book.txt", tmp_path / "result.json"
    book.write_text(TEXT, encoding="utf-8")
    command = ["reason", "read", str(book), "Who keeps clocks?", "--segment-tokens", "40"]
    command += [word for name in NAMES for word in ("--option", name)]
    assert main([*command, "--compare", "--json", str(result)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Eli"
    assert lines[-2:] == ["lexical: Eli", "likelihood: Eli"]
    assert json.loads(result.read_text())["stopped"] == "answered"
    num_calls = len(model.conversations)
    assert main(command) == 0
    assert len(model.conversations) == num_calls  # no summary was written again
    assert len(list((tmp_path / ".mmllm-trees").iterdir())) == 1
    assert main(["reason", "read", "nothing.txt", "Who?"]) == FAILED
    assert "nothing.txt: no text can be read from it" in capsys.readouterr().err


def test_a_message_is_answered_from_what_should_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(text: str, rng: random.Random) -> str:
        return "Where is Paris?" if "Text by User" in text else f"answer to: {text.split('?')[0]}"

    monkeypatch.setattr(mmllm, "load", lambda *_: ScriptedModel(rule))
    assert main(["reason", "focus", "Where is Paris? I think it is in Spain."]) == 0
    out, err = capsys.readouterr()
    assert out == "answer to: Where is Paris\n"
    assert "Where is Paris?\n\nAnswer in an unbiased way." in err
    assert "Spain" not in err
